//! Owner, group and mode of files: as they are at rest, and given to what is made.
//!
//! **At rest.** While a guest runs, libvirt hands its images to QEMU's user and notes whose they were in an attribute
//! that only root can read. The owner that a backup records is that one: the other is gone when the guest is.
//!
//! **Given.** A file is given its rights under the name at which nobody looks for it, after its last byte and before
//! the rename, so that no power cut leaves a file in its place that is not as it should be. Rights are *changed* only
//! where they differ, and looked at again afterwards: file systems exist that refuse, and ones that say yes and do
//! nothing.
//!
//! **Like another file.** An overlay must open for the same QEMU as its base, so it gets the base's access control list
//! and label as well, and not the list that its folder would give it.
//!
//! Labels and access control lists are not *recorded*: those of one host mean nothing on another, and libvirt sets the
//! labels at every start.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{FileType, Gid, Mode, Stat, Uid, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::{Code, Fault};

use super::accounts;
use crate::codes;

/// Where libvirt notes whose a file was before QEMU got it: `+UID:+GID`.
const REMEMBERED: &str = "trusted.libvirt.security.dac";

/// Permissions as `chmod` takes them; written as `"0640"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileMode(pub u32);

impl FileMode {
    /// What may be given to a file: who may read, write and execute it, and nothing that gives away its owner's rights.
    const PLAIN: u32 = 0o777;

    /// Without what must not come from elsewhere.
    pub(crate) fn plain(self) -> Self {
        Self(self.0 & Self::PLAIN)
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl From<FileMode> for String {
    fn from(mode: FileMode) -> Self {
        mode.to_string()
    }
}

impl TryFrom<String> for FileMode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let octal = (3..=4).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
        let mode = octal.then(|| u32::from_str_radix(&text, 8).ok()).flatten();
        mode.map(Self)
            .ok_or_else(|| format!("{text:?} is not a mode: three or four octal digits, as \"0640\""))
    }
}

/// Whose a file is at rest, and what others may do with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// The owner's number.
    pub uid: u32,
    /// The owner's name, if it had one on that host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The group's number.
    pub gid: u32,
    /// The group's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The permissions.
    pub mode: FileMode,
}

impl Rights {
    /// Those of a file. Symbolic links are followed. Blocks.
    ///
    /// # Errors
    /// When it cannot be looked at, or is no regular file.
    pub fn at_rest(path: &Path) -> io::Result<Self> {
        let stat = rustix::fs::stat(path)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            // Those of a device are the host's, and say nothing about a file that its content is restored to.
            return Err(io::Error::other("not a regular file"));
        }
        let mut note = [0; 64];
        let length = rustix::fs::getxattr(path, REMEMBERED, &mut note[..]);
        let (uid, gid) = owner_at_rest(&stat, length.ok().and_then(|length| note.get(..length)));
        let (user, group) = (accounts::user_name(uid), accounts::group_name(gid));
        Ok(Self { uid, user, gid, group, mode: mode_of(&stat).plain() })
    }
}

/// Who has the file when no guest uses it. There may be no note of libvirt's, or none that this user may read.
fn owner_at_rest(stat: &Stat, note: Option<&[u8]>) -> (u32, u32) {
    note.and_then(remembered).unwrap_or((stat.st_uid, stat.st_gid))
}

/// libvirt's note. A file that was a name in its configuration stands there as a number too.
fn remembered(note: &[u8]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(note).ok()?.trim_end_matches('\0');
    let (uid, gid) = text.split_once(':')?;
    // The highest number means nobody.
    let number =
        |text: &str| text.strip_prefix('+').unwrap_or(text).parse().ok().filter(|id| *id != u32::MAX);
    Some((number(uid)?, number(gid)?))
}

fn mode_of(stat: &Stat) -> FileMode {
    FileMode(stat.st_mode & 0o7777)
}

/// What a file is to be given; what is not said stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wish {
    /// The owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// The permissions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<FileMode>,
}

/// What could not be given.
#[derive(Debug, thiserror::Error)]
pub enum RightsError {
    /// The file cannot be looked at.
    #[error("it cannot be looked at: {0}")]
    Look(io::Error),
    /// Owner or group.
    #[error("it belongs to {is:?} and not to {wanted:?} (user, group): {why}")]
    Owner {
        /// User and group as they should be.
        wanted: (u32, u32),
        /// As they are.
        is: (u32, u32),
        /// What the system said.
        why: String,
    },
    /// The permissions.
    #[error("its mode is {is} and not {wanted}: {why}")]
    Mode {
        /// As it should be.
        wanted: FileMode,
        /// As it is.
        is: FileMode,
        /// What the system said.
        why: String,
    },
    /// The access control list.
    #[error("its access control list cannot be changed: {0}")]
    List(io::Error),
}

/// What something is that is given rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An image, or a file like one.
    File,
    /// A folder.
    Folder,
}

