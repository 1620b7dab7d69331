//! The test bed itself, on a real hypervisor: what the other tests rely on.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail like a test")]

use replay_tests::testbed::{
    DiskSpec, Error, Format, Guest, GuestSpec, HideKvm, Hypervisor, MIB, Options, assert_consistent,
    data_offset, files_in, image_info, images_equal, leftovers, pattern_on, ticks_on,
};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

const NASTY: &str = "web server \"ä\" 'x', $(id)";

fn reports(guest: &Guest) -> [replay_tests::testbed::TickReport; 2] {
    ["vda", "vdb"].map(|target| {
        let path = guest.disk(target).unwrap();
        ticks_on(&path, Format::probe(&path).unwrap()).unwrap()
    })
}

#[test]
fn a_guest_with_a_nasty_name_ticks_and_a_power_cut_leaves_all_printed_ticks_on_both_disks() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let guest = Guest::boot(&hypervisor, &GuestSpec::two_disks(NASTY)).unwrap();
    guest.wait_tick(30).unwrap();
    assert_eq!(guest.state().unwrap().state, "running");
    assert_eq!(hypervisor.domains().unwrap(), [NASTY]);
    guest.destroy().unwrap();
    let printed = guest.last_tick();
    let [a, b] = reports(&guest);
    assert_consistent(&a, &b);
    assert!(b.last >= printed, "tick {printed} was printed, the disks end at {}", b.last);
    assert_eq!(a.last_boot(), guest.boot_id());

    // A second boot goes on where the first was cut off, as another boot.
    let first_boot = guest.boot_id();
    guest.start().unwrap();
    guest.wait_tick(printed + 20).unwrap();
    assert_ne!(guest.boot_id(), first_boot);
    assert_eq!(guest.console().lost(), [0; 0]);
    guest.shutdown().unwrap();
    let [a, b] = reports(&guest);
    assert_consistent(&a, &b);
    assert_eq!((a.last, a.boots.len()), (b.last, 2), "the power button stops the ticks between two");
}

#[test]
fn a_disk_that_fell_back_in_time_is_refused_by_the_guest_and_found_by_the_oracle() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let guest = Guest::boot(&hypervisor, &GuestSpec::two_disks("g")).unwrap();
    guest.wait_tick(5).unwrap();
    guest.destroy().unwrap();
    let (vda, old) = (guest.disk("vda").unwrap(), hypervisor.images().join("old"));
    std::fs::copy(&vda, &old).unwrap();
    guest.start().unwrap();
    guest.wait_more(10).unwrap();
    guest.destroy().unwrap();
    // Same file, old content: as if a stale overlay had been taken for the disk.
    std::fs::write(&vda, std::fs::read(&old).unwrap()).unwrap();
    let [a, b] = reports(&guest);
    assert!(a.is_whole() && b.is_whole());
    assert!(replay_tests::testbed::consistency(&a, &b).is_err());
    let refused = guest.start();
    assert!(
        matches!(&refused, Err(Error::Refused { answer, .. }) if answer.contains("ends at tick")),
        "{refused:?}"
    );
}

#[test]
fn commands_reach_the_guest_and_what_it_writes_is_on_its_disks() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let spec =
        GuestSpec::new("c").disk(DiskSpec::new(128 * MIB).data(8 * MIB)).disk(DiskSpec::new(64 * MIB).raw());
    let guest = Guest::boot(&hypervisor, &spec).unwrap();
    assert_eq!(guest.send("ping").unwrap(), "pong");
    let place = data_offset(128 * MIB);
    guest.send(&format!("check vda {place} 8M 1")).unwrap();
    guest.send("fill vda 64M 4M 77").unwrap();
    guest.send("fill vdb 32M 4M 78").unwrap();
    guest.send("zero vdb 33M 1M").unwrap();
    assert!(matches!(guest.send("fill vda 0 4096 1"), Err(Error::Refused { .. })), "the ticks are protected");
    assert!(matches!(guest.send("check vda 64M 4M 78"), Err(Error::Refused { .. })));
    let stopped: u64 = guest.send("stop-ticks").unwrap().parse().unwrap();
    let (vda, vdb) = (guest.disk("vda").unwrap(), guest.disk("vdb").unwrap());
    assert_eq!(pattern_on(&vda, Format::Qcow2, place, 8 * MIB, 1).unwrap(), None);
    assert_eq!(pattern_on(&vda, Format::Qcow2, 64 * MIB, 4 * MIB, 77).unwrap(), None);
    assert_eq!(pattern_on(&vdb, Format::Raw, 32 * MIB, 4 * MIB, 78).unwrap(), Some(33 * MIB));
    let [a, b] = reports(&guest);
    assert_eq!((a.last, b.last), (stopped, stopped));
    guest.send("start-ticks 50").unwrap();
    guest.wait_tick(stopped + 5).unwrap();
    guest.send("poweroff").unwrap();
    guest.wait_state("shut off").unwrap();
}

