//! A vault in a folder while backups are written into it: whatever a cut leaves, the vault opens; a backup that was told as
//! committed is there, and of those that are there each is whole, byte for byte; and the next one builds on no damage.
//!
//! The program makes the vault, and backups each on the one before. In half of the cases the job that was cut off goes on: it
//! has the bytes of a manifest in its journal, which were made durable by nobody but by the product's own order.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use fastrand::Rng;
use jiff::Timestamp;
use replay_tests::powercut::disk::{Disk, Image};
use replay_tests::powercut::trace;
use vmkeep_steps::vaults::files::Held;
use vmkeep_vault::backend::Options as Access;
use vmkeep_vault::backend::local::Local;
use vmkeep_vault::backups::Backups;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::check::check;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::header::CHUNK;
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_vault::index::Index;
use vmkeep_vault::keys::wrap::Credential;
use vmkeep_vault::lease::Holder;
use vmkeep_vault::manifest::{self, Manifest};
use vmkeep_vault::names::MarkKind;
use vmkeep_vault::read::read_image;
use vmkeep_vault::settle::{self, Settled};
use vmkeep_vault::vault::{Draft, Vault};
use vmkeep_vault::write::{Extent, Options, Outcome, Parts, Prepared, Readiness, Session};

use crate::stores::{number, workshop};
use crate::workload::{Act, program, runtime, say};

pub(crate) const DOMAIN: DomainId = DomainId::new([0xd0; 16]);
/// So many are made one after the other; the one that is made after a cut has the number that follows.
const BACKUPS: usize = 3;
const DISKS: [&str; 2] = ["vda", "vdb"];

/// A disk as of a backup: noise with zeroes in it, of which each backup finds one chunk changed and another one zeroed.
fn content(disk: &str, backup: usize) -> Vec<u8> {
    let chunk = CHUNK as usize;
    let mut bytes = noise(u64::from(disk.as_bytes()[2]), 12 * chunk + 512);
    bytes[3 * chunk..6 * chunk].fill(0);
    for n in 1..=backup {
        bytes[(6 + n) * chunk..(7 + n) * chunk].copy_from_slice(&noise(100 + n as u64, chunk));
        bytes[n % 3 * chunk..(n % 3 + 1) * chunk].fill(0);
    }
    bytes
}

/// Bytes that do not shrink.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = Rng::with_seed(seed);
    (0..length).map(|_| rng.u8(..)).collect()
}

fn holder() -> Holder {
    Holder { host: "host".to_owned(), purpose: "test".to_owned(), collects: false }
}

/// An encrypted vault in a folder, which is made; and the words that open it.
pub(crate) async fn make(folder: &Path, tell: impl FnOnce(&str)) -> Vault {
    let draft = Draft::encrypted(false).unwrap();
    let words = draft.recovery_words().unwrap();
    tell(&words);
    let access = Access { create: true, ..Access::default() };
    let local = Local::open(folder, &access).await.unwrap();
    draft.confirm(&words).unwrap().put(Arc::new(local), None).await.unwrap()
}

pub(crate) async fn attach(folder: &Path, words: &str) -> Result<Vault, VaultError> {
    let local = Local::open(folder, &Access::default()).await?;
    Vault::attach(Arc::new(local), Some(Credential::Recovery(words.to_owned().into())), None).await
}

/// A backup, based on another if there is one and it may be. `tell` hears of its manifest before it is put, and of its end.
async fn back_up(
    vault: &Vault,
    n: usize,
    parent: Option<(usize, BackupId)>,
    tell: impl Fn(String),
) -> Result<BackupId, String> {
    let told = |e: VaultError| e.to_string();
    let mut session = Box::pin(Session::begin(vault, DOMAIN, Options::default())).await.map_err(told)?;
    let based = match parent {
        None => None,
        Some((_, id)) => Box::pin(session.parent(id)).await.map_err(told)?.ok(),
    };
    if let Some(damaged) = based.as_ref().and_then(|parent| parent.reread.keys().next()) {
        return Err(format!("{damaged} of the backup before is damaged"));
    }
    let id = BackupId::now();
    let mut manifest = session.manifest(id, Timestamp::UNIX_EPOCH);
    for disk in DISKS {
        let now = content(disk, n);
        let before = based.as_ref().zip(parent).map(|(of, (n, _))| (of, content(disk, n)));
        let tree =
            before.as_ref().and_then(|(of, _)| of.manifest.disks.iter().find(|one| one.target == disk));
        let parts = now.chunks(CHUNK as usize).enumerate().map(|(at, piece)| match &before {
            Some((_, old)) if old[at * CHUNK as usize..].starts_with(piece) => {
                Extent::Unchanged(piece.len() as u64)
            }
            _ if piece.iter().all(|byte| *byte == 0) => Extent::Zero(piece.len() as u64),
            _ => Extent::Data(piece.to_vec().into()),
        });
        let (mut parts, tree) = (Parts::new(parts.collect()), tree.map(|disk| disk.image.tree()));
        let written = Box::pin(session.write_image(&mut parts, now.len() as u64, BlobType::Data, tree)).await;
        manifest.disks.push(manifest::Disk::new(disk, written.map_err(told)?.image, "raw"));
        // As the product does after each disk.
        Box::pin(session.make_durable()).await.map_err(told)?;
    }
    let prepared = match Box::pin(session.prepare(&manifest)).await.map_err(told)? {
        Readiness::Ready(prepared) => prepared,
        other => return Err(format!("it cannot be committed: {other:?}")),
    };
    let object: String = prepared.object.iter().map(|byte| format!("{byte:02x}")).collect();
    tell(format!("prepared {id} {n} {} {object}", prepared.name));
    match session.commit(&prepared).await.map_err(told)? {
        Outcome::Checked => tell(format!("committed {id}")),
        Outcome::Revoked => return Err("its lease was revoked".to_owned()),
    }
    session.end().await.map_err(told)?;
    Ok(id)
}

