//! Backups in a vault, restored to new domains that boot: on the host that made them, while vmkeepd dies at every event, and on
//! another one that has nothing but the vault and its key.

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use replay_tests::testbed::{Guest, GuestSpec, TickReport};
use serde_json::Value;

use crate::killed::at_every_boundary;
use crate::support::bed::{Bed, configure, folder, give, refused, small};
use crate::support::{Host, assert_ticks, disks, files_below};

/// An encrypted vault, and the key to it.
pub(crate) struct Sealed {
    pub(crate) vault: PathBuf,
    pub(crate) key: PathBuf,
}

impl Sealed {
    /// Makes it with a key file of its own; the 24 words come back from a file, as they do for whoever sets hosts up.
    fn make(host: &Host) -> Self {
        let state = folder(host, &host.hypervisor.dir().join("state"));
        let this = Self { vault: folder(host, &state.join("vault")), key: state.join("vault.key") };
        this.configure(host);
        let words = state.join("words");
        host.ok(&["vault", "init", "main", "--recovery-file", words.to_str().unwrap()]);
        assert_eq!(fs::read_to_string(&words).unwrap().split_whitespace().count(), 24);
        this
    }

    /// Lets a host know of it.
    fn configure(&self, host: &Host) {
        let (url, key) = (self.vault.display(), self.key.display());
        configure(host, &format!("[vaults.main]\nurl = \"file://{url}\"\nkey_file = \"{key}\"\n"));
    }
}

pub(crate) fn bed(spec: &GuestSpec) -> (Bed, Sealed) {
    let host = Host::new();
    let sealed = Sealed::make(&host);
    (Bed::boot_on(host, None, spec), sealed)
}

/// Backs the guest up; the backup's id, and a tick that its disks have.
pub(crate) fn back_up(bed: &Bed) -> (String, u64) {
    bed.guest.wait_tick(10).unwrap();
    let tick = bed.guest.last_tick();
    let job = bed.host.begin(&["backup", "web1"]);
    let row = bed.host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{}", bed.host.story(&job));
    (row["id"].as_str().unwrap().to_owned(), tick)
}

/// The restored domain boots on its own images, and every tick of the original up to this one is whole on both disks.
fn judge(host: &Host, name: &str, tick: u64, format: &str) {
    let copy = Guest::attach(&host.hypervisor, name).unwrap();
    copy.wait_tick(tick + 5).unwrap();
    let reports = judge_disks(host, &copy, tick + 5, format);
    assert_eq!(reports[0].boots.len(), 2, "the original's boot, and its own: {reports:?}");
}

/// The restored domain runs on its own images, and every tick up to this one is whole on both disks. It is off then.
fn judge_disks(host: &Host, copy: &Guest, tick: u64, format: &str) -> [TickReport; 2] {
    assert_eq!(copy.state().unwrap().state, "running");
    copy.destroy().unwrap();
    let of_copy = disks(copy);
    for path in of_copy.values() {
        assert!(path.starts_with(host.restored()), "{}", path.display());
        assert_eq!(replay_tests::testbed::image_info(path).unwrap().format, format);
    }
    let reports = assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
    assert!(reports.iter().all(|report| report.last >= tick), "{reports:?}");
    reports
}

pub(crate) fn nobody_reads(host: &Host) {
    let leases = host.json(&["vault", "leases", "main"]);
    assert_eq!(leases, Value::Array(Vec::new()), "somebody still uses the vault");
}

