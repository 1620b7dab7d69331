//! What is in a vault, and whether it is whole.

use serde::Serialize;
use vmkeep_vault::backend::address;
use vmkeep_vault::backend::trial::{self, Power, Verdict};
use vmkeep_vault::backups::{self, Backups};
use vmkeep_vault::check::{self, CheckReport, Share, What};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::BackupId;
use vmkeep_vault::lease::{self, Holder};
use vmkeep_vault::names::{LeasePart, ObjectName};
use vmkeep_workflow::Fault;

use super::{Opened, holder, open};
use crate::cli::args::{Global, VaultCheck, VaultRef, VaultVerify};
use crate::cli::show::vault as show;
use crate::cli::{Ended, Out};
use crate::codes;
use crate::vaults::types::{BackupDetail, BackupList, BackupRow, CheckRow, MarkRow, StatsRow};
use crate::vaults::{self, named};

/// Objects that are put to try a place: more than a page of S3 has.
const TRIED: u64 = 1100;

/// The exit status of something that is not as it should be, and was said.
pub(super) fn status(code: vmkeep_workflow::Code) -> u8 {
    u8::try_from(code.0).unwrap_or(1)
}

pub(in crate::cli) async fn list(
    global: &Global,
    out: &Out,
    vault: &VaultRef,
    domain: Option<&str>,
) -> Result<(), Fault> {
    let opened = open(global, vault).await?;
    let all = opened.backups().await?;
    let wanted = domain.map(|word| named::domains(&all, word)).transpose()?;
    let of = |domain: &_| wanted.as_ref().is_none_or(|wanted| wanted.contains(domain));
    let mut backups: Vec<BackupRow> = all
        .iter()
        .filter(|(_, backup)| of(&backup.domain))
        .map(|(id, backup)| BackupRow::of(&all, id, backup))
        .collect();
    backups.sort_by(|a, b| (&a.domain, &a.domain_uuid, a.at).cmp(&(&b.domain, &b.domain_uuid, b.at)));
    BackupRow::shorten(&mut backups);
    let missing = if wanted.is_none() { all.missing() } else { Vec::new() };
    let missing = missing.iter().map(ToString::to_string).collect();
    out.show(&BackupList { backups, missing }, show::list)
}

pub(super) async fn show(global: &Global, out: &Out, vault: &VaultRef, word: &str) -> Result<(), Fault> {
    let opened = open(global, vault).await?;
    let (all, id) = opened.backup(word).await?;
    let Some(backup) = all.get(id) else {
        return Err(Fault::permanent(codes::NO_SUCH_BACKUP, "show the backup", word, "it is gone"));
    };
    let mut row = BackupRow::of(&all, id, backup);
    BackupRow::shorten(std::slice::from_mut(&mut row));
    let manifest = match &backup.manifest {
        Ok(manifest) => {
            let mut value = serde_json::to_value(manifest)
                .map_err(|error| Fault::permanent(codes::UNDEFINED_ERROR, "show the backup", word, error))?;
            if let Some(fields) = value.as_object_mut() {
                // It may hold passwords; an export writes it into a file of its owner's.
                fields.remove("definition");
                fields.remove("header");
            }
            Some(value)
        }
        Err(_) => None,
    };
    let marks = marks(&opened, &all, id).await?;
    out.show(&BackupDetail { backup: row, marks, manifest }, show::backup)
}

async fn marks(opened: &Opened, all: &Backups, id: BackupId) -> Result<Vec<MarkRow>, Fault> {
    let mut rows = Vec::new();
    for (kind, mark) in all.marks(id) {
        let (said, problem) = match backups::read_mark(&opened.vault, id, kind, mark).await {
            Ok(Some(said)) => (Some(said), None),
            Ok(None) => continue,
            Err(error @ (VaultError::Damaged { .. } | VaultError::Newer { .. })) => {
                (None, Some(error.to_string()))
            }
            Err(error) => return Err(opened.fault("read the backup's marks", &error)),
        };
        rows.push(MarkRow {
            kind: kind.word(),
            id: mark.to_string(),
            at: said.as_ref().map(|said| said.at),
            by: said.as_ref().map(|said| said.by.clone()),
            since: said.as_ref().and_then(|said| said.since),
            hurt: said.map(|said| said.hurt).unwrap_or_default(),
            problem,
        });
    }
    Ok(rows)
}

pub(super) async fn stats(global: &Global, out: &Out, vault: &VaultRef) -> Result<(), Fault> {
    let opened = open(global, vault).await?;
    let stats = Box::pin(vmkeep_vault::stats::stats(&opened.vault, Some(&opened.cache()))).await;
    let stats = stats.map_err(|error| opened.fault("count what the vault holds", &error))?;
    out.show(&StatsRow::from(&stats), show::stats)
}

pub(in crate::cli) async fn check(global: &Global, out: &Out, args: &VaultCheck) -> Ended {
    let opened = open(global, &args.vault).await?;
    if args.backend {
        return place(&opened, out).await;
    }
    let what = What { only: None, read: args.read.then_some(Share::ALL) };
    let report = read(&opened, "check", what).await?;
    out.show(&CheckRow::from(&report), show::check)?;
    Ok(if report.is_clean() { 0 } else { status(codes::VAULT_DAMAGED) })
}

