//! What is asked of vmkeepd.

use fastrand::Rng;
use serde_json::Value;

use crate::oracle::Expected;
use crate::support::Host;

/// The restored copy's domain.
pub const COPY: &str = "copy";

/// The vault's name.
pub const VAULT: &str = "main";

/// The quickest way to bring a guest to rest.
const PULL_THE_PLUG: [&str; 3] = ["--destroy", "--shutdown-time", "0s"];

/// One job.
#[derive(Clone, Debug)]
pub enum Order {
    Snapshot(&'static [&'static str]),
    /// A copy beside the running domain.
    Restore {
        backup: String,
        cold: bool,
    },
    /// A backup takes the domain's place.
    InPlace {
        backup: String,
        how: &'static [&'static str],
    },
    /// The machine that is kept aside comes back.
    Undo(String),
    /// The machine that is kept aside goes.
    Discard(String),
    Delete(String),
    Verify(String),
    /// What has changed, or everything, into the vault.
    Backup(&'static [&'static str]),
    /// A backup in the vault becomes a copy beside the running domain.
    Fetch(String),
}

const SNAPSHOTS: [&[&str]; 4] = [&["--disk-only"], &["--save"], &["--bandwidth", "8M"], &[]];
const BACKUPS: [&[&str]; 4] = [&[], &["--bandwidth", "16M"], &["--differential"], &["--full"]];
const EXCHANGES: [&[&str]; 3] = [&[], &["--cold"], &["--save-old"]];

impl Order {
    /// One that can be given.
    pub fn any(rng: &mut Rng, expected: &Expected) -> Self {
        let backup = |rng: &mut Rng| rng.choice(expected.backups.keys()).unwrap().clone();
        match (rng.u8(0..14), expected.backups.len()) {
            (10..=12, _) => Self::Backup(rng.choice(BACKUPS).unwrap()),
            (13, _) => match rng.choice(expected.vaulted.keys()) {
                Some(backup) => Self::Fetch(backup.clone()),
                None => Self::Backup(&[]),
            },
            (5, 1..) => Self::Restore { backup: backup(rng), cold: rng.bool() },
            (6 | 7, 1..) => match expected.kept.last_key_value() {
                Some((job, _)) if rng.bool() => Self::Undo(job.clone()),
                Some((job, _)) => Self::Discard(job.clone()),
                None => Self::InPlace { backup: backup(rng), how: rng.choice(EXCHANGES).unwrap() },
            },
            // The last one would have to be asked for twice.
            (8, 2..) | (0..=4, 6..) => Self::Delete(backup(rng)),
            (9, 1..) => Self::Verify(backup(rng)),
            _ => Self::Snapshot(rng.choice(SNAPSHOTS).unwrap()),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Snapshot(_) => "snapshot",
            Self::Restore { .. } => "restore",
            Self::InPlace { .. } => "in place",
            Self::Undo(_) => "undo",
            Self::Discard(_) => "discard",
            Self::Delete(_) => "delete",
            Self::Verify(_) => "verify",
            Self::Backup(_) => "backup",
            Self::Fetch(_) => "fetch",
        }
    }

    /// About as long as nothing else happens in it, in milliseconds.
    pub fn lasts_ms(&self) -> u64 {
        match self {
            Self::Snapshot(_) | Self::Backup(_) => 900,
            Self::Restore { .. } | Self::InPlace { .. } | Self::Undo(_) | Self::Fetch(_) => 700,
            Self::Discard(_) | Self::Verify(_) => 150,
            Self::Delete(_) => 50,
        }
    }

    fn words(&self) -> Vec<&str> {
        match self {
            Self::Snapshot(how) => [&["snapshot", "web1"], *how].concat(),
            Self::Restore { backup, cold } => {
                let mut words = vec!["restore", backup, "--as", COPY];
                words.extend(cold.then_some("--cold"));
                words
            }
            Self::InPlace { backup, how } => {
                [&["restore", backup, "--in-place"], &PULL_THE_PLUG[..], *how].concat()
            }
            Self::Undo(job) => [&["restore", "--undo", job], &PULL_THE_PLUG[..]].concat(),
            Self::Discard(job) => vec!["restore", "--discard", job, "--reason", "chaos"],
            Self::Delete(backup) => vec!["delete", backup, "--reason", "chaos"],
            Self::Verify(backup) => vec!["verify", backup],
            Self::Backup(how) => [&["backup", "web1"], *how].concat(),
            Self::Fetch(backup) => vec!["restore", backup, "--vault", VAULT, "--as", COPY],
        }
    }

    /// The command line.
    pub fn told(&self) -> String {
        self.words().join(" ")
    }

    /// Gives it; returns the job.
    pub fn begin(&self, host: &Host) -> String {
        let answer = host.json(&[&self.words()[..], &["--no-wait"]].concat());
        // Backups of several domains are deleted by a job each.
        let one = answer.as_array().map_or(&answer, |all| &all[0]);
        let id = [&one["id"], &one["job"]["id"]].into_iter().find_map(Value::as_str);
        id.unwrap_or_else(|| panic!("no job: {answer:#}")).to_owned()
    }
}
