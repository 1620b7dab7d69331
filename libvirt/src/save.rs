//! Saving a domain's memory: to a file of ours, and libvirt's managed save. All calls here block.
//!
//! A save stops the domain and leaves its memory and definition in one file ([`crate::saveimage`] reads
//! it). A managed save is the same in a place of libvirt's; *any* later start loads and removes it.

use virt_sys as sys;

use crate::conn::save_params;
use crate::domain::Domain;
use crate::error::{Error, Result};
use crate::ffi::{cstr, cstr_opt, opt_ptr, take_str};
use crate::flags::{SaveFlags, SaveImageXmlFlags};

impl Domain {
    /// Saves it to a file and ends it; the file's definition may be replaced by `xml`.
    ///
    /// libvirt rewrites the file's header after its own sync: sync file and folder again before
    /// relying on it.
    ///
    /// # Errors
    /// [`crate::ErrorCode::NoSpace`]: the guest goes on running and the file is gone.
    pub fn save(&self, path: &str, xml: Option<&str>, flags: SaveFlags) -> Result<()> {
        const CALL: &str = "virDomainSaveFlags";
        let c_path = cstr(CALL, &self.label(), path)?;
        let c_xml = cstr_opt(CALL, &self.label(), xml)?;
        // SAFETY: the handle is valid, the strings outlive the call, null means "as it is".
        let ret = unsafe {
            sys::virDomainSaveFlags(self.ptr(), c_path.as_ptr(), opt_ptr(c_xml.as_ref()), flags.bits())
        };
        self.status(CALL, ret).map(drop)
    }

    /// As [`Self::save`], through the call that takes typed parameters.
    ///
    /// # Errors
    /// libvirt's; [`crate::ErrorCode::NoSupport`] before 8.4.
    pub fn save_params(&self, path: &str, xml: Option<&str>, flags: SaveFlags) -> Result<()> {
        const CALL: &str = "virDomainSaveParams";
        let params = save_params(CALL, &self.label(), path, xml)?;
        // SAFETY: the handle is valid; the array lives until after the call, which does not keep it.
        let ret = unsafe { sys::virDomainSaveParams(self.ptr(), params.ptr, params.len, flags.bits()) };
        self.status(CALL, ret).map(drop)
    }

    /// Saves it to libvirt's own place and ends it.
    ///
    /// # Errors
    /// libvirt's; transient domains are refused.
    pub fn managed_save(&self, flags: SaveFlags) -> Result<()> {
        // SAFETY: the handle is valid.
        let ret = unsafe { sys::virDomainManagedSave(self.ptr(), flags.bits()) };
        self.status("virDomainManagedSave", ret).map(drop)
    }

    /// Whether a managed save image waits for the next start.
    ///
    /// # Errors
    /// libvirt's.
    pub fn has_managed_save(&self) -> Result<bool> {
        // SAFETY: the handle is valid.
        let ret = unsafe { sys::virDomainHasManagedSaveImage(self.ptr(), 0) };
        self.status("virDomainHasManagedSaveImage", ret).map(|n| n > 0)
    }

    /// Removes the managed save image.
    ///
    /// # Errors
    /// libvirt's.
    pub fn remove_managed_save(&self) -> Result<()> {
        // SAFETY: the handle is valid.
        let ret = unsafe { sys::virDomainManagedSaveRemove(self.ptr(), 0) };
        self.status("virDomainManagedSaveRemove", ret).map(drop)
    }

    /// The definition inside the managed save image.
    ///
    /// # Errors
    /// libvirt's.
    pub fn managed_save_xml(&self, flags: SaveImageXmlFlags) -> Result<String> {
        const CALL: &str = "virDomainManagedSaveGetXMLDesc";
        // SAFETY: the handle is valid; the answer is ours to free.
        let xml = unsafe { take_str(sys::virDomainManagedSaveGetXMLDesc(self.ptr(), flags.bits())) };
        xml.ok_or_else(|| Error::last(CALL, self.label()))
    }

    /// Replaces the definition inside the managed save image. Name and UUID must stay.
    ///
    /// # Errors
    /// libvirt's.
    pub fn managed_save_define_xml(&self, xml: &str, flags: SaveFlags) -> Result<()> {
        const CALL: &str = "virDomainManagedSaveDefineXML";
        let c_xml = cstr(CALL, &self.label(), xml)?;
        // SAFETY: the handle is valid and the string outlives the call.
        let ret = unsafe { sys::virDomainManagedSaveDefineXML(self.ptr(), c_xml.as_ptr(), flags.bits()) };
        self.status(CALL, ret).map(drop)
    }
}
