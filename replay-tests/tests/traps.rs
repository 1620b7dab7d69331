//! The moments at which a backup of a running guest can destroy it, brought about on a real libvirt, QEMU and guest:
//! whoever dies, and whenever, the guest ends on its own images with everything it has flushed, and the job ends, or
//! says what it needs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may fail like a test"
)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use replay_tests::testbed::{DiskSpec, Format, Guest, GuestSpec, Hypervisor, MIB, ProcessId, images_equal};
use rustix::process::Signal;
use serde_json::Value;
use support::renames::{Act, Renames};
use support::{Host, about, assert_ticks, assert_untouched, disks, files_below, until};

/// A host with a guest that ticks on two disks.
struct Bed {
    host: Host,
    guest: Guest,
    own: BTreeMap<String, PathBuf>,
}

fn small(name: &str) -> GuestSpec {
    GuestSpec::new(name)
        .memory_mib(96)
        .disk(DiskSpec::new(48 * MIB).data(6 * MIB))
        .disk(DiskSpec::new(32 * MIB).raw().data(4 * MIB))
}

impl Bed {
    fn new(spec: &GuestSpec) -> Self {
        let host = Host::new();
        let guest = Guest::boot(&host.hypervisor, spec).unwrap();
        let own = disks(&guest);
        guest.wait_tick(5).unwrap();
        Self { host, guest, own }
    }

    fn hypervisor(&self) -> &Hypervisor {
        &self.host.hypervisor
    }

    /// Where libvirt keeps what it believes of the running domain, and its persistent definition.
    fn files_of_libvirt(&self) -> Vec<PathBuf> {
        let name = format!("{}.xml", self.guest.name());
        [("run/libvirt/qemu/run", &name), ("config/libvirt/qemu", &name)]
            .map(|(folder, name)| self.hypervisor().dir().join(folder).join(name))
            .to_vec()
    }

    /// Waits until a job has ended or needs attention.
    fn at_rest(&self, job: &str) -> Value {
        until("the job to end, or to need attention", || {
            let row = self.host.job(job);
            (row["ended"].is_string() || row["status"] == "needs_attention").then_some(row)
        })
    }

    /// What must hold after a job has ended, however it did: the guest runs on its own images by everybody's account
    /// with all that it has flushed; nothing of the job is left; a job that succeeded has a backup that holds one
    /// point in time, one that did not has none and says why; and the journal replays.
    fn judge(&self, case: &str, row: &Value) {
        let job = row["id"].as_str().unwrap();
        println!("{case}: {}", row["status"]);
        assert!(
            row["ended"].is_string(),
            "{case}: {row:#}\n{}\n{}",
            self.host.ok(&["job", "explain", job]),
            self.host.log()
        );
        assert_untouched(&self.guest, &self.own);
        self.host.ok(&["replay", job]);
        let backups = self.host.backups();
        let ours = backups.iter().find(|backup| backup["job"] == row["id"]);
        match ours {
            Some(backup) => {
                assert_eq!(row["status"], "succeeded", "{case}: a failed job has a backup");
                self.host.ok(&["verify", backup["id"].as_str().unwrap()]);
                let image = |disk| image(backup, disk);
                assert_ticks((&image("vda"), Format::Qcow2), (&image("vdb"), Format::Raw));
                std::fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
            }
            None => {
                assert_ne!(row["status"], "succeeded", "{case}: no backup\n{row:#}");
                let fault = &row["fault"];
                assert!(fault["code"].is_u64(), "{case}: it failed without a code: {row:#}");
                for word in ["cause", "remedy"] {
                    assert!(!fault[word].as_str().unwrap_or_default().is_empty(), "{case}: {row:#}");
                }
            }
        }
        let left = files_below(&self.hypervisor().dir().join("data"))
            .into_iter()
            .filter(|file| {
                matches!(file.extension().and_then(|e| e.to_str()), Some("qcow2" | "raw" | "partial"))
            })
            .collect::<Vec<_>>();
        assert!(left.is_empty(), "{case}: left of the job: {left:?}");
    }