/// What is recorded.
pub(crate) fn fill(root: &Path) {
    runtime().block_on(async {
        let vault = make(&root.join("vault"), |words| say(&format!("words {words}"))).await;
        say("made");
        let mut last = None;
        for n in 0..BACKUPS {
            last = Some((n, Box::pin(back_up(&vault, n, last, |told| say(&told))).await.unwrap()));
        }
    });
}

/// What the program had told before the power went.
struct Told {
    words: String,
    made: bool,
    /// The manifests that were about to be put, with their numbers.
    prepared: BTreeMap<BackupId, (usize, Prepared)>,
    committed: Vec<BackupId>,
}

impl Told {
    /// Nothing if nothing had begun.
    fn of(image: &Image<'_>) -> Option<Self> {
        let mut told =
            Self { words: String::new(), made: false, prepared: BTreeMap::new(), committed: Vec::new() };
        for line in image.said() {
            let (what, rest) = line.split_once(' ').unwrap_or((line, ""));
            match what {
                "words" => rest.clone_into(&mut told.words),
                "made" => told.made = true,
                "committed" => told.committed.push(rest.parse().unwrap()),
                "prepared" => {
                    let [id, n, name, object] = rest.split(' ').collect::<Vec<_>>()[..] else {
                        panic!("{line}")
                    };
                    let digits = object.as_bytes().chunks(2).map(|two| std::str::from_utf8(two).unwrap());
                    let object: Vec<u8> = digits.map(|two| u8::from_str_radix(two, 16).unwrap()).collect();
                    let prepared = Prepared { name: name.parse().unwrap(), object: Bytes::from(object) };
                    told.prepared.insert(id.parse().unwrap(), (n.parse().unwrap(), prepared));
                }
                _ => {}
            }
        }
        (!told.words.is_empty()).then_some(told)
    }
}

async fn read(vault: &Vault, manifest: &Manifest, disk: &str) -> Result<Vec<u8>, String> {
    let found = manifest.disks.iter().find(|one| one.target == disk);
    let image = found.ok_or_else(|| format!("{disk} is not in it"))?.image;
    let ids = vault.ids(manifest.domain);
    let index = Index::load(vault, None).await.map_err(|e| e.to_string())?;
    let fetcher = Fetcher::new(vault, ids.clone(), Arc::new(index), None, false);
    let mut held = Held::new(usize::try_from(image.size).unwrap());
    let read = Box::pin(read_image(vault, &ids, &fetcher, BlobType::Data, &image, &mut held, false)).await;
    read.map(|_| held.0).map_err(|e| format!("{disk}: {e}"))
}

/// Looks at all backups: those that were told as committed are there, and all that are there are whole. The numbers of those.
async fn look(vault: &Vault, told: &Told) -> Result<Vec<(usize, BackupId)>, String> {
    let all = Backups::load(vault, Some(DOMAIN)).await.map_err(|e| e.to_string())?;
    for id in &told.committed {
        if all.get(*id).is_none() || !all.has(*id, MarkKind::Checked) {
            return Err(format!("{id} was told as committed, and is not, or not checked"));
        }
    }
    let mut found = Vec::new();
    for (id, backup) in all.iter() {
        let manifest = backup.manifest.as_ref().map_err(|e| format!("{id} cannot be read: {e}"))?;
        let (n, _) = told.prepared.get(&id).ok_or_else(|| format!("nobody has made {id}"))?;
        for disk in DISKS {
            if read(vault, manifest, disk).await.map_err(|why| format!("backup {n}: {why}"))?
                != content(disk, *n)
            {
                return Err(format!("{disk} of backup {n} holds something else"));
            }
        }
        found.push((*n, id));
    }
    found.sort_unstable();
    Ok(found)
}

