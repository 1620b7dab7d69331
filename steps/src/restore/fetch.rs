//! Bringing one file of a backup to its new place: checked, resumable, and never in anybody's way.
//!
//! The file is written beside its place, under a name that holds the job's id ([`super::place`]). Its content is hashed as
//! it is read and compared with the manifest; only then, and only if nothing has the final name, is it renamed. Between the
//! two a note with the file's inode is stored, so after a crash the file under the final name can be told from one that
//! somebody else put there meanwhile.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use vmkeep_workflow::progress::Progress;
use vmkeep_workflow::{Class, Code, Fault, JobId, StepContext, Verdict};

use super::place::{Known, Place};
use crate::codes;
use crate::image::chain::Neighbour;
use crate::image::copy::{
    self, Control, CopyError, Identity, Observer, Options, ResumeToken, SourceFile, Start, Throttle,
};
use crate::image::qcow2::{Format, Header};
use crate::image::qemu_img::QemuImg;
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::manifest::Digest;
use crate::snapshot::copy::place_fault;

const DOING: &str = "restore the file";
/// How long an image may be mended. Its tables are read, not its data.
const FREE_LIMIT: Duration = Duration::from_secs(300);

/// A file of the backup, as the manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The backup's folder.
    pub backup: PathBuf,
    /// That folder lies below no root: its owner has named it himself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside: bool,
    /// Its name there.
    pub name: Component,
    /// Its size in bytes.
    pub size: u64,
    /// The hash of its content.
    pub blake3: Digest,
}

/// A restored file. Durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    /// Where it is.
    pub path: PathBuf,
    /// Which file that is, and as of when: as long as this holds nobody has written to it.
    pub identity: Identity,
    /// The hash of its content. The manifest's, unless its beginning had to be changed.
    pub blake3: Digest,
}

/// What is stored while a file is under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "stage", content = "data", rename_all = "snake_case")]
enum Stage {
    /// Nothing that could be used.
    Nothing,
    /// Being copied; the copy's own token.
    Copying(Value),
    /// Copied and checked; to be given its name, or named already.
    Placing(Restored),
}

impl Stage {
    fn parse(value: Option<&Value>) -> Self {
        value.and_then(|v| Self::deserialize(v).ok()).unwrap_or(Self::Nothing)
    }
}

/// How the beginning of the file changes on the way.
pub(super) enum Head {
    /// An image: it names other neighbours, and forgets its bitmaps.
    Image { format: Format, virtual_size: u64, backing: Option<Neighbour> },
    /// These bytes.
    Bytes(Vec<u8>),
}

/// A file on its way.
pub(super) struct Fetch {
    pub(super) wanted: Wanted,
    pub(super) place: Place,
    pub(super) head: Head,
    pub(super) bandwidth: u64,
}

impl Fetch {
    fn object(&self) -> String {
        self.place.object()
    }