impl RightsError {
    /// As a step's failure.
    #[must_use]
    pub fn fault(&self, kind: Kind, doing: &str, object: &str) -> Fault {
        let code = match (self, kind) {
            (Self::Look(_), _) => Code::UNDEFINED,
            (Self::Owner { .. }, Kind::File) => codes::CANNOT_SET_DISK_IMAGE_OWNERSHIP,
            (Self::Mode { .. } | Self::List(_), Kind::File) => codes::CANNOT_SET_DISK_IMAGE_PERMISSION,
            (Self::Owner { .. }, Kind::Folder) => codes::CANNOT_SET_DIRECTORY_OWNERSHIP,
            (Self::Mode { .. } | Self::List(_), Kind::Folder) => codes::CANNOT_SET_DIRECTORY_PERMISSION,
        };
        let fault = Fault::permanent(code, doing, object, self);
        match self {
            Self::Look(_) => fault,
            Self::Owner { .. } => fault.remedy(
                "Run vmkeepd as root, or name an owner and a group that it may give away there (restore.owner, \
                 restore.group); some file systems know one owner only",
            ),
            Self::Mode { .. } | Self::List(_) => fault.remedy(
                "Name a mode that the file system there allows (restore.mode, restore.directory_mode), or restore to \
                 another one",
            ),
        }
    }
}

impl Wish {
    /// Whether nothing is wished for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Gives an open file what it is to have. The owner first: giving a file away takes some permissions from it.
    /// Durable when the file has been synced.
    ///
    /// # Errors
    /// See [`RightsError`].
    pub fn give(&self, file: impl AsFd) -> Result<(), RightsError> {
        let look = || rustix::fs::fstat(&file).map_err(|e| RightsError::Look(e.into()));
        let found = look()?;
        let is = (found.st_uid, found.st_gid);
        let wanted = (self.uid.unwrap_or(is.0), self.gid.unwrap_or(is.1));
        if is != wanted {
            let changed = rustix::fs::fchown(
                &file,
                self.uid.filter(|uid| *uid != is.0).map(Uid::from_raw),
                self.gid.filter(|gid| *gid != is.1).map(Gid::from_raw),
            );
            let now = look()?;
            let is = (now.st_uid, now.st_gid);
            if changed.is_err() || is != wanted {
                return Err(RightsError::Owner { wanted, is, why: said(changed) });
            }
        }
        let is = mode_of(&look()?);
        let wanted = self.mode.unwrap_or(is);
        if is != wanted {
            let changed = rustix::fs::fchmod(&file, Mode::from_raw_mode(wanted.0));
            let is = mode_of(&look()?);
            if changed.is_err() || is != wanted {
                return Err(RightsError::Mode { wanted, is, why: said(changed) });
            }
        }
        Ok(())
    }
}

/// Gives a file what another has at rest: owner, group, mode, access control list, and its label as far as the system
/// lets one. Durable when the file has been synced.
///
/// At rest, because whoever hands the file to QEMU next, libvirt, notes whose it was before: a guest that is saved and
/// loaded again gets its overlay so, and when the overlay is committed the note goes over to the base.
///
/// # Errors
/// See [`RightsError`].
pub fn like(file: &File, model: &File) -> Result<(), RightsError> {
    let wanted = rustix::fs::fstat(model).map_err(|e| RightsError::Look(e.into()))?;
    owned_like(file, model)?;
    let mode = Wish { mode: Some(mode_of(&wanted)), ..Wish::default() };
    let list = |e: Errno| RightsError::List(e.into());
    if FileType::from_raw_mode(wanted.st_mode) != FileType::RegularFile {
        // Lists and labels of a device are not those of a file in quite another folder, and neither is that folder's list.
        if attribute(file, LIST).map_err(list)?.is_some() {
            rustix::fs::fremovexattr(file, LIST).map_err(list)?;
        }
        return mode.give(file);
    }
    match (attribute(model, LIST).map_err(list)?, attribute(file, LIST).map_err(list)?) {
        (wanted, is) if wanted == is => {}
        (Some(wanted), _) => rustix::fs::fsetxattr(file, LIST, &wanted, XattrFlags::empty()).map_err(list)?,
        (None, _) => rustix::fs::fremovexattr(file, LIST).map_err(list)?,
    }
    if let Ok(Some(wanted)) = attribute(model, LABEL)
        && !attribute(file, LABEL).is_ok_and(|is| is.is_some_and(|is| is == wanted))
        && let Err(error) = rustix::fs::fsetxattr(file, LABEL, &wanted, XattrFlags::empty())
    {
        // libvirt labels what it hands to QEMU, unless it was told not to.
        tracing::warn!(%error, "the overlay keeps another label than its base");
    }
    mode.give(file)
}

/// Gives a file the owner and group that another has at rest. Durable when the file has been synced.
///
/// # Errors
/// See [`RightsError`].
pub fn owned_like(file: &File, model: &File) -> Result<(), RightsError> {
    let stat = rustix::fs::fstat(model).map_err(|e| RightsError::Look(e.into()))?;
    let note = attribute(model, REMEMBERED).unwrap_or_default();
    let (uid, gid) = owner_at_rest(&stat, note.as_deref());
    Wish { uid: Some(uid), gid: Some(gid), mode: None }.give(file)
}

