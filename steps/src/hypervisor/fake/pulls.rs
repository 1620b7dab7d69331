//! Pulls: libvirt's job and QEMU's, which are not the same, and the bitmaps that tell what has changed.
//!
//! A pull begins in parts, and whoever dies between two of them leaves what there was (`steps/BACKUP.md`, §4): libvirt notes that
//! a backup goes on, QEMU begins to copy, libvirt notes each disk, writes the checkpoint's file, and shows the disks. A libvirtd
//! that dies before it has noted the disks waits for ever for a job that it does not have.
//!
//! A bitmap lives in QEMU's memory and goes into its image when that is closed: with a QEMU that is killed new ones are gone,
//! and those that it had loaded are never believed again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::effects::part;
use super::shown::View;
use super::{Inner, Part, Process, disk, io, no};
use crate::hypervisor::{
    Bitmap, BlockJob, BlockJobKind, DomainId, DomainJob, HvError, HvResult, Pull, PullDisk, Pulling, Target,
    Trouble,
};

/// How long libvirt needs to end a job that was aborted.
const ENDS: Duration = Duration::from_millis(20);
const GRANULARITY: u64 = 64 << 10;

/// Where a bitmap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In QEMU's memory alone.
    Memory,
    /// In an image that QEMU has open, and marked as being in use.
    Open,
    /// In an image that nobody has open.
    Stored,
    /// In an image whose QEMU has died.
    Broken,
}

/// The pages that were written since it began.
#[derive(Clone, Debug)]
struct Recording {
    pages: BTreeSet<u64>,
    place: Place,
}

/// The bitmaps of all images.
#[derive(Debug, Default)]
pub(super) struct Bitmaps(BTreeMap<PathBuf, BTreeMap<String, Recording>>);

impl Bitmaps {
    /// A page of an image was written.
    pub(super) fn record(&mut self, image: &Path, page: u64) {
        for one in self.0.get_mut(image).into_iter().flat_map(BTreeMap::values_mut) {
            if one.place != Place::Broken {
                one.pages.insert(page);
            }
        }
    }

    /// QEMU opens an image to write to it.
    pub(super) fn opened(&mut self, image: &Path) {
        for one in self.0.get_mut(image).into_iter().flat_map(BTreeMap::values_mut) {
            if one.place == Place::Stored {
                one.place = Place::Open;
            }
        }
    }

    /// QEMU has closed it, or was killed.
    pub(super) fn closed(&mut self, image: &Path, killed: bool) {
        let Some(all) = self.0.get_mut(image) else { return };
        all.retain(|_, one| !killed || one.place != Place::Memory);
        for one in all.values_mut() {
            one.place = match (one.place, killed) {
                (Place::Memory | Place::Open, false) => Place::Stored,
                (Place::Open, true) => Place::Broken,
                (place, _) => place,
            };
        }
    }

    fn usable(&self, image: &Path, name: &str) -> Option<&BTreeSet<u64>> {
        let one = self.0.get(image)?.get(name)?;
        matches!(one.place, Place::Memory | Place::Open).then_some(&one.pages)
    }

    /// Those that QEMU records in.
    pub(super) fn of(&self, image: &Path) -> Vec<Bitmap> {
        let names = self.0.get(image).into_iter().flat_map(BTreeMap::keys);
        let usable = names.filter(|name| self.usable(image, name).is_some());
        usable.map(|name| Bitmap { name: name.clone(), granularity: GRANULARITY }).collect()
    }
}

/// What libvirt knows of a pull.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// That one is being begun.
    Begins,
    /// All of it.
    Runs,
    /// That there is one, and that it ended with an error: nothing is to be aborted.
    Failed,
    /// That one was being begun when libvirtd died, and nothing else.
    Lost,
}

/// A disk of a pull, in QEMU.
struct Copied {
    target: Target,
    image: PathBuf,
    scratch: PathBuf,
    size: u64,
    /// What the guest has overwritten, as it was.
    kept: BTreeMap<u64, Vec<u8>>,
    /// The pages that had changed since the checkpoint.
    since: Option<BTreeSet<u64>>,
    copies: bool,
    shown: bool,
}

/// A pull.
pub(super) struct Pulled {
    known: Known,
    disks: Vec<Copied>,
    ends_at: Option<Duration>,
}

