//! The look at domains, folders and roots.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vmkeep_workflow::{JobId, JobStatus, JobSummary};

use super::restores::{self, Placed};
use super::uses::{Uses, connected_to};
use super::{Leftover, Owner, What};
use crate::backup::begin::socket_name;
use crate::backup::forget::checkpoint_job;
use crate::hypervisor::{DomainRef, FileId, Hold, HvError, Layer, Marker, Observation, RunState, Trouble};
use crate::image::root::TargetRoot;
use crate::manifest::catalogue::{Entry, Met, walk};
use crate::snapshot::World;
use crate::snapshot::disk::{overlay_job, scratch_job, state_job};
use crate::snapshot::fence;
use crate::snapshot::safety::holds;

/// Where to look.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// The store of this daemon.
    pub store: String,
    /// Folders with overlays or scratch files besides those of the domains' images.
    pub overlays: Vec<PathBuf>,
    /// The RAM disk for guests' states.
    pub ram_disk: Option<PathBuf>,
    /// The roots below which backups lie.
    pub roots: Vec<PathBuf>,
    /// The files that restores were to make which are not over, or were given up.
    pub placed: Vec<Placed>,
}

/// All domains that can be looked at, and those that cannot, with the reason.
pub(super) async fn domains(world: &World) -> Result<(Vec<Observation>, Vec<(String, HvError)>), HvError> {
    let (mut seen, mut unseen) = (Vec::new(), Vec::new());
    for domain in world.hypervisor.domains().await? {
        match world.hypervisor.observe_from_outside(&domain.id).await {
            Ok(observation) => seen.push(observation),
            Err(e) if e.trouble == Trouble::NoSuchDomain => {}
            Err(e) => unseen.push((domain.name, e)),
        }
    }
    Ok((seen, unseen))
}

impl Look {
    /// What there is, by kind. `jobs` are all that the journal knows.
    ///
    /// # Errors
    /// When the hypervisor does not answer at all.
    pub async fn around(&self, world: &World, jobs: &[JobSummary]) -> Result<Vec<Leftover>, HvError> {
        let (seen, unseen) = domains(world).await?;
        let mut found: Vec<Leftover> = unseen
            .iter()
            .map(|(name, e)| Leftover {
                what: What::Unseen { object: format!("the domain {name}"), why: e.to_string() },
                owner: Owner::NotOurs,
                users: Vec::new(),
            })
            .collect();
        for domain in &seen {
            found.extend(self.of_domain(domain, jobs));
            if domain.state.is_active() && fence::is_locked(&*world.hypervisor, &domain.domain.id).await? {
                let what = What::Locked(domain.domain.clone());
                found.push(Leftover { what, owner: Owner::NotOurs, users: Vec::new() });
            }
        }
        for one in &mut found {
            if let (What::Pull { domain, path, .. }, Owner::Lost { .. }) = (&one.what, &one.owner) {
                match is_read(world, domain, path).await {
                    Ok(false) => {}
                    Ok(true) => one.users.push("somebody is connected to it".to_owned()),
                    Err(e) => one.users.push(format!("perhaps somebody who is connected to it ({e})")),
                }
            }
        }
        let uses = match Uses::of(world, &seen).await {
            Ok(uses) => uses,
            Err(e) => {
                found.push(Leftover {
                    what: What::Unseen {
                        object: "an image that a domain names".to_owned(),
                        why: e.to_string(),
                    },
                    owner: Owner::NotOurs,
                    users: Vec::new(),
                });
                Uses::default()
            }
        };
        found.extend(self.overlays(world, &uses, !unseen.is_empty(), jobs).await);
        let (folders, roots) = (uses.folders().into_iter().collect(), self.roots.clone());
        let under_way = crate::blocking::run(move || restores::under_way(folders, &roots)).await;
        found.extend(restores::halves(under_way.unwrap_or_default(), &uses, jobs));
        found.extend(restores::named(&self.placed, &uses, jobs));
        // What was overwritten is a domain's whose note says so.
        for one in &mut found {
            if let (What::Scratch { .. }, Owner::Unknown(id)) = (&one.what, &one.owner)
                && let Some(of) = seen.iter().find(|seen| notes(seen, id, &self.store))
            {
                one.owner = Owner::of_pull(id, jobs, of, &self.store);
            }
        }
        let (look, jobs) = (self.clone(), jobs.to_vec());
        let files = crate::blocking::run(move || look.files(&jobs)).await;
        found.extend(files.unwrap_or_default());
        Ok(found)
    }