/// Opens what a cut left, lets the job go on or gives it up, makes the next backup, and reads everything. How many backups
/// were there; nothing if there was no vault.
async fn judge(folder: &Path, told: &Told, goes_on: bool) -> Result<Option<usize>, String> {
    let vault = match attach(folder, &told.words).await {
        Ok(vault) => vault,
        Err(e) if told.made => return Err(format!("the vault does not open: {e}")),
        Err(_) => return Ok(None),
    };
    let found = look(&vault, told).await?;
    let open = told.prepared.iter().find(|(id, _)| !told.committed.contains(id));
    if let (true, Some((id, (n, prepared)))) = (goes_on, open) {
        match Box::pin(settle::commit(&vault, prepared, &holder(), None)).await {
            Ok(Settled::Checked) => {}
            other => return Err(format!("backup {n} was prepared, and its commit ends with {other:?}")),
        }
        if !look(&vault, told).await?.contains(&(*n, *id)) {
            return Err(format!("backup {n} was committed anew, and is not there"));
        }
    }
    let before = look(&vault, told).await?;
    let next = Box::pin(back_up(&vault, BACKUPS, before.last().copied(), |_| {})).await;
    let next = next.map_err(|why| format!("the next backup: {why}"))?;
    let report = check(&vault, &holder(), None, true).await.map_err(|e| e.to_string())?;
    if !report.is_clean() || report.whole.len() != before.len() + 1 {
        return Err(format!("the check says {report:?}"));
    }
    let all = Backups::load(&vault, Some(DOMAIN)).await.map_err(|e| e.to_string())?;
    let manifest =
        all.get(next).and_then(|backup| backup.manifest.as_ref().ok()).ok_or("the next backup is gone")?;
    for disk in DISKS {
        if read(&vault, manifest, disk).await? != content(disk, BACKUPS) {
            return Err(format!("{disk} of the next backup holds something else"));
        }
    }
    Ok(Some(found.len()))
}

fn record() -> Disk {
    let place = workshop();
    let root = place.path().join("root");
    fs::create_dir(&root).unwrap();
    let (program, arguments, environment) = program("none", Act::Fill, &root);
    let environment = environment.iter().map(|(name, value)| (*name, OsStr::new(value)));
    Disk::of(&trace::record(&program, &arguments, environment), &root, None).unwrap()
}

/// Cuts the power at an instant that the seed chooses. How many backups are there; nothing if there was no vault.
fn cut(disk: &Disk, seed: u64) -> Result<Option<usize>, String> {
    let mut rng = Rng::with_seed(seed);
    let at = disk.instant(&mut rng);
    let image = disk.cut(at, &mut rng);
    let Some(told) = Told::of(&image) else { return Ok(None) };
    let workshop = workshop();
    image.write(workshop.path()).unwrap();
    let goes_on = rng.bool();
    let judged = runtime().block_on(judge(&workshop.path().join("vault"), &told, goes_on));
    judged.map_err(|why| format!("VMKEEP_SEED={seed}, at {at}, goes on: {goes_on}: {why}"))
}

#[test]
fn a_power_cut_leaves_a_vault_in_a_folder_whose_backups_are_whole_and_can_be_built_upon() {
    let disk = record();
    let (seed, images) = (number("VMKEEP_SEED", fastrand::u64(..)), number("VMKEEP_IMAGES", 30));
    let (mut vaults, mut backups) = (0, 0);
    for n in 0..images {
        if let Some(found) = cut(&disk, seed.wrapping_add(n)).unwrap_or_else(|why| panic!("{why}")) {
            vaults += 1;
            backups += found;
        }
    }
    println!(
        "{images} images of {} instants of a vault: {vaults} with a vault, {backups} backups in them, each whole (VMKEEP_SEED={seed})",
        disk.instants()
    );
    assert!(backups > 0, "no cut came after a backup");
}

/// Whether a path below the root is that of an object of a kind, or of a folder.
type Which = fn(&[&str]) -> bool;

#[test]
fn a_sync_of_a_vaults_folder_that_is_left_out_is_found_out() {
    let kinds: [(&str, Which); 10] = [
        ("the header", |path| matches!(path, ["vault", name] if name.starts_with("vault."))),
        ("the packs", |path| matches!(path, ["vault", "data", _, _])),
        ("the packs of nodes", |path| matches!(path, ["vault", "tree", _, _])),
        ("the folders of packs", |path| matches!(path, ["vault", "data", _])),
        ("the folder of those", |path| matches!(path, ["vault", "data"])),
        ("the runs of the index", |path| matches!(path, ["vault", "index", _])),
        ("the folder of the index", |path| matches!(path, ["vault", "index"])),
        ("the manifests", |path| matches!(path, ["vault", "backups", _, _])),
        ("the folders of marks", |path| matches!(path, ["vault", "marks", _])),
        ("the vault's folder", |path| matches!(path, ["vault"])),
    ];
    for (name, which) in kinds {
        let mut disk = record();
        disk.without_syncs_at(|path| {
            let parts: Vec<&str> = path.iter().map(|part| part.to_str().unwrap()).collect();
            which(&parts)
        });
        let found = (0..3000).position(|seed| cut(&disk, seed).is_err());
        println!("a vault without the syncs of {name}: the first cut that costs something is {found:?}");
        assert!(found.is_some(), "nobody misses the syncs of {name}");
    }
}
