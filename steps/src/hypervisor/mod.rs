//! What the steps need of the world: a hypervisor, and the folders in which it keeps the guests' images.
//!
//! Two traits, one world. [`Hypervisor`] is libvirt and QEMU; [`Storage`] is the images beside the guest's own, as far
//! as a job makes, commits and removes them. A stand-in for tests implements both over one model, because what counts
//! lies between them: which file QEMU writes to, which file a definition names, and which of both survive a power cut.
//!
//! Rules that every implementation keeps and every caller may rely on:
//! - **Returned means durable.** A call that changes something returns `Ok` only when the change survives a power cut,
//!   definitions and folders included. libvirt itself does not fsync the folder of its definitions; the implementation
//!   does. The exceptions die with the guest anyway (suspended, frozen, block jobs) and are named as such.
//! - **An error may be a lie.** [`HvError::in_doubt`] says that the effect may have taken place or may yet do so. libvirt
//!   carries out calls of clients that are gone; [`Hypervisor::stragglers`] tells whether that can still happen.
//! - **QEMU is asked.** [`Observation::qemu`] is QEMU's own answer, never derived from a definition. After a crash of
//!   libvirtd both of its definitions can name a base while QEMU writes to the overlay.
//! - **Nothing is retried inside**, and nothing blocks for ever: a monitor that does not answer is
//!   [`Trouble::TimedOut`].
//! - Types here are the domain's own; libvirt's do not cross this line.

mod definition;
mod error;
#[cfg(feature = "simulation")]
pub mod fake;
mod local;
mod marker;
mod observation;
mod pull;
mod show;
mod standstill;
mod storage;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

pub use definition::{
    Backing, Definition, Devices, DiskDef, DiskDevice, DiskSource, Layer, NvramDef, TpmDef, TpmKind,
};
pub use error::{HvError, HvResult, Trouble};
pub use local::LocalStorage;
pub use marker::{Hold, Marker, NAMESPACE as MARKER_NAMESPACE};
pub use observation::{
    BlockJob, BlockJobKind, Control, DomainId, DomainJob, DomainRef, FreezeState, Mirror, Observation,
    PauseReason, Qemu, QemuDisk, RunState, Target,
};
pub use pull::{EXPORT_BITMAP, Pull, PullDisk, Pulling};
pub use show::{NotShown, Shown};
pub use standstill::{InHand, Standstills};
pub use storage::{Bitmap, FileId, Image, OverlaySpec, Space, Storage};

/// Which definitions a change is made to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskChange {
    /// These disks name these files; explicit backing stores are dropped, so that the chain is read from the images.
    Point(Vec<(Target, Layer)>),
    /// The elements of these disks become exactly what they are in this definition.
    LikeIn {
        /// The definition to take them from, as XML.
        xml: String,
        /// The disks.
        targets: Vec<Target>,
    },
}

/// A snapshot to be taken of a running domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Take {
    /// Each disk that takes part with its prepared, empty overlay. All others are left out by name: libvirt would
    /// otherwise include them.
    pub disks: Vec<(Target, PathBuf)>,
    /// Where the memory goes; nothing for disks only. The file must not exist.
    pub memory: Option<PathBuf>,
}

/// By whose hands a block job is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Through {
    /// libvirt's; the normal way.
    Libvirt,
    /// QEMU's monitor: the only way when libvirt believes that the domain is on its base already.
    Monitor,
}

/// The commit of an overlay into its base, under a running or paused QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The disk.
    pub target: Target,
    /// The overlay, top of the chain.
    pub overlay: PathBuf,
    /// The file right below it.
    pub base: PathBuf,
    /// Whose hands.
    pub through: Through,
    /// Bytes per second; 0 for no limit.
    pub bandwidth: u64,
}

