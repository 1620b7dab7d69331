//! A hypervisor that exists only here, for tests: libvirt and QEMU as they really behave, on real small image files.
//!
//! # What it is honest about
//! - **Three opinions.** Each domain has a persistent definition, a live one, and a QEMU with files of its own. They
//!   change at different moments, as libvirt's do, and each effect is made of parts between which anything may happen.
//! - **Durable or not.** What libvirt writes is a definition; what [`Fake::power_cut`] leaves of it is what was synced.
//! - **The dead act.** A call whose client is gone is carried out all the same, at once or after a while
//!   ([`Order::DieAndLeave`]); as long as it may come the domain is busy. A new libvirtd has forgotten it.
//! - **A guest that minds.** A guest that runs writes numbered ticks to its disks in turn, and reads each back before it
//!   goes on: every write that is lost, doubled, or seen by a memory that it does not belong to is found in that moment,
//!   and noted ([`Fake::wrong`]). So is a file that goes while QEMU has it open.
//! - **Locks.** An image that one has open for writing no other opens.
//! - **Operators.** They start, stop, pause and resume at any moment; guests start with the host, before anybody else.
//!
//! That libvirt and QEMU behave so is shown by one suite that runs on both (`tests/shared` of `replay-tests`).
//!
//! # How it is used
//! [`Fake`] is the world; it outlives every process. A [`Client`] is a process's connection to it, and implements
//! [`Hypervisor`] and [`Storage`]. At every [`Place`] a [`Witness`] is asked what happens. Time is tokio's, paused: waits
//! cost nothing ([`Fake::new_life`] for each runtime).
//!
//! # What is left out
//! Block devices, libvirt's own snapshots, bitmaps of images that overlays stand on, the space
//! on file systems, and images of which a host's end would lose unsynced parts: for these there are other tests, on real ones.

mod acts;
mod calls;
mod definition;
mod disk;
mod effects;
mod events;
mod guests;
mod images;
mod outside;
mod pulls;
mod shown;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::{DomainId, DomainRef, HvError, HvResult, Layer, Marker, RunState, Target, Trouble};
use crate::simulation::Witness;
#[cfg(doc)]
use crate::simulation::{Order, Place};

pub use definition::{Def, DefDisk};
pub use outside::Sealed;

/// What a guest remembers: the last tick that it wrote to each disk.
pub type Memory = BTreeMap<Target, u64>;

/// All of it, as a memory image holds it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Mind {
    life: u64,
    ticks: Memory,
    /// The boots that its firmware and its TPM know of, if it has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    knows: Option<outside::Known>,
}

/// The world.
#[derive(Clone)]
pub struct Fake(Arc<Mutex<Inner>>);

/// A process's connection to the world.
#[derive(Clone)]
pub struct Client {
    world: Fake,
    witness: Arc<dyn Witness>,
}

/// A disk as QEMU has opened it.
#[derive(Clone, Debug)]
pub(super) struct Open {
    target: Target,
    chain: Vec<Layer>,
    /// What it holds open, from the top down.
    files: Vec<Arc<std::fs::File>>,
    ids: Vec<super::FileId>,
    /// Bytes.
    size: u64,
}

impl Open {
    /// Reads a cluster.
    fn read(&self, number: u64) -> std::io::Result<Vec<u8>> {
        disk::read_open(&self.chain, &self.files, number)
    }
}

/// An active commit.
#[derive(Clone, Debug)]
pub(super) struct Job {
    ready_at: Duration,
    ready: bool,
    /// libvirt began it, and knows of it.
    known: bool,
}

