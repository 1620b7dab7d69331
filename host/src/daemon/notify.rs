//! Telling systemd where the daemon stands. Without `NOTIFY_SOCKET` nothing is told to nobody.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

/// The daemon takes requests.
pub const READY: &str = "READY=1";
/// The daemon ends.
pub const STOPPING: &str = "STOPPING=1";

/// Sends a state. Failing to do so is no reason to fail.
pub fn tell(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send(Path::new(&socket), state) {
        tracing::debug!(%error, state, "the service manager could not be told");
    }
}

fn send(socket: &Path, state: &str) -> std::io::Result<()> {
    let address = match socket.as_os_str().as_bytes() {
        // An address in the abstract namespace.
        [b'@', name @ ..] => {
            use std::os::linux::net::SocketAddrExt;
            SocketAddr::from_abstract_name(name)?
        }
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_gets_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        send(&path, READY).unwrap();
        let mut buffer = [0; 64];
        let n = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"READY=1");
    }
}
