//! `exchange-tpm`: the state of the domain's TPM becomes the other machine's.
//!
//! It is the one part of an exchange that does not change with the definition (see [`super::state`]), so it has its order
//! instead: the old state is kept with the record, before; the definition is the new machine's, already; and nobody has
//! been let run. Undone, the old state is back before the old definition is.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Code, Fault, Step, StepContext, StepName, Verdict};

use super::aside::SetAside;
use super::kept::{KeptState, blocking};
use crate::codes;
use crate::hypervisor::{DomainRef, RunState, Trouble};
use crate::image::root::{RelPath, RootError};
use crate::restore::fetch::Wanted;
use crate::restore::machine::{unwritable, write_all};
use crate::snapshot::{Places, World, on_the_way_back, theirs};
use crate::tpm;

/// Exchanges the state.
#[derive(Debug)]
pub struct ExchangeTpm {
    /// The world.
    pub world: World,
    /// Where the backup, and what is kept, may be read.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExchangeInput {
    /// The domain.
    pub domain: DomainRef,
    /// The folder of its TPM.
    pub folder: PathBuf,
    /// What comes.
    pub from: TpmFrom,
    /// The folder in which the old state is kept, and the step that keeps it there; nothing if there was no such domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<(PathBuf, StepName)>,
}

/// Where the new state comes from. No files: the machine gets a new TPM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum TpmFrom {
    /// From a backup: its files, each with its folder and name in the TPM's.
    Backup {
        /// The files.
        files: Vec<(Wanted, String, String)>,
    },
    /// From a machine that is kept aside.
    Kept {
        /// Its folder.
        kept: PathBuf,
        /// The files.
        files: Vec<KeptState>,
    },
}

/// What it leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExchangeOutput {
    /// The domain has the new state. If not, somebody has started it before.
    pub given: bool,
}

const DOING: &str = "exchange the TPM's state";

impl ExchangeInput {
    /// Somebody has started the domain. A backup still holds the state when this job is over; of a machine that was kept
    /// aside there is no other copy than the one that is about to be forgotten.
    fn started(&self) -> Result<ExchangeOutput, Fault> {
        match &self.from {
            TpmFrom::Backup { .. } => Ok(ExchangeOutput { given: false }),
            TpmFrom::Kept { .. } => {
                let cause = "somebody has started it before its TPM had the state that belongs to it";
                Err(Fault::permanent(Code::FACTS_CHANGED, DOING, &self.domain.name, cause)
                    .remedy("Start the undo again, and keep others from starting the domain meanwhile"))
            }
        }
    }
}

impl ExchangeTpm {
    async fn is_off(&self, domain: &DomainRef) -> Result<bool, Fault> {
        match self.world.hypervisor.state(&domain.id).await {
            Ok(state) => Ok(state == RunState::Off),
            Err(e) if e.trouble == Trouble::NoSuchDomain => Ok(true),
            Err(e) => Err(on_the_way_back(e, codes::CANNOT_START_MACHINE, DOING, &domain.name)),
        }
    }

    async fn put(&self, folder: PathBuf, from: TpmFrom, name: &str) -> Result<(), Fault> {
        let places = self.places.clone();
        match from {
            TpmFrom::Backup { files } => {
                let written = crate::blocking::run(move || write_all(&places, &folder, &files));
                written.await.unwrap_or_else(|e| Err(Fault::permanent(Code::UNDEFINED, DOING, name, e)))
            }
            TpmFrom::Kept { kept, files } => put_kept(&places, folder, kept, files).await,
        }
    }
}

