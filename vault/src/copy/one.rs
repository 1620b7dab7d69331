//! One backup, from its session in the other vault to its commit there.

use std::collections::BTreeSet;
use std::ops::Range;

use super::original::Original;
use super::{Amount, Fate, Options, Origin, Refusal, Standing};
use crate::backups::{Backup, Backups};
use crate::blob::BlobType;
use crate::error::VaultError;
use crate::header::{CHUNK, FORMAT};
use crate::ids::{BackupId, LeaseId};
use crate::manifest::{Image, Manifest};
use crate::names::MarkKind;
use crate::secrets::secret;
use crate::settle::{Settled, settle};
use crate::tree::Tree;
use crate::vault::Vault;
use crate::write::{self, Outcome, Parent, Readiness, Resume, Session, Written};

/// How often a backup is begun again: for a lease that was revoked, or damage that turned up there meanwhile.
const TRIES: u32 = 4;

/// What copies of several backups share.
pub(super) struct Copier<'a> {
    pub(super) from: Origin<'a>,
    pub(super) to: &'a Vault,
    pub(super) options: Options,
    pub(super) here: Backups,
    /// The other vault's, as they were before the first session.
    pub(super) there: Backups,
    /// Backups that are whole there.
    pub(super) whole: BTreeSet<BackupId>,
    pub(super) into_the_open: bool,
    pub(super) resume: Option<Resume>,
}

/// How a session ended that nothing went wrong in.
enum End {
    Fate(Fate),
    /// The manifest is there, but the lease was revoked.
    Unsettled(Amount, LeaseId),
    Revoked(LeaseId),
}

/// What went wrong in a session.
enum Trouble {
    /// Here: what was put there is sound.
    Here(VaultError),
    /// A node of the backup there that this one is compared with.
    Beside,
    There(VaultError),
}

impl From<VaultError> for Trouble {
    fn from(error: VaultError) -> Self {
        Self::There(error)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Self {
        Self::There(error.into())
    }
}

/// A backup that both vaults have.
struct Both {
    here: Manifest,
    there: Parent,
}

/// An image that both vaults have: its tree in each, and ranges of chunks that must be sent all the same.
struct Twin {
    here: Tree,
    there: Tree,
    but: Vec<Range<u64>>,
}

impl Copier<'_> {
    /// Copies a backup, if it is not there.
    ///
    /// # Errors
    /// What a backend could not do, or a log.
    pub(super) async fn backup(&mut self, backup: BackupId) -> Result<Fate, VaultError> {
        let standing = Standing::of(&self.there, backup);
        match standing {
            Standing::Pruned => return Ok(Fate::Refused(Refusal::PrunedThere)),
            Standing::Whole => return Ok(Fate::Already),
            Standing::Unchecked | Standing::Absent => {}
        }
        let manifest = match self.here.get(backup).map(|found| &found.manifest) {
            None => return Ok(Fate::Refused(Refusal::Absent)),
            Some(Err(error)) => return Ok(Fate::Refused(Refusal::Unreadable(error.to_string()))),
            Some(Ok(manifest)) => manifest.clone(),
        };
        if let Some(refusal) = self.refusal(&manifest).await? {
            return Ok(Fate::Refused(refusal));
        }
        let fate = Box::pin(self.settled_or_sent(&manifest, standing)).await?;
        if matches!(fate, Fate::Already | Fate::Copied(_)) {
            self.whole.insert(backup);
        }
        Ok(fate)
    }

    async fn refusal(&self, manifest: &Manifest) -> Result<Option<Refusal>, VaultError> {
        let (here, backup) = (&self.here, manifest.backup);
        if !here.has(backup, MarkKind::Checked) {
            return Ok(Some(Refusal::Unchecked));
        }
        if here.has(backup, MarkKind::Prune)
            && here.all_marks().protections(self.from.vault, backup).await?.is_empty()
        {
            return Ok(Some(Refusal::Pruned));
        }
        if let Some(feature) = manifest.features.first() {
            return Ok(Some(Refusal::Feature(feature.clone())));
        }
        let secret = if self.into_the_open { secret(manifest) } else { None };
        Ok(secret.map(Refusal::Secret))
    }