/// What becomes of a definition when it is used for another domain, or for new files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewIdentity {
    /// The domain's name.
    pub name: String,
    /// Its UUID.
    pub id: DomainId,
    /// Each network card gets a new address, derived from this number; nothing keeps the old ones.
    pub mac_seed: Option<u64>,
    /// Disks that get other files. Their explicit backing stores are dropped.
    pub disks: Vec<(Target, Layer)>,
    /// Disks that are left out, because the backup does not hold them.
    pub without: Vec<Target>,
    /// Whether the links of all network cards are down.
    pub links_down: bool,
    /// It takes the place of the very domain that the definition was of: nothing but name, UUID and disks changes.
    pub same: bool,
    /// The file of its firmware variables. Nothing: the definition's own element goes, and libvirt makes a file from its
    /// template if the firmware wants one.
    pub nvram: Option<PathBuf>,
}

/// Folders of libvirt's own, in which it keeps what no definition names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnFolders {
    /// Firmware variables: `NAME_VARS.fd`.
    pub nvram: PathBuf,
    /// A folder of TPM state per UUID.
    pub tpm: PathBuf,
    /// Managed save images: `NAME.save`.
    pub save: PathBuf,
}

impl OwnFolders {
    /// The file of a domain's variables. Where the definition leaves it to libvirt, it makes this one at the first start.
    #[must_use]
    pub fn variables(&self, nvram: &NvramDef, domain: &str) -> PathBuf {
        nvram.file.clone().unwrap_or_else(|| self.nvram.join(format!("{domain}_VARS.fd")))
    }

    /// The folder of the state of a domain's TPM.
    #[must_use]
    pub fn tpm(&self, domain: &DomainId) -> PathBuf {
        self.tpm.join(domain.to_string())
    }
}

