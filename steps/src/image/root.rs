//! Safe places to write: configured roots, and folders beneath them.
//!
//! A [`TargetRoot`] is a folder that the configuration names. Everything vmkeep writes lies beneath one. All access
//! goes through file descriptors: a path below a root is opened with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS |
//! RESOLVE_NO_MAGICLINKS)`, so the *kernel* refuses a path that climbs out with `..`, is absolute, or passes through
//! a symbolic link, and no race between a check and a use exists. What then happens in a [`Folder`] takes one path
//! component at a time ([`Component`]), which cannot name anything elsewhere.
//!
//! The root itself may be reached through symbolic links: whoever wrote the configuration chose it.
//!
//! Files are made 0600 with `O_EXCL`, folders 0700, whatever the umask allows: images hold everything that a guest
//! holds. Labels and ownership attributes of sources are never carried over.
//!
//! Other programs (`qemu-img`, QEMU) take paths, not descriptors. [`Folder::path`] is the resolved path for them and
//! for messages. Beneath a root only the owner of vmkeep may write, so what was opened stays what the path names.

mod path;

pub use path::{Component, RelPath};

use rustix::fs::{Access, AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component as Part, Path, PathBuf};

use crate::blocking::{look, made, touch};

/// Why a place could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootError {
    /// A root must be given by an absolute path.
    #[error("{path:?} is not an absolute path")]
    NotAbsolute {
        /// As given.
        path: PathBuf,
    },
    /// The path is outside every configured root.
    #[error("{path:?} lies outside the configured target folders")]
    Outside {
        /// As given.
        path: PathBuf,
    },
    /// Not a plain name or a plain relative path: empty, absolute, `.`, `..`, or with a NUL byte.
    #[error("{name:?} is not a plain relative name")]
    BadName {
        /// As given.
        name: String,
    },
    /// A symbolic link on the way, or `..`: the kernel refused the path, or it was not even asked.
    #[error("{path:?} passes through a symbolic link or leaves its folder")]
    Escapes {
        /// Full path for people.
        path: PathBuf,
    },
    /// Something with that name is there already.
    #[error("{path:?} exists already")]
    Exists {
        /// Full path for people.
        path: PathBuf,
    },
    /// Nothing is there.
    #[error("{path:?} does not exist")]
    Missing {
        /// Full path for people.
        path: PathBuf,
    },
    /// Something is there that is not of the kind that was expected.
    #[error("{path:?} is not a {wanted}")]
    WrongKind {
        /// Full path for people.
        path: PathBuf,
        /// `regular file` or `folder`.
        wanted: &'static str,
    },
    /// No room on the file system.
    #[error("no space left to {act} {path:?}")]
    NoSpace {
        /// What was being done.
        act: &'static str,
        /// Full path for people.
        path: PathBuf,
    },
    /// The operating system refused for another reason.
    #[error("cannot {act} {path:?}: {source}")]
    Io {
        /// What was being done.
        act: &'static str,
        /// Full path for people.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl RootError {
    pub(crate) fn from_errno(act: &'static str, path: PathBuf, errno: Errno) -> Self {
        match errno {
            Errno::LOOP | Errno::XDEV => Self::Escapes { path },
            Errno::EXIST | Errno::NOTEMPTY => Self::Exists { path },
            Errno::NOENT => Self::Missing { path },
            Errno::NOTDIR => Self::WrongKind { path, wanted: "folder" },
            Errno::NOSPC | Errno::DQUOT => Self::NoSpace { act, path },
            other => Self::Io { act, path, source: other.into() },
        }
    }
}

/// A configured folder beneath which vmkeep may write.
#[derive(Debug)]
pub struct TargetRoot {
    /// As configured, for matching requests that name the same place.
    given: PathBuf,
    folder: Folder,
}

