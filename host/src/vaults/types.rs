//! What is told of a vault, for programs: the JSON of `vmkeep vault`.

use jiff::Timestamp;
use serde::Serialize;
use vmkeep_vault::backups::{Backup, Backups, Hurt};
use vmkeep_vault::check::CheckReport;
use vmkeep_vault::copy::{CopyReport, Fate};
use vmkeep_vault::header::{Cipher, Header};
use vmkeep_vault::ids::BackupId;
use vmkeep_vault::manifest::BackupKind;
use vmkeep_vault::stats::{BackupStats, DomainStats, Objects, Stats};

/// What a vault is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// Its name on this host, or its address.
    pub vault: String,
    /// Its address.
    pub url: String,
    /// Its id.
    pub id: String,
    /// How it is encrypted; nothing without encryption.
    pub cipher: Option<&'static str>,
    /// Whether domains share nothing.
    pub separate_domains: bool,
    /// The version of its format.
    pub format: u32,
    /// What the key that opened it may do: `full` or `writer`.
    pub role: &'static str,
}

impl Identity {
    /// Of an open vault.
    #[must_use]
    pub fn of(settings: &crate::config::VaultSettings, vault: &vmkeep_vault::vault::Vault) -> Self {
        let header: &Header = vault.header();
        Self {
            vault: settings.label(),
            url: settings.url.to_string(),
            id: vault.id().to_string(),
            cipher: match header.cipher {
                Cipher::None => None,
                Cipher::XChaCha20Poly1305 => Some("xchacha20-poly1305"),
            },
            separate_domains: header.separate,
            format: header.format,
            role: role(vault.keys().role()),
        }
    }
}

/// A role's word.
#[must_use]
pub fn role(role: vmkeep_vault::keys::Role) -> &'static str {
    match role {
        vmkeep_vault::keys::Role::Full => "full",
        vmkeep_vault::keys::Role::Writer => "writer",
    }
}

/// A backup in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupRow {
    /// Its id.
    pub id: String,
    /// The end of it, which tells it from all others of the list.
    pub short: String,
    /// The domain's name.
    pub domain: String,
    /// The domain's UUID.
    pub domain_uuid: String,
    /// The point in time; nothing if its manifest cannot be read.
    pub at: Option<Timestamp>,
    /// `full`, `incremental` or `differential`.
    pub kind: Option<&'static str>,
    /// The targets of its disks.
    pub disks: Vec<String>,
    /// Bytes of its disks.
    pub size: u64,
    /// Bytes that were put for its disks when it was made.
    pub stored: u64,
    /// What its marks say: `checked`, `verified`, `hurt`, `protect`, `prune`, `ask`.
    pub marks: Vec<&'static str>,
    /// Why its manifest cannot be read.
    pub problem: Option<String>,
}

impl BackupRow {
    /// Of a backup that was listed.
    #[must_use]
    pub fn of(all: &Backups, id: BackupId, backup: &Backup) -> Self {
        let manifest = backup.manifest.as_ref().ok();
        Self {
            id: id.to_string(),
            short: id.to_string(),
            domain: manifest.map_or_else(String::new, |one| one.domain_name.clone()),
            domain_uuid: uuid::Uuid::from_bytes(*backup.domain.bytes()).to_string(),
            at: manifest.map(|one| one.taken),
            kind: manifest.map(|one| kind(one.kind)),
            disks: manifest
                .map(|one| one.disks.iter().map(|disk| disk.target.clone()).collect())
                .unwrap_or_default(),
            size: manifest.map_or(0, |one| one.disks.iter().map(|disk| disk.image.size).sum()),
            stored: manifest.map_or(0, |one| one.disks.iter().map(|disk| disk.stored).sum()),
            marks: marks(all, id),
            problem: backup.manifest.as_ref().err().map(ToString::to_string),
        }
    }

    /// Gives each of a list the shortest end of its id that tells it from the others, of eight digits at least.
    pub fn shorten(rows: &mut [Self]) {
        let ids: Vec<String> = rows.iter().map(|row| row.id.clone()).collect();
        for row in rows {
            let unique = (8..row.id.len()).map(|length| &row.id[row.id.len() - length..]);
            let mut unique = unique.filter(|end| ids.iter().filter(|id| id.ends_with(end)).count() < 2);
            if let Some(end) = unique.next() {
                row.short = end.to_owned();
            }
        }
    }
}