impl Pulled {
    /// Whether QEMU has anything of it.
    fn in_qemu(&self) -> bool {
        !self.disks.is_empty()
    }

    /// Files that QEMU has open for it.
    pub(super) fn open(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.disks.iter().map(|disk| disk.scratch.clone())
    }

    pub(super) fn told(&self) -> Pulling {
        let scratch = (self.known != Known::Lost).then(|| self.open().collect());
        let of = |which: fn(&Copied) -> bool| {
            let disks = self.disks.iter().filter(move |disk| which(disk));
            disks.map(|disk| format!("backup-{}", disk.target)).collect::<Vec<_>>()
        };
        Pulling { scratch, exports: of(|disk| disk.shown), jobs: of(|disk| disk.copies) }
    }

    /// QEMU's block jobs of it.
    pub(super) fn told_jobs(&self) -> impl Iterator<Item = BlockJob> + '_ {
        self.disks.iter().filter(|disk| disk.copies).map(|disk| BlockJob {
            id: format!("backup-{}", disk.target),
            target: Some(disk.target.clone()),
            kind: BlockJobKind::Other,
            ready: false,
            done: 0,
            total: disk.size,
            error: None,
        })
    }

    pub(super) fn job(&self) -> HvResult<Option<DomainJob>> {
        match self.known {
            Known::Begins | Known::Runs => Ok(Some(DomainJob {
                operation: "backup".to_owned(),
                elapsed_ms: 1,
                done: 0,
                remaining: 0,
                total: 0,
                dirty_rate: 0,
                iteration: 0,
            })),
            Known::Failed => Ok(None),
            Known::Lost => no(Trouble::JobLost, "backup job data missing"),
        }
    }
}

impl Process {
    /// What a pull keeps libvirt from doing.
    pub(super) fn free_of_pulls(&self) -> HvResult<()> {
        match &self.pull {
            Some(pull) if pull.known != Known::Failed => {
                no(Trouble::Busy, "cannot acquire state change lock (held by a backup)")
            }
            _ => Ok(()),
        }
    }

    /// The guest is about to overwrite a page of a disk: whoever copies keeps it.
    pub(super) fn keep(&mut self, target: &Target, page: u64) -> std::io::Result<()> {
        let Some(open) = self.disks.iter().find(|open| open.target == *target) else { return Ok(()) };
        let copies = |disk: &&mut Copied| disk.copies && disk.target == *target;
        if let Some(disk) = self.pull.iter_mut().flat_map(|pull| &mut pull.disks).find(copies)
            && !disk.kept.contains_key(&page)
        {
            disk.kept.insert(page, open.read(page)?);
        }
        Ok(())
    }

    /// QEMU has nothing of the pull any more; what libvirt has lost it does not find again.
    fn rid_of_pull(&mut self) {
        if let Some(pull) = &mut self.pull {
            pull.disks.clear();
            if pull.known != Known::Lost {
                self.pull = None;
            }
        }
    }

    /// libvirtd has died, and there is a new one.
    pub(super) fn libvirtd_forgets_pull(&mut self) {
        if let Some(pull) = &mut self.pull
            && pull.known == Known::Begins
        {
            pull.known = Known::Lost;
        }
    }

    /// Time has passed, and perhaps nobody goes on with what was begun.
    pub(super) fn pull_goes_on(&mut self, now: Duration, being_begun: bool) {
        let Some(pull) = &mut self.pull else { return };
        if pull.ends_at.is_some_and(|at| at <= now) {
            self.rid_of_pull();
        } else if pull.known == Known::Begins && !being_begun {
            // The call has failed: before anything is copied libvirt takes back what it has made.
            if pull.disks.iter().any(|disk| disk.copies) {
                pull.known = Known::Failed;
            } else {
                pull.open().for_each(|scratch| drop(std::fs::remove_file(scratch)));
                self.rid_of_pull();
            }
        }
    }

    /// `virsh domjobabort`.
    pub(super) fn aborts_pull(&mut self, now: Duration) {
        if let Some(pull) = self.pull.as_mut().filter(|pull| pull.known == Known::Runs) {
            pull.ends_at.get_or_insert(now + ENDS);
        }
    }
}

