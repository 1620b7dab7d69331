//! The benchmarks: ratios against a peer that runs in the same run, round by round.
//!
//! `scripts/bench [NAME…] [--json]`. A NAME selects the groups whose names contain it. Each figure is the median of
//! several rounds after a warm-up; ours and the peer's rounds alternate, so that what the machine does meanwhile meets
//! both. A ratio whose spread is wider than its margin to the target is *inconclusive* and not met.

// A benchmark that cannot set up its world has nothing to measure; it ends at once.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, unreachable_pub)]

mod engine;
mod idle;
mod merge;
mod save;
mod snapshot;
mod store;
#[path = "../../tests/support/mod.rs"]
mod support;
mod table;
mod vault;

use table::Row;

type Group = (&'static str, fn() -> Vec<Row>);

const GROUPS: &[Group] = &[
    ("engine", engine::run),
    ("store", store::run),
    ("snapshot", snapshot::run),
    ("merge", merge::run),
    ("save-retain", save::run),
    ("idle", idle::run),
    ("vault-full", vault::full::run),
    ("vault-restore", vault::restore::run),
    ("vault-incremental", vault::incremental::run),
    ("vault-second", vault::full::second),
    ("vault-corpus", vault::corpus::run),
    ("vault-growth", vault::growth::run),
];

fn main() {
    let mut json = false;
    let mut wanted = Vec::new();
    for arg in std::env::args().skip(1) {
        match arg.as_str() {
            "--json" => json = true,
            // What cargo itself hands to a benchmark.
            "--bench" => {}
            name => wanted.push(name.to_owned()),
        }
    }
    let mut rows = Vec::new();
    for (name, run) in GROUPS {
        if wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str())) {
            eprintln!("bench: {name} …");
            rows.extend(run());
        }
    }
    if json { table::print_json(&rows) } else { table::print(&rows) }
}
