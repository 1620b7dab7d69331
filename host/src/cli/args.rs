//! The command line's words.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;
use vmkeep_store::EngineName;
use vmkeep_workflow::{JobStatus, Settle};

use crate::api::types::{OnBusyMemory, WaitBefore};
use crate::text::{parse_size, parse_span};

/// Crash-safe backups of KVM guests.
#[derive(Debug, Parser)]
#[command(name = "vmkeep", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// What every command understands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Set apart, so that a command's help begins with its own options.
const EVERYWHERE: &str = "Options of every command";

/// What every command understands.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Print JSON instead of text
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    pub json: bool,
    /// The daemon's socket (default: where vmkeepd of this user listens)
    #[arg(long, global = true, value_name = "PATH", help_heading = EVERYWHERE)]
    pub socket: Option<PathBuf>,
    /// The configuration file that names the socket
    #[arg(long, global = true, value_name = "FILE", help_heading = EVERYWHERE)]
    pub config: Option<PathBuf>,
}

/// How a command that makes a job goes on.
#[derive(Clone, Debug, Default, Args)]
pub struct Waiting {
    /// Return at once instead of waiting for the job to end
    #[arg(long)]
    pub no_wait: bool,
    /// Print the plan and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Why, for the journal
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// A key that makes repeating this very request harmless
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
}

/// What is done to a job, and why.
#[derive(Clone, Debug, Args)]
pub struct JobAct {
    /// The job: its id or the beginning of it
    pub job: String,
    /// Why, for the journal
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Say what it would do and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One screen: daemon, domains, last good backups, running jobs, what needs attention
    Status,
    /// The domains of this host and their disks
    Domains,
    /// Back a domain up into plain files while it runs
    Snapshot(Snapshot),
    /// Bring a backup back: as a new domain, or in place; or undo that
    Restore(Box<Restore>),
    /// The backups that there are
    List {
        /// Only those of this domain
        domain: Option<String>,
    },
    /// What a backup holds, or what a restore in place has set aside
    Show {
        /// Its id, the beginning of it, or its folder; or the job that set a machine aside
        backup: String,
    },
    /// Read a backup again and compare it with its manifest
    Verify {
        /// Its id, the beginning of it, or its folder
        backup: String,
        /// Waiting, dry run, reason.
        #[command(flatten)]
        waiting: Waiting,
    },
    /// The jobs, newest first
    Jobs(Jobs),
    /// One job: look at it, follow it, steer it
    #[command(subcommand)]
    Job(Job),
    /// Fold a job's journal again and check every decision; the exit status tells a divergence
    Replay {
        /// A job, or a file that `audit export` wrote
        what: String,
    },
    /// The journal as evidence
    #[command(subcommand)]
    Audit(Audit),
    /// The files that the journal is kept in
    #[command(subcommand)]
    Store(Store),
    /// What on this host would make backups fail, and the mend
    Doctor,
    /// The steps of a workflow as a graph, in DOT
    Diagram {
        /// Which; without one their names are printed
        workflow: Option<String>,
    },
    /// A completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Back a domain up.
#[derive(Clone, Debug, Args)]
pub struct Snapshot {
    /// Its name or UUID
    pub domain: String,
    /// Memory and disks at one instant (the default)
    #[arg(long, conflicts_with = "disk_only")]
    pub live: bool,
    /// The disks alone
    #[arg(long)]
    pub disk_only: bool,
    /// The root, or a folder below one (default: the first configured root)
    #[arg(long, value_name = "FOLDER")]
    pub to: Option<PathBuf>,
    /// Only these disks, by target: vda,vdb
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    pub disks: Vec<String>,
    /// The largest memory image: 8G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory_limit: Option<u64>,
    /// The longest time for saving memory: 5m
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    pub memory_time: Option<Duration>,
    /// When memory changes faster than it can be saved, or is too large
    #[arg(long, value_name = "WHAT", default_value = "disk-only")]
    pub on_busy_memory: OnBusyMemory,
    /// Copy at most so much per second: 100M (0: no limit)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub bandwidth: Option<u64>,
    /// Merge at most so much per second: 100M (0: no limit)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub merge_bandwidth: Option<u64>,
    /// Wait before this phase for `vmkeep job signal JOB PHASE`: retain, merge
    #[arg(long, value_name = "PHASE", value_delimiter = ',')]
    pub wait_before: Vec<WaitBefore>,
    /// The longest of each wait; then the job goes on by itself
    #[arg(long, value_name = "SPAN", value_parser = parse_span, default_value = "30m")]
    pub wait_limit: Duration,
    /// Freeze the guest's file systems for the instant (needs its agent; disk-only)
    #[arg(long, conflicts_with = "no_quiesce")]
    pub quiesce: bool,
    /// Never freeze them (default: freeze when an agent answers)
    #[arg(long)]
    pub no_quiesce: bool,
    /// Wait while the domain is busy, instead of being refused
    #[arg(long)]
    pub queue: bool,
    /// Waiting, dry run, reason.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// Bring a backup back: as a new domain, or in place of the old one; or undo that.
#[derive(Clone, Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["name", "in_place", "undo", "discard"]))]
#[command(group = clap::ArgGroup::new("which").args(["backup", "from", "undo", "discard"]).required(true))]
pub struct Restore {
    /// Its id, the beginning of it, or its folder
    pub backup: Option<String>,
    /// The folder of a backup, wherever it lies: no journal and no configured root is needed
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// Use a definition from such a folder although it reaches into this host (read it first!)
    #[arg(long)]
    pub trust_definition: bool,
    /// Restore beside the original, as a new domain of this name
    #[arg(long = "as", value_name = "NAME")]
    pub name: Option<String>,
    /// Restore in place of the original, which is kept aside until it is discarded
    #[arg(long)]
    pub in_place: bool,
    /// Bring back what this job has set aside
    #[arg(long, value_name = "JOB")]
    pub undo: Option<String>,
    /// Remove for good what this job has set aside
    #[arg(long, value_name = "JOB", conflicts_with_all = ["cold", "start", "paused"])]
    pub discard: Option<String>,
    /// With --as, where one disk goes: vda=/path/to/file (may be repeated)
    #[arg(long = "disk", value_name = "DISK=PATH", value_parser = disk_place, conflicts_with_all = ["in_place", "undo", "discard"])]
    pub places: Vec<(String, PathBuf)>,
    /// With --in-place, only these disks, by target: vda,vdb (needs --cold if the backup has memory)
    #[arg(long, value_name = "DISK", value_delimiter = ',', conflicts_with_all = ["name", "undo", "discard"])]
    pub disks: Vec<String>,
    /// Where all other disks go (default: with --as a folder of their own, with --in-place beside the old ones)
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["undo", "discard"])]
    pub folder: Option<PathBuf>,
    /// Leave the memory out: the guest will boot
    #[arg(long)]
    pub cold: bool,
    /// With --in-place, bring the backup's definition back as well
    #[arg(long, conflicts_with_all = ["name", "undo", "discard"])]
    pub definition: bool,
    /// Let it run (default with --as: paused with memory, shut off without; else: as it is now)
    #[arg(long, conflicts_with = "paused")]
    pub start: bool,
    /// Leave it paused
    #[arg(long)]
    pub paused: bool,
    /// With --as, let its network links be up from the start (the original may be running!)
    #[arg(long, conflicts_with_all = ["in_place", "undo", "discard"])]
    pub connect: bool,
    /// Save the memory of the machine that is there, and keep it aside with it
    #[arg(long, conflicts_with_all = ["name", "discard"])]
    pub save_old: bool,
    /// Pull the plug of the machine that is there if it does not shut down in time
    #[arg(long, conflicts_with_all = ["name", "discard"])]
    pub destroy: bool,
    /// How long the machine that is there may take to shut down (default: 3m)
    #[arg(long, value_name = "SPAN", value_parser = parse_span, conflicts_with_all = ["name", "discard"])]
    pub shutdown_time: Option<Duration>,
    /// Copy at most so much per second: 100M (0: no limit)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub bandwidth: Option<u64>,
    /// Waiting, dry run, reason.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// Which jobs.
#[derive(Clone, Debug, Args)]
pub struct Jobs {
    /// Only of this domain
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,
    /// Only of this workflow
    #[arg(long, value_name = "NAME")]
    pub workflow: Option<String>,
    /// Only in these states
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = job_status)]
    pub state: Vec<JobStatus>,
    /// Only those asked for within this span: 2d
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    pub within: Option<Duration>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub limit: usize,
}

