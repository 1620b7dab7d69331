//! A restore in place, and its undo, with everybody killed at every event: vmkeepd, QEMU, libvirtd, the whole host; and
//! with somebody who starts the domain in between. At every instant the persistent definition names the disks of the
//! old machine or those of the new one, all of them; and in the end one of the two runs, whole, and the other is kept.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};
use rustix::process::Signal;
use serde_json::Value;

use crate::killed::at_every_boundary;
use crate::support::bed::{Bed, judge_backup};
use crate::support::renames::{Act, Renames};
use crate::support::{assert_ticks, disks, files_below, until};

type Disks = BTreeMap<String, PathBuf>;

fn tiny() -> GuestSpec {
    GuestSpec::new("web1")
        .memory_mib(96)
        .disk(DiskSpec::new(32 * MIB).data(2 * MIB))
        .disk(DiskSpec::new(16 * MIB).raw().data(MIB))
}

/// A running guest, and the machines that have ever been in its place.
struct Stage {
    bed: Bed,
    id: String,
    present: RefCell<Disks>,
}

impl Stage {
    fn new() -> Self {
        let bed = Bed::boot(&tiny());
        let daemon = bed.host.daemon();
        bed.host.ok(&["snapshot", "web1"]);
        let backup = bed.host.backups().remove(0);
        judge_backup(&bed.host, &backup);
        daemon.end();
        Self { present: RefCell::new(bed.own.clone()), id: backup["id"].as_str().unwrap().to_owned(), bed }
    }

    /// What must hold at every instant: the definition names all disks of one machine, and they are all there.
    fn never_a_mixture(&self, case: &str) -> Disks {
        let (now, present) = (disks(&self.bed.guest), self.present.borrow());
        let old = now.iter().filter(|(disk, path)| present[*disk] == **path).count();
        assert!(old == 0 || old == now.len(), "{case}: a mixture: {now:?} of {present:?}");
        for path in now.values().chain(present.values()) {
            assert!(path.exists(), "{case}: {} is gone", path.display());
        }
        now
    }

    /// After a job has ended, however it did. Whatever is kept aside is discarded, so that the next case begins anew.
    fn judge(&self, case: &str, row: &Value) {
        let (host, guest) = (&self.bed.host, &self.bed.guest);
        println!("{case}: {}", row["status"]);
        let now = self.never_a_mixture(case);
        let present = self.present.borrow().clone();
        assert_eq!(now != present, row["status"] == "succeeded", "{case}: {row:#}\n{}", host.log());
        let state = guest.state().unwrap();
        assert_eq!(state.state, "running", "{case}: {state:?}\n{}", host.log());
        guest.wait_more(3).unwrap_or_else(|e| panic!("{case}: {e}\n{}", host.log()));
        let qemu = host.hypervisor.disk_files_in_qemu(guest.uuid()).unwrap();
        let qemu: Disks = qemu.into_iter().map(|(disk, at)| (disk, at.file)).collect();
        assert_eq!(qemu, now, "{case}: the files that QEMU writes to");
        let xml = guest.virsh("dumpxml", &["--inactive"]).unwrap() + &guest.virsh("dumpxml", &[]).unwrap();
        assert!(!xml.contains("<vmkeep:"), "{case}: a marker is left");
        let kept = host.json(&["status"])["kept"].as_array().unwrap().clone();
        if row["status"] == "succeeded" {
            // The old machine is whole.
            assert_ticks(&present["vda"], &present["vdb"]);
            assert_eq!(kept.len(), 1, "{case}: {kept:#?}");
            assert_eq!(kept[0]["job"], row["id"], "{case}");
        } else {
            assert!(row["fault"]["code"].as_u64().is_some_and(|code| code > 1), "{case}: {row:#}");
            assert_eq!(kept, Vec::<Value>::new(), "{case}");
        }
        for kept in kept {
            let job = host.begin(&["restore", "--discard", kept["job"].as_str().unwrap()]);
            assert_eq!(host.settled(&job)["status"], "succeeded", "{case}");
        }
        let left = files_below(&host.restored().join("kept"));
        assert_eq!(left, Vec::<PathBuf>::new(), "{case}: left of what was kept");
        let images: Vec<PathBuf> = now.values().cloned().collect();
        let stray: Vec<_> = files_below(&host.hypervisor.images())
            .into_iter()
            .filter(|path| {
                path.to_string_lossy().contains("restored-") || path.to_string_lossy().contains(".vmkeep-")
            })
            .filter(|path| !images.contains(path))
            .collect();
        assert_eq!(stray, Vec::<PathBuf>::new(), "{case}: left beside the images");
        *self.present.borrow_mut() = now;
    }
}

