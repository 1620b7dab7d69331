//! One connection to the libvirt daemon of this host. All calls here block.
//!
//! Invariants:
//! - a connection is closed exactly once, by the last handle that uses it ([`Connection`], [`Domain`]
//!   and every other object share it);
//! - it never leads to another host ([`crate::uri`]);
//! - unless asked to, opening never starts a daemon: a libvirtd started by a backup service lives in
//!   that service's control group, and so do the guests it starts, which would then die with it;
//! - it knows which daemon executes its calls ([`Connection::instance`]), or says that it does not.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virt::connect::Connect;
use virt::error::Error as VirtError;
use virt_sys as sys;

use crate::domain::Domain;
use crate::error::{Error, ErrorCode, Result};
use crate::ffi::cstr;
use crate::flags::{CreateFlags, DefineFlags, ListFlags, SaveFlags, SaveImageXmlFlags};
use crate::instance::{self, DaemonInstance};
use crate::uri::LocalUri;
use crate::{eventloop, ffi};

/// How to open a connection.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Whether libvirt may start a session daemon when none runs.
    pub autospawn: bool,
    /// Seconds between keepalive messages; 0 turns them off.
    pub keepalive_interval: i32,
    /// Unanswered keepalive messages after which the connection counts as broken.
    pub keepalive_count: u32,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { autospawn: false, keepalive_interval: 5, keepalive_count: 5 }
    }
}

/// The host's hardware, as libvirt counts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// CPU model or architecture.
    pub model: String,
    /// Memory in KiB.
    pub memory_kib: u64,
    /// CPUs in use.
    pub cpus: u32,
}

/// A version in libvirt's form, 9.0.0 being 9000000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 1_000_000, self.0 / 1000 % 1000, self.0 % 1000)
    }
}

/// The binding's handle. The binding never closes a connection by itself, so this does.
pub(crate) struct ConnHandle {
    connect: Connect,
    pub(crate) label: String,
    /// The folder of the daemon's socket; its runtime files lie there too.
    pub(crate) run_folder: Option<PathBuf>,
}

impl ConnHandle {
    pub(crate) fn ptr(&self) -> sys::virConnectPtr {
        self.connect.as_ptr()
    }
}

impl Drop for ConnHandle {
    fn drop(&mut self) {
        if let Err(error) = self.connect.close() {
            tracing::warn!(%error, connection = %self.label, "closing a libvirt connection failed");
        }
    }
}

/// A connection. Cheap to clone; every clone is the same connection.
#[derive(Clone)]
pub struct Connection {
    handle: Arc<ConnHandle>,
    uri: LocalUri,
    instance: Option<DaemonInstance>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("uri", &self.uri).field("instance", &self.instance).finish()
    }
}

impl Connection {
    /// Opens a URI for reading and writing, with the defaults of [`ConnectOptions`].
    ///
    /// # Errors
    /// Those of [`LocalUri::parse`], and libvirt's.
    pub fn open(uri: &str) -> Result<Self> {
        Self::open_with(&LocalUri::parse(uri)?, &ConnectOptions::default())
    }

    /// Opens a URI for reading and writing.
    ///
    /// # Errors
    /// [`ErrorCode::NoConnect`] when nobody listens; libvirt's own otherwise.
    pub fn open_with(uri: &LocalUri, options: &ConnectOptions) -> Result<Self> {
        const CALL: &str = "virConnectOpen";
        eventloop::ensure()?;
        let target = if options.autospawn { uri.clone() } else { uri.without_autospawn()? };
        let label = format!("connection {uri}");
        let before = instance::probe(&target);
        let connect =
            Connect::open(Some(target.as_str())).map_err(|_| no_listener(Error::last(CALL, &label)))?;
        let socket = target.candidate_sockets().into_iter().find(|s| s.exists());
        let run_folder = socket.and_then(|s| s.parent().map(Path::to_path_buf));
        let handle = Arc::new(ConnHandle { connect, label, run_folder });
        // An autospawned daemon exists only afterwards; then there is nothing to compare with.
        let after = instance::probe(&target);
        let instance = if before.is_some() && before != after { None } else { after };
        let conn = Self { handle, uri: uri.clone(), instance };
        if options.keepalive_interval > 0 && !uri.is_in_process() {
            conn.set_keepalive(options.keepalive_interval, options.keepalive_count)?;
        }
        Ok(conn)
    }

