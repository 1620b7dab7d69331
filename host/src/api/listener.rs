//! The socket, and who is at its other end.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use axum::extract::{ConnectInfo, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::net::{UnixListener, UnixStream};
use vmkeep_workflow::Fault;

use super::answer::Failure;
use crate::codes;

/// The daemon's socket. Removed when dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that only this very socket is removed, and not one that took its place.
    identity: (u64, u64),
}

/// Who is at the other end of a connection, by the kernel's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The effective user id at the time of connecting; nothing when the kernel does not tell.
    pub uid: Option<u32>,
}

impl Socket {
    /// Binds the socket: 0600, in a folder that is ours and 0700.
    ///
    /// # Errors
    /// When the folder is somebody else's, another daemon listens there, or the system refuses.
    pub async fn bind(path: &Path) -> Result<Self, Fault> {
        let fault = |cause: String, remedy: &str| {
            Fault::permanent(
                codes::DAEMON_UNREACHABLE,
                "listen on the socket",
                path.display().to_string(),
                cause,
            )
            .remedy(remedy.to_owned())
        };
        let elsewhere = "Name another socket, with --socket or in the configuration file";
        let dir = path.parent().ok_or_else(|| fault("it has no folder".to_owned(), elsewhere))?;
        private_folder(dir).map_err(|e| fault(format!("{}: {e}", dir.display()), elsewhere))?;

        if std::fs::symlink_metadata(path).is_ok() {
            // One that answers belongs to a living daemon; one that does not is what a killed daemon left.
            if UnixStream::connect(path).await.is_ok() {
                return Err(fault(
                    "another daemon listens there".to_owned(),
                    "One vmkeepd per host is enough; stop the other one first",
                ));
            }
            std::fs::remove_file(path).map_err(|e| fault(e.to_string(), elsewhere))?;
        }
        let listener = UnixListener::bind(path).map_err(|e| fault(e.to_string(), elsewhere))?;
        // Nobody else could reach it meanwhile: the folder is 0700.
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))
            .map_err(|e| fault(e.to_string(), elsewhere))?;
        let meta = std::fs::symlink_metadata(path).map_err(|e| fault(e.to_string(), elsewhere))?;
        Ok(Self { listener, path: path.to_owned(), identity: (meta.dev(), meta.ino()) })
    }

    /// The next connection, and who is at its other end.
    pub(super) async fn accept(&self) -> (UnixStream, Peer) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let peer = Peer { uid: stream.peer_cred().ok().map(|cred| cred.uid()) };
                    return (stream, peer);
                }
                Err(error) => {
                    // Out of descriptors, most likely: wait for some to be closed instead of spinning.
                    tracing::warn!(%error, "could not accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Ok(meta) = std::fs::symlink_metadata(&self.path)
            && (meta.dev(), meta.ino()) == self.identity
        {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes a folder that only its owner may enter, or makes sure that the one that is there is such.
fn private_folder(dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        if let Some(parent) = dir.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let meta = std::fs::metadata(dir)?;
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the folder belongs to another user"));
    }
    if meta.mode() & 0o077 != 0 {
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o700))?;
    }
    Ok(())
}

/// Lets nobody but `owner` through.
pub async fn only_owner(
    owner: u32,
    ConnectInfo(peer): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    if peer.uid == Some(owner) {
        return next.run(request).await;
    }
    tracing::warn!(uid = ?peer.uid, path = request.uri().path(), "refused a connection of another user");
    let who = peer.uid.map_or_else(|| "an unknown user".to_owned(), |uid| format!("uid {uid}"));
    Failure(
        Fault::permanent(
            codes::NOT_PERMITTED,
            "use the API",
            who,
            format!("only uid {owner}, which vmkeepd runs as, may use it"),
        )
        .remedy("Run vmkeep as that user"),
    )
    .into_response()
}

/// The name of a user: from the password file, else from the name service, else the number.
#[must_use]
pub fn user_name(uid: u32) -> String {
    let field = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        (fields.nth(1)?.parse() == Ok(uid) && !name.is_empty()).then_some(name)
    };
    let local = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    if let Some(name) = local.lines().find_map(field) {
        return name;
    }
    let known = std::process::Command::new("getent").arg("passwd").arg(uid.to_string()).output().ok();
    known
        .and_then(|output| field(String::from_utf8(output.stdout).ok()?.lines().next()?))
        .unwrap_or_else(|| format!("uid {uid}"))
}
