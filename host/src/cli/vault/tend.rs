//! Pruning, protecting, collecting and repairing.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;
use vmkeep_vault::backend::address;
use vmkeep_vault::backups::Backups;
use vmkeep_vault::check::CheckReport;
use vmkeep_vault::collect::{self, Collector, Ended as CollectEnded, Policy, Report};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_vault::keys::wrap::Credential;
use vmkeep_vault::lease;
use vmkeep_vault::marks::{self, Ending, Marks, Protection, Pruned};
use vmkeep_vault::names::{MarkKind, ObjectName};
use vmkeep_vault::repair::{self, Donor, HeaderCopy, HeaderRepair, Indexed, ManifestRepair, OtherVault};
use vmkeep_vault::watch::Watch;
use vmkeep_workflow::Fault;

use super::look::status;
use super::{Opened, holder, open, open_other, passphrase, recovery, settings};
use crate::cli::args::{Global, VaultGc, VaultPrune, VaultRef, VaultRepair};
use crate::cli::make::whole;
use crate::cli::show::vault as show;
use crate::cli::{Ended, Out, config};
use crate::codes;
use crate::vaults::remembered::Memory;
use crate::vaults::types::CheckRow;
use crate::vaults::{self, named};

/// What a collection did.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Collected {
    /// `done`, `nothing`, `others`, `blocked`, `waiting`, `revoked`; of a dry run `planned`.
    pub(in crate::cli) ended: &'static str,
    /// Who or what is in the way.
    pub(in crate::cli) because: Vec<String>,
    /// Backups that were condemned.
    pub(in crate::cli) doomed: Vec<String>,
    /// Backups that are to be pruned, and stay for now.
    pub(in crate::cli) spared: Vec<String>,
    /// Whether more were to go than was expected.
    pub(in crate::cli) alarming: bool,
    /// Packs that were given up.
    pub(in crate::cli) given_up: usize,
    /// Blobs that were moved.
    pub(in crate::cli) moved: u64,
    /// Their stored bytes.
    pub(in crate::cli) moved_bytes: u64,
    /// Packs of which something that is needed could not be read: they stay.
    pub(in crate::cli) kept: Vec<String>,
    /// Objects that were deleted.
    pub(in crate::cli) deleted: u64,
    /// Of a dry run: bytes of the packs that would be given up, and those of them that would be moved.
    pub(in crate::cli) would: Option<(u64, u64)>,
}

impl From<&Report> for Collected {
    fn from(report: &Report) -> Self {
        let texts =
            |ids: &BTreeSet<vmkeep_vault::ids::LeaseId>| ids.iter().map(ToString::to_string).collect();
        let (ended, because) = match &report.ended {
            CollectEnded::Done => ("done", Vec::new()),
            CollectEnded::Nothing => ("nothing", Vec::new()),
            CollectEnded::Others(leases) => ("others", texts(leases)),
            CollectEnded::Blocked(what) => {
                let one = |(id, why): &(Option<BackupId>, String)| match id {
                    Some(id) => format!("{id}: {why}"),
                    None => why.clone(),
                };
                ("blocked", what.iter().map(one).collect())
            }
            CollectEnded::Waiting(leases) => ("waiting", texts(leases)),
            CollectEnded::Revoked => ("revoked", Vec::new()),
            CollectEnded::Planned(_) => ("planned", Vec::new()),
        };
        let would = match &report.ended {
            CollectEnded::Planned(frees) => Some((frees.given_up, frees.moved)),
            _ => None,
        };
        Self {
            ended,
            because,
            doomed: report.doomed.iter().map(ToString::to_string).collect(),
            spared: report.spared.iter().map(ToString::to_string).collect(),
            alarming: report.alarming,
            given_up: report.given_up,
            moved: report.moved.0,
            moved_bytes: report.moved.1,
            kept: report.kept.iter().map(ToString::to_string).collect(),
            deleted: report.deleted,
            would,
        }
    }
}

