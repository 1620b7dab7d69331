//! `copy-image`: one file of a disk's chain goes into the backup's folder.
//!
//! The files stand still since the snapshot, so they are read as files. That they *do* stand still is checked against
//! what they were right after the snapshot, also over interruptions: a resumed copy of a file that was written in
//! between would mix two points in time, and so would one that begins anew. How it is copied: [`super::transfer`].

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, StepName, Verdict};

use super::disk::JobDisk;
use super::growth::Watch;
use super::take::TakeSnapshot;
use super::transfer::{self, Failing, Reports, transfer};
use super::{Places, World};
use crate::codes;
use crate::hypervisor::DomainRef;
use crate::image::chain::{FileToCopy, header_for};
use crate::image::copy::{self, Method, Options, SourceFile, Start, Throttle};
use crate::image::qcow2::Format;
use crate::image::root::RootError;
use crate::image::space::LowWater;

/// Copies a file of a chain.
#[derive(Debug)]
pub struct CopyImage {
    /// The world.
    pub world: World,
    /// Where may be written.
    pub places: Places,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyInput {
    /// The domain.
    pub domain: DomainRef,
    /// The disks whose overlays grow meanwhile.
    pub disks: Vec<JobDisk>,
    /// How much room they must leave.
    pub low_water: LowWater,
    /// The file.
    pub file: FileToCopy,
    /// Where it goes.
    pub folder: PathBuf,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
    /// The step after which the file stands still.
    pub taken: StepName,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOutput {
    /// Its name in the folder.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// BLAKE3 of the copy, in hexadecimal.
    pub hash: String,
    /// BLAKE3 of the source, where the copy begins with another header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_hash: Option<String>,
    /// How the bytes were moved.
    pub method: Method,
    /// Bytes of data that the last attempt moved.
    pub moved: u64,
}

#[async_trait]
impl Step for CopyImage {
    const KIND: StepKind = StepKind::new("copy-image", 1);
    type Input = CopyInput;
    type Output = CopyOutput;

    async fn run(&self, cx: &StepContext, input: CopyInput) -> Result<CopyOutput, Fault> {
        let watch = Watch::start(self.world.clone(), input.domain.id, input.disks.clone(), input.low_water);
        let taken = cx.outputs.of::<TakeSnapshot>(&input.taken)?;
        let frozen =
            taken.and_then(|taken| taken.frozen.into_iter().find(|(path, _)| *path == input.file.source));
        let work = Work {
            places: self.places.clone(),
            input: input.clone(),
            frozen: frozen.map(|(_, identity)| identity),
            start: transfer::start(cx),
            reports: Reports::of(cx, watch),
        };
        let done = crate::blocking::run(move || work.copy()).await;
        match done {
            Ok(done) => done,
            Err(e) => {
                Err(Fault::permanent(Code::UNDEFINED, "copy the image", input.file.name.to_string(), e))
            }
        }
    }

    async fn probe(&self, cx: &StepContext, input: CopyInput) -> Verdict<CopyOutput> {
        if cx.still_running {
            return Verdict::InFlight("the copy is going on".to_owned());
        }
        transfer::how_far(cx, &self.places, input.folder, input.file.name).await
    }

    async fn undo(&self, _: &StepContext, input: CopyInput, _: Option<CopyOutput>) -> Result<(), Fault> {
        let places = self.places.clone();
        let object = input.folder.join(input.file.name.as_str()).display().to_string();
        let gone = crate::blocking::run(move || {
            let folder = match places.roots.open_folder(&input.folder) {
                Err(RootError::Missing { .. }) => return Ok(()),
                folder => folder?,
            };
            folder.remove_file(&input.file.name)?;
            folder.sync()
        })
        .await;
        match gone {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(place_fault(&e, codes::CANNOT_REMOVE_FILE, "remove the copy", &object)),
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, "remove the copy", object, e)),
        }
    }
}

/// The failure of a place below a root.
pub(crate) fn place_fault(e: &RootError, code: Code, doing: &str, object: &str) -> Fault {
    let code = match e {
        RootError::Outside { .. } | RootError::NotAbsolute { .. } => codes::TARGET_OUTSIDE_ROOTS,
        RootError::BadName { .. } | RootError::Escapes { .. } => codes::UNSAFE_PATH,
        RootError::NoSpace { .. } => codes::NOT_ENOUGH_DISK_SPACE,
        _ => code,
    };
    Fault::permanent(code, doing, object, e)
}

/// What the copying thread works with.
struct Work {
    places: Places,
    input: CopyInput,
    frozen: Option<copy::Identity>,
    start: Start,
    reports: Reports,
}

impl Work {
    fn object(&self) -> String {
        self.input.file.source.display().to_string()
    }

    fn copy(mut self) -> Result<CopyOutput, Fault> {
        let file = &self.input.file;
        let folder = self.places.roots.open_folder(&self.input.folder).map_err(|e| {
            place_fault(
                &e,
                codes::CANNOT_WRITE_TO_BACKUP_LOCATION,
                "open the backup's folder",
                &self.object(),
            )
        })?;
        let source = match file.format {
            Format::Raw => SourceFile::open_raw(&file.source),
            Format::Qcow2 => SourceFile::open(&file.source),
        };
        let source = source.map_err(|e| failing(&self.object()).fault(e))?;
        self.stands_still(&source)?;
        let header = header_for(&source, file).map_err(|e| {
            Fault::permanent(codes::CHAIN_UNREADABLE, "read the image's header", self.object(), e)
        })?;
        let options = Options { header, throttle: Throttle::new(self.input.bandwidth), ..Options::default() };
        let (start, object) = (std::mem::take(&mut self.start), self.object());
        let done =
            transfer(&source, (&folder, &file.name), start, &options, &self.reports, &failing(&object))?;
        Ok(CopyOutput {
            name: file.name.as_str().to_owned(),
            size: done.size,
            hash: done.hash.to_hex().to_string(),
            source_hash: (done.hash != done.source_hash).then(|| done.source_hash.to_hex().to_string()),
            method: done.method,
            moved: done.moved,
        })
    }

    /// The file is the one that was planned, and as it was right after the snapshot.
    fn stands_still(&self, source: &SourceFile) -> Result<(), Fault> {
        let is = source.identity();
        let same = match &self.frozen {
            Some(frozen) => is == *frozen,
            // What lies under a top image is never written to, before the snapshot or after.
            None => is == self.input.file.identity,
        };
        if same {
            return Ok(());
        }
        Err(Fault::permanent(
            codes::SOURCE_CHANGED,
            "copy the image",
            self.object(),
            "it is not as it was right after the snapshot: somebody wrote to it, or put another file in its place",
        )
        .remedy("Find out who did, then start the backup again"))
    }
}

fn failing(object: &str) -> Failing<'_> {
    Failing { doing: "copy the image", object, code: codes::CANNOT_COPY_IMAGE_TO_BACKUP_LOCATION }
}