    /// Ends the guest and reads its disks: every tick that it printed was on both of them before.
    fn judge_disks(&self) {
        let printed = self.guest.last_tick();
        self.guest.destroy().unwrap();
        let reports = assert_ticks((&self.own["vda"], Format::Qcow2), (&self.own["vdb"], Format::Raw));
        for report in reports {
            assert!(report.last + 1 >= printed, "tick {printed} was printed; {report:?}");
        }
    }
}

/// The image of a disk in a backup.
fn image(backup: &Value, disk: &str) -> PathBuf {
    let folder = PathBuf::from(backup["folder"].as_str().unwrap());
    let mut found = files_below(&folder)
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(disk)));
    found.next().unwrap_or_else(|| panic!("no image of {disk} in {folder:?}"))
}

fn signal(pid: u32, signal: Signal) {
    ProcessId::of(pid).expect("it runs").signal(signal);
}

/// What the three who have an opinion on a disk say of it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone)]
struct Opinions {
    qemu: &'static str,
    live: &'static str,
    persistent: &'static str,
    pivoting: bool,
}

fn opinions(bed: &Bed) -> BTreeSet<Opinions> {
    let (hypervisor, id) = (bed.hypervisor(), bed.guest.uuid());
    let qemu = hypervisor.disk_files_in_qemu(id).unwrap();
    let live = hypervisor.disk_files_in_live_xml(id).unwrap();
    let persistent = hypervisor.disk_files_in_inactive_xml(id).unwrap();
    let xml = hypervisor.virsh(["dumpxml", id]).unwrap();
    let says = |disk: &str, file: &PathBuf| if *file == bed.own[disk] { "base" } else { "overlay" };
    bed.own
        .keys()
        .map(|disk| Opinions {
            qemu: says(disk, &qemu[disk].file),
            live: says(disk, &live[disk]),
            persistent: says(disk, &persistent[disk]),
            pivoting: xml.contains("ready='pivot'"),
        })
        .collect()
}