/// Who besides owner and group may do what.
const LIST: &str = "system.posix_acl_access";
/// SELinux's label.
const LABEL: &str = "security.selinux";

fn attribute(file: &File, name: &str) -> Result<Option<Vec<u8>>, Errno> {
    let mut value = vec![0; 64 << 10];
    match rustix::fs::fgetxattr(file, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

fn said(changed: rustix::io::Result<()>) -> String {
    changed.err().map_or_else(|| "the file system accepted it without doing it".to_owned(), |e| e.to_string())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;

    fn mode(text: &str) -> Result<FileMode, String> {
        FileMode::try_from(text.to_owned())
    }

    #[test]
    fn a_mode_is_octal_digits_and_nothing_else() {
        assert_eq!(mode("0640"), Ok(FileMode(0o640)));
        assert_eq!(mode("750"), Ok(FileMode(0o750)));
        assert_eq!(String::from(FileMode(0o40)), "0040");
        for wrong in ["", "64", "06400", "0o640", "0680", "+640", "rw-r-----", "-640"] {
            assert!(mode(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn libvirts_note_of_an_owner_is_read_and_anything_else_is_not() {
        assert_eq!(remembered(b"+107:+36"), Some((107, 36)));
        assert_eq!(remembered(b"+0:+0\0"), Some((0, 0)));
        for wrong in [&b""[..], b"+107", b"+-1:+0", b"\xff:\xff", b"root:root"] {
            assert_eq!(remembered(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_file_gets_what_is_wished_for_and_keeps_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let before = Rights::at_rest(&path).unwrap();
        Wish { mode: Some(FileMode(0o640)), ..Wish::default() }.give(&file).unwrap();
        assert_eq!(Rights::at_rest(&path).unwrap(), Rights { mode: FileMode(0o640), ..before });
        Wish::default().give(&file).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
    }

    #[test]
    fn a_file_like_another_opens_for_the_same_people_by_list_and_label_too() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, mode| {
            let path = dir.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
            file
        };
        // Version 2; owner rw, user 4242 rw, group nothing, mask rw, others nothing.
        let mut list = vec![2, 0, 0, 0];
        for (tag, rights, id) in
            [(1_u16, 6_u16, u32::MAX), (2, 6, 4242), (4, 0, u32::MAX), (16, 6, u32::MAX), (32, 0, u32::MAX)]
        {
            list.extend(tag.to_le_bytes().into_iter().chain(rights.to_le_bytes()).chain(id.to_le_bytes()));
        }
        let (base, overlay) = (make("base", 0o640), make("overlay", 0o644));
        if rustix::fs::fsetxattr(&base, LIST, &list, XattrFlags::empty()) == Err(Errno::OPNOTSUPP) {
            eprintln!("skipped: no access control lists on {}", dir.path().display());
            return;
        }
        let label =
            rustix::fs::fsetxattr(&base, LABEL, b"system_u:object_r:svirt_t:s0\0", XattrFlags::empty());
        like(&overlay, &base).unwrap();
        assert_eq!(attribute(&overlay, LIST).unwrap(), Some(list));
        assert_eq!(overlay.metadata().unwrap().mode(), base.metadata().unwrap().mode());
        if label.is_ok() {
            assert_eq!(attribute(&overlay, LABEL), attribute(&base, LABEL));
        }
        // And the other way round: what its folder gave it does not let anybody in whom the base keeps out.
        let plain = make("plain", 0o600);
        like(&overlay, &plain).unwrap();
        assert_eq!(attribute(&overlay, LIST).unwrap(), None);
        assert_eq!(overlay.metadata().unwrap().mode() & 0o7777, 0o600);
    }

    #[test]
    fn what_gives_away_an_owners_rights_is_not_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        File::create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o6755)).unwrap();
        assert_eq!(Rights::at_rest(&path).unwrap().mode, FileMode(0o755));
    }

    #[test]
    fn a_file_system_that_refuses_is_told_apart_by_what_it_refuses() {
        // The kernel lets nobody change the rights of its settings.
        let refuses = File::open("/proc/sys/kernel/ostype").unwrap();
        let is = rustix::fs::fstat(&refuses).unwrap();
        let wish = Wish { mode: Some(FileMode(0o600)), ..Wish::default() };
        let error = wish.give(&refuses).unwrap_err();
        let fault = |kind| error.fault(kind, "restore the file", "/some/image");
        assert_eq!(fault(Kind::File).code, codes::CANNOT_SET_DISK_IMAGE_PERMISSION, "{error}");
        assert_eq!(fault(Kind::Folder).code, codes::CANNOT_SET_DIRECTORY_PERMISSION);
        let wish = Wish { uid: Some(is.st_uid + 1), ..Wish::default() };
        let error = wish.give(&refuses).unwrap_err();
        let fault = |kind| error.fault(kind, "restore the file", "/some/image");
        assert_eq!(fault(Kind::File).code, codes::CANNOT_SET_DISK_IMAGE_OWNERSHIP, "{error}");
        assert_eq!(fault(Kind::Folder).code, codes::CANNOT_SET_DIRECTORY_OWNERSHIP);
    }
}
