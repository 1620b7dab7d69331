//! What must hold when a job is over, however it ended; and vmkeepd made to die at a certain event of one.

use std::path::PathBuf;

use serde_json::Value;

use super::bed::{Bed, default_root, judge_backup};
use super::{about, assert_ticks, assert_untouched, files_below};

impl Bed {
    /// After a backup has ended: the guest runs on its own images by everybody's account with all that it has flushed;
    /// nothing of the job is left; a job that succeeded has a backup that holds one point in time, one that did not
    /// has none and says why; and the journal replays. The backup is removed.
    pub fn judge(&self, case: &str, row: &Value) {
        let job = row["id"].as_str().unwrap();
        println!("{case}: {}", row["status"]);
        assert!(row["ended"].is_string(), "{case}: {row:#}\n{}", self.host.story(job));
        assert_untouched(&self.guest, &self.own);
        self.host.ok(&["replay", job]);
        let backups = self.host.backups();
        let ours = backups.iter().find(|backup| backup["job"] == row["id"]);
        match ours {
            Some(backup) => {
                assert_eq!(row["status"], "succeeded", "{case}: a failed job has a backup");
                judge_backup(&self.host, backup);
                std::fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
            }
            // Somebody wished it.
            None if row["status"] == "cancelled" => {}
            None => {
                assert_ne!(row["status"], "succeeded", "{case}: no backup\n{row:#}");
                let fault = &row["fault"];
                assert!(fault["code"].is_u64(), "{case}: it failed without a code: {row:#}");
                for word in ["cause", "remedy"] {
                    assert!(!fault[word].as_str().unwrap_or_default().is_empty(), "{case}: {row:#}");
                }
            }
        }
        let left = files_below(&default_root(&self.host));
        assert!(left.is_empty(), "{case}: left of the job: {left:?}");
    }

    /// Ends the guest and reads its disks: every tick that it printed was on both of them before.
    pub fn judge_disks(&self) {
        let printed = self.guest.last_tick();
        self.guest.destroy().unwrap();
        for report in assert_ticks(&self.own["vda"], &self.own["vdb"]) {
            assert!(report.last + 1 >= printed, "tick {printed} was printed; {report:?}");
        }
    }

    /// Where libvirt keeps what it believes of the running domain, and its persistent definition.
    pub fn files_of_libvirt(&self) -> Vec<PathBuf> {
        let name = format!("{}.xml", self.guest.name());
        [("run/libvirt/qemu/run", &name), ("config/libvirt/qemu", &name)]
            .map(|(folder, name)| self.host.hypervisor.dir().join(folder).join(name))
            .to_vec()
    }

    /// The history of a backup that nobody disturbs.
    pub fn undisturbed(&self, args: &[&str]) -> Vec<Value> {
        let daemon = self.host.daemon();
        let job = self.host.begin(args);
        let row = self.host.at_rest(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        let history = self.host.history(&job);
        self.judge("undisturbed", &row);
        daemon.end();
        history
    }

    /// Lets vmkeepd die right before or after the journal gets a certain event of a new backup, of which `clean` is the
    /// undisturbed history.
    pub fn die_at(&self, clean: &[Value], side: &str, kind: &str, step: &str, args: &[&str]) {
        let at = clean.iter().position(|row| about(row, kind, step));
        let at = at.unwrap_or_else(|| panic!("no {kind} {step}"));
        let mut doomed = self.host.daemon_that_dies(Some(&format!("append/{side}/snapshot/{}", at + 1)));
        self.host.until_ready();
        let mut all = args.to_vec();
        all.push("--no-wait");
        let _ = self.host.vmkeep(&all);
        doomed.dies_or(|| false);
    }

    /// The newest backup job.
    pub fn newest(&self) -> String {
        let jobs = self.host.json(&["jobs", "--workflow", "snapshot", "--limit", "1"]);
        jobs[0]["id"].as_str().unwrap_or_else(|| panic!("{jobs:#}")).to_owned()
    }
}
