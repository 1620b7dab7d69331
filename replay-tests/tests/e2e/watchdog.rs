//! Guests that stand still, or are frozen, because of a job that goes on: the watchdog ends that, and says so in the
//! job's journal. (What a vmkeepd that died has left, its next start ends: see `holds`.)

use std::time::{Duration, Instant};

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::bed::*;
use crate::support::mount::Mount;
use crate::support::renames::{Act, Renames};
use crate::support::{Host, files_below, signal, until};

/// What was done to keep a guest safe, as the job's journal has it.
fn interventions(host: &Host, job: &str) -> Vec<(String, String)> {
    let text = |row: &Value, what: &str| row["event"]["body"]["data"][what].as_str().unwrap().to_owned();
    let history = host.history(job);
    let rows = history.iter().filter(|row| row["event"]["body"]["type"] == "intervened");
    rows.map(|row| (text(row, "act"), text(row, "outcome"))).collect()
}

fn paused(bed: &Bed) -> bool {
    bed.guest.state().unwrap().state == "paused"
}

/// A guest on a small file system; with backups on the same one if that is asked for.
fn cramped(with_backups: bool) -> Option<Bed> {
    let host = Host::new();
    let mount = Mount::new(&host, "guests", 700)?;
    if with_backups {
        configure(&host, &root_is(&folder(&host, &mount.0.join("backups"))));
    }
    let spec = GuestSpec::new("web1")
        .disk(DiskSpec::new(128 * MIB).data(48 * MIB).at(&mount.0.join("a.qcow2")))
        .disk(DiskSpec::new(32 * MIB).raw().at(&mount.0.join("b.raw")));
    Some(Bed::boot_on(host, Some(mount), &spec))
}

/// Lets the guest run into the full file system while vmkeepd cannot act; returns the job.
fn stopped_by_a_full_disk(bed: &Bed, vmkeepd: u32, rate: &str, copied_before: u64) -> String {
    let host = &bed.host;
    // A merge that takes its time, since its end would set the guest free as well.
    let slowly = ["--bandwidth", rate, "--merge-bandwidth", "256K"];
    let job = in_the_middle(host, &[&["snapshot", "web1", "--disk-only"], &slowly[..]].concat());
    until("the copy to have taken some room", || (copied(host, &job) >= copied_before).then_some(()));
    signal(vmkeepd, Signal::STOP);
    bed.mount().fill(0);
    bed.guest.wait_state("paused").unwrap();
    job
}

/// The backup itself has taken the room that the guest lacks: it is given up, and the guest goes on.
#[test]
fn a_guest_that_stopped_because_our_copy_took_its_room_runs_again_at_once() {
    let Some(bed) = cramped(true) else { return };
    let (host, mount) = (&bed.host, bed.mount());
    let daemon = host.daemon();
    let before = files_below(&mount.0);
    let job = stopped_by_a_full_disk(&bed, daemon.pid(), "16M", 24 * MIB);

    signal(daemon.pid(), Signal::CONT);
    let since = Instant::now();
    until("the guest to run", || (!paused(&bed)).then_some(()));
    println!("the guest ran {:?} after vmkeepd could act", since.elapsed());

    // Nobody else has made room. The copy itself may have been the first to notice.
    let (status, code) = ended(host, &job);
    assert!(status == "rolled_back" && [47, 102].contains(&code), "{}", host.story(&job));
    // By the watchdog, or by the pivot on the way home, whichever was first.
    let acts = interventions(host, &job);
    assert!(acts.iter().all(|(act, _)| act.contains("the guest")), "{acts:?}");
    host.ok(&["replay", &job]);
    bed.assert_back_home();
    mount.clear();
    assert_eq!(files_below(&mount.0), before);
    assert!(host.backups().is_empty());
    bed.judge_disks();
}

