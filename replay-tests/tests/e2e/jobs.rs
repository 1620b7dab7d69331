//! One key is one job. What becomes of a job when its client is killed, when vmkeepd is held up or asked to end, when it is cancelled or paused;
//! and what vmkeepd says while libvirt is away.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};

use crate::support::bed::*;
use crate::support::{Host, about, assert_untouched, disks, files_below, signal, until};

#[test]
fn vmkeepd_waits_for_libvirt_and_says_so() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let libvirt_is_away = |phase: &str| {
        let status = host.json(&["status"]);
        assert_eq!(status["daemon"]["phase"], phase);
        assert_eq!(status["libvirt"]["reachable"], false, "{status:#}");
        assert_eq!(status["libvirt"]["fault"]["code"], 83, "{status:#}");
        let text = host.ok(&["status"]);
        assert!(text.contains("does not answer"), "{text}");
        refused(host, &["snapshot", "web1"], 83, &["HYPERVISOR_UNREACHABLE"]);
        refused(host, &["domains"], 83, &["HYPERVISOR_UNREACHABLE"]);
        host.ok(&["list"]);
        host.ok(&["jobs"]);
    };
    let back = || {
        host.hypervisor.start_libvirtd().unwrap();
        until("vmkeepd to see libvirt again", || {
            (host.ready() && host.json(&["status"])["libvirt"]["reachable"] == true).then_some(())
        });
    };
    host.hypervisor.kill_libvirtd().unwrap();
    let _daemon = host.daemon_that_dies(None);
    until("vmkeepd to answer", || host.vmkeep(&["status"]).status.success().then_some(()));
    libvirt_is_away("waiting_for_libvirt");
    back();
    // libvirt reads the live definition from its own notes, and words it otherwise, so the persistent one is compared.
    bed.assert_back_home();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    host.hypervisor.kill_libvirtd().unwrap();
    until("vmkeepd to notice", || (host.json(&["status"])["libvirt"]["reachable"] == false).then_some(()));
    libvirt_is_away("ready");
    back();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    assert_eq!(host.backups().len(), 2);
}

#[test]
fn a_job_that_is_asked_for_while_libvirtd_restarts_waits_for_it() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let away = || host.json(&["status"])["libvirt"]["reachable"] == false;
    host.hypervisor.kill_libvirtd().unwrap();
    until("vmkeepd to notice", || away().then_some(()));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| host.ok(&["snapshot", "web1", "--disk-only"]));
        // It must have been asked for; whether it waits already only its log would tell.
        until("the request to have come", || host.log().contains("libvirt is waited for").then_some(()));
        assert!(away());
        host.hypervisor.start_libvirtd().unwrap();
        asked.join().unwrap();
    });
    bed.assert_back_home();
    assert_eq!(host.backups().len(), 1);
}

#[test]
fn connections_without_end_cost_no_job_a_file() {
    use std::os::unix::net::UnixStream;
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    // Few enough for a script that loops to have them all; this one has more.
    let daemon = host.daemon_with_descriptors(1024);
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let own = rustix::process::Rlimit { current: most, maximum: most };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, own).unwrap();
    let socket = host.hypervisor.dir().join("run/vmkeep/vmkeepd.sock");
    let job = host.begin(&["snapshot", "web1", "--disk-only", "--bandwidth", "8M"]);
    let mut silent = Vec::new();
    while silent.len() < 3000 {
        silent.push(UnixStream::connect(&socket).unwrap());
    }
    host.ok(&["status"]);
    assert_eq!(host.settled(&job)["status"], "succeeded");
    let held = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    assert!(held < 800, "{held} descriptors are held");
    drop(silent);
    bed.assert_back_home();
    host.ok(&["snapshot", "web1"]);
    bed.assert_back_home();
}

#[test]
fn a_client_that_is_killed_leaves_its_job_alone_and_two_domains_are_copied_at_once() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let other = Guest::boot(&host.hypervisor, &large("web2")).unwrap();
    let of_other = disks(&other);
    let daemon = host.daemon();
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "12M"];
    let mut client = host.hypervisor.command(host.hypervisor.dir().join("bin/vmkeep"));
    let mut client = client.args(slow).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let first = until("the job", || host.jobs().first().map(|job| job["id"].as_str().unwrap().to_owned()));
    let second = host.begin(&["snapshot", "web2", "--disk-only", "--bandwidth", "12M"]);
    until("both copies at once", || {
        (copied(host, &first) > MIB && copied(host, &second) > MIB).then_some(())
    });
    client.kill().unwrap();
    client.wait().unwrap();
    // A daemon that stands still for a while is only late.
    signal(daemon.pid(), rustix::process::Signal::STOP);
    bed.guest.wait_more(20).unwrap();
    signal(daemon.pid(), rustix::process::Signal::CONT);
    assert_eq!(ended(host, &first).0, "succeeded");
    assert_eq!(ended(host, &second).0, "succeeded");
    judge_backup(host, &backup_of(host, &first));
    judge_backup(host, &backup_of(host, &second));
    assert_untouched(&other, &of_other);
    assert_untouched(&bed.guest, &bed.own);
}

