//! Checking a vault: which backups are whole, and which lack what (`FORMAT.md`, §6).
//!
//! The quick check walks all trees: nodes are read, and of chunks it is only asked whether a good place is named in a pack
//! that is there. The whole check first reads every pack once, opens every blob and computes its id; what is bad goes into
//! `damage/`, and the walk then knows of it. Marks are put for what was found: `hurt` with the positions, and after a whole
//! check `verified`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use futures_util::StreamExt;
use jiff::Timestamp;

use crate::backend::BackendErrorKind;
use crate::backups::{self, Backups, Hurt, Mark};
use crate::blob::{BlobType, Encoded};
use crate::collect::survey::entries;
use crate::envelope;
use crate::error::VaultError;
use crate::fetch::Fetcher;
use crate::ids::{BackupId, BlobId, MarkId, PackId, RunId};
use crate::index::Index;
use crate::index::run::Place;
use crate::index::tidings::{BadPlace, report_damage};
use crate::lease::{Holder, Lease};
use crate::names::{Area, MarkKind, ObjectName};
use crate::node::{Node, Patch};
use crate::pack;
use crate::vault::Vault;
use crate::walk::{Judge, Walk};

/// Packs that are read at once: 16 MiB each.
const AT_ONCE: usize = 3;

/// What a check found.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// Backups that need nothing that is not there.
    pub whole: Vec<BackupId>,
    /// Those that do, and what.
    pub hurt: Vec<(BackupId, Vec<Hurt>)>,
    /// Manifests that cannot be read.
    pub unreadable: Vec<(BackupId, String)>,
    /// Backups that were checked once, whose manifest is gone although nobody pruned them.
    pub missing: Vec<BackupId>,
    /// Runs of the index that cannot be read, in whole or in part. None that another has set aside.
    pub runs: Vec<(RunId, String)>,
    /// Packs whose seal does not fit, of a whole check.
    pub packs: Vec<PackId>,
    /// Bad places that were found and reported.
    pub damage: usize,
    /// Bytes of packs that were read.
    pub read: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.hurt.is_empty()
            && self.unreadable.is_empty()
            && self.missing.is_empty()
            && self.runs.is_empty()
            && self.packs.is_empty()
            && self.damage == 0
    }
}

/// Checks all backups. With `whole`, every byte of every pack is read.
///
/// # Errors
/// What the backend could not do: what could not be read is no damage.
pub async fn check(
    vault: &Vault,
    holder: &Holder,
    folder: Option<&Path>,
    whole: bool,
) -> Result<CheckReport, VaultError> {
    vault.writable()?;
    let lease = Lease::begin(vault, holder).await?;
    let report = Box::pin(under(vault, holder, folder, whole)).await;
    lease.end().await?;
    report
}

async fn under(
    vault: &Vault,
    holder: &Holder,
    folder: Option<&Path>,
    whole: bool,
) -> Result<CheckReport, VaultError> {
    crate::features::check_writer(vault).await?;
    let mut report = CheckReport::default();
    let packs = packs(vault).await?;
    let mut there: HashSet<PackId> = packs.iter().filter_map(|(name, _)| pack_of(name)).collect();
    let mut broken = HashMap::new();
    if whole {
        let mut reading =
            futures_util::stream::iter(packs.iter().cloned())
                .map(|(name, _)| async move {
                    Ok::<_, VaultError>((pack_of(&name), read_pack(vault, name).await?))
                })
                .buffer_unordered(AT_ONCE);
        while let Some(one) = reading.next().await {
            let (pack, one) = match one? {
                (Some(pack), Some(one)) => (pack, one),
                (pack, _) => {
                    if let Some(pack) = pack {
                        there.remove(&pack);
                    }
                    continue;
                }
            };
            report.read += one.size;
            report.damage += one.bad.len();
            if let Some(good) = one.broken {
                report.packs.push(pack);
                broken.insert(pack, good);
            }
            report_damage(vault, one.bad).await?;
        }
    }
    Box::pin(judge(vault, holder, folder, whole, there, broken, &mut report)).await?;
    Ok(report)
}

/// The packs that are there.
pub(crate) async fn packs(vault: &Vault) -> Result<Vec<(ObjectName, u64)>, VaultError> {
    let mut packs = Vec::new();
    for area in [Area::Data, Area::Tree] {
        packs.extend(vault.list(&format!("{}/", area.folder())).await?);
    }
    Ok(packs)
}

