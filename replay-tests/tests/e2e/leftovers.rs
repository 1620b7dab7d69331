//! What jobs have left behind: `doctor` tells all of it with its owner, `doctor --repair` takes away what nobody can miss,
//! and nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use replay_tests::testbed::MIB;
use serde_json::Value;

use crate::holds::store_of;
use crate::support::bed::*;
use crate::support::{Host, about, files_below};

/// An overlay as a job makes it; with data in it if that is asked for.
pub(crate) fn overlay(host: &Host, base: &Path, job: &str, disk: &str, data: bool) -> PathBuf {
    let path = base.parent().unwrap().join(format!("vmkeep-{job}-{disk}.qcow2"));
    let (base, at) = (base.to_str().unwrap(), path.to_str().unwrap());
    host.hypervisor.run("qemu-img", ["create", "-q", "-f", "qcow2", at, "64M"]).unwrap();
    if data {
        host.hypervisor.run("qemu-io", ["-c", "write -P 7 0 64k", at]).unwrap();
    }
    // The guest has the base open.
    host.hypervisor.run("qemu-img", ["rebase", "-u", "-F", "qcow2", "-b", base, at]).unwrap();
    path
}

pub(crate) fn note(bed: &Bed, marker: &str) {
    for which in ["--live", "--config"] {
        let args = ["--uri", "urn:vmkeep:job:1", "--key", "vmkeep", which, "--set", marker];
        bed.guest.virsh("metadata", &args).unwrap();
    }
}

/// What the doctor says about leftovers: grade, text and remedy of each.
pub(crate) fn told(host: &Host) -> Vec<(String, String, String)> {
    let output = host.vmkeep(&["--json", "doctor"]);
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let text = |finding: &Value, what: &str| finding[what].as_str().unwrap().to_owned();
    let ours = all.iter().filter(|finding| finding["topic"] == "leftovers");
    ours.map(|one| (text(one, "grade"), text(one, "text"), text(one, "remedy"))).collect()
}

pub(crate) fn about_it<'a>(
    told: &'a [(String, String, String)],
    words: &[&str],
) -> &'a (String, String, String) {
    let found = told.iter().find(|(_, text, _)| words.iter().all(|word| text.contains(word)));
    found.unwrap_or_else(|| panic!("nothing about {words:?}: {told:#?}"))
}

/// As a job that was given up in the middle of its reading leaves them.
#[test]
fn a_backup_job_and_scratch_files_of_a_job_that_is_over_are_told_and_ended() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = host.begin(&["snapshot", "web1", "--disk-only"]);
    assert_eq!(host.settled(&job)["status"], "succeeded");
    let short = job.rsplit('-').next().unwrap().to_owned();
    let state = host.hypervisor.dir().join("state");
    let scratch = |disk: &str| host.hypervisor.images().join(format!("vmkeep-{short}-{disk}.scratch"));
    let xml = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{}'/><disks><disk name='vda' backup='yes' \
         type='file'><driver type='qcow2'/><scratch file='{}'/></disk><disk name='vdb' backup='no'/></disks></domainbackup>",
        state.join("left.nbd").display(),
        scratch("vda").display()
    );
    let order = state.join("left.xml");
    fs::write(&order, xml).unwrap();
    give(host, &order);
    bed.guest.virsh("backup-begin", &["--backupxml", order.to_str().unwrap()]).unwrap();
    fs::write(scratch("vdb"), b"what was overwritten").unwrap();
    give(host, &scratch("vdb"));

    let told = told(host);
    assert_eq!(about_it(&told, &["a backup job on web1", &short]).0, "bad");
    about_it(&told, &["the scratch file", "vdb.scratch", &short]);
    host.ok(&["doctor", "--repair"]);
    assert!(bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None"));
    assert!(!scratch("vda").exists() && !scratch("vdb").exists());
    bed.guest.wait_more(3).unwrap();
    bed.assert_back_home();
}