/// The kinds of a backup's marks, each once.
#[must_use]
pub fn marks(all: &Backups, id: BackupId) -> Vec<&'static str> {
    let mut marks: Vec<&'static str> = all.marks(id).map(|(kind, _)| kind.word()).collect();
    marks.dedup();
    marks
}

fn kind(kind: BackupKind) -> &'static str {
    match kind {
        BackupKind::Full => "full",
        BackupKind::Incremental => "incremental",
        BackupKind::Differential => "differential",
    }
}

/// A vault's backups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupList {
    /// Those that are there, by domain and point in time.
    pub backups: Vec<BackupRow>,
    /// Those that were checked once, whose manifest is gone although nobody pruned them.
    pub missing: Vec<String>,
}

/// A backup, with everything that its manifest says.
#[derive(Clone, Debug, Serialize)]
pub struct BackupDetail {
    /// What a list says.
    pub backup: BackupRow,
    /// Its marks, with who put them and when.
    pub marks: Vec<MarkRow>,
    /// Its manifest, without the definition, which may hold passwords, and without the vault's header.
    pub manifest: Option<serde_json::Value>,
}

/// A mark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MarkRow {
    /// What it says.
    pub kind: &'static str,
    /// Its id.
    pub id: String,
    /// When it was put, by the clock of who did.
    pub at: Option<Timestamp>,
    /// Who.
    pub by: Option<String>,
    /// When the reading began, of `verified`.
    pub since: Option<Timestamp>,
    /// What is bad, of `hurt`.
    pub hurt: Vec<Hurt>,
    /// Why it cannot be read. Then it counts for nothing, unless it protects.
    pub problem: Option<String>,
}

/// What a vault holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StatsRow {
    /// The backups of each domain.
    pub domains: Vec<DomainRow>,
    /// Packs of chunks: how many, and bytes.
    pub data: Amount,
    /// Packs of nodes.
    pub tree: Amount,
    /// Runs of the index.
    pub index: Amount,
    /// Of those, runs that count.
    pub usable_runs: usize,
    /// Of those, runs that cannot be read.
    pub unreadable_runs: usize,
    /// Bytes in packs that backups need, about.
    pub needed: u64,
    /// Bytes in packs that no backup needs, about.
    pub garbage: u64,
    /// One of so many blobs was looked at for these estimates.
    pub sampled: u64,
    /// Manifests that cannot be read.
    pub unreadable: usize,
    /// Backups whose manifest is gone although nobody pruned them.
    pub missing: usize,
    /// Users whom collections wait for.
    pub leases: usize,
    /// Packs that collections have condemned and not yet deleted.
    pub condemned_packs: usize,
    /// Places that were reported as bad.
    pub bad_places: usize,
}

/// Objects of a sort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// How many.
    pub count: u64,
    /// Bytes of them all.
    pub bytes: u64,
}

impl From<Objects> for Amount {
    fn from(objects: Objects) -> Self {
        Self { count: objects.count, bytes: objects.bytes }
    }
}

/// The backups of a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DomainRow {
    /// Its UUID.
    pub domain_uuid: String,
    /// Its name.
    pub domain: String,
    /// Its backups, by their points in time.
    pub backups: Vec<BackupStatsRow>,
}

/// What one backup takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackupStatsRow {
    /// Its id.
    pub id: String,
    /// Its point in time.
    pub at: Timestamp,
    /// What was asked for.
    pub kind: &'static str,
    /// Bytes of its images.
    pub logical: u64,
    /// Of those, bytes of chunks that are not zero.
    pub used: u64,
    /// Bytes that were put for its disks when it was made.
    pub put: u64,
    /// Bytes in packs of all that it needs, about.
    pub needs: u64,
    /// Of those, bytes that no other backup needs, about: what pruning it alone gives back in the end.
    pub unique: u64,
    /// Whether more is needed than is told here, because nodes of it could not be read.
    pub incomplete: bool,
}

impl From<&BackupStats> for BackupStatsRow {
    fn from(one: &BackupStats) -> Self {
        Self {
            id: one.id.to_string(),
            at: one.taken,
            kind: kind(one.kind),
            logical: one.logical,
            used: one.used,
            put: one.put,
            needs: one.needs,
            unique: one.unique,
            incomplete: one.incomplete,
        }
    }
}

