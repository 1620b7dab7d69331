//! What is measured against, as shell scripts that say what they took.

use std::path::{Path, PathBuf};

use replay_tests::testbed::Guest;

use super::rig::{Rig, Took, size};

/// Begins like every script. `time` says how long a command took, and what its processes ran.
const HEAD: &str = r#"
set -eu
TIMEFORMAT='measured %R %U %S'
durable() { find "$@" -depth ! -name 'vmlinuz*' ! -name 'initrd*' -exec sync {} +; }
"#;

/// Arguments: the domain, a folder, the target.
const NBDCOPY: &str = r#"
domain=$1 folder=$2 target=$3
cat >"$folder/order.xml" <<END
<domainbackup mode='pull'><server transport='unix' socket='$folder/nbd'/><disks>
<disk name='vda' backup='yes' type='file'><scratch file='$folder/scratch'/></disk></disks></domainbackup>
END
virsh -q backup-begin "$domain" --backupxml "$folder/order.xml" >/dev/null
copy() { nbdcopy --flush "nbd+unix:///vda?socket=$folder/nbd" "$target"; durable "$(dirname "$target")"; }
time copy
virsh -q domjobabort "$domain"
"#;

/// Arguments: the domain, a folder, the target folder, the rest of the options.
const VIRTNBDBACKUP: &str = r#"
domain=$1 folder=$2 target=$3
shift 3
copy() {
    virtnbdbackup -U "$LIBVIRT_DEFAULT_URI" -d "$domain" -o "$target" -S "$folder" -f "$folder/nbd" -n "$@" >"$folder/log" 2>&1 ||
        { cat "$folder/log" >&2; exit 1; }
    durable "$target"
}
time copy "$@"
"#;

/// Arguments: the image, the target.
const CONVERT: &str = r#"
copy() { qemu-img convert -f qcow2 -O raw "$1" "$2"; durable "$(dirname "$2")"; }
time copy "$@"
"#;

fn run(rig: &Rig, script: &str, args: &[&Path], more: &[&str]) -> Took {
    rustix::fs::sync();
    let mut shell = rig.host.hypervisor.command("bash");
    let output = shell.args(["-c", &format!("{HEAD}{script}"), "peer"]).args(args).args(more).output();
    let output = output.expect("bash");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "a peer: {said}{}", String::from_utf8_lossy(&output.stdout));
    let times = said.lines().find_map(|line| line.strip_prefix("measured ")).expect("times");
    let times: Vec<f64> = times.split_whitespace().map(|time| time.parse().expect("seconds")).collect();
    Took { time: times[0], cpu: times[1] + times[2] }
}

/// A copy of the disk by `nbdcopy`, which is removed.
pub fn nbdcopy(rig: &Rig, guest: &Guest) -> Took {
    let (folder, target) = (rig.folder("nbdcopy"), rig.folder("nbdcopy/to"));
    let took = run(rig, NBDCOPY, &[Path::new(guest.name()), &folder, &target.join("disk.raw")], &[]);
    std::fs::remove_dir_all(folder).expect("removed");
    took
}

/// Backups by `virtnbdbackup` in a folder.
pub struct VirtNbdBackup {
    target: PathBuf,
}

impl VirtNbdBackup {
    /// A full one into a new folder.
    pub fn full(rig: &Rig, guest: &Guest, name: &str, more: &[&str]) -> (Self, Took) {
        let this = Self { target: rig.folder(name) };
        let took = this.back_up(rig, guest, &[&["-l", "full"], more].concat());
        (this, took)
    }

    /// What has changed since the last.
    pub fn incremental(&self, rig: &Rig, guest: &Guest) -> Took {
        self.back_up(rig, guest, &["-l", "inc"])
    }

    fn back_up(&self, rig: &Rig, guest: &Guest, options: &[&str]) -> Took {
        let folder = rig.folder("virtnbdbackup");
        let took = run(rig, VIRTNBDBACKUP, &[Path::new(guest.name()), &folder, &self.target], options);
        std::fs::remove_dir_all(folder).expect("removed");
        took
    }

    /// Bytes of its files, as far as they count.
    pub fn size(&self) -> f64 {
        size(&self.target, |name| !name.starts_with("vmlinuz") && !name.starts_with("initrd"))
    }

    pub fn discard(self) {
        std::fs::remove_dir_all(self.target).expect("removed");
    }
}

/// A raw image from a qcow2 one, which is removed.
pub fn convert(rig: &Rig, image: &Path) -> Took {
    let target = rig.folder("converted");
    let took = run(rig, CONVERT, &[image, &target.join("disk.raw")], &[]);
    std::fs::remove_dir_all(target).expect("removed");
    took
}
