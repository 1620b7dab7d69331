//! A host with a booted guest, and what of both a job may not have changed when it is over.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};
use serde_json::Value;

use super::mount::Mount;
use super::{Host, assert_ticks, assert_untouched, disks, files_below, until};

pub fn small(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .disk(DiskSpec::new(64 * MIB).data(6 * MIB))
        .disk(DiskSpec::new(32 * MIB).raw().data(4 * MIB))
}

/// With enough data that a throttled copy takes long enough to be met in the middle.
pub fn large(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .disk(DiskSpec::new(128 * MIB).data(48 * MIB))
        .disk(DiskSpec::new(32 * MIB).raw().data(4 * MIB))
}

/// Definitions of a domain as libvirt prints them: the live one, whose elements change places when libvirt is
/// restarted, and the persistent one.
pub type Definitions = (Vec<String>, Vec<String>);

pub fn definitions(guest: &Guest) -> Definitions {
    let lines = |xml: String| {
        // libvirt leaves this behind where there was metadata once.
        xml.lines().filter(|line| line.trim() != "<metadata/>").map(str::to_owned).collect::<Vec<_>>()
    };
    let mut live = lines(guest.virsh("dumpxml", &[]).unwrap());
    live.sort();
    (live, lines(guest.virsh("dumpxml", &["--inactive"]).unwrap()))
}

pub fn assert_same(what: &str, now: &[String], before: &[String]) {
    let lost: Vec<_> = before.iter().filter(|line| !now.contains(line)).collect();
    let new: Vec<_> = now.iter().filter(|line| !before.contains(line)).collect();
    assert!(now == before, "{what}: lost {lost:#?}, new {new:#?}");
}

/// A guest and everything about it that a refusal must leave alone.
pub struct Bed {
    pub guest: Guest,
    pub own: BTreeMap<String, PathBuf>,
    pub definitions: Definitions,
    pub images: Vec<PathBuf>,
    pub mount: Option<Mount>,
    pub host: Host,
}

impl Bed {
    pub fn boot(spec: &GuestSpec) -> Self {
        Self::boot_on(Host::new(), None, spec)
    }

    pub fn boot_on(host: Host, mount: Option<Mount>, spec: &GuestSpec) -> Self {
        let guest = Guest::boot(&host.hypervisor, spec).unwrap();
        guest.wait_tick(5).unwrap();
        Self {
            own: disks(&guest),
            definitions: definitions(&guest),
            images: files_below(&host.hypervisor.images()),
            guest,
            mount,
            host,
        }
    }

    /// Removes the folders of backups that are being made, as somebody who tidies the target up would.
    pub fn remove_unpublished(&self) {
        let folders =
            fs::read_dir(default_root(&self.host).join(self.guest.name())).into_iter().flatten().flatten();
        let unpublished =
            folders.map(|entry| entry.path()).filter(|folder| !folder.join("manifest.json").exists());
        unpublished.for_each(|folder| drop(fs::remove_dir_all(folder)));
    }

    pub fn mount(&self) -> &Mount {
        self.mount.as_ref().unwrap()
    }

    /// Definitions to the last byte, files, and the guest's ticks.
    pub fn assert_nothing_changed(&self) {
        assert_same("the live definition", &definitions(&self.guest).0, &self.definitions.0);
        self.assert_back_home();
    }

    /// After a job that began: the persistent definition to the last byte, the guest on its own files, no leftovers.
    pub fn assert_back_home(&self) {
        assert_same("the persistent definition", &definitions(&self.guest).1, &self.definitions.1);
        assert_eq!(files_below(&self.host.hypervisor.images()), self.images, "files beside the images");
        assert_untouched(&self.guest, &self.own);
    }

    /// A refusal: with code, name, words and a remedy, without a backup, and nothing changed.
    pub fn refused(&self, args: &[&str], code: i32, words: &[&str]) {
        refused(&self.host, args, code, words);
        self.assert_nothing_changed();
        let root = default_root(&self.host);
        assert_eq!(files_below(&root), Vec::<PathBuf>::new(), "written for {args:?}");
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "folders made for {args:?}");
    }
}