pub(super) struct Process {
    number: u32,
    live: Def,
    run: RunState,
    disks: Vec<Open>,
    jobs: BTreeMap<Target, Job>,
    pull: Option<pulls::Pulled>,
    /// Files that it opened for a snapshot that came to nothing, and keeps open.
    stray: Vec<PathBuf>,
    frozen: bool,
    memory: Memory,
    /// Which boot of all guests' it is: it goes on with the memory.
    life: u64,
    /// What it keeps outside its disks.
    outside: Option<outside::Outside>,
    /// It was asked to shut down, and does so at that time.
    obeys_at: Option<Duration>,
    /// libvirt stands in the middle of saving it.
    saving: Option<&'static str>,
    /// Somebody wants that to end.
    aborted: bool,
}

pub(super) struct Domain {
    name: String,
    persistent: Option<Def>,
    /// What a power cut leaves of it.
    durable: Option<Def>,
    autostart: bool,
    /// libvirt's checkpoints, oldest first.
    checkpoints: Vec<String>,
    saved: Option<bool>,
    crashed: bool,
    process: Option<Process>,
    agent_answers: bool,
    /// An operator, or a start of the host, is at work: its guest is somebody else's to bring back.
    theirs: bool,
    /// Somebody else has started it with a TPM that is not its own.
    mixed: bool,
}

type Part = Box<dyn FnOnce(&mut Inner) -> HvResult<()> + Send>;

/// Parts of a call that libvirt carries out later.
pub(super) struct Late {
    domain: Option<DomainId>,
    since: Duration,
    due: Duration,
    parts: Vec<Part>,
}

pub(super) struct Inner {
    folder: PathBuf,
    domains: BTreeMap<DomainId, Domain>,
    boot: u32,
    libvirtd: u32,
    processes: u32,
    /// Images that a helper has open for writing.
    helpers: Vec<PathBuf>,
    /// Images that helpers read, and that nobody may write to meanwhile.
    readers: Vec<PathBuf>,
    bitmaps: pulls::Bitmaps,
    late: Vec<Late>,
    /// It is not a job that starts a domain now.
    by_others: bool,
    /// Domains that a call is being carried out on.
    locked: std::collections::BTreeSet<DomainId>,
    /// The last tick that was flushed to each disk, by the image that is its own.
    flushed: BTreeMap<PathBuf, u64>,
    wrong: Vec<String>,
    stamp: SystemTime,
    before: Duration,
    since: Instant,
    /// A folder whose files do not outlive the host.
    ram: Option<PathBuf>,
}

/// Bytes of a guest's disk.
pub const DISK_SIZE: u64 = 64 << 10;

/// Bytes before the stream of a memory image.
pub(super) const HEAD: usize = 8192;

pub(super) fn no<T>(trouble: Trouble, what: impl Into<String>) -> HvResult<T> {
    Err(HvError::new(trouble, what))
}

#[allow(clippy::needless_pass_by_value)]
pub(super) fn io(e: std::io::Error) -> HvError {
    let trouble = match e.kind() {
        std::io::ErrorKind::NotFound => Trouble::Missing,
        std::io::ErrorKind::AlreadyExists => Trouble::Exists,
        _ => Trouble::Io,
    };
    HvError::new(trouble, e.to_string())
}

/// The image that a disk is known by: the topmost that is not an overlay of a job's.
fn home(chain: &[Layer]) -> Option<&Path> {
    chain
        .iter()
        .map(|layer| layer.path.as_path())
        .find(|path| crate::snapshot::disk::overlay_job(path).is_none())
}

impl Fake {
    /// A world without domains. Everything that libvirt keeps lies below `folder`. Within a runtime.
    ///
    /// # Errors
    /// When its folders cannot be made.
    pub fn new(folder: &Path) -> std::io::Result<Self> {
        for name in ["images", "libvirt/save", "libvirt/nvram", "libvirt/tpm"] {
            std::fs::create_dir_all(folder.join(name))?;
        }
        Ok(Self(Arc::new(Mutex::new(Inner {
            folder: folder.to_owned(),
            domains: BTreeMap::new(),
            boot: 1,
            libvirtd: 1,
            processes: 0,
            helpers: Vec::new(),
            readers: Vec::new(),
            bitmaps: pulls::Bitmaps::default(),
            late: Vec::new(),
            by_others: false,
            locked: std::collections::BTreeSet::new(),
            flushed: BTreeMap::new(),
            wrong: Vec::new(),
            stamp: SystemTime::now(),
            before: Duration::ZERO,
            since: Instant::now(),
            ram: None,
        }))))
    }

