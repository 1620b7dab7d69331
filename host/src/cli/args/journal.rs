//! Words about the journal: as evidence, and as files.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use jiff::Timestamp;
use vmkeep_store::EngineName;
use vmkeep_store::heads::{NoKey, PublicKey};
use vmkeep_workflow::JobStatus;

use super::jobs::job_status;
use crate::text::parse_span;

/// The journal as evidence.
#[derive(Clone, Debug, Subcommand)]
pub enum Audit {
    /// Check every record of every stream, or of an exported file
    Verify {
        /// A file that `audit export` wrote; without one, the daemon's store
        file: Option<PathBuf>,
        /// Compare it with signed heads that were kept elsewhere (default: those beside the store). Needs no daemon
        #[arg(long, value_name = "FILE", requires = "public_key")]
        heads: Option<PathBuf>,
        /// The key that signed the heads: as `audit key` prints it, or a file with that. For each key that was lost, once more
        #[arg(long, value_name = "KEY", requires = "heads", value_parser = public_key)]
        public_key: Vec<PublicKey>,
    },
    /// Print the signed heads: keep them where nobody who can write here can write
    Heads,
    /// Print the public key that proves whose the heads are; keep it elsewhere as well
    Key,
    /// Have the daemon sign with a new key, for which the old one vouches
    RotateKey,
    /// Write the journal, or the part of it that is asked for, as JSON lines
    Export(Export),
    /// What was done to keep guests safe where no job's history can tell of it
    Guests,
    /// Let the history of old ended jobs go; tombstones stay
    Prune(PruneHistory),
}

fn public_key(text: &str) -> Result<PublicKey, String> {
    text.parse().or_else(|error: NoKey| {
        // What is no key may be the name of a file with one.
        let kept = std::fs::read_to_string(text).map_err(|_| error.to_string())?;
        kept.trim().parse().map_err(|error: NoKey| error.to_string())
    })
}

/// Which part of the journal. Jobs are taken whole; other streams are cut to the span.
#[derive(Clone, Debug, Default, Args)]
pub struct Export {
    /// Only this job's
    #[arg(long, value_name = "JOB")]
    pub job: Option<String>,
    /// Only of jobs on this domain
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,
    /// Only of jobs in these states
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = job_status)]
    pub state: Vec<JobStatus>,
    /// Only what went on at or after this instant: 2026-05-03, 2026-05-03T12:00, 2d (ago)
    #[arg(long, value_name = "TIME", value_parser = instant)]
    pub since: Option<Timestamp>,
    /// Only what went on before this instant
    #[arg(long, value_name = "TIME", value_parser = instant)]
    pub until: Option<Timestamp>,
    /// Where to (default: standard output)
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// How much of the history of ended jobs is kept.
#[derive(Clone, Debug, Default, Args)]
pub struct PruneHistory {
    /// Keep jobs that ended within so many days (default: history.keep_days)
    #[arg(long, value_name = "N")]
    pub keep_days: Option<u32>,
    /// Keep the latest so many (default: history.keep_jobs)
    #[arg(long, value_name = "N")]
    pub keep_jobs: Option<usize>,
    /// Why, for the journal
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Say what would go and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// The files of the journal. For these no daemon is needed.
#[derive(Clone, Debug, Subcommand)]
pub enum Store {
    /// What keeps the journal, and how much is in it; also beside a running daemon
    Info,
    /// Move the journal to another engine, while vmkeepd is stopped; the old store is kept
    Migrate {
        /// To which
        #[arg(long, value_name = "ENGINE")]
        to: Engine,
        /// Do everything but the change, and say how it went
        #[arg(long)]
        dry_run: bool,
    },
}

/// An engine that keeps files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// One SQLite database
    Sqlite,
    /// A folder of sled's
    Sled,
}

impl From<Engine> for EngineName {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Sqlite => Self::Sqlite,
            Engine::Sled => Self::Sled,
        }
    }
}

/// An instant: absolute, with or without a time zone, or so long ago.
fn instant(text: &str) -> Result<Timestamp, String> {
    let ago = || {
        let span = jiff::SignedDuration::try_from(parse_span(text).ok()?).ok()?;
        Timestamp::now().checked_sub(span).ok()
    };
    let local = || {
        let civil: jiff::civil::DateTime = text.parse().ok()?;
        Some(civil.to_zoned(jiff::tz::TimeZone::system()).ok()?.timestamp())
    };
    text.parse().ok().or_else(local).or_else(ago).ok_or_else(|| {
        "it must be like 2026-05-03, 2026-05-03T12:00, 2026-05-03T12:00:00Z, or 2d for two days ago"
            .to_owned()
    })
}
