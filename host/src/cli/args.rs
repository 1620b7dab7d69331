//! The command line's words.

mod backups;
mod jobs;
mod journal;
mod offline;
mod vault;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use backups::{Catalogue, Delete, Protect, Prune, Restore, Snapshot};
pub use jobs::{How, Job, JobAct, Jobs};
pub use journal::{Audit, Engine, Export, PruneHistory, Store};
pub use offline::{Offline, OfflineRestore, OfflineVault};
pub use vault::{
    ExportFormat, ImportedImage, KeepBy, KeyRole, NewKey, OpenBy, OpenOtherBy, Vault, VaultCheck, VaultCopy,
    VaultExport, VaultGc, VaultImport, VaultInit, VaultKey, VaultPrune, VaultRef, VaultRepair, VaultVerify,
};

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

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One screen: daemon, domains, last good backups, running jobs, what needs attention
    Status,
    /// The domains of this host and their disks
    Domains,
    /// Back a domain up into plain files
    Snapshot(Snapshot),
    /// Back a running domain up into a vault: what has changed since the last time
    Backup(super::into_vault::Backup),
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
    /// Vaults: repositories of backups that several hosts may write to
    #[command(subcommand)]
    Vault(Box<Vault>),
    /// Without vmkeepd: list, verify and restore what is in a vault, also on a host that has nothing else
    #[command(subcommand, long_flag = "offline")]
    Offline(Box<Offline>),
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
