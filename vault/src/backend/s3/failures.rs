//! What an error of S3 means, and how it is told.
//!
//! A server says a status and, mostly, a code in XML, of which `opendal` keeps the code in its message. Servers invent codes
//! of their own for a full store; those of MinIO, Ceph and the larger providers are known here, and whatever else is refused
//! for good is [`BackendErrorKind::Broken`] and told in the server's words.

use std::error::Error as _;
use std::fmt::Write;

use opendal::{Error, ErrorKind};

use crate::backend::BackendErrorKind;

const FULL: [&str; 6] = [
    "QuotaExceeded",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
    "InsufficientCapacity",
    "StorageFull",
    "InsufficientStorage",
];
const DENIED: [&str; 9] = [
    "AccessDenied",
    "AccountProblem",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "UnauthorizedAccess",
];
/// What arrived is not what was sent; sent again it may.
const MANGLED: [&str; 4] = ["BadDigest", "IncompleteBody", "InvalidDigest", "XAmzContentSHA256Mismatch"];

/// The server's code.
fn code(error: &Error) -> Option<&str> {
    let (_, rest) = error.message().split_once("code: \"")?;
    rest.split_once('"').map(|(code, _)| code)
}

pub(super) fn kind(error: &Error) -> BackendErrorKind {
    let is = |codes: &[&str]| code(error).is_some_and(|code| codes.contains(&code));
    if is(&FULL) || error.to_string().contains("status: 507") {
        return BackendErrorKind::Full;
    }
    if is(&DENIED) || error.kind() == ErrorKind::PermissionDenied {
        return BackendErrorKind::Denied;
    }
    // It is not the server that it should be, and waiting does not make it so.
    if cause(error).contains("invalid peer certificate") {
        return BackendErrorKind::Broken;
    }
    if is(&MANGLED) || error.is_temporary() || error.kind() == ErrorKind::RateLimited || is_short(error) {
        return BackendErrorKind::Transient;
    }
    BackendErrorKind::Broken
}

/// The server says that there is no such object. A status alone does not: it may come from a proxy.
pub(super) fn is_absent(error: &Error) -> bool {
    error.kind() == ErrorKind::NotFound && code(error) == Some("NoSuchKey")
}

/// The range ends behind the object, or begins there.
pub(super) fn is_beyond(error: &Error) -> bool {
    error.kind() == ErrorKind::RangeNotSatisfied || is_short(error)
}

fn is_short(error: &Error) -> bool {
    error.message().contains("too little data")
}

/// The server doesn't know `If-None-Match` on a PUT.
pub(super) fn is_unknown_condition(error: &Error) -> bool {
    code(error) == Some("NotImplemented") || error.to_string().contains("status: 501")
}

/// In the server's words. Without the request, which says nothing new and is signed.
pub(super) fn cause(error: &Error) -> String {
    let mut text = format!("{}: {}", error.kind(), error.message());
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