fn killed(side: &str, more: &[&str]) {
    let stage = Stage::new();
    let mut args = vec!["restore", stage.id.as_str(), "--in-place"];
    args.extend(more);
    let judge = |case: &str, row: &Value| stage.judge(case, row);
    at_every_boundary(side, "restore-in-place", &stage.bed.host, &args, judge);
}

#[test]
fn vmkeepd_killed_before_every_event_of_a_restore_in_place_ends_whole() {
    killed("before", &[]);
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_restore_in_place_ends_whole() {
    killed("after", &["--save-old"]);
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_cold_restore_in_place_ends_whole() {
    killed("after", &["--cold", "--destroy", "--shutdown-time", "1s"]);
}

/// What happens while vmkeepd is dead.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    /// Somebody starts the domain.
    Started,
    /// QEMU is killed.
    Qemu,
    /// The host reboots: all of vmkeepd, libvirtd and QEMU end at once, and autostart is faster than vmkeepd.
    Reboot,
}

impl Meanwhile {
    fn happens(self, bed: &Bed) {
        let hypervisor = &bed.host.hypervisor;
        if matches!(self, Self::Qemu | Self::Reboot) {
            let libvirtd = hypervisor.libvirtd();
            if let (Self::Reboot, Some(libvirtd)) = (self, libvirtd) {
                libvirtd.signal(Signal::KILL);
                libvirtd.wait_gone(Duration::from_secs(20)).unwrap();
            }
            let _ = hypervisor.kill_qemu(bed.guest.name());
            if matches!(self, Self::Reboot) {
                hypervisor.start_libvirtd().unwrap();
            }
            until("the domain to be off", || {
                bed.guest.state().is_ok_and(|state| state.state == "shut off").then_some(())
            });
        }
        if matches!(self, Self::Started | Self::Reboot) {
            // Refused where it runs already.
            let _ = bed.guest.virsh("start", &[]);
        }
    }
}

/// vmkeepd dies after an event, something happens, and vmkeepd comes back: for every event. The domain was running, so
/// it runs in the end: whoever ended it, and whichever machine it is.
fn meanwhile(what: Meanwhile, more: &[&str]) {
    let stage = Stage::new();
    let (bed, host) = (&stage.bed, &stage.bed.host);
    let mut args = vec!["restore", stage.id.as_str(), "--in-place"];
    args.extend(more);
    let events = {
        let daemon = host.daemon();
        let job = host.begin(&args);
        let row = host.settled(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        let events = host.history(&job);
        stage.judge("undisturbed", &row);
        daemon.end();
        events
    };
    let mut all = args.clone();
    all.push("--no-wait");
    let mut ends = BTreeMap::<String, usize>::new();
    for seq in 2..=events.len() {
        let body = &events[seq - 1]["event"]["body"];
        let case = format!("{what:?} after event {seq}, {} {}", body["type"], body["data"]["step"]);
        let mut doomed = host.daemon_that_dies(Some(&format!("append/after/restore-in-place/{seq}")));
        until("vmkeepd to be ready", || host.ready().then_some(()));
        let _ = host.vmkeep(&all);
        doomed.dies_or(|| {
            let jobs = host.vmkeep(&["--json", "jobs", "--workflow", "restore-in-place", "--limit", "1"]);
            let jobs: Value = serde_json::from_slice(&jobs.stdout).unwrap_or_default();
            jobs[0]["ended"].is_string()
        });
        drop(doomed);
        stage.never_a_mixture(&case);
        what.happens(bed);
        stage.never_a_mixture(&case);
        let daemon = host.daemon();
        let jobs = host.json(&["jobs", "--workflow", "restore-in-place", "--limit", "1"]);
        let job = jobs[0]["id"].as_str().unwrap().to_owned();
        let row = bed.at_rest(&job);
        assert!(
            row["ended"].is_string(),
            "{case}: {row:#}\n{}\n{}",
            host.ok(&["job", "explain", &job]),
            host.log()
        );
        host.ok(&["replay", &job]);
        *ends.entry(row["status"].as_str().unwrap().to_owned()).or_default() += 1;
        if matches!(what, Meanwhile::Qemu) && bed.guest.state().unwrap().state == "shut off" {
            // It was killed while it was the old machine's, before the job had asked anything of it, or after the
            // guest had been let go for good: nobody's wish is to start it again.
            bed.guest.virsh("start", &[]).unwrap();
        }
        stage.judge(&case, &row);
        daemon.end();
    }
    println!("{what:?}: {ends:?}");
}

#[test]
fn somebody_who_starts_the_domain_at_any_event_of_a_restore_in_place_finds_one_machine_whole() {
    meanwhile(Meanwhile::Started, &["--destroy", "--shutdown-time", "1s"]);
}

#[test]
fn qemu_killed_at_any_event_of_a_restore_in_place_leaves_one_machine_whole() {
    meanwhile(Meanwhile::Qemu, &["--save-old"]);
}

#[test]
fn a_reboot_of_the_host_at_any_event_of_a_restore_in_place_leaves_one_machine_whole() {
    meanwhile(Meanwhile::Reboot, &["--destroy", "--shutdown-time", "1s"]);
}

/// libvirtd is killed right before each change of its own notes that says something of the domain's definition or state.
#[test]
fn libvirtd_killed_before_any_note_of_its_own_leaves_one_machine_whole() {
    let stage = Stage::new();
    let (bed, host) = (&stage.bed, &stage.bed.host);
    let daemon = host.daemon();
    let args = ["restore", stage.id.as_str(), "--in-place", "--destroy", "--shutdown-time", "1s"];
    let all = {
        let watch = Renames::watch(bed, None);
        let job = host.begin(&args);
        stage.judge("undisturbed", &host.settled(&job));
        watch.seen()
    };
    let config = bed.files_of_libvirt().remove(1);
    let worth = |nth: &usize| {
        let rename = &all[nth - 1];
        rename.to == config || rename.change.1.contains("state=") || rename.change.1.contains("vmkeep")
    };
    let chosen: Vec<usize> = (1..=all.len()).filter(worth).collect();
    println!("{} notes, {} of them worth a case", all.len(), chosen.len());
    let mut ends = BTreeMap::<String, usize>::new();
    for nth in chosen {
        let libvirtd = host.hypervisor.libvirtd().unwrap();
        let kill = Act {
            when: Box::new(move |number, _| number == nth),
            act: Box::new(move || libvirtd.signal(Signal::KILL)),
        };
        let watch = Renames::watch(bed, Some(kill));
        let job = host.begin(&args);
        let reached = until("libvirtd to be killed, or the job to end", || {
            if watch.acted() {
                return Some(true);
            }
            host.job(&job)["ended"].is_string().then_some(false)
        });
        drop(watch);
        let case = format!("libvirtd killed before note {nth}: {:?}", all[nth - 1].change.1);
        if reached {
            libvirtd.wait_gone(Duration::from_secs(20)).unwrap();
            host.hypervisor.start_libvirtd().unwrap();
        }
        let row = bed.at_rest(&job);
        assert!(row["ended"].is_string(), "{case}: {row:#}\n{}", host.ok(&["job", "explain", &job]));
        *ends.entry(row["status"].as_str().unwrap().to_owned()).or_default() += 1;
        stage.judge(&case, &row);
    }
    println!("{ends:?}");
    daemon.end();
}
