//! libvirt's notes about QEMU, kept from one test bed to the next.
//!
//! Asking QEMU what it can do takes libvirt about three seconds for each new cache folder. libvirt compares the
//! notes with QEMU's and its own binary and with the kernel before it believes them, so old ones do no harm.

use super::{hypervisor::Hypervisor, parts::cache_folders};
use std::{fs, os::unix::fs::MetadataExt};

const CAPABILITIES: &str = "cache/libvirt/qemu/cache/capabilities";

impl Hypervisor {
    /// Copies libvirt's notes about QEMU from (`load`) or to the cache. Merely an optimisation: failures are no harm.
    pub(super) fn seed_capabilities(&self, load: bool) {
        let here = self.dir().join(CAPABILITIES);
        let Some(folder) = cache_folders().into_iter().next() else { return };
        let kept = folder.join(format!("capabilities-{}", self.user().uid));
        let (from, to) = if load { (&kept, &here) } else { (&here, &kept) };
        // What another user could have written is not given to this one.
        let trusted =
            |meta: fs::Metadata| [self.user().uid, rustix::process::geteuid().as_raw()].contains(&meta.uid());
        if !fs::metadata(from).is_ok_and(trusted) || fs::create_dir_all(to).is_err() {
            return;
        }
        for entry in fs::read_dir(from).into_iter().flatten().flatten() {
            let (name, unfinished) =
                (to.join(entry.file_name()), to.join(format!(".{}", std::process::id())));
            if fs::copy(entry.path(), &unfinished).is_ok() {
                let _ = fs::rename(&unfinished, &name);
            }
        }
        if load {
            let _ = self.give_to_user(&self.dir().join("cache"), 6);
        }
    }
}