#[test]
fn a_memory_snapshot_goes_on_with_its_boot_and_a_pause_is_seen_in_the_gap() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let guest = Guest::boot(&hypervisor, &GuestSpec::two_disks("m")).unwrap();
    guest.send("hold 16 5").unwrap();
    guest.wait_tick(10).unwrap();
    let before = guest.console().last().unwrap();
    let state = hypervisor.dir().join("images/state");
    guest.virsh("save", &["--file", &state.to_string_lossy()]).unwrap();
    let began = std::time::Instant::now();
    let while_saved = guest.console().ticks().len();
    // The guest's clock must not show what the host's does: a gap long enough to be told from any tick's.
    until_elapsed(began, Duration::from_millis(700));
    assert_eq!(guest.console().ticks().len(), while_saved);
    hypervisor.virsh(["restore", "--file", &state.to_string_lossy()]).unwrap();
    guest.wait_more(5).unwrap();
    let after = guest.console().last().unwrap();
    assert_eq!(after.boot, before.boot);
    assert!(after.ram > before.ram);
    guest.send("held").unwrap();
    let gap = guest.longest_gap(before.number).unwrap();
    assert!(gap.host >= Duration::from_millis(700), "{gap:?}");
    assert!(gap.guest < gap.host, "{gap:?}");
}

fn until_elapsed(began: std::time::Instant, time: Duration) {
    while began.elapsed() < time {
        std::thread::sleep(time.saturating_sub(began.elapsed()));
    }
}

