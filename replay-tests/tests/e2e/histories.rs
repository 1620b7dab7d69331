//! A tour of every workflow, for its histories: each replays on its own, as a file, with no daemon.
//!
//! `VMKEEP_WRITE_HISTORIES=NAME` keeps them in `replay-tests/histories/WORKFLOW@VERSION/NAME-….jsonl`, for every later
//! release to be measured by (`tests/histories.rs`). Kept histories are never changed.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use crate::leftovers::overlay;
use crate::support::bed::{Bed, configure, folder, in_the_middle, small};
use crate::support::{Daemon, Host, built};

const SLOWLY: [&str; 4] = ["snapshot", "web1", "--bandwidth", "8M"];

fn tour(bed: &Bed) {
    let host = &bed.host;
    let daemon = host.daemon();
    bed.guest.wait_tick(10).unwrap();
    for how in [&["--live"][..], &["--disk-only"], &["--save"]] {
        host.ok(&[&["snapshot", "web1"], how].concat());
    }
    let id = host.backups().remove(0)["id"].as_str().unwrap().to_owned();
    host.ok(&["verify", &id]);
    let job = host.backups().remove(0)["job"].as_str().unwrap().to_owned();
    overlay(host, &bed.own["vda"], job.rsplit('-').next().unwrap(), "left", false);
    host.ok(&["doctor", "--repair", "--reason", "the tour"]);
    host.ok(&["restore", &id, "--as", "copy"]);
    host.ok(&["restore", &id, "--as", "cold", "--cold"]);

    // Cut off in the middle, and gone on with; asked to end; and without what it needs.
    let cut_off = in_the_middle(host, &SLOWLY);
    daemon.kill();
    let daemon = host.daemon();
    assert_eq!(host.settled(&cut_off)["status"], "succeeded");
    let cancelled = in_the_middle(host, &SLOWLY);
    host.ok(&["job", "cancel", &cancelled, "--reason", "the tour"]);
    assert_eq!(host.settled(&cancelled)["status"], "cancelled");
    let failed = in_the_middle(host, &SLOWLY);
    bed.remove_unpublished();
    assert_eq!(host.settled(&failed)["status"], "rolled_back");

    let plug = ["--destroy", "--shutdown-time", "0s"];
    let in_place = |more: &[&str]| {
        let job = host.begin(&[&["restore", &id, "--in-place"], &plug[..], more].concat());
        assert_eq!(host.settled(&job)["status"], "succeeded");
        job
    };
    let kept = in_place(&["--save-old"]);
    host.ok(&["restore", "--undo", &kept, "--destroy", "--shutdown-time", "0s"]);
    let kept = in_place(&["--cold"]);
    host.ok(&["restore", "--discard", &kept, "--reason", "the tour"]);

    into_a_vault(bed, daemon);
    let daemon = host.daemon();
    bed.guest.destroy().unwrap();
    host.ok(&["backup", "web1"]);
    host.ok(&["snapshot", "web1"]);
    host.ok(&["delete", &id, "--reason", "the tour"]);
    host.ok(&["prune", "web1", "--keep", "1"]);
    daemon.end();
}

/// Read whole and by what has changed; cut off, asked to end, and without its point in time.
fn into_a_vault(bed: &Bed, daemon: Daemon) {
    let host = &bed.host;
    let first = host.begin(&["backup", "web1"]);
    assert_eq!(host.settled(&first)["status"], "succeeded");
    host.ok(&["backup", "web1"]);
    host.ok(&["restore", &first, "--vault", "main", "--as", "from-the-vault", "--trust-definition"]);
    let slowly = ["backup", "web1", "--full", "--bandwidth", "4M"];
    let cut_off = host.begin(&slowly);
    host.reached(&cut_off, "step_started", "read");
    daemon.kill();
    let daemon = host.daemon();
    assert_eq!(host.settled(&cut_off)["status"], "succeeded");
    let cancelled = host.begin(&slowly);
    host.reached(&cancelled, "step_started", "read");
    host.ok(&["job", "cancel", &cancelled, "--reason", "the tour"]);
    assert_eq!(host.settled(&cancelled)["status"], "cancelled");
    let lost = host.begin(&slowly);
    host.reached(&lost, "step_started", "read");
    bed.guest.virsh("domjobabort", &[]).unwrap();
    assert_eq!(host.settled(&lost)["status"], "rolled_back");
    daemon.end();
}

/// Exports each job into a folder of its workflow; returns the workflows, and how many jobs that were.
fn export(host: &Host, to: &Path, prefix: &str) -> (BTreeSet<String>, usize) {
    let daemon = host.daemon();
    let mut workflows = BTreeSet::new();
    let jobs = host.jobs();
    for (n, row) in jobs.iter().rev().enumerate() {
        let job = row["id"].as_str().unwrap();
        let history = host.history(job);
        let plan = history.iter().find_map(|row| {
            let plan = &row["event"]["body"]["data"]["plan"];
            plan["workflow_version"].as_u64()
        });
        let workflow = row["workflow"].as_str().unwrap();
        let folder = to.join(format!("{workflow}@{}", plan.unwrap_or(1)));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join(format!("{prefix}-{:02}-{}.jsonl", n + 1, row["status"].as_str().unwrap()));
        // What is kept is never written over.
        let mut file = fs::File::create_new(&file).unwrap();
        file.write_all(host.ok(&["audit", "export", "--job", job]).as_bytes()).unwrap();
        workflows.insert(workflow.to_owned());
    }
    daemon.end();
    (workflows, jobs.len())
}

#[test]
fn the_history_of_every_workflow_replays_without_the_daemon_that_wrote_it() {
    let host = Host::new();
    let place = folder(&host, &host.hypervisor.dir().join("state/vault"));
    configure(&host, &format!("[vaults.main]\nurl = \"file://{}\"\n", place.display()));
    host.ok(&["vault", "init", "main", "--plain"]);
    let bed = Bed::boot_on(host, None, &small("web1"));
    tour(&bed);
    let own = tempfile::tempdir().unwrap();
    let kept = std::env::var("VMKEEP_WRITE_HISTORIES").ok();
    let histories = Path::new(env!("CARGO_MANIFEST_DIR")).join("histories");
    let to = if kept.is_some() { histories.as_path() } else { own.path() };
    let (workflows, jobs) = export(&bed.host, to, kept.as_deref().unwrap_or("tour"));
    println!("{workflows:?}");
    for workflow in ["snapshot", "backup", "restore", "restore-vault", "verify", "delete", "prune", "repair"]
    {
        assert!(
            workflows.iter().any(|name| name.starts_with(workflow)),
            "no history of {workflow}: {workflows:?}"
        );
    }
    let replayed = std::process::Command::new(built("vmkeep")).arg("replay").arg(to).output().unwrap();
    assert!(replayed.status.success(), "{}", String::from_utf8_lossy(&replayed.stderr));
    let told = String::from_utf8(replayed.stdout).unwrap();
    assert!(told.lines().count() >= jobs, "a line for each of {jobs} jobs at least:\n{told}");
}