    /// Another process begins, in a runtime of its own, whose clock begins anew. The helpers of the last one are gone.
    pub fn new_life(&self) {
        let mut inner = self.inner();
        inner.since = Instant::now();
        inner.helpers.clear();
        inner.readers.clear();
        inner.locked.clear();
    }

    /// The process's clock is about to end with its runtime.
    pub fn end_life(&self) {
        let mut inner = self.inner();
        inner.before = inner.now();
        inner.since = Instant::now();
    }

    /// A connection, watched by that witness.
    #[must_use]
    pub fn client(&self, witness: Arc<dyn Witness>) -> Client {
        Client { world: self.clone(), witness }
    }

    /// Files below this folder do not outlive the host.
    pub fn set_ram_disk(&self, folder: &Path) {
        self.inner().ram = Some(folder.to_owned());
    }

    /// A new domain, which is off, with disks of these formats; each has a pattern of its own.
    ///
    /// # Errors
    /// When its images cannot be made.
    pub fn add_domain(&self, name: &str, number: u128, formats: &[&str]) -> std::io::Result<DomainRef> {
        self.add_domain_of(name, number, formats, DISK_SIZE)
    }

    /// The same with disks of this size, at most 2 MiB; on large ones the guest writes to more than one place
    /// ([`Fake::content_at`]).
    ///
    /// # Errors
    /// When its images cannot be made.
    pub fn add_domain_of(
        &self,
        name: &str,
        number: u128,
        formats: &[&str],
        size: u64,
    ) -> std::io::Result<DomainRef> {
        let mut inner = self.inner();
        let id = DomainId(uuid::Uuid::from_u128(number));
        let mut disks = Vec::new();
        for (format, letter) in formats.iter().zip('a'..='z') {
            let path = inner.folder.join(format!("images/{name}-{letter}.{format}"));
            disk::create(&path, format, size, None)?;
            let layer = Layer { path: path.clone(), format: (*format).to_owned() };
            let when = inner.stamp();
            for at in guests::patterns(size) {
                disk::write(&layer, at, &guests::pattern(name, letter), when)?;
            }
            disks.push(DefDisk {
                target: format!("vd{letter}").as_str().into(),
                layer,
                backing: None,
                found: false,
                mirror: None,
            });
        }
        let def = Def {
            name: name.to_owned(),
            id,
            disks,
            marker: None,
            agent: false,
            cards: 1,
            links_down: false,
            sealed: None,
        };
        let domain = Domain { durable: Some(def.clone()), persistent: Some(def), ..Domain::new(name) };
        inner.domains.insert(id, domain);
        Ok(DomainRef { id, name: name.to_owned() })
    }

    /// What must not have happened, and has.
    #[must_use]
    pub fn wrong(&self) -> Vec<String> {
        self.inner().wrong.clone()
    }

