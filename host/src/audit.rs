//! The journal as evidence: replayed, verified, and read back from an export.
//!
//! Two questions, two codes. *Is this what was written?* is answered by hashes, and a "no" is damage
//! ([`codes::STORE_DAMAGED`]). *Would this release decide the same?* is answered by folding the events again and taking
//! every decision anew; a "no" is a divergence ([`codes::REPLAY_DIVERGED`]). A file that was exported can be asked both
//! on any machine, without a daemon.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use vmkeep_store::Store;
use vmkeep_store::export::{Cut, Item, ReadError, Reader};
use vmkeep_store::verify::verify;
use vmkeep_workflow::ids::StreamId;
use vmkeep_workflow::journal::Record;
use vmkeep_workflow::replay::{self, Divergence};
use vmkeep_workflow::{Fault, JobStatus};

use crate::api::types::{Audited, Replayed};
use crate::codes;
use crate::heads::Witness;

/// Findings that are put into a message; the rest is counted.
const SHOWN: usize = 5;

/// Checks every record, chain, seal and projection of a store, and compares it with signed heads.
///
/// # Errors
/// What is wrong, if anything is.
pub async fn verify_store(store: &dyn Store, heads: Option<&Witness>) -> Result<Audited, Fault> {
    let report = verify(store).await.map_err(|e| e.fault("verify the journal", ""))?;
    if report.is_whole() {
        let vouched = match heads {
            Some(heads) => Some(heads.vouch_for(store).await?),
            None => None,
        };
        return Ok(Audited {
            vouched,
            streams: report.streams,
            records: report.records,
            head: Some(report.link),
            pruned: report.pruned,
            cut: Vec::new(),
        });
    }
    let shown: Vec<String> = report.findings.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = report.found.saturating_sub(shown.len() as u64);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    Err(damaged("verify the journal", "", &format!("{}{more}", shown.join("; "))))
}

/// Checks an exported file by itself, and compares it with signed heads.
///
/// # Errors
/// Where it goes wrong, if it does.
pub fn verify_file(path: &Path, heads: Option<&Witness>) -> Result<Audited, Fault> {
    let mut reader = open(path, "verify the export")?;
    if heads.is_some() && !reader.header().whole {
        let cause = "it holds a part of the journal, and heads are signed for the whole";
        return Err(Fault::permanent(codes::USAGE, "verify the export", shown(path), cause)
            .remedy("Export all of it: `vmkeep audit export -o FILE`, without any choice"));
    }
    let wanted = heads.map(Witness::wanted).unwrap_or_default();
    let mut streams = std::collections::HashSet::new();
    let mut links = std::collections::HashMap::new();
    while let Some(item) = reader.next_item().map_err(|e| unread("verify the export", path, &e))? {
        match item {
            Item::Record(record, _) => drop(streams.insert(record.stream)),
            Item::Seal(commit) if wanted.contains(&commit.number) => {
                links.insert(commit.number, commit.link);
            }
            Item::Seal(_) => {}
        }
    }
    let seen = reader.seen();
    let vouch = |heads: &Witness| heads.vouch(reader.header().store, seen.commits, &links);
    Ok(Audited {
        vouched: heads.map(vouch).transpose()?,
        streams: streams.len() as u64,
        records: seen.records,
        head: seen.link.map(|link| hex(&link)),
        pruned: reader.tombstones(),
        cut: reader.cuts().iter().map(cut).collect(),
    })
}

/// A stream that is cut, in words.
fn cut(cut: &Cut) -> String {
    let Cut { stream, from, to, of } = cut;
    match (from.0 > 1, to < of) {
        (true, true) => format!(
            "{stream}: records {from} to {to} of {of}; what comes before and after is not in the file"
        ),
        (true, false) => {
            format!("{stream}: records {from} to {to} of {of}; what comes before is not in the file")
        }
        _ => format!("{stream}: records {from} to {to} of {of}; what comes after is not in the file"),
    }
}

