//! Backups into a vault while everything around them gives way: QEMU drops the point in time, the vault goes, is full or is
//! another one, disks change places and sizes, the guest goes off. A backup succeeds only if it is what the disks held, and
//! nobody has to wait for one that failed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};
use serde_json::{Value, json};

use crate::killed::at_every_boundary;
use crate::support::bed::{Bed, configure, define, ended, folder, large, refused, small};
use crate::support::mount::Mount;
use crate::support::{Host, files_below, run, until};
use crate::vault::{backed_up, bed, checkpoints, disk_of, holds, judge, recorded};

/// Asks QEMU itself, whose monitor is free as long as there is no libvirtd.
fn ask_qemu(bed: &Bed, commands: &[Value]) -> Vec<Value> {
    let files = files_below(bed.host.hypervisor.dir());
    let socket = files.iter().find(|path| path.ends_with("monitor.sock")).unwrap();
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let mut ask = |command: &Value| {
        writeln!(stream, "{command}").unwrap();
        let answers = lines.by_ref().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let mut answers = answers.filter(|line| line.get("return").is_some() || line.get("error").is_some());
        answers.next().unwrap()["return"].take()
    };
    ask(&json!({ "execute": "qmp_capabilities" }));
    commands.iter().map(ask).collect()
}

/// How many bytes of the disks were read, and of how many.
pub(crate) fn read(host: &Host, job: &str) -> (u64, u64) {
    let detail = host.json(&["job", "show", job]);
    let step =
        detail["steps"].as_array().unwrap().iter().find(|step| step["name"] == "read").unwrap().clone();
    let bytes = |name: &str| step["progress"][name].as_u64();
    (bytes("done").unwrap_or(0), bytes("total").unwrap_or(u64::MAX))
}

/// A guest, and an empty vault on a file system of its own.
fn bed_with_vault_on(mount: impl FnOnce(&Host) -> Option<Mount>) -> Option<Bed> {
    let host = Host::new();
    let mount = mount(&host)?;
    let place = folder(&host, &mount.0.join("vault"));
    configure(&host, &format!("[vaults.main]\nurl = \"file://{}\"\n", place.display()));
    host.ok(&["vault", "init", "main", "--plain"]);
    Some(Bed::boot_on(host, Some(mount), &large("web1")))
}

#[test]
fn a_backup_whose_point_in_time_qemu_has_dropped_unnoticed_does_not_succeed() {
    let bed = bed(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = host.begin(&["backup", "web1", "--bandwidth", "16M"]);
    host.reached(&job, "step_started", "read");
    until("some of it to be read", || (read(host, &job).0 > 0).then_some(()));
    // Nobody is there to end the exports with the jobs: from here on they show what the guest writes.
    host.hypervisor.kill_libvirtd().unwrap();
    let jobs = ask_qemu(&bed, &[json!({ "execute": "query-block-jobs" })]).remove(0);
    let cancel = |job: &Value| json!({ "execute": "block-job-cancel", "arguments": { "device": job["device"], "force": true } });
    let cancels: Vec<Value> = jobs.as_array().unwrap().iter().map(cancel).collect();
    assert_eq!(cancels.len(), 2, "{jobs:#}");
    ask_qemu(&bed, &cancels);
    // After the first disk it is asked whether its block job stands, and libvirtd waited for.
    until("the first disk to be read", || (read(host, &job).0 >= 128 * MIB).then_some(()));
    host.hypervisor.start_libvirtd().unwrap();
    host.settled(&job);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 221), "{}", host.story(&job));
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    bed.assert_back_home();
    let (again, then) = backed_up(&bed, "again", &[]);
    holds(&bed, &again, "again", &then);
}

#[test]
fn a_vault_that_is_full_or_read_only_in_the_middle_costs_that_backup_and_holds_nothing() {
    let Some(bed) = bed_with_vault_on(|host| Mount::on_disk(host, "vaults", 300)) else { return };
    let (host, mount) = (&bed.host, bed.mount());
    let _daemon = host.daemon();
    let begin = || {
        let job = host.begin(&["backup", "web1", "--bandwidth", "16M"]);
        host.reached(&job, "step_started", "read");
        job
    };
    let failed = |job: &str, code: u64| {
        host.settled(job);
        assert_eq!(ended(host, job), ("rolled_back".to_owned(), code), "{}", host.story(job));
        assert_eq!(checkpoints(&bed), Vec::<String>::new());
        bed.assert_back_home();
    };
    let job = begin();
    mount.fill(0);
    failed(&job, 47);
    mount.clear();
    let job = begin();
    mount.read_only(true);
    failed(&job, 194);
    mount.read_only(false);
    let (again, then) = backed_up(&bed, "again", &[]);
    holds(&bed, &again, "again", &then);
    host.ok(&["vault", "check", "main"]);
}

