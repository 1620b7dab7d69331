//! `vmkeep backup`: backups into vaults.

use clap::Args;
use vmkeep_steps::backup::Asked;

use super::args::Waiting;
use super::{Ended, Out, make};
use crate::api::types::BackupRequest;
use crate::client::Client;
use crate::text::parse_rate;

/// Back a running domain up into a vault.
#[derive(Clone, Debug, Args)]
pub struct Backup {
    /// Its name or UUID
    pub domain: String,
    /// The vault, by its name in the configuration (default: the only one, or `backup.vault`)
    #[arg(long, value_name = "NAME")]
    pub vault: Option<String>,
    /// Read everything; what the vault has already is not stored again
    #[arg(long, conflicts_with_all = ["incremental", "differential"])]
    pub full: bool,
    /// Read what has changed since the last backup, as far as that can be known (the default)
    #[arg(long, conflicts_with = "differential")]
    pub incremental: bool,
    /// Read what has changed since the last full backup
    #[arg(long)]
    pub differential: bool,
    /// Only these disks, by target: vda,vdb
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    pub disks: Vec<String>,
    /// Read at most so much per second: 100M (0: no limit)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// Freeze the guest's file systems for the instant (needs its agent)
    #[arg(long, conflicts_with = "no_quiesce")]
    pub quiesce: bool,
    /// Never freeze them (default: freeze when an agent answers)
    #[arg(long)]
    pub no_quiesce: bool,
    /// Let passwords and a TPM's state lie in a vault without encryption
    #[arg(long)]
    pub allow_plaintext: bool,
    /// Wait while the domain is busy, instead of being refused
    #[arg(long)]
    pub queue: bool,
    /// Waiting, dry run, reason.
    #[command(flatten)]
    pub waiting: Waiting,
}

pub(super) async fn back_up(client: &Client, out: &Out, args: Backup) -> Ended {
    let request = BackupRequest {
        domain: args.domain,
        vault: args.vault,
        kind: match (args.full, args.incremental, args.differential) {
            (true, ..) => Asked::Full,
            (_, true, _) => Asked::Incremental,
            (.., true) => Asked::Differential,
            _ => Asked::Auto,
        },
        disks: args.disks,
        bandwidth: args.bandwidth,
        quiesce: match (args.quiesce, args.no_quiesce) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        },
        allow_plaintext: args.allow_plaintext,
        queue: args.queue,
        reason: args.waiting.reason.clone(),
        dry_run: args.waiting.dry_run,
    };
    let accepted = client.post("/v1/backup", &request, args.waiting.key.as_deref()).await?;
    make::go_on(client, out, &args.waiting, accepted).await
}