    pub(crate) fn handle(&self) -> &Arc<ConnHandle> {
        &self.handle
    }

    fn call<T>(&self, call: &'static str, result: std::result::Result<T, VirtError>) -> Result<T> {
        result.map_err(|_| Error::last(call, &self.handle.label))
    }

    /// What the connection was opened with.
    pub fn uri(&self) -> &LocalUri {
        &self.uri
    }

    /// The daemon behind the connection; `None` when it could not be told for sure.
    pub fn instance(&self) -> Option<&DaemonInstance> {
        self.instance.as_ref()
    }

    /// Whether the connection still works, as far as this side knows.
    ///
    /// # Errors
    /// libvirt's.
    pub fn is_alive(&self) -> Result<bool> {
        self.call("virConnectIsAlive", self.handle.connect.is_alive())
    }

    /// Asks for keepalive messages every `interval` seconds; after `count` unanswered ones the
    /// connection is broken. Returns whether the other side takes part.
    ///
    /// # Errors
    /// libvirt's.
    pub fn set_keepalive(&self, interval: i32, count: u32) -> Result<bool> {
        let ret = self.call("virConnectSetKeepAlive", self.handle.connect.set_keep_alive(interval, count))?;
        Ok(ret == 0)
    }

    /// libvirt's version on the daemon's side.
    ///
    /// # Errors
    /// libvirt's.
    pub fn lib_version(&self) -> Result<Version> {
        let v = self.call("virConnectGetLibVersion", self.handle.connect.get_lib_version())?;
        Ok(Version(u64::from(v)))
    }

    /// The hypervisor's version (QEMU's).
    ///
    /// # Errors
    /// libvirt's.
    pub fn hypervisor_version(&self) -> Result<Version> {
        let v = self.call("virConnectGetVersion", self.handle.connect.get_hyp_version())?;
        Ok(Version(u64::from(v)))
    }

    /// The version of the library in this process.
    ///
    /// # Errors
    /// libvirt's.
    pub fn client_version() -> Result<Version> {
        let v = Connect::get_version().map_err(|_| Error::last("virGetVersion", "this process"))?;
        Ok(Version(u64::from(v)))
    }

    /// The driver's name, `QEMU` or `TEST`.
    ///
    /// # Errors
    /// libvirt's.
    pub fn driver(&self) -> Result<String> {
        self.call("virConnectGetType", self.handle.connect.get_type())
    }

    /// The URI as the daemon sees it.
    ///
    /// # Errors
    /// libvirt's.
    pub fn canonical_uri(&self) -> Result<String> {
        self.call("virConnectGetURI", self.handle.connect.get_uri())
    }

    /// The host's name.
    ///
    /// # Errors
    /// libvirt's.
    pub fn hostname(&self) -> Result<String> {
        self.call("virConnectGetHostname", self.handle.connect.get_hostname())
    }

    /// The host's capabilities as XML.
    ///
    /// # Errors
    /// libvirt's.
    pub fn capabilities(&self) -> Result<String> {
        self.call("virConnectGetCapabilities", self.handle.connect.get_capabilities())
    }