#[test]
fn the_doctor_tells_what_is_left_and_whose_and_takes_away_what_nobody_can_miss() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    assert_eq!(about_it(&told(host), &["no job has left anything"]).0, "good");
    let job = host.begin(&["snapshot", "web1", "--disk-only"]);
    assert_eq!(host.settled(&job)["status"], "succeeded");
    let short = job.rsplit('-').next().unwrap().to_owned();
    let (base, store) = (bed.own["vda"].clone(), store_of(host));

    // As that job could have left them, had it been given up.
    let empty = overlay(host, &base, &short, "empty", false);
    let full = overlay(host, &base, &short, "full", true);
    let strangers = overlay(host, &base, "0123456789ab", "vda", false);
    let folders = ["20260131T235959Z", "20260201T235959Z"].map(|instant| {
        let folder = folder(host, &default_root(host).join("web1").join(format!("{instant}-{short}")));
        fs::write(folder.join("vda.qcow2"), b"half").unwrap();
        give(host, &folder.join("vda.qcow2"));
        folder
    });
    fs::write(folders[1].join("memory.save"), b"the only one").unwrap();
    give(host, &folders[1].join("memory.save"));
    note(&bed, &format!("<job store='{store}' job='{job}'/>"));
    crate::holds::hold(&bed.guest, &store, &job);

    let before = told(host);
    for words in [["web1", "stopped or frozen"], ["the note in web1", short.as_str()]] {
        assert!(about_it(&before, &words).2.contains("--repair"), "{before:#?}");
    }
    assert_eq!(about_it(&before, &["stopped or frozen"]).0, "bad");
    assert!(
        about_it(&before, &[empty.to_str().unwrap(), "holds nothing", "over (succeeded)"])
            .2
            .contains("--repair")
    );
    assert!(!about_it(&before, &[full.to_str().unwrap(), "holds data"]).2.contains("--repair"));
    assert!(!about_it(&before, &["0123456789ab", "does not know"]).2.contains("--repair"));

    let files = || (files_below(&host.hypervisor.images()), files_below(&default_root(host)));
    let as_it_was = files();
    let plan = host.ok(&["doctor", "--repair", "--dry-run"]);
    for words in ["set the guest of web1 free", "remove the note", empty.to_str().unwrap()] {
        assert!(plan.contains(words), "{plan}");
    }
    assert_eq!(files(), as_it_was);
    assert_eq!(bed.guest.state().unwrap().state, "paused");

    // vmkeepd dies in the middle, before and after an act is in the journal.
    daemon.kill();
    for at in ["append/before/repair/4", "append/after/repair/5"] {
        let mut doomed = host.daemon_that_dies(Some(at));
        host.until_ready();
        // The pass at the start has set the guest free: it is held once more.
        crate::holds::hold(&bed.guest, &store, &job);
        let _ = host.vmkeep(&["doctor", "--repair", "--no-wait"]);
        assert!(doomed.dies_or(|| false));
        let daemon = host.daemon();
        for row in host.jobs().iter().filter(|row| row["workflow"] == "repair") {
            let id = row["id"].as_str().unwrap();
            assert_eq!(host.settled(id)["status"], "succeeded", "{}", host.story(id));
            host.ok(&["replay", id]);
        }
        daemon.kill();
    }
    let _daemon = host.daemon();
    // What was looked at and stays is offered again, and looked at again.
    host.ok(&["doctor", "--repair", "--reason", "tidying up"]);

    assert!(!empty.exists() && !folders[0].exists());
    assert!(full.exists() && strangers.exists(), "an overlay with data, and one of an unknown job");
    assert!(folders[1].join("memory.save").exists() && folders[1].join("vda.qcow2").exists());
    let after = told(host);
    assert!(
        after.iter().all(|(_, text, _)| !text.contains("stopped or frozen") && !text.contains("the note"))
    );
    let last = host.jobs().iter().find(|row| row["workflow"] == "repair").unwrap()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let history = host.history(&last);
    let memory = history.iter().filter(|row| about(row, "step_succeeded", ""));
    assert!(memory.into_iter().any(|row| row.to_string().contains("only one of its kind")), "{history:#?}");
    for left in [&full, &strangers] {
        fs::remove_file(left).unwrap();
    }
    fs::remove_dir_all(&folders[1]).unwrap();
    bed.assert_back_home();
}

/// As a restore that was given up leaves them: a file under its hidden name, and one that has got its own.
#[test]
fn files_that_a_restore_has_left_are_told_with_their_job_and_only_its_hidden_ones_go() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = host.begin(&["snapshot", "web1", "--disk-only"]);
    assert_eq!(host.settled(&job)["status"], "succeeded");
    let short = job.rsplit('-').next().unwrap().to_owned();
    let place = folder(host, &default_root(host).join("restored"));
    let file = |name: String| {
        let path = place.join(name);
        fs::write(&path, b"half").unwrap();
        give(host, &path);
        path
    };
    let hidden = file(format!(".vmkeep-{short}-0123456789abcdef"));
    let strangers = file(".vmkeep-0123456789ab-0123456789abcdef".to_owned());
    let theirs = file("web1-vda.qcow2".to_owned());
    // Beside the images, as a restore in place writes.
    let beside = host.hypervisor.images().join(format!(".vmkeep-{short}-fedcba9876543210"));
    fs::write(&beside, b"half").unwrap();
    give(host, &beside);

    let before = told(host);
    for path in [&hidden, &beside] {
        let (_, text, remedy) = about_it(&before, &["unfinished file", path.to_str().unwrap(), &short]);
        assert!(remedy.contains("--repair"), "{text}: {remedy}");
    }
    let (_, _, remedy) = about_it(&before, &[strangers.to_str().unwrap(), "does not know"]);
    assert!(!remedy.contains("--repair"), "{remedy}");
    assert!(before.iter().all(|(_, text, _)| !text.contains("web1-vda.qcow2")), "{before:#?}");
    host.ok(&["doctor", "--repair"]);
    assert!(!hidden.exists() && !beside.exists());
    assert!(strangers.exists() && theirs.exists());
    fs::remove_dir_all(&place).unwrap();
    bed.assert_back_home();
}

/// Whatever an unfinished job has made is its own.
#[test]
fn nothing_of_a_job_that_is_not_over_is_touched() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "2M"]);
    let short = job.rsplit('-').next().unwrap().to_owned();
    let told = told(host);
    for words in ["the overlay", "stands on the overlay", "is no backup", "the note in web1"] {
        let (grade, text, remedy) = about_it(&told, &[words, &short, "not over"]);
        assert!(grade == "note" && remedy.contains("settles that itself"), "{text}: {remedy}");
    }
    let before = files_below(&host.hypervisor.images());
    assert!(host.ok(&["doctor", "--repair"]).contains("nothing that can safely be taken away"));
    assert_eq!(files_below(&host.hypervisor.images()), before);
    assert!(copied(host, &job) < 48 * MIB, "the backup has ended too early for this to prove anything");
    assert_eq!(host.settled(&job)["status"], "succeeded");
    bed.assert_back_home();
    judge_backup(host, &host.backups()[0]);
}