#[test]
fn a_freeze_by_the_agent_stops_the_writes_to_the_mounted_disk_and_a_thaw_lets_them_go_on() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let spec = GuestSpec::two_disks("f").disk(DiskSpec::new(64 * MIB).ext4()).agent();
    let guest = Guest::boot(&hypervisor, &spec).unwrap();
    let writes = || guest.send("fs").unwrap().parse::<u64>().unwrap();
    // The agent answers some time after the boot.
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while let Err(error) = guest.virsh("qemu-agent-command", &["{\"execute\":\"guest-ping\"}"]) {
        assert!(std::time::Instant::now() < deadline, "{error}");
    }
    while writes() < 3 {
        assert!(std::time::Instant::now() < deadline, "nothing is written");
    }
    guest.virsh("domfsfreeze", &[]).unwrap();
    // Ticks are raw and go on: twenty of them are a second in which the file system would have been written to.
    let frozen = writes();
    guest.wait_more(20).unwrap();
    assert_eq!(writes(), frozen);
    // What a freeze is for: the image is clean as it lies there.
    let image = guest.disk("vdc").unwrap();
    let raw = hypervisor.images().join("copy");
    hypervisor
        .run("qemu-img", ["convert", "-U", "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()])
        .unwrap();
    hypervisor.run("e2fsck", ["-fn", raw.to_str().unwrap()]).unwrap();
    guest.virsh("domfsthaw", &[]).unwrap();
    while writes() == frozen {
        assert!(std::time::Instant::now() < deadline, "the thaw did not let the writes go on");
    }
}

#[test]
fn two_hypervisors_at_once_do_not_see_each_other_and_leave_nothing() {
    let (one, two) = (Hypervisor::start_temp().unwrap(), Hypervisor::start_temp().unwrap());
    let spec = GuestSpec::two_disks("same name");
    let (guest_one, guest_two) = std::thread::scope(|scope| {
        let first = scope.spawn(|| Guest::boot(&one, &spec).unwrap());
        (Guest::boot(&two, &spec).unwrap(), first.join().unwrap())
    });
    assert_ne!(guest_one.uuid(), guest_two.uuid());
    assert_eq!((one.qemus().len(), two.qemus().len()), (1, 1));
    let (dir_one, dir_two) = (one.dir().to_owned(), two.dir().to_owned());
    one.stop().unwrap();
    assert_eq!(leftovers(&dir_one), [""; 0]);
    let survivor = if guest_one.hypervisor().dir() == dir_two { &guest_one } else { &guest_two };
    survivor.wait_more(5).unwrap();
    drop((guest_one, guest_two, one, two));
    assert_eq!(leftovers(&dir_two), [""; 0], "the last handle ends the hypervisor");
}

#[test]
fn the_guest_survives_the_end_of_libvirtd_and_virtlogd_and_no_client_brings_a_daemon_back() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let guest = Guest::boot(&hypervisor, &GuestSpec::two_disks("d")).unwrap();
    let (first, qemu) = (hypervisor.libvirtd().unwrap(), hypervisor.qemu("d").unwrap().id);
    hypervisor.kill_libvirtd().unwrap();
    assert!(hypervisor.virsh(["list"]).is_err());
    assert_eq!(hypervisor.libvirtd(), None);
    guest.wait_more(5).unwrap();
    assert_ne!(hypervisor.start_libvirtd().unwrap(), first);
    assert_eq!(guest.state().unwrap().state, "running");
    assert_eq!(hypervisor.qemu("d").unwrap().id, qemu);
    hypervisor.kill_virtlogd().unwrap();
    let tick = |answer: String| answer.split(' ').nth(3).unwrap().parse::<u64>().unwrap();
    let before = tick(guest.send("info").unwrap());
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while tick(guest.send("info").unwrap()) < before + 5 {
        assert!(std::time::Instant::now() < deadline, "the guest stands still without virtlogd");
    }
    hypervisor.kill_qemu("d").unwrap();
    guest.wait_state("shut off").unwrap();
    assert_consistent(&reports(&guest)[0], &reports(&guest)[1]);
}

/// As Debian's unit does. Whoever kills it wants it gone.
#[test]
fn a_libvirtd_that_crashes_is_started_again_and_one_that_is_killed_is_not() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let first = hypervisor.libvirtd().unwrap();
    first.signal(rustix::process::Signal::SEGV);
    first.wait_gone(Duration::from_secs(60)).unwrap();
    let end = std::time::Instant::now() + Duration::from_secs(60);
    let second = loop {
        match hypervisor.libvirtd().filter(|_| hypervisor.virsh(["uri"]).is_ok()) {
            Some(second) => break second,
            None => until_elapsed(std::time::Instant::now(), Duration::from_millis(20)),
        }
        assert!(std::time::Instant::now() < end, "nobody started it");
    };
    assert_ne!(first, second);
    hypervisor.kill_libvirtd().unwrap();
    // Whoever looks after it looks many times in that time.
    until_elapsed(std::time::Instant::now(), Duration::from_millis(500));
    assert_eq!(hypervisor.libvirtd(), None);
    hypervisor.start_libvirtd().unwrap();
}