pub(super) async fn verify(global: &Global, out: &Out, args: &VaultVerify) -> Ended {
    let opened = open(global, &args.vault).await?;
    let only = match &args.backup {
        Some(word) => Some(opened.backup(word).await?.1),
        None => None,
    };
    let share = args.slice.unwrap_or(Share::ALL);
    let report = read(&opened, "verify", What { only, read: (!args.quick).then_some(share) }).await?;
    let row = CheckRow { slice: args.slice.map(|share| share.to_string()), ..CheckRow::from(&report) };
    out.show(&row, show::check)?;
    Ok(match only {
        _ if !report.is_clean() => status(codes::VAULT_DAMAGED),
        // It is gone by now, or a collection has moved something of it meanwhile.
        Some(id) if !report.whole.contains(&id) => status(codes::VAULT_BUSY),
        Some(id) if !args.quick && !report.verified.contains(&id) => status(codes::VAULT_BUSY),
        _ => 0,
    })
}

/// Checks backups, with what this host has read of the vault before.
async fn read(opened: &Opened, purpose: &str, what: What) -> Result<CheckReport, Fault> {
    let (vault, cache, holder) = (&opened.vault, opened.cache(), holder(purpose));
    let mut readings = opened.memory.readings()?;
    let report = Box::pin(check::verify(vault, &holder, Some(&cache), what, &mut readings)).await;
    // Also after a failure: it was read.
    let kept = if what.read.is_some() { opened.memory.keep_readings(&readings) } else { Ok(()) };
    let report = report.map_err(|error| opened.fault("check the vault", &error))?;
    kept.map(|()| report)
}

/// What a place does of what is relied upon.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Place {
    /// Whether all that could be tried was kept.
    pub(in crate::cli) kept: bool,
    /// Each promise, whether it was kept (nothing: not tried), and how it was not.
    pub(in crate::cli) promises: Vec<(String, Option<bool>, Option<String>)>,
    /// Whether these credentials can delete; nothing if that could not be told.
    pub(in crate::cli) deletes: Option<bool>,
    /// Whether they can overwrite.
    pub(in crate::cli) overwrites: Option<bool>,
}

async fn place(opened: &Opened, out: &Out) -> Ended {
    const DOING: &str = "try the vault's place";
    let settings = &opened.settings;
    let second = address::open(&settings.url, &settings.options(false)).await;
    let second = second.map_err(|error| vaults::backend_fault(DOING, settings, &error))?;
    let tried = Box::pin(trial::trial(&opened.vault, &*second, &holder("check --backend"), TRIED)).await;
    let report = tried.map_err(|error| opened.fault(DOING, &error))?;
    let promise = |(promise, verdict): &(trial::Promise, Verdict)| {
        let (kept, how) = match verdict {
            Verdict::Kept => (Some(true), None),
            Verdict::Broken(how) => (Some(false), Some(how.clone())),
            Verdict::Denied(how) => (None, Some(how.clone())),
        };
        (promise.to_string(), kept, how)
    };
    let power = |power: &Power| match power {
        Power::Yes => Some(true),
        Power::No => Some(false),
        Power::Unknown(_) => None,
    };
    let place = Place {
        kept: report.is_kept(),
        promises: report.promises.iter().map(promise).collect(),
        deletes: power(&report.powers.deletes),
        overwrites: power(&report.powers.overwrites),
    };
    out.show(&place, show::place)?;
    Ok(if place.kept { 0 } else { status(codes::VAULT_UNFIT) })
}

/// Somebody who uses the vault.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct LeaseRow {
    pub(in crate::cli) id: String,
    /// The host, as it says.
    pub(in crate::cli) host: Option<String>,
    /// What for, as it says.
    pub(in crate::cli) purpose: Option<String>,
    /// Whether it collects.
    pub(in crate::cli) collects: bool,
    /// How often it has shown that it is alive, each five minutes.
    pub(in crate::cli) beats: u64,
}

pub(super) async fn leases(global: &Global, out: &Out, vault: &VaultRef) -> Result<(), Fault> {
    let opened = open(global, vault).await?;
    let failed = |error: VaultError| opened.fault("list who uses the vault", &error);
    let mut rows = Vec::new();
    for (id, standing) in lease::all(&opened.vault).await.map_err(failed)? {
        if standing.is_over() {
            continue;
        }
        let said = said_by(&opened, id).await.map_err(failed)?;
        rows.push(LeaseRow {
            id: id.to_string(),
            // One that cannot be read counts as a collector's.
            collects: said.as_ref().is_none_or(|said| said.collects),
            host: said.as_ref().map(|said| said.host.clone()),
            purpose: said.map(|said| said.purpose),
            beats: standing.beat.map_or(0, |last| last.saturating_add(1)),
        });
    }
    out.show(&rows, |rows| show::leases(rows))
}

/// What a lease says of its holder; nothing if it cannot be read.
async fn said_by(opened: &Opened, id: vmkeep_vault::ids::LeaseId) -> Result<Option<Holder>, VaultError> {
    let name = ObjectName::Lease(id, LeasePart::Begun);
    let Some(object) = opened.vault.backend().get(&name.to_string(), None).await? else { return Ok(None) };
    Ok(vmkeep_vault::codec::decode(opened.vault.keys(), &name, &object).ok())
}
