//! A folder of our own (`FORMAT.md`, §1).
//!
//! An object is written to `tmp/NAME`, synced, renamed without replacing, and then the folder is synced in which it got its
//! name, and each folder above that nobody has seen synced since it was made. Only then is it acknowledged; an error of any
//! of these syncs is the error of the put, for the kernel forgets what it could not write after it has told once.
//!
//! All access goes through a descriptor of the root that is held from the beginning. A folder that is unmounted while the
//! vault is in use is therefore never taken for an empty one; and `openat2` lets no name climb out or pass through a
//! symbolic link. The root itself may be reached through one: whoever gave the address chose it.
//!
//! A deletion is synced too: a collector deletes manifests before packs, and a power cut must not bring back the first
//! without the second.

mod mounts;
mod syncs;
#[cfg(test)]
pub(crate) mod tests;
mod walk;

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

use self::mounts::Cached;
use self::syncs::{Identity, Syncs};
use super::{
    Backend, BackendError, BackendErrorKind, Listed, Options, TEMPORARY, checked, is_passing, split,
    temporary,
};

/// Times that a put begins anew because its folder was removed under it, empty as it was.
const ATTEMPTS: usize = 64;
const FILES: Mode = Mode::from_raw_mode(0o600);
const FOLDERS: Mode = Mode::from_raw_mode(0o700);

/// A vault in a folder.
#[derive(Clone, Debug)]
pub struct Local {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    place: String,
    root: OwnedFd,
    syncs: Syncs,
}

type Outcome<T> = Result<T, Errno>;

impl Local {
    /// Opens a folder. It must be there: a file system that is not mounted has no vault. Only with `create` is it made, and
    /// only it, not the folders above.
    ///
    /// # Errors
    /// If it can't be opened; if it is on a file system that answers from a cache, and more than one host is to use it.
    pub async fn open(path: &Path, options: &Options) -> Result<Self, BackendError> {
        let (path, options) = (path.to_owned(), options.clone());
        let place = path.display().to_string();
        blocking(&place, "", move || Self::open_blocking(&path, &options)).await
    }

    fn open_blocking(path: &Path, options: &Options) -> Result<Self, BackendError> {
        let place = path.display().to_string();
        let failed = |errno| failure(&place, "", errno);
        if options.create {
            match rustix::fs::mkdirat(CWD, path, FOLDERS) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
            let above = path.parent().unwrap_or(Path::new("/"));
            File::open(above).and_then(|above| above.sync_all()).map_err(|error| {
                BackendError::new(&place, "", kind_of_io(&error), format!("{}: {error}", above.display()))
            })?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
            // It may be mounted later.
            Errno::NOENT => BackendError::new(
                &place,
                "",
                BackendErrorKind::Transient,
                "there is no such folder: is its file system mounted?",
            ),
            errno => failed(errno),
        })?;
        if let Some(cached) = mounts::cached(&root).map_err(failed)? {
            cached.admit(&place, options.several_hosts)?;
        }
        Ok(Self { inner: Arc::new(Inner { path: path.to_owned(), place, root, syncs: Syncs::default() }) })
    }

    async fn run<T: Send + 'static>(
        &self,
        name: &str,
        act: impl FnOnce(&Inner, &str) -> Result<T, BackendError> + Send + 'static,
    ) -> Result<T, BackendError> {
        let (inner, owned) = (self.inner.clone(), name.to_owned());
        blocking(&self.inner.place, name, move || act(&inner, &owned)).await
    }
}

impl Cached {
    /// Refuses several hosts where one would not see what another has put; says so to one.
    fn admit(&self, place: &str, several_hosts: bool) -> Result<(), BackendError> {
        if !several_hosts {
            tracing::warn!(place, file_system = %self, "lists here may come from a cache: for one host only");
            return Ok(());
        }
        let cause = format!(
            "{self} answers lists from a cache, so several hosts cannot share this vault. Mount it by NFS with \
             actimeo=0,lookupcache=none, or use sftp:// or s3://"
        );
        Err(BackendError::new(place, "", BackendErrorKind::Broken, cause))
    }
}

#[async_trait]
impl Backend for Local {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        self.run(name, move |inner, name| inner.put(name, &bytes)).await
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        self.run(name, move |inner, name| inner.get(name, range)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        self.run(prefix, |inner, prefix| inner.list(prefix)).await
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        self.run(name, |inner, name| inner.delete(name)).await
    }

