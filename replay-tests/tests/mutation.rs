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
    /// The test of the simulation that catches it too.
    simulation: Result<&'static str, WhyNot>,
}

/// Why the simulation cannot catch it.
type WhyNot = &'static str;

const MUTATIONS: &[Mutation] = &[
    Mutation {
        name: "fsync-left-out",
        what: "an fsync left out (of a backup's definition)",
        family: "power cut",
        package: "replay-tests",
        test: ("powercut", "backups::a_power_cut_leaves_a_backup_whole_or_none_at_all"),
        simulation: Ok("families::undisturbed_every_workflow_does_what_it_is_for"),
    },
    Mutation {
        name: "sled-unsynced",
        what: "sled without our fdatasync",
        family: "power cut",
        package: "replay-tests",
        test: ("powercut", "stores::a_power_cut_costs_an_aged_sled_store_nothing_that_was_acknowledged"),
        simulation: Err("its journal is in memory"),
    },
    Mutation {
        name: "undo-skipped",
        what: "an undo skipped",
        family: "crash at every boundary (engine)",
        package: "vmkeep-workflow",
        test: ("engine", "a_job_cut_off_before_or_after_any_append_goes_on_to_the_same_end"),
        simulation: Ok(
            "families::cancelled_anywhere_and_killed_while_it_goes_back_a_job_goes_back_all_the_same",
        ),
    },
    Mutation {
        name: "event-after-effect",
        what: "an event written after its effect",
        family: "crash at every boundary (engine)",
        package: "vmkeep-workflow",
        test: ("engine", "no_effect_is_there_before_the_event_that_announces_it"),
        simulation: Ok("families::undisturbed_every_workflow_does_what_it_is_for"),
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
        simulation: Ok(
            "families::a_job_finds_the_disks_where_qemu_has_them_when_libvirt_died_before_it_noted_that",
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
        simulation: Ok("families::a_guest_that_was_to_be_saved_is_started_again_wherever_the_host_went_down"),
    },
    Mutation {
        name: "switched-late",
        what: "the definition switched after the snapshot",
        family: "steps on a made-up hypervisor",
        package: "vmkeep-steps",
        test: ("", "snapshot::tests::act::the_definition_names_the_overlays_durably_and_can_be_put_back"),
        simulation: Ok("families::undisturbed_every_workflow_does_what_it_is_for"),
    },
    Mutation {
        name: "stale-memory",
        what: "memory restored onto a written overlay",
        family: "steps on a made-up hypervisor",
        package: "vmkeep-steps",
        test: ("", "save::tests::a_state_is_loaded_only_onto_disks_that_are_as_they_were"),
        simulation: Ok(
            "families::memory_that_was_saved_is_never_loaded_onto_disks_on_which_a_guest_has_run_since",
        ),
    },
];

/// A test: package, program, name.
type Judge<'a> = (&'a str, &'a str, &'a str);

/// Whether the test passes, and what it said.
fn passes((package, program, test): Judge<'_>, fault: Option<&str>) -> (bool, String) {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(workspace).args(["test", "-q", "-p", package, "--all-features"]);
    match program {
        "" => command.arg("--lib"),
        program => command.args(["--test", program]),
    };
    command.args(["--", "--exact", test]);
    // The same choices each time.
    for chosen in ["VMKEEP_MUTATION", "VMKEEP_SIM_RUNS", "VMKEEP_SIM_SEED", "VMKEEP_SIM_SCENARIO"] {
        command.env_remove(chosen);
    }
    command.env("VMKEEP_SEED", "1").env("RUST_BACKTRACE", "0");
    if let Some(fault) = fault {
        command.env("VMKEEP_MUTATION", fault);
    }
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    // A test that is not there passes too.
    assert!(said.contains("1 passed") || !output.status.success(), "{test}: {said}");
    (output.status.success(), said)
}

/// Without the fault the test passes, with it it fails.
fn caught(one: &Mutation, judge: Judge<'_>) {
    let (sound, said) = passes(judge, None);
    assert!(sound, "{} fails without any fault: {said}", judge.2);
    let (unnoticed, said) = passes(judge, Some(one.name));
    assert!(!unnoticed, "{}: {} did not notice\n{said}", one.what, judge.2);
    assert!(
        said.contains("1 failed") || said.contains("FAILED"),
        "{}: it did not even run: {said}",
        one.what
    );
}

#[test]
#[ignore = "builds and runs tests of all crates: some minutes"]
fn each_deliberate_fault_is_caught() {
    println!("| fault | caught by | test |\n|---|---|---|");
    for one in MUTATIONS {
        caught(one, (one.package, one.test.0, one.test.1));
        println!("| {} | {} | `{}` |", one.what, one.family, one.test.1);
    }
}

#[test]
#[ignore = "builds the simulation and runs a family of it twice for each fault: some minutes"]
fn each_deliberate_fault_that_can_happen_in_the_simulation_is_caught_there() {
    println!("| fault | in the simulation |\n|---|---|");
    for one in MUTATIONS {
        match one.simulation {
            Ok(test) => {
                caught(one, ("replay-tests", "simulation", test));
                println!("| {} | `{test}` |", one.what);
            }
            Err(why_not) => println!("| {} | no: {why_not} |", one.what),
        }
    }
}