pub(super) async fn gc(global: &Global, out: &Out, args: &VaultGc) -> Ended {
    let opened = open(global, &args.vault).await?;
    let policy = Policy {
        worth: args.worth,
        wait: args.wait,
        prune_delay: args.prune_delay,
        expected: args.expect,
        dry_run: args.dry_run,
    };
    let mut collector = Collector::new(holder("gc"), Some(opened.cache()), policy, Watch::default());
    collector.known = opened.memory.prunes()?;
    let collected = Box::pin(collect::collect(&opened.vault, &mut collector, Timestamp::now())).await;
    // Also after a failure: it was seen.
    let kept = opened.memory.keep_prunes(&collector.known);
    let report = collected.map_err(|error| room_first(opened.fault("collect", &error)))?;
    kept?;
    out.show(&Collected::from(&report), show::collected)?;
    Ok(match report.ended {
        CollectEnded::Done | CollectEnded::Nothing | CollectEnded::Planned(_) => 0,
        CollectEnded::Blocked(_) => status(codes::VAULT_DAMAGED),
        _ => status(codes::VAULT_BUSY),
    })
}

/// A backup that is to go.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct PrunedRow {
    pub(in crate::cli) backup: String,
    /// `ordered`, `asked`, `already`, `protected`, or `would`.
    pub(in crate::cli) fate: &'static str,
}

pub(super) async fn prune(global: &Global, out: &Out, args: &VaultPrune) -> Ended {
    const DOING: &str = "prune";
    let opened = open(global, &args.vault).await?;
    let all = opened.backups().await?;
    let ids: BTreeSet<BackupId> =
        args.backups.iter().map(|word| named::backup(&all, word, true)).collect::<Result<_, _>>()?;
    // All of them or none, as far as that can be known beforehand.
    for id in &ids {
        let standing = all.all_marks().protections(&opened.vault, *id).await;
        if !standing.map_err(|error| opened.fault(DOING, &error))?.is_empty() {
            return Err(Fault::permanent(codes::INVALID_STATE, DOING, id.to_string(), "it is protected")
                .remedy("Nothing was ordered. `vmkeep vault unprotect VAULT BACKUP` ends that, if its owner agrees"));
        }
    }
    if !args.last
        && let Some(domain) = bereft(&all, &ids)
    {
        let cause = format!("no other checked backup of {domain} would be left in the vault");
        return Err(Fault::permanent(codes::INVALID_STATE, DOING, domain, cause)
            .remedy("Nothing was ordered. Say --last if they may all go"));
    }
    let mut rows = Vec::new();
    for id in ids {
        let fate = if args.dry_run { "would" } else { order(&opened, id, args.ask).await? };
        rows.push(PrunedRow { backup: id.to_string(), fate });
    }
    out.show(&rows, |rows| show::pruned(rows))?;
    let refused = rows.iter().any(|row| row.fate == "protected");
    Ok(if refused { status(codes::INVALID_STATE) } else { 0 })
}

/// Orders that a backup goes, or asks for it. What became of that, in a word.
pub(super) async fn order(opened: &Opened, id: BackupId, ask: bool) -> Result<&'static str, Fault> {
    let by = holder("prune").host;
    let ordered = match ask {
        true => marks::ask(&opened.vault, id, &by).await,
        false => marks::prune(&opened.vault, id, &by).await,
    };
    Ok(match ordered.map_err(|error| unable(opened, &error))? {
        Pruned::Marked(_) if ask => "asked",
        Pruned::Marked(_) => "ordered",
        Pruned::Already(_) => "already",
        Pruned::Protected(_) => "protected",
    })
}

/// What makes room needs a little itself: whoever lacks that is not sent to do the same again.
fn room_first(fault: Fault) -> Fault {
    if fault.code != codes::NOT_ENOUGH_DISK_SPACE {
        return fault;
    }
    fault.remedy(
        "Free some KiB there first, of something else: a prune and a collection write small notes before they delete \
         anything. Then do it again",
    )
}

fn unable(opened: &Opened, error: &VaultError) -> Fault {
    let fault = room_first(opened.fault("prune", error));
    if fault.code == codes::VAULT_MAY_NOT {
        return fault.remedy("Prune with the full key; or ask for it with this one: --ask");
    }
    fault
}