    /// What a domain may have here, as XML. `None` means libvirt's default.
    ///
    /// # Errors
    /// libvirt's.
    pub fn domain_capabilities(
        &self,
        emulator: Option<&str>,
        arch: Option<&str>,
        machine: Option<&str>,
        virt_type: Option<&str>,
    ) -> Result<String> {
        const CALL: &str = "virConnectGetDomainCapabilities";
        for text in [emulator, arch, machine, virt_type].into_iter().flatten() {
            // The binding panics on these.
            cstr(CALL, &self.handle.label, text)?;
        }
        let xml = self.handle.connect.get_domain_capabilities(emulator, arch, machine, virt_type, 0);
        self.call(CALL, xml)
    }

    /// The host's hardware.
    ///
    /// # Errors
    /// libvirt's.
    pub fn node_info(&self) -> Result<NodeInfo> {
        let n = self.call("virNodeGetInfo", self.handle.connect.get_node_info())?;
        Ok(NodeInfo { model: n.model, memory_kib: n.memory, cpus: n.cpus })
    }

    /// The host's free memory in bytes.
    ///
    /// # Errors
    /// libvirt's.
    pub fn free_memory(&self) -> Result<u64> {
        self.call("virNodeGetFreeMemory", self.handle.connect.get_free_memory())
    }

    // ---- domains --------------------------------------------------------------------------------

    /// The domains that match; all for no flag.
    ///
    /// # Errors
    /// libvirt's.
    pub fn domains(&self, filter: ListFlags) -> Result<Vec<Domain>> {
        let list =
            self.call("virConnectListAllDomains", self.handle.connect.list_all_domains(filter.bits()))?;
        list.into_iter().map(|d| Domain::adopt(&self.handle, d)).collect()
    }

    /// The domain of that name.
    ///
    /// # Errors
    /// [`ErrorCode::NoDomain`].
    pub fn domain_by_name(&self, name: &str) -> Result<Domain> {
        const CALL: &str = "virDomainLookupByName";
        let object = format!("domain '{name}'");
        cstr(CALL, &object, name)?;
        let d = virt::domain::Domain::lookup_by_name(&self.handle.connect, name)
            .map_err(|_| Error::last(CALL, object))?;
        Domain::adopt(&self.handle, d)
    }

    /// The domain of that UUID.
    ///
    /// # Errors
    /// [`ErrorCode::NoDomain`].
    pub fn domain_by_uuid(&self, uuid: Uuid) -> Result<Domain> {
        let d = virt::domain::Domain::lookup_by_uuid(&self.handle.connect, uuid)
            .map_err(|_| Error::last("virDomainLookupByUUID", format!("domain {uuid}")))?;
        Domain::adopt(&self.handle, d)
    }

    /// Makes or replaces a persistent definition; a running domain keeps its live one.
    ///
    /// # Errors
    /// [`ErrorCode::XmlError`] and the like; [`ErrorCode::OperationFailed`] when name and UUID belong
    /// to different domains.
    pub fn define(&self, xml: &str, flags: DefineFlags) -> Result<Domain> {
        const CALL: &str = "virDomainDefineXMLFlags";
        cstr(CALL, &self.handle.label, xml)?;
        let d = virt::domain::Domain::define_xml_flags(&self.handle.connect, xml, flags.bits());
        Domain::adopt(&self.handle, self.call(CALL, d)?)
    }

    /// Starts a transient domain.
    ///
    /// # Errors
    /// libvirt's.
    pub fn create_transient(&self, xml: &str, flags: CreateFlags) -> Result<Domain> {
        const CALL: &str = "virDomainCreateXML";
        cstr(CALL, &self.handle.label, xml)?;
        let d = virt::domain::Domain::create_xml(&self.handle.connect, xml, flags.bits());
        Domain::adopt(&self.handle, self.call(CALL, d)?)
    }

    // ---- save images ----------------------------------------------------------------------------