#[test]
fn a_vault_that_was_moved_away_is_not_written_to_and_what_is_at_its_place_then_is() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let place = host.hypervisor.dir().join("state/vault");
    let aside = place.with_file_name("aside");
    let backups = |at: &PathBuf| files_below(&at.join("backups")).len();
    backed_up(&bed, "first", &[]);
    std::fs::rename(&place, &aside).unwrap();
    refused(host, &["backup", "web1"], 193, &["VAULT_UNREACHABLE", "mounted"]);
    run("cp", &["-a", aside.to_str().unwrap(), place.to_str().unwrap()]);
    let (second, then) = backed_up(&bed, "second", &[]);
    assert_eq!((backups(&aside), backups(&place)), (1, 2));
    holds(&bed, &second, "second", &then);
    bed.assert_back_home();
}

#[test]
fn a_guest_that_is_saved_as_soon_as_the_backup_lets_it_needs_nobodys_attention() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    backed_up(&bed, "first", &[]);
    let job = host.begin(&["backup", "web1", "--full", "--bandwidth", "16M"]);
    host.reached(&job, "step_started", "read");
    // libvirt lets it wait for the end of the pull, for half a minute.
    bed.guest.virsh("managedsave", &[]).unwrap();
    assert_eq!(host.settled(&job)["status"], "succeeded", "{}", host.story(&job));
    bed.guest.virsh("start", &[]).unwrap();
    bed.guest.wait_more(3).unwrap();
    let (again, then) = backed_up(&bed, "again", &[]);
    assert!(disk_of(host, &again, "vda")["unchanged_since"].is_string(), "the bitmap was saved too");
    holds(&bed, &again, "again", &then);
    assert_eq!(checkpoints(&bed).len(), 2, "what could not be deleted then is gone");
    bed.assert_back_home();
}

#[test]
fn what_an_operator_does_with_the_guest_meanwhile_is_neither_undone_nor_in_the_way() {
    let bed = bed(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let begin = |bandwidth| {
        let job = host.begin(&["backup", "web1", "--bandwidth", bandwidth]);
        host.reached(&job, "step_started", "read");
        job
    };
    let job = begin("1M");
    let aborted = bed.guest.virsh("domjobabort", &[]);
    assert!(aborted.is_ok(), "{aborted:?}\n{}", host.story(&job));
    host.settled(&job);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 221), "{}", host.story(&job));
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    bed.assert_back_home();
    let job = begin("16M");
    bed.guest.virsh("suspend", &[]).unwrap();
    assert_eq!(host.settled(&job)["status"], "succeeded", "{}", host.story(&job));
    host.ok(&["backup", "web1"]);
    assert_eq!(bed.guest.state().unwrap().state, "paused", "the operator's word stands");
    bed.guest.virsh("resume", &[]).unwrap();
    bed.assert_back_home();
}