/// Replays one job.
///
/// # Errors
/// The first point at which its journal does not replay.
pub fn replay(stream: &StreamId, records: &[Record]) -> Result<Replayed, Fault> {
    let report = replay::check(records).map_err(|divergence| diverged(stream, &divergence))?;
    Ok(Replayed {
        job: stream.as_job().map_or_else(|| stream.to_string(), |job| job.to_string()),
        events: report.events as u64,
        decisions: report.decisions as u64,
        status: report.summary.map_or(JobStatus::Queued, |summary| summary.status),
    })
}

/// Replays every job of an exported file.
///
/// # Errors
/// The first point at which the file is damaged or a job does not replay.
pub fn replay_file(path: &Path) -> Result<Vec<Replayed>, Fault> {
    let mut reader = open(path, "replay the export")?;
    let mut jobs: BTreeMap<StreamId, Vec<Record>> = BTreeMap::new();
    while let Some(item) = reader.next_item().map_err(|e| unread("replay the export", path, &e))? {
        if let Item::Record(record, _) = item
            && record.stream.as_job().is_some()
            // What was let go cannot be replayed; verifying tells of it.
            && !record.bytes.is_empty()
        {
            jobs.entry(record.stream.clone()).or_default().push(record);
        }
    }
    jobs.iter().map(|(stream, records)| replay(stream, records)).collect()
}

/// The same for every export (`*.jsonl`) in a folder and below it, by name: whether this release reads and decides as
/// those did that wrote them.
///
/// # Errors
/// The first file that does not replay, or that there is none.
pub fn replay_folder(path: &Path) -> Result<Vec<Replayed>, Fault> {
    let mut files = Vec::new();
    exports(path, &mut files).map_err(|e| unread("replay the exports", path, &ReadError::Read(e)))?;
    if files.is_empty() {
        let cause = "no file in it ends in .jsonl";
        return Err(Fault::permanent(codes::USAGE, "replay the exports", shown(path), cause)
            .remedy("Name a folder with files that `vmkeep audit export --output` wrote"));
    }
    let mut all = Vec::new();
    for file in files {
        let replayed = replay_file(&file)
            .map_err(|fault| Fault { object: format!("{}, {}", shown(&file), fault.object), ..fault })?;
        all.extend(replayed);
    }
    Ok(all)
}

fn exports(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries = std::fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            exports(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "jsonl") {
            found.push(path);
        }
    }
    Ok(())
}

fn open(path: &Path, doing: &str) -> Result<Reader<BufReader<File>>, Fault> {
    let file = File::open(path).map_err(|e| unread(doing, path, &ReadError::Read(e)))?;
    Reader::new(BufReader::new(file)).map_err(|e| unread(doing, path, &e))
}

/// A file that cannot be read, or is something else, has not been changed by anybody.
fn unread(doing: &str, path: &Path, error: &ReadError) -> Fault {
    match error {
        ReadError::Read(_) | ReadError::NotAnExport => {
            Fault::permanent(codes::USAGE, doing, shown(path), error)
                .remedy("Name a job, or a file that `vmkeep audit export` wrote")
        }
        ReadError::TooNew { .. } => {
            Fault::permanent(codes::STORE_TOO_NEW, doing, shown(path), error).remedy("Use the newer release")
        }
        _ => damaged(doing, &shown(path), error),
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// The error for evidence that is not what was written.
#[must_use]
pub fn damaged(doing: &str, object: &str, error: &dyn std::fmt::Display) -> Fault {
    Fault::permanent(codes::STORE_DAMAGED, doing, object, error).remedy(
        "Something changed it after it was written. Keep it as it is; restore the state folder from a copy if jobs are affected",
    )
}

fn diverged(stream: &StreamId, divergence: &Divergence) -> Fault {
    let remedy = match divergence {
        Divergence::Gap { .. } | Divergence::Hash(_) => {
            "The journal was changed: `vmkeep audit verify` names all places"
        }
        _ => {
            "If `vmkeep audit verify` finds the journal whole, this release decides otherwise than the one that wrote it: use that one, and report this"
        }
    };
    let job = stream.as_job().map_or_else(|| stream.to_string(), |job| job.to_string());
    Fault::permanent(codes::REPLAY_DIVERGED, "replay the job", job, divergence).remedy(remedy)
}

/// Bytes as hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}
