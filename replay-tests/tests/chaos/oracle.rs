//! What must hold when a job is over, whatever was done to it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use replay_tests::testbed::Format;
use serde_json::Value;

use crate::orders::{COPY, Order};
use crate::support::bed::{Bed, default_root, judge_backup};
use crate::support::{assert_ticks, disks, files_below};
use crate::{Chaos, Disks};

/// What was promised so far.
#[derive(Debug)]
pub struct Expected {
    /// The disks of the machine in place.
    pub present: Disks,
    /// So many ticks were printed when it took its place.
    since: usize,
    /// The job that keeps a machine aside, and that machine's disks.
    pub kept: BTreeMap<String, Disks>,
    /// Whole backups, with their folders.
    pub backups: BTreeMap<String, PathBuf>,
    /// Backups in the vault, with a tick that they have.
    pub vaulted: BTreeMap<String, u64>,
    /// Files beside the disks.
    images: Vec<PathBuf>,
}

impl Expected {
    pub fn at_first(bed: &Bed) -> Self {
        Self {
            present: bed.own.clone(),
            since: 0,
            kept: BTreeMap::new(),
            backups: BTreeMap::new(),
            vaulted: BTreeMap::new(),
            images: bed.images.clone(),
        }
    }
}

impl Chaos {
    /// After a job has ended, however it did.
    pub fn judge(&mut self, case: &str, order: &Order, row: &Value) {
        let job = row["id"].as_str().unwrap().to_owned();
        println!("  {}", row["status"].as_str().unwrap());
        self.bed.host.ok(&["replay", &job]);
        let succeeded = row["status"] == "succeeded";
        self.reasons(case, row);
        if succeeded {
            self.promised(order, &job);
        }
        self.machine(case);
        self.shelf(case, order, succeeded);
        self.vault(case, order, succeeded);
        self.nothing_about(case);
    }

    /// Nothing fails in silence.
    fn reasons(&self, case: &str, row: &Value) {
        if row["status"] == "succeeded" || row["status"] == "cancelled" {
            return;
        }
        let fault = &row["fault"];
        assert!(
            fault["code"].as_u64().is_some_and(|code| code > 1),
            "{case}: it failed without a code: {row:#}"
        );
        for word in ["cause", "remedy"] {
            assert!(!fault[word].as_str().unwrap_or_default().is_empty(), "{case}: {row:#}");
        }
    }

    /// What a job that succeeded has promised.
    fn promised(&mut self, order: &Order, job: &str) {
        let (host, expected) = (&self.bed.host, &mut self.expected);
        match order {
            Order::Snapshot(_) => {
                let backups = host.backups();
                let ours = backups.iter().find(|backup| backup["job"] == job);
                let ours = ours.unwrap_or_else(|| panic!("no backup\n{}", host.story(job)));
                judge_backup(host, ours);
                let [id, folder] = ["id", "folder"].map(|field| ours[field].as_str().unwrap().to_owned());
                expected.backups.insert(id, folder.into());
            }
            Order::Restore { .. } | Order::Fetch(_) => {
                let hypervisor = &host.hypervisor;
                let _ = hypervisor.virsh(["destroy", "--domain", COPY]);
                let disks = hypervisor.disk_files_in_inactive_xml(COPY).unwrap();
                assert_ticks(&disks["vda"], &disks["vdb"]);
                hypervisor.virsh(["undefine", "--domain", COPY, "--nvram"]).unwrap();
                std::fs::remove_dir_all(disks["vda"].parent().unwrap()).unwrap();
            }
            Order::InPlace { .. } | Order::Undo(_) => {
                let now = disks(&self.bed.guest);
                let before = std::mem::replace(&mut expected.present, now);
                let same: Vec<_> =
                    before.iter().filter(|(disk, path)| expected.present[*disk] == **path).collect();
                assert!(same.is_empty(), "not exchanged: {same:?}\n{}", host.story(job));
                // The machine that was there is whole.
                assert_ticks(&before["vda"], &before["vdb"]);
                expected.kept = [(job.to_owned(), before)].into();
                expected.since = self.bed.guest.console().ticks().len();
            }
            Order::Discard(kept) => {
                for path in expected.kept.remove(kept).unwrap().into_values() {
                    assert!(!path.exists(), "{} is left", path.display());
                }
            }
            Order::Delete(id) => {
                let folder = expected.backups.remove(id).unwrap();
                assert!(!folder.exists(), "{} is left", folder.display());
            }
            Order::Verify(_) => {}
            Order::Backup(_) => {
                let id = job.replace('-', "");
                let has = crate::vault::judge_backup(host, &id);
                expected.vaulted.insert(id, has);
            }
        }
    }

