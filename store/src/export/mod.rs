//! Taking a journal out of a store, as text that outlives the store's own format.
//!
//! # The format
//! JSON lines, UTF-8, each line one object. The same journal always gives the same bytes.
//!
//! | line | meaning |
//! |---|---|
//! | `{"vmkeep":"journal","version":1,"store":UUID,"created":TIME,"whole":BOOL}` | the first line. `whole`: all streams, with seals; otherwise some streams, without |
//! | `{"commit":N,"stream":NAME,"seq":N,"hash":HEX,"event":{…}}` | a record. `event` holds its stored bytes *verbatim*: they are hashed as they stand |
//! | `{"commit":N,"stream":NAME,"seq":N,"hash":HEX,"text":"…"}` | a record whose stored bytes are not a JSON value by themselves, as a JSON string |
//! | `{"commit":N,"stream":NAME,"seq":N,"hash":HEX,"pruned":true}` | a record whose bytes were let go ([`crate::burial`]); a tombstone in the stream `history` says why |
//! | `{"cut":NAME,"from":N,"of":N,"previous":HEX}` | before the first record of a stream that is cut: it begins at record `from` of `of`, and `previous` is the hash before that |
//! | `{"seal":N,"digest":HEX,"link":HEX}` | the end of commit N; [`crate::chain`] says what the hashes cover |
//! | `{"end":{"records":N,"commits":N,"link":HEX}}` | the last line; without it the file was cut off. `link` is that of the last commit |
//!
//! Records stand in the order of their commits, so reading from the top replays history as it happened; an export of some
//! streams (without `commit`) has one stream after the other. `hash` is BLAKE3 over the previous record's hash of the same
//! stream (32 zero bytes for the first) and the stored bytes. A tool that prints the lines anew (`jq`) keeps them readable,
//! but may write a number differently, and then the hash no longer fits: take records out of an export, do not put it
//! through such a tool.

mod lines;
mod reader;
mod select;

use std::collections::VecDeque;
use std::io::{self, Write};

use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{Record, StoreError};

use crate::Store;
use crate::chain::{Commit, GENESIS, Hash, genesis};

pub use self::lines::Header;
pub use self::reader::{Cut, Item, ReadError, Reader};
pub use self::select::{Choice, Part};

/// The version of the format that this release writes, and the newest that it reads.
pub const VERSION: u32 = 1;

/// So many records or commits are asked for at a time.
const PAGE: usize = 512;

/// What to export.
#[derive(Clone, Copy, Debug)]
pub enum Selection<'a> {
    /// Everything, in the order of the commits, with seals.
    Whole,
    /// These streams or parts of them, one after the other.
    Parts(&'a [Part]),
}

/// What was exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// How many records.
    pub records: u64,
    /// How many commits.
    pub commits: u64,
    /// The link of the last commit: kept elsewhere, it shows later whether the journal was rewritten.
    pub link: Option<Hash>,
}

/// Why an export ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The text could not be written.
    #[error("could not write the export: {0}")]
    Write(#[from] io::Error),
    /// There is no such stream.
    #[error("there is no stream {0}")]
    NoStream(StreamId),
}

/// Writes an export. A store that is written to meanwhile is exported up to some commit. The whole is not checked against
/// its hashes (whoever reads it does that), a selection of streams is. Blocks while it writes.
///
/// # Errors
/// See [`ExportError`]; what was written until then lacks its last line.
pub async fn export<W: Write + Send>(
    store: &dyn Store,
    selection: Selection<'_>,
    out: &mut W,
) -> Result<Exported, ExportError> {
    let whole = matches!(selection, Selection::Whole);
    lines::header(out, &Header { version: VERSION, store: store.id(), created: store.created(), whole })?;
    let exported = match selection {
        Selection::Whole => everything(store, out).await?,
        Selection::Parts(parts) => some(store, parts, out).await?,
    };
    lines::end(out, &exported)?;
    out.flush()?;
    Ok(exported)
}

async fn everything<W: Write + Send>(store: &dyn Store, out: &mut W) -> Result<Exported, ExportError> {
    let mut exported = Exported { records: 0, commits: 0, link: Some(genesis(store.id())) };
    let mut seals = Seals::default();
    let (mut position, mut commit) = (0, 0);
    loop {
        let page = store.history(position, PAGE).await?;
        for placed in &page {
            if placed.commit != commit {
                seals.up_to(store, placed.commit.saturating_sub(1), &mut exported, out).await?;
                commit = placed.commit;
            }
            lines::record(out, Some(placed.commit), &placed.record)?;
            exported.records += 1;
            position = placed.position;
        }
        if page.is_empty() {
            seals.up_to(store, commit, &mut exported, out).await?;
            return Ok(exported);
        }
    }
}

async fn some<W: Write + Send>(
    store: &dyn Store,
    parts: &[Part],
    out: &mut W,
) -> Result<Exported, ExportError> {
    let mut exported = Exported { records: 0, commits: 0, link: None };
    for Part { stream, from, to } in parts {
        let end = store.last(stream).await?;
        if end == Seq(0) {
            return Err(ExportError::NoStream(stream.clone()));
        }
        let last = to.map_or(end, |to| to.min(end));
        if *from > Seq(1) || last < end {
            let before = Seq(from.0.saturating_sub(1));
            let previous = match before {
                Seq(0) => GENESIS,
                before => store.read(stream, before, 1).await?.first().map_or(GENESIS, |record| record.hash),
            };
            lines::cut(out, stream, *from, end, &previous)?;
        }
        let mut next = *from;
        while next <= last {
            let limit = usize::try_from(last.0 - next.0 + 1).unwrap_or(PAGE).min(PAGE);
            let page: Vec<Record> = store.read(stream, next, limit).await?;
            let Some(record) = page.last() else { break };
            next = record.seq.next();
            for record in &page {
                lines::record(out, None, record)?;
                exported.records += 1;
            }
        }
    }
    Ok(exported)
}

/// The commits, read ahead of their use.
#[derive(Default)]
struct Seals {
    ahead: VecDeque<Commit>,
    written: u64,
}

impl Seals {
    /// Writes the seals of all commits up to one.
    async fn up_to<W: Write + Send>(
        &mut self,
        store: &dyn Store,
        number: u64,
        exported: &mut Exported,
        out: &mut W,
    ) -> Result<(), ExportError> {
        while self.written < number {
            if self.ahead.is_empty() {
                self.ahead.extend(store.commits(self.written, PAGE).await?);
            }
            let commit = self.ahead.pop_front().filter(|commit| commit.number <= number);
            let commit = commit
                .ok_or_else(|| StoreError::Damaged(format!("commit {}: it is missing", self.written + 1)))?;
            lines::seal(out, &commit)?;
            self.written = commit.number;
            exported.commits += 1;
            exported.link = Some(commit.link);
        }
        Ok(())
    }
}