#[test]
fn a_disk_that_is_resized_discarded_snapshotted_and_merged_between_backups_comes_back_as_it_was() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let back_up = |name: &str| {
        let (row, then) = backed_up(&bed, name, &[]);
        holds(&bed, &row, name, &then);
        disk_of(host, &row, "vda")
    };
    let is_incremental = |disk: Value| assert!(disk["unchanged_since"].is_string(), "{disk:#}");
    let resize = |sizes: &[&str]| {
        bed.guest.virsh("suspend", &[]).unwrap();
        for size in sizes {
            bed.guest.virsh("blockresize", &["vda", size]).unwrap();
        }
        bed.guest.virsh("resume", &[]).unwrap();
    };
    bed.guest.send("fill vda 50M 4M 3").unwrap();
    back_up("first");
    resize(&["48M", "64M"]);
    let disk = back_up("shrunk and grown again");
    assert!(disk["whole_because"].as_str().unwrap().contains("calls clean what has changed"), "{disk:#}");
    resize(&["96M"]);
    is_incremental(back_up("grown"));
    bed.guest.send("fill vda 70M 4M 3").unwrap();
    is_incremental(back_up("filled"));
    resize(&["64M"]);
    is_incremental(back_up("shrunk"));
    bed.guest.send("discard vda 12M 1M").unwrap();
    bed.guest.send("zero vda 14M 1M").unwrap();
    is_incremental(back_up("discarded"));
    for (place, more) in [("20M", &["--disk-only"][..]), ("21M", &[])] {
        host.ok(&[&["snapshot", "web1"], more].concat());
        bed.guest.send(&format!("fill vda {place} 1M 9")).unwrap();
        is_incremental(back_up(&format!("after a snapshot, {place}")));
    }
    bed.guest.virsh("snapshot-create-as", &["--name", "s1", "--disk-only", "--no-metadata"]).unwrap();
    bed.guest.send("fill vda 22M 1M 9").unwrap();
    host.ok(&["backup", "web1"]);
    for disk in ["vda", "vdb"] {
        bed.guest.virsh("blockcommit", &[disk, "--active", "--pivot", "--wait"]).unwrap();
    }
    bed.guest.send("fill vda 23M 1M 9").unwrap();
    let disk = back_up("on its own image again");
    assert!(disk["whole_because"].as_str().unwrap().contains("another file"), "{disk:#}");
    host.ok(&["vault", "check", "main"]);
}

#[test]
fn disks_that_have_changed_places_are_read_whole_and_those_that_take_turns_by_what_has_changed() {
    let plain = |data| DiskSpec::new(32 * MIB).plain().data(data * MIB);
    let spec =
        GuestSpec::new("web1").disk(DiskSpec::new(64 * MIB).data(6 * MIB)).disk(plain(4)).disk(plain(8));
    let mut bed = bed(&spec);
    let _daemon = bed.host.daemon();
    backed_up(&bed, "first", &[]);
    bed.guest.send("fill vdb 20M 1M 3").unwrap();
    bed.guest.shutdown().unwrap();
    let (b, c) = (bed.own["vdb"].clone(), bed.own["vdc"].clone());
    let (b_text, c_text) = (b.to_str().unwrap(), c.to_str().unwrap());
    let xml = bed.guest.virsh("dumpxml", &["--inactive"]).unwrap();
    define(&bed.host, &xml.replace(b_text, "neither").replace(c_text, b_text).replace("neither", c_text));
    bed.own.extend([("vdb".to_owned(), c), ("vdc".to_owned(), b)]);
    bed.guest.start().unwrap();
    let (second, then) = backed_up(&bed, "second", &[]);
    let why = |disk: &str| disk_of(&bed.host, &second, disk)["whole_because"].clone();
    assert_eq!(why("vda"), Value::Null);
    assert!(["vdb", "vdc"].iter().all(|disk| why(disk).as_str().unwrap().contains("another file")));
    holds(&bed, &second, "second", &then);
    for (name, disks) in [("third", "vda"), ("fourth", "vdb,vdc"), ("fifth", "vda,vdb,vdc")] {
        bed.guest.send("fill vdb 21M 1M 5").unwrap();
        bed.guest.send("fill vdc 22M 1M 6").unwrap();
        let (row, mut then) = backed_up(&bed, name, &["--disks", disks]);
        then.retain(|disk, _| disks.contains(disk.as_str()));
        for disk in disks.split(',') {
            let disk = disk_of(&bed.host, &row, disk);
            assert!(disk["unchanged_since"].is_string(), "{name}: {disk:#}");
        }
        holds(&bed, &row, name, &then);
    }
}

