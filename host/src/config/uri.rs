//! Which hypervisor URIs are this host's own.

use super::ConfigError;
use super::file::impossible;

/// Accepts the URI of a local hypervisor: no host, and no transport but a Unix socket.
///
/// # Errors
/// [`ConfigError::Remote`] for another host's; [`ConfigError::Impossible`] for what is no URI of a QEMU driver.
pub fn check_uri(uri: &str) -> Result<(), ConfigError> {
    let Some((scheme, rest)) = uri.split_once("://") else {
        return Err(impossible("connect", &format!("{uri:?} is not of the form qemu:///system")));
    };
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    let (driver, transport) = match scheme.split_once('+') {
        Some((driver, transport)) => (driver, Some(transport)),
        None => (scheme, None),
    };
    if !authority.is_empty() || !matches!(transport, None | Some("unix")) {
        return Err(ConfigError::Remote { uri: uri.to_owned() });
    }
    match driver {
        // `test` is libvirt's own pretence of a hypervisor.
        "qemu" | "test" => Ok(()),
        other => Err(impossible("connect", &format!("vmkeep works with QEMU, not with {other:?}"))),
    }
}