    fn of_domain(&self, seen: &Observation, jobs: &[JobSummary]) -> Vec<Leftover> {
        let domain = || seen.domain.clone();
        let left = |what, owner| Leftover { what, owner, users: Vec::new() };
        let mut found = Vec::new();
        let owner = |marker: &Marker| {
            if marker.store == self.store { Owner::of(&marker.job, jobs) } else { Owner::NotOurs }
        };
        if let Some(marker) = seen.marker.as_ref().or(seen.persistent_marker.as_ref()) {
            // A hold without a guest that stands still means nothing; whether one is frozen only its agent knows.
            let still = matches!(seen.state, RunState::Paused(_));
            if holds(marker) && (still || marker.hold == Some(Hold::Frozen) && seen.state.is_active()) {
                found.push(left(What::Held(domain()), owner(marker)));
            }
            found.push(left(What::Marker(domain()), owner(marker)));
        }
        let named: BTreeSet<PathBuf> = [&seen.live, &seen.persistent]
            .into_iter()
            .flatten()
            .flat_map(|definition| &definition.disks)
            .filter_map(|disk| disk.source.image().cloned())
            .chain(seen.qemu.iter().flat_map(|qemu| qemu.open.clone()))
            .collect();
        for path in named {
            if let Some(job) = overlay_job(&path) {
                let owner = Owner::of(job, jobs);
                found.push(left(What::OnOverlay { domain: domain(), path }, owner));
            }
        }
        for disk in seen.live.iter().flat_map(|live| &live.disks).filter(|disk| disk.mirror.is_some()) {
            // A commit of ours is one of an overlay of ours.
            let job = disk.source.image().and_then(|path| overlay_job(path).map(str::to_owned));
            let owner = job.map_or(Owner::NotOurs, |job| Owner::of(&job, jobs));
            found.push(left(What::BlockJob { domain: domain(), disk: disk.target.to_string() }, owner));
        }
        for path in seen.qemu.iter().flat_map(|qemu| &qemu.open) {
            if let Some(job) = scratch_job(path) {
                let grown = path.symlink_metadata().map_or(0, |data| data.blocks() * 512);
                let owner = Owner::of_pull(job, jobs, seen, &self.store);
                found.push(left(What::Pull { domain: domain(), path: path.clone(), grown }, owner));
            }
        }
        for name in &seen.checkpoints {
            let owner = checkpoint_job(name).map_or(Owner::NotOurs, |job| Owner::of(&job, jobs));
            // The next backup is to begin with that of one that was made.
            let stays = |owner: &Owner| matches!(owner, Owner::Over { status: JobStatus::Succeeded, .. });
            if !stays(&owner) {
                found.push(left(What::Checkpoint { domain: domain(), name: name.clone() }, owner));
            }
        }
        found
    }

