//! Connection URIs: only this host, only drivers whose behaviour this crate knows.
//!
//! Invariant: a [`LocalUri`] never makes libvirt talk to another host, spawn a helper program, or use
//! an alias from somebody's `libvirt.conf` (an alias may name another host). Whoever backs up must
//! read and write the very files QEMU has open, so a remote URI cannot work, and would fail late.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorCode, Result};

/// The part after the host: which of the host's daemons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// `/system`: the privileged daemon.
    System,
    /// `/session`: the user's own daemon.
    Session,
    /// `/embed`: the driver inside this process.
    Embed,
    /// Anything else, as the test driver has it.
    Other(String),
}

/// A URI that stays on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalUri {
    raw: String,
    test: bool,
    scope: Scope,
    socket: Option<PathBuf>,
}

impl fmt::Display for LocalUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.raw)
    }
}

fn refused(uri: &str, code: ErrorCode, why: &str) -> Error {
    Error::own("virConnectOpen", format!("connection {uri}"), code, why)
}

impl LocalUri {
    /// Reads a URI.
    ///
    /// # Errors
    /// [`ErrorCode::RemoteUri`] for one that names another host or a transport that leads to one;
    /// [`ErrorCode::NoSupport`] for other drivers than `qemu` and `test`; [`ErrorCode::InvalidArg`]
    /// for what is no URI (libvirt would take it for an alias).
    pub fn parse(uri: &str) -> Result<Self> {
        if uri.contains('\0') {
            return Err(refused("?", ErrorCode::NulByte, "the URI contains a NUL byte"));
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Err(refused(uri, ErrorCode::InvalidArg, "not a URI (aliases are not used)"));
        };
        let (driver, transport) = match scheme.split_once('+') {
            Some((d, t)) => (d.to_ascii_lowercase(), Some(t.to_ascii_lowercase())),
            None => (scheme.to_ascii_lowercase(), None),
        };
        let (before_query, query) = match rest.split_once('?') {
            Some((b, q)) => (b, q.split('#').next().unwrap_or("")),
            None => (rest.split('#').next().unwrap_or(""), ""),
        };
        let (authority, path) = match before_query.find('/') {
            Some(at) => before_query.split_at(at),
            None => (before_query, ""),
        };
        let remote = |why: &str| Err(refused(uri, ErrorCode::RemoteUri, why));
        if !authority.is_empty() {
            return remote("it names another host; run on the hypervisor itself");
        }
        match transport.as_deref() {
            None | Some("unix") => {}
            Some(t) => {
                return remote(&format!("the transport '{t}' leads to another host or a helper program"));
            }
        }
        let test = match driver.as_str() {
            "qemu" => false,
            "test" => true,
            other => {
                return Err(refused(
                    uri,
                    ErrorCode::NoSupport,
                    &format!("the driver '{other}' is not supported, only qemu"),
                ));
            }
        };
        let scope = match path {
            "/system" => Scope::System,
            "/session" => Scope::Session,
            "/embed" => Scope::Embed,
            other => Scope::Other(other.to_owned()),
        };
        let socket = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("socket="))
            .map(|value| PathBuf::from(percent_decode(value)));
        Ok(Self { raw: uri.to_owned(), test, scope, socket })
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.raw
    }

    /// Whether it is libvirt's mock driver.
    pub fn is_test(&self) -> bool {
        self.test
    }

    /// Which daemon.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The socket the URI itself names.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// Whether the driver runs inside this process, so that there is no daemon.
    pub fn is_in_process(&self) -> bool {
        self.test || self.scope == Scope::Embed
    }

    /// The daemon's sockets in the order in which libvirt's client tries them: the one of the URI, or
    /// that of the QEMU driver's own daemon, then that of the monolithic one.
    pub fn candidate_sockets(&self) -> Vec<PathBuf> {
        if let Some(socket) = &self.socket {
            return vec![socket.clone()];
        }
        let folder = match self.scope {
            // For root libvirt takes /session to mean the system daemon.
            Scope::Session if !rustix::process::geteuid().is_root() => user_runtime_folder(),
            Scope::System | Scope::Session => Some(PathBuf::from("/var/run/libvirt")),
            Scope::Embed | Scope::Other(_) => None,
        };
        folder
            .map(|f| ["virtqemud-sock", "libvirt-sock"].iter().map(|n| f.join(n)).collect())
            .unwrap_or_default()
    }

    /// The same daemon, but named by its socket: libvirt's client never starts a daemon for such a
    /// URI. Returns `self` when it already is so, or when no daemon is involved.
    pub(crate) fn without_autospawn(&self) -> Result<Self> {
        let root = rustix::process::geteuid().is_root();
        if self.socket.is_some() || self.scope != Scope::Session || self.test || root {
            return Ok(self.clone());
        }
        let candidates = self.candidate_sockets();
        let Some(socket) = candidates.into_iter().find(|s| s.exists()) else {
            return Err(refused(&self.raw, ErrorCode::NoConnect, "no libvirtd of this user listens"));
        };
        let joint = if self.raw.contains('?') { '&' } else { '?' };
        let raw = format!("{}{joint}socket={}", self.raw, percent_encode(&socket.to_string_lossy()));
        Ok(Self { raw, socket: Some(socket), ..self.clone() })
    }
}

