//! Domain events, as owned values.
//!
//! Invariants:
//! - a [`Subscription`] registers every kind of event this crate knows, or none; its drop takes all of
//!   them back, so a connection with a dropped subscription can close;
//! - callbacks copy everything and return at once: they run on libvirt's one event thread, and a call
//!   to libvirt from there would wait for itself;
//! - the memory behind a callback is freed by libvirt alone. When a registration fails it is leaked (a
//!   few bytes): versions differ in whether they freed it, and freeing twice is worse.
//!
//! Events come at most once, and not at all while disconnected. They are a reason to look, never the
//! only proof that something happened or did not.

use std::ptr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virt_sys as sys;

use crate::block::BlockJobKind;
use crate::conn::{ConnHandle, Connection};
use crate::error::{Error, Result};
use crate::ffi::{borrow_str, read_params};
use crate::instance::DaemonInstance;
use crate::job::{JobPhase, JobStats};

/// Which domain an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainRef {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Its number, if it runs.
    pub id: Option<u32>,
}

/// What happened in a domain's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lifecycle {
    /// Its definition was made or replaced.
    Defined,
    /// Its definition was removed.
    Undefined,
    /// It started.
    Started,
    /// Its CPUs stopped.
    Suspended,
    /// Its CPUs went on.
    Resumed,
    /// It ended.
    Stopped,
    /// The guest has shut down; it is about to end.
    Shutdown,
    /// The guest suspended itself.
    PmSuspended,
    /// The guest crashed.
    Crashed,
    /// Something this crate does not know.
    Other(i32),
}

/// How a block job fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockJobStatus {
    /// It ended well (after a pivot, for an active commit).
    Completed,
    /// It failed.
    Failed,
    /// It was aborted.
    Canceled,
    /// It may be pivoted.
    Ready,
    /// Something this crate does not know.
    Other(i32),
}

/// What QEMU did about a disk error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoErrorAction {
    /// Ignored it.
    Ignored,
    /// Stopped the guest.
    Paused,
    /// Told the guest.
    Reported,
    /// Something this crate does not know.
    Other(i32),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// A step in a domain's life.
    Lifecycle {
        /// Whose.
        domain: DomainRef,
        /// What.
        what: Lifecycle,
        /// libvirt's number for why; its meaning depends on `what`.
        detail: i32,
    },
    /// A domain job (save, backup, …) ended. A pull-mode backup ends by being aborted, and is then
    /// reported as a success with the error text "Operation canceled".
    JobCompleted {
        /// Whose.
        domain: DomainRef,
        /// Its statistics.
        stats: JobStats,
    },
    /// A block job moved on.
    BlockJob {
        /// Whose.
        domain: DomainRef,
        /// The disk's target.
        disk: String,
        /// What the job does.
        kind: BlockJobKind,
        /// How it fares.
        status: BlockJobStatus,
    },
    /// A disk error.
    IoError {
        /// Whose.
        domain: DomainRef,
        /// The file.
        path: String,
        /// The device's alias.
        device: String,
        /// What QEMU did about it.
        action: IoErrorAction,
        /// Why, `enospc` for a full disk.
        reason: String,
    },
    /// A disk's image has grown beyond the threshold that was set.
    BlockThreshold {
        /// Whose.
        domain: DomainRef,
        /// The disk's target, with the index of the image: `vda` or `vda[2]`.
        disk: String,
        /// The file.
        path: Option<String>,
        /// The threshold, bytes.
        threshold: u64,
        /// By how much it was passed, bytes.
        excess: u64,
    },
    /// The guest agent came or went.
    Agent {
        /// Whose.
        domain: DomainRef,
        /// Whether it is there now.
        connected: bool,
        /// libvirt's number for why.
        reason: i32,
    },
    /// The connection is gone; events are lost until the next [`Event::Connected`].
    Disconnected {
        /// Which connection, counted from 1.
        generation: u64,
    },
    /// There is a connection. From generation 2 on: look at the world, events were lost.
    Connected {
        /// Which connection, counted from 1.
        generation: u64,
        /// The daemon behind it.
        instance: Option<DaemonInstance>,
    },
}