/// libvirt and QEMU.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// Names of the instances that execute our calls: `boot`, `libvirtd` (process and its start), versions. Cheap.
    async fn environment(&self) -> HvResult<BTreeMap<String, String>>;

    /// The folders in which libvirt keeps what no definition names.
    async fn own_folders(&self) -> HvResult<OwnFolders>;

    /// All domains, running or not.
    async fn domains(&self) -> HvResult<Vec<DomainRef>>;

    /// A domain by name, UUID or unambiguous beginning of a UUID. [`Trouble::NoSuchDomain`] when there is none.
    async fn find(&self, name: &str) -> HvResult<DomainRef>;

    /// Everything there is to see of a domain: its state, both definitions, QEMU's graph and block jobs. The parts are
    /// read one after the other; [`Observation::qemu`] is read last. `TimedOut` when QEMU does not answer.
    async fn observe(&self, domain: &DomainId) -> HvResult<Observation>;

    /// The same from outside, for domains that a job only wants to leave alone: of [`Observation::qemu`] no more is told
    /// than the process and the files that it has open, and QEMU is not asked where that can be helped.
    async fn observe_from_outside(&self, domain: &DomainId) -> HvResult<Observation> {
        self.observe(domain).await
    }

    /// Our own note: the live definition's if it runs, else the persistent one's. Answers at once, also while QEMU is
    /// stuck, where the hypervisor can; this way it asks for everything.
    async fn marker(&self, domain: &DomainId) -> HvResult<Option<Marker>> {
        Ok(self.observe(domain).await?.marker)
    }

    /// Whether it runs. Answers at once, also while QEMU is stuck; cheap enough to be asked many times a second.
    async fn state(&self, domain: &DomainId) -> HvResult<RunState>;

    /// QEMU's own answer alone; nothing if the domain is off. Asked several times while a guest stands still: quick.
    async fn qemu(&self, domain: &DomainId) -> HvResult<Option<Qemu>>;

    /// Whether libvirt is busy with this domain. Answers at once, also while QEMU is stuck. [`Trouble::NotRunning`] if the
    /// domain is off.
    async fn control(&self, domain: &DomainId) -> HvResult<Control>;

    /// libvirt's asynchronous job on this domain (save, snapshot, backup, migration) and how far it is; nothing if
    /// there is none. Shown apart from [`Hypervisor::control`] because neither tells what the other does.
    /// [`Trouble::NotRunning`] if the domain is off.
    async fn domain_job(&self, domain: &DomainId) -> HvResult<Option<DomainJob>>;

    /// Ends libvirt's asynchronous job. Nothing happens if there is none.
    async fn abort_domain_job(&self, domain: &DomainId) -> HvResult<()>;

    /// Why a call that was cut off (by the end of this program's predecessor, of libvirtd or of the connection) may
    /// still take effect on this domain; nothing if none can any more. libvirt queues a call for at most 30 s behind
    /// another one, also when its client is gone, and then executes it for as long as it takes (visible in
    /// [`Hypervisor::control`] and [`Hypervisor::domain_job`]); a new libvirtd has forgotten all of them.
    async fn stragglers(&self, domain: &DomainId) -> HvResult<Option<String>>;

    /// Changes disks of the *persistent* definition, by one act for all of them, durably. Everything else in it stays
    /// as it is, also what this program does not understand.
    async fn redefine_disks(&self, domain: &DomainId, change: &DiskChange) -> HvResult<()>;

    /// Makes durable whatever libvirt itself has written to its definitions so far.
    async fn sync_definitions(&self) -> HvResult<()>;

    /// Writes this store's marker into each definition that there is: the live one if it runs, and the persistent one.
    async fn set_marker(&self, domain: &DomainId, marker: &Marker) -> HvResult<()>;

    /// Writes the marker's [`Hold`] into the live definition only: a hold ends with the guest. Survives libvirtd, not a
    /// power cut. [`Trouble::NotRunning`] if the domain is off.
    async fn set_hold(&self, domain: &DomainId, marker: &Marker) -> HvResult<()>;

    /// Removes the marker from both definitions. Nothing happens if there is none.
    async fn clear_marker(&self, domain: &DomainId) -> HvResult<()>;

    /// Takes a snapshot onto prepared overlays, memory and disks at one instant, without leaving any record of
    /// libvirt's. The guest runs on afterwards if it ran before. Returns after the last disk has moved and the memory
    /// file's contents, name and folder are durable. [`Trouble::Cancelled`] after
    /// [`Hypervisor::abort_domain_job`]: nothing has changed then, and the memory file is gone.
    async fn take(&self, domain: &DomainId, take: &Take) -> HvResult<()>;

    /// Saves the guest's state to a file, which must not exist, and ends its QEMU. Whether the file is whole, and makes it
    /// durable, is for the caller to see. A save that fails leaves the guest running, and no file.
    /// [`Trouble::Cancelled`] after [`Hypervisor::abort_domain_job`].
    async fn save(&self, domain: &DomainId, file: &Path) -> HvResult<()> {
        let _ = (domain, file);
        Err(HvError::new(Trouble::Unsupported, "this hypervisor cannot save a guest"))
    }

    /// Writes the marker into the *persistent* definition only, durably: what a later start, or a daemon without its
    /// journal, must know.
    async fn note(&self, domain: &DomainId, marker: &Marker) -> HvResult<()> {
        let _ = (domain, marker);
        Err(HvError::new(Trouble::Unsupported, "this hypervisor cannot take notes"))
    }

    /// The definition in a saved state, made fit to be loaded again: these disks name these files and have their chains
    /// read from the images (a saved definition ends each chain by force, and the guest would read zeroes), and it
    /// bears this marker.
    fn reloaded_definition(&self, xml: &str, disks: &[(Target, Layer)], marker: &Marker) -> HvResult<String> {
        let _ = (xml, disks, marker);
        Err(HvError::new(Trouble::Unsupported, "this hypervisor cannot load a state"))
    }

    /// The persistent bitmaps in which QEMU records changes of the image that it writes to under this path.
    async fn bitmaps(&self, domain: &DomainId, image: &Path) -> HvResult<Vec<Bitmap>> {
        let _ = (domain, image);
        Ok(Vec::new())
    }

    /// Whose hand is on which guest, where more than one of this process may let it run or stand still.
    fn standstills(&self) -> Option<&Standstills> {
        None
    }

    /// Who of this process is being greeted by which guest's export. A QEMU that is told to stop its server meanwhile never
    /// answers again (STEPS.md, E30), so nobody ends a pull before that is over.
    fn greetings(&self) -> Option<&Standstills> {
        None
    }

    /// Stops the guest's processors. Ends with the guest.
    async fn suspend(&self, domain: &DomainId) -> HvResult<()>;

    /// Lets them run again. `Ok` if they did already.
    async fn resume(&self, domain: &DomainId) -> HvResult<()>;

    /// What the guest's agent says about its file systems.
    async fn freeze_state(&self, domain: &DomainId) -> HvResult<FreezeState>;

    /// Freezes the guest's file systems through its agent; says how many. Ends with the guest.
    async fn freeze(&self, domain: &DomainId) -> HvResult<u32>;

    /// Thaws them; says how many. `Ok(0)` if none was frozen.
    async fn thaw(&self, domain: &DomainId) -> HvResult<u32>;

    /// Starts to commit an overlay into its base. Returns when the block job exists. A base that somebody else holds
    /// is [`Trouble::Locked`].
    async fn commit_begin(&self, domain: &DomainId, commit: &Commit) -> HvResult<()>;

    /// Ends a commit that is ready by moving the guest to the base. Returns when QEMU has moved *and* libvirt has
    /// rewritten the persistent definition (which is not durable before [`Hypervisor::sync_definitions`]).
    async fn commit_pivot(&self, domain: &DomainId, commit: &Commit) -> HvResult<()>;

    /// Ends a commit without moving. Overlay and base stay consistent as a chain. `Ok` if there was none.
    async fn commit_abort(&self, domain: &DomainId, commit: &Commit) -> HvResult<()>;

    /// Makes QEMU close files that no disk of the domain uses any more.
    async fn close_unused(&self, domain: &DomainId, files: &[PathBuf]) -> HvResult<()>;

    /// The definition stored in the header of a memory image, without looking at its stream.
    async fn memory_image_definition(&self, path: &Path) -> HvResult<String>;

    /// The bytes that must replace the beginning of a copy of a memory image so that the copy holds this definition;
    /// everything behind them stays where it is, untouched. [`Trouble::Unsupported`] if the image's form (magic,
    /// version, compression, layout) is not known, or if it has no room for this definition.
    async fn memory_image_head(&self, image: &Path, xml: &str) -> HvResult<Vec<u8>>;

    /// Pulls the cables of all network cards in QEMU itself, and says of how many. A guest that was started from a
    /// memory image takes the state of its links from there, whatever the definition says and libvirt believes.
    async fn pull_links(&self, domain: &DomainId) -> HvResult<u32>;

    /// Defines a domain that is not there yet. [`Trouble::Exists`] if the name or the UUID is taken: an existing
    /// definition is never replaced.
    async fn define_new(&self, xml: &str) -> HvResult<DomainRef>;

    /// Removes a definition, and nothing but it: a file of firmware variables stays. `Ok` if there is none. Refused while
    /// the domain runs, or has a managed save image, snapshots or checkpoints: those are more than this program made.
    async fn undefine(&self, domain: &DomainId) -> HvResult<()>;

    /// Starts a domain from its persistent definition. `Ok` if it runs already.
    async fn start(&self, domain: &DomainId, paused: bool) -> HvResult<()>;

    /// Starts a domain from a memory image with this definition in place of the stored one.
    async fn start_from_memory(&self, image: &Path, xml: &str, paused: bool) -> HvResult<()>;

    /// Lets a domain start with the host, or not any more; durably.
    async fn set_autostart(&self, domain: &DomainId, on: bool) -> HvResult<()>;

    /// Ends QEMU at once, as pulling the plug does. `Ok` if the domain is off.
    async fn destroy(&self, domain: &DomainId) -> HvResult<()>;

    /// Asks the guest to shut down, through its agent if it has one, else by the power button. Returns at once; a guest
    /// may obey much later, or never. `Ok` if the domain is off.
    async fn shutdown(&self, _domain: &DomainId) -> HvResult<()> {
        not_here("shut a guest down")
    }

    /// Saves the memory into a file that does not exist, and ends QEMU. Returns when the file is whole and durable with
    /// its name. [`Trouble::Cancelled`] after [`Hypervisor::abort_domain_job`]: the guest goes on, the file is gone.
    async fn save_memory(&self, _domain: &DomainId, _path: &Path) -> HvResult<()> {
        not_here("save a guest's memory")
    }

    /// Replaces the persistent definition of a domain that has one by this one, by one act, durably.
    async fn redefine(&self, _domain: &DomainId, _xml: &str) -> HvResult<()> {
        not_here("replace a definition")
    }

    /// Keeps the managed save image as a file of that path (durable; it may be there from an attempt that was cut off),
    /// then lets libvirt forget it. `Ok(false)` if there is none.
    async fn take_managed_save(&self, _domain: &DomainId, _to: &Path) -> HvResult<bool> {
        not_here("set a managed save image aside")
    }

    /// Gives libvirt such a file back: the next start loads it. `Ok` if it has one.
    async fn give_managed_save(&self, _domain: &DomainId, _from: &Path) -> HvResult<()> {
        not_here("give a managed save image back")
    }

    /// Names and definitions of libvirt's checkpoints, parents before children; each can be given back.
    async fn checkpoint_definitions(&self, _domain: &DomainId) -> HvResult<Vec<(String, String)>> {
        not_here("read checkpoints")
    }

    /// Lets libvirt forget all checkpoints; the bitmaps in the images stay.
    async fn forget_checkpoints(&self, _domain: &DomainId) -> HvResult<()> {
        not_here("forget checkpoints")
    }

    /// Gives libvirt such a checkpoint back. `Ok` if it has one of that name.
    async fn give_checkpoint(&self, _domain: &DomainId, _name: &str, _xml: &str) -> HvResult<()> {
        not_here("give a checkpoint back")
    }

    /// The folder in which the QEMU of a running domain may make a socket, and which goes with it.
    async fn socket_folder(&self, _domain: &DomainId) -> HvResult<PathBuf> {
        not_here("say where a domain's sockets are")
    }

    /// Begins a pull: all its disks, and its checkpoint, at one instant. Returns when every export is there. It ends with
    /// [`Hypervisor::abort_domain_job`]. An error after QEMU has begun leaves parts of it, and perhaps the checkpoint: it is in
    /// doubt, and [`Hypervisor::pulling`] tells. [`Trouble::BitmapUnusable`]: nothing was begun.
    async fn pull_begin(&self, _domain: &DomainId, _pull: &Pull) -> HvResult<()> {
        not_here("begin a pull")
    }

    /// What is seen of pulls, libvirt's and QEMU's; nothing at all of a domain that is off.
    async fn pulling(&self, _domain: &DomainId) -> HvResult<Pulling> {
        not_here("look at pulls")
    }

    /// Ends in QEMU itself what libvirt no longer knows of a pull: block jobs of backups, exports, the server and the scratch
    /// files. `Ok` if there is nothing.
    async fn pull_clean(&self, _domain: &DomainId, _scratch: &[PathBuf]) -> HvResult<()> {
        not_here("clean up after a pull")
    }

    /// Opens what a pull of this QEMU process shows of a disk; with what has changed if that is wanted.
    async fn open_export(
        &self,
        domain: &DomainId,
        instance: &str,
        (socket, disk): (&Path, &Target),
        changes: bool,
    ) -> Result<Shown, NotShown> {
        match self.greetings() {
            Some(greetings) => show::greeted(greetings, domain, instance, (socket, disk), changes).await,
            None => show::export(instance, socket, disk, changes).await,
        }
    }

    /// Deletes a checkpoint with its bitmaps; where a bitmap is lacking only libvirt's record. `Ok` if there is none.
    async fn delete_checkpoint(&self, _domain: &DomainId, _name: &str) -> HvResult<()> {
        not_here("delete a checkpoint")
    }

    /// The definition with this marker in it.
    fn with_marker(&self, _xml: &str, _marker: &Marker) -> HvResult<String> {
        not_here("mark a definition")
    }

    /// The same definition under another identity. What this program does not understand is kept; our marker is not.
    fn rewrite_definition(&self, xml: &str, identity: &NewIdentity) -> HvResult<String>;

    /// What a rewritten definition has otherwise than the original, besides name, UUID and disks: a line for people
    /// each.
    fn definition_changes(&self, old: &str, new: &str) -> HvResult<Vec<String>>;

    /// Reads a definition as this hypervisor would: its disks and devices.
    fn parse_definition(&self, xml: &str) -> HvResult<Definition>;
}

fn not_here<T>(what: &str) -> HvResult<T> {
    Err(HvError::new(Trouble::Unsupported, format!("this hypervisor cannot {what}")))
}
