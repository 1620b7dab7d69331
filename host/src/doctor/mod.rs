//! What on this host would make backups fail, and the mend.
//!
//! Everything is tried rather than read off: a folder is writable when a file could be written in it (one without a
//! name, which vanishes by itself), a file system shares blocks when it did, QEMU can use a file when a process of its
//! user could ([`qemu`]). Nothing on the host is changed; what had to be made is removed again.

mod confinement;
mod qemu;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use vmkeep_libvirt::{ConnectOptions, Connection, LocalUri, Version};

use vmkeep_steps::image::root::TargetRoot;
use vmkeep_steps::manifest::catalogue::{Entry, Met, walk};
use vmkeep_steps::snapshot::disk::overlay_job;
use vmkeep_steps::workflows::snapshot::unfit_for_overlays;

use crate::api::types::{Finding, Grade};
use crate::config::Config;
use crate::text::bytes;

/// The oldest versions whose behaviour the jobs' order was proven on.
const LIBVIRT: Version = Version(9_000_000);
const QEMU: Version = Version(7_002_000);

/// Less free space than this below a root is worth a word.
const LITTLE: u64 = 10 << 30;

/// Examines the host. Takes some seconds when libvirt hangs.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let config = config.clone();
    tokio::task::spawn_blocking(move || look_around(&config)).await.unwrap_or_else(|error| {
        vec![finding("doctor", Grade::Bad, format!("could not look around: {error}"), "Please report this")]
    })
}

fn look_around(config: &Config) -> Vec<Finding> {
    let mut found = vec![kernel(), folder("state folder", &config.state_dir, Grade::Bad)];
    let (told, connection) = hypervisor(config);
    found.extend(told);
    found.extend([tool("qemu-img"), tool("qemu-nbd"), kvm()]);
    for root in &config.roots {
        found.push(folder("target root", root, Grade::Bad));
        found.extend(sharing(root));
        found.extend(barred(root));
    }
    found.extend(config.snapshot.overlay_dir.iter().flat_map(|dir| overlay_folder(dir)));
    found.extend(libvirt_guests());
    if let Some(connection) = connection {
        found.extend(qemu::look(&connection, config));
        found.extend(confinement::look(&connection, config));
    }
    found
}

fn finding(topic: &str, grade: Grade, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { topic: topic.to_owned(), grade, text: text.into(), remedy: remedy.into() }
}

fn kernel() -> Finding {
    // The call that keeps paths inside their roots came with Linux 5.6.
    let tried = rustix::fs::openat2(
        rustix::fs::CWD,
        "/",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        rustix::fs::ResolveFlags::NO_MAGICLINKS,
    );
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match tried {
        Ok(_) => finding("kernel", Grade::Good, format!("Linux {release}"), ""),
        Err(error) => finding(
            "kernel",
            Grade::Bad,
            format!("Linux {release} does not let paths be confined to a folder: {error}"),
            "Linux 5.6 or newer is needed",
        ),
    }
}

fn hypervisor(config: &Config) -> (Vec<Finding>, Option<Connection>) {
    let topic = "libvirt";
    let system = config.connect.contains("/system");
    let opened = LocalUri::parse(&config.connect)
        .and_then(|uri| Connection::open_with(&uri, &ConnectOptions::default()));
    let connection = match opened {
        Ok(connection) => connection,
        Err(error) => {
            let remedy = if system {
                "Start it (systemctl start libvirtd, or virtqemud.socket), and let this user reach it (group libvirt)"
            } else {
                "Start the session daemon as this user: `virsh list` does. vmkeepd never starts it, since the guests \
                 would then end with vmkeepd's service"
            };
            let text = format!("{} does not answer: {}", config.connect, error.message);
            return (vec![finding(topic, Grade::Bad, text, remedy)], None);
        }
    };
    let mut found = Vec::new();
    match (connection.lib_version(), connection.hypervisor_version()) {
        (Ok(libvirt), Ok(qemu)) => {
            let text = format!("{} answers: libvirt {libvirt}, QEMU {qemu}", config.connect);
            let old = libvirt < LIBVIRT || qemu < QEMU;
            let grade = if old { Grade::Warning } else { Grade::Good };
            let remedy = if old {
                format!("vmkeep was proven on libvirt {LIBVIRT} with QEMU {QEMU} and newer")
            } else {
                String::new()
            };
            found.push(finding(topic, grade, text, remedy));
        }
        (Err(error), _) | (_, Err(error)) => {
            let text = format!("{} answers, but not about QEMU: {}", config.connect, error.message);
            found.push(finding(topic, Grade::Bad, text, "See whether QEMU is installed"));
        }
    }
    if connection.instance().is_none() {
        found.push(finding(
            topic,
            Grade::Warning,
            "which process serves the connection cannot be told; after a crash jobs wait longer before they go on",
            "Let vmkeepd and libvirtd run in the same process namespace",
        ));
    }
    (found, Some(connection))
}