/// libvirtd is killed, in one backup after the other, right before each time that it changes its status or its
/// definition of the domain: so at every moment at which QEMU has done something that libvirt has not noted.
/// Among them are those between the snapshot and the note of it, and between the pivot and the note of it.
///
/// Nothing that the guest has flushed is lost, it runs on its own images in the end, and no job ends without saying
/// how. Where libvirt itself is left with a wrong idea, the job needs attention, says so with a code, and the remedy
/// that it names is one.
#[test]
fn libvirtd_killed_before_any_note_of_its_own_leaves_guest_and_backup_whole() {
    let bed = Bed::new(&small("web1"));
    let daemon = bed.host.daemon();
    let args = ["snapshot", "web1"];

    let all = {
        let watch = Renames::watch(bed.hypervisor(), &bed.files_of_libvirt(), None);
        let job = bed.host.begin(&args);
        let row = bed.at_rest(&job);
        bed.judge("undisturbed", &row);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        watch.seen()
    };
    println!("{} notes", all.len());
    let mut seen = BTreeMap::<Opinions, usize>::new();
    let mut ends = BTreeMap::<String, usize>::new();
    let mut forgotten = 0;
    // A commit that goes on is QEMU's alone, and libvirt only counts its states: not worth a case each.
    let counts =
        |of: &str| ["state='new'", "state='running'", "newstate='ready'"].iter().any(|s| of.contains(s));
    let worth = |nth: &usize| {
        let (old, new) = &all[nth - 1].change;
        !old.starts_with("<blockjob ") || !(counts(old) || counts(new))
    };
    for nth in (1..=all.len()).filter(worth) {
        let begun = Instant::now();
        let libvirtd = bed.hypervisor().libvirtd().unwrap();
        let vmkeepd = daemon.pid();
        let kill = Act {
            when: Box::new(move |number, _| number == nth),
            act: Box::new(move || libvirtd.signal(Signal::KILL)),
        };
        let watch = Renames::watch(bed.hypervisor(), &bed.files_of_libvirt(), Some(kill));
        let job = bed.host.begin(&args);
        let reached = until("libvirtd to be killed, or the job to end", || {
            if watch.acted() {
                return Some(true);
            }
            let row = bed.host.vmkeep(&["--json", "job", "show", &job]);
            let row: Value = serde_json::from_slice(&row.stdout).unwrap_or_default();
            row["job"]["ended"].is_string().then_some(false)
        });
        let renames = watch.seen();
        drop(watch);
        if !reached {
            println!("{nth}: not reached");
            bed.judge("undisturbed", &bed.at_rest(&job));
            continue;
        }
        let file = renames.last().map(|r| r.to.clone()).unwrap();
        libvirtd.wait_gone(Duration::from_secs(20)).unwrap();
        // vmkeepd waits, so that the world can be looked at before anybody mends it.
        signal(vmkeepd, Signal::STOP);
        bed.hypervisor().start_libvirtd().unwrap();
        let state = until("libvirt to find QEMU again", || {
            let state = bed.guest.state().unwrap();
            let qemu = bed.hypervisor().qmp("web1", &serde_json::json!({"execute": "query-status"}));
            (state.state == "shut off" || qemu.is_ok()).then_some(state)
        });
        let case = format!("{nth} of {}, {}, {state:?}", all.len(), file.display());
        println!("{case}");
        let mut row = if state.state == "shut off" {
            forgotten += 1;
            libvirt_has_forgotten(&bed, vmkeepd, &job)
        } else {
            for opinion in opinions(&bed) {
                println!("  {opinion:?}");
                *seen.entry(opinion).or_default() += 1;
            }
            signal(vmkeepd, Signal::CONT);
            bed.at_rest(&job)
        };
        if row["status"] == "needs_attention" {
            remedy(&bed, &row);
            row = bed.at_rest(&job);
        }
        bed.judge(&case, &row);
        *ends.entry(row["status"].as_str().unwrap().to_owned()).or_default() += 1;
        println!("  {:?}", begun.elapsed());
    }
    println!("{ends:?}, forgotten {forgotten} times\n{seen:#?}");
    let met = |qemu, live| seen.keys().any(|of| of.qemu == qemu && of.live == live);
    assert!(met("overlay", "base"), "killed between the snapshot and the note of it: {seen:#?}");
    assert!(met("base", "overlay"), "killed between the pivot and the note of it: {seen:#?}");
    bed.judge_disks();
}

/// The same, brought about at will.
#[test]
fn a_domain_that_libvirt_has_forgotten_is_left_alone_until_its_qemu_is_gone() {
    let bed = Bed::new(&small("web1"));
    let daemon = bed.host.daemon();
    let libvirtd = bed.hypervisor().libvirtd().unwrap();
    let kill = Act {
        when: Box::new(|_, rename| rename.change.0.contains("state='pivoting'")),
        act: Box::new(move || libvirtd.signal(Signal::KILL)),
    };
    let watch = Renames::watch(bed.hypervisor(), &bed.files_of_libvirt(), Some(kill));
    let job = bed.host.begin(&["snapshot", "web1"]);
    until("libvirtd to be killed", || watch.acted().then_some(()));
    drop(watch);
    libvirtd.wait_gone(Duration::from_secs(20)).unwrap();
    let status = &bed.files_of_libvirt()[0];
    let noted = std::fs::read_to_string(status).unwrap();
    let unreadable = noted.replace(" job='active-commit'", " job=''");
    assert_ne!(noted, unreadable);
    std::fs::write(status, unreadable).unwrap();
    signal(daemon.pid(), Signal::STOP);
    bed.hypervisor().start_libvirtd().unwrap();
    bed.guest.wait_state("shut off").unwrap();
    let row = libvirt_has_forgotten(&bed, daemon.pid(), &job);
    bed.judge("forgotten by libvirt", &row);
    bed.judge_disks();
}