    /// The guest runs on its own images by everybody's account with all that it has flushed, and what is kept is there.
    fn machine(&self, case: &str) {
        let (host, guest, expected) = (&self.bed.host, &self.bed.guest, &self.expected);
        let hypervisor = &host.hypervisor;
        guest.wait_more(3).unwrap_or_else(|e| panic!("{case}: {e}\n{}", host.log()));
        let qemu = hypervisor.disk_files_in_qemu(guest.uuid()).unwrap();
        let qemu: Disks = qemu.into_iter().map(|(disk, at)| (disk, at.file)).collect();
        assert_eq!(qemu, expected.present, "{case}: the files that QEMU writes to");
        let live = hypervisor.disk_files_in_live_xml(guest.uuid()).unwrap();
        assert_eq!(live, expected.present, "{case}: the live definition");
        assert_eq!(disks(guest), expected.present, "{case}: the persistent definition");
        for which in [&[][..], &["--inactive"]] {
            let xml = guest.virsh("dumpxml", which).unwrap();
            assert!(!xml.contains("<vmkeep:"), "{case}: a marker is left in the definition ({which:?})");
        }
        let lost = guest.console().lost_since(expected.since);
        assert!(lost.is_empty(), "{case}: flushed writes were lost: {lost:?}");
        let kept = host.json(&["status"])["kept"].clone();
        let kept: Vec<_> =
            kept.as_array().unwrap().iter().map(|kept| kept["job"].as_str().unwrap()).collect();
        assert_eq!(kept, expected.kept.keys().collect::<Vec<_>>(), "{case}: what is kept aside");
    }

    /// The backups that were promised are listed and nothing else is, and nothing else lies about there.
    fn shelf(&mut self, case: &str, order: &Order, succeeded: bool) {
        let listed = self.bed.host.backups();
        let listed: Vec<_> = listed.iter().map(|backup| backup["id"].as_str().unwrap()).collect();
        if let (Order::Delete(id), false) = (order, succeeded)
            && !listed.contains(&id.as_str())
        {
            // Withdrawn, and not removed whole: it says so, and is nobody's backup any more.
            self.expected.backups.remove(id);
        }
        let mut listed: Vec<_> = listed.into_iter().map(str::to_owned).collect();
        listed.sort();
        assert_eq!(listed, self.expected.backups.keys().cloned().collect::<Vec<_>>(), "{case}: the backups");
        let known = |path: &PathBuf| self.expected.backups.values().any(|folder| path.starts_with(folder));
        let left: Vec<_> =
            files_below(&default_root(&self.bed.host)).into_iter().filter(|path| !known(path)).collect();
        if std::mem::take(&mut self.harm.was_lost) {
            // What a job could not reach it could not remove.
            self.bed.remove_unpublished();
        } else {
            assert!(left.is_empty(), "{case}: left of the job: {left:?}");
        }
    }

    /// Neither a domain nor a file of anybody's that was not there before.
    fn nothing_about(&self, case: &str) {
        let (host, expected) = (&self.bed.host, &self.expected);
        assert_eq!(host.hypervisor.domains().unwrap(), ["web1"], "{case}");
        let machines = || expected.kept.values().chain([&expected.present]).flat_map(BTreeMap::values);
        let known: Vec<_> = machines().chain(&expected.images).collect();
        assert!(machines().all(|path| path.exists()), "{case}: a disk is gone: {expected:?}");
        let places = [host.hypervisor.images(), host.restored()];
        let mut left: Vec<_> = places.iter().flat_map(|place| files_below(place)).collect();
        left.retain(|path| !known.contains(&path) && !path.starts_with(host.restored().join("kept")));
        assert!(left.is_empty(), "{case}: left beside the images: {left:?}");
    }

    /// When it is all over: each backup is whole to the last byte, and the disks hold every tick that was printed.
    pub fn judge_at_last(&mut self) {
        for backup in self.bed.host.backups() {
            judge_backup(&self.bed.host, &backup);
        }
        self.vault_at_last();
        self.bed.host.ok(&["audit", "verify"]);
        self.daemon = None;
        let printed = self.bed.guest.last_tick();
        self.bed.guest.destroy().unwrap();
        let present = &self.expected.present;
        for report in assert_ticks(&present["vda"], &present["vdb"]) {
            assert!(report.last + 1 >= printed, "tick {printed} was printed; {report:?}");
        }
        for disks in self.expected.kept.values() {
            assert_ticks(&disks["vda"], &disks["vdb"]);
        }
        for (disk, image) in present {
            let format = Format::probe(image).unwrap();
            let checked = std::process::Command::new("qemu-img")
                .args(["check", "-q", "-f"])
                .arg(format.name())
                .arg(image)
                .status()
                .unwrap();
            // 3: clusters that nobody uses, as a kill leaves; 63: the format has nothing to check.
            assert!(matches!(checked.code(), Some(0 | 3 | 63)), "{disk}: {checked}");
        }
    }
}
