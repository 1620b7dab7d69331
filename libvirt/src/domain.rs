//! A domain: its identity, state, description and life cycle. Disks, saving, jobs, snapshots and the
//! rest are in sibling modules that extend the same type. All calls here block.
//!
//! Invariants: the handle keeps its connection open; name and UUID are those at the time it was looked
//! up, so that an error can name the domain without asking anyone; it is freed once and its drop never
//! panics (the binding's own would).

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virt::domain::Domain as Raw;
use virt::error::Error as VirtError;
use virt_sys as sys;

use crate::conn::ConnHandle;
use crate::error::{Error, ErrorCode, Result};
use crate::ffi::{cstr, cstr_opt, opt_ptr, take_str};
use crate::flags::{CreateFlags, DestroyFlags, ImpactFlags, ShutdownFlags, UndefineFlags, XmlFlags};

/// What a domain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DomainState {
    /// libvirt does not know.
    NoState,
    /// It runs.
    Running,
    /// It waits for a resource.
    Blocked,
    /// Its CPUs are stopped; the reason tells why.
    Paused,
    /// It shuts down.
    Shutdown,
    /// It does not run.
    Shutoff,
    /// It crashed.
    Crashed,
    /// The guest suspended itself.
    PmSuspended,
    /// A state this crate does not know.
    Other(i32),
}

impl DomainState {
    pub(crate) fn from_raw(raw: i32) -> Self {
        match u32::try_from(raw).unwrap_or(u32::MAX) {
            sys::VIR_DOMAIN_NOSTATE => Self::NoState,
            sys::VIR_DOMAIN_RUNNING => Self::Running,
            sys::VIR_DOMAIN_BLOCKED => Self::Blocked,
            sys::VIR_DOMAIN_PAUSED => Self::Paused,
            sys::VIR_DOMAIN_SHUTDOWN => Self::Shutdown,
            sys::VIR_DOMAIN_SHUTOFF => Self::Shutoff,
            sys::VIR_DOMAIN_CRASHED => Self::Crashed,
            sys::VIR_DOMAIN_PMSUSPENDED => Self::PmSuspended,
            _ => Self::Other(raw),
        }
    }

    /// Whether a process (QEMU) stands behind it.
    pub fn is_active(self) -> bool {
        !matches!(self, Self::Shutoff | Self::Crashed)
    }
}

/// Why a domain is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PausedReason {
    /// libvirt does not know.
    Unknown,
    /// Somebody suspended it.
    User,
    /// A migration does.
    Migration,
    /// A save does.
    Save,
    /// A dump does.
    Dump,
    /// A disk error, a full disk included.
    IoError,
    /// The watchdog did.
    Watchdog,
    /// It was restored from a snapshot.
    FromSnapshot,
    /// It is shutting down.
    ShuttingDown,
    /// A snapshot is being made.
    Snapshot,
    /// The guest crashed.
    Crashed,
    /// It is being started.
    StartingUp,
    /// A reason this crate does not know.
    Other(i32),
}

impl PausedReason {
    pub(crate) fn from_raw(raw: i32) -> Self {
        match u32::try_from(raw).unwrap_or(u32::MAX) {
            sys::VIR_DOMAIN_PAUSED_UNKNOWN => Self::Unknown,
            sys::VIR_DOMAIN_PAUSED_USER => Self::User,
            sys::VIR_DOMAIN_PAUSED_MIGRATION => Self::Migration,
            sys::VIR_DOMAIN_PAUSED_SAVE => Self::Save,
            sys::VIR_DOMAIN_PAUSED_DUMP => Self::Dump,
            sys::VIR_DOMAIN_PAUSED_IOERROR => Self::IoError,
            sys::VIR_DOMAIN_PAUSED_WATCHDOG => Self::Watchdog,
            sys::VIR_DOMAIN_PAUSED_FROM_SNAPSHOT => Self::FromSnapshot,
            sys::VIR_DOMAIN_PAUSED_SHUTTING_DOWN => Self::ShuttingDown,
            sys::VIR_DOMAIN_PAUSED_SNAPSHOT => Self::Snapshot,
            sys::VIR_DOMAIN_PAUSED_CRASHED => Self::Crashed,
            sys::VIR_DOMAIN_PAUSED_STARTING_UP => Self::StartingUp,
            _ => Self::Other(raw),
        }
    }
}