#[test]
fn two_vaults_and_two_daemons_take_turns_and_none_disturbs_the_others_checkpoints() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let [place, other] = ["vault", "other"].map(|name| host.hypervisor.dir().join("state").join(name));
    folder(host, &other);
    let vaults = [("main", &place), ("other", &other)]
        .map(|(name, at)| format!("[vaults.{name}]\nurl = \"file://{}\"\n", at.display()));
    configure(host, &vaults.concat());
    host.ok(&["vault", "init", "other", "--plain"]);
    let _daemon = host.daemon();
    for (round, vault) in ["main", "other", "main", "other"].iter().enumerate() {
        let job = host.begin(&["backup", "web1", "--vault", vault]);
        let row = host.settled(&job);
        let since = &disk_of(host, &row, "vda")["unchanged_since"];
        assert_eq!(since.is_string(), round > 1, "{round}: {since}");
    }
    assert_eq!(checkpoints(&bed).len(), 4);
    let _second = host.second_daemon();
    let by_second = [&Host::SECOND[..], &["backup", "web1", "--vault", "main"]].concat();
    let job = host.begin(&["backup", "web1", "--vault", "main", "--full", "--bandwidth", "2M"]);
    host.reached(&job, "step_started", "read");
    refused(host, &by_second, 89, &["FOREIGN_MARKER"]);
    host.ok(&["job", "cancel", &job]);
    assert_eq!(host.settled(&job)["status"], "cancelled", "{}", host.story(&job));
    host.ok(&by_second);
    let (last, then) = backed_up(&bed, "last", &["--vault", "main"]);
    assert!(disk_of(host, &last, "vda")["unchanged_since"].is_string());
    holds(&bed, &last, "last", &then);
    bed.assert_back_home();
}

#[test]
fn a_parent_that_is_pruned_and_a_collection_beside_the_backup_cost_it_nothing_and_a_revoked_lease_only_itself()
 {
    let bed = bed(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let (first, _) = backed_up(&bed, "first", &[]);
    let begin = || {
        bed.guest.send("fill vda 60M 4M 9").unwrap();
        bed.guest.virsh("suspend", &[]).unwrap();
        let then = recorded(&bed, "then");
        let job = host.begin(&["backup", "web1", "--bandwidth", "8M"]);
        host.reached(&job, "step_started", "read");
        bed.guest.virsh("resume", &[]).unwrap();
        (job, then)
    };
    let (job, _) = begin();
    let leases = host.json(&["vault", "leases", "main"]);
    for lease in leases.as_array().unwrap() {
        host.ok(&["vault", "revoke", "main", lease["id"].as_str().unwrap()]);
    }
    host.settled(&job);
    assert_eq!(ended(host, &job), ("rolled_back".to_owned(), 204), "{}", host.story(&job));
    bed.assert_back_home();
    let (job, then) = begin();
    host.ok(&["vault", "prune", "main", first["id"].as_str().unwrap(), "--last"]);
    let program = host.hypervisor.dir().join("bin/vmkeep");
    let collection = host.hypervisor.command(program).args(["vault", "gc", "main"]).spawn().unwrap();
    let row = host.settled(&job);
    assert_eq!(row["status"], "succeeded", "{}", host.story(&job));
    assert!(collection.wait_with_output().unwrap().status.success());
    holds(&bed, &row, "beside a collection", &then);
    host.ok(&["vault", "check", "main"]);
    let (after, then) = backed_up(&bed, "after", &[]);
    holds(&bed, &after, "after", &then);
}

#[test]
fn a_backup_that_is_cancelled_at_any_step_leaves_nothing_or_is_whole() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    for step in ["mark", "lease", "begin", "read", "end", "commit", "forget"] {
        for kind in ["step_started", "step_succeeded"] {
            let job = host.begin(&["backup", "web1"]);
            host.reached(&job, kind, step);
            // It may have ended, or may be past the point from which there is no way back.
            let _ = host.vmkeep(&["job", "cancel", &job]);
            let status = host.settled(&job)["status"].clone();
            assert!(["cancelled", "succeeded"].contains(&status.as_str().unwrap()), "{}", host.story(&job));
            bed.assert_back_home();
            let listed = host.json(&["vault", "list", "main"]).to_string();
            for checkpoint in checkpoints(&bed) {
                let made_with = checkpoint.rsplit('-').next().unwrap();
                assert!(listed.contains(made_with), "{kind} {step}: checkpoint {checkpoint} of no backup");
            }
        }
    }
    host.ok(&["vault", "check", "main"]);
    assert_eq!(host.json(&["vault", "leases", "main"]), json!([]));
}

#[test]
fn vmkeepd_killed_after_every_event_of_a_backup_leaves_it_whole_or_gone_and_the_guest_alone() {
    let bed = bed(&small("web1"));
    at_every_boundary("after", "backup", &bed.host, &["backup", "web1"], |case, row| judge(&bed, case, row));
}
