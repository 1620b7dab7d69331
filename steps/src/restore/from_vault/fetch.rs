//! Bringing one tree of a vault to its new place, as a file: proven, and never in anybody's way.
//!
//! The file is written beside its place, under a name that holds the job's id ([`crate::restore::place`]). What reaches it has
//! the root that the plan names, or the step fails; then it is made durable, and only then, and only if nothing has the final
//! name, is it renamed. Between the two a note with the file's inode is stored, so after a crash the file under the final name
//! can be told from one that somebody else put there meanwhile.
//!
//! A disk in another format is written raw first, and converted into a second file of the job's. A note between the two says
//! that the raw one is whole, so a conversion that was cut off does not read the vault again. An attempt that was cut off
//! *while it read* begins anew: chunks come in the order of packs and not of the disk, so half a file says nothing of what is
//! still missing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::Instant;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::BlobId;
use vmkeep_vault::manifest::Image;
use vmkeep_vault::read::{Sink, read_image};
use vmkeep_workflow::progress::Progress;
use vmkeep_workflow::{Code, Fault, JobId, StepContext, Verdict};

use super::reader::{Reader, Readers, Source};
use crate::codes;
use crate::image::copy::{Identity, Throttle};
use crate::image::qcow2::Format;
use crate::image::qemu_img::{QemuImgError, RunError};
use crate::image::root::{Component, Folder};
use crate::restore::place::{Known, Place, aside};
use crate::vaults::fault;
use crate::vaults::files::{Holes, NotConverted, to_qcow2};

const DOING: &str = "read the disk from the vault";

/// What of a backup it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A disk, by its target.
    Disk(String),
    /// A stream, by its name.
    Stream(String),
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Disk(target) => write!(f, "disk {target}"),
            Self::Stream(name) => write!(f, "{name}"),
        }
    }
}

/// A tree of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Where it comes from.
    pub source: Source,
    /// What it is.
    pub what: What,
    /// Its content.
    pub image: Image,
}

/// A file that was fetched. Durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Where it is.
    pub path: PathBuf,
    /// Which file that is, and as of when.
    pub identity: Identity,
    /// What proves its content.
    pub root: BlobId,
}

/// What is stored while a file is under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "stage", content = "data", rename_all = "snake_case")]
enum Stage {
    /// Nothing that could be used.
    Nothing,
    /// The raw file is whole and durable; to be converted.
    Whole(Identity),
    /// The file is whole and durable; to be given its name, or named already.
    Placing(Fetched),
}

impl Stage {
    fn parse(value: Option<&Value>) -> Self {
        value.and_then(|v| Self::deserialize(v).ok()).unwrap_or(Self::Nothing)
    }
}

/// What was found of a lost tree, as everything else that goes wrong is told.
pub(super) fn lost(wanted: &Wanted, error: &VaultError) -> Fault {
    let vault = &wanted.source.vault;
    match error {
        VaultError::Lost { .. } | VaultError::Damaged { .. } | VaultError::Missing { .. } => {
            Fault::permanent(codes::VAULT_DAMAGED, DOING, wanted.what.to_string(), error).remedy(format!(
                "Restore another backup of the domain. `vmkeep vault check {vault}` names those that are hurt, `vmkeep vault \
                 repair {vault}` heals what still has its bytes somewhere"
            ))
        }
        error => fault(DOING, vault, error),
    }
}

impl Wanted {
    fn leaves(&self) -> BlobType {
        match self.what {
            What::Disk(_) => BlobType::Data,
            What::Stream(_) => BlobType::Stream,
        }
    }

    /// Reads it into a sink: all of it, or an error.
    pub(super) async fn read(&self, reader: &Reader, sink: &mut dyn Sink) -> Result<(), VaultError> {
        let Reader { vault, ids, fetcher, .. } = reader;
        Box::pin(read_image(vault, ids, fetcher, self.leaves(), &self.image, sink, false)).await.map(drop)
    }
}

/// A file on its way.
#[derive(Clone)]
pub(super) struct Fetch {
    pub(super) wanted: Wanted,
    pub(super) place: Place,
    pub(super) format: Format,
    pub(super) bandwidth: u64,
}

/// The names under which a job writes a file: raw, and as it is to be.
struct Asides {
    raw: Component,
    last: Component,
}

impl Asides {
    fn of(place: &Place, format: Format, job: JobId) -> Self {
        let raw = place.aside(job);
        let last = match format {
            Format::Raw => raw.clone(),
            Format::Qcow2 => aside(job, &format!("{}, converted", place.key())),
        };
        Self { raw, last }
    }
}

/// Carries out what blocks.
async fn blocking<T: Send + 'static>(
    fetch: &Arc<Fetch>,
    work: impl FnOnce(&Fetch) -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let this = Arc::clone(fetch);
    match crate::blocking::run(move || work(&this)).await {
        Ok(done) => done,
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, fetch.place.object(), e)),
    }
}