/// State and reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StateReason {
    /// What it does.
    pub state: DomainState,
    /// libvirt's number for why; its meaning depends on the state.
    pub reason: i32,
}

impl StateReason {
    /// Why it is paused, if it is.
    pub fn paused(&self) -> Option<PausedReason> {
        (self.state == DomainState::Paused).then(|| PausedReason::from_raw(self.reason))
    }

    /// Whether it is off because its memory was saved, into a file of anybody's; nothing if it is not off, or if libvirt
    /// does not know: it forgets when it is itself started anew. A managed save image that was removed counts as well.
    pub fn saved(&self) -> Option<bool> {
        let reason = u32::try_from(self.reason).unwrap_or(u32::MAX);
        let known = self.state == DomainState::Shutoff && reason != sys::VIR_DOMAIN_SHUTOFF_UNKNOWN;
        known.then_some(reason == sys::VIR_DOMAIN_SHUTOFF_SAVED)
    }

    /// Whether it is off because its QEMU ended without having been told to, and without its guest having shut down.
    /// libvirt forgets that when it is itself started anew.
    pub fn crashed(&self) -> bool {
        self.state == DomainState::Shutoff
            && u32::try_from(self.reason).is_ok_and(|reason| reason == sys::VIR_DOMAIN_SHUTOFF_CRASHED)
    }
}

/// The short information about a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainInfo {
    /// What it does.
    pub state: DomainState,
    /// The most memory it may have, KiB.
    pub max_memory_kib: u64,
    /// The memory it has, KiB.
    pub memory_kib: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// CPU time used, nanoseconds.
    pub cpu_time_ns: u64,
}

/// One value of a guest's memory statistics, by libvirt's tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStat {
    /// `virDomainMemoryStatTags`.
    pub tag: u32,
    /// KiB for most tags.
    pub value: u64,
}

/// A domain.
pub struct Domain {
    raw: ManuallyDrop<Raw>,
    conn: Arc<ConnHandle>,
    uuid: Uuid,
    name: String,
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Domain('{}', {})", self.name, self.uuid)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // On failure the binding keeps its pointer and would panic in its own drop, which never runs.
        if let Err(error) = self.raw.free() {
            tracing::warn!(%error, domain = %self.name, "releasing a domain handle failed");
        }
    }
}

impl Domain {
    pub(crate) fn adopt(conn: &Arc<ConnHandle>, raw: Raw) -> Result<Self> {
        let mut domain = Self {
            raw: ManuallyDrop::new(raw),
            conn: Arc::clone(conn),
            uuid: Uuid::nil(),
            name: String::new(),
        };
        domain.uuid = domain.call("virDomainGetUUID", domain.raw.get_uuid())?;
        domain.name = domain.call("virDomainGetName", domain.raw.get_name())?;
        Ok(domain)
    }

    pub(crate) fn ptr(&self) -> sys::virDomainPtr {
        self.raw.as_ptr()
    }

    pub(crate) fn conn(&self) -> &Arc<ConnHandle> {
        &self.conn
    }

    /// How errors name the domain.
    pub(crate) fn label(&self) -> String {
        format!("domain '{}'", self.name)
    }

    pub(crate) fn call<T>(&self, call: &'static str, result: std::result::Result<T, VirtError>) -> Result<T> {
        result.map_err(|_| Error::last(call, self.label()))
    }

    /// A call that answers with -1 or less on failure.
    pub(crate) fn status(&self, call: &'static str, ret: libc::c_int) -> Result<libc::c_int> {
        if ret < 0 { Err(Error::last(call, self.label())) } else { Ok(ret) }
    }