impl Event {
    /// The domain it is about.
    pub fn domain(&self) -> Option<&DomainRef> {
        match self {
            Self::Lifecycle { domain, .. }
            | Self::JobCompleted { domain, .. }
            | Self::BlockJob { domain, .. }
            | Self::IoError { domain, .. }
            | Self::BlockThreshold { domain, .. }
            | Self::Agent { domain, .. } => Some(domain),
            Self::Disconnected { .. } | Self::Connected { .. } => None,
        }
    }
}

type Sink = Arc<dyn Fn(Event) + Send + Sync>;
type CloseSink = Arc<dyn Fn() + Send + Sync>;

/// The registration of all events on a connection; ends on drop. The drop may talk to the daemon: not
/// on an async thread.
pub struct Subscription {
    conn: Arc<ConnHandle>,
    ids: Vec<libc::c_int>,
    closes: bool,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        for id in &self.ids {
            // SAFETY: the connection is open as a handle; a wrong or dead registration is only an error.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.conn.ptr(), *id) };
        }
        if self.closes {
            // SAFETY: as above, with the function that was registered.
            unsafe { sys::virConnectUnregisterCloseCallback(self.conn.ptr(), Some(on_close)) };
        }
    }
}

impl Connection {
    /// Sends every event on this connection to `on_event`, and tells `on_close` once when it breaks.
    /// Both run on libvirt's event thread: they must not block, call libvirt or panic.
    ///
    /// # Errors
    /// libvirt's; nothing is registered then.
    pub fn subscribe(
        &self,
        on_event: impl Fn(Event) + Send + Sync + 'static,
        on_closed: impl Fn() + Send + Sync + 'static,
    ) -> Result<Subscription> {
        let sink: Sink = Arc::new(on_event);
        let mut sub = Subscription { conn: Arc::clone(self.handle()), ids: Vec::new(), closes: false };
        for (id, callback) in callbacks() {
            let opaque = Box::into_raw(Box::new(Arc::clone(&sink)));
            // SAFETY: the connection is open; a null domain means all; the callback has the signature
            // that belongs to `id` (see `callbacks`); `free_sink` frees what `opaque` points to, once.
            let ret = unsafe {
                sys::virConnectDomainEventRegisterAny(
                    sub.conn.ptr(),
                    ptr::null_mut(),
                    id,
                    callback,
                    opaque.cast(),
                    Some(free_sink),
                )
            };
            if ret < 0 {
                return Err(Error::last("virConnectDomainEventRegisterAny", sub.conn.label.clone()));
            }
            sub.ids.push(ret);
        }
        // Drivers inside this process have no connection that could break.
        if self.uri().is_in_process() {
            return Ok(sub);
        }
        let close: CloseSink = Arc::new(on_closed);
        let opaque = Box::into_raw(Box::new(close));
        // SAFETY: as above; `free_close` frees what `opaque` points to, once.
        let ret = unsafe {
            sys::virConnectRegisterCloseCallback(
                sub.conn.ptr(),
                Some(on_close),
                opaque.cast(),
                Some(free_close),
            )
        };
        if ret < 0 {
            return Err(Error::last("virConnectRegisterCloseCallback", sub.conn.label.clone()));
        }
        sub.closes = true;
        Ok(sub)
    }
}

unsafe extern "C" fn free_sink(opaque: *mut libc::c_void) {
    // SAFETY: `opaque` came from Box::into_raw of a Sink, and libvirt calls this once.
    drop(unsafe { Box::from_raw(opaque.cast::<Sink>()) });
}

