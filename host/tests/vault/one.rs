//! `vmkeep vault export --disk`: one disk to a file or onto a block device, and what must not be written to.

use std::fs;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmkeep_host::codes;

use crate::disk;
use crate::support::{C, Host, Said, World, backup, damage, noise};

/// A loop device over a file; detached when dropped.
pub(crate) struct Loop(pub(crate) PathBuf);

impl Loop {
    /// Only root can make one, and not everywhere: elsewhere the test says that it proves nothing, and ends.
    pub(crate) fn new(file: &Path) -> Option<Self> {
        Self::of(file, &[])
    }

    fn of(file: &Path, more: &[&str]) -> Option<Self> {
        let made = Command::new("losetup").args(more).args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(made) if made.status.success() => {
                Some(Self(String::from_utf8(made.stdout).unwrap().trim().into()))
            }
            other => {
                println!("SKIPPED: no loop device can be made here: {other:?}");
                None
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.0).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A host with the vault `home`, and a backup in it.
async fn scene() -> (World, Host, String) {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let id = backup(&host.open("home").await, &disk(), None).await.to_string();
    (world, host, id)
}

fn export(host: &Host, id: &str, to: &Path, more: &[&str]) -> Said {
    let words = ["export", "home", id, "--disk", "vda", "--to", to.to_str().unwrap()];
    host.run(&[&words[..], more].concat())
}

const OVERWRITE: &str = "--overwrite-without-copy";

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_goes_to_a_file_which_is_replaced_whole_or_left_as_it_is() {
    let (world, host, id) = scene().await;
    let (disk, file) = (disk(), world.path("out/vda.img"));
    // A folder that is missing is more often not mounted than meant to be made.
    let out = world.path("out");
    export(&host, &id, &file, &[]).told(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, out.to_str().unwrap());
    assert!(!out.exists(), "a folder was made");
    fs::create_dir(&out).unwrap();
    export(&host, &id, &file, &[]).must(0);
    assert!(fs::read(&file).unwrap() == disk);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // The same content is content as well.
    export(&host, &id, &file, &[]).told(codes::TARGET_HOLDS_DATA, "vda.img");
    let old = noise(7, 60 * C);
    fs::write(&file, &old).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    let said = export(&host, &id, &file, &[]);
    assert!(said.told(codes::TARGET_HOLDS_DATA, "vda.img").err.contains(OVERWRITE), "{}", said.err);
    assert!(fs::read(&file).unwrap() == old, "it was refused, and is gone");

    // What somebody has open is not replaced, whatever is said.
    let holder = fs::File::open(&file).unwrap();
    let mut sleeper = Command::new("sleep").arg("1000").stdin(Stdio::from(holder)).spawn().unwrap();
    let said = export(&host, &id, &file, &[OVERWRITE]);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(said.told(codes::IMAGE_LOCKED, "vda.img").err.contains("sleep"), "{}", said.err);
    assert!(fs::read(&file).unwrap() == old);
    let link = world.path("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    export(&host, &id, &link, &[OVERWRITE]).must(codes::UNSAFE_PATH.0);
    assert!(fs::read(&file).unwrap() == old);

    export(&host, &id, &file, &[OVERWRITE, "--format", "qcow2"]).must(0);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    let raw = world.path("out/raw");
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-f", "qcow2", "-O", "raw"]).args([&file, &raw]);
    assert!(convert.status().unwrap().success() && fs::read(&raw).unwrap() == disk);
    // Zeroes are nothing that could be lost.
    fs::write(&raw, vec![0; 5 * C]).unwrap();
    export(&host, &id, &raw, &[]).must(0);
    assert!(fs::read(&raw).unwrap() == disk);

    // A disk that the vault has lost takes nothing's place.
    fs::write(&file, &old).unwrap();
    damage(&world.objects("home/data")[0]);
    export(&host, &id, &file, &[OVERWRITE]).must(codes::VAULT_DAMAGED.0);
    assert!(fs::read(&file).unwrap() == old, "half a disk has taken its place");
    assert_eq!(fs::read_dir(world.path("out")).unwrap().count(), 2, "something was left beside it");
    for words in [&["--disks", "vda"][..], &["--disk", "vda"]] {
        export(&host, &id, &file, words).must(codes::USAGE.0);
    }
    host.run(&["export", "home", &id, "--to", "/nonexistent/x", OVERWRITE]).must(codes::USAGE.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_with_old_data_ends_byte_for_byte_as_the_disk_and_one_in_use_is_left_alone() {
    let (world, host, id) = scene().await;
    let (disk, old) = (disk(), noise(8, 80 * C));
    fs::write(world.path("volume"), &old).unwrap();
    fs::write(world.path("small"), vec![0; 50 * C]).unwrap();
    let Some(device) = Loop::new(&world.path("volume")) else { return };
    let Some(small) = Loop::new(&world.path("small")) else { return };
    assert!(device.bytes() == old);

    export(&host, &id, &device.0, &[]).told(codes::TARGET_HOLDS_DATA, "loop");
    export(&host, &id, &small.0, &[OVERWRITE]).told(codes::NOT_ENOUGH_DISK_SPACE, "loop");
    export(&host, &id, &device.0, &[OVERWRITE, "--format", "qcow2"]).told(codes::USAGE, "loop");
    // The file below a device is the device.
    export(&host, &id, &world.path("volume"), &[OVERWRITE]).told(codes::IMAGE_LOCKED, "loop");
    // Somebody who claims it, as a mount does; and somebody who only has it open, as QEMU has.
    let exclusively = rustix::fs::OFlags::EXCL.bits().cast_signed();
    for flags in [exclusively, 0] {
        let claim = fs::File::options().read(true).custom_flags(flags).open(&device.0).unwrap();
        export(&host, &id, &device.0, &[OVERWRITE]).told(codes::IMAGE_LOCKED, "loop");
        drop(claim);
    }
    assert!(
        device.bytes() == old && small.bytes() == vec![0; 50 * C],
        "what was refused has changed something"
    );

    let said = export(&host, &id, &device.0, &[OVERWRITE]);
    said.must(0);
    let now = device.bytes();
    assert!(now[..disk.len()] == disk, "it is not the disk");
    assert!(now[disk.len()..] == old[disk.len()..], "what lies beyond the disk has changed");

    // A vault that loses a chunk in the middle leaves half of it, and says so; then it is made whole.
    let pack = world.objects("home/data").remove(0);
    let whole = fs::read(&pack).unwrap();
    damage(&pack);
    let file = fs::File::options().write(true).open(&device.0).unwrap();
    file.write_all_at(&old, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let said = export(&host, &id, &device.0, &[OVERWRITE]);
    assert!(said.must(codes::VAULT_DAMAGED.0).err.contains("neither what it was"), "{}", said.err);
    fs::write(&pack, whole).unwrap();
    host.run(&["repair", "home"]).must(0);
    export(&host, &id, &device.0, &[OVERWRITE]).must(0);
    assert!(device.bytes()[..disk.len()] == disk);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_among_the_devices_is_a_volume_that_is_not_active_and_no_file_is_made_there() {
    let (world, host, id) = scene().await;
    let name = world.path("x").parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let group = Path::new("/dev").join(format!("vmkeep-test{name}"));
    let (volume, partition) = (group.join("web1"), Path::new("/dev").join(format!("vmkeep-test{name}p1")));
    let up = world.path(&format!("../../../../../../..{}", volume.display()));
    for to in [&volume, &partition, &up] {
        for more in [&[][..], &[OVERWRITE], &["--format", "qcow2"]] {
            let said = export(&host, &id, to, more);
            assert!(said.told(codes::UNSAFE_PATH, "/dev/").err.contains("no such device"), "{}", said.err);
        }
        for more in [&[][..], &["--format", "tar"]] {
            let words = ["export", "home", &id, "--to", to.to_str().unwrap()];
            host.run(&[&words[..], more].concat()).told(codes::UNSAFE_PATH, "/dev/");
        }
        let to = to.to_str().unwrap();
        let words = ["--offline", "restore", &id, "--vault", "home", "--as", "copy", "--folder", to];
        let restored = host.vmkeep(&[], &words).stdin(Stdio::null()).output().unwrap();
        Said::of(restored).told(codes::UNSAFE_PATH, "/dev/");
        assert!(!group.exists() && !partition.exists(), "it was written into memory");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_into_the_folder_of_the_vault_that_is_read() {
    let (world, host, id) = scene().await;
    let pack = world.objects("home/data").remove(0);
    let (before, objects) = (fs::read(&pack).unwrap(), world.objects("home").len());
    let link = world.path("link");
    std::os::unix::fs::symlink(world.path("home"), &link).unwrap();
    for to in [&pack, &world.path("home/x"), &link.join("x")] {
        export(&host, &id, to, &[OVERWRITE]).told(codes::UNSAFE_PATH, to.to_str().unwrap());
        for more in [&[][..], &["--format", "tar"]] {
            let words = ["export", "home", &id, "--to", to.to_str().unwrap()];
            host.run(&[&words[..], more].concat()).must(codes::UNSAFE_PATH.0);
        }
    }
    assert!(fs::read(&pack).unwrap() == before, "a pack was written over");
    assert_eq!(world.objects("home").len(), objects, "something was put among its objects");
    host.run(&["check", "home", "--read"]).must(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_another_one_shows_or_that_is_used_by_way_of_another_is_left_alone() {
    let (world, host, id) = scene().await;
    let old = noise(8, 80 * C);
    fs::write(world.path("volume"), &old).unwrap();
    let Some(lower) = Loop::new(&world.path("volume")) else { return };
    export(&host, &id, &lower.0, &[OVERWRITE]).must(0);
    let written = lower.bytes();
    assert!(written[..disk().len()] == disk() && written != old);
    let user = |path: &Path| {
        let holder = fs::File::options().read(true).write(true).open(path).unwrap();
        Command::new("sleep").arg("1000").stdin(Stdio::from(holder)).spawn().unwrap()
    };
    let refused = |target: &Path, because: &str| {
        let said = export(&host, &id, target, &[OVERWRITE]);
        assert!(said.told(codes::IMAGE_LOCKED, "/dev/loop").err.contains(because), "{}", said.err);
    };
    // The file below it is open.
    let mut sleeper = user(&world.path("volume"));
    refused(&lower.0, "sleep");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    // Another device shows the file, or the device itself.
    let beside = Loop::new(&world.path("volume")).unwrap();
    refused(&lower.0, beside.0.file_name().unwrap().to_str().unwrap());
    drop(beside);
    let upper = Loop::new(&lower.0).unwrap();
    refused(&lower.0, upper.0.file_name().unwrap().to_str().unwrap());
    // The upper one is free as long as nobody has the lower one open.
    let mut sleeper = user(&lower.0);
    refused(&upper.0, "sleep");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(lower.bytes() == written, "what was refused has changed something");
    export(&host, &id, &upper.0, &[OVERWRITE]).must(0);
    drop((upper, lower));
    // Nothing was begun on one that lets nobody write.
    let Some(fixed) = Loop::of(&world.path("volume"), &["--read-only"]) else { return };
    let said = export(&host, &id, &fixed.0, &[OVERWRITE]);
    let said = said.told(codes::CANNOT_WRITE_TO_BACKUP_LOCATION, "/dev/loop");
    assert!(said.err.contains("read-only") && !said.err.contains("neither what it was"), "{}", said.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_becomes_one_tarball_that_tar_unpacks_byte_for_byte() {
    let (world, host, id) = scene().await;
    let file = world.path("out/web1.tar");
    let words = ["export", "home", &id, "--format", "tar", "--to", file.to_str().unwrap()];
    let written = host.json(&words);
    assert_eq!(written.as_array().unwrap().len(), 3, "{written}");
    host.run(&words).told(codes::BACKUP_EXISTS, "web1.tar");
    let to = world.path("unpacked");
    fs::create_dir(&to).unwrap();
    let unpacked = Command::new("tar").arg("-C").arg(&to).arg("-xf").arg(&file).status().unwrap();
    assert!(unpacked.success());
    crate::is_written(&to, &disk());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
    assert!(blocks * 512 < 30 * C as u64, "{blocks} blocks: what is zero takes room");
    export(&host, &id, &world.path("new"), &["--format", "tar"]).told(codes::USAGE, "vda");
}
