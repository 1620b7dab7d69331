//! Histories that earlier releases wrote are kept for ever (`replay-tests/histories`). Each must be read, must fold to the very
//! state that it folded to then, and each decision in it must be taken again.
//!
//! `VMKEEP_WRITE_HISTORIES=1` writes the state beside a history that has none. One that is there is never written over.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use replay_tests::testbed::files_in;
use serde_json::{Value, json};
use vmkeep_store::export::{Item, Reader};
use vmkeep_workflow::journal::Record;
use vmkeep_workflow::replay::{self, Report};
use vmkeep_workflow::state::Run;

fn histories(folder: &Path) -> Vec<PathBuf> {
    let files = files_in(folder).unwrap().into_iter();
    files
        .filter(|file| file.extension().is_some_and(|e| e == "jsonl"))
        .map(|file| folder.join(file))
        .collect()
}

fn records(path: &Path) -> Vec<Record> {
    let mut reader = Reader::new(BufReader::new(fs::File::open(path).unwrap())).unwrap();
    let mut records = Vec::new();
    while let Some(item) = reader.next_item().unwrap_or_else(|e| panic!("{}: {e}", path.display())) {
        if let Item::Record(record, _) = item
            && record.stream.as_job().is_some()
        {
            records.push(record);
        }
    }
    records
}

fn word(run: &Run) -> Value {
    match run {
        Run::Idle => "idle".into(),
        Run::Running { .. } => "running".into(),
        Run::Doubtful(_) => "doubtful".into(),
        Run::Faulted { .. } => "faulted".into(),
        Run::Waiting { .. } => "waiting".into(),
        Run::Cleared { .. } => "cleared".into(),
        Run::Awaiting { .. } => "awaiting".into(),
        Run::Done => "done".into(),
        Run::Failed(fault) => json!({ "failed": fault.code.0 }),
        Run::Stuck(fault) => json!({ "stuck": fault.code.0 }),
        Run::Stopped => "stopped".into(),
    }
}

/// What a history folds to, in words of its own.
fn folded(report: &Report) -> Value {
    let name = |place: usize| report.state.plan().map(|plan| plan.step(place).name.to_string());
    let cells = report.state.cells().iter().enumerate();
    let steps: Vec<Value> = cells
        .map(|(place, cell)| {
            let tracks = [&cell.forward, &cell.undo].map(|track| json!([word(&track.run), track.attempts]));
            json!({ "step": name(place), "forward": tracks[0], "undo": tracks[1], "output": cell.output.as_deref() })
        })
        .collect();
    json!({ "events": report.events, "decisions": report.decisions, "summary": report.summary, "steps": steps })
}

#[test]
fn every_history_ever_kept_folds_to_its_state_and_repeats_its_decisions() {
    let all = histories(&Path::new(env!("CARGO_MANIFEST_DIR")).join("histories"));
    assert!(all.len() >= 15, "histories are missing: {}", all.len());
    let write = std::env::var_os("VMKEEP_WRITE_HISTORIES").is_some();
    for path in all {
        let report = replay::check(&records(&path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (found, beside) = (folded(&report), path.with_extension("state.json"));
        if write && !beside.exists() {
            fs::write(&beside, serde_json::to_string_pretty(&found).unwrap() + "\n").unwrap();
        }
        let expected: Value = serde_json::from_str(&fs::read_to_string(&beside).unwrap()).unwrap();
        assert_eq!(found, expected, "{}", path.display());
    }
}