unsafe extern "C" fn free_close(opaque: *mut libc::c_void) {
    // SAFETY: `opaque` came from Box::into_raw of a CloseSink, and libvirt calls this once.
    drop(unsafe { Box::from_raw(opaque.cast::<CloseSink>()) });
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, _reason: libc::c_int, opaque: *mut libc::c_void) {
    // SAFETY: `opaque` is the CloseSink of the registration, alive until `free_close`.
    unsafe { (*opaque.cast::<CloseSink>())() };
}

/// Copies the domain's identity; none of these functions talks to the daemon.
unsafe fn domain_ref(dom: sys::virDomainPtr) -> DomainRef {
    let mut uuid = [0_u8; 16];
    // SAFETY: libvirt lends a valid handle for the duration of the callback.
    unsafe {
        sys::virDomainGetUUID(dom, uuid.as_mut_ptr());
        let id = sys::virDomainGetID(dom);
        DomainRef {
            uuid: Uuid::from_bytes(uuid),
            name: borrow_str(sys::virDomainGetName(dom)).unwrap_or_default(),
            id: (id != libc::c_uint::MAX).then_some(id),
        }
    }
}

unsafe fn emit(opaque: *mut libc::c_void, event: Event) {
    // SAFETY: `opaque` is the Sink of the registration, alive until `free_sink`.
    unsafe { (*opaque.cast::<Sink>())(event) };
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    event: libc::c_int,
    detail: libc::c_int,
    opaque: *mut libc::c_void,
) -> libc::c_int {
    let what = match libc::c_uint::try_from(event).unwrap_or(libc::c_uint::MAX) {
        sys::VIR_DOMAIN_EVENT_DEFINED => Lifecycle::Defined,
        sys::VIR_DOMAIN_EVENT_UNDEFINED => Lifecycle::Undefined,
        sys::VIR_DOMAIN_EVENT_STARTED => Lifecycle::Started,
        sys::VIR_DOMAIN_EVENT_SUSPENDED => Lifecycle::Suspended,
        sys::VIR_DOMAIN_EVENT_RESUMED => Lifecycle::Resumed,
        sys::VIR_DOMAIN_EVENT_STOPPED => Lifecycle::Stopped,
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => Lifecycle::Shutdown,
        sys::VIR_DOMAIN_EVENT_PMSUSPENDED => Lifecycle::PmSuspended,
        sys::VIR_DOMAIN_EVENT_CRASHED => Lifecycle::Crashed,
        _ => Lifecycle::Other(event),
    };
    // SAFETY: the arguments of a callback are valid while it runs.
    unsafe { emit(opaque, Event::Lifecycle { domain: domain_ref(dom), what, detail }) };
    0
}

unsafe extern "C" fn on_job_completed(
    _: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    params: sys::virTypedParameterPtr,
    count: libc::c_int,
    opaque: *mut libc::c_void,
) {
    // SAFETY: the arguments of a callback are valid while it runs.
    unsafe {
        let params = read_params(params, usize::try_from(count).unwrap_or(0));
        let mut stats = JobStats::from_params(JobPhase::Completed, params);
        if stats.success == Some(false) {
            stats.phase = JobPhase::Failed;
        }
        emit(opaque, Event::JobCompleted { domain: domain_ref(dom), stats });
    }
}

unsafe extern "C" fn on_block_job(
    _: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    disk: *const libc::c_char,
    kind: libc::c_int,
    status: libc::c_int,
    opaque: *mut libc::c_void,
) {
    let status = match libc::c_uint::try_from(status).unwrap_or(libc::c_uint::MAX) {
        sys::VIR_DOMAIN_BLOCK_JOB_COMPLETED => BlockJobStatus::Completed,
        sys::VIR_DOMAIN_BLOCK_JOB_FAILED => BlockJobStatus::Failed,
        sys::VIR_DOMAIN_BLOCK_JOB_CANCELED => BlockJobStatus::Canceled,
        sys::VIR_DOMAIN_BLOCK_JOB_READY => BlockJobStatus::Ready,
        _ => BlockJobStatus::Other(status),
    };
    // SAFETY: the arguments of a callback are valid while it runs.
    unsafe {
        let event = Event::BlockJob {
            domain: domain_ref(dom),
            disk: borrow_str(disk).unwrap_or_default(),
            kind: BlockJobKind::from_raw(kind),
            status,
        };
        emit(opaque, event);
    }
}

