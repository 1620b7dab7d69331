//! `withdraw-backup`: the manifest goes away, and with it the backup.
//!
//! The look for protections and users is taken twice: before, so that nothing is touched in vain, and after the manifest
//! is durably gone, because only then can nobody come in between any more (see the module above). Whoever is found then
//! wins, and the manifest is put back.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, Verdict};

use super::options::Doomed;
use super::shelf::{allowed, must_stay};
use super::users::Users;
use crate::codes;
use crate::image::root::{Folder, RootError};
use crate::manifest::file::{reinstate, withdraw};
use crate::manifest::{self, ManifestError};
use crate::snapshot::Places;

/// Takes the manifest away.
pub struct WithdrawBackup {
    /// Where backups may lie.
    pub places: Places,
    /// Who may need them.
    pub users: Arc<dyn Users>,
}

/// What withdrawing leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withdrawn {
    /// The folder that is no backup any more.
    pub folder: PathBuf,
}

const DOING: &str = "withdraw the backup's manifest";

/// What lies in a folder, as far as this deletion is concerned.
enum There {
    /// The backup, whole.
    Backup(Folder),
    /// What is left of it after its manifest was withdrawn.
    Remains(Folder),
    /// Something else; what.
    Other(String),
}

fn look(places: &Places, input: &Doomed) -> Result<There, RootError> {
    let folder = match places.roots.open_folder(&input.folder) {
        Err(gone @ RootError::Missing { .. }) => {
            // Without the folder above the place itself is not there: what lies on it nobody knows.
            let above = input.folder.parent().ok_or(gone)?;
            places.roots.open_folder(above)?;
            return Ok(There::Other("its folder is gone".to_owned()));
        }
        folder => folder?,
    };
    let is_it = |found: Result<manifest::Stored, ManifestError>| match found {
        Ok(stored) if stored.hash == input.manifest => Ok(Some(true)),
        Ok(_) => Ok(Some(false)),
        Err(ManifestError::Place(RootError::Missing { .. })) => Ok(None),
        Err(ManifestError::Place(e)) => Err(e),
        // It was understood when the plan was made, so it is another file now.
        Err(_) => Ok(Some(false)),
    };
    Ok(match (is_it(manifest::read(&folder))?, is_it(manifest::read_withdrawn(&folder))?) {
        (Some(true), None) => There::Backup(folder),
        (None, Some(true)) => There::Remains(folder),
        (None, None) => There::Other("its manifest is gone".to_owned()),
        _ => There::Other("another manifest lies in its folder".to_owned()),
    })
}

impl WithdrawBackup {
    /// Who or what forbids it; nothing if it may go.
    async fn forbidden(&self, folder: &Folder, input: &Doomed) -> Result<(), Fault> {
        let object = input.folder.display().to_string();
        allowed(folder, Timestamp::now()).map_err(|why| must_stay(&object, &why))?;
        match self.users.of(&input.folder, input.backup).await? {
            None => Ok(()),
            Some(user) => Err(in_use(&object, &user)),
        }
    }
}

/// The refusal to delete a backup that a job needs.
pub(super) fn in_use(object: &str, user: &str) -> Fault {
    Fault::permanent(codes::SUBJECT_BUSY, "delete the backup", object, format!("it is needed: {user}"))
        .remedy("Wait for that job, or cancel it; then delete the backup")
}

fn failed(e: &RootError, input: &Doomed) -> Fault {
    let fault = crate::snapshot::copy::place_fault(
        e,
        codes::CANNOT_REMOVE_FILE,
        DOING,
        &input.folder.display().to_string(),
    );
    fault.remedy("Nothing was deleted. See whether the file system is writable and healthy, then ask again")
}

fn joined<T>(done: Result<Result<T, RootError>, tokio::task::JoinError>, input: &Doomed) -> Result<T, Fault> {
    match done {
        Ok(done) => done.map_err(|e| failed(&e, input)),
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, input.folder.display().to_string(), e)),
    }
}

async fn blocking<T: Send + 'static>(
    input: &Doomed,
    work: impl FnOnce() -> Result<T, RootError> + Send + 'static,
) -> Result<T, Fault> {
    joined(crate::blocking::run(work).await, input)
}

#[async_trait]
impl Step for WithdrawBackup {
    const KIND: StepKind = StepKind::new("withdraw-backup", 1);
    type Input = Doomed;
    type Output = Withdrawn;

    async fn run(&self, _: &StepContext, input: Doomed) -> Result<Withdrawn, Fault> {
        let (places, wanted) = (self.places.clone(), input.clone());
        let folder = match blocking(&input, move || look(&places, &wanted)).await? {
            There::Backup(folder) => {
                self.forbidden(&folder, &input).await?;
                blocking(&input, move || withdraw(&folder).map(|()| folder)).await?
            }
            // Of an attempt that was cut off, perhaps before its second look.
            There::Remains(folder) => blocking(&input, move || folder.sync().map(|()| folder)).await?,
            There::Other(what) => {
                let object = input.folder.display().to_string();
                return Err(Fault::permanent(codes::FACTS_CHANGED, DOING, object, what)
                    .remedy("Somebody changed the folder meanwhile. Look at it: vmkeep list"));
            }
        };
        match self.forbidden(&folder, &input).await {
            Ok(()) => Ok(Withdrawn { folder: input.folder }),
            Err(why) => {
                blocking(&input, move || reinstate(&folder)).await.map_err(|e| e.class(Class::Transient))?;
                Err(why)
            }
        }
    }

    /// A manifest that is gone says nothing about the second look: the step is run again, which does no harm.
    async fn probe(&self, cx: &StepContext, input: Doomed) -> Verdict<Withdrawn> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        let places = self.places.clone();
        match crate::blocking::run(move || look(&places, &input)).await {
            Ok(Ok(There::Backup(_) | There::Remains(_))) => Verdict::NotDone,
            Ok(Ok(There::Other(what))) => Verdict::Diverged(what),
            Ok(Err(e)) => Verdict::Unknown(e.to_string()),
            Err(e) => Verdict::Unknown(e.to_string()),
        }
    }

    async fn undo(&self, _: &StepContext, input: Doomed, _: Option<Withdrawn>) -> Result<(), Fault> {
        let places = self.places.clone();
        let wanted = input.clone();
        let undone = blocking(&input, move || match look(&places, &wanted)? {
            There::Remains(folder) => reinstate(&folder),
            There::Backup(folder) => folder.sync(),
            // Nothing of this job's is there to be put back.
            There::Other(_) => Ok(()),
        });
        undone.await.map_err(|fault| fault.class(Class::Transient))
    }
}
