//! Words about backups in folders.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::Waiting;
use crate::api::types::{ImageFormat, OnBusyMemory, RamDisk, WaitBefore, WithoutState};
use crate::cli::backups::end_of;
use crate::text::{parse_rate, parse_size, parse_span};

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
    /// Its id, the beginning of it, or its folder; with --vault its id, or the beginning or the end of that
    pub backup: Option<String>,
    /// The vault that it is in, by its name in the configuration
    #[arg(long, value_name = "NAME", conflicts_with_all = ["from", "undo", "discard"])]
    pub vault: Option<String>,
    /// With --vault, also a backup that is unchecked, to be pruned, or known to be damaged
    #[arg(long, requires = "vault")]
    pub unchecked: bool,
    /// With --vault, what the new images are (default: raw)
    #[arg(long, value_name = "FORMAT", requires = "vault")]
    pub format: Option<ImageFormat>,
    /// The folder of a backup, wherever it lies: no journal and no configured root is needed
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// Use a definition from such a folder, or from a vault without encryption, although it reaches into this host (read it
    /// first!)
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
    #[arg(long, value_name = "DATE", value_parser = end_of)]
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

fn disk_place(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((disk, path)) if !disk.is_empty() && !path.is_empty() => Ok((disk.to_owned(), path.into())),
        _ => Err("it must be of the form vda=/path/to/file".to_owned()),
    }
}