/// For an instant in the middle of a pivot libvirt's status file is one that libvirt itself cannot read. Killed then, it
/// comes back without knowledge of the domain: QEMU runs on, stopped for the pivot, and libvirt says "shut off".
///
/// A second QEMU cannot be started beside it (its serial file and its images are in use), and the images' locks keep
/// vmkeepd's own tools off them. The job says how to find out who is in the way, and goes on trying; when that QEMU is gone it brings the domain home, and everything is there.
fn libvirt_has_forgotten(bed: &Bed, vmkeepd: u32, job: &str) -> Value {
    let qemu = bed.hypervisor().qemu("web1").unwrap();
    let refused = bed.guest.virsh("start", &[]).expect_err("a second QEMU on the same images");
    println!("  libvirt has forgotten the domain; to start it: {refused}");
    signal(vmkeepd, Signal::CONT);
    let fault = until("the job to say what is in the way", || {
        let history = bed.host.history(job);
        let mut failed = history.into_iter().filter(|row| about(row, "step_failed", "pivot"));
        // The first is that libvirt was gone.
        let failed = failed.find(|row| row["event"]["body"]["data"]["fault"]["code"] != 83)?;
        Some(failed["event"]["body"]["data"].clone())
    });
    println!("  {fault}");
    assert_eq!(fault["fault"]["code"], 104, "{fault}");
    assert!(fault["fault"]["remedy"].as_str().unwrap().contains("fuser"), "{fault}");
    assert!(qemu.id.is_alive());
    let held = bed.hypervisor().files_held_by_qemu("web1").unwrap();
    assert!(held.iter().all(|file| file.exists()), "a file was removed under QEMU: {held:?}");
    qemu.id.kill().unwrap();
    let row = bed.at_rest(job);
    if row["ended"].is_string() {
        bed.guest.start().unwrap();
    }
    row
}

/// libvirt believes in a pivot that is over: the guest is safe, the operator is told what to do, and that helps.
fn remedy(bed: &Bed, row: &Value) {
    assert_eq!(row["fault"]["code"], 103, "{row:#}");
    assert_eq!(bed.guest.state().unwrap().state, "running");
    bed.guest.wait_more(3).unwrap();
    let qemu = bed.hypervisor().disk_files_in_qemu(bed.guest.uuid()).unwrap();
    let qemu: BTreeMap<_, _> = qemu.into_iter().map(|(disk, at)| (disk, at.file)).collect();
    assert_eq!(qemu, bed.own, "QEMU");
    assert_eq!(disks(&bed.guest), bed.own, "the next start");
    bed.guest.shutdown().unwrap();
    bed.guest.start().unwrap();
    bed.host.ok(&["job", "settle", row["id"].as_str().unwrap()]);
    let job = row["id"].as_str().unwrap();
    until("the job to end", || bed.host.job(job)["ended"].is_string().then_some(()));
}

/// The newest backup's job.
fn newest(host: &Host) -> String {
    let jobs = host.json(&["jobs", "--workflow", "snapshot", "--limit", "1"]);
    jobs[0]["id"].as_str().unwrap_or_else(|| panic!("{jobs:#}")).to_owned()
}

/// The history of a backup that nobody disturbs.
fn undisturbed(bed: &Bed, args: &[&str]) -> Vec<Value> {
    let daemon = bed.host.daemon();
    let job = bed.host.begin(args);
    let row = bed.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    let history = bed.host.history(&job);
    bed.judge("undisturbed", &row);
    daemon.end();
    history
}

/// Lets vmkeepd die right before or after the journal gets a certain event of a new job.
fn die_at(bed: &Bed, clean: &[Value], side: &str, kind: &str, step: &str, args: &[&str]) {
    let at =
        clean.iter().position(|row| about(row, kind, step)).unwrap_or_else(|| panic!("no {kind} {step}"));
    let mut doomed = bed.host.daemon_that_dies(Some(&format!("append/{side}/snapshot/{}", at + 1)));
    until("vmkeepd to be ready", || bed.host.ready().then_some(()));
    let mut all = args.to_vec();
    all.push("--no-wait");
    let _ = bed.host.vmkeep(&all);
    doomed.dies_or(|| false);
}

