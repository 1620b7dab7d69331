//! Servers that begin with a test and end with it, and images.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use vmkeep_vault::source::{DiskReader, DiskSource, Told};
use vmkeep_vault::write::{Extent, Source};

pub(crate) const CHUNK: usize = 64 << 10;

/// A program that listens at a socket which was made before it was started.
pub(crate) struct Server(pub(crate) Child);

impl Server {
    pub(crate) fn start(listener: impl Into<OwnedFd>, program: &str, args: &[&str]) -> Self {
        let activate = r#"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@""#;
        let mut command = Command::new("sh");
        command.args(["-c", activate, "sh", program]).args(args).stdin(listener.into());
        Self(command.spawn().unwrap())
    }

    pub(crate) fn unix(socket: &Path, program: &str, args: &[&str]) -> Self {
        Self::start(UnixListener::bind(socket).unwrap(), program, args)
    }

    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a program that must succeed; its output.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}: {complaint}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that hold stretches of noise, of one value, and of zeroes, at odd places.
pub(crate) fn image(seed: u64, size: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; size];
    let mut at = 0;
    while at < size {
        let end = (at + rng.usize(1..6 * CHUNK)).min(size);
        match rng.u8(0..4) {
            0 => rng.fill(&mut bytes[at..end]),
            1 => bytes[at..end].fill(rng.u8(1..)),
            _ => {}
        }
        at = end;
    }
    bytes
}

/// All that a source tells, on top of what the parent holds.
pub(crate) async fn restore(disk: Arc<dyn DiskSource>, parent: Option<&[u8]>) -> (Vec<u8>, Told) {
    let size = usize::try_from(disk.size()).unwrap();
    let mut reader = DiskReader::new(disk, parent.map(|parent| parent.len() as u64));
    let mut bytes = Vec::with_capacity(size);
    while let Some((at, extent)) = reader.next().await.unwrap() {
        assert_eq!(at, bytes.len() as u64);
        match extent {
            Extent::Data(data) => bytes.extend_from_slice(&data),
            Extent::Zero(length) => bytes.resize(bytes.len() + length as usize, 0),
            Extent::Unchanged(length) => {
                assert_eq!(at % CHUNK as u64, 0);
                bytes.extend_from_slice(&parent.unwrap()[bytes.len()..][..length as usize]);
            }
        }
    }
    assert_eq!(bytes.len(), size);
    (bytes, reader.told())
}
