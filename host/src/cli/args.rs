//! The command line's words.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::Timestamp;
use vmkeep_store::EngineName;
use vmkeep_store::heads::{NoKey, PublicKey};
use vmkeep_workflow::{JobStatus, Settle};

use crate::api::types::{OnBusyMemory, RamDisk, WaitBefore, WithoutState};
use crate::text::{parse_rate, parse_size, parse_span};

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

/// What the doctor does.
#[derive(Clone, Debug, Args)]
pub struct Doctor {
    /// Take away what jobs that are over have left, as far as that is safe, by a job for each domain
    #[arg(long)]
    pub repair: bool,
    /// Return at once instead of waiting for the jobs to end
    #[arg(long, requires = "repair")]
    pub no_wait: bool,
    /// Print the plans and change nothing
    #[arg(long, requires = "repair")]
    pub dry_run: bool,
    /// Why, for the journal
    #[arg(long, value_name = "TEXT", requires = "repair")]
    pub reason: Option<String>,
    /// A key that makes repeating this very request harmless
    #[arg(long, value_name = "KEY", requires = "repair")]
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
    /// Back a domain up into plain files
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
    /// Delete backups: all of those that are named, or none
    Delete(Delete),
    /// Keep the last backups of a domain and delete older ones, once the newest was read again
    Prune(Prune),
    /// Protect a backup from deletion
    Protect(Protect),
    /// End a protection
    Unprotect {
        /// The backup: its id, the beginning of it, or its folder
        backup: String,
        /// Why, for the catalogue's history
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Say whether it could be done and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Which backups there are and were
    #[command(subcommand)]
    Catalogue(Catalogue),
    /// The jobs, newest first
    Jobs(Jobs),
    /// One job: look at it, follow it, steer it
    #[command(subcommand)]
    Job(Job),
    /// Fold a job's journal again and check every decision; the exit status tells a divergence
    Replay {
        /// A job; a file that `audit export` wrote; or a folder of such files (*.jsonl)
        what: String,
    },
    /// The journal as evidence
    #[command(subcommand)]
    Audit(Audit),
    /// The files that the journal is kept in
    #[command(subcommand)]
    Store(Store),
    /// What on this host would make backups fail, what jobs have left behind, and the mend
    Doctor(Doctor),
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
    /// Memory and disks at one instant, while the guest runs (the default)
    #[arg(long, conflicts_with = "disk_only")]
    pub live: bool,
    /// The disks alone
    #[arg(long)]
    pub disk_only: bool,
    /// Save the guest to a file, load it again and let it run: it is down for a moment, and never slowed down before
    #[arg(long, conflicts_with_all = ["live", "disk_only", "quiesce"])]
    pub save: bool,
    /// With --save: whether its state goes to the configured RAM disk first
    #[arg(long, value_name = "HOW", default_value = "prefer")]
    pub ram_disk: RamDisk,
    /// With --save: what to do if the state is lost before it is in the backup
    #[arg(long, value_name = "WHAT", default_value = "fail")]
    pub without_state: WithoutState,
    /// The root, or a folder below one (default: the first configured root)
    #[arg(long, value_name = "FOLDER")]
    pub to: Option<PathBuf>,
    /// Only these disks, by target: vda,vdb
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    pub disks: Vec<String>,
    /// The largest memory image: 8G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory_limit: Option<u64>,
    /// The longest time for saving memory: 5m (0s: none; with `--on-busy-memory pause` the guest is stopped at once)
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    pub memory_time: Option<Duration>,
    /// When memory changes faster than it can be saved, or is too large
    #[arg(long, value_name = "WHAT", default_value = "disk-only")]
    pub on_busy_memory: OnBusyMemory,
    /// Copy at most so much per second: 100M (0: no limit)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// Merge at most so much per second: 100M (0: no limit)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
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
    /// Keep so many backups of the domain below that root, and delete older ones once this one is there and was read
    /// again (0: keep all; default: as configured)
    #[arg(long, value_name = "N")]
    pub keep: Option<u32>,
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
    /// Let it start with the host (default: it does not, even if the original does)
    #[arg(long)]
    pub autostart: bool,
    /// Copy at most so much per second: 100M (0: no limit)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// Waiting, dry run, reason.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// Delete backups.
#[derive(Clone, Debug, Args)]
pub struct Delete {
    /// Their ids, beginnings of those, or folders
    #[arg(required = true, value_name = "BACKUP")]
    pub backups: Vec<String>,
    /// Even if no other whole backup of the domain is left then (needs --reason)
    #[arg(long, requires = "reason")]
    pub last_copy: bool,
    /// Waiting, dry run, reason.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// Thin backups out.
#[derive(Clone, Debug, Args)]
pub struct Prune {
    /// Name or UUID of the domain (default: every domain that has backups)
    pub domain: Option<String>,
    /// How many whole backups stay below each root; protected ones stay besides
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep: u32,
    /// Waiting, dry run, reason.
    #[command(flatten)]
    pub waiting: Waiting,
}

/// Protect a backup.
#[derive(Clone, Debug, Args)]
pub struct Protect {
    /// The backup: its id, the beginning of it, or its folder
    pub backup: String,
    /// Until the end of this day, or this instant: 2027-01-31 (default: until it is unprotected)
    #[arg(long, value_name = "DATE", value_parser = super::backups::end_of)]
    pub until: Option<Timestamp>,
    /// Why; it lies beside the backup
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Say whether it could be done and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Which backups there are and were.
#[derive(Clone, Debug, Subcommand)]
pub enum Catalogue {
    /// Read every manifest anew; needs nothing but the folders
    Rebuild {
        /// Below this folder (default: below the configured roots)
        #[arg(long, value_name = "FOLDER")]
        from: Option<PathBuf>,
        /// Why, for the catalogue's history
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Say what is found and write nothing down
        #[arg(long)]
        dry_run: bool,
    },
    /// Forget a backup that is missing
    Forget {
        /// Its id or the beginning of it
        backup: String,
        /// Why, for the catalogue's history
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Say whether it could be done and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// What was seen, protected, deleted and forgotten, by whom and why
    History,
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