/// The name of a domain of which no checked backup would be left.
fn bereft(all: &Backups, going: &BTreeSet<BackupId>) -> Option<String> {
    let stays = |id: BackupId| {
        !going.contains(&id) && all.has(id, MarkKind::Checked) && !all.has(id, MarkKind::Prune)
    };
    // One that is being pruned already leaves nobody bereft by that.
    let named = going.iter().filter(|id| !all.has(**id, MarkKind::Prune) && all.has(**id, MarkKind::Checked));
    let domains: BTreeSet<DomainId> = named.filter_map(|id| Some(all.get(*id)?.domain)).collect();
    let left = |domain: &DomainId| all.iter().any(|(id, one)| one.domain == *domain && stays(id));
    let bereft = domains.into_iter().find(|domain| !left(domain))?;
    let name = all.iter().find_map(|(_, one)| {
        (one.domain == bereft).then(|| one.manifest.as_ref().ok().map(|one| one.domain_name.clone()))?
    });
    Some(name.filter(|name| !name.is_empty()).unwrap_or_else(|| bereft.to_string()))
}

pub(super) async fn protect(global: &Global, out: &Out, vault: &VaultRef, word: &str) -> Ended {
    const DOING: &str = "protect the backup";
    let opened = open(global, vault).await?;
    let (_, id) = opened.backup(word).await?;
    let protected = Box::pin(marks::protect(&opened.vault, id, &holder("protect"))).await;
    let refused = |cause: &str| Fault::permanent(codes::INVALID_STATE, DOING, id.to_string(), cause);
    match protected.map_err(|error| opened.fault(DOING, &error))? {
        Protection::Stands(mark) => {
            let row = serde_json::json!({ "backup": id.to_string(), "protection": mark.to_string() });
            out.show(&row, |_| format!("backup {id} is protected\n"))?;
            Ok(0)
        }
        Protection::TooLate(_) => Err(refused("it is to be pruned, and may be gone already").remedy(
            "Nobody takes a prune back. While it is still there: `vmkeep vault copy`, `vmkeep vault export`",
        )),
        Protection::Absent(_) => Err(refused("it is gone")),
    }
}

pub(super) async fn unprotect(
    global: &Global,
    out: &Out,
    vault: &VaultRef,
    word: &str,
    dry_run: bool,
) -> Result<(), Fault> {
    const DOING: &str = "end the protection";
    let opened = open(global, vault).await?;
    let failed = |error: VaultError| opened.fault(DOING, &error);
    let (_, id) = opened.backup(word).await?;
    let listed = Marks::list(&opened.vault).await.map_err(failed)?;
    let standing = listed.protections(&opened.vault, id).await.map_err(failed)?;
    let Some(last) = standing.last().copied() else {
        return Err(Fault::permanent(codes::INVALID_STATE, DOING, id.to_string(), "nothing protects it"));
    };
    let by = holder(DOING).host;
    if !dry_run {
        for mark in standing.iter().filter(|mark| **mark != last) {
            marks::unprotect(&opened.vault, id, *mark, &by).await.map_err(failed)?;
        }
    }
    let goes = match marks::ending(&opened.vault, id, last).await.map_err(failed)? {
        Ending::LetsGo => true,
        Ending::Harmless => false,
        // Of a dry run: the others would be ended too.
        Ending::Others(_) => !listed.prunes(&opened.vault, id).await.map_err(failed)?.is_empty(),
    };
    if !dry_run {
        marks::unprotect(&opened.vault, id, last, &by).await.map_err(failed)?;
    }
    let row = serde_json::json!({ "backup": id.to_string(), "ended": standing.len(), "goes": goes, "dry_run": dry_run });
    out.show(&row, |_| show::unprotected(&id.to_string(), goes, dry_run))
}

