//! A folder of another host, by SFTP (`FORMAT.md`, §1).
//!
//! An object is written under a temporary name, synced by `fsync@openssh.com`, and renamed by the protocol's own rename,
//! which refuses a name that is taken (`posix-rename@openssh.com` would replace). A server without that sync is taken only
//! with `allow_volatile`. Folders can't be synced by this protocol: what a power cut of the *server* takes back of them is
//! found by comparing the host's journal with the vault.
//!
//! **Absent** is not yet what a server calls "no such file": OpenSSH says so too of a name below a file, and of links that
//! lead in circles. So the folders on the way are looked at as well; and the header that was there when the place was
//! opened must still be, for a file system that was unmounted meanwhile leaves an empty folder.
//!
//! One connection carries everything, and is made anew after it was lost. A put, get or deletion that has begun goes on when
//! its caller has gone, so that no handle stays open.

mod failures;
mod list;
mod protocol;
mod session;
mod ssh;
#[cfg(test)]
mod tests;
mod transfer;

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Mutex, Semaphore};

use self::failures::Reason;
use self::protocol::{NO_SUCH_FILE, What};
use self::session::Failure;
use self::ssh::{Connection, Program};
use super::{
    Address, Backend, BackendError, BackendErrorKind, Listed, Options, TEMPORARY, checked, is_passing, split,
    temporary,
};
use crate::names::ObjectName;

const FILES: u32 = 0o600;
const FOLDERS: u32 = 0o700;
/// Times that a put begins anew because its folder was removed under it, empty as it was.
const ATTEMPTS: usize = 64;

/// A vault in a folder of another host.
#[derive(Clone, Debug)]
pub struct Sftp {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    place: String,
    program: Program,
    root: String,
    allow_volatile: bool,
    connection: Mutex<Option<Arc<Connected>>>,
    /// The name of the header, as soon as it is known to be there.
    header: RwLock<Option<String>>,
}

/// A connection that is fit for use.
#[derive(Debug)]
struct Connected {
    connection: Connection,
    /// Files that may be open at once.
    handles: Semaphore,
    can_sync: bool,
}

impl std::ops::Deref for Connected {
    type Target = session::Session;

    fn deref(&self) -> &session::Session {
        &self.connection.session
    }
}

impl Sftp {
    /// Connects, and looks whether the folder is there. Only with `create` is it made, and only it.
    ///
    /// # Errors
    /// If the server is not reached, refuses the key, or is not the one that is known; if it cannot sync files and
    /// `allow_volatile` is not set; if there is no such folder.
    pub async fn open(address: &Address, options: &Options) -> Result<Self, BackendError> {
        let place = address.to_string();
        let Some((program, root)) = ssh::way(address, options) else {
            return Err(BackendError::new(&place, "", BackendErrorKind::Broken, "not an address of SFTP"));
        };
        Self::connect(place, program, root, options).await
    }

    async fn connect(
        place: String,
        program: Program,
        root: String,
        options: &Options,
    ) -> Result<Self, BackendError> {
        let inner = Inner {
            place,
            program,
            root,
            allow_volatile: options.allow_volatile,
            connection: Mutex::new(None),
            header: RwLock::new(None),
        };
        let this = Self { inner: Arc::new(inner) };
        let create = options.create;
        this.run("", move |inner, _| async move { inner.enter(create).await }).await?;
        Ok(this)
    }

    /// Does something that goes on if the caller does not wait for it.
    async fn run<T, F>(
        &self,
        name: &str,
        act: impl FnOnce(Arc<Inner>, String) -> F,
    ) -> Result<T, BackendError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Reason>> + Send + 'static,
    {
        let task = tokio::spawn(act(self.inner.clone(), name.to_owned()));
        let outcome = task
            .await
            .unwrap_or_else(|error| Err(Reason::Other(BackendErrorKind::Broken, error.to_string())));
        outcome.map_err(|reason| BackendError::new(&self.inner.place, name, reason.kind(), reason))
    }
}

#[async_trait]
impl Backend for Sftp {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        checked(&self.inner.place, name)?;
        let temporary = temporary(&self.inner.place, name)?;
        self.run(name, |inner, name| async move { inner.put(&name, &temporary, bytes).await }).await
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        checked(&self.inner.place, name)?;
        self.run(name, |inner, name| async move { inner.get(&name, range).await }).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        if !prefix.is_empty() {
            checked(&self.inner.place, prefix.strip_suffix('/').unwrap_or(prefix))?;
        }
        self.run(prefix, |inner, prefix| async move { inner.list(&prefix).await }).await
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        checked(&self.inner.place, name)?;
        self.run(name, |inner, name| async move { inner.delete(&name).await }).await
    }

    fn place(&self) -> &str {
        &self.inner.place
    }
}

impl Inner {
    fn path(&self, name: &str) -> String {
        if name.is_empty() { self.root.clone() } else { format!("{}/{name}", self.root) }
    }

