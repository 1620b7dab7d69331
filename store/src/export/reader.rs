//! Reading an export, with everything checked that can be checked without a store: places, hash chains, digests, links,
//! counts and the end.

use std::collections::HashMap;
use std::io::{BufRead, Read};

use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{Record, link};

use super::lines::{AnyLine, End, FirstLine, Header, KIND};
use super::{Exported, VERSION};
use crate::MAX_RECORD;
use crate::burial::{Graves, Tombstone};
use crate::chain::{self, Commit, Digest, GENESIS, Hash, genesis, hex, unhex};

/// The longest line: a record of the greatest length, each byte of it escaped.
const MAX_LINE: u64 = 6 * MAX_RECORD as u64 + 65_536;

/// Why an export cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Reading failed.
    #[error("could not read the export: {0}")]
    Read(#[from] std::io::Error),
    /// It is something else.
    #[error("this is no export of a journal of vmkeep")]
    NotAnExport,
    /// A newer release wrote it.
    #[error("the export has version {found}, and this release reads up to {known}")]
    TooNew {
        /// Its version.
        found: u32,
        /// The newest version known.
        known: u32,
    },
    /// The last line is missing.
    #[error("the export was cut off after line {0}")]
    CutOff(u64),
    /// A line is not what it should be.
    #[error("line {line} of the export: {why}")]
    Line {
        /// From 1.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
}

/// What an export consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A record, and its commit if the export is whole. One without bytes was pruned.
    Record(Record, Option<u64>),
    /// The end of a commit; its digest and link have been checked.
    Seal(Commit),
}

/// A stream that an export holds a part of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The stream.
    pub stream: StreamId,
    /// Its first record that is there.
    pub from: Seq,
    /// Its last record that is there.
    pub to: Seq,
    /// How many it had when the export was made.
    pub of: Seq,
}

/// Reads an export item by item.
pub struct Reader<R> {
    input: R,
    line: u64,
    header: Header,
    ends: HashMap<StreamId, (Seq, Hash)>,
    graves: Graves,
    cuts: Vec<(StreamId, Seq, Seq)>,
    commit: u64,
    digest: Digest,
    seen: Exported,
    done: bool,
}

impl<R: BufRead> Reader<R> {
    /// Begins to read.
    ///
    /// # Errors
    /// When it is no export, or one of a newer release.
    pub fn new(mut input: R) -> Result<Self, ReadError> {
        let text = next_line(&mut input)?.unwrap_or_default();
        // The version first: the rest may have changed its meaning.
        let first: FirstLine<'_> = serde_json::from_str(&text).map_err(|_| ReadError::NotAnExport)?;
        if first.vmkeep != KIND {
            return Err(ReadError::NotAnExport);
        }
        let version = first.version;
        if version > VERSION {
            return Err(ReadError::TooNew { found: version, known: VERSION });
        }
        let line = parse(&text).map_err(|_| ReadError::NotAnExport)?;
        let (Some(store), Some(created), Some(whole)) = (line.store, line.created, line.whole) else {
            return Err(ReadError::NotAnExport);
        };
        let header = Header { version, store, created, whole };
        let seen = Exported { records: 0, commits: 0, link: whole.then(|| genesis(store)) };
        let (ends, graves, cuts) = (HashMap::new(), Graves::default(), Vec::new());
        let digest = Digest::default();
        Ok(Self { input, line: 1, header, ends, graves, cuts, commit: 1, digest, seen, done: false })
    }

    /// What the first line says.
    #[must_use]
    pub fn header(&self) -> Header {
        self.header
    }

    /// What was read so far.
    #[must_use]
    pub fn seen(&self) -> Exported {
        self.seen
    }

    /// The streams of which the export holds a part only, as far as it was read.
    #[must_use]
    pub fn cuts(&self) -> Vec<Cut> {
        let cut = |(stream, from, of): &(StreamId, Seq, Seq)| Cut {
            stream: stream.clone(),
            from: *from,
            to: self.ends.get(stream).map_or(Seq(0), |end| end.0),
            of: *of,
        };
        self.cuts.iter().map(cut).collect()
    }

    /// The tombstones that it holds, as far as it was read.
    #[must_use]
    pub fn tombstones(&self) -> Vec<Tombstone> {
        self.graves.tombstones()
    }

    /// The next item; nothing after the last one, when the whole has been found to be right.
    ///
    /// # Errors
    /// With the line where it goes wrong.
    pub fn next_item(&mut self) -> Result<Option<Item>, ReadError> {
        while !self.done {
            if let Some(item) = self.step()? {
                return Ok(Some(item));
            }
        }
        Ok(None)
    }

    /// Takes the next line in. Not every line is an item.
    fn step(&mut self) -> Result<Option<Item>, ReadError> {
        let Some(text) = next_line(&mut self.input)? else { return Err(ReadError::CutOff(self.line)) };
        self.line += 1;
        let number = self.line;
        let item = parse(&text).and_then(|line| self.take(line));
        let item = item.map_err(|why| ReadError::Line { line: number, why })?;
        if self.done && next_line(&mut self.input)?.is_some() {
            let why = "there is more after the end".to_owned();
            return Err(ReadError::Line { line: number + 1, why });
        }
        Ok(item)
    }