impl Fetch {
    /// Does it.
    pub(super) async fn run(self, cx: &StepContext, readers: &Readers) -> Result<Fetched, Fault> {
        let (this, job) = (Arc::new(self), cx.job);
        let saved = Stage::parse(cx.progress.saved().as_ref());
        if let Stage::Placing(fetched) = saved.clone() {
            let identity = fetched.identity;
            if blocking(&this, move |this| this.finish(job, &identity)).await? {
                return Ok(fetched);
            }
        }
        let whole = match &saved {
            Stage::Whole(identity) => Some(*identity),
            Stage::Nothing | Stage::Placing(_) => None,
        };
        let whole = blocking(&this, move |this| this.still_whole(job, whole)).await?;
        let raw = match whole {
            Some(identity) => identity,
            None => {
                if !matches!(saved, Stage::Nothing) {
                    // Durably, before there is another file: it may get the inode that is noted, and is not whole for long.
                    cx.progress.save(&Stage::Nothing).await?;
                }
                this.read(cx, readers).await?
            }
        };
        let identity = match this.format {
            Format::Raw => raw,
            Format::Qcow2 => {
                cx.progress.save(&Stage::Whole(raw)).await?;
                this.convert(cx).await?
            }
        };
        let path = blocking(&this, move |this| this.give_rights(job, &identity)).await?;
        let fetched = Fetched { path, identity, root: this.wanted.image.root };
        cx.progress.save(&Stage::Placing(fetched.clone())).await?;
        match blocking(&this, move |this| this.finish(job, &identity)).await? {
            true => Ok(fetched),
            false => {
                let cause = "somebody has removed it before it got its name";
                Err(Fault::transient(codes::CANNOT_RENAME_DISK_IMAGE, DOING, this.place.object(), cause))
            }
        }
    }

    fn asides(&self, job: JobId) -> Asides {
        Asides::of(&self.place, self.format, job)
    }

    /// Goes on with a file that a note says to be whole. `false`: it is not there.
    fn finish(&self, job: JobId, identity: &Identity) -> Result<bool, Fault> {
        let (folder, asides) = (self.place.open()?, self.asides(job));
        if asides.raw != asides.last {
            // Durably, before the name: nobody looks for it afterwards.
            let gone = folder.remove_file(&asides.raw).and_then(|_| folder.sync());
            gone.map_err(|e| self.place.fault(&e))?;
        }
        self.place.finish(&folder, &asides.last, identity)
    }

    /// The raw file that an earlier attempt has made durable, if it is there and nobody has touched it; and nothing may have
    /// the final name.
    fn still_whole(&self, job: JobId, noted: Option<Identity>) -> Result<Option<Identity>, Fault> {
        let folder = self.place.open()?;
        self.place.assert_free(&folder)?;
        let there = folder.stat(&self.asides(job).raw).map_err(|e| self.place.fault(&e))?;
        let there = there.as_ref().map(Identity::from_stat);
        Ok(noted.filter(|noted| there.as_ref() == Some(noted)))
    }

    /// Makes a file of the job's anew. Whatever bears that name is this job's. Durably, before a note speaks of it: a power cut
    /// must not bring back what had the name before.
    fn begin(&self, name: &Component) -> Result<(Folder, File), Fault> {
        let folder = self.place.open()?;
        let made = folder.remove_file(name).and_then(|_| folder.create_file(name));
        let file = made.and_then(|file| folder.sync().map(|()| file)).map_err(|e| self.place.fault(&e))?;
        Ok((folder, file))
    }

    async fn read(self: &Arc<Self>, cx: &StepContext, readers: &Readers) -> Result<Identity, Fault> {
        let job = cx.job;
        let stopped = || Fault::stopped(DOING, self.place.object());
        // The vault first: where it cannot be opened nothing is made.
        let reader = tokio::select! {
            reader = readers.of(cx, &self.wanted.source) => reader?,
            () = cx.stop.cancelled() => return Err(stopped()),
        };
        let size = self.wanted.image.size;
        let (file, holes) = blocking(self, move |this| {
            let (_, file) = this.begin(&this.asides(job).raw)?;
            let file = Arc::new(file);
            let holes = Holes::new(file.clone(), size).map_err(|e| this.unwritten(&e))?;
            Ok((file, holes))
        })
        .await?;
        let mut sink = Metered::new(holes, cx.progress.clone(), size, self.bandwidth);
        let read = tokio::select! {
            read = self.wanted.read(&reader, &mut sink) => read,
            // What was under way goes into a file that the next attempt removes.
            () = cx.stop.cancelled() => return Err(stopped()),
        };
        read.map_err(|error| match &error {
            VaultError::Io(error) => self.unwritten(error),
            error => lost(&self.wanted, error),
        })?;
        cx.progress.report(size, size, "bytes");
        blocking(self, move |this| {
            crate::blocking::sync(&file).map_err(|e| this.unwritten(&e))?;
            Identity::of(&file).map_err(|e| this.unwritten(&std::io::Error::other(e.to_string())))
        })
        .await
    }