    /// The connection, made anew if it was lost.
    async fn connected(&self) -> Result<Arc<Connected>, Reason> {
        let mut slot = self.connection.lock().await;
        if let Some(connected) = slot.as_ref().filter(|connected| !connected.has_ended()) {
            return Ok(connected.clone());
        }
        *slot = None;
        let connection = self.program.connect().await.map_err(|(kind, cause)| Reason::Other(kind, cause))?;
        let can_sync = connection.session.has("fsync@openssh.com");
        if !can_sync && !self.allow_volatile {
            let cause = "the server cannot sync files (no fsync@openssh.com): a power cut there may take back what was \
                         acknowledged. Attach it with --allow-volatile if that is known";
            return Err(Reason::Other(BackendErrorKind::Broken, cause.into()));
        }
        let handles = Semaphore::new(connection.session.handles);
        let connected = Arc::new(Connected { connection, handles, can_sync });
        *slot = Some(connected.clone());
        Ok(connected)
    }

    async fn enter(&self, create: bool) -> Result<(), Reason> {
        let connected = self.connected().await?;
        if create {
            self.make(&connected, "").await?;
        }
        match connected.stat(&self.root, true).await {
            Ok(attributes) if attributes.what() == What::Folder => {}
            Ok(_) => return Err(Reason::broken("it is not a folder")),
            Err(failure) if failure.code() == Some(NO_SUCH_FILE) => {
                // It may be mounted later.
                let cause = "there is no such folder: is its file system mounted there?";
                return Err(Reason::Other(BackendErrorKind::Transient, cause.into()));
            }
            Err(failure) => return Err(failure.into()),
        }
        for listed in self.list("vault.").await? {
            self.notice(&listed.name);
        }
        Ok(())
    }

    /// Remembers the header, once it is there.
    fn notice(&self, name: &str) {
        if matches!(name.parse(), Ok(ObjectName::Header(_))) {
            *self.header.write().unwrap_or_else(PoisonError::into_inner) = Some(name.to_owned());
        }
    }

    fn header(&self) -> Option<String> {
        self.header.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a folder that is not there; those above it must be, or are made first.
    async fn make(&self, connected: &Connected, folder: &str) -> Result<(), Reason> {
        let path = self.path(folder);
        let refused = match connected.mkdir(&path, FOLDERS).await {
            Ok(()) => return Ok(()),
            Err(failure @ Failure::Status { .. }) => failure,
            Err(failure) => return Err(failure.into()),
        };
        // Servers say nothing definite of a folder that is there already.
        match connected.stat(&path, folder.is_empty()).await {
            Ok(attributes) if attributes.what() == What::Folder => Ok(()),
            Ok(_) => Err(Reason::broken(format!("{folder} is not a folder"))),
            Err(_) => Err(self.full_or(connected, refused, 0).await),
        }
    }

    /// Makes the folders of a name. The root is not made, and what is in the root only if the vault is there.
    async fn make_all(&self, connected: &Connected, folder: &str) -> Result<(), Reason> {
        self.stands(connected).await?;
        for end in folder.match_indices('/').map(|(at, _)| at).chain([folder.len()]) {
            self.make(connected, &folder[..end]).await?;
        }
        Ok(())
    }

    /// Whether what was found when the place was opened is still there.
    async fn stands(&self, connected: &Connected) -> Result<(), Reason> {
        let gone = || Reason::broken("the vault is not there any more: was its file system unmounted?");
        let (path, what) = match self.header() {
            Some(header) => (self.path(&header), What::File),
            None => (self.root.clone(), What::Folder),
        };
        match connected.stat(&path, what == What::Folder).await {
            Ok(attributes) if attributes.what() == what => Ok(()),
            Ok(_) => Err(gone()),
            Err(failure) if failure.code() == Some(NO_SUCH_FILE) => Err(gone()),
            Err(failure) => Err(failure.into()),
        }
    }

    /// The server says that an object is not there: is that certain?
    async fn absent<T>(&self, connected: &Connected, name: &str, otherwise: T) -> Result<T, Reason> {
        self.stands(connected).await?;
        self.are_folders(connected, split(name).0).await?;
        match connected.stat(&self.path(name), false).await {
            // Put meanwhile; it was absent.
            Ok(attributes) if attributes.what() == What::File => Ok(otherwise),
            Ok(_) => Err(Reason::broken("it is not a file")),
            Err(failure) if failure.code() == Some(NO_SUCH_FILE) => Ok(otherwise),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Nothing stands in the place of a folder: each is one, or is not there.
    async fn are_folders(&self, connected: &Connected, folder: &str) -> Result<(), Reason> {
        if folder.is_empty() {
            return Ok(());
        }
        for end in folder.match_indices('/').map(|(at, _)| at).chain([folder.len()]) {
            match connected.stat(&self.path(&folder[..end]), false).await {
                Ok(attributes) if attributes.what() == What::Folder => {}
                Ok(_) => return Err(Reason::broken(format!("{} is not a folder", &folder[..end]))),
                Err(failure) if failure.code() == Some(NO_SUCH_FILE) => break,
                Err(failure) => return Err(failure.into()),
            }
        }
        Ok(())
    }

    async fn delete(&self, name: &str) -> Result<(), Reason> {
        let connected = self.connected().await?;
        let (folder, _) = split(name);
        match connected.remove(&self.path(name)).await {
            Ok(()) => {}
            Err(failure) if failure.code() == Some(NO_SUCH_FILE) => {
                return self.absent(&connected, name, ()).await;
            }
            Err(failure) => return Err(failure.into()),
        }
        if is_passing(folder) {
            // Mostly it is not empty.
            let _ = connected.rmdir(&self.path(folder)).await;
        }
        Ok(())
    }
}
