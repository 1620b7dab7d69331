//! What every engine must prove.
//!
//! An engine's test file names a [`Candidate`] and calls [`crate::conformance!`]; an engine that keeps files calls
//! [`crate::conformance_durable!`] as well. Each behaviour becomes a test of its own, named after it.
//!
//! ```ignore
//! struct Sqlite;
//! impl vmkeep_store::conformance::Candidate for Sqlite { … }
//! vmkeep_store::conformance!(super::Sqlite);
//! vmkeep_store::conformance_durable!(super::Sqlite);
//! ```
//!
//! Tests of crashes run the test program once more as a child (its test `child`), which appends until its parent kills it,
//! or until the disk of its own mount namespace is full.

// The functions are tests: each is named after what it proves.
#![allow(missing_docs, clippy::missing_errors_doc, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod archive;
pub mod burials;
pub mod child;
pub mod files;
pub mod jobs;
pub mod listening;
pub mod sample;
pub mod streams;

use std::path::Path;
use std::sync::Arc;

use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::StoreError;

use crate::{Options, Store};

/// An engine under test.
pub trait Candidate: Send + Sync + 'static {
    /// Opens the store of this engine in a folder, and makes it when it is not there. An engine without files gives the same
    /// store for the same folder.
    fn open(&self, folder: &Path, options: Options) -> Result<Arc<dyn Store>, StoreError>;

    /// Opens it for reading only.
    fn open_read_only(&self, folder: &Path) -> Result<Arc<dyn Store>, StoreError>;

    /// Flips a bit of a stored record behind the engine's back. An engine with files is closed when this is called.
    fn tamper(&self, folder: &Path, stream: &StreamId, seq: Seq);

    /// Makes the store one of that format. It is closed when this is called.
    fn set_format(&self, folder: &Path, format: u32);
}

/// The engine and a folder for one test.
pub struct Stage {
    engine: Box<dyn Candidate>,
    folder: tempfile::TempDir,
}

impl Stage {
    /// The engine under test.
    #[must_use]
    pub fn engine(&self) -> &dyn Candidate {
        &*self.engine
    }

    /// The folder of the test's store.
    #[must_use]
    pub fn folder(&self) -> std::path::PathBuf {
        self.folder.path().join("the store")
    }

    /// A further folder.
    #[must_use]
    pub fn elsewhere(&self) -> std::path::PathBuf {
        self.folder.path().join("elsewhere")
    }

    /// Opens the test's store.
    #[must_use]
    pub fn open(&self) -> Arc<dyn Store> {
        self.try_open().unwrap()
    }

    /// Tries to open the test's store.
    pub fn try_open(&self) -> Result<Arc<dyn Store>, StoreError> {
        self.engine.open(&self.folder(), small())
    }
}

/// Options for tests: a small reserve.
#[must_use]
pub fn small() -> Options {
    Options { reserve: 1 << 20, ..Options::default() }
}

/// Runs one test.
pub fn run(engine: impl Candidate, test: impl AsyncFnOnce(&Stage)) {
    let stage = Stage { engine: Box::new(engine), folder: tempfile::tempdir().unwrap() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(test(&stage));
}

/// Tests of one module of the suite.
#[doc(hidden)]
#[macro_export]
macro_rules! conformance_tests {
    ($engine:expr, $module:ident: $($test:ident)*) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    $crate::conformance::run($engine, async |stage| {
                        $crate::conformance::$module::$test(stage).await
                    });
                }
            )*
        }
    };
}

/// The tests that every engine passes. The expression is evaluated in modules below the caller's.
#[macro_export]
macro_rules! conformance {
    ($engine:expr) => {
        $crate::conformance_tests!($engine, streams:
            records_come_back_in_order_with_a_chain_that_fits
            a_part_of_a_stream_can_be_read
            a_stream_that_nobody_wrote_is_empty
            a_conflict_writes_nothing_and_tells_where_the_stream_ends
            a_refused_append_leaves_no_trace
            what_no_stream_may_hold_is_refused
            large_records_come_back
            streams_with_odd_names_are_kept_apart
            writers_of_many_streams_lose_nothing
            writers_that_fight_for_a_stream_lose_nothing
            a_flipped_bit_is_found_by_reading_and_by_verifying
        );
        $crate::conformance_tests!($engine, jobs:
            a_summary_becomes_visible_with_its_events
            jobs_are_listed_by_subject_workflow_state_and_time
            a_key_is_claimed_once_and_the_loser_writes_nothing
            a_key_that_many_claim_has_one_winner
            rows_are_kept_by_name_and_cleared_by_job
        );
        $crate::conformance_tests!($engine, listening:
            subscribers_hear_all_records_in_the_order_of_their_commits
            what_is_heard_can_be_read
            what_was_refused_is_not_heard
            a_subscriber_that_lags_is_told
        );
        $crate::conformance_tests!($engine, archive:
            an_export_taken_in_elsewhere_gives_the_same_journal
            the_same_journal_is_exported_to_the_same_bytes
            an_interrupted_import_is_repeated
            a_damaged_export_changes_nothing
            an_export_that_went_another_way_changes_nothing
            one_stream_can_be_exported
            a_sound_journal_verifies_while_it_is_written
        );
        $crate::conformance_tests!($engine, burials:
            a_buried_job_leaves_its_tombstone_and_the_order_stays_proven
            what_has_not_ended_or_went_on_is_not_buried
            bytes_that_are_gone_without_a_tombstone_are_damage
            a_journal_that_was_pruned_is_exported_whole_and_not_imported
            a_journal_verifies_while_jobs_are_buried
            a_part_of_a_journal_is_taken_by_time_subject_and_state
            an_adopted_journal_has_the_same_head
        );
    };
}

/// The further tests of engines that keep files.
#[macro_export]
macro_rules! conformance_durable {
    ($engine:expr) => {
        $crate::conformance_tests!($engine, files:
            all_is_there_after_reopening
            a_second_opener_is_refused_and_told_who_was_first
            a_store_can_be_opened_again_once_it_is_closed
            a_newer_format_is_refused_and_nothing_is_touched
            reading_only_sees_what_is_appended_and_changes_nothing
            only_the_owner_may_look
            rubbish_is_refused
            two_stores_have_different_ids
        );
        mod crashes {
            #[test]
            fn child() {
                $crate::conformance::child::act(&$engine);
            }
            #[test]
            fn what_was_acknowledged_survives_kill_9() {
                $crate::conformance::child::kill_while_writing(&$engine, module_path!());
            }
            #[test]
            fn a_burial_is_whole_or_has_not_happened_after_kill_9() {
                $crate::conformance::child::kill_while_burying(&$engine, module_path!());
            }
            #[test]
            fn a_young_store_survives_kill_9() {
                $crate::conformance::child::kill_while_creating(&$engine, module_path!());
            }
            #[test]
            fn another_process_is_refused_and_told_who_was_first() {
                $crate::conformance::child::second_process(&$engine, module_path!());
            }
            #[test]
            fn a_full_disk_spends_the_reserve_and_is_survived() {
                $crate::conformance::child::full_disk(module_path!());
            }
            #[test]
            fn a_file_size_limit_is_survived() {
                $crate::conformance::child::limited_file(&$engine, module_path!());
            }
        }
    };
}