pub fn refused(host: &Host, args: &[&str], code: i32, words: &[&str]) {
    let number = format!("code   {code} ");
    let mut all = vec![number.as_str(), "remedy "];
    all.extend(words);
    host.fails(args, code, &all);
}

/// How far the copy of a disk is, in bytes, as far as it has told.
pub fn copied(host: &Host, job: &str) -> u64 {
    let detail = host.json(&["job", "show", job]);
    let steps = detail["steps"].as_array().unwrap().clone();
    let copies = steps.iter().filter(|step| step["name"].as_str().unwrap().starts_with("copy/"));
    copies.filter_map(|step| step["progress"]["done"].as_u64()).sum()
}

/// Begins a backup and waits until it is in the middle of copying, the guest on its overlays.
pub fn in_the_middle(host: &Host, args: &[&str]) -> String {
    let job = host.begin(args);
    until("the copy to have begun", || {
        let row = host.job(&job);
        assert!(!row["ended"].is_string(), "it ended too early: {row:#}\n{}", host.log());
        (copied(host, &job) > MIB).then_some(())
    });
    job
}

/// Waits for the end of a job, whatever it is: its status and its code (0 without one).
pub fn ended(host: &Host, job: &str) -> (String, u64) {
    let row = host.settled(job);
    (row["status"].as_str().unwrap().to_owned(), row["fault"]["code"].as_u64().unwrap_or(0))
}

pub fn backup_of(host: &Host, job: &str) -> Value {
    let backups = host.backups();
    let found = backups.iter().find(|backup| backup["job"].as_str().is_some_and(|of| of == job));
    found.unwrap_or_else(|| panic!("no backup of {job}: {backups:#?}")).clone()
}

/// The manifest of a backup, as it lies there.
pub fn manifest_of(backup: &Value) -> Value {
    let path = Path::new(backup["folder"].as_str().unwrap()).join("manifest.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The image of a disk in a backup.
pub fn image(backup: &Value, disk: &str) -> PathBuf {
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    files_below(&folder)
        .into_iter()
        .find(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            ["qcow2", "raw"].iter().any(|format| name == format!("{disk}.{format}"))
        })
        .unwrap_or_else(|| panic!("no image of {disk} in {:?}", files_below(&folder)))
}

/// A backup that must be whole: by its manifest and by the guest's ticks. Returns the last tick in it.
pub fn judge_backup(host: &Host, backup: &Value) -> u64 {
    host.ok(&["verify", backup["id"].as_str().unwrap()]);
    let (vda, vdb) = (image(backup, "vda"), image(backup, "vdb"));
    assert_ticks(&vda, &vdb)[0].last
}

pub fn default_root(host: &Host) -> PathBuf {
    host.hypervisor.dir().join("state/vmkeep/backups")
}

/// Writes vmkeepd's configuration file.
pub fn configure(host: &Host, toml: &str) {
    let dir = folder(host, &host.hypervisor.dir().join("config/vmkeep"));
    fs::write(dir.join("vmkeep.toml"), toml).unwrap();
    give(host, &dir.join("vmkeep.toml"));
}

/// The one folder below which anything may be written, for the configuration file.
pub fn root_is(folder: &Path) -> String {
    format!("[targets]\nroots = [{folder:?}]\n")
}

/// A folder of the hypervisor's user.
pub fn folder(host: &Host, path: &Path) -> PathBuf {
    fs::create_dir_all(path).unwrap();
    give(host, path);
    path.to_owned()
}

/// A file of the hypervisor's user.
pub fn give(host: &Host, path: &Path) {
    if rustix::process::geteuid().is_root() {
        let user = host.hypervisor.user();
        chown(path, Some(user.uid), Some(user.gid)).unwrap();
    }
}

pub fn define(host: &Host, xml: &str) {
    let file = host.hypervisor.dir().join("state/definition.xml");
    fs::write(&file, xml).unwrap();
    give(host, &file);
    host.hypervisor.virsh(["define", "--file", file.to_str().unwrap()]).unwrap();
}
