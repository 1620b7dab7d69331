//! Reading packs whole: every blob is opened, and its id computed.

use std::collections::{HashMap, HashSet};

use futures_util::StreamExt;

use super::{CheckReport, Readings, pack_of};
use crate::blob::{BlobType, Encoded};
use crate::envelope;
use crate::error::VaultError;
use crate::ids::{BlobId, PackId};
use crate::index::tidings::{BadPlace, report_damage};
use crate::names::ObjectName;
use crate::node::{Node, Patch};
use crate::pack;
use crate::vault::Vault;
use crate::walk::Packs;

/// Packs that are read at once: 16 MiB each.
const AT_ONCE: usize = 3;

/// What is good in the packs whose seal does not fit.
pub(crate) type Broken = HashMap<PackId, HashSet<(u32, BlobId)>>;

/// Reads packs and reports what is bad in them. One that is gone meanwhile is taken out of those that are there.
pub(super) async fn read_all(
    vault: &Vault,
    packs: Vec<ObjectName>,
    there: &mut Packs,
    readings: &mut Readings,
    report: &mut CheckReport,
) -> Result<Broken, VaultError> {
    let mut broken = Broken::new();
    let mut reading = futures_util::stream::iter(packs)
        .map(|name| async move { Ok::<_, VaultError>((pack_of(&name), read_pack(vault, name).await?)) })
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
        report.packs_read += 1;
        report.damage += one.bad.len();
        if let Some(good) = one.broken {
            report.packs.push(pack);
            broken.insert(pack, good);
        }
        report_damage(vault, one.bad).await?;
        // Only now: what is bad in it is known to everybody.
        readings.read(pack);
    }
    Ok(broken)
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