    // ---- identity -------------------------------------------------------------------------------

    /// Its UUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Its name at the time of the look-up.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number while it runs; a new one at every start.
    pub fn id(&self) -> Option<u32> {
        self.raw.get_id()
    }

    // ---- state ----------------------------------------------------------------------------------

    /// State and reason.
    ///
    /// # Errors
    /// libvirt's.
    pub fn state(&self) -> Result<StateReason> {
        let (mut state, mut reason) = (0, 0);
        // SAFETY: the handle is valid and both pointers are to locals.
        let ret = unsafe { sys::virDomainGetState(self.ptr(), &raw mut state, &raw mut reason, 0) };
        self.status("virDomainGetState", ret)?;
        Ok(StateReason { state: DomainState::from_raw(state), reason })
    }

    /// The short information.
    ///
    /// # Errors
    /// libvirt's.
    pub fn info(&self) -> Result<DomainInfo> {
        // SAFETY: plain numbers, for which zero is valid.
        let mut info: sys::virDomainInfo = unsafe { std::mem::zeroed() };
        // SAFETY: the handle is valid and the pointer is to a local of the right type.
        let ret = unsafe { sys::virDomainGetInfo(self.ptr(), &raw mut info) };
        self.status("virDomainGetInfo", ret)?;
        Ok(DomainInfo {
            state: DomainState::from_raw(i32::from(info.state)),
            max_memory_kib: info.maxMem,
            memory_kib: info.memory,
            vcpus: u32::from(info.nrVirtCpu),
            cpu_time_ns: info.cpuTime,
        })
    }

    /// Whether it runs (or is paused).
    ///
    /// # Errors
    /// libvirt's.
    pub fn is_active(&self) -> Result<bool> {
        self.call("virDomainIsActive", self.raw.is_active())
    }

    /// Whether it has a definition that outlives it.
    ///
    /// # Errors
    /// libvirt's.
    pub fn is_persistent(&self) -> Result<bool> {
        self.call("virDomainIsPersistent", self.raw.is_persistent())
    }

    /// Whether its persistent definition was changed while it runs.
    ///
    /// # Errors
    /// libvirt's.
    pub fn is_updated(&self) -> Result<bool> {
        self.call("virDomainIsUpdated", self.raw.is_updated())
    }

    /// Whether it starts with the host.
    ///
    /// # Errors
    /// libvirt's.
    pub fn autostart(&self) -> Result<bool> {
        self.call("virDomainGetAutostart", self.raw.get_autostart())
    }

    /// Sets whether it starts with the host.
    ///
    /// # Errors
    /// libvirt's.
    pub fn set_autostart(&self, on: bool) -> Result<()> {
        self.call("virDomainSetAutostart", self.raw.set_autostart(on)).map(drop)
    }

    /// What the guest's balloon reports, and QEMU's resident size.
    ///
    /// # Errors
    /// libvirt's.
    pub fn memory_stats(&self) -> Result<Vec<MemoryStat>> {
        let mut raw =
            [sys::virDomainMemoryStatStruct { tag: 0, val: 0 }; sys::VIR_DOMAIN_MEMORY_STAT_NR as usize];
        // SAFETY: the array has the length that is passed.
        let ret = unsafe {
            sys::virDomainMemoryStats(self.ptr(), raw.as_mut_ptr(), sys::VIR_DOMAIN_MEMORY_STAT_NR, 0)
        };
        let n = self.status("virDomainMemoryStats", ret)?;
        let filled = raw.iter().take(usize::try_from(n).unwrap_or(0));
        Ok(filled.map(|s| MemoryStat { tag: u32::try_from(s.tag).unwrap_or(0), value: s.val }).collect())
    }

    // ---- description ----------------------------------------------------------------------------

    /// Its definition as XML: the live one while it runs, unless `INACTIVE` is set.
    ///
    /// # Errors
    /// libvirt's.
    pub fn xml(&self, flags: XmlFlags) -> Result<String> {
        self.call("virDomainGetXMLDesc", self.raw.get_xml_desc(flags.bits()))
    }

