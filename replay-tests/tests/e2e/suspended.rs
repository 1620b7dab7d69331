//! A host that is suspended in the middle of a backup, as far as that can be had without its being suspended: everybody stands
//! still at once for longer than anybody waits, the clocks go on.

use std::time::Duration;

use replay_tests::testbed::ProcessId;
use rustix::process::Signal;

use crate::support::bed::{Bed, in_the_middle, large};

#[test]
fn a_host_that_is_suspended_in_the_middle_of_a_backup_goes_on_with_it() {
    let bed = Bed::boot(&large("web1"));
    let daemon = bed.host.daemon();
    for args in [
        &["snapshot", "web1", "--disk-only", "--bandwidth", "16M"][..],
        &["snapshot", "web1", "--bandwidth", "16M"],
    ] {
        let job = in_the_middle(&bed.host, args);
        let mut all: Vec<ProcessId> = bed.host.hypervisor.processes().into_iter().map(|one| one.id).collect();
        all.extend(ProcessId::of(daemon.pid()));
        all.iter().for_each(|one| one.signal(Signal::STOP));
        // Longer than libvirt's keepalive and any of our waits for an answer.
        std::thread::sleep(Duration::from_secs(35));
        all.iter().rev().for_each(|one| one.signal(Signal::CONT));
        let row = bed.host.at_rest(&job);
        bed.judge(&format!("suspended in {args:?}"), &row);
        assert_eq!(row["status"], "succeeded", "{}", bed.host.story(&job));
    }
    assert_eq!(daemon.end(), Some(0));
    bed.judge_disks();
}
