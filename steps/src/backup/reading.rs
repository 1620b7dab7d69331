//! One attempt to read all disks, in order, up to the manifest.

use std::sync::Arc;

use jiff::Timestamp;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::manifest::{self, BackupKind, Manifest};
use vmkeep_vault::secrets;
use vmkeep_vault::source::{DiskReader, SourceError};
use vmkeep_vault::tree::Tree;
use vmkeep_vault::write::{Extent, Parts, Readiness, Session};
use vmkeep_workflow::{Class, Code, Fault, StepContext};

use super::begin::Begun;
use super::commit::StoredManifest;
use super::disk::BackupDisk;
use super::from::{Opening, Point};
use super::lease::{Based, LeaseOutput};
use super::meter::Meter;
use super::notes::Notes;
use super::options::Asked;
use super::read::{DOING, ReadDisk, ReadInput, backup_id};
use super::state;
use crate::codes;
use crate::vaults::fault;

/// Chunks that a bitmap calls clean and that are looked at.
const SAMPLE: usize = 256;
/// How often damage that is reported meanwhile is mended by reading again.
const MENDS: usize = 3;

/// An attempt.
pub(super) struct Reading<'a> {
    pub(super) cx: &'a StepContext,
    pub(super) input: &'a ReadInput,
    pub(super) leased: &'a LeaseOutput,
    pub(super) point: &'a Point<'a>,
    pub(super) notes: &'a Arc<Notes>,
}

/// Why it has ended before its time.
pub(super) enum Ended {
    Vault(VaultError),
    Source(SourceError),
    Fault(Fault),
}

impl From<VaultError> for Ended {
    fn from(error: VaultError) -> Self {
        Self::Vault(error)
    }
}

impl From<Opening> for Ended {
    fn from(why: Opening) -> Self {
        match why {
            Opening::Source(error) => Self::Source(error),
            Opening::Fault(fault) => Self::Fault(fault),
        }
    }
}

impl From<Fault> for Ended {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// A backup is a full one if all of it was read.
pub(super) fn kind(input: &ReadInput, disks: &[ReadDisk]) -> BackupKind {
    let all_whole = disks.iter().all(|disk| disk.disk.unchanged_since.is_none());
    match input.kind {
        _ if all_whole => BackupKind::Full,
        Asked::Differential => BackupKind::Differential,
        Asked::Auto | Asked::Full | Asked::Incremental => BackupKind::Incremental,
    }
}

impl Reading<'_> {
    /// Reads everything; the manifest, ready to be put, and what the owner should know.
    pub(super) async fn all(&self, session: &mut Session) -> Result<(StoredManifest, Vec<String>), Ended> {
        let (input, point) = (self.input, self.point);
        point.stands().await?;
        let mut before = 0;
        for disk in &input.disks {
            let known = self.notes.disks().into_iter().any(|known| known.disk.target == disk.target.0);
            if !known {
                let read = self.disk(disk, session, before).await?;
                point.stood().await?;
                session.make_durable().await?;
                self.notes.disk(read).await.map_err(VaultError::from)?;
            }
            before += disk.virtual_size;
        }
        let (streams, mut warnings) = state::read(input.state.clone(), input.planned).await?;
        let mut manifest = session.manifest(backup_id(self.cx), point.begun.at);
        for (name, bytes) in streams {
            let size = bytes.len() as u64;
            let mut source = Parts::new(vec![Extent::Data(bytes.into())]);
            let written = Box::pin(session.write_image(&mut source, size, BlobType::Stream, None)).await?;
            manifest.streams.push(manifest::Stream { name, image: written.image });
        }
        self.fill(&mut manifest);
        if !session.is_encrypted()
            && !input.allow_plaintext
            && let Some(why) = secrets::secret(&manifest)
        {
            return Err(Fault::permanent(codes::PLAINTEXT_REFUSED, DOING, &input.domain.name, why).into());
        }
        warnings.extend(point.begun.thawed.clone().map(|why| format!("the guest's file systems: {why}")));
        let prepared = self.prepare(session, manifest).await?;
        point.stood().await?;
        Ok((prepared, warnings))
    }

    async fn disk(&self, disk: &BackupDisk, session: &mut Session, before: u64) -> Result<ReadDisk, Ended> {
        let (based, mode) = self.plan_of(disk)?;
        let source = self.point.open(disk, mode.since.is_some()).await?;
        let parent = based.parent.as_ref();
        let mut since = parent.filter(|_| mode.since.is_some());
        let mut because = mode.whole_because.clone();
        if let Some(parent) = since {
            because = match source.knows_changes() {
                false => Some("QEMU did not show its bitmap".to_owned()),
                true => {
                    let differs = Box::pin(session.differs(&*source, parent.image.tree(), SAMPLE)).await?;
                    differs.map(|at| format!("its bitmap calls clean what has changed, at byte {at}"))
                }
            };
            since = since.filter(|_| because.is_none());
        }
        let reader = DiskReader::new(source.clone(), since.map(|parent| parent.image.size));
        let tree = parent.map(|parent| parent.image.tree());
        let (written, told) = self.write(reader, source.size(), tree, session, before).await?;
        let whole = match since {
            Some(parent) => parent.whole,
            None => Some(Timestamp::now()),
        };
        let disk = manifest::Disk {
            target: disk.target.0.clone(),
            image: written.image,
            source_format: disk.top().map(|layer| layer.format.clone()).unwrap_or_default(),
            dirty: told.data + told.zero,
            stored: written.stored,
            whole,
            whole_because: because,
            unchanged_since: since.map(|parent| parent.backup),
            bitmap: self.point.begun.checkpoint.is_some() && disk.no_bitmap.is_none(),
            files: disk.files.clone(),
        };
        Ok(ReadDisk { disk, new: written.new })
    }

