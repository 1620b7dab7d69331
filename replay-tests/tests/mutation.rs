//! The tests can fail: each of these faults is committed on purpose, and the tests that must catch it do.
//!
//!     cargo test -p replay-tests --features mutation --test mutation -- --ignored --nocapture
//!
//! Takes some minutes, since it builds and runs tests of other crates. Each runs twice: without the fault it passes, with it
//! it fails.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

/// A fault, and who must catch it.
struct Mutation {
    /// By which `vmkeep_workflow::mutation::on` knows it.
    name: &'static str,
    what: &'static str,
    family: &'static str,
    package: &'static str,
    /// The test program, and the test in it.
    test: (&'static str, &'static str),
}

const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "fsync-left-out",
        what: "an fsync left out (of a backup's definition)",
        family: "power cut",
        package: "replay-tests",
        test: ("powercut", "backups::a_power_cut_leaves_a_backup_whole_or_none_at_all"),
    },
    Mutation {
        name: "sled-unsynced",
        what: "sled without our fdatasync",
        family: "power cut",
        package: "replay-tests",
        test: ("powercut", "stores::a_power_cut_costs_an_aged_sled_store_nothing_that_was_acknowledged"),
    },
    Mutation {
        name: "undo-skipped",
        what: "an undo skipped",
        family: "crash at every boundary (engine)",
        package: "vmkeep-workflow",
        test: ("engine", "a_job_cut_off_before_or_after_any_append_goes_on_to_the_same_end"),
    },
    Mutation {
        name: "event-after-effect",
        what: "an event written after its effect",
        family: "crash at every boundary (engine)",
        package: "vmkeep-workflow",
        test: ("engine", "no_effect_is_there_before_the_event_that_announces_it"),
    },
    Mutation {
        name: "probe-by-xml",
        what: "a probe by XML only",
        family: "steps on a made-up hypervisor",
        package: "vmkeep-steps",
        test: (
            "",
            "snapshot::tests::way_back::a_domain_that_libvirt_is_wrong_about_is_committed_through_the_monitor",
        ),
    },
    Mutation {
        name: "pivot-running",
        what: "a pivot without suspending",
        family: "crash at every call (steps)",
        package: "vmkeep-steps",
        test: (
            "",
            "snapshot::tests::way_back::the_guest_stands_still_from_before_the_first_pivot_until_the_definition_is_durable",
        ),
    },
    Mutation {
        name: "switched-late",
        what: "the definition switched after the snapshot",
        family: "steps on a made-up hypervisor",
        package: "vmkeep-steps",
        test: ("", "snapshot::tests::act::the_definition_names_the_overlays_durably_and_can_be_put_back"),
    },
    Mutation {
        name: "stale-memory",
        what: "memory restored onto a written overlay",
        family: "steps on a made-up hypervisor",
        package: "vmkeep-steps",
        test: ("", "save::tests::a_state_is_loaded_only_onto_disks_that_are_as_they_were"),
    },
];

/// Whether the test passes, and the end of what it said.
fn passes(one: &Mutation, fault: Option<&str>) -> (bool, String) {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(workspace).args(["test", "-q", "-p", one.package, "--all-features"]);
    match one.test.0 {
        "" => command.arg("--lib"),
        program => command.args(["--test", program]),
    };
    command.args(["--", "--exact", one.test.1]);
    // The same choices each time.
    command.env("VMKEEP_SEED", "1").env_remove("VMKEEP_MUTATION").env("RUST_BACKTRACE", "0");
    if let Some(fault) = fault {
        command.env("VMKEEP_MUTATION", fault);
    }
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    // A test that is not there passes too.
    assert!(said.contains("1 passed") || !output.status.success(), "{}: {said}", one.name);
    (output.status.success(), said)
}

#[test]
#[ignore = "builds and runs tests of all crates: some minutes"]
fn each_deliberate_fault_is_caught() {
    println!("| fault | caught by | test |\n|---|---|---|");
    for one in MUTATIONS {
        let (sound, said) = passes(one, None);
        assert!(sound, "{} fails without any fault: {said}", one.test.1);
        let (unnoticed, said) = passes(one, Some(one.name));
        assert!(!unnoticed, "{}: nobody noticed\n{said}", one.what);
        assert!(
            said.contains("1 failed") || said.contains("FAILED"),
            "{}: it did not even run: {said}",
            one.what
        );
        println!("| {} | {} | `{}` |", one.what, one.family, one.test.1);
    }
}