/// The host is cut off at every turn of a backup: vmkeepd, libvirtd and QEMU are gone at once. The domain is started
/// again before vmkeepd is there, as autostart would, and the guest writes on: on whichever file its definition names.
///
/// That must always be the one with everything that it has flushed, and vmkeepd must bring it home from there.
#[test]
fn a_host_that_goes_down_and_starts_its_guests_before_vmkeepd_loses_no_flushed_write() {
    let bed = Bed::new(&small("web1"));
    let args = ["snapshot", "web1"];
    let clean = undisturbed(&bed, &args);
    for (side, kind, step) in [
        ("before", "step_succeeded", "switch"),
        ("after", "step_started", "take"),
        ("before", "step_succeeded", "take"),
        ("after", "step_started", "copy/vda.qcow2"),
        ("before", "step_succeeded", "publish"),
        ("before", "step_succeeded", "commit/vda"),
        ("after", "step_started", "pivot"),
        ("before", "step_succeeded", "pivot"),
        ("before", "step_succeeded", "tidy"),
    ] {
        let case = format!("cut off {side} {kind} {step}");
        die_at(&bed, &clean, side, kind, step, &args);
        bed.hypervisor().kill_libvirtd().unwrap();
        bed.hypervisor().kill_qemu("web1").unwrap();
        bed.hypervisor().start_libvirtd().unwrap();
        bed.guest.wait_state("shut off").unwrap();
        bed.guest.start().unwrap();
        bed.guest.wait_more(3).unwrap();
        let daemon = bed.host.daemon();
        let row = bed.at_rest(&newest(&bed.host));
        bed.judge(&case, &row);
        daemon.end();
    }
    bed.judge_disks();
}

/// QEMU dies at every turn of a backup, and somebody starts the domain while the job is still about it.
#[test]
fn qemu_killed_at_any_turn_and_the_domain_started_by_somebody_loses_no_flushed_write() {
    let bed = Bed::new(&small("web1"));
    let _daemon = bed.host.daemon();
    for (kind, step) in [
        ("step_started", "take"),
        ("step_succeeded", "take"),
        ("step_started", "copy/vda.qcow2"),
        ("step_started", "commit/vda"),
        ("step_started", "pivot"),
        ("step_succeeded", "pivot"),
    ] {
        let job = bed.host.begin(&["snapshot", "web1", "--bandwidth", "8M"]);
        bed.host.reached(&job, kind, step);
        bed.hypervisor().kill_qemu("web1").unwrap();
        bed.guest.wait_state("shut off").unwrap();
        bed.guest.start().unwrap();
        bed.guest.wait_more(3).unwrap();
        let row = bed.at_rest(&job);
        bed.judge(&format!("QEMU killed at {kind} {step}"), &row);
    }
    bed.judge_disks();
}

/// The guest stands still for the pivot, and vmkeepd dies; then libvirtd with it. Whoever sets it free must not wait
/// for the job, and must have made the definition right before.
#[test]
fn a_guest_stopped_for_the_pivot_runs_again_as_soon_as_vmkeepd_is_back() {
    let bed = Bed::new(&small("web1"));
    for libvirtd_too in [false, true] {
        let daemon = bed.host.daemon();
        let (vmkeepd, libvirtd) =
            (ProcessId::of(daemon.pid()).unwrap(), bed.hypervisor().libvirtd().unwrap());
        let act = Act {
            when: Box::new(|_, rename| rename.change.1.contains("state='paused' reason='user'")),
            act: Box::new(move || {
                vmkeepd.signal(Signal::KILL);
                if libvirtd_too {
                    libvirtd.signal(Signal::KILL);
                }
            }),
        };
        let watch = Renames::watch(bed.hypervisor(), &bed.files_of_libvirt(), Some(act));
        bed.host.begin(&["snapshot", "web1", "--disk-only"]);
        until("the guest to be stopped", || watch.acted().then_some(()));
        drop(watch);
        daemon.kill();
        if libvirtd_too {
            libvirtd.wait_gone(Duration::from_secs(20)).unwrap();
            bed.hypervisor().start_libvirtd().unwrap();
        }
        // libvirt itself has not noted it.
        let status = bed.hypervisor().qmp("web1", &serde_json::json!({"execute": "query-status"})).unwrap();
        assert_eq!(status["running"], false, "{status}");
        let before = bed.guest.last_tick();
        let daemon = bed.host.daemon_that_dies(None);
        let since = Instant::now();
        until("the guest to run", || (bed.guest.state().unwrap().state == "running").then_some(()));
        let took = since.elapsed();
        println!("libvirtd killed too: {libvirtd_too}; the guest ran {took:?} after vmkeepd was started");
        assert!(took < Duration::from_secs(10), "{took:?}");
        bed.guest.wait_tick(before + 1).unwrap();
        until("vmkeepd to answer", || bed.host.ready().then_some(()));
        let row = bed.at_rest(&newest(&bed.host));
        bed.judge("vmkeepd killed while the guest stood still", &row);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        daemon.end();
    }
    bed.judge_disks();
}

