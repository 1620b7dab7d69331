//! A QEMU that does not answer costs nobody but its own domain: vmkeepd comes up, other guests are backed up, and what
//! it held is set free as soon as it answers again.

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB, Process};
use rustix::process::Signal;

use crate::holds::{JOB, boot, hold, store_of};
use crate::support::{Host, about, assert_untouched, disks, until};

/// Stops the very process, as storage that hangs does; lets it go on when dropped.
struct Stopped(Process);

impl Stopped {
    fn new(guest: &Guest) -> Self {
        let process = guest.hypervisor().qemu(guest.name()).unwrap();
        process.id.signal(Signal::STOP);
        Self(process)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.id.signal(Signal::CONT);
    }
}

fn obstacle(host: &Host, domain: &str) -> String {
    let domains = host.json(&["domains"]);
    let row = domains.as_array().unwrap().iter().find(|row| row["name"] == domain).unwrap().clone();
    row["obstacle"]["cause"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_qemu_that_does_not_answer_holds_up_neither_vmkeepd_nor_other_guests_and_is_set_free_when_it_does() {
    let host = Host::new();
    let (held, well) = (boot(&host, "held"), boot(&host, "well"));
    let own = disks(&well);
    let daemon = host.daemon();
    let store = store_of(&host);
    daemon.kill();
    hold(&held, &store, JOB);
    let stopped = Stopped::new(&held);

    let _daemon = host.daemon();

    assert!(obstacle(&host, "held").contains("does not answer"), "{}", host.log());
    assert!(host.ok(&["status"]).contains("warning: held: "));
    host.fails(&["snapshot", "held", "--disk-only"], 22, &["does not answer", "goes on trying"]);
    host.ok(&["snapshot", "well", "--disk-only"]);
    assert_untouched(&well, &own);

    drop(stopped);

    until("the guest to be set free", || {
        (held.state().unwrap().state == "running" && obstacle(&host, "held").is_empty()).then_some(())
    });
    held.wait_more(3).unwrap();
    assert!(!held.virsh("dumpxml", &[]).unwrap().contains("hold="), "the hold is over");
    host.ok(&["snapshot", "held", "--disk-only"]);
}

#[test]
fn a_job_whose_guest_does_not_answer_waits_for_it_and_the_jobs_of_others_go_on() {
    let host = Host::new();
    let spec = |name: &str| GuestSpec::new(name).disk(DiskSpec::new(96 * MIB).data(40 * MIB));
    let guests = ["held", "well"].map(|name| Guest::boot(&host.hypervisor, &spec(name)).unwrap());
    let [held, well] = &guests;
    let own = guests.each_ref().map(disks);
    for guest in &guests {
        guest.wait_tick(3).unwrap();
    }
    let daemon = host.daemon();
    let store = store_of(&host);
    let jobs =
        ["held", "well"].map(|name| host.begin(&["snapshot", name, "--disk-only", "--bandwidth", "4M"]));
    for job in &jobs {
        host.reached(job, "step_started", "copy/vda.qcow2");
    }
    daemon.kill();
    // As if it had ended in the middle of the way back.
    hold(held, &store, &jobs[0]);
    let stopped = Stopped::new(held);

    let _daemon = host.daemon();

    assert_eq!(host.settled(&jobs[1])["status"], "succeeded");
    well.wait_more(3).unwrap();
    let begun = host.history(&jobs[0]).len();
    assert!(!host.history(&jobs[0]).iter().any(|row| about(row, "job_recovered", "")));

    drop(stopped);

    assert_eq!(host.settled(&jobs[0])["status"], "succeeded");
    let history = host.history(&jobs[0]);
    assert!(about(&history[begun], "job_recovered", ""), "{:#}", history[begun]);
    assert!(history.iter().any(|row| about(row, "intervened", "")), "what was done is in its journal");
    for (guest, own) in guests.iter().zip(&own) {
        assert_untouched(guest, own);
    }
}