/// Begins one: see the module.
pub(super) fn begin(id: DomainId, pull: &Pull) -> Vec<Part> {
    let (noted, copied, checkpoint) = (pull.clone(), pull.clone(), pull.checkpoint.clone());
    vec![
        part(move |inner| note(inner, &id, &noted)),
        part(move |inner| copy(inner, &id, &copied)),
        part(move |inner| {
            inner.pull(&id)?.known = Known::Runs;
            Ok(())
        }),
        part(move |inner| {
            inner.domain(&id)?.checkpoints.extend(checkpoint);
            Ok(())
        }),
        part(move |inner| {
            inner.pull(&id)?.disks.iter_mut().for_each(|disk| disk.shown = true);
            Ok(())
        }),
    ]
}

fn note(inner: &mut Inner, id: &DomainId, pull: &Pull) -> HvResult<()> {
    let checkpoints = inner.domain(id)?.checkpoints.clone();
    let process = inner.process(id)?;
    process.free_of_pulls()?;
    if process.pull.is_some() || process.saving.is_some() || !process.jobs.is_empty() {
        return no(Trouble::Busy, "another job is active on the domain");
    }
    if pull.checkpoint.as_ref().is_some_and(|name| checkpoints.contains(name)) {
        return no(Trouble::Exists, "a checkpoint of that name exists");
    }
    let disks = pull.disks.iter().map(|wanted| disk_of(process, wanted));
    let disks = disks.collect::<HvResult<Vec<Copied>>>()?;
    for (disk, wanted) in disks.iter().zip(&pull.disks) {
        let Some(since) = &wanted.since else { continue };
        if !checkpoints.contains(since) || inner.bitmaps.usable(&disk.image, since).is_none() {
            let what = format!("missing or broken bitmap '{since}' for disk '{}'", wanted.target);
            return no(Trouble::BitmapUnusable, what);
        }
    }
    if let Some(there) = disks.iter().find(|disk| disk.scratch.exists()) {
        return no(Trouble::Exists, format!("{} exists already", there.scratch.display()));
    }
    for disk in &disks {
        disk::create(&disk.scratch, "qcow2", disk.size, None).map_err(io)?;
    }
    inner.process(id)?.pull = Some(Pulled { known: Known::Begins, disks, ends_at: None });
    Ok(())
}

fn disk_of(process: &Process, wanted: &PullDisk) -> HvResult<Copied> {
    let Some(open) = process.disks.iter().find(|open| open.target == wanted.target) else {
        return no(Trouble::Refused, format!("no such disk {}", wanted.target));
    };
    if wanted.bitmap && open.chain[0].format != "qcow2" {
        return no(Trouble::Refused, "checkpoint for disk unsupported for storage type raw");
    }
    Ok(Copied {
        target: wanted.target.clone(),
        image: open.chain[0].path.clone(),
        scratch: wanted.scratch.clone(),
        size: open.size,
        kept: BTreeMap::new(),
        since: None,
        copies: false,
        shown: false,
    })
}

/// QEMU's transaction: for all disks at one instant.
fn copy(inner: &mut Inner, id: &DomainId, pull: &Pull) -> HvResult<()> {
    let wanted = |target: &Target| pull.disks.iter().find(|disk| disk.target == *target);
    let mut instant = Vec::new();
    for disk in &inner.pull(id)?.disks {
        instant.push((disk.target.clone(), disk.image.clone()));
    }
    for (target, image) in instant {
        let Some(wanted) = wanted(&target) else { continue };
        let since = wanted.since.as_ref().and_then(|name| inner.bitmaps.usable(&image, name).cloned());
        if let Some(name) = pull.checkpoint.as_ref().filter(|_| wanted.bitmap) {
            let new = Recording { pages: BTreeSet::new(), place: Place::Memory };
            inner.bitmaps.0.entry(image).or_default().insert(name.clone(), new);
        }
        if let Some(disk) = inner.pull(id)?.disks.iter_mut().find(|disk| disk.target == target) {
            (disk.since, disk.copies) = (since, true);
        }
    }
    Ok(())
}