    fn place(&self) -> &str {
        &self.inner.place
    }

    async fn stands(&self) -> bool {
        self.run("", |inner, _| Ok(inner.stands())).await.unwrap_or(false)
    }
}

impl Inner {
    fn fail(&self, name: &str, kind: BackendErrorKind, cause: impl std::fmt::Display) -> BackendError {
        BackendError::new(&self.place, name, kind, cause)
    }

    fn beneath(&self, path: &str, flags: OFlags, mode: Mode) -> Outcome<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        loop {
            match rustix::fs::openat2(&self.root, path, flags, mode, resolve) {
                // A rename elsewhere in the tree may make the kernel ask for another try.
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    fn folder(&self, path: &str) -> Outcome<OwnedFd> {
        self.beneath(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    fn stands(&self) -> bool {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let there = rustix::fs::open(&self.path, flags, Mode::empty()).and_then(|there| Identity::of(&there));
        matches!((there, Identity::of(&self.root)), (Ok(there), Ok(own)) if there == own)
    }

    /// In a root that was removed everything is absent: that is no certain answer.
    fn absent<T>(&self, name: &str, otherwise: T) -> Result<T, BackendError> {
        match rustix::fs::fstat(&self.root) {
            Ok(stat) if stat.st_nlink > 0 => Ok(otherwise),
            Ok(_) => Err(self.fail(name, BackendErrorKind::Broken, "the folder of the vault was removed")),
            Err(errno) => Err(failure(&self.place, name, errno)),
        }
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), BackendError> {
        let (folder, last) = split(checked(&self.place, name)?);
        let temporary = temporary(&self.place, name)?;
        let put = self.write(&temporary, bytes).and_then(|()| self.publish(&temporary, folder, last));
        let put = match put {
            Ok(true) => return Ok(()),
            Ok(false) => self.compare(name, folder, bytes),
            Err(errno) => Err(failure(&self.place, name, errno)),
        };
        // Left behind it would only take room; its name tells the collector whose it was.
        let _ = rustix::fs::unlinkat(&self.root, temporary.as_str(), AtFlags::empty());
        put
    }

    fn write(&self, temporary: &str, bytes: &[u8]) -> Outcome<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let opened = match self.beneath(temporary, flags, FILES) {
            Err(Errno::NOENT) => {
                // Nothing in it has to outlive a power cut, so neither has it.
                made(rustix::fs::mkdirat(&self.root, TEMPORARY, FOLDERS))?;
                self.beneath(temporary, flags, FILES)
            }
            other => other,
        };
        let mut file = File::from(opened?);
        file.write_all(bytes).map_err(|error| errno(&error))?;
        file.sync_all().map_err(|error| errno(&error))
    }

    /// Gives the object its name, durably. `false` if the name is taken.
    fn publish(&self, temporary: &str, folder: &str, last: &str) -> Outcome<bool> {
        for _ in 0..ATTEMPTS {
            let into = self.make(folder)?;
            match self.rename(temporary, &into, last) {
                Ok(()) => {
                    self.syncs.sync(&into)?;
                    return Ok(true);
                }
                Err(Errno::EXIST) => return Ok(false),
                // The folder was empty, and somebody who deleted its last object removed it.
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::NOENT)
    }

    fn rename(&self, temporary: &str, into: &OwnedFd, last: &str) -> Outcome<()> {
        match rustix::fs::renameat_with(&self.root, temporary, into, last, RenameFlags::NOREPLACE) {
            // NFS and some FUSE file systems can't; a second link doesn't replace either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                rustix::fs::linkat(&self.root, temporary, into, last, AtFlags::empty())?;
                rustix::fs::unlinkat(&self.root, temporary, AtFlags::empty())
            }
            other => other,
        }
    }

    /// Opens a folder, which is made if it isn't there. Its own name, and those of the folders above it, are durable then:
    /// whoever made it, also another process that was killed before it synced.
    fn make(&self, path: &str) -> Outcome<OwnedFd> {
        let mut above = self.folder("")?;
        if path.is_empty() {
            return Ok(above);
        }
        for end in path.match_indices('/').map(|(at, _)| at).chain([path.len()]) {
            let (_, last) = split(&path[..end]);
            let mut opened = self.folder(&path[..end]);
            if matches!(opened, Err(Errno::NOENT)) {
                made(rustix::fs::mkdirat(&above, last, FOLDERS))?;
                opened = self.folder(&path[..end]);
            }
            let opened = opened?;
            let identity = Identity::of(&opened)?;
            if !self.syncs.is_linked(&path[..end], identity) {
                self.syncs.sync(&above)?;
                self.syncs.linked(&path[..end], identity);
            }
            above = opened;
        }
        Ok(above)
    }

    /// The name is taken: by the same bytes, that is a put that was repeated.
    fn compare(&self, name: &str, folder: &str, bytes: &[u8]) -> Result<(), BackendError> {
        match self.get(name, None)? {
            Some(there) if there == bytes => {
                // Whoever put it may have died before this.
                let synced = self.make(folder).and_then(|folder| self.syncs.sync(&folder));
                synced.map_err(|errno| failure(&self.place, name, errno))
            }
            Some(_) => Err(self.fail(name, BackendErrorKind::Broken, "the name is taken by other bytes")),
            None => {
                Err(self.fail(name, BackendErrorKind::Transient, "it was deleted while it was put again"))
            }
        }
    }

    fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        checked(&self.place, name)?;
        let failed = |errno| failure(&self.place, name, errno);
        // Not blocking: what lies there might be a pipe.
        let file = match self.beneath(name, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::NOENT) => return self.absent(name, None),
            Err(errno) => return Err(failed(errno)),
        };
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(self.fail(name, BackendErrorKind::Broken, "it is not a file"));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let range = range.unwrap_or(0..size);
        let (start, end) = (range.start.min(size), range.end.min(size));
        let length = usize::try_from(end.saturating_sub(start)).map_err(|_| failed(Errno::FBIG))?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, start).map_err(|error| failed(errno(&error)))?;
        Ok(Some(bytes.into()))
    }