    async fn settled_or_sent(&mut self, manifest: &Manifest, standing: Standing) -> Result<Fate, VaultError> {
        // One that is committed and not checked is mostly whole: to walk it costs less than to send it again.
        let mut unsettled = (standing == Standing::Unchecked).then_some(Fate::Already);
        let mut beside = true;
        let mut revoked = None;
        for _ in 0..TRIES {
            if let Some(fate) = unsettled.take() {
                let folder = self.options.to_folder.as_deref();
                match Box::pin(settle(self.to, manifest.backup, &self.options.holder, folder)).await? {
                    Settled::Checked => return Ok(fate),
                    Settled::Pruned => return Ok(Fate::Refused(Refusal::PrunedThere)),
                    // What it lacks is sent, with a manifest that says the same.
                    Settled::Absent | Settled::Lacks(_) | Settled::Revoked => {}
                }
            }
            match Box::pin(self.session(manifest, beside)).await {
                Ok(End::Fate(fate)) => return Ok(fate),
                Ok(End::Unsettled(amount, lease)) => {
                    unsettled = Some(Fate::Copied(amount));
                    revoked = Some(lease);
                }
                Ok(End::Revoked(lease)) => revoked = Some(lease),
                Err(Trouble::Beside) => beside = false,
                Err(Trouble::Here(error @ (VaultError::Lost { .. } | VaultError::Damaged { .. }))) => {
                    return Ok(Fate::Refused(Refusal::Damaged(error.to_string())));
                }
                Err(Trouble::Here(error) | Trouble::There(error)) => return Err(error),
            }
        }
        Err(match revoked {
            Some(lease) => VaultError::Revoked { lease },
            None => VaultError::damaged(manifest.name(), "its copy is found damaged again and again"),
        })
    }

    /// A session, from its lease to the lease's end, whatever happens in between.
    async fn session(&mut self, manifest: &Manifest, beside: bool) -> Result<End, Trouble> {
        let mut session = Box::pin(self.begin(manifest)).await?;
        let ended = Box::pin(self.write(&mut session, manifest, beside)).await;
        if matches!(ended, Err(Trouble::Here(_) | Trouble::Beside))
            && let Err(error) = session.keep().await
        {
            tracing::warn!(%error, "what was put of a backup that was not copied waits for a collection");
        }
        // A lease that could not be ended is one whose holder died: collectors know what to do.
        if let Err(error) = session.end().await {
            tracing::warn!(%error, "the other vault was not told that this writer has ended");
        }
        ended
    }

    async fn begin(&mut self, manifest: &Manifest) -> Result<Session, VaultError> {
        let resume = self.resume.take();
        let resumes = resume.is_some();
        let options = write::Options {
            holder: self.options.holder.clone(),
            folder: self.options.to_folder.clone(),
            log: self.options.log.clone(),
            resume,
        };
        match Box::pin(Session::begin(self.to, manifest.domain, options.clone())).await {
            // Somebody has revoked it since: what it has put is looked at by the collection.
            Err(VaultError::Revoked { .. }) if resumes => {
                let options = write::Options { resume: None, ..options };
                Box::pin(Session::begin(self.to, manifest.domain, options)).await
            }
            begun => begun,
        }
    }

    async fn write(
        &mut self,
        session: &mut Session,
        manifest: &Manifest,
        beside: bool,
    ) -> Result<End, Trouble> {
        let backup = manifest.backup;
        self.options.progress.begun(backup, session.lease()).await?;
        // Listed anew, under the lease: what is said from here on holds until it ends.
        match Standing::of(session.backups(), backup) {
            Standing::Whole => return Ok(End::Fate(Fate::Already)),
            Standing::Pruned => return Ok(End::Fate(Fate::Refused(Refusal::PrunedThere))),
            Standing::Unchecked | Standing::Absent => {}
        }
        let doomed = session.index().condemnations().iter();
        if doomed.flat_map(|(_, one)| &one.backups).any(|name| name.1 == backup) {
            return Ok(End::Fate(Fate::Refused(Refusal::PrunedThere)));
        }
        let both = if beside { self.both(session, manifest).await? } else { None };
        let mut copied = manifest.clone();
        copied.lease = session.lease();
        copied.header = String::from_utf8_lossy(self.to.header_bytes()).into_owned();
        // What this program knows of it is what it says there.
        copied.format = copied.format.min(FORMAT);
        copied.disks.iter_mut().for_each(|disk| disk.stored = 0);
        let mut amount = Amount::default();
        for (name, kind, image) in manifest.images() {
            let twin = both.as_ref().and_then(|both| both.twin(name, kind));
            let written = self.image(session, manifest, kind, image, twin).await?;
            amount.add(&written);
            put_in(&mut copied, name, kind, &written);
            self.options.progress.written(backup, name, &written).await?;
        }
        for _ in 0..TRIES {
            let hurt = match Box::pin(session.prepare(&copied)).await? {
                Readiness::Ready(prepared) => {
                    return Ok(match session.commit(&prepared).await? {
                        Outcome::Checked => End::Fate(Fate::Copied(amount)),
                        Outcome::Revoked => End::Unsettled(amount, session.lease()),
                    });
                }
                Readiness::Revoked => return Ok(End::Revoked(session.lease())),
                Readiness::Damaged(hurt) => hurt,
            };
            for (name, kind, image) in manifest.images() {
                let Some(ranges) = hurt.get(name) else { continue };
                let there = copied.images().into_iter().find(|one| (one.0, one.1) == (name, kind));
                // Where all of it is to be written again, its tree is of no use.
                let all = ranges.contains(&(0..image.size));
                let twin = there.filter(|_| !all).map(|(_, _, there)| Twin {
                    here: image.tree(),
                    there: there.tree(),
                    but: ranges.iter().map(chunks_of).collect(),
                });
                let written = self.image(session, manifest, kind, image, twin).await?;
                amount.add(&written);
                put_in(&mut copied, name, kind, &written);
            }
        }
        Err(VaultError::damaged(manifest.name(), "what its copy reuses is found damaged again and again")
            .into())
    }

