//! A domain that somebody works on: another job of ours, a job of libvirt's.

use std::fs;
use std::path::PathBuf;

use crate::support::bed::*;
use crate::support::{Host, files_below, until};

#[test]
fn a_domain_that_another_job_of_ours_holds_is_refused_or_waited_for() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let slow = ["snapshot", "web1", "--disk-only", "--bandwidth", "8M"];
    let first = in_the_middle(host, &slow);
    let short = host.job(&first)["short"].as_str().unwrap().to_owned();
    refused(host, &["snapshot", "web1"], 67, &["SUBJECT_BUSY", "web1"]);
    let said = host.vmkeep(&["snapshot", bed.guest.uuid(), "--disk-only"]);
    assert_eq!(said.status.code(), Some(67));
    let said = String::from_utf8_lossy(&said.stderr).into_owned() + &String::from_utf8_lossy(&said.stdout);
    assert!(said.contains(&short), "it names the job {short}: {said}");
    // Waiting in the queue, and given up there.
    let queued = host.begin(&["snapshot", "web1", "--disk-only", "--queue"]);
    let given_up = host.begin(&["snapshot", "web1", "--disk-only", "--queue"]);
    assert_eq!(host.job(&queued)["status"], "queued");
    host.ok(&["job", "cancel", &given_up]);
    assert_eq!(ended(host, &given_up).0, "cancelled");
    assert_eq!(ended(host, &first).0, "succeeded");
    assert_eq!(ended(host, &queued).0, "succeeded");
    bed.assert_back_home();
    assert_eq!(host.backups().len(), 2);
    judge_backup(host, &backup_of(host, &first));
    judge_backup(host, &backup_of(host, &queued));
    for verb in ["cancel", "pause", "resume", "settle", "abandon"] {
        host.fails(&["job", verb, &first], 81, &["INVALID_STATE"]);
    }
}

#[test]
fn a_domain_that_somebody_else_works_on_is_refused() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let _daemon = host.daemon();
    let dir = folder(host, &host.hypervisor.dir().join("elsewhere"));
    let root = default_root(host);
    let busy = |what: &str| {
        for mode in ["--live", "--disk-only"] {
            println!("{what} {mode}");
            refused(host, &["snapshot", "web1", mode], 88, &["DOMAIN_BUSY_ELSEWHERE", "web1"]);
        }
        assert_eq!(files_below(&root), Vec::<PathBuf>::new());
    };
    // A block job.
    let copy = dir.join("mirror.qcow2");
    let copy = copy.to_str().unwrap();
    bed.guest
        .virsh("blockcopy", &["vda", copy, "--transient-job", "--bytes", "--bandwidth", "65536"])
        .unwrap();
    busy("block copy");
    bed.guest.virsh("blockjob", &["vda", "--abort"]).unwrap();
    // A backup of libvirt's own.
    let xml = dir.join("backup.xml");
    let scratch = dir.join("scratch");
    fs::write(
        &xml,
        format!(
            "<domainbackup mode='pull'><server transport='unix' socket='{0}/nbd'/><disks>\
             <disk name='vda' backup='yes' type='file'><scratch file='{1}'/></disk><disk name='vdb' backup='no'/></disks>\
             </domainbackup>",
            dir.display(),
            scratch.display()
        ),
    )
    .unwrap();
    bed.guest.virsh("backup-begin", &[xml.to_str().unwrap()]).unwrap();
    busy("backup");
    bed.guest.virsh("domjobabort", &[]).unwrap();
    until("the backup to be over", || {
        bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None").then_some(())
    });
    bed.assert_back_home();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
}

/// Two daemons with two stores know nothing of each other's locks: the marker in the domain keeps them apart, also when
/// the one that set it is dead.
#[test]
fn a_vmkeepd_with_another_store_keeps_off_a_domain_until_the_first_is_through_with_it() {
    let bed = Bed::boot(&large("web1"));
    let host = &bed.host;
    let first = host.daemon();
    let _second = host.second_daemon();
    let by_second = |args: &[&'static str]| [&Host::SECOND[..], args].concat();
    let keeps_off = |when: &str| {
        for mode in ["--live", "--disk-only", "--dry-run"] {
            println!("{when} {mode}");
            let words = &["FOREIGN_MARKER", "web1"];
            refused(host, &by_second(&["snapshot", "web1", mode]), 89, words);
        }
    };
    let job = in_the_middle(host, &["snapshot", "web1", "--disk-only", "--bandwidth", "8M"]);
    keeps_off("while it is copied");
    first.kill();
    keeps_off("while its vmkeepd is dead");
    let _first = host.daemon();
    assert_eq!(ended(host, &job).0, "succeeded", "{}", host.ok(&["job", "explain", &job]));
    bed.assert_back_home();
    judge_backup(host, &backup_of(host, &job));
    host.ok(&by_second(&["snapshot", "web1", "--disk-only"]));
    bed.assert_back_home();
    assert_eq!(host.backups().len(), 1, "the second has a catalogue of its own");
}