    /// On what a disk is based, and how it is shown.
    fn plan_of(&self, disk: &BackupDisk) -> Result<(&Based, &Begun), Fault> {
        let based = self.leased.disks.iter().find(|based| based.target == disk.target);
        let mode = self.point.begun.disks.iter().find(|begun| begun.target == disk.target);
        match (based, mode) {
            (Some(based), Some(mode)) => Ok((based, mode)),
            _ => {
                let cause = format!("disk {} is not in what was begun", disk.target);
                Err(Fault::permanent(Code::UNDEFINED, DOING, &self.input.domain.name, cause))
            }
        }
    }

    async fn write(
        &self,
        reader: DiskReader,
        size: u64,
        parent: Option<Tree>,
        session: &mut Session,
        before: u64,
    ) -> Result<(vmkeep_vault::write::Written, vmkeep_vault::source::Told), VaultError> {
        let of = (before, self.input.total());
        let mut meter = Meter::new(reader, self.cx.progress.clone(), of, self.input.bandwidth);
        let written = Box::pin(session.write_image(&mut meter, size, BlobType::Data, parent)).await?;
        Ok((written, meter.told()))
    }

    /// What the manifest says besides its streams.
    fn fill(&self, manifest: &mut Manifest) {
        let (input, disks) = (self.input, self.notes.disks());
        manifest.domain_name.clone_from(&input.domain.name);
        self.point.consistency.clone_into(&mut manifest.consistency);
        manifest.kind = kind(input, &disks);
        let because = disks.iter().find_map(|disk| {
            let why = disk.disk.whole_because.as_ref()?;
            Some(format!("disk {}: {why}", disk.disk.target))
        });
        let wanted = input.kind != Asked::Full && manifest.kind == BackupKind::Full;
        manifest.full_because = because.filter(|_| wanted);
        manifest.parent = self.leased.disks.iter().find_map(|based| Some(based.parent.as_ref()?.backup));
        manifest.checkpoint.clone_from(&self.point.begun.checkpoint);
        manifest.disks = disks.into_iter().map(|disk| disk.disk).collect();
        manifest.definition.clone_from(&input.about.definition);
        manifest.autostart = input.about.autostart;
        manifest.host = input.about.host.clone();
        manifest.origin = manifest::Origin {
            journal: input.about.journal.clone(),
            job: self.cx.job.to_string(),
            plan: String::new(),
        };
    }

    /// Makes all of it durable. What is found damaged meanwhile is read once more, here, where there is a source.
    async fn prepare(&self, session: &mut Session, mut manifest: Manifest) -> Result<StoredManifest, Ended> {
        for _ in 0..MENDS {
            let hurt = match Box::pin(session.prepare(&manifest)).await? {
                Readiness::Ready(prepared) => return Ok(StoredManifest::of(&prepared)),
                Readiness::Revoked => return Err(self.input.revoked().into()),
                Readiness::Damaged(hurt) => hurt,
            };
            for disk in self.input.disks.iter().filter(|disk| hurt.contains_key(&disk.target.0)) {
                let known = self.notes.disks().into_iter().find(|known| known.disk.target == disk.target.0);
                let Some(mut read) = known else { continue };
                let source = self.point.open(disk, false).await?;
                let reader = DiskReader::new(source.clone(), None);
                // Without the tree that it has, of which a node may be what is damaged.
                let (written, _) = self.write(reader, source.size(), None, session, 0).await?;
                self.point.stood().await?;
                read.disk.image = written.image;
                read.disk.stored += written.stored;
                session.make_durable().await?;
                self.notes.disk(read).await.map_err(VaultError::from)?;
            }
            self.fill(&mut manifest);
        }
        let cause = "what the vault holds is found damaged faster than it can be written anew";
        Err(Fault::permanent(codes::VAULT_DAMAGED, DOING, &self.input.vault, cause).into())
    }

    /// What a failure means. A source that fails because its point in time is gone says so.
    pub(super) async fn failed(&self, ended: Ended) -> Fault {
        let (input, point) = (self.input, self.point);
        let (source, told) = match ended {
            Ended::Fault(fault) => return fault,
            Ended::Source(error) => {
                let fault = Fault::transient(codes::POINT_IN_TIME_LOST, DOING, &input.domain.name, &error);
                (true, fault.remedy(error.remedy()))
            }
            Ended::Vault(VaultError::Io(error)) => {
                let source = error.get_ref().is_some_and(|inner| inner.is::<SourceError>());
                let error = VaultError::Io(error);
                (source, fault(DOING, &input.vault, &error).class(Class::Transient))
            }
            Ended::Vault(error) => (false, fault(DOING, &input.vault, &error)),
        };
        if source && let Err(lost) = point.stands().await {
            return lost;
        }
        told
    }
}