#[test]
fn qemu_and_both_definitions_are_asked_apart_and_tell_of_an_overlay() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let spec = GuestSpec::new(NASTY)
        .disk(DiskSpec::new(64 * MIB).data(2 * MIB).chain(2))
        .disk(DiskSpec::new(64 * MIB).raw());
    let guest = Guest::boot(&hypervisor, &spec).unwrap();
    let (vda, vdb) = (guest.disk("vda").unwrap(), guest.disk("vdb").unwrap());
    let plain = BTreeMap::from([("vda".to_owned(), vda.clone()), ("vdb".to_owned(), vdb.clone())]);
    let before = files_in(&hypervisor.images()).unwrap();
    assert_eq!(before.len(), 4, "{before:?}");
    assert_eq!(hypervisor.disk_files_in_live_xml(NASTY).unwrap(), plain);
    let in_qemu = hypervisor.disk_files_in_qemu(NASTY).unwrap();
    assert_eq!((&in_qemu["vda"].file, in_qemu["vda"].backing.len()), (&vda, 2));
    assert_eq!((&in_qemu["vdb"].file, in_qemu["vdb"].backing.len()), (&vdb, 0));

    let overlay = hypervisor.images().join("over lay");
    let diskspec = format!("vda,file={}", overlay.display());
    let args = [
        "--name",
        "s",
        "--disk-only",
        "--no-metadata",
        "--diskspec",
        &diskspec,
        "--diskspec",
        "vdb,snapshot=no",
    ];
    guest.virsh("snapshot-create-as", &args).unwrap();
    let with_overlay = BTreeMap::from([("vda".to_owned(), overlay.clone()), ("vdb".to_owned(), vdb)]);
    assert_eq!(hypervisor.disk_files_in_live_xml(guest.uuid()).unwrap(), with_overlay);
    assert_eq!(hypervisor.disk_files_in_inactive_xml(guest.uuid()).unwrap(), with_overlay);
    let in_qemu = hypervisor.disk_files_in_qemu(NASTY).unwrap();
    assert_eq!((&in_qemu["vda"].file, &in_qemu["vda"].backing[0]), (&overlay, &vda));
    assert!(hypervisor.files_held_by_qemu(NASTY).unwrap().contains(&overlay));
    let new: Vec<PathBuf> = files_in(&hypervisor.images()).unwrap().difference(&before).cloned().collect();
    assert_eq!(new, [PathBuf::from("over lay")]);
    guest.wait_more(3).unwrap();
    let last = |image| ticks_on(image, Format::Qcow2).unwrap().last;
    assert!(last(&overlay) > last(&vda), "the ticks go to the overlay, the base stands still");
    assert!(images_equal(&vda, &overlay).unwrap().is_err());
}