/// QEMU stands still when the snapshot is asked for, and vmkeepd dies. libvirt takes the snapshot when QEMU goes on,
/// for nobody. It must be known for what it is, whether it comes before vmkeepd is back or after.
#[test]
fn a_snapshot_that_is_taken_after_vmkeepd_has_died_is_recognised_and_ended_whole() {
    let bed = Bed::new(&small("web1"));
    for vmkeepd_first in [false, true] {
        let daemon = bed.host.daemon();
        let qemu = bed.hypervisor().qemu("web1").unwrap().id;
        let act = Act {
            // The last thing before the snapshot is asked for: the note that the guest may be held for it.
            when: Box::new(|_, rename| rename.change.1.contains("hold=\"suspended\"")),
            act: Box::new(move || qemu.signal(Signal::STOP)),
        };
        let watch = Renames::watch(bed.hypervisor(), &bed.files_of_libvirt(), Some(act));
        let job = bed.host.begin(&["snapshot", "web1"]);
        until("QEMU to stand still", || watch.acted().then_some(()));
        drop(watch);
        until("libvirt to wait for QEMU", || {
            let control = bed.guest.virsh("domcontrol", &[]).unwrap();
            (control.trim() != "ok").then_some(())
        });
        daemon.kill();
        let daemon = if vmkeepd_first {
            let daemon = bed.host.daemon_that_dies(None);
            until("vmkeepd to take over its jobs", || {
                let status = bed.host.vmkeep(&["--json", "status"]);
                let status: Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
                (status["daemon"]["phase"] == "recovering").then_some(())
            });
            qemu.signal(Signal::CONT);
            until("vmkeepd to answer", || bed.host.ready().then_some(()));
            daemon
        } else {
            qemu.signal(Signal::CONT);
            until("the snapshot to be taken for nobody", || {
                opinions(&bed).iter().all(|of| of.qemu == "overlay").then_some(())
            });
            bed.host.daemon()
        };
        let row = bed.at_rest(&job);
        bed.judge(&format!("vmkeepd was back first: {vmkeepd_first}"), &row);
        daemon.end();
    }
    bed.judge_disks();
}

/// A guest that its operator pauses while it is backed up stays paused: after the job, after vmkeepd and libvirtd were
/// started anew.
#[test]
fn a_guest_that_its_operator_has_paused_is_left_paused() {
    let bed = Bed::new(&small("web1"));
    let daemon = bed.host.daemon();
    let job = bed.host.begin(&["snapshot", "web1", "--bandwidth", "4M"]);
    bed.host.reached(&job, "step_started", "copy/vda.qcow2");
    bed.guest.virsh("suspend", &[]).unwrap();
    let row = bed.at_rest(&job);
    assert_eq!(row["status"], "succeeded", "{row:#}");
    let paused = || bed.guest.state().unwrap().state == "paused";
    assert!(paused(), "after the job");
    daemon.kill();
    let daemon = bed.host.daemon();
    assert!(paused(), "after a start of vmkeepd");
    bed.hypervisor().restart_libvirtd().unwrap();
    until("vmkeepd to reach libvirt again", || bed.host.vmkeep(&["domains"]).status.success().then_some(()));
    assert!(paused(), "after a start of libvirtd");
    bed.guest.virsh("resume", &[]).unwrap();
    bed.judge("paused by its operator", &row);
    daemon.end();
    bed.judge_disks();
}