impl From<&Stats> for StatsRow {
    fn from(stats: &Stats) -> Self {
        let domain = |(id, domain): (&vmkeep_vault::ids::DomainId, &DomainStats)| DomainRow {
            domain_uuid: uuid::Uuid::from_bytes(*id.bytes()).to_string(),
            domain: domain.name.clone(),
            backups: domain.backups.iter().map(Into::into).collect(),
        };
        Self {
            domains: stats.domains.iter().map(domain).collect(),
            data: stats.data.into(),
            tree: stats.tree.into(),
            index: stats.index.into(),
            usable_runs: stats.usable_runs,
            unreadable_runs: stats.unreadable_runs,
            needed: stats.needed,
            garbage: stats.garbage,
            sampled: stats.sampled,
            unreadable: stats.unreadable,
            missing: stats.missing,
            leases: stats.leases.standing,
            condemned_packs: stats.condemned.packs,
            bad_places: stats.damage.places,
        }
    }
}

/// How backups stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckRow {
    /// Whether nothing is wrong.
    pub clean: bool,
    /// Backups that need nothing that is not there.
    pub whole: Vec<String>,
    /// Of those, the ones of which all was read and found good.
    pub verified: Vec<String>,
    /// Those that do, and what.
    pub hurt: Vec<HurtRow>,
    /// Manifests that cannot be read, with the cause.
    pub unreadable: Vec<(String, String)>,
    /// Backups whose manifest is gone although nobody pruned them.
    pub missing: Vec<String>,
    /// Runs of the index that cannot be read, with the cause.
    pub runs: Vec<(String, String)>,
    /// Packs that are damaged.
    pub packs: Vec<String>,
    /// Bad places that were found and reported.
    pub damage: usize,
    /// Bytes of packs that were read.
    pub read: u64,
    /// How many packs that were.
    pub packs_read: u64,
    /// How many packs there are.
    pub packs_there: u64,
    /// The share of them that was to be read, if not all: `3/7`.
    pub slice: Option<String>,
}

/// A backup that lacks something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HurtRow {
    /// Its id.
    pub backup: String,
    /// What it lacks.
    pub hurt: Vec<Hurt>,
}

impl From<&CheckReport> for CheckRow {
    fn from(report: &CheckReport) -> Self {
        Self {
            clean: report.is_clean(),
            whole: report.whole.iter().map(ToString::to_string).collect(),
            verified: report.verified.iter().map(ToString::to_string).collect(),
            hurt: report
                .hurt
                .iter()
                .map(|(id, hurt)| HurtRow { backup: id.to_string(), hurt: hurt.clone() })
                .collect(),
            unreadable: report.unreadable.iter().map(|(id, why)| (id.to_string(), why.clone())).collect(),
            missing: report.missing.iter().map(ToString::to_string).collect(),
            runs: report.runs.iter().map(|(id, why)| (id.to_string(), why.clone())).collect(),
            packs: report.packs.iter().map(ToString::to_string).collect(),
            damage: report.damage,
            read: report.read,
            packs_read: report.packs_read,
            packs_there: report.packs_there,
            slice: None,
        }
    }
}

/// What became of a backup that was to be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FateRow {
    /// Its id.
    pub backup: String,
    /// `copied`, `already` or `refused`.
    pub fate: &'static str,
    /// Bytes that were read of chunks here.
    pub read: u64,
    /// Bytes that were put for them there.
    pub stored: u64,
    /// Why it was refused.
    pub why: Option<String>,
}

impl FateRow {
    /// Of one backup.
    #[must_use]
    pub fn of(backup: BackupId, fate: &Fate) -> Self {
        let row = Self { backup: backup.to_string(), fate: "already", read: 0, stored: 0, why: None };
        match fate {
            Fate::Copied(amount) => Self { fate: "copied", read: amount.read, stored: amount.stored, ..row },
            Fate::Already => row,
            Fate::Refused(refusal) => Self { fate: "refused", why: Some(refusal.to_string()), ..row },
        }
    }

    /// Of all of a copy.
    #[must_use]
    pub fn all(report: &CopyReport) -> Vec<Self> {
        report.fates.iter().map(|(backup, fate)| Self::of(*backup, fate)).collect()
    }
}