/// Where a user's own daemons put their sockets, as GLib finds it.
fn user_runtime_folder() -> Option<PathBuf> {
    let absolute = |key: &str| std::env::var_os(key).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_RUNTIME_DIR")
        .or_else(|| absolute("XDG_CACHE_HOME"))
        .or_else(|| absolute("HOME").map(|h| h.join(".cache")))
        .map(|base| base.join("libvirt"))
}

fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = (bytes[i] == b'%')
            .then(|| text.get(i + 1..i + 3))
            .flatten()
            .and_then(|h| u8::from_str_radix(h, 16).ok());
        match hex {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn percent_encode(text: &str) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_another_host_is_refused_with_its_own_code() {
        for uri in [
            "qemu+ssh://host/system",
            "qemu+tcp:///system",
            "qemu+tls://h/system",
            "qemu://host/system",
            "qemu+libssh2://u@h/system",
            "qemu+ext:///system?command=/bin/sh",
            "QEMU+SSH:///system",
            "test+ssh:///default",
        ] {
            assert_eq!(LocalUri::parse(uri).unwrap_err().code, ErrorCode::RemoteUri, "{uri}");
        }
        assert_eq!(LocalUri::parse("").unwrap_err().code, ErrorCode::InvalidArg);
        assert_eq!(LocalUri::parse("my-alias").unwrap_err().code, ErrorCode::InvalidArg);
        assert_eq!(LocalUri::parse("xen:///system").unwrap_err().code, ErrorCode::NoSupport);
        assert_eq!(LocalUri::parse("qemu:///sys\0tem").unwrap_err().code, ErrorCode::NulByte);
    }

    #[test]
    fn local_uris_keep_their_parts() {
        let uri = LocalUri::parse("qemu+unix:///session?mode=legacy&socket=/tmp/a%20b/libvirt-sock").unwrap();
        assert_eq!(uri.scope(), &Scope::Session);
        assert_eq!(uri.socket(), Some(Path::new("/tmp/a b/libvirt-sock")));
        assert_eq!(uri.candidate_sockets(), [PathBuf::from("/tmp/a b/libvirt-sock")]);
        assert!(!uri.is_in_process());
        assert!(LocalUri::parse("test:///default").unwrap().is_in_process());
        assert!(LocalUri::parse("qemu:///embed?root=/tmp/x").unwrap().is_in_process());
        let system = LocalUri::parse("qemu:///system").unwrap();
        assert_eq!(system.candidate_sockets().len(), 2);
        assert_eq!(percent_decode(&percent_encode("/tmp/ä b?&")), "/tmp/ä b?&");
    }
}
