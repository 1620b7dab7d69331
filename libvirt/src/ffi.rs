//! Small helpers around C strings, C arrays and typed parameters, so that each call site is one line.
//!
//! Invariant: what libvirt allocates is freed exactly once, and no Rust string with a NUL byte reaches
//! C (it is refused with [`ErrorCode::NulByte`] instead of being cut short).

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::ptr;

use serde::{Deserialize, Serialize};
use virt_sys as sys;

use crate::error::{Error, ErrorCode, Result};

/// A C string from a Rust one.
pub(crate) fn cstr(call: &'static str, object: &str, text: &str) -> Result<CString> {
    CString::new(text)
        .map_err(|_| Error::own(call, object, ErrorCode::NulByte, "an argument contains a NUL byte"))
}

/// As [`cstr`], for an optional argument.
pub(crate) fn cstr_opt(call: &'static str, object: &str, text: Option<&str>) -> Result<Option<CString>> {
    text.map(|t| cstr(call, object, t)).transpose()
}

/// The pointer C wants for an optional string.
pub(crate) fn opt_ptr(text: Option<&CString>) -> *const libc::c_char {
    text.map_or(ptr::null(), |t| t.as_ptr())
}

/// A copy of a string that C keeps; `None` for null.
///
/// # Safety
/// `text` is null or a NUL-terminated string that stays valid during the call.
pub(crate) unsafe fn borrow_str(text: *const libc::c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// A copy of a string that C hands over, which is freed; `None` for null.
///
/// # Safety
/// `text` is null or a NUL-terminated string from `malloc` that nobody else uses.
pub(crate) unsafe fn take_str(text: *mut libc::c_char) -> Option<String> {
    // SAFETY: the caller's promise; it is freed once, after the copy was made.
    unsafe {
        let copy = borrow_str(text);
        libc::free(text.cast());
        copy
    }
}

/// Takes a libvirt list: `count` pointers in an array from `malloc`. Each element goes through `take`.
///
/// # Safety
/// `list` is null or such an array with at least `count` elements, and nobody else uses it.
pub(crate) unsafe fn take_list<P: Copy, T>(
    list: *mut P,
    count: usize,
    mut take: impl FnMut(P) -> T,
) -> Vec<T> {
    if list.is_null() {
        return Vec::new();
    }
    // SAFETY: the caller's promise; the array itself is freed once, after its elements were read.
    unsafe {
        let out = (0..count).map(|i| take(*list.add(i))).collect();
        libc::free(list.cast());
        out
    }
}

/// One value of libvirt's typed parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ParamValue {
    /// `int` and `llong`.
    Int(i64),
    /// `uint` and `ullong`.
    Uint(u64),
    /// `boolean`.
    Bool(bool),
    /// `double`.
    Double(f64),
    /// `string`.
    Text(String),
}

impl ParamValue {
    /// The number, if it is one and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Uint(v) => Some(*v),
            Self::Int(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The text, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(t) => Some(t),
            _ => None,
        }
    }
}

/// Typed parameters by name, copied out of libvirt's memory.
pub type Params = BTreeMap<String, ParamValue>;

/// Copies typed parameters.
///
/// # Safety
/// `params` is null or an array of `count` valid typed parameters.
pub(crate) unsafe fn read_params(params: *const sys::virTypedParameter, count: usize) -> Params {
    let mut out = Params::new();
    if params.is_null() {
        return out;
    }
    for i in 0..count {
        // SAFETY: the caller's promise; the union's member is chosen by the type tag, and the name is a
        // fixed array that libvirt ends with NUL.
        unsafe {
            let p = &*params.add(i);
            let name = CStr::from_ptr(p.field.as_ptr()).to_string_lossy().into_owned();
            let value = match u32::try_from(p.type_).unwrap_or(0) {
                sys::VIR_TYPED_PARAM_INT => ParamValue::Int(i64::from(p.value.i)),
                sys::VIR_TYPED_PARAM_UINT => ParamValue::Uint(u64::from(p.value.ui)),
                sys::VIR_TYPED_PARAM_LLONG => ParamValue::Int(p.value.l),
                sys::VIR_TYPED_PARAM_ULLONG => ParamValue::Uint(p.value.ul),
                sys::VIR_TYPED_PARAM_DOUBLE => ParamValue::Double(p.value.d),
                sys::VIR_TYPED_PARAM_BOOLEAN => ParamValue::Bool(p.value.b != 0),
                sys::VIR_TYPED_PARAM_STRING => ParamValue::Text(borrow_str(p.value.s).unwrap_or_default()),
                _ => continue,
            };
            out.insert(name, value);
        }
    }
    out
}

/// Typed parameters in libvirt's memory, freed on drop.
pub(crate) struct ParamArray {
    pub(crate) ptr: sys::virTypedParameterPtr,
    pub(crate) len: libc::c_int,
    max: libc::c_int,
}

impl ParamArray {
    pub(crate) fn new() -> Self {
        Self { ptr: ptr::null_mut(), len: 0, max: 0 }
    }

    pub(crate) fn add_str(
        &mut self,
        call: &'static str,
        object: &str,
        name: &CStr,
        value: &str,
    ) -> Result<()> {
        let value = cstr(call, object, value)?;
        // SAFETY: the three fields describe an array that libvirt allocated or the empty one; both
        // strings outlive the call, which copies them.
        let ret = unsafe {
            sys::virTypedParamsAddString(
                &raw mut self.ptr,
                &raw mut self.len,
                &raw mut self.max,
                name.as_ptr(),
                value.as_ptr(),
            )
        };
        if ret < 0 { Err(Error::last(call, object)) } else { Ok(()) }
    }

    pub(crate) fn to_map(&self) -> Params {
        // SAFETY: pointer and length describe libvirt's own array.
        unsafe { read_params(self.ptr, usize::try_from(self.len).unwrap_or(0)) }
    }
}

impl Drop for ParamArray {
    fn drop(&mut self) {
        // SAFETY: the array is libvirt's and nobody else has it; null is allowed.
        unsafe { sys::virTypedParamsFree(self.ptr, self.len) };
    }
}