#[test]
fn a_daemon_that_is_asked_to_end_in_the_middle_goes_on_after_its_next_start() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    let job = in_the_middle(host, &["snapshot", "web1", "--bandwidth", "6M"]);
    let asked = std::time::Instant::now();
    assert_eq!(daemon.end(), Some(0));
    let took = asked.elapsed();
    println!("vmkeepd ended after {took:?}");
    assert!(took.as_secs() < 20, "it took {took:?} to end");
    bed.guest.wait_more(5).unwrap();
    let _daemon = host.daemon();
    assert_eq!(ended(host, &job).0, "succeeded", "{}", host.ok(&["job", "explain", &job]));
    bed.assert_back_home();
    judge_backup(host, &backup_of(host, &job));
    host.ok(&["replay", &job]);
}

#[test]
fn a_job_that_is_cancelled_or_paused_at_any_step_brings_the_guest_home() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    for (kind, step) in [
        ("job_requested", ""),
        ("step_started", "mark"),
        ("step_started", "overlay/vda"),
        ("step_started", "switch"),
        ("step_started", "take"),
        ("step_succeeded", "take"),
        ("step_started", "copy/vda.qcow2"),
        ("step_started", "publish"),
        ("step_succeeded", "publish"),
        ("step_started", "pivot"),
    ] {
        let case = format!("{kind} {step}");
        let job = host.begin(&["snapshot", "web1", "--bandwidth", "4M"]);
        host.reached(&job, kind, step);
        // It may have come to its end meanwhile.
        let cancelled = host.vmkeep(&["job", "cancel", &job, "--reason", "tired of it"]);
        assert!([0, 81].contains(&cancelled.status.code().unwrap()), "{case}: {cancelled:?}");
        let (status, _) = ended(host, &job);
        println!("cancelled at {case}: {status}");
        assert!(["cancelled", "succeeded"].contains(&status.as_str()), "{case}: {status}");
        bed.assert_back_home();
        let backups = host.backups();
        assert_eq!(backups.len(), usize::from(status == "succeeded"), "{case}");
        for backup in backups {
            judge_backup(host, &backup);
            fs::remove_dir_all(backup["folder"].as_str().unwrap()).unwrap();
        }
        assert_eq!(files_below(&default_root(host)), Vec::<PathBuf>::new(), "{case}");
        host.ok(&["replay", &job]);
    }
    // Paused: only ever where the guest is at home, and it goes on when it is told to.
    let job = host.begin(&["snapshot", "web1"]);
    host.ok(&["job", "pause", &job, "--for", "1h"]);
    bed.guest.wait_more(20).unwrap();
    if !host.history(&job).iter().any(|row| about(row, "step_started", "take")) {
        for (disk, at) in &host.hypervisor.disk_files_in_qemu(bed.guest.uuid()).unwrap() {
            assert_eq!(at.file, bed.own[disk], "it pauses with the guest on an overlay");
        }
        assert!(!host.job(&job)["ended"].is_string());
        host.ok(&["job", "resume", &job]);
    }
    assert_eq!(ended(host, &job).0, "succeeded");
    bed.assert_back_home();
    judge_backup(host, &backup_of(host, &job));
}

#[test]
fn a_pause_in_the_middle_of_a_copy_waits_for_the_merge_and_says_so() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "12M"]);
    let when = "it takes effect after \"remove the overlays\", because";
    assert!(host.ok(&["job", "pause", &job, "--dry-run"]).contains(when));
    let answer = host.ok(&["job", "pause", &job]);
    assert!(answer.contains("goes on for now") && answer.contains(when), "{answer}");
    let shown = host.ok(&["job", "show", &job]);
    assert!(shown.contains(when), "{shown}");
    let told = host.ok(&["job", "explain", &job]);
    assert!(told.contains(when), "{told}");

    host.reached(&job, "step_succeeded", "tidy");

    assert_eq!(host.job(&job)["status"], "paused");
    let shown = host.ok(&["job", "show", &job]);
    assert!(shown.contains("paused until") && !shown.contains("takes effect"), "{shown}");
    assert!(host.ok(&["job", "explain", &job]).contains("now the pause takes effect"));
    host.ok(&["job", "resume", &job]);
    assert_eq!(host.settled(&job)["status"], "succeeded");
    bed.assert_back_home();
}