pub(super) async fn revoke(global: &Global, out: &Out, vault: &VaultRef, word: &str) -> Result<(), Fault> {
    const DOING: &str = "give a user of the vault up";
    let opened = open(global, vault).await?;
    let failed = |error: VaultError| opened.fault(DOING, &error);
    let all = lease::all(&opened.vault).await.map_err(failed)?;
    let standing = all.iter().filter(|(_, standing)| !standing.is_over()).map(|(id, _)| *id);
    let id = named::one(standing, word, "lease").map_err(|(code, cause)| {
        let code = if code == codes::NO_SUCH_BACKUP { codes::INVALID_STATE } else { code };
        Fault::permanent(code, DOING, word, cause).remedy("`vmkeep vault leases VAULT`")
    })?;
    lease::revoke(&opened.vault, id, &holder("revoke")).await.map_err(failed)?;
    out.show(&serde_json::json!({ "lease": id.to_string() }), |_| format!("nobody waits for {id} any more\n"))
}

/// What was healed.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Healed {
    /// Blobs that were found in another place of the vault.
    pub(in crate::cli) moved: u64,
    /// Blobs that the other vault had.
    pub(in crate::cli) given: u64,
    /// Bytes of packs that were put.
    pub(in crate::cli) stored: u64,
    /// Who failed, and how first.
    pub(in crate::cli) failures: Vec<(String, String)>,
    /// Whether it is to be done again, because it was given up for dead meanwhile.
    pub(in crate::cli) revoked: bool,
    /// How things stand now.
    pub(in crate::cli) now: CheckRow,
}

pub(super) async fn repair(global: &Global, out: &Out, args: &VaultRepair) -> Ended {
    if args.header {
        return header(global, out, args).await;
    }
    let opened = open(global, &args.vault).await?;
    let cache = opened.cache();
    let failed = |error: VaultError| opened.fault("repair the vault", &error);
    if args.index {
        let done = Box::pin(repair::index(&opened.vault, &holder("repair --index"), Some(&cache))).await;
        let done = done.map_err(failed)?;
        let ended = match done.ended {
            Indexed::Nothing => "nothing",
            Indexed::Put => "put",
            Indexed::Others(_) => "others",
            Indexed::Revoked => "revoked",
        };
        let row = serde_json::json!({
            "ended": ended,
            "packs": done.packs,
            "blobs": done.blobs,
            "set_aside": done.set_aside.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "missing": done.missing.iter().map(ToString::to_string).collect::<Vec<_>>(),
        });
        out.show(&row, |_| show::indexed(&done))?;
        return Ok(match done.ended {
            Indexed::Nothing | Indexed::Put => 0,
            Indexed::Others(_) | Indexed::Revoked => status(codes::VAULT_BUSY),
        });
    }
    if let Some(file) = &args.manifest {
        return manifest(&opened, out, &whole(file)?).await;
    }
    let other = match &args.from {
        Some(from) => Some(open_other(global, from, &args.other).await?),
        None => None,
    };
    let donor = match &other {
        Some(other) => {
            let (cache, reader) = (other.cache(), holder("repair another"));
            let donor = OtherVault::open(&other.vault, &reader, Some(&cache));
            Some(Box::pin(donor).await.map_err(|error| other.fault("read from the other vault", &error))?)
        }
        None => None,
    };
    let donors: Vec<&dyn Donor> = donor.iter().map(|donor| donor as &dyn Donor).collect();
    let healed = Box::pin(repair::heal(&opened.vault, &holder("repair"), Some(&cache), &donors)).await;
    drop(donors);
    if let Some(donor) = donor
        && let Err(error) = donor.close().await
    {
        tracing::warn!(%error, "the other vault was not told that nobody reads any more");
    }
    let healing = healed.map_err(failed)?;
    let row = Healed {
        moved: healing.moved,
        given: healing.given,
        stored: healing.stored,
        failures: healing.failures.clone(),
        revoked: healing.revoked,
        now: CheckRow::from(&healing.now),
    };
    out.show(&row, show::healed)?;
    Ok(match healing.revoked {
        true => status(codes::VAULT_BUSY),
        false if is_whole(&healing.now) => 0,
        false => status(codes::VAULT_DAMAGED),
    })
}

/// Whether every backup has all that it needs: places that are bad, and that nobody needs any more, stay known.
fn is_whole(report: &CheckReport) -> bool {
    report.hurt.is_empty()
        && report.unreadable.is_empty()
        && report.missing.is_empty()
        && report.runs.is_empty()
}