/// Look at a job, follow it, steer it.
#[derive(Clone, Debug, Subcommand)]
pub enum Job {
    /// Its steps and where it stands
    Show {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// Follow it until it ends; the exit status is its own
    Watch {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// Its journal, event by event
    History {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// What happened and why, in plain words
    Explain {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// Give it up and take back what it did (past its point of no return it finishes instead)
    Cancel(JobAct),
    /// Let it wait at its next safe place
    Pause {
        /// The job and why.
        #[command(flatten)]
        act: JobAct,
        /// How long, at most
        #[arg(long = "for", value_name = "SPAN", value_parser = parse_span, default_value = "1h")]
        span: Duration,
    },
    /// End a pause
    Resume(JobAct),
    /// Send a job the word that it waits for: retain, merge
    Signal {
        /// The job and why.
        #[command(flatten)]
        act: JobAct,
        /// The signal's name
        name: String,
    },
    /// Let a job that needs attention look at the world again and go on
    Settle {
        /// The job and why.
        #[command(flatten)]
        act: JobAct,
        /// Go on from what is there; also run failed steps anew; or take everything back
        #[arg(long, value_enum, default_value_t)]
        how: How,
    },
    /// Give up a job that needs attention and leave what it made; lists what that is
    Abandon(JobAct),
}

/// How a job that needs attention is settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Look again and go on from what is there
    #[default]
    Probe,
    /// Look again, then run the failed steps anew
    Retry,
    /// Look again, then take back what can still be taken back
    Undo,
}

impl From<How> for Settle {
    fn from(how: How) -> Self {
        match how {
            How::Probe => Self::Probe,
            How::Retry => Self::Retry,
            How::Undo => Self::Undo,
        }
    }
}

/// The journal as evidence.
#[derive(Clone, Debug, Subcommand)]
pub enum Audit {
    /// Check every record of every stream, or of an exported file
    Verify {
        /// A file that `audit export` wrote; without one, the daemon's store
        file: Option<PathBuf>,
    },
    /// Write the journal, or the part of it that is asked for, as JSON lines
    Export(Export),
    /// Let the history of old ended jobs go; tombstones stay
    Prune(Prune),
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
pub struct Prune {
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

fn disk_place(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((disk, path)) if !disk.is_empty() && !path.is_empty() => Ok((disk.to_owned(), path.into())),
        _ => Err("it must be of the form vda=/path/to/file".to_owned()),
    }
}

fn job_status(text: &str) -> Result<JobStatus, String> {
    let value = serde_json::Value::String(text.replace('-', "_"));
    serde_json::from_value(value).map_err(|_| {
        "states are queued, running, paused, unwinding, needs_attention, succeeded, rolled_back, cancelled, refused, abandoned"
            .to_owned()
    })
}