fn tool(name: &str) -> Finding {
    match Command::new(name).arg("--version").output() {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            finding(name, Grade::Good, text.lines().next().unwrap_or_default().to_owned(), "")
        }
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            finding(name, Grade::Bad, format!("does not work: {}", text.trim()), "Install qemu-utils anew")
        }
        Err(error) => {
            let remedy = "Install it: apt-get install qemu-utils, or dnf install qemu-img";
            finding(name, Grade::Bad, format!("cannot be started: {error}"), remedy)
        }
    }
}

fn kvm() -> Finding {
    let topic = "/dev/kvm";
    match File::options().read(true).write(true).open(topic) {
        Ok(_) => finding(topic, Grade::Good, "can be opened by this user", ""),
        Err(error) => finding(
            topic,
            Grade::Note,
            format!("cannot be opened by this user: {error}; guests of this user run in software"),
            "Only if guests should be faster: join the group kvm, or switch virtualisation on in the firmware",
        ),
    }
}

/// A file in a folder that is gone when it is closed: without a name where the file system knows such files, else with
/// one that is removed at once.
fn nameless(dir: &Path) -> rustix::io::Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::NOENT) => {
            let path = dir.join(format!(".vmkeep-doctor-{}", std::process::id()));
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let file = rustix::fs::open(&path, flags, mode)?;
            rustix::fs::unlink(&path)?;
            Ok(file)
        }
        other => other,
    }
}

fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn folder(topic: &str, dir: &Path, when_not: Grade) -> Finding {
    let there = existing(dir);
    let shown = dir.display();
    let file = match nameless(&there) {
        Ok(file) => file,
        Err(error) => {
            let text = format!("{shown} cannot be written: {error}");
            return finding(topic, when_not, text, "Mount it, or let the user of vmkeepd write there");
        }
    };
    let Ok(space) = rustix::fs::fstatvfs(&file) else {
        return finding(
            topic,
            Grade::Warning,
            format!("{shown}: free space is not known"),
            "See what is mounted there",
        );
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let text = format!("{shown} can be written, {} free", bytes(free));
    if free < LITTLE {
        return finding(
            topic,
            Grade::Warning,
            text,
            "Backups need about what the disks hold: make room, or name another root",
        );
    }
    finding(topic, Grade::Good, text, "")
}

/// The folder for the overlays of disks on block devices, and what lies in it.
fn overlay_folder(dir: &Path) -> Vec<Finding> {
    let topic = "overlay folder";
    let shown = dir.display();
    if let Some(why) = unfit_for_overlays(dir) {
        let remedy = "Name a folder on a disk (snapshot.overlay_dir), or none: disks on block devices are then left out";
        return vec![finding(topic, Grade::Bad, format!("{shown} {why}"), remedy)];
    }
    let mut found = vec![folder(topic, dir, Grade::Bad)];
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut overlays: Vec<(PathBuf, String)> =
        entries.filter_map(|entry| Some((entry.path(), overlay_job(&entry.path())?.to_owned()))).collect();
    overlays.sort();
    found.extend(overlays.into_iter().map(|(path, job)| {
        let text = format!("{} is an overlay of job {job}", path.display());
        let remedy = format!(
            "If that job goes on, none: it removes the overlay itself (vmkeep job show {job}). If it was abandoned or is \
             not known here, find out what the overlay holds, and whether a domain uses it, before removing it"
        );
        finding(topic, Grade::Note, text, remedy)
    }));
    found
}

/// Folders below a root that cannot be looked into.
fn barred(root: &Path) -> Vec<Finding> {
    // A root that is not there is told of elsewhere. What lies in the backups is of no interest here.
    let met = TargetRoot::open(root).and_then(|root| walk(root.folder(), &|_, _| true));
    let entry = |met| match met {
        Met::Other(Entry::Barred { path, error }) => Some(finding(
            "target root",
            Grade::Bad,
            format!("{} cannot be looked into: {error}", path.display()),
            "Backups in it are not seen. Let the user of vmkeepd in (chown, chmod), or move it elsewhere",
        )),
        _ => None,
    };
    met.unwrap_or_default().into_iter().filter_map(entry).collect()
}

/// Whether copies on the root's file system can share blocks.
fn sharing(dir: &Path) -> Option<Finding> {
    let there = existing(dir);
    let (from, to) = (nameless(&there).ok()?, nameless(&there).ok()?);
    rustix::io::write(&from, &[1; 4096]).ok()?;
    if rustix::fs::ioctl_ficlone(&to, &from).is_ok() {
        let text =
            format!("{} shares blocks: copies of images on it take no time and no space", dir.display());
        return Some(finding("target root", Grade::Good, text, ""));
    }
    let text =
        format!("the file system of {} cannot share blocks: every backup is a full copy", dir.display());
    Some(finding(
        "target root",
        Grade::Note,
        text,
        "Only if that matters: XFS or Btrfs, with the images on the same file system",
    ))
}

fn libvirt_guests() -> Option<Finding> {
    let active = |unit: &str| {
        let output = Command::new("systemctl").args(["is-active", unit]).output().ok()?;
        (String::from_utf8_lossy(&output.stdout).trim() == "active").then_some(())
    };
    active("libvirt-guests.service")?;
    Some(finding(
        "libvirt-guests",
        Grade::Note,
        "is active: at shutdown it saves or stops guests, in the middle of a job as well; the job goes on after the boot",
        "Stop vmkeepd first at shutdown: order vmkeepd.service after libvirt-guests.service",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_does_not_exist_yet_is_judged_by_where_it_would_be() {
        let dir = tempfile::tempdir().unwrap();
        let found = folder("target root", &dir.path().join("a/b"), Grade::Bad);
        assert_ne!(found.grade, Grade::Bad, "{found:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "looking must leave nothing behind");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_bad_and_has_a_mend() {
        let found = folder("target root", Path::new("/proc/nothing"), Grade::Bad);
        assert_eq!(found.grade, Grade::Bad);
        assert!(!found.remedy.is_empty());
    }

    #[test]
    fn an_overlay_in_the_folder_for_them_is_named_with_its_job_and_a_folder_in_memory_is_bad() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        std::fs::write(dir.path().join("vmkeep-0123456789ab-vda.qcow2"), b"").unwrap();
        std::fs::write(dir.path().join("vmkeep-something else"), b"").unwrap();
        let found = overlay_folder(dir.path());
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[1].text.contains("job 0123456789ab") && found[1].remedy.contains("0123456789ab"));
        let bad = overlay_folder(Path::new("/dev"));
        assert_eq!((bad.len(), bad[0].grade), (1, Grade::Bad), "{bad:?}");
    }

    #[test]
    fn a_missing_tool_is_bad_and_has_a_mend() {
        let found = tool("qemu-img-that-is-not-there");
        assert_eq!(found.grade, Grade::Bad);
        assert!(found.remedy.contains("qemu-utils"));
    }
}