async fn manifest(opened: &Opened, out: &Out, file: &std::path::Path) -> Ended {
    const DOING: &str = "put the manifest back";
    let path = file.display().to_string();
    let part = |path: Option<&std::path::Path>| Some(path?.file_name()?.to_str()?.to_owned());
    let name = part(file.parent())
        .zip(part(Some(file)))
        .and_then(|(domain, name)| format!("backups/{domain}/{name}").parse::<ObjectName>().ok())
        .filter(|name| matches!(name, ObjectName::Manifest(..)));
    let Some(name) = name else {
        let cause = "its path does not end as that of a manifest does";
        return Err(Fault::permanent(codes::USAGE, DOING, path, cause)
            .remedy("Give it the name that it has in the vault: …/DOMAIN/BACKUP.LEASE"));
    };
    let bytes = std::fs::read(file)
        .map(Bytes::from)
        .map_err(|error| Fault::permanent(codes::USAGE, DOING, path, error))?;
    let put = Box::pin(repair::manifest(&opened.vault, &holder("repair --manifest"), &name, &bytes)).await;
    let put = put.map_err(|error| opened.fault(DOING, &error))?;
    let (word, said) = match put {
        ManifestRepair::Sound => ("sound", "the vault has it, and it can be read: nothing was done"),
        ManifestRepair::Pruned => ("pruned", "the backup is to be pruned: it stays as it is"),
        ManifestRepair::Put { checked: true } => {
            ("put", "it was put; `vmkeep vault check` tells whether the backup is whole")
        }
        ManifestRepair::Put { checked: false } => ("unchecked", "it was put; the backup was never checked"),
        ManifestRepair::Revoked => ("revoked", "this was given up for dead meanwhile: do it again"),
    };
    out.show(&serde_json::json!({ "manifest": word }), |_| format!("{name}: {said}\n"))?;
    Ok(if put == ManifestRepair::Revoked { status(codes::VAULT_BUSY) } else { 0 })
}

/// The header comes before everything else: without it the vault does not open.
async fn header(global: &Global, out: &Out, args: &VaultRepair) -> Ended {
    const DOING: &str = "put the header back";
    let config = config(global)?;
    let settings = settings(&config, &args.vault.vault, &args.vault.key)?;
    let known = Memory::of(&settings, &config.state_dir).load()?;
    let given = recovery(&args.vault.key, &settings.label()).await?;
    let given = vaults::credential_of(&settings, given)?;
    let backend = address::open(&settings.url, &settings.options(false)).await;
    let backend = backend.map_err(|error| vaults::backend_fault(DOING, &settings, &error))?;
    let put = async |by: Option<Credential>| {
        let copy = known.as_ref().map_or(HeaderCopy::Manifest(args.id), HeaderCopy::Kept);
        Box::pin(repair::header(Arc::clone(&backend), copy, by)).await
    };
    let asks = given.is_none();
    let mut done = put(given).await;
    let opens_not = matches!(
        done,
        Err(VaultError::KeyNeeded { .. } | VaultError::WrongKey { .. } | VaultError::Damaged { .. })
    );
    if opens_not
        && asks
        && let Some(typed) = passphrase(&settings.label()).await?
    {
        done = put(Some(typed)).await;
    }
    let done = done.map_err(|error| vaults::fault(DOING, &settings, &error))?;
    let (word, said) = match done {
        HeaderRepair::Sound => ("sound", "the header is the one that was put when the vault was made"),
        HeaderRepair::Put => ("put", "the header was missing, and was put back"),
        HeaderRepair::Replaced => {
            ("replaced", "something else stood there, and the header was put in its place")
        }
    };
    out.show(&serde_json::json!({ "header": word }), |_| format!("{said}\n"))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_lacks_the_room_to_make_room_is_not_sent_to_do_the_same_again() {
        let full =
            |code| Fault::permanent(code, "collect", "home", "no space left").remedy("prune, and collect");
        assert!(
            room_first(full(codes::NOT_ENOUGH_DISK_SPACE)).remedy.starts_with("Free some KiB there first")
        );
        assert_eq!(room_first(full(codes::VAULT_DENIED)).remedy, "prune, and collect");
    }
}