    /// Not tried again: the vault would have to be read from its beginning for a disk that fails.
    fn unwritten(&self, error: &std::io::Error) -> Fault {
        let object = self.place.object();
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Fault::permanent(codes::NOT_ENOUGH_DISK_SPACE, DOING, object, error)
                    .remedy("Make room there, or choose another place")
            }
            _ => Fault::permanent(codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION, DOING, object, error),
        }
    }

    async fn convert(self: &Arc<Self>, cx: &StepContext) -> Result<Identity, Fault> {
        let (job, stop, progress) = (cx.job, cx.stop.clone(), cx.progress.clone());
        blocking(self, move |this| {
            let asides = this.asides(job);
            let (folder, file) = this.begin(&asides.last)?;
            let (raw, last) = (folder.path_of(&asides.raw), folder.path_of(&asides.last));
            let stopping = || {
                progress.alive();
                stop.is_cancelled()
            };
            to_qcow2(&raw, &last, &stopping).map_err(|e| this.unconverted(&e))?;
            Identity::of(&file).map_err(|e| this.unwritten(&std::io::Error::other(e.to_string())))
        })
        .await
    }

    fn unconverted(&self, error: &NotConverted) -> Fault {
        let (doing, object) = ("convert the disk", self.place.object());
        if matches!(error, NotConverted::Tool(QemuImgError::Run(RunError::Stopped { .. }))) {
            return Fault::stopped(doing, object);
        }
        Fault::permanent(codes::CANNOT_COPY_IMAGE_TO_BACKUP_LOCATION, doing, object, error)
            .remedy("Make room there, or restore it raw: --format raw")
    }

    fn give_rights(&self, job: JobId, identity: &Identity) -> Result<PathBuf, Fault> {
        let (folder, last) = (self.place.open()?, self.asides(job).last);
        self.place.give_rights(&folder, &last, identity)?;
        Ok(self.place.path(&folder, &last))
    }

    /// Where it stands. Changes nothing.
    pub(super) async fn probe(self, cx: &StepContext) -> Verdict<Fetched> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        let (job, saved) = (cx.job, cx.progress.saved());
        let looked = crate::blocking::run(move || self.look(job, saved)).await;
        looked.unwrap_or_else(|e| Verdict::Unknown(e.to_string()))
    }

    fn look(&self, job: JobId, saved: Option<Value>) -> Verdict<Fetched> {
        let folder = match self.place.look_in() {
            Ok(Some(folder)) => folder,
            Ok(None) => return Verdict::NotDone,
            Err(verdict) => return verdict,
        };
        let asides = self.asides(job);
        match (Stage::parse(saved.as_ref()), saved) {
            (Stage::Placing(fetched), _) => {
                let identity = fetched.identity;
                self.place.stands(&folder, &asides.last, &identity, fetched)
            }
            (Stage::Whole(noted), Some(saved)) => match folder.stat(&asides.raw) {
                Ok(Some(stat)) if Identity::from_stat(&stat) == noted => Verdict::Partial(saved),
                Ok(_) => Verdict::NotDone,
                Err(e) => Verdict::Unknown(e.to_string()),
            },
            _ => Verdict::NotDone,
        }
    }

    /// Removes what this job made, and only that.
    pub(super) async fn undo(self, cx: &StepContext, output: Option<Fetched>) -> Result<(), Fault> {
        let format = self.format;
        let asides = move |place: &Place, job| {
            let Asides { raw, last } = Asides::of(place, format, job);
            vec![raw, last]
        };
        let known = match (output, Stage::parse(cx.left.as_ref())) {
            (Some(fetched), _) => Some(Known::Output(fetched.identity)),
            (None, Stage::Placing(fetched)) => Some(Known::Noted(fetched.identity)),
            (None, Stage::Nothing | Stage::Whole(_)) => None,
        };
        self.place.undo(cx, known, asides).await
    }
}

/// A sink that tells how far it is, and is written to no faster than it may.
struct Metered {
    inner: Holes,
    progress: Progress,
    done: u64,
    total: u64,
    throttle: Option<Throttle>,
    begun: Instant,
}

impl Metered {
    fn new(inner: Holes, progress: Progress, total: u64, bandwidth: u64) -> Self {
        let (throttle, begun) = (Throttle::new(bandwidth), Instant::now());
        Self { inner, progress, done: 0, total, throttle, begun }
    }

    fn told(&mut self, bytes: u64) {
        self.done += bytes;
        self.progress.report(self.done, self.total, "bytes");
    }
}

#[async_trait]
impl Sink for Metered {
    async fn write(&mut self, offset: u64, bytes: Bytes) -> std::io::Result<()> {
        let length = bytes.len() as u64;
        let wait = self.throttle.as_ref().map(|throttle| throttle.grant(self.begun.elapsed(), length));
        if let Some(wait) = wait.filter(|wait| *wait > Duration::ZERO) {
            tokio::time::sleep(wait).await;
        }
        self.inner.write(offset, bytes).await?;
        self.told(length);
        Ok(())
    }

    async fn zero(&mut self, offset: u64, length: u64) -> std::io::Result<()> {
        self.inner.zero(offset, length).await?;
        self.told(length);
        Ok(())
    }
}

/// The name of the step of a file.
pub(super) fn step_name(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    format!("image/{name}")
}