    fn delete(&self, name: &str) -> Result<(), BackendError> {
        let (folder, last) = split(checked(&self.place, name)?);
        let failed = |errno| failure(&self.place, name, errno);
        let opened = match self.folder(folder) {
            Ok(opened) => opened,
            Err(Errno::NOENT) => return self.absent(name, ()),
            Err(errno) => return Err(failed(errno)),
        };
        match rustix::fs::unlinkat(&opened, last, AtFlags::empty()) {
            // Also if it was not there: whoever deleted it may have died before the sync.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed(errno)),
        }
        self.syncs.sync(&opened).map_err(failed)?;
        if is_passing(folder) && rustix::fs::unlinkat(&self.root, folder, AtFlags::REMOVEDIR).is_ok() {
            self.syncs.forget(folder);
        }
        self.absent(name, ())
    }
}

/// A folder that another put has made meanwhile is as good.
fn made(made: Outcome<()>) -> Outcome<()> {
    match made {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

fn errno(error: &std::io::Error) -> Errno {
    // A file that is shorter than it said, or takes no bytes, is broken.
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn kind(errno: Errno) -> BackendErrorKind {
    match errno {
        Errno::NOSPC | Errno::DQUOT => BackendErrorKind::Full,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => BackendErrorKind::Denied,
        Errno::AGAIN
        | Errno::INTR
        | Errno::BUSY
        | Errno::NOMEM
        | Errno::MFILE
        | Errno::NFILE
        | Errno::TIMEDOUT
        | Errno::STALE
        | Errno::HOSTDOWN
        | Errno::HOSTUNREACH
        | Errno::NETUNREACH
        | Errno::NOTCONN
        | Errno::CONNRESET => BackendErrorKind::Transient,
        _ => BackendErrorKind::Broken,
    }
}

fn kind_of_io(error: &std::io::Error) -> BackendErrorKind {
    Errno::from_io_error(error).map_or(BackendErrorKind::Broken, kind)
}

fn failure(place: &str, name: &str, errno: Errno) -> BackendError {
    let cause = match errno {
        Errno::LOOP => "there is a symbolic link on the way: a vault has none".to_owned(),
        errno => errno.to_string(),
    };
    BackendError::new(place, name, kind(errno), cause)
}

/// Calls of the file system do not return before the disk answers.
async fn blocking<T: Send + 'static>(
    place: &str,
    name: &str,
    act: impl FnOnce() -> Result<T, BackendError> + Send + 'static,
) -> Result<T, BackendError> {
    match tokio::task::spawn_blocking(act).await {
        Ok(outcome) => outcome,
        Err(error) => Err(BackendError::new(place, name, BackendErrorKind::Broken, error)),
    }
}