    /// What there is of a domain, in one line: what it does, where QEMU writes, what its definitions name, its marks.
    #[must_use]
    pub fn picture(&self, id: &DomainId) -> Picture {
        let inner = self.inner();
        let Some(domain) = inner.domains.get(id) else { return Picture::default() };
        let of = |def: &Def| def.disks.iter().map(|d| d.layer.path.clone()).collect::<Vec<_>>();
        Picture {
            there: true,
            run: domain.process.as_ref().map_or(RunState::Off, |p| p.run),
            frozen: domain.process.as_ref().is_some_and(|p| p.frozen),
            busy: domain.process.as_ref().is_some_and(|p| p.saving.is_some()),
            jobs: domain.process.as_ref().map_or(0, |p| p.jobs.len()),
            pulled: domain.process.as_ref().is_some_and(pulls::left),
            checkpoints: domain.checkpoints.clone(),
            qemu: domain.process.iter().flat_map(|p| &p.disks).map(|d| d.chain[0].path.clone()).collect(),
            live: domain.process.as_ref().map(|p| of(&p.live)).unwrap_or_default(),
            persistent: domain.persistent.as_ref().map(of).unwrap_or_default(),
            durable: domain.durable.as_ref().map(of).unwrap_or_default(),
            marker: domain.process.as_ref().and_then(|p| p.live.marker.clone()),
            noted: domain.persistent.as_ref().and_then(|d| d.marker.clone()),
            variables: domain.persistent.as_ref().and_then(|d| d.sealed.as_ref()?.variables.clone()),
            theirs: domain.theirs,
        }
    }

    /// The last tick on each of these disks, each given as a chain from the top down.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn ticks(chains: &[Vec<Layer>]) -> std::io::Result<Vec<u64>> {
        chains.iter().map(|chain| guests::tick(chain)).collect()
    }

    /// What a memory image knows of the disks.
    ///
    /// # Errors
    /// When it is none, or not whole.
    pub fn memory_in(image: &Path) -> HvResult<Memory> {
        Ok(events::read_memory(image)?.1.ticks)
    }

    pub(super) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What there is of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Picture {
    pub there: bool,
    pub run: RunState,
    pub frozen: bool,
    /// A job of libvirt's own, such as a save, has it.
    pub busy: bool,
    pub jobs: usize,
    /// QEMU has something of a pull.
    pub pulled: bool,
    pub checkpoints: Vec<String>,
    pub qemu: Vec<PathBuf>,
    pub live: Vec<PathBuf>,
    pub persistent: Vec<PathBuf>,
    pub durable: Vec<PathBuf>,
    pub marker: Option<Marker>,
    pub noted: Option<Marker>,
    /// The file of its firmware variables, by the definition.
    pub variables: Option<PathBuf>,
    /// Somebody else has ended or started it.
    pub theirs: bool,
}

impl Default for Picture {
    fn default() -> Self {
        Self {
            there: false,
            run: RunState::Off,
            frozen: false,
            busy: false,
            jobs: 0,
            pulled: false,
            checkpoints: Vec::new(),
            qemu: Vec::new(),
            live: Vec::new(),
            persistent: Vec::new(),
            durable: Vec::new(),
            marker: None,
            noted: None,
            variables: None,
            theirs: false,
        }
    }
}

impl Inner {
    fn now(&self) -> Duration {
        self.before + self.since.elapsed()
    }

    /// An instant for a file, later than all before.
    fn stamp(&mut self) -> SystemTime {
        self.stamp = (self.stamp + Duration::from_micros(10)).max(SystemTime::now());
        self.stamp
    }

    fn domain(&mut self, id: &DomainId) -> HvResult<&mut Domain> {
        self.domains.get_mut(id).ok_or_else(|| HvError::new(Trouble::NoSuchDomain, "there is no such domain"))
    }

    fn process(&mut self, id: &DomainId) -> HvResult<&mut Process> {
        let domain = self.domain(id)?;
        domain.process.as_mut().ok_or_else(|| HvError::new(Trouble::NotRunning, "domain is not running"))
    }

    /// A guest whose agent answers.
    fn agent(&mut self, id: &DomainId) -> HvResult<&mut Process> {
        let answers = self.domain(id)?.agent_answers;
        let process = self.process(id)?;
        match process {
            Process { run, .. } if *run != RunState::Running => {
                no(Trouble::NotRunning, "domain is not running")
            }
            Process { live, .. } if !live.agent => no(Trouble::NoAgent, "QEMU guest agent is not configured"),
            _ if !answers => no(Trouble::AgentSilent, "guest agent is not responding"),
            process => Ok(process),
        }
    }
}
