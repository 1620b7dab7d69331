//! Which file systems answer lists from a cache, so that a host may not see what another has put.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

/// A file system that answers from a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cached {
    /// With the usual options; with others it has no cache.
    Nfs,
    /// Windows' network folders, also Samba's.
    Smb,
    /// A program, whatever it does.
    Fuse,
    /// A host's folder in a guest.
    Plan9,
}

impl fmt::Display for Cached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nfs => "NFS as it is mounted",
            Self::Smb => "SMB",
            Self::Fuse => "FUSE",
            Self::Plan9 => "9p",
        })
    }
}

/// What kind of cache stands before a folder, if any.
pub(super) fn cached(folder: &OwnedFd) -> Result<Option<Cached>, Errno> {
    let Some(cached) = by_magic(rustix::fs::fstatfs(folder)?.f_type as u64) else { return Ok(None) };
    if cached == Cached::Nfs {
        let stat = rustix::fs::statx(folder.as_fd(), "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        // What can't be read proves nothing.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        if super_options(&mounts, stat.stx_mnt_id).is_some_and(is_uncached_nfs) {
            return Ok(None);
        }
    }
    Ok(Some(cached))
}

/// The numbers are those of `linux/magic.h`, and of the modules that are not in it.
fn by_magic(magic: u64) -> Option<Cached> {
    match magic & 0xffff_ffff {
        0x6969 => Some(Cached::Nfs),
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => Some(Cached::Smb),
        0x6573_5546 => Some(Cached::Fuse),
        0x0102_1997 => Some(Cached::Plan9),
        _ => None,
    }
}

/// The options of the file system that is mounted under this number.
fn super_options(mountinfo: &str, id: u64) -> Option<&str> {
    let line = mountinfo.lines().find(|line| line.split(' ').next() == Some(&id.to_string()))?;
    line.split_once(" - ")?.1.split(' ').nth(2)
}

/// Neither attributes nor names are kept. The kernel shows `actimeo=0` as the four times it stands for.
fn is_uncached_nfs(options: &str) -> bool {
    let has = |option: &str| options.split(',').any(|one| one == option);
    let times = ["acregmin=0", "acregmax=0", "acdirmin=0", "acdirmax=0"];
    (has("noac") || times.iter().all(|time| has(time))) && has("lookupcache=none")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
71 23 0:52 / /srv/a rw,relatime shared:9 - nfs4 nas:/a rw,vers=4.2,acregmin=0,acregmax=0,acdirmin=0,acdirmax=0,hard,\
lookupcache=none,addr=10.0.0.1\n\
72 23 0:53 / /srv/b rw,relatime - nfs4 nas:/b rw,vers=4.2,hard,addr=10.0.0.1\n\
73 23 0:54 / /srv/c rw,relatime - nfs nas:/c rw,noac,lookupcache=none\n\
74 23 0:55 / /srv/d rw,relatime - nfs nas:/d rw,acregmin=0,acregmax=0,acdirmin=0,acdirmax=0,lookupcache=pos\n";

    #[test]
    fn only_nfs_without_any_cache_serves_several_hosts() {
        let uncached = |id| super_options(MOUNTS, id).is_some_and(is_uncached_nfs);
        assert!(uncached(71) && uncached(73));
        assert!(!uncached(72) && !uncached(74));
        assert!(!uncached(7), "the number of no mount");
    }

    #[test]
    fn file_systems_with_caches_are_known_by_their_numbers() {
        assert_eq!(by_magic(0x6969), Some(Cached::Nfs));
        assert_eq!(by_magic(0xffff_ffff_ff53_4d42), Some(Cached::Smb), "the kernel's number may come signed");
        assert_eq!(by_magic(0x6573_5546), Some(Cached::Fuse));
        assert_eq!(by_magic(0xef53), None, "ext4");
    }

    #[test]
    fn several_hosts_are_refused_where_there_is_a_cache() {
        let error = Cached::Fuse.admit("/srv/vault", true).unwrap_err();
        assert!(error.to_string().contains("FUSE"), "{error}");
        assert!(Cached::Fuse.admit("/srv/vault", false).is_ok());
    }
}