    /// A backup that both vaults have, to compare with: the parent, or else the one that is nearest in time.
    async fn both(&self, session: &Session, manifest: &Manifest) -> Result<Option<Both>, VaultError> {
        let read = |id: BackupId| match self.here.get(id) {
            Some(Backup { manifest: Ok(found), .. }) => Some(found),
            _ => None,
        };
        let fits = |found: &&Manifest| found.domain == manifest.domain && found.backup != manifest.backup;
        let far = |found: &&Manifest| (found.taken.as_second() - manifest.taken.as_second()).unsigned_abs();
        // The newest first: of those that are as near, it is taken.
        let nearest = self.whole.iter().rev().filter_map(|id| read(*id)).filter(fits).min_by_key(far);
        let parent = manifest.parent.and_then(read).filter(fits);
        for found in parent.into_iter().chain(nearest) {
            match Box::pin(session.parent(found.backup)).await? {
                Ok(there) if there.manifest.taken == found.taken => {
                    return Ok(Some(Both { here: found.clone(), there }));
                }
                Ok(_) => tracing::warn!(backup = %found.backup, "this backup is another in the other vault"),
                Err(why) => tracing::debug!(%why, "not compared with"),
            }
        }
        Ok(None)
    }

    /// Writes an image there, from what is here.
    async fn image(
        &mut self,
        session: &mut Session,
        manifest: &Manifest,
        kind: BlobType,
        image: &Image,
        twin: Option<Twin>,
    ) -> Result<Written, Trouble> {
        let domain = manifest.domain;
        let parent = twin.as_ref().map(|twin| twin.there);
        let original = Original {
            vault: self.from.vault.clone(),
            ids: self.from.vault.ids(domain),
            fetcher: self.from.fetcher(domain, self.options.from_folder.as_ref()),
            kind,
            image: *image,
            beside: twin.map(|twin| (twin.here, twin.but)),
        };
        let mut reading = original.read();
        match Box::pin(session.write_image(&mut reading, image.size, kind, parent)).await {
            Ok(written) => Ok(written),
            Err(error) => Err(match (reading.failed, error) {
                (Some(here), _) => Trouble::Here(here),
                (None, VaultError::Lost { .. }) if parent.is_some() => Trouble::Beside,
                (None, there) => Trouble::There(there),
            }),
        }
    }
}

impl Both {
    /// The image of this name, as each vault has it.
    fn twin(&self, name: &str, kind: BlobType) -> Option<Twin> {
        let find = |manifest: &Manifest| {
            manifest.images().into_iter().find(|one| (one.0, one.1) == (name, kind)).map(|one| one.2.tree())
        };
        let (here, there) = (find(&self.here)?, find(&self.there.manifest)?);
        let but = self.there.reread.get(name).into_iter().flatten().map(chunks_of).collect();
        (here.size == there.size).then_some(Twin { here, there, but })
    }
}

impl Amount {
    fn add(&mut self, written: &Written) {
        self.read += written.read;
        self.new += written.new;
        self.stored += written.stored;
    }
}

fn chunks_of(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / u64::from(CHUNK)..bytes.end.div_ceil(u64::from(CHUNK))
}

/// Puts an image that was written into its manifest.
fn put_in(manifest: &mut Manifest, name: &str, kind: BlobType, written: &Written) {
    if kind == BlobType::Data {
        for disk in manifest.disks.iter_mut().filter(|disk| disk.target == name) {
            disk.image = written.image;
            disk.stored += written.stored;
        }
        return;
    }
    for stream in manifest.streams.iter_mut().filter(|stream| stream.name == name) {
        stream.image = written.image;
    }
}