    /// Starts the domain in a save image, optionally with another definition (same name and UUID).
    ///
    /// The live definition becomes that of the image or `xml`; the persistent one stays. libvirt does
    /// not check that the disks are as they were when the image was made.
    ///
    /// # Errors
    /// libvirt's.
    pub fn restore(&self, path: &str, xml: Option<&str>, flags: SaveFlags) -> Result<()> {
        const CALL: &str = "virDomainRestoreFlags";
        let object = format!("save image {path}");
        let c_path = cstr(CALL, &object, path)?;
        let c_xml = ffi::cstr_opt(CALL, &object, xml)?;
        // SAFETY: the connection is open, the strings outlive the call.
        let ret = unsafe {
            sys::virDomainRestoreFlags(
                self.handle.ptr(),
                c_path.as_ptr(),
                ffi::opt_ptr(c_xml.as_ref()),
                flags.bits(),
            )
        };
        if ret < 0 { Err(Error::last(CALL, object)) } else { Ok(()) }
    }

    /// As [`Self::restore`], through the call that takes typed parameters.
    ///
    /// # Errors
    /// libvirt's; [`ErrorCode::NoSupport`] before 8.4.
    pub fn restore_params(&self, path: &str, xml: Option<&str>, flags: SaveFlags) -> Result<()> {
        const CALL: &str = "virDomainRestoreParams";
        let object = format!("save image {path}");
        let params = save_params(CALL, &object, path, xml)?;
        // SAFETY: the connection is open; the array lives until after the call, which does not keep it.
        let ret =
            unsafe { sys::virDomainRestoreParams(self.handle.ptr(), params.ptr, params.len, flags.bits()) };
        if ret < 0 { Err(Error::last(CALL, object)) } else { Ok(()) }
    }

    /// The definition inside a save image.
    ///
    /// # Errors
    /// libvirt's.
    pub fn save_image_xml(&self, path: &str, flags: SaveImageXmlFlags) -> Result<String> {
        const CALL: &str = "virDomainSaveImageGetXMLDesc";
        let object = format!("save image {path}");
        let c_path = cstr(CALL, &object, path)?;
        // SAFETY: the connection is open, the string outlives the call; the answer is ours to free.
        let xml = unsafe {
            ffi::take_str(sys::virDomainSaveImageGetXMLDesc(self.handle.ptr(), c_path.as_ptr(), flags.bits()))
        };
        xml.ok_or_else(|| Error::last(CALL, object))
    }

    /// Replaces the definition inside a save image. Name and UUID must stay.
    ///
    /// # Errors
    /// libvirt's.
    pub fn save_image_define_xml(&self, path: &str, xml: &str, flags: SaveFlags) -> Result<()> {
        const CALL: &str = "virDomainSaveImageDefineXML";
        let object = format!("save image {path}");
        let (c_path, c_xml) = (cstr(CALL, &object, path)?, cstr(CALL, &object, xml)?);
        // SAFETY: the connection is open, the strings outlive the call.
        let ret = unsafe {
            sys::virDomainSaveImageDefineXML(self.handle.ptr(), c_path.as_ptr(), c_xml.as_ptr(), flags.bits())
        };
        if ret < 0 { Err(Error::last(CALL, object)) } else { Ok(()) }
    }
}

pub(crate) fn save_params(
    call: &'static str,
    object: &str,
    path: &str,
    xml: Option<&str>,
) -> Result<ffi::ParamArray> {
    let mut params = ffi::ParamArray::new();
    params.add_str(call, object, sys::VIR_DOMAIN_SAVE_PARAM_FILE, path)?;
    if let Some(xml) = xml {
        params.add_str(call, object, sys::VIR_DOMAIN_SAVE_PARAM_DXML, xml)?;
    }
    Ok(params)
}

/// "Nobody listens" arrives as a mere system error of connect(2); give it the code it deserves.
fn no_listener(mut error: Error) -> Error {
    let nobody = matches!(error.errno, Some(libc::ENOENT | libc::ECONNREFUSED))
        || error.message.contains("Failed to connect socket");
    if error.code == ErrorCode::SystemError && nobody && error.errno != Some(libc::EACCES) {
        error.code = ErrorCode::NoConnect;
    }
    error
}