#[test]
fn linked_clones_and_a_second_handle_work_and_root_reaches_the_socket() {
    let hypervisor = Hypervisor::start_temp().unwrap();
    let template =
        Guest::define(&hypervisor, &GuestSpec::new("t").disk(DiskSpec::new(64 * MIB).data(MIB))).unwrap();
    let base = template.disk("vda").unwrap();
    let clone = DiskSpec::new(0).linked_to(&base, Format::Qcow2);
    let spec = GuestSpec::new("clone").disk(clone).machine("pc").network();
    let guest = Guest::boot(&hypervisor, &spec).unwrap();
    guest.wait_tick(3).unwrap();
    assert_eq!(image_info(&guest.disk("vda").unwrap()).unwrap().full_backing_filename, Some(base));

    let other = Hypervisor::attach(hypervisor.dir()).unwrap();
    assert_eq!(Guest::attach(&other, "clone").unwrap().send("ping").unwrap(), "pong");
    drop(other);
    assert_eq!(guest.send("ping").unwrap(), "pong", "a second handle ended the hypervisor");

    let listed = std::process::Command::new("virsh")
        .args(["-c", &hypervisor.socket_uri(), "list", "--name"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "clone", "{listed:?}");
}

#[test]
fn kvm_is_out_of_reach_even_when_it_is_covered_up_by_name_spaces() {
    for hide_kvm in [HideKvm::Auto, HideKvm::Always] {
        let hypervisor = Hypervisor::start_temp_with(&Options { hide_kvm, ..Options::default() }).unwrap();
        let capabilities = hypervisor.virsh(["capabilities"]).unwrap();
        assert!(capabilities.contains("<domain type='qemu'"), "{hide_kvm:?}");
        assert!(!capabilities.contains("<domain type='kvm'"), "{hide_kvm:?}");
        let guest = Guest::boot(&hypervisor, &GuestSpec::two_disks("k")).unwrap();
        guest.wait_tick(1).unwrap();
        let dir = hypervisor.dir().to_owned();
        drop((guest, hypervisor));
        assert_eq!(leftovers(&dir), [""; 0]);
    }
}

#[test]
fn folders_that_cannot_work_are_refused_before_anything_is_made() {
    let long = std::env::temp_dir().join("vk-".to_owned() + &"x".repeat(40));
    assert!(matches!(Hypervisor::start(&long), Err(Error::Folder { .. })));
    std::fs::remove_dir(&long).unwrap();
    let full = tempfile::Builder::new().prefix("vkf").tempdir_in("/tmp").unwrap();
    std::fs::write(full.path().join("mine"), "x").unwrap();
    assert!(matches!(Hypervisor::start(full.path()), Err(Error::Folder { .. })));
    assert_eq!(files_in(full.path()).unwrap().len(), 1);
}

fn testbed(args: &[&str]) -> (bool, String) {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_testbed")).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned();
    (output.status.success(), text)
}

#[test]
fn the_command_line_brings_a_test_bed_up_and_down_in_separate_processes() {
    let folder = tempfile::Builder::new().prefix("vkc").tempdir_in("/tmp").unwrap();
    let (path, dir) = (folder.path().join("b"), folder.path().join("b").display().to_string());
    let (ok, text) =
        testbed(&["up", &dir, "--guest", "g", "--disk", "64M,data=1M,chain=1", "--disk", "raw,64M"]);
    assert!(ok, "{text}");
    let ended = testbed_life(&dir);
    let (ok, text) = testbed(&["down", &dir]);
    assert!(ok, "{text}");
    assert_eq!(leftovers(&path), [""; 0]);
    ended.unwrap();
}

/// What happens between `up` and `down`; a failure must not leave the test bed running.
fn testbed_life(dir: &str) -> std::thread::Result<()> {
    std::panic::catch_unwind(|| {
        assert_eq!(testbed(&["send", dir, "g", "ping"]), (true, "pong".to_owned()));
        assert!(testbed(&["sweep"]).0);
        assert!(testbed(&["wait", dir, "g", "10"]).0, "a sweep ended a test bed that was to stay");
        let (ok, text) = testbed(&["gap", dir, "g", "--", "virsh", "-q", "suspend", "g"]);
        assert!(ok && text.contains("has not ticked since"), "{text}");
        assert!(testbed(&["exec", dir, "--", "virsh", "-q", "resume", "g"]).0);
        assert!(testbed(&["kill", dir, "qemu", "g"]).0);
        let (_, last) = testbed(&["last", dir, "g"]);
        let images = ["vda.qcow2", "vdb.raw"].map(|name| format!("{dir}/images/g-{name}"));
        let (ok, text) = testbed(&["ticks", "--at-least", &last, &images[0], &images[1]]);
        assert!(ok, "{text}");
        assert!(!testbed(&["ticks", &images[1], &images[0]]).0, "disks in the wrong order");
        assert!(!testbed(&["ticks", "--at-least", "99999", &images[0]]).0);
        assert!(!testbed(&["compare", &images[0], &images[1]]).0);
        let (_, text) = testbed(&["status", dir]);
        assert!(text.contains("shut off (crashed)"), "{text}");
    })
}

#[test]
fn what_a_killed_test_left_is_ended_by_the_sweep_and_nothing_else_is() {
    let (left, kept) = (Hypervisor::start_temp().unwrap(), Hypervisor::start_temp().unwrap());
    Guest::boot(&left, &GuestSpec::two_disks("left")).unwrap();
    // As if the owner had been another process of this id, which has ended.
    let file = left.dir().join("testbed.json");
    let mut state: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    state["owner"]["start"] = 1.into();
    std::fs::write(&file, state.to_string()).unwrap();
    let ended = Hypervisor::sweep().unwrap();
    // Another test's start may have swept it first.
    assert!(ended.iter().all(|dir| dir == left.dir()), "{ended:?}");
    assert_eq!(leftovers(left.dir()), [""; 0]);
    assert!(kept.virsh(["list"]).is_ok());
}