fn frozen(guest: &Guest) -> bool {
    let answer = guest.virsh("qemu-agent-command", &[r#"{"execute":"guest-fsfreeze-status"}"#]).unwrap();
    let answer: Value = serde_json::from_str(&answer).unwrap();
    answer["return"] == "frozen"
}

/// File systems are frozen for the instant of a disk-only backup and thawed in every case: also when vmkeepd dies in
/// between. What somebody else has frozen stays frozen.
#[test]
fn a_freeze_of_ours_always_ends_and_that_of_somebody_else_is_never_touched() {
    let bed = Bed::new(&small("web1").disk(DiskSpec::new(32 * MIB).ext4()).agent());
    let args = ["snapshot", "web1", "--disk-only"];
    let clean = undisturbed(&bed, &args);
    assert!(!frozen(&bed.guest));
    for step in ["freeze", "thaw"] {
        let event = clean.iter().find(|row| about(row, "step_succeeded", step)).unwrap();
        assert_ne!(event["event"]["body"]["data"]["output"]["file_systems"], 0, "{event:#}");
    }

    for (side, kind, step) in [("before", "step_succeeded", "freeze"), ("after", "step_started", "take")] {
        die_at(&bed, &clean, side, kind, step, &args);
        assert!(frozen(&bed.guest), "{side} {kind} {step}");
        let daemon = bed.host.daemon_that_dies(None);
        let since = Instant::now();
        until("the guest to be thawed", || (!frozen(&bed.guest)).then_some(()));
        let took = since.elapsed();
        println!("thawed {took:?} after vmkeepd was started");
        assert!(took < Duration::from_secs(10), "{took:?}");
        until("vmkeepd to answer", || bed.host.ready().then_some(()));
        let row = bed.at_rest(&newest(&bed.host));
        bed.judge("vmkeepd killed while the guest was frozen", &row);
        assert!(!frozen(&bed.guest));
        daemon.end();
    }

    bed.guest.virsh("domfsfreeze", &[]).unwrap();
    let daemon = bed.host.daemon();
    bed.host.fails(&["snapshot", "web1", "--disk-only", "--quiesce"], 101, &["domfsthaw"]);
    assert!(frozen(&bed.guest), "after a backup that failed for it");
    bed.host.ok(&args);
    assert!(frozen(&bed.guest), "after a backup that went on without");
    daemon.kill();
    let _daemon = bed.host.daemon();
    assert!(frozen(&bed.guest), "after a start of vmkeepd");
    bed.guest.virsh("domfsthaw", &[]).unwrap();
    assert_untouched(&bed.guest, &bed.own);
}

/// Every image of a backup is the disk at that moment, byte for byte: also what the guest has overwritten with zeroes
/// or discarded.
#[test]
fn each_image_of_a_backup_equals_its_disk_byte_for_byte_zeroes_included() {
    let bed = Bed::new(&small("web1").disk(DiskSpec::new(16 * MIB).data(4 * MIB).plain()));
    let _daemon = bed.host.daemon();
    for command in ["stop-ticks", "zero vdc 2M 1M", "discard vdc 3M 1M", "fill vdc 8M 2M 7"] {
        bed.guest.send(command).unwrap();
    }
    bed.host.ok(&["snapshot", "web1"]);
    let backup = bed.host.backups().remove(0);
    for (disk, file) in &bed.own {
        images_equal(&image(&backup, disk), file).unwrap().unwrap_or_else(|why| panic!("{disk}: {why}"));
    }
    bed.guest.send("start-ticks 20").unwrap();
    assert_untouched(&bed.guest, &bed.own);
}
