//! Snapshots. All calls here block.
//!
//! An external snapshot of a running domain freezes the present images and puts overlays on top. On a
//! domain that is shut off the same call silently redefines it onto a new overlay: check the state.

use std::fmt;
use std::sync::Arc;

use virt_sys as sys;

use crate::conn::ConnHandle;
use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::ffi::{borrow_str, cstr, take_list, take_str};
use crate::flags::{SnapshotCreateFlags, SnapshotDeleteFlags, SnapshotListFlags};

/// A snapshot that libvirt keeps a record of.
pub struct Snapshot {
    ptr: sys::virDomainSnapshotPtr,
    name: String,
    domain: String,
    _conn: Arc<ConnHandle>,
}

// SAFETY: libvirt's objects may be used from any thread, and from several at once.
unsafe impl Send for Snapshot {}
// SAFETY: as above.
unsafe impl Sync for Snapshot {}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and is released once. It can fail only for an invalid handle.
        unsafe { sys::virDomainSnapshotFree(self.ptr) };
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot('{}' of '{}')", self.name, self.domain)
    }
}

impl Snapshot {
    fn adopt(domain: &Domain, ptr: sys::virDomainSnapshotPtr) -> Self {
        // SAFETY: the handle is valid; the name belongs to it and is copied.
        let name = unsafe { borrow_str(sys::virDomainSnapshotGetName(ptr)) }.unwrap_or_default();
        Self { ptr, name, domain: domain.name().to_owned(), _conn: Arc::clone(domain.conn()) }
    }

    fn label(&self) -> String {
        format!("snapshot '{}' of domain '{}'", self.name, self.domain)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its description.
    ///
    /// # Errors
    /// libvirt's.
    pub fn xml(&self) -> Result<String> {
        // SAFETY: the handle is valid; the answer is ours to free.
        let xml = unsafe { take_str(sys::virDomainSnapshotGetXMLDesc(self.ptr, 0)) };
        xml.ok_or_else(|| Error::last("virDomainSnapshotGetXMLDesc", self.label()))
    }

    /// Deletes it; with `METADATA_ONLY` only libvirt's record.
    ///
    /// # Errors
    /// libvirt's.
    pub fn delete(&self, flags: SnapshotDeleteFlags) -> Result<()> {
        // SAFETY: the handle is valid.
        let ret = unsafe { sys::virDomainSnapshotDelete(self.ptr, flags.bits()) };
        if ret < 0 { Err(Error::last("virDomainSnapshotDelete", self.label())) } else { Ok(()) }
    }
}

impl Domain {
    /// Makes a snapshot as `xml` says ([`crate::xml::SnapshotXml`] builds it).
    ///
    /// # Errors
    /// libvirt's.
    pub fn create_snapshot(&self, xml: &str, flags: SnapshotCreateFlags) -> Result<Snapshot> {
        const CALL: &str = "virDomainSnapshotCreateXML";
        let c_xml = cstr(CALL, &self.label(), xml)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ptr = unsafe { sys::virDomainSnapshotCreateXML(self.ptr(), c_xml.as_ptr(), flags.bits()) };
        if ptr.is_null() { Err(Error::last(CALL, self.label())) } else { Ok(Snapshot::adopt(self, ptr)) }
    }

    /// The snapshots libvirt keeps a record of.
    ///
    /// # Errors
    /// libvirt's.
    pub fn snapshots(&self, flags: SnapshotListFlags) -> Result<Vec<Snapshot>> {
        let mut list = std::ptr::null_mut();
        // SAFETY: the handle is valid; libvirt allocates the list.
        let ret = unsafe { sys::virDomainListAllSnapshots(self.ptr(), &raw mut list, flags.bits()) };
        let n = self.status("virDomainListAllSnapshots", ret)?;
        // SAFETY: the list has as many handles as the call said, all ours.
        Ok(unsafe { take_list(list, usize::try_from(n).unwrap_or(0), |p| Snapshot::adopt(self, p)) })
    }

    /// The snapshot of that name.
    ///
    /// # Errors
    /// [`crate::ErrorCode::NoDomainSnapshot`].
    pub fn snapshot(&self, name: &str) -> Result<Snapshot> {
        const CALL: &str = "virDomainSnapshotLookupByName";
        let object = format!("snapshot '{name}' of domain '{}'", self.name());
        let c_name = cstr(CALL, &object, name)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ptr = unsafe { sys::virDomainSnapshotLookupByName(self.ptr(), c_name.as_ptr(), 0) };
        if ptr.is_null() { Err(Error::last(CALL, object)) } else { Ok(Snapshot::adopt(self, ptr)) }
    }
}