unsafe extern "C" fn on_io_error(
    _: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    path: *const libc::c_char,
    alias: *const libc::c_char,
    action: libc::c_int,
    reason: *const libc::c_char,
    opaque: *mut libc::c_void,
) {
    let action = match libc::c_uint::try_from(action).unwrap_or(libc::c_uint::MAX) {
        sys::VIR_DOMAIN_EVENT_IO_ERROR_NONE => IoErrorAction::Ignored,
        sys::VIR_DOMAIN_EVENT_IO_ERROR_PAUSE => IoErrorAction::Paused,
        sys::VIR_DOMAIN_EVENT_IO_ERROR_REPORT => IoErrorAction::Reported,
        _ => IoErrorAction::Other(action),
    };
    // SAFETY: the arguments of a callback are valid while it runs.
    unsafe {
        let event = Event::IoError {
            domain: domain_ref(dom),
            path: borrow_str(path).unwrap_or_default(),
            device: borrow_str(alias).unwrap_or_default(),
            action,
            reason: borrow_str(reason).unwrap_or_default(),
        };
        emit(opaque, event);
    }
}

unsafe extern "C" fn on_block_threshold(
    _: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    disk: *const libc::c_char,
    path: *const libc::c_char,
    threshold: libc::c_ulonglong,
    excess: libc::c_ulonglong,
    opaque: *mut libc::c_void,
) {
    // SAFETY: the arguments of a callback are valid while it runs.
    unsafe {
        let event = Event::BlockThreshold {
            domain: domain_ref(dom),
            disk: borrow_str(disk).unwrap_or_default(),
            path: borrow_str(path),
            threshold,
            excess,
        };
        emit(opaque, event);
    }
}

unsafe extern "C" fn on_agent(
    _: sys::virConnectPtr,
    dom: sys::virDomainPtr,
    state: libc::c_int,
    reason: libc::c_int,
    opaque: *mut libc::c_void,
) {
    let connected = libc::c_uint::try_from(state).ok()
        == Some(sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED);
    // SAFETY: the arguments of a callback are valid while it runs.
    unsafe { emit(opaque, Event::Agent { domain: domain_ref(dom), connected, reason }) };
}

/// Every event this crate registers, with its callback behind the one type that C takes.
fn callbacks() -> [(libc::c_int, sys::virConnectDomainEventGenericCallback); 6] {
    type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut libc::c_void);
    macro_rules! generic {
        ($id:ident, $callback:expr, $kind:ty) => {{
            let typed: $kind = Some($callback);
            // SAFETY: libvirt casts it back to the signature that belongs to this event before calling.
            // The typed binding above makes the compiler check that the callback has that signature.
            let generic = typed.map(|f| unsafe { std::mem::transmute::<_, Generic>(f) });
            (sys::$id as libc::c_int, generic)
        }};
    }
    [
        generic!(VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle, sys::virConnectDomainEventCallback),
        generic!(
            VIR_DOMAIN_EVENT_ID_JOB_COMPLETED,
            on_job_completed,
            sys::virConnectDomainEventJobCompletedCallback
        ),
        generic!(VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, on_block_job, sys::virConnectDomainEventBlockJobCallback),
        generic!(
            VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON,
            on_io_error,
            sys::virConnectDomainEventIOErrorReasonCallback
        ),
        generic!(
            VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD,
            on_block_threshold,
            sys::virConnectDomainEventBlockThresholdCallback
        ),
        generic!(
            VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
            on_agent,
            sys::virConnectDomainEventAgentLifecycleCallback
        ),
    ]
}