impl TargetRoot {
    /// Opens a root. It must exist: a root that is not there is more often an unmounted disk than a wish for a folder.
    pub fn open(path: &Path) -> Result<Self, RootError> {
        if !path.is_absolute() {
            return Err(RootError::NotAbsolute { path: path.to_owned() });
        }
        let resolved = std::fs::canonicalize(path).map_err(|e| match Errno::from_io_error(&e) {
            Some(errno) => RootError::from_errno("resolve", path.to_owned(), errno),
            None => RootError::Io { act: "resolve", path: path.to_owned(), source: e },
        })?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&resolved, flags, Mode::empty())
            .map_err(|e| RootError::from_errno("open", resolved.clone(), e))?;
        Ok(Self { given: path.to_owned(), folder: Folder { fd, path: resolved } })
    }

    /// The root itself as a folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// The part of `path` below this root, if it lies there as written; `None` in the option for the root itself.
    fn below(&self, path: &Path) -> Option<Option<RelPath>> {
        let rest = path.strip_prefix(&self.given).or_else(|_| path.strip_prefix(&self.folder.path)).ok()?;
        if rest.as_os_str().is_empty() {
            return Some(None);
        }
        Some(Some(RelPath::new(rest.to_str()?).ok()?))
    }
}

/// All configured roots.
#[derive(Debug, Default)]
pub struct Roots(Vec<TargetRoot>);

impl Roots {
    /// Opens every configured root.
    pub fn open<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self, RootError> {
        paths.into_iter().map(|p| TargetRoot::open(p.as_ref())).collect::<Result<_, _>>().map(Self)
    }

    /// The roots.
    pub fn iter(&self) -> impl Iterator<Item = &TargetRoot> {
        self.0.iter()
    }

    /// Which root an absolute path lies beneath, and where below it (`None`: the root itself).
    ///
    /// Only the text is looked at; opening what it names is what the kernel guards. A path with `.` or `..` in it is
    /// outside, even if it would lead back in.
    pub fn locate(&self, path: &Path) -> Result<(&TargetRoot, Option<RelPath>), RootError> {
        if !path.is_absolute() {
            return Err(RootError::NotAbsolute { path: path.to_owned() });
        }
        if path.components().any(|c| matches!(c, Part::ParentDir | Part::CurDir)) {
            return Err(RootError::Escapes { path: path.to_owned() });
        }
        let found = self.0.iter().find_map(|root| root.below(path).map(|rel| (root, rel)));
        found.ok_or_else(|| RootError::Outside { path: path.to_owned() })
    }

    /// Opens an existing folder that must lie beneath a root.
    pub fn open_folder(&self, path: &Path) -> Result<Folder, RootError> {
        let (root, rel) = self.locate(path)?;
        match rel {
            None => root.folder.try_clone(),
            Some(rel) => root.folder.open_folder(&rel),
        }
    }

    /// Opens a folder beneath a root, making it and what is missing above it. Each new name is durable on return.
    pub fn make_folder(&self, path: &Path) -> Result<Folder, RootError> {
        let (root, rel) = self.locate(path)?;
        match rel {
            None => root.folder.try_clone(),
            Some(rel) => root.folder.make_folders(&rel),
        }
    }
}

/// An open folder beneath a root.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