async fn put_kept(
    places: &Places,
    folder: PathBuf,
    kept: PathBuf,
    files: Vec<KeptState>,
) -> Result<(), Fault> {
    let code = codes::MISSING_NECESSARY_FILES;
    let (object, from) = (kept.display().to_string(), kept.clone());
    let read = blocking(places, code, DOING, &kept, move |places| {
        let open = places.roots.open_folder(&from)?;
        let mut found = Vec::new();
        for file in &files {
            let bytes = open.open_file(&RelPath::from(file.file.clone())).and_then(|mut file_| {
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut file_, &mut bytes).map_err(|source| RootError::Io {
                    act: "read",
                    path: open.path_of(&file.file),
                    source,
                })?;
                Ok(bytes)
            })?;
            found.push((file.clone(), bytes));
        }
        Ok(found)
    });
    let found = read.await?;
    let mut state = Vec::new();
    for (file, bytes) in &found {
        let Some((below, name)) = file.place().filter(|_| file.blake3 == blake3::hash(bytes).into()) else {
            let cause = format!("{} is not the file that was kept", file.file);
            return Err(Fault::permanent(codes::MANIFEST_MISMATCH, DOING, object, cause));
        };
        state.push((below.to_owned(), name.to_owned(), bytes.clone()));
    }
    let written = crate::blocking::run(move || {
        let state: Vec<_> =
            state.iter().map(|(b, n, bytes)| (b.as_str(), n.as_str(), bytes.as_slice())).collect();
        tpm::write(&folder, &state).map_err(|e| unwritable(&folder, &e))
    });
    written.await.unwrap_or_else(|e| Err(Fault::permanent(Code::UNDEFINED, DOING, object, e)))
}

#[async_trait]
impl Step for ExchangeTpm {
    const KIND: StepKind = StepKind::new("exchange-tpm", 1);
    type Input = ExchangeInput;
    type Output = ExchangeOutput;

    async fn run(&self, cx: &StepContext, input: ExchangeInput) -> Result<ExchangeOutput, Fault> {
        let done = ExchangeOutput { given: true };
        // Written whole by an attempt that was cut off: whoever has started the domain since has it.
        if cx.progress.saved().is_some() {
            return Ok(done);
        }
        if !self.is_off(&input.domain).await? {
            return input.started();
        }
        self.put(input.folder.clone(), input.from.clone(), &input.domain.name).await?;
        // Started in that very moment it may have either.
        if !self.is_off(&input.domain).await? {
            return input.started();
        }
        cx.progress.save(&done).await?;
        Ok(done)
    }

    /// Writing it again while the domain is off does no harm.
    async fn probe(&self, cx: &StepContext, _: ExchangeInput) -> Verdict<ExchangeOutput> {
        cx.may_repeat()
    }

    async fn undo(
        &self,
        cx: &StepContext,
        input: ExchangeInput,
        _: Option<ExchangeOutput>,
    ) -> Result<(), Fault> {
        let name = input.domain.name.as_str();
        let doing = "give the old machine its TPM's state back";
        if !self.is_off(&input.domain).await? {
            return Err(theirs(doing, &input.domain, "somebody has started it meanwhile"));
        }
        let from = match &input.old {
            None => TpmFrom::Backup { files: Vec::new() },
            Some((kept, step)) => match cx.outputs.of::<SetAside>(step)?.and_then(|kept| kept.tpm) {
                Some(files) => TpmFrom::Kept { kept: kept.clone(), files },
                None => return Ok(()),
            },
        };
        let back = self.put(input.folder, from, name).await;
        back.map_err(|fault| {
            if fault.code == codes::MANIFEST_MISMATCH { fault } else { fault.class(Class::Transient) }
        })
    }

    async fn probe_undo(&self, cx: &StepContext, _: ExchangeInput, _: Option<ExchangeOutput>) -> Verdict<()> {
        cx.may_repeat()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::image::root::Roots;
    use crate::snapshot::tests::context;
    use crate::snapshot::tests::fake::{Fake, domain};

    #[tokio::test]
    async fn the_only_copy_of_a_tpms_state_is_not_given_up_for_a_domain_that_somebody_has_started() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { roots: Arc::new(Roots::open([dir.path()]).unwrap()) };
        let fake = Fake::new();
        let step = ExchangeTpm { world: fake.world(), places };
        let folder = dir.path().join("uuid");
        let input = |from| ExchangeInput { domain: domain(), folder: folder.clone(), from, old: None };
        let kept = || TpmFrom::Kept { kept: dir.path().to_owned(), files: Vec::new() };
        let fault = step.run(&context(1), input(kept())).await.unwrap_err();
        assert_eq!(fault.code, Code::FACTS_CHANGED);
        let backup = TpmFrom::Backup { files: Vec::new() };
        assert!(!step.run(&context(1), input(backup)).await.unwrap().given);
        fake.state().die();
        assert!(step.run(&context(1), input(kept())).await.unwrap().given);
    }
}