/// Takes in what the packs hold of which no run tells all: by their tables, or the headers of their blobs.
pub(crate) async fn note_unnamed(vault: &Vault, index: &Index) -> Result<(), VaultError> {
    let mut named = HashSet::new();
    for state in index.states() {
        let of = match index.scan(state.id, &mut |_, _| {}).await {
            Ok(()) => index.packs_of_run(state.id).await,
            Err(error) => Err(error),
        };
        match of {
            Ok(packs) => named.extend(packs.into_iter().map(|(_, pack)| pack)),
            Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    for (name, size) in packs(vault).await? {
        let ObjectName::Pack(area, pack) = name else { continue };
        if named.contains(&pack) {
            continue;
        }
        if let Some(entries) = entries(vault, area, pack, size).await? {
            index.note_places(entries.iter().map(|entry| (entry.id, Place::new(area, pack, entry))));
        }
    }
    Ok(())
}

/// Walks the trees of all backups, with the packs that are there, and of those whose seal does not fit what is good in them.
/// Reports damage, and puts and takes back marks.
pub(crate) async fn judge(
    vault: &Vault,
    holder: &Holder,
    folder: Option<&Path>,
    whole: bool,
    there: HashSet<PackId>,
    broken: HashMap<PackId, HashSet<(u32, BlobId)>>,
    report: &mut CheckReport,
) -> Result<(), VaultError> {
    let index = Arc::new(Index::load(vault, folder).await?);
    let unreadable = index.unreadable().iter().filter(|(run, _)| !index.is_set_aside(*run));
    report.runs = unreadable.map(|(run, error)| (*run, error.to_string())).collect();
    // The walk asks for as much; here what cannot be read is told by its name.
    for state in index.states().iter().filter(|state| state.usable) {
        match index.scan(state.id, &mut |_, _| {}).await {
            Ok(()) | Err(VaultError::Missing { .. }) => {}
            Err(error @ VaultError::Damaged { .. }) => report.runs.push((state.id, error.to_string())),
            Err(error) => return Err(error),
        }
    }
    if !report.runs.is_empty() {
        // A backup is not hurt because the index is.
        note_unnamed(vault, &index).await?;
    }
    let all = Backups::load(vault, None).await?;
    report.missing = all.missing();
    // Domains that share nothing have keys of their own, and so a walk of their own.
    let mut by_domain: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (id, backup) in all.iter() {
        match &backup.manifest {
            Ok(manifest) => by_domain.entry(backup.domain).or_default().push((id, manifest)),
            Err(error) => report.unreadable.push((id, error.to_string())),
        }
    }
    for (domain, manifests) in by_domain {
        let fetcher = Fetcher::new(vault, vault.ids(domain), index.clone(), folder.map(Path::to_owned), true);
        let mut walk = Walk::new(vault, &fetcher, Judge::Readable(there.clone(), broken.clone()));
        for (id, manifest) in manifests {
            let hurt = walk.backup(manifest).await?;
            let bad = walk.take_bad();
            report.damage += bad.len();
            report_damage(vault, bad).await?;
            let mut mark = Mark::new(Timestamp::now(), &holder.host);
            if hurt.is_empty() {
                report.whole.push(id);
                forget_hurt(vault, &all, id).await?;
                if whole {
                    backups::put_mark(vault, id, MarkKind::Verified, &mark).await?;
                }
            } else {
                if !is_told(vault, &all, id, &hurt).await? {
                    mark.hurt.clone_from(&hurt);
                    backups::put_mark(vault, id, MarkKind::Hurt, &mark).await?;
                }
                report.hurt.push((id, hurt));
            }
        }
    }
    Ok(())
}

pub(crate) fn pack_of(name: &ObjectName) -> Option<PackId> {
    if let ObjectName::Pack(_, pack) = name { Some(*pack) } else { None }
}

fn hurt_marks(all: &Backups, backup: BackupId) -> Vec<MarkId> {
    all.marks(backup).filter(|(kind, _)| *kind == MarkKind::Hurt).map(|(_, mark)| mark).collect()
}

/// Whether a mark says the same already.
async fn is_told(vault: &Vault, all: &Backups, backup: BackupId, hurt: &[Hurt]) -> Result<bool, VaultError> {
    for mark in hurt_marks(all, backup) {
        match backups::read_mark(vault, backup, MarkKind::Hurt, mark).await {
            Ok(Some(mark)) if mark.hurt == hurt => return Ok(true),
            Ok(_) | Err(VaultError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Takes back what was said of a backup that is whole again, where the credentials allow that.
async fn forget_hurt(vault: &Vault, all: &Backups, backup: BackupId) -> Result<(), VaultError> {
    for mark in hurt_marks(all, backup) {
        let name = ObjectName::Mark(backup, MarkKind::Hurt, mark).to_string();
        match vault.backend().delete(&name).await {
            Err(error) if error.kind != BackendErrorKind::Denied => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

struct PackReport {
    size: u64,
    /// What is good in a pack whose seal does not fit.
    broken: Option<HashSet<(u32, BlobId)>>,
    bad: Vec<BadPlace>,
}

/// Reads a pack: nothing if it was deleted since it was listed.
async fn read_pack(vault: &Vault, name: ObjectName) -> Result<Option<PackReport>, VaultError> {
    let ObjectName::Pack(area, pack) = name else { return Ok(None) };
    let Some(object) = vault.get(&name).await? else { return Ok(None) };
    let (keys, separate) = (vault.keys().clone(), vault.header().separate);
    let work = move || {
        let sealed = envelope::scrub(&name, &object).is_ok();
        let ids = (!separate).then(|| keys.ids(None));
        let good = |entry: &pack::Entry| {
            let bytes = object.get(entry.offset as usize..)?;
            let blob = Encoded::parse(&keys, pack, entry.offset, bytes).ok()?;
            if blob.id != entry.id || blob.kind != entry.kind || blob.coding != entry.coding {
                return None;
            }
            let plain = blob.open(&keys).ok()?;
            let formed = match blob.kind {
                _ if blob.coding.is_patch() => Patch::decode(&plain).is_ok(),
                BlobType::Node(level) => Node::decode(level, &plain).is_ok(),
                _ => true,
            };
            // The id of a patch is that of what results: the walk computes it.
            let computed =
                blob.coding.is_patch() || ids.as_ref().is_none_or(|ids| ids.id(blob.kind, &plain) == blob.id);
            (formed && computed).then_some(())
        };
        let entries = pack::entries(&keys, area, pack, &object);
        let (good, bad): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| good(entry).is_some());
        let broken = (!sealed).then(|| good.iter().map(|entry| (entry.offset, entry.id)).collect());
        let place = |entry: pack::Entry| BadPlace { pack, offset: entry.offset, id: entry.id };
        let bad = bad.into_iter().map(place).collect();
        PackReport { size: object.len() as u64, broken, bad }
    };
    Ok(Some(crate::tasks::blocking(work).await?))
}

#[cfg(test)]
mod tests;
