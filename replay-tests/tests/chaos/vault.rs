//! What must hold of the vault, and of whoever works with it, when a job is over; and its operator, who lets old backups go.

use std::path::Path;

use crate::Chaos;
use crate::orders::{Order, VAULT};
use crate::support::bed::{configure, folder};
use crate::support::{Host, assert_ticks, files_below};

/// So many backups stay.
const KEPT: usize = 4;

/// An encrypted vault, whose definitions are trusted.
pub fn make(host: &Host, at: &Path) {
    let state = host.hypervisor.dir().join("state");
    let (url, key) = (folder(host, at).display().to_string(), state.join("vault.key").display().to_string());
    configure(host, &format!("[vaults.{VAULT}]\nurl = \"file://{url}\"\nkey_file = \"{key}\"\n"));
    host.ok(&["vault", "init", VAULT, "--recovery-file", state.join("words").to_str().unwrap()]);
}

/// A backup's disks, written out by the vault, hold one instant; the last tick that both have.
pub fn judge_backup(host: &Host, id: &str) -> u64 {
    let to = folder(host, &host.hypervisor.dir().join("state/exports")).join(id);
    host.ok(&["vault", "export", VAULT, id, "--to", to.to_str().unwrap()]);
    let files = files_below(&to);
    let disk = |name: &str| files.iter().find(|path| path.to_string_lossy().contains(name)).unwrap();
    let reports = assert_ticks(disk("vda"), disk("vdb"));
    std::fs::remove_dir_all(to).unwrap();
    reports[0].last
}

impl Chaos {
    /// The backups that were promised are listed and whole, no other is, and libvirt has no job.
    pub fn vault(&self, case: &str, order: &Order, succeeded: bool) {
        let (host, guest) = (&self.bed.host, &self.bed.guest);
        let listed = host.json(&["vault", "list", VAULT])["backups"].clone();
        let mut listed: Vec<_> =
            listed.as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect();
        listed.sort();
        assert_eq!(listed, self.expected.vaulted.keys().cloned().collect::<Vec<_>>(), "{case}: in the vault");
        host.ok(&["vault", "check", VAULT]);
        assert!(guest.virsh("domjobinfo", &[]).unwrap().contains("None"), "{case}: a job is left");
        if succeeded && matches!(order, Order::Backup(_)) {
            self.checkpoints(case);
        }
    }

    /// Each checkpoint is that of a backup. One of a job whose guest was gone when it ended waits for the next backup.
    fn checkpoints(&self, case: &str) {
        let names = self.bed.guest.virsh("checkpoint-list", &["--name"]).unwrap();
        for checkpoint in names.split_whitespace() {
            let made_with = checkpoint.rsplit('-').next().unwrap();
            let is_known = self.expected.vaulted.contains_key(made_with);
            assert!(is_known, "{case}: checkpoint {checkpoint} of no backup");
        }
    }

    /// The oldest backups go, and their bytes with them. A collection would wait for a day for the leases of those who have died
    /// or could not say that they had ended; their operator knows better.
    pub fn thin_out(&mut self) {
        let host = &self.bed.host;
        if self.expected.vaulted.len() > KEPT {
            for lease in host.json(&["vault", "leases", VAULT]).as_array().unwrap() {
                host.ok(&["vault", "revoke", VAULT, lease["id"].as_str().unwrap()]);
            }
        }
        while self.expected.vaulted.len() > KEPT {
            let (oldest, _) = self.expected.vaulted.pop_first().unwrap();
            host.ok(&["vault", "prune", VAULT, &oldest]);
            host.ok(&["vault", "gc", VAULT]);
        }
    }

    /// Each backup is whole to the last byte, and holds what it held when it was made.
    pub fn vault_at_last(&self) {
        let host = &self.bed.host;
        host.ok(&["backup", "web1"]);
        let listed = host.json(&["vault", "list", VAULT])["backups"].as_array().unwrap().len();
        assert_eq!(listed, self.expected.vaulted.len() + 1);
        host.ok(&["vault", "verify", VAULT]);
        for (id, has) in &self.expected.vaulted {
            assert_eq!(judge_backup(host, id), *has, "{id}");
        }
    }
}
