//! Checkpoints: named points in time with a dirty bitmap per disk. All calls here block.
//!
//! Bitmaps are independent of each other and all record at once, so deleting any checkpoint is safe
//! for the others. After QEMU was killed all bitmaps of the image are unusable, while deleting the
//! checkpoints still works.

use std::fmt;
use std::sync::Arc;

use virt_sys as sys;

use crate::conn::ConnHandle;
use crate::domain::Domain;
use crate::error::{Error, ErrorCode, Result};
use crate::ffi::{borrow_str, cstr, take_list, take_str};
use crate::flags::{CheckpointCreateFlags, CheckpointDeleteFlags, CheckpointListFlags, CheckpointXmlFlags};

/// A checkpoint.
pub struct Checkpoint {
    ptr: sys::virDomainCheckpointPtr,
    name: String,
    domain: String,
    conn: Arc<ConnHandle>,
}

// SAFETY: libvirt's objects may be used from any thread, and from several at once.
unsafe impl Send for Checkpoint {}
// SAFETY: as above.
unsafe impl Sync for Checkpoint {}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and is released once. It can fail only for an invalid handle.
        unsafe { sys::virDomainCheckpointFree(self.ptr) };
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint('{}' of '{}')", self.name, self.domain)
    }
}

impl Checkpoint {
    fn adopt(domain: &str, conn: &Arc<ConnHandle>, ptr: sys::virDomainCheckpointPtr) -> Self {
        // SAFETY: the handle is valid; the name belongs to it and is copied.
        let name = unsafe { borrow_str(sys::virDomainCheckpointGetName(ptr)) }.unwrap_or_default();
        Self { ptr, name, domain: domain.to_owned(), conn: Arc::clone(conn) }
    }

    fn label(&self) -> String {
        format!("checkpoint '{}' of domain '{}'", self.name, self.domain)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its description.
    ///
    /// # Errors
    /// libvirt's.
    pub fn xml(&self, flags: CheckpointXmlFlags) -> Result<String> {
        // SAFETY: the handle is valid; the answer is ours to free.
        let xml = unsafe { take_str(sys::virDomainCheckpointGetXMLDesc(self.ptr, flags.bits())) };
        xml.ok_or_else(|| Error::last("virDomainCheckpointGetXMLDesc", self.label()))
    }

    /// The one before it; `None` for a root.
    ///
    /// # Errors
    /// libvirt's.
    pub fn parent(&self) -> Result<Option<Self>> {
        const CALL: &str = "virDomainCheckpointGetParent";
        // SAFETY: the handle is valid; the answer is a handle of ours or null.
        let ptr = unsafe { sys::virDomainCheckpointGetParent(self.ptr, 0) };
        if !ptr.is_null() {
            return Ok(Some(Self::adopt(&self.domain, &self.conn, ptr)));
        }
        match Error::last(CALL, self.label()) {
            e if e.code == ErrorCode::NoDomainCheckpoint => Ok(None),
            e => Err(e),
        }
    }

    /// Those after it; with `DESCENDANTS` also theirs.
    ///
    /// # Errors
    /// libvirt's.
    pub fn children(&self, flags: CheckpointListFlags) -> Result<Vec<Self>> {
        const CALL: &str = "virDomainCheckpointListAllChildren";
        let mut list = std::ptr::null_mut();
        // SAFETY: the handle is valid; libvirt allocates the list.
        let ret = unsafe { sys::virDomainCheckpointListAllChildren(self.ptr, &raw mut list, flags.bits()) };
        if ret < 0 {
            return Err(Error::last(CALL, self.label()));
        }
        let count = usize::try_from(ret).unwrap_or(0);
        // SAFETY: the list has as many handles as the call said, all ours.
        Ok(unsafe { take_list(list, count, |p| Self::adopt(&self.domain, &self.conn, p)) })
    }

    /// Deletes it; with `METADATA_ONLY` only libvirt's record, and the bitmaps stay.
    ///
    /// # Errors
    /// libvirt's.
    pub fn delete(&self, flags: CheckpointDeleteFlags) -> Result<()> {
        // SAFETY: the handle is valid.
        let ret = unsafe { sys::virDomainCheckpointDelete(self.ptr, flags.bits()) };
        if ret < 0 { Err(Error::last("virDomainCheckpointDelete", self.label())) } else { Ok(()) }
    }
}

impl Domain {
    /// Makes a checkpoint as `xml` says ([`crate::xml::CheckpointXml`] builds it). The domain must run.
    ///
    /// # Errors
    /// libvirt's.
    pub fn create_checkpoint(&self, xml: &str, flags: CheckpointCreateFlags) -> Result<Checkpoint> {
        const CALL: &str = "virDomainCheckpointCreateXML";
        let c_xml = cstr(CALL, &self.label(), xml)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ptr = unsafe { sys::virDomainCheckpointCreateXML(self.ptr(), c_xml.as_ptr(), flags.bits()) };
        if ptr.is_null() {
            return Err(Error::last(CALL, self.label()));
        }
        Ok(Checkpoint::adopt(self.name(), self.conn(), ptr))
    }

    /// The domain's checkpoints.
    ///
    /// # Errors
    /// libvirt's.
    pub fn checkpoints(&self, flags: CheckpointListFlags) -> Result<Vec<Checkpoint>> {
        let mut list = std::ptr::null_mut();
        // SAFETY: the handle is valid; libvirt allocates the list.
        let ret = unsafe { sys::virDomainListAllCheckpoints(self.ptr(), &raw mut list, flags.bits()) };
        let count = usize::try_from(self.status("virDomainListAllCheckpoints", ret)?).unwrap_or(0);
        // SAFETY: the list has as many handles as the call said, all ours.
        Ok(unsafe { take_list(list, count, |p| Checkpoint::adopt(self.name(), self.conn(), p)) })
    }

    /// The checkpoint of that name.
    ///
    /// # Errors
    /// [`ErrorCode::NoDomainCheckpoint`].
    pub fn checkpoint(&self, name: &str) -> Result<Checkpoint> {
        const CALL: &str = "virDomainCheckpointLookupByName";
        let object = format!("checkpoint '{name}' of domain '{}'", self.name());
        let c_name = cstr(CALL, &object, name)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ptr = unsafe { sys::virDomainCheckpointLookupByName(self.ptr(), c_name.as_ptr(), 0) };
        if ptr.is_null() {
            return Err(Error::last(CALL, object));
        }
        Ok(Checkpoint::adopt(self.name(), self.conn(), ptr))
    }
}