    async fn overlays(
        &self,
        world: &World,
        uses: &Uses,
        partial: bool,
        jobs: &[JobSummary],
    ) -> Vec<Leftover> {
        let mut folders = uses.folders();
        folders.extend(self.overlays.iter().cloned());
        let mut found = Vec::new();
        for path in folders.iter().flat_map(|folder| named(folder, scratch_job)).collect::<BTreeSet<_>>() {
            let Ok(data) = path.symlink_metadata() else { continue };
            let owner = scratch_job(&path).map_or(Owner::NotOurs, |job| Owner::of(job, jobs));
            let users = uses.users(&path);
            found.push(Leftover { what: What::Scratch { path, id: FileId::of(&data) }, owner, users });
        }
        for path in folders.iter().flat_map(|folder| named(folder, overlay_job)).collect::<BTreeSet<_>>() {
            let layer = Layer { path: path.clone(), format: "qcow2".to_owned() };
            let owner = overlay_job(&path).map_or(Owner::NotOurs, |job| Owner::of(job, jobs));
            let what = match world.storage.inspect(&layer).await {
                Ok(Some(image)) => What::Overlay { path: path.clone(), id: image.id, empty: image.empty },
                Ok(None) => continue,
                Err(e) => What::Unseen { object: path.display().to_string(), why: e.to_string() },
            };
            let mut users = uses.users(&path);
            if partial {
                users.push("perhaps a domain that could not be looked at".to_owned());
            }
            found.push(Leftover { what, owner, users });
        }
        found
    }

    /// Blocks.
    fn files(&self, jobs: &[JobSummary]) -> Vec<Leftover> {
        let left = |what, owner| Leftover { what, owner, users: Vec::new() };
        let mut found = Vec::new();
        for path in self.ram_disk.iter().flat_map(|folder| named(folder, state_job)) {
            let owner = state_job(&path).map_or(Owner::NotOurs, |job| Owner::of(job, jobs));
            found.push(left(What::State(path), owner));
        }
        for root in &self.roots {
            // What cannot be looked into is told by whoever looks at the roots. What has a manifest is a backup, or the
            // catalogue's matter: thousands of them are not read for this.
            let met =
                TargetRoot::open(root).and_then(|root| walk(root.folder(), &|_, _| true)).unwrap_or_default();
            for met in met {
                match met {
                    Met::Other(Entry::Unpublished { path, job }) => {
                        found.push(left(What::Unpublished(path), Owner::of(&job, jobs)));
                    }
                    Met::Other(Entry::Withdrawn { path, .. }) => {
                        let deletes = |job: &&JobSummary| {
                            !job.status.ended() && ["delete", "prune"].contains(&job.workflow.as_str())
                        };
                        let owner = match jobs.iter().find(deletes) {
                            Some(job) => Owner::Open(job.job),
                            None => Owner::Unknown("a deletion".to_owned()),
                        };
                        found.push(left(What::Withdrawn(path), owner));
                    }
                    _ => {}
                }
            }
        }
        // Roots may lie within one another.
        let mut once = BTreeSet::new();
        found.retain(|one| match &one.what {
            What::Unpublished(path) | What::Withdrawn(path) => once.insert(path.clone()),
            _ => true,
        });
        found
    }
}

/// Whether a domain bears this store's note of that job.
pub(super) fn notes(seen: &Observation, id: &str, store: &str) -> bool {
    let job = |note: &Marker| note.job.parse::<JobId>().is_ok_and(|job| job.short() == id);
    [&seen.marker, &seen.persistent_marker].into_iter().flatten().any(|note| note.store == store && job(note))
}

/// Whether somebody is connected to the socket of the pull with this scratch file.
///
/// # Errors
/// When the hypervisor does not say where its sockets are.
pub(super) async fn is_read(world: &World, domain: &DomainRef, scratch: &Path) -> Result<bool, HvError> {
    let Some(job) = scratch_job(scratch) else { return Ok(false) };
    let folder = match world.hypervisor.socket_folder(&domain.id).await {
        Err(e) if matches!(e.trouble, Trouble::NotRunning | Trouble::NoSuchDomain | Trouble::Missing) => {
            return Ok(false);
        }
        folder => folder?,
    };
    let socket = folder.join(socket_name(job));
    // What cannot be read is not known: then somebody may be.
    Ok(crate::blocking::run(move || connected_to(&socket)).await.unwrap_or(true))
}

/// The files in a folder whose name says that they are a job's.
fn named(folder: &Path, job: fn(&Path) -> Option<&str>) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| job(path).is_some()).collect()
}
