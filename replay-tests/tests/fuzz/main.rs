//! What vmkeep parses and did not write itself in the same process, fed with damaged, nested, huge and crossed input.
//!
//! A loop of our own over a kept corpus, on the stable toolchain, without instrumentation:
//!
//! - Inputs begin with the corpus (`replay-tests/corpus/TARGET`, and what other tests keep anyway) and are changed a few times
//!   each ([`mutate`]): bits, numbers, words of the corpus put elsewhere, pieces of two inputs joined, things repeated,
//!   removed, nested thousands of levels deep.
//! - An input whose *outcome* was not seen before (accepted, or another message) joins those that are changed further. That
//!   is far less than coverage tells, but the parsers here name precisely what they dislike, so it leads inwards.
//! - A target checks properties, not only that nothing panics ([`targets`]): what was accepted comes back from its own
//!   writing, is accepted again, and means the same.
//! - It runs in a child process, with the stack of a worker thread (2 MiB) and limited memory ([`engine`]): a stack that
//!   overflows, memory that explodes and a loop without end are found as well, and the input is kept.
//!
//! `cargo test -p replay-tests --test fuzz` gives each target a few seconds, with the same seed always. Longer:
//! `VMKEEP_FUZZ_SECONDS=600 VMKEEP_FUZZ_SEED=7 cargo test -p replay-tests --test fuzz -- --nocapture TEST`, or `scripts/fuzz`.
//! An input that was found goes into the corpus, under a name that says what it broke; from then on every run begins with it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod engine;
mod mutate;
mod targets;

use engine::fuzz;

/// A test for each target.
macro_rules! targets {
    ($($test:ident => $target:literal)*) => {
        $(
            #[test]
            fn $test() {
                fuzz($target);
            }
        )*

        const TARGETS: &[&str] = &[$($target),*];
    };
}

targets! {
    events_come_back_as_they_were => "event"
    a_journal_of_any_events_is_stored_exported_imported_and_replayed_or_refused => "journal"
    exports_are_refused_or_taken_in_and_given_out_again => "export"
    signed_heads_are_refused_or_come_back_to_the_byte => "heads"
    plans_are_refused_or_come_back_and_compile_again => "plan"
    store_settings_come_back => "store-config"
    a_damaged_database_is_refused_or_read => "sqlite-file"
    xml_is_refused_or_comes_back_and_stays_the_same => "xml"
    an_edit_of_a_definition_leaves_alone_what_it_is_not_about => "domain-xml"
    a_save_image_is_refused_or_copied_with_another_definition => "save-image"
    a_qcow2_header_is_refused_or_rewritten_to_what_was_wanted => "qcow2"
    manifests_are_refused_or_come_back => "manifest"
    requests_are_refused_or_come_back => "api"
    configurations_are_refused_or_read_the_same_twice => "config"
    what_people_type_is_refused_or_understood => "text"
}

/// The process in which inputs are tried out; does nothing by itself.
#[test]
fn child() {
    engine::child();
}

#[test]
fn every_target_is_run_and_has_inputs_to_begin_with_that_it_accepts() {
    let mut all: Vec<&str> = targets::ALL.iter().map(|target| target.name).collect();
    let mut run = TARGETS.to_vec();
    all.sort_unstable();
    run.sort_unstable();
    assert_eq!(all, run);
    for target in targets::ALL {
        let seeds = (target.seeds)();
        let accepted = seeds.iter().filter(|seed| (target.run)(seed) == targets::ACCEPTED).count();
        assert!(accepted > 0, "{}: none of {} is accepted", target.name, seeds.len());
    }
}