/// There is nothing that the job could give up: it says so at once, and the guest goes on as soon as somebody makes room.
#[test]
fn a_guest_that_stopped_for_want_of_room_is_told_of_and_runs_as_soon_as_somebody_makes_some() {
    let Some(bed) = cramped(false) else { return };
    let (host, mount) = (&bed.host, bed.mount());
    let daemon = host.daemon();
    let before = files_below(&mount.0);
    let job = stopped_by_a_full_disk(&bed, daemon.pid(), "2M", MIB);
    // What the copy gives back is not enough to go on with.
    signal(daemon.pid(), Signal::CONT);
    let told = || interventions(host, &job).into_iter().find(|(_, outcome)| outcome.contains("make room"));
    let (act, outcome) = until("that there is no room to be in the journal", told);
    assert!(act.contains("vmkeep-") && outcome.contains("goes on by itself"), "{act}: {outcome}");
    assert!(paused(&bed));

    mount.clear();
    let since = Instant::now();
    until("the guest to run", || (!paused(&bed)).then_some(()));
    println!("the guest ran {:?} after there was room", since.elapsed());
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 102), "{}", host.story(&job));
    assert!(interventions(host, &job).iter().any(|(act, _)| act.contains("resumed the guest")));
    assert!(host.ok(&["job", "explain", &job]).contains("To keep the guest safe: resumed the guest"));
    bed.assert_back_home();
    assert_eq!(files_below(&mount.0), before);
    bed.judge_disks();
}

/// Keeps libvirt's lock on the domain, and QEMU's monitor, while the guest and its agent go on.
fn occupy(host: &Host, guest: &replay_tests::testbed::Guest, for_ms: u32) -> std::process::Child {
    let disk = "/machine/peripheral/virtio-disk0/virtio-backend";
    let sleep = format!("qemu-io -d {disk} \"sleep {for_ms}\"");
    let mut virsh = host.hypervisor.command("virsh");
    virsh.args(["-c", host.hypervisor.uri(), "qemu-monitor-command", guest.name(), "--hmp", &sleep]);
    let virsh = virsh.stdout(std::process::Stdio::null()).spawn().unwrap();
    let mut busy = 0;
    until("libvirt to be busy with the domain", || {
        std::thread::sleep(Duration::from_millis(100));
        let said = guest.virsh("domcontrol", &[]).unwrap();
        busy = if said.trim().starts_with("ok") { 0 } else { busy + 1 };
        (busy >= 4).then_some(())
    });
    virsh
}

/// The snapshot is held up between freeze and act. The guest does not wait for it, and the backup does not pass for one
/// of a frozen guest.
#[test]
fn a_freeze_ends_at_its_limit_whatever_holds_the_snapshot_up() {
    let host = Host::new();
    configure(&host, "[limits]\nfreeze = \"2s\"\n");
    let bed = Bed::boot_on(host, None, &small("web1").disk(DiskSpec::new(32 * MIB).ext4()).agent());
    let host = &bed.host;
    let daemon = host.daemon();
    for (asked, status, code) in [(&[][..], "succeeded", 0), (&["--quiesce"][..], "rolled_back", 99)] {
        let vmkeepd = daemon.pid();
        let act = Act {
            when: Box::new(|_, rename| rename.change.1.contains("frozen")),
            act: Box::new(move || signal(vmkeepd, Signal::STOP)),
        };
        let watch = Renames::watch(&bed, Some(act));
        let job = host.begin(&[&["snapshot", "web1", "--disk-only"], asked].concat());
        until("the freeze to be noted", || watch.acted().then_some(()));
        drop(watch);
        let mut virsh = occupy(host, &bed.guest, 12_000);
        signal(vmkeepd, Signal::CONT);
        let thawed =
            || interventions(host, &job).into_iter().find(|(act, _)| act.contains("thawed the guest"));
        let (_, outcome) = until("the guest to be thawed", thawed);
        assert!(outcome.contains("done: 1 file systems"), "{outcome}");
        assert!(virsh.try_wait().unwrap().is_none(), "nothing holds the snapshot up any more");
        assert_eq!(ended(host, &job), (status.to_owned(), code), "{}", host.story(&job));
        virsh.wait().unwrap();
        let taken =
            host.history(&job).iter().position(|row| crate::support::about(row, "step_succeeded", "take"));
        let acted = host.history(&job).iter().position(|row| row["event"]["body"]["type"] == "intervened");
        assert!(acted.unwrap() < taken.unwrap_or(usize::MAX), "{}", host.story(&job));
        if code == 0 {
            let manifest = manifest_of(&backup_of(host, &job));
            assert_eq!(manifest["consistency"], "crash");
            assert!(manifest["warnings"].to_string().contains("too late"), "{manifest:#}");
        }
        bed.assert_back_home();
    }
}