    /// Does it, on a blocking thread.
    pub(super) async fn run(self, cx: &StepContext) -> Result<Restored, Fault> {
        let object = self.object();
        let watch = Watch {
            progress: cx.progress.clone(),
            stop: cx.stop.clone(),
            runtime: tokio::runtime::Handle::current(),
        };
        let (job, resume) = (cx.job, Stage::parse(cx.resume.as_ref()));
        let saved = Stage::parse(cx.progress.saved().as_ref());
        let work = crate::blocking::run(move || self.work(job, &resume, &saved, &watch));
        match work.await {
            Ok(done) => done,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, object, e)),
        }
    }

    fn work(&self, job: JobId, resume: &Stage, saved: &Stage, watch: &Watch) -> Result<Restored, Fault> {
        let folder = self.place.open()?;
        let aside = self.place.aside(job);
        if let Stage::Placing(restored) = saved
            && self.place.finish(&folder, &aside, &restored.identity)?
        {
            return Ok(restored.clone());
        }
        self.place.assert_free(&folder)?;
        // An attempt that failed by itself is repeated without a probe; what it made durable still counts.
        let resume = if matches!(resume, Stage::Copying(_)) { resume } else { saved };
        let restored = self.copy(&folder, &aside, resume, watch)?;
        watch.save(&Stage::Placing(restored.clone()))?;
        self.place.put(&folder, &aside, &restored.identity)?;
        Ok(restored)
    }

    fn copy(
        &self,
        folder: &Folder,
        aside: &Component,
        resume: &Stage,
        watch: &Watch,
    ) -> Result<Restored, Fault> {
        self.place.not_locked_out(folder, aside)?;
        let source = self.open()?;
        let (header, forgets) = self.header(&source)?;
        let options = Options { header, throttle: Throttle::new(self.bandwidth), ..Options::default() };
        let token = match resume {
            Stage::Copying(token) => ResumeToken::parse(token),
            Stage::Nothing | Stage::Placing(_) => None,
        };
        // Whatever bears this job's name is this job's: it may always be written anew.
        let start = token.map_or(Start::Again, |token| Start::Resume(Box::new(token)));
        let copied = match copy::copy_or_anew(&source, folder, aside, start, &options, watch) {
            Ok(copied) => copied,
            Err(e) => {
                if matches!(e, CopyError::Sync { .. }) {
                    // What is durable of it is not known any more.
                    watch.save(&Stage::Nothing)?;
                }
                return Err(self.fault(e));
            }
        };
        if Digest(copied.source_hash) != self.wanted.blake3 {
            watch.save(&Stage::Nothing)?;
            folder.remove_file(aside).map_err(|e| self.place.fault(&e))?;
            return Err(Fault::permanent(
                codes::CORRUPT_DISK_IMAGE_FOUND,
                DOING,
                source.path().display().to_string(),
                format!(
                    "its hash is {}, the manifest says {}",
                    Digest(copied.source_hash),
                    self.wanted.blake3
                ),
            )
            .remedy("The backup is damaged: check its storage, and restore another one"));
        }
        let (identity, blake3) = match forgets {
            true => self.free_bitmaps(folder, aside, watch)?,
            false => (copied.copy, copied.hash.into()),
        };
        self.place.give_rights(folder, aside, &identity)?;
        Ok(Restored { path: self.place.path(folder, aside), identity, blake3 })
    }

    /// The clusters of the bitmaps that the image has forgotten are freed: otherwise whoever checks it finds leaks. It is
    /// still this job's alone. An image that cannot be mended so keeps them; it shows the same in any case.
    fn free_bitmaps(
        &self,
        folder: &Folder,
        aside: &Component,
        watch: &Watch,
    ) -> Result<(Identity, Digest), Fault> {
        let path = folder.path_of(aside);
        match QemuImg::default().free_leaks(&path, FREE_LIMIT) {
            Ok(report) => tracing::debug!(?report, "the clusters of forgotten bitmaps were freed"),
            Err(error) => tracing::warn!(%error, "the clusters of forgotten bitmaps stay"),
        }
        let file = folder.open_file(&RelPath::from(aside.clone())).map_err(|e| self.place.fault(&e))?;
        let file = SourceFile::from_file(file, path).map_err(|e| self.fault(e))?;
        let hash = copy::hash(&file, None, watch).map_err(|e| self.fault(e))?;
        Ok((file.identity(), hash.into()))
    }

    fn open(&self) -> Result<SourceFile, Fault> {
        let path = self.wanted.backup.join(self.wanted.name.as_str());
        let object = path.display().to_string();
        let missing =
            |e: &RootError| place_fault(e, codes::MISSING_NECESSARY_FILES, "read the backup", &object);
        let folder =
            self.place.places.open(&self.wanted.backup, self.wanted.outside).map_err(|e| missing(&e))?;
        let file = folder.open_file(&RelPath::from(self.wanted.name.clone())).map_err(|e| missing(&e))?;
        let source = SourceFile::from_file(file, path).map_err(|e| self.fault(e))?;
        let found = source.identity().size;
        if found != self.wanted.size {
            let cause = format!("it has {found} bytes, the manifest says {}", self.wanted.size);
            return Err(Fault::permanent(codes::MANIFEST_MISMATCH, "read the backup", object, cause));
        }
        Ok(source)
    }

    /// The bytes that replace the beginning, and whether the image forgets bitmaps by that. A header that lies is found
    /// here, before a hypervisor sees it.
    fn header(&self, source: &SourceFile) -> Result<(Vec<u8>, bool), Fault> {
        let Head::Image { format, virtual_size, backing } = &self.head else {
            let Head::Bytes(bytes) = &self.head else { return Ok((Vec::new(), false)) };
            return Ok((bytes.clone(), false));
        };
        if *format == Format::Raw {
            return Ok((Vec::new(), false));
        }
        let object = source.path().display().to_string();
        let mismatch = |cause: String| {
            Fault::permanent(codes::MANIFEST_MISMATCH, "read the image's header", object.clone(), cause)
        };
        let header = Header::read(source.file()).map_err(|e| mismatch(e.to_string()))?;
        if header.data_file {
            return Err(mismatch("its data lies in another file".to_owned()));
        }
        if header.virtual_size != *virtual_size {
            let cause = format!("a disk of {} bytes, not {virtual_size}", header.virtual_size);
            return Err(mismatch(cause));
        }
        let names = backing.as_ref().map(|n| (n.name.as_str(), n.format));
        if header.names(names) && header.bitmaps == 0 {
            return Ok((Vec::new(), false));
        }
        let rewritten = header.without_bitmaps(names).map_err(|e| mismatch(e.to_string()))?;
        Ok((rewritten, header.bitmaps > 0))
    }

    fn fault(&self, e: CopyError) -> Fault {
        let object = self.object();
        let permanent = |code, e: CopyError| Fault::permanent(code, DOING, object.clone(), e);
        match e {
            CopyError::Stopped { .. } => Fault::stopped(DOING, object),
            CopyError::NoSpace { .. } => {
                permanent(codes::NOT_ENOUGH_DISK_SPACE, e).remedy("Make room there, or choose another place")
            }
            CopyError::SourceChanged { .. } | CopyError::SourceShrunk { .. } => {
                permanent(codes::MANIFEST_MISMATCH, e)
            }
            CopyError::Place(e) => self.place.fault(&e),
            CopyError::Internal { .. } => permanent(Code::UNDEFINED, e),
            e @ (CopyError::Read { .. } | CopyError::Write { .. } | CopyError::Sync { .. }) => {
                permanent(codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION, e).class(Class::Transient)
            }
            e => permanent(codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION, e),
        }
    }

    /// Where it stands. Changes nothing.
    pub(super) async fn probe(self, cx: &StepContext) -> Verdict<Restored> {
        if cx.still_running {
            return Verdict::InFlight("the file is being copied".to_owned());
        }
        let saved = cx.progress.saved();
        let job = cx.job;
        let looked = crate::blocking::run(move || self.look(job, saved)).await;
        looked.unwrap_or_else(|e| Verdict::Unknown(e.to_string()))
    }

    fn look(&self, job: JobId, saved: Option<Value>) -> Verdict<Restored> {
        let folder = match self.place.look_in() {
            Ok(Some(folder)) => folder,
            Ok(None) => return Verdict::NotDone,
            Err(verdict) => return verdict,
        };
        let aside = self.place.aside(job);
        match (Stage::parse(saved.as_ref()), saved) {
            (Stage::Placing(restored), _) => {
                let identity = restored.identity;
                self.place.stands(&folder, &aside, &identity, restored)
            }
            (Stage::Copying(token), Some(saved)) => match (ResumeToken::parse(&token), folder.stat(&aside)) {
                (Some(token), Ok(Some(stat))) if token.fits_target(&stat) => Verdict::Partial(saved),
                (_, Err(e)) => Verdict::Unknown(e.to_string()),
                _ => Verdict::NotDone,
            },
            _ => Verdict::NotDone,
        }
    }

    /// Removes what this job made, and only that.
    pub(super) async fn undo(self, cx: &StepContext, output: Option<Restored>) -> Result<(), Fault> {
        let known = match (output, Stage::parse(cx.left.as_ref())) {
            (Some(restored), _) => Some(Known::Output(restored.identity)),
            (None, Stage::Placing(restored)) => Some(Known::Noted(restored.identity)),
            (None, Stage::Nothing | Stage::Copying(_)) => None,
        };
        self.place.undo(cx, known, |place, job| vec![place.aside(job)]).await
    }
}

/// Carries news from the copying threads to the engine, and wishes back.
struct Watch {
    progress: Progress,
    stop: CancellationToken,
    runtime: tokio::runtime::Handle,
}

impl Watch {
    fn save(&self, stage: &Stage) -> Result<(), Fault> {
        crate::blocking::wait(&self.runtime, self.progress.save(stage))
    }
}

impl Observer for Watch {
    fn control(&self) -> Control {
        if self.stop.is_cancelled() { Control::Stop } else { Control::Continue }
    }

    fn progress(&self, done: u64, total: u64) {
        self.progress.report(done, total, "bytes");
    }

    fn durable(&self, token: &ResumeToken) {
        let saved = serde_json::to_value(token).map(Stage::Copying).map(|stage| self.save(&stage));
        if !matches!(saved, Ok(Ok(()))) {
            // Then a later attempt begins earlier; nothing else is lost.
            tracing::warn!("how far the copy is was not stored");
        }
    }

    fn anew(&self) -> Result<(), String> {
        match Stage::parse(self.progress.saved().as_ref()) {
            Stage::Nothing => Ok(()),
            Stage::Copying(_) | Stage::Placing(_) => {
                self.save(&Stage::Nothing).map_err(|fault| fault.to_string())
            }
        }
    }
}