/// Ends in QEMU what is left of one: block jobs, exports, files.
pub(super) fn clean(id: DomainId) -> Vec<Part> {
    let each = move |change: fn(&mut Copied)| {
        part(move |inner| {
            let disks = inner.domain(&id)?.process.iter_mut().flat_map(|p| &mut p.pull);
            disks.flat_map(|pull| &mut pull.disks).for_each(change);
            Ok(())
        })
    };
    let close = part(move |inner| {
        inner.domain(&id)?.process.iter_mut().for_each(Process::rid_of_pull);
        Ok(())
    });
    vec![each(|disk| disk.copies = false), each(|disk| disk.shown = false), close]
}

/// Deletes a checkpoint: its bitmaps, then libvirt's record.
pub(super) fn forget(id: DomainId, name: &str) -> Vec<Part> {
    let (bitmap, record) = (name.to_owned(), name.to_owned());
    vec![
        part(move |inner| {
            let images: Vec<PathBuf> =
                inner.process(&id)?.disks.iter().map(|open| open.chain[0].path.clone()).collect();
            for image in images {
                if let Some(all) = inner.bitmaps.0.get_mut(&image) {
                    all.remove(&bitmap);
                }
            }
            Ok(())
        }),
        part(move |inner| {
            inner.domain(&id)?.checkpoints.retain(|known| *known != record);
            Ok(())
        }),
    ]
}

/// What is not told of it is what it has done.
pub(super) fn doubt(e: HvError) -> HvError {
    if matches!(e.trouble, Trouble::BitmapUnusable | Trouble::Busy) { e } else { e.in_doubt() }
}

/// libvirt's records of checkpoints change.
pub(super) fn checkpoints(id: DomainId, change: impl FnOnce(&mut Vec<String>) + Send + 'static) -> Vec<Part> {
    vec![part(move |inner| {
        let known = &mut inner.domain(&id)?.checkpoints;
        change(known);
        let mut seen = BTreeSet::new();
        known.retain(|name| seen.insert(name.clone()));
        Ok(())
    })]
}

/// A disk of a pull, as QEMU shows it.
pub(super) struct Export {
    id: DomainId,
    process: u32,
    target: Target,
}

impl Export {
    /// Connects to it; with its size, and whether it tells what has changed.
    pub(super) fn open(inner: &mut Inner, id: &DomainId, target: &Target) -> HvResult<(Self, u64, bool)> {
        let process = inner.process(id)?.number;
        let export = Self { id: *id, process, target: target.clone() };
        let (size, knows) = {
            let (disk, _) = export.disk(inner)?;
            (disk.size, disk.since.is_some())
        };
        Ok((export, size, knows))
    }

    fn disk<'a>(&self, inner: &'a Inner) -> HvResult<(&'a Copied, &'a super::Open)> {
        let lost = || HvError::new(Trouble::Unreachable, "there is no such export any more");
        let process = inner.domains.get(&self.id).and_then(|domain| domain.process.as_ref());
        let process = process.filter(|process| process.number == self.process).ok_or_else(lost)?;
        let disks = process.pull.iter().flat_map(|pull| &pull.disks);
        let disk = disks.into_iter().find(|disk| disk.shown && disk.target == self.target);
        let open = process.disks.iter().find(|open| open.target == self.target);
        disk.zip(open).ok_or_else(lost)
    }
}

impl View for Export {
    fn cluster(&self, inner: &Inner, page: u64) -> HvResult<Vec<u8>> {
        let (disk, open) = self.disk(inner)?;
        // Without its block job it shows what is there now, and says nothing of it.
        match disk.kept.get(&page).filter(|_| disk.copies) {
            Some(kept) => Ok(kept.clone()),
            None => open.read(page).map_err(io),
        }
    }

    fn changed(&self, inner: &Inner, page: u64) -> HvResult<Option<bool>> {
        Ok(self.disk(inner)?.0.since.as_ref().map(|pages| pages.contains(&page)))
    }
}

impl Inner {
    fn pull(&mut self, id: &DomainId) -> HvResult<&mut Pulled> {
        let pull = self.process(id)?.pull.as_mut();
        pull.ok_or_else(|| HvError::new(Trouble::Refused, "the backup job was ended"))
    }
}

/// Whether QEMU still has anything of a pull.
pub(super) fn left(process: &Process) -> bool {
    process.pull.as_ref().is_some_and(Pulled::in_qemu)
}