    /// Removes the persistent definition.
    ///
    /// # Errors
    /// [`ErrorCode::OperationInvalid`] when something that the flags do not name hangs on it.
    pub fn undefine(&self, flags: UndefineFlags) -> Result<()> {
        self.call("virDomainUndefineFlags", self.raw.undefine_flags(flags.bits()))
    }

    /// Sets, replaces or (with `None`) removes our element in the domain's metadata.
    ///
    /// `namespace` is the URI that names us, `prefix` the prefix libvirt writes, `xml` one element.
    ///
    /// # Errors
    /// libvirt's.
    pub fn set_metadata(
        &self,
        namespace: &str,
        prefix: &str,
        xml: Option<&str>,
        impact: ImpactFlags,
    ) -> Result<()> {
        const CALL: &str = "virDomainSetMetadata";
        let c_ns = cstr(CALL, &self.label(), namespace)?;
        let c_prefix = cstr(CALL, &self.label(), prefix)?;
        let c_xml = cstr_opt(CALL, &self.label(), xml)?;
        // SAFETY: the handle is valid, the strings outlive the call, null means "remove".
        let ret = unsafe {
            sys::virDomainSetMetadata(
                self.ptr(),
                metadata_element(),
                opt_ptr(c_xml.as_ref()),
                c_prefix.as_ptr(),
                c_ns.as_ptr(),
                impact.bits(),
            )
        };
        self.status(CALL, ret).map(drop)
    }

    /// Our element in the domain's metadata; `None` if there is none.
    ///
    /// # Errors
    /// libvirt's.
    pub fn metadata(&self, namespace: &str, impact: ImpactFlags) -> Result<Option<String>> {
        const CALL: &str = "virDomainGetMetadata";
        let c_ns = cstr(CALL, &self.label(), namespace)?;
        // SAFETY: the handle is valid, the string outlives the call, the answer is ours to free.
        let xml = unsafe {
            take_str(sys::virDomainGetMetadata(self.ptr(), metadata_element(), c_ns.as_ptr(), impact.bits()))
        };
        match xml {
            Some(xml) => Ok(Some(xml)),
            None => match Error::last(CALL, self.label()) {
                e if e.code == ErrorCode::NoDomainMetadata => Ok(None),
                e => Err(e),
            },
        }
    }

    // ---- life cycle -----------------------------------------------------------------------------

    /// Starts it; from its managed save image if it has one.
    ///
    /// # Errors
    /// libvirt's.
    pub fn start(&self, flags: CreateFlags) -> Result<()> {
        self.call("virDomainCreateWithFlags", self.raw.create_with_flags(flags.bits())).map(drop)
    }

    /// Stops its CPUs.
    ///
    /// # Errors
    /// libvirt's.
    pub fn suspend(&self) -> Result<()> {
        self.call("virDomainSuspend", self.raw.suspend()).map(drop)
    }

    /// Lets its CPUs go on.
    ///
    /// # Errors
    /// libvirt's.
    pub fn resume(&self) -> Result<()> {
        self.call("virDomainResume", self.raw.resume()).map(drop)
    }

    /// Ends QEMU as if the plug were pulled.
    ///
    /// # Errors
    /// libvirt's.
    pub fn destroy(&self, flags: DestroyFlags) -> Result<()> {
        self.call("virDomainDestroyFlags", self.raw.destroy_flags(flags.bits())).map(drop)
    }

    /// Asks the guest to shut down; returns at once.
    ///
    /// # Errors
    /// libvirt's.
    pub fn shutdown(&self, flags: ShutdownFlags) -> Result<()> {
        self.call("virDomainShutdownFlags", self.raw.shutdown_flags(flags.bits())).map(drop)
    }
}

fn metadata_element() -> libc::c_int {
    sys::VIR_DOMAIN_METADATA_ELEMENT as libc::c_int
}