const FOLDER_MODE: Mode = Mode::RWXU;
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
const MODE_BITS: Mode = Mode::from_raw_mode(0o7777);
/// How often a lookup that lost a race with a rename elsewhere (`EAGAIN`) is tried again.
const LOOKUPS: usize = 16;

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Folder {
    /// The resolved path, for other programs and for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of something in this folder.
    pub fn path_of(&self, name: &Component) -> PathBuf {
        self.path.join(name.as_str())
    }

    /// A second handle on the same folder.
    pub fn try_clone(&self) -> Result<Self, RootError> {
        let fd = self.fd.try_clone().map_err(|source| RootError::Io {
            act: "open",
            path: self.path.clone(),
            source,
        })?;
        Ok(Self { fd, path: self.path.clone() })
    }

    fn open_beneath(
        &self,
        act: &'static str,
        rel: &str,
        flags: OFlags,
        mode: Mode,
    ) -> Result<OwnedFd, RootError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        if !flags.contains(OFlags::CREATE) {
            look("open").map_err(|e| RootError::from_errno(act, self.path.join(rel), e))?;
        }
        let mut last = Errno::AGAIN;
        for _ in 0..LOOKUPS {
            match rustix::fs::openat2(&self.fd, rel, flags, mode, resolve) {
                Ok(fd) => return Ok(fd),
                Err(Errno::AGAIN | Errno::INTR) => last = Errno::AGAIN,
                Err(e) => {
                    last = e;
                    break;
                }
            }
        }
        Err(RootError::from_errno(act, self.path.join(rel), last))
    }

    /// Opens a folder below this one.
    pub fn open_folder(&self, rel: &RelPath) -> Result<Self, RootError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        match self.open_beneath("open", rel.as_str(), flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, path: self.path.join(rel.as_str()) }),
            // The kernel says of a link in the last place only that it is no folder.
            Err(RootError::WrongKind { path, .. }) if path.is_symlink() => Err(RootError::Escapes { path }),
            Err(e) => Err(e),
        }
    }

    /// Makes a folder in this one; it must not exist. The new name is durable on return.
    pub fn create_folder(&self, name: &Component) -> Result<Self, RootError> {
        touch("make a folder")
            .and_then(|()| rustix::fs::mkdirat(&self.fd, name.as_str(), FOLDER_MODE))
            .map_err(|e| RootError::from_errno("create", self.path_of(name), e))?;
        self.sync()?;
        self.open_folder(&RelPath::from(name.clone()))
    }

    /// Opens a folder below this one, making it and what is missing above it. New names are durable on return.
    pub fn make_folders(&self, rel: &RelPath) -> Result<Self, RootError> {
        let mut at = self.try_clone()?;
        for part in rel.components() {
            at = match at.create_folder(&part) {
                Err(RootError::Exists { .. }) => at.open_folder(&RelPath::from(part))?,
                other => other?,
            };
        }
        Ok(at)
    }

    /// Makes a file for reading and writing; nothing with that name may exist. Its name is durable only after [`Self::sync`].
    pub fn create_file(&self, name: &Component) -> Result<File, RootError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        touch("create a file").map_err(|e| RootError::from_errno("create", self.path_of(name), e))?;
        let fd = self.open_beneath("create", name.as_str(), flags, FILE_MODE)?;
        // The umask may have taken bits away, never added any; what is left out here would surprise on a restore.
        let act = "set the mode of";
        let stat = rustix::fs::fstat(&fd).map_err(|e| RootError::from_errno(act, self.path_of(name), e))?;
        // Not asked for where there is nothing to do: some file systems know no modes and refuse.
        if Mode::from_raw_mode(stat.st_mode) & MODE_BITS != FILE_MODE {
            rustix::fs::fchmod(&fd, FILE_MODE)
                .map_err(|e| RootError::from_errno(act, self.path_of(name), e))?;
        }
        made(File::from(fd)).map_err(|source| RootError::Io {
            act: "create",
            path: self.path_of(name),
            source,
        })
    }

    fn open_regular(&self, rel: &str, flags: OFlags) -> Result<File, RootError> {
        // Without O_NONBLOCK the open of a FIFO that somebody put there would wait for ever.
        let fd = self.open_beneath("open", rel, flags | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())?;
        let path = || self.path.join(rel);
        let stat = rustix::fs::fstat(&fd).map_err(|e| RootError::from_errno("look at", path(), e))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(RootError::WrongKind { path: path(), wanted: "regular file" });
        }
        Ok(File::from(fd))
    }

    /// Whether this user could make something in this folder; a file system that is read-only does not let it either.
    pub fn check_writable(&self) -> Result<(), RootError> {
        let at = AtFlags::EACCESS;
        rustix::fs::accessat(&self.fd, ".", Access::WRITE_OK | Access::EXEC_OK, at)
            .map_err(|e| RootError::from_errno("write in", self.path.clone(), e))
    }

    /// Opens a regular file below this folder for reading.
    pub fn open_file(&self, rel: &RelPath) -> Result<File, RootError> {
        self.open_regular(rel.as_str(), OFlags::RDONLY)
    }

    /// Opens a regular file in this folder for reading and writing.
    pub fn open_file_for_writing(&self, name: &Component) -> Result<File, RootError> {
        self.open_regular(name.as_str(), OFlags::RDWR)
    }

    /// What a name stands for, without following a symbolic link; `None` if nothing has that name.
    pub fn stat(&self, name: &Component) -> Result<Option<Stat>, RootError> {
        let seen = look("look at")
            .and_then(|()| rustix::fs::statat(&self.fd, name.as_str(), AtFlags::SYMLINK_NOFOLLOW));
        match seen {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(RootError::from_errno("look at", self.path_of(name), e)),
        }
    }

    /// Removes a file (never a folder). Whether it was there. Durable after [`Self::sync`].
    pub fn remove_file(&self, name: &Component) -> Result<bool, RootError> {
        self.unlink(name, AtFlags::empty())
    }

    /// Removes an empty folder. Whether it was there. Durable after [`Self::sync`].
    pub fn remove_folder(&self, name: &Component) -> Result<bool, RootError> {
        self.unlink(name, AtFlags::REMOVEDIR)
    }

    fn unlink(&self, name: &Component, flags: AtFlags) -> Result<bool, RootError> {
        match touch("remove").and_then(|()| rustix::fs::unlinkat(&self.fd, name.as_str(), flags)) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(RootError::from_errno("remove", self.path_of(name), e)),
        }
    }

    /// Renames within this folder, replacing a file of the new name. Durable after [`Self::sync`].
    pub fn replace(&self, from: &Component, to: &Component) -> Result<(), RootError> {
        touch("rename")
            .and_then(|()| rustix::fs::renameat(&self.fd, from.as_str(), &self.fd, to.as_str()))
            .map_err(|e| RootError::from_errno("rename", self.path_of(from), e))
    }

    /// Renames within this folder; nothing with the new name may exist. Durable after [`Self::sync`].
    pub fn rename(&self, from: &Component, to: &Component) -> Result<(), RootError> {
        let plain = RenameFlags::NOREPLACE;
        let path = self.path_of(to);
        let renamed = touch("rename")
            .and_then(|()| rustix::fs::renameat_with(&self.fd, from.as_str(), &self.fd, to.as_str(), plain));
        match renamed {
            Ok(()) => Ok(()),
            // Some network file systems know no flags. Names of ours are unique, so a look beforehand is enough there.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match self.stat(to)? {
                Some(_) => Err(RootError::Exists { path }),
                None => self.replace(from, to),
            },
            Err(Errno::NOENT) => Err(RootError::Missing { path: self.path_of(from) }),
            Err(e) => Err(RootError::from_errno("rename to", path, e)),
        }
    }

    /// Makes names in this folder durable.
    pub fn sync(&self) -> Result<(), RootError> {
        touch("sync a folder")
            .and_then(|()| rustix::fs::fsync(&self.fd))
            .map_err(|e| RootError::from_errno("sync", self.path.clone(), e))
    }

    /// Room on the file system of this folder.
    pub fn space(&self) -> Result<super::space::Space, RootError> {
        super::space::Space::of(&self.fd).map_err(|source| RootError::Io {
            act: "ask for free space at",
            path: self.path.clone(),
            source,
        })
    }

    /// Every name in this folder, sorted, for people: `.` and `..` left out, bytes that are not UTF-8 replaced.
    pub fn names(&self) -> Result<Vec<String>, RootError> {
        let fail = |e| RootError::from_errno("list", self.path.clone(), e);
        let mut found = Vec::new();
        look("list").map_err(fail)?;
        for entry in Dir::read_from(&self.fd).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                found.push(name);
            }
        }
        found.sort();
        Ok(found)
    }

    /// Names and kinds in this folder, sorted; `.` and `..` left out. Names that are not UTF-8 are never ours and are
    /// left out as well.
    pub fn entries(&self) -> Result<Vec<(Component, FileType)>, RootError> {
        let fail = |e| RootError::from_errno("list", self.path.clone(), e);
        let mut found = Vec::new();
        look("list").map_err(fail)?;
        for entry in Dir::read_from(&self.fd).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let Some(name) = entry.file_name().to_str().ok().and_then(|n| Component::new(n).ok()) else {
                continue;
            };
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let Some(stat) = self.stat(&name)? else { continue };
                    FileType::from_raw_mode(stat.st_mode)
                }
                kind => kind,
            };
            found.push((name, kind));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