#[test]
fn a_backup_in_an_encrypted_vault_becomes_a_new_domain_that_boots_with_every_tick() {
    let (bed, sealed) = bed(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    let (id, tick) = back_up(&bed);
    // By the end of its id, as lists show it.
    let short = &id[id.len() - 8..];
    let told = host.ok(&["restore", short, "--vault", "main", "--as", "copy", "--start"]);
    assert!(told.contains("as after a power cut"), "{told}");
    judge(host, "copy", tick, "raw");
    let args = ["restore", &id, "--vault", "main", "--as", "other", "--format", "qcow2", "--start"];
    host.ok(&args);
    judge(host, "other", tick, "qcow2");
    nobody_reads(host);
    bed.assert_back_home();

    // What cannot be is said before anything is made.
    let before = files_below(&host.restored());
    let refuses = |args: &[&str], code: i32, words: &[&str]| {
        refused(host, &[&["restore"], args].concat(), code, words);
        assert_eq!(files_below(&host.restored()), before, "{args:?}");
    };
    refuses(&[short, "--vault", "main", "--as", "web1"], 111, &["DOMAIN_EXISTS", "web1"]);
    refuses(&["ffffffff", "--vault", "main", "--as", "new"], 109, &["NO_SUCH_BACKUP", "vmkeep vault list"]);
    refuses(&[short, "--vault", "other", "--as", "new"], 32, &["vaults.NAME"]);
    refuses(&[short, "--vault", "main", "--in-place"], 64, &["vmkeep vault export main"]);
    let disk = format!("vda={}", sealed.key.display());
    refuses(&[short, "--vault", "main", "--as", "new", "--disk", &disk], 105, &["TARGET_OUTSIDE_ROOTS"]);
    host.ok(&["vault", "prune", "main", &id, "--last"]);
    refuses(&[short, "--vault", "main", "--as", "new"], 206, &["BACKUP_NOT_SURE", "--unchecked"]);
    host.ok(&["restore", short, "--vault", "main", "--as", "last chance", "--unchecked"]);
    daemon.end();
}

#[test]
fn a_chunk_that_the_vault_has_lost_fails_the_restore_by_disk_and_bytes_and_leaves_nothing() {
    let (bed, sealed) = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let (id, tick) = back_up(&bed);
    let packs = files_below(&sealed.vault.join("data"));
    let whole: Vec<Vec<u8>> = packs.iter().map(|pack| fs::read(pack).unwrap()).collect();
    for (pack, bytes) in packs.iter().zip(&whole) {
        let file = fs::File::options().write(true).open(pack).unwrap();
        let middle = bytes.len() / 2;
        file.write_all_at(&[bytes[middle] ^ 1], middle as u64).unwrap();
    }
    let args = ["restore", &id, "--vault", "main", "--as", "copy", "--start"];
    refused(host, &args, 203, &["VAULT_DAMAGED", "disk vd", "bytes ", "vmkeep vault check main"]);
    assert_eq!(host.jobs()[0]["status"], "rolled_back");
    assert_eq!(files_below(&host.restored()), Vec::<PathBuf>::new());
    assert_eq!(host.hypervisor.domains().unwrap(), ["web1"]);
    bed.assert_back_home();
    // Once a check has found it, it is known beforehand.
    let said = host.fails(&["vault", "check", "main"], 203, &["HURT"]);
    let hurt = said.lines().find_map(|line| line.trim_start().split_once(": bytes ")).expect(&said);
    assert!(["vda", "vdb"].contains(&hurt.0), "{said}");
    let lost = format!("of {} bytes {}", hurt.0, hurt.1.split([',', ' ']).next().unwrap());
    refused(host, &args, 203, &["VAULT_DAMAGED", &lost, "vmkeep vault repair main"]);
    assert_eq!(host.jobs()[0]["status"], "refused");
    // The storage gives its bytes back, and the vault is healed with them.
    packs.iter().zip(&whole).for_each(|(pack, bytes)| fs::write(pack, bytes).unwrap());
    host.ok(&["vault", "repair", "main"]);
    host.ok(&args);
    judge(host, "copy", tick, "raw");
}

fn restore_killed(side: &str) {
    let (bed, _sealed) = bed(&small("web1"));
    let host = &bed.host;
    let (id, tick) = {
        let daemon = host.daemon();
        let made = back_up(&bed);
        daemon.end();
        made
    };
    let place = host.restored().join("copy");
    let args = ["restore", &id, "--vault", "main", "--as", "copy", "--start"];
    at_every_boundary(side, "restore-vault", host, &args, |case, row| {
        println!("{case}: {}", row["status"]);
        bed.assert_back_home();
        let there = host.hypervisor.domains().unwrap().contains(&"copy".to_owned());
        if row["status"] == "succeeded" {
            assert!(there, "{case}: the new domain is not there");
            // That it boots is shown elsewhere: dozens of boots would take longer than all else.
            let copy = Guest::attach(&host.hypervisor, "copy").unwrap();
            judge_disks(host, &copy, tick, "raw");
            let hidden = |path: &&PathBuf| path.to_string_lossy().contains("/.vmkeep-");
            assert_eq!(files_below(&place).iter().find(hidden), None, "{case}");
            copy.virsh("undefine", &[]).unwrap();
            fs::remove_dir_all(&place).unwrap();
        } else {
            assert!(!there, "{case}: the new domain is left");
            assert_eq!(files_below(&place), Vec::<PathBuf>::new(), "{case}");
        }
    });
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_restore_from_a_vault_ends_whole() {
    restore_killed("before");
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_restore_from_a_vault_ends_whole() {
    restore_killed("after");
}

/// Copies a folder to another host, whose user it becomes.
pub(crate) fn carry(host: &Host, from: &Path, to: &Path) {
    folder(host, to);
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (at, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            carry(host, &at, &target);
        } else {
            fs::copy(&at, &target).unwrap();
            give(host, &target);
        }
    }
}

/// The folder of the consoles of a host that is gone, on another one.
pub(crate) struct Consoles(PathBuf);

impl Consoles {
    fn make(host: &Host, gone: PathBuf) -> Self {
        assert!(!gone.exists(), "the old host is still there");
        folder(host, &gone);
        folder(host, &gone.join("serial"));
        Self(gone)
    }
}

impl Drop for Consoles {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The host of a bed is lost; another one has the vault, its key, and the folder that consoles go to.
pub(crate) fn move_out(bed: Bed, sealed: &Sealed) -> (Host, Sealed, Consoles) {
    // All that vmkeepd knew is gone, and so is the host.
    fs::remove_dir_all(bed.host.hypervisor.dir().join("state/vmkeep")).unwrap();
    let other = Host::new();
    let state = folder(&other, &other.hypervisor.dir().join("state"));
    let here = Sealed { vault: state.join("vault"), key: state.join("vault.key") };
    carry(&other, &sealed.vault, &here.vault);
    fs::copy(&sealed.key, &here.key).unwrap();
    fs::set_permissions(&here.key, fs::Permissions::from_mode(0o600)).unwrap();
    give(&other, &here.key);
    // The domain's console goes into a file, and QEMU makes no folders: whoever sets the new host up does.
    let gone = bed.host.hypervisor.dir().to_owned();
    drop(bed);
    let consoles = Consoles::make(&other, gone);
    (other, here, consoles)
}

#[test]
fn a_host_that_has_nothing_but_the_vault_and_its_key_brings_the_domain_back() {
    let (bed, sealed) = bed(&small("web1"));
    let daemon = bed.host.daemon();
    let (id, tick) = back_up(&bed);
    daemon.end();
    let (other, here, _consoles) = move_out(bed, &sealed);

    here.configure(&other);
    let listed = other.json(&["vault", "list", "main"]);
    let found = listed.to_string();
    assert!(found.contains(&id.replace('-', "")) && found.contains("web1"), "{listed:#}");
    other.ok(&["vault", "check", "main", "--read"]);
    let _daemon = other.daemon();
    assert_eq!(other.hypervisor.domains().unwrap(), Vec::<String>::new());
    other.ok(&["restore", &id, "--vault", "main", "--as", "web1", "--start"]);
    judge(&other, "web1", tick, "raw");
    let job: &Value = &other.jobs()[0];
    assert_eq!((&job["workflow"], &job["status"]), (&"restore-vault".into(), &"succeeded".into()));
    other.ok(&["replay", job["id"].as_str().unwrap()]);
    nobody_reads(&other);
}