#[test]
fn the_same_key_is_the_same_job_and_never_another_request() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    let args = ["snapshot", "web1", "--disk-only", "--bandwidth", "4M", "--key", "nightly-2026"];
    let job = host.begin(&args);
    assert_eq!(host.begin(&args), job, "while it runs");
    let another = |options: &[&'static str]| {
        let args = [&["snapshot", "web1", "--key", args[6]][..], options].concat();
        refused(host, &args, 82, &["DUPLICATE_KEY", "new key"]);
    };
    another(&["--bandwidth", "4M"]);
    another(&["--disk-only", "--bandwidth", "5M"]);
    another(&["--disk-only", "--bandwidth", "4M", "--disks", "vda"]);
    assert_eq!(ended(host, &job).0, "succeeded");
    host.ok(&args);
    daemon.kill();
    let _daemon = host.daemon();
    assert_eq!(host.begin(&args), job, "after it ended, by another vmkeepd");
    another(&["--bandwidth", "4M"]);
    assert_eq!((host.jobs().len(), host.backups().len()), (1, 1));

    let backup = host.backups()[0]["id"].as_str().unwrap().to_owned();
    let restore = ["restore", &backup, "--as", "copy", "--key", "again"];
    let job = host.begin(&restore);
    assert_eq!(host.begin(&restore), job);
    assert_eq!(ended(host, &job).0, "succeeded");
    host.ok(&restore);
    for other in [&["--as", "other"][..], &["--as", "copy", "--start"]] {
        let args = [&["restore", backup.as_str(), "--key", "again"][..], other].concat();
        refused(host, &args, 82, &["DUPLICATE_KEY"]);
    }
    // A key of one workflow is no other's either.
    refused(host, &["restore", &backup, "--as", "other", "--key", args[6]], 82, &["DUPLICATE_KEY"]);
    assert_eq!(host.hypervisor.domains().unwrap().len(), 2);
    assert_eq!(host.jobs().len(), 2);
    bed.assert_back_home();
}

#[test]
fn a_libvirtd_that_is_stopped_and_started_in_the_middle_of_a_copy_costs_nothing() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    for with_memory in [true, false] {
        let mode = if with_memory { "--live" } else { "--disk-only" };
        let job = in_the_middle(host, &["snapshot", "web1", mode, "--bandwidth", "12M"]);
        let libvirtd = host.hypervisor.libvirtd().unwrap();
        libvirtd.signal(rustix::process::Signal::TERM);
        libvirtd.wait_gone(Duration::from_secs(60)).unwrap();
        until("vmkeepd to notice", || {
            (host.json(&["status"])["libvirt"]["reachable"] == false).then_some(())
        });
        let before = copied(host, &job);
        until("the copy to go on without libvirt", || {
            (copied(host, &job) > before || copies_are_done(host, &job)).then_some(())
        });
        host.hypervisor.start_libvirtd().unwrap();
        assert_eq!(ended(host, &job).0, "succeeded", "{}", host.ok(&["job", "explain", &job]));
        bed.assert_back_home();
        let backup = backup_of(host, &job);
        assert_eq!(backup["memory"], with_memory);
        judge_backup(host, &backup);
        host.ok(&["replay", &job]);
    }
}

fn copies_are_done(host: &Host, job: &str) -> bool {
    host.history(job).iter().any(|row| about(row, "step_started", "publish"))
}

#[test]
fn a_domain_that_is_removed_while_its_job_waits_is_not_missed_until_its_turn() {
    let host = Host::new();
    configure(&host, "[limits]\njobs = 1\n");
    let bed = Bed::boot_on(host, None, &large("web1"));
    let host = &bed.host;
    let spec = GuestSpec::new("web2").disk(DiskSpec::new(8 * MIB).plain());
    let other = Guest::define(&host.hypervisor, &spec).unwrap();
    host.hypervisor.virsh(["start", "--paused", "--domain", "web2"]).unwrap();
    let _daemon = host.daemon();
    let first = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "16M"]);
    let waiting = host.begin(&["snapshot", "web2", "--disk-only"]);
    assert_eq!(host.job(&waiting)["status"], "queued");
    other.destroy().unwrap();
    other.virsh("undefine", &[]).unwrap();
    assert_eq!(ended(host, &first).0, "succeeded");
    assert_eq!(ended(host, &waiting), ("refused".to_owned(), 23));
    assert_eq!(host.backups().len(), 1);
    // Its image was nobody's to touch.
    fs::remove_file(host.hypervisor.images().join("web2-vda.qcow2")).unwrap();
    bed.assert_back_home();
}