    fn take(&mut self, line: AnyLine<'_>) -> Result<Option<Item>, String> {
        if let Some(end) = line.end {
            self.finish(&end)?;
            self.done = true;
            return Ok(None);
        }
        if let Some(number) = line.seal {
            let hashes = (line.digest.as_deref().and_then(unhex), line.link.as_deref().and_then(unhex));
            let (Some(digest), Some(link)) = hashes else { return Err("a seal needs two hashes".to_owned()) };
            let commit = Commit { number, digest, link };
            self.seal(commit)?;
            return Ok(Some(Item::Seal(commit)));
        }
        if let Some(stream) = line.cut {
            let previous = line.previous.as_deref().and_then(unhex);
            let (Some(from), Some(of), Some(previous)) = (line.from, line.of, previous) else {
                return Err("a cut needs two places and a hash".to_owned());
            };
            return self
                .cut(StreamId::from(stream.into_owned()), Seq(from), Seq(of), previous)
                .map(|()| None);
        }
        let (Some(stream), Some(seq)) = (line.stream, line.seq) else {
            return Err("it is neither a record nor a seal nor the end".to_owned());
        };
        let bytes = match (line.event, line.text, line.pruned) {
            (Some(event), None, None) => event.get().to_owned(),
            (None, Some(text), None) if !text.is_empty() => text.into_owned(),
            // Only the seals of a whole export vouch for the hash of what is gone.
            (None, None, Some(true)) if self.header.whole => String::new(),
            _ => return Err("a record has an event or a text, or was pruned".to_owned()),
        };
        let hash = line.hash.as_deref().and_then(unhex).ok_or("a record needs a hash")?;
        let stream = StreamId::from(stream.into_owned());
        let record = Record { stream, seq: Seq(seq), bytes: bytes.into_bytes(), hash };
        self.record(&record, line.commit)?;
        Ok(Some(Item::Record(record, line.commit)))
    }

    fn record(&mut self, record: &Record, commit: Option<u64>) -> Result<(), String> {
        if commit != self.header.whole.then_some(self.commit) {
            return Err(match commit {
                Some(found) => format!("a record of commit {found} among those of {}", self.commit),
                None => "a record without its commit".to_owned(),
            });
        }
        let name = record.stream.as_str();
        let end = self.ends.entry(record.stream.clone()).or_insert((Seq(0), GENESIS));
        if record.seq != end.0.next() {
            return Err(format!("stream {name:?}: record {} follows on {}", record.seq, end.0));
        }
        if !self.graves.take(record) && link(&end.1, &record.bytes) != record.hash {
            return Err(format!("stream {name:?}, record {}: the hash chain is broken", record.seq));
        }
        *end = (record.seq, record.hash);
        self.digest.add(&record.stream, record.seq, &record.hash);
        self.seen.records += 1;
        Ok(())
    }

    fn cut(&mut self, stream: StreamId, from: Seq, of: Seq, previous: Hash) -> Result<(), String> {
        if self.header.whole || from.0 == 0 || from > of || self.ends.contains_key(&stream) {
            return Err(format!("a cut of the stream {:?}, which cannot be there", stream.as_str()));
        }
        self.ends.insert(stream.clone(), (Seq(from.0 - 1), previous));
        self.cuts.push((stream, from, of));
        Ok(())
    }

    fn seal(&mut self, commit: Commit) -> Result<(), String> {
        let Some(previous) = self.seen.link else { return Err("a seal among single streams".to_owned()) };
        let digest = std::mem::take(&mut self.digest).finish();
        if commit.number != self.commit {
            return Err(format!(
                "the seal of commit {}, where that of {} belongs",
                commit.number, self.commit
            ));
        }
        if commit.digest != digest {
            return Err(format!("commit {}: its records are not those that were sealed", commit.number));
        }
        if commit.link != chain::link(&previous, commit.number, &commit.digest) {
            return Err(format!("commit {}: the chain of commits is broken", commit.number));
        }
        self.commit += 1;
        self.seen.commits += 1;
        self.seen.link = Some(commit.link);
        Ok(())
    }

    fn finish(&self, end: &End<'_>) -> Result<(), String> {
        let seen = self.seen;
        let link = seen.link.map(|link| hex(&link));
        if (end.records, end.commits, end.link.as_deref()) != (seen.records, seen.commits, link.as_deref()) {
            return Err(format!(
                "it tells of {} records and {} commits, where there are {} and {}, or of another last link",
                end.records, end.commits, seen.records, seen.commits
            ));
        }
        if let Some(stream) = self.graves.wrong(|stream| self.ends.get(stream).copied()).first()
            && self.header.whole
        {
            return Err(format!("stream {:?}: it was pruned, and no tombstone fits it", stream.as_str()));
        }
        if self.header.whole && self.digest.finish() != Digest::default().finish() {
            return Err(format!("commit {} has no seal", self.commit));
        }
        Ok(())
    }
}

fn parse(text: &str) -> Result<AnyLine<'_>, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// The next line without its end; nothing at the end of the input. A last line that was not ended counts as cut off.
fn next_line(input: &mut impl BufRead) -> Result<Option<String>, ReadError> {
    let mut text = String::new();
    let read = input.take(MAX_LINE).read_line(&mut text)?;
    if !text.ends_with('\n') {
        if read as u64 == MAX_LINE {
            let kind = std::io::ErrorKind::InvalidData;
            return Err(ReadError::Read(std::io::Error::new(kind, "a line is too long")));
        }
        return Ok(None);
    }
    text.pop();
    Ok(Some(text))
}
