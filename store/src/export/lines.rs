//! The lines of an export: how each is written, and how any is read.

use std::borrow::Cow;
use std::io::{self, Write};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::Record;

use super::Exported;
use crate::chain::{Commit, Hash, hex};

/// The first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version of the format.
    pub version: u32,
    /// The id of the store it was taken from.
    pub store: Uuid,
    /// When that store was made.
    pub created: Timestamp,
    /// Whether it holds all streams, with seals.
    pub whole: bool,
}

/// What the first line says it is.
pub(super) const KIND: &str = "journal";

#[derive(Serialize)]
struct HeaderLine {
    vmkeep: &'static str,
    version: u32,
    store: Uuid,
    created: Timestamp,
    whole: bool,
}

#[derive(Serialize)]
struct RecordLine<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<u64>,
    stream: &'a str,
    seq: u64,
    hash: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<&'a str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pruned: bool,
}

#[derive(Serialize)]
struct CutLine<'a> {
    cut: &'a str,
    from: u64,
    of: u64,
    previous: String,
}

#[derive(Serialize)]
struct SealLine {
    seal: u64,
    digest: String,
    link: String,
}

#[derive(Serialize)]
struct EndLine {
    end: End<'static>,
}

/// What the last line says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct End<'a> {
    pub(super) records: u64,
    pub(super) commits: u64,
    #[serde(borrow, skip_serializing_if = "Option::is_none", default)]
    pub(super) link: Option<Cow<'a, str>>,
}

/// What the first line of any version has.
#[derive(Deserialize)]
pub(super) struct FirstLine<'a> {
    #[serde(borrow)]
    pub(super) vmkeep: Cow<'a, str>,
    pub(super) version: u32,
}

/// Any line, before it is known what it is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AnyLine<'a> {
    #[serde(borrow)]
    #[serde(rename = "vmkeep")]
    pub(super) _kind: Option<Cow<'a, str>>,
    #[serde(rename = "version")]
    pub(super) _version: Option<u32>,
    pub(super) store: Option<Uuid>,
    pub(super) created: Option<Timestamp>,
    pub(super) whole: Option<bool>,
    pub(super) commit: Option<u64>,
    #[serde(borrow)]
    pub(super) stream: Option<Cow<'a, str>>,
    pub(super) seq: Option<u64>,
    #[serde(borrow)]
    pub(super) hash: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) event: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) text: Option<Cow<'a, str>>,
    pub(super) pruned: Option<bool>,
    #[serde(borrow)]
    pub(super) cut: Option<Cow<'a, str>>,
    pub(super) from: Option<u64>,
    pub(super) of: Option<u64>,
    #[serde(borrow)]
    pub(super) previous: Option<Cow<'a, str>>,
    pub(super) seal: Option<u64>,
    #[serde(borrow)]
    pub(super) digest: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) link: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) end: Option<End<'a>>,
}

fn line<W: Write>(out: &mut W, value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    out.write_all(&text)
}

pub(super) fn header<W: Write>(out: &mut W, header: &Header) -> io::Result<()> {
    let Header { version, store, created, whole } = *header;
    line(out, &HeaderLine { vmkeep: KIND, version, store, created, whole })
}

pub(super) fn record<W: Write>(out: &mut W, commit: Option<u64>, record: &Record) -> io::Result<()> {
    let bytes = std::str::from_utf8(&record.bytes).map_err(|_| {
        let place = format!("stream {:?}, record {}: not UTF-8", record.stream.as_str(), record.seq);
        io::Error::new(io::ErrorKind::InvalidData, place)
    })?;
    // A value is read back without the blanks around it, and `null` as nothing.
    let event =
        serde_json::from_str::<&RawValue>(bytes).ok().filter(|raw| raw.get() == bytes && bytes != "null");
    let pruned = bytes.is_empty();
    let text = (event.is_none() && !pruned).then_some(bytes);
    let (stream, hash) = (record.stream.as_str(), hex(&record.hash));
    line(out, &RecordLine { commit, stream, seq: record.seq.0, hash, event, text, pruned })
}

pub(super) fn cut<W: Write>(
    out: &mut W,
    stream: &StreamId,
    from: Seq,
    of: Seq,
    previous: &Hash,
) -> io::Result<()> {
    line(out, &CutLine { cut: stream.as_str(), from: from.0, of: of.0, previous: hex(previous) })
}

pub(super) fn seal<W: Write>(out: &mut W, commit: &Commit) -> io::Result<()> {
    line(out, &SealLine { seal: commit.number, digest: hex(&commit.digest), link: hex(&commit.link) })
}

pub(super) fn end<W: Write>(out: &mut W, exported: &Exported) -> io::Result<()> {
    let link = exported.link.map(|link| Cow::Owned(hex(&link)));
    line(out, &EndLine { end: End { records: exported.records, commits: exported.commits, link } })
}
