//! What jobs may have left behind, and whose it is: journals compared with the world.
//!
//! A job that goes on settles what it made by itself, whatever ended in between; so nothing here acts for it. What can be
//! left over for good comes from jobs that were given up (`abandon`), from journals that were lost, from other daemons and
//! other programs. It is looked for in the world, not in journals: an overlay, a state, a folder, a note in a domain
//! bears the id of its job, and the journal says how far that job is ([`Owner`]).
//!
//! - **Looking changes nothing** ([`Look`]), and asks no QEMU: a guest that stands still must not hold the look up.
//! - **Little is removed** ([`sweep`]), and only as a job, of which the order is asked by somebody: what is of a job
//!   that this journal knows and that is over, and holds nothing that is not elsewhere. An overlay that holds data,
//!   a guest's saved memory, anything of an unfinished job, of a job that this journal does not know, or of
//!   somebody else, is told of and stays as it is.
//! - **A pull is the exception**, since it costs the guest something as long as it lasts, and nothing to end it: of a job
//!   that the journal does not know it is ended too, if no other store's note says that another vmkeep may be at work
//!   ([`Owner::Lost`]) and nobody reads from it. So a journal that was lost, or put back from an older copy, leaves no
//!   guest with a scratch file that grows for ever.
//! - **What was found is not believed later**: right before each act all of it is looked at again.
//!
//! | module | what |
//! |---|---|
//! | [`look`] | the look at domains, folders and roots |
//! | [`restores`] | files of restores: under way, or with their final names |
//! | [`uses`] | who names or has open a file |
//! | [`sweep`] | the step that takes one thing away |
//! | [`workflow`] | the recipe `repair` |

pub mod look;
pub mod restores;
pub mod sweep;
pub mod uses;
pub mod workflow;

#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmkeep_workflow::{JobId, JobStatus, JobSummary};

use crate::hypervisor::{DomainRef, FileId, Observation};
use crate::snapshot::fence;
use crate::text::bytes;

pub use look::Look;

/// Whose something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A job that is not over; it settles this by itself.
    Open(JobId),
    /// A job that is over.
    Over {
        /// The job.
        job: JobId,
        /// How it ended.
        status: JobStatus,
        /// The domain that it worked on.
        domain: DomainRef,
    },
    /// A job that this journal does not know: its id, or the end of it.
    Unknown(String),
    /// A job that this journal does not know, and that nobody else can be at work on: every job has its note in its domain
    /// before it begins a pull, and takes it away after it has ended it; there is none, or it is this store's.
    Lost {
        /// The job; if no more of it is known than the end of its id, the rest of it is zero.
        job: JobId,
        /// The domain that bears no other store's note.
        domain: DomainRef,
    },
    /// A job that another vmkeep may be at work on: its note is in the domain.
    Elsewhere {
        /// The other store.
        store: String,
        /// The job's id, or the end of it.
        job: String,
    },
    /// Somebody else.
    NotOurs,
}

impl Owner {
    /// Of what bears this id, or the last digits of it.
    #[must_use]
    pub fn of(id: &str, jobs: &[JobSummary]) -> Self {
        let named = |job: &&JobSummary| job.job.short() == id || job.job.to_string() == id;
        let mut found: Vec<&JobSummary> = jobs.iter().filter(named).collect();
        // Two jobs may share these digits: the one that goes on has a say.
        found.sort_by_key(|job| job.status.ended());
        match found.first() {
            None => Self::Unknown(id.to_owned()),
            Some(job) if !job.status.ended() => Self::Open(job.job),
            Some(job) => match job.subject.id.parse() {
                Ok(uuid) => Self::Over {
                    job: job.job,
                    status: job.status,
                    domain: DomainRef {
                        id: crate::hypervisor::DomainId(uuid),
                        name: job.subject.label.clone(),
                    },
                },
                // Nobody could be locked for it.
                Err(_) => Self::Unknown(id.to_owned()),
            },
        }
    }

    /// Of what bears the end of a job's id in the scratch file of a pull. Where the journal knows nothing the notes of the domain
    /// tell whether anybody else may go on with it.
    #[must_use]
    pub fn of_pull(id: &str, jobs: &[JobSummary], seen: &Observation, store: &str) -> Self {
        let id = match Self::of(id, jobs) {
            Self::Unknown(id) => id,
            known => return known,
        };
        let notes = || [&seen.marker, &seen.persistent_marker].into_iter().flatten();
        if let Some(other) = notes().find(|note| note.store != store) {
            return Self::Elsewhere { store: other.store.clone(), job: id };
        }
        let noted = notes().filter_map(|note| note.job.parse().ok()).find(|job: &JobId| job.short() == id);
        let digits = || u128::from_str_radix(&id, 16).ok().map(|end| JobId::from(Uuid::from_u128(end)));
        match noted.or_else(digits) {
            Some(job) => Self::Lost { job, domain: seen.domain.clone() },
            None => Self::Unknown(id),
        }
    }

    /// In words.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::Open(job) => format!("of job {}, which is not over", job.short()),
            Self::Over { job, status, .. } => {
                format!("of job {}, which is over ({})", job.short(), status.as_str())
            }
            Self::Unknown(id) => format!("of job {id}, which this journal does not know"),
            Self::Lost { job, .. } => format!(
                "of job {}, which this journal does not know, and no other vmkeep has its note in the domain",
                job.short()
            ),
            Self::Elsewhere { store, job } => {
                format!("of job {job}; another vmkeep (store {store}) has its note in the domain")
            }
            Self::NotOurs => "not ours".to_owned(),
        }
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// What it is.
    pub what: What,
    /// Whose.
    pub owner: Owner,
    /// Who needs it, in words; empty if nobody is known to.
    pub users: Vec<String>,
}

/// What something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// An overlay.
    Overlay {
        /// Where.
        path: PathBuf,
        /// Which file.
        id: FileId,
        /// Whether it holds nothing.
        empty: bool,
    },
    /// What a guest overwrote while it was backed up.
    Scratch {
        /// Where.
        path: PathBuf,
        /// Which file.
        id: FileId,
    },
    /// A backup job of ours on a domain that runs: what it overwrites goes into this file first.
    Pull {
        /// The domain.
        domain: DomainRef,
        /// The scratch file.
        path: PathBuf,
        /// What the file takes, in bytes.
        grown: u64,
    },
    /// A guest's state on the RAM disk.
    State(PathBuf),
    /// A folder below a root that has not become a backup.
    Unpublished(PathBuf),
    /// A folder below a root whose backup was about to be deleted.
    Withdrawn(PathBuf),
    /// A file that a restore was writing, under the job's hidden name: a copy of what a backup holds.
    Half {
        /// Where.
        path: PathBuf,
        /// Which file.
        id: FileId,
    },
    /// A file with the final name of one that a restore was to make.
    Restored(PathBuf),
    /// The note that a job works on a domain.
    Marker(DomainRef),
    /// A guest that a job has stopped or frozen.
    Held(DomainRef),
    /// A domain whose disk is an overlay.
    OnOverlay {
        /// The domain.
        domain: DomainRef,
        /// The overlay.
        path: PathBuf,
    },
    /// A block job that libvirt knows of.
    BlockJob {
        /// The domain.
        domain: DomainRef,
        /// The disk.
        disk: String,
    },
    /// A checkpoint of libvirt's.
    Checkpoint {
        /// The domain.
        domain: DomainRef,
        /// Its name.
        name: String,
    },
    /// A domain that libvirt has locked for ever.
    Locked(DomainRef),
    /// What could not be looked at.
    Unseen {
        /// What.
        object: String,
        /// Why not.
        why: String,
    },
}

/// One thing that is safe to take away once its job is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", content = "at", rename_all = "snake_case")]
pub enum Sweep {
    /// Let the guest go that the job holds.
    Free,
    /// Remove the job's note from the domain.
    Unmark,
    /// Remove an overlay that holds nothing and that nobody uses.
    Overlay {
        /// Where.
        path: PathBuf,
        /// Which file.
        id: FileId,
    },
    /// Remove a scratch file that no process has open.
    Scratch {
        /// Where.
        path: PathBuf,
        /// Which file.
        id: FileId,
    },
    /// End the backup job that this scratch file belongs to.
    Pull(PathBuf),
    /// Remove a folder that has not become a backup, and the copies in it.
    Folder(PathBuf),
    /// Remove a file that a restore was writing.
    Half {
        /// Where.
        path: PathBuf,
        /// Which file.
        id: FileId,
    },
}

impl Sweep {
    /// Whether it is a pull, or what one has left: nothing in it is of use once the pull is over.
    pub(crate) fn is_of_pull(&self) -> bool {
        matches!(self, Self::Pull(_) | Self::Scratch { .. })
    }
}

impl Leftover {
    /// What can safely be done about it, and for which domain.
    #[must_use]
    pub fn sweep(&self) -> Option<(DomainRef, JobId, Sweep)> {
        let (job, domain) = match (&self.owner, &self.what) {
            (Owner::Over { job, domain, .. }, _)
            | (Owner::Lost { job, domain }, What::Pull { .. } | What::Scratch { .. }) => (job, domain),
            _ => return None,
        };
        if !self.users.is_empty() {
            return None;
        }
        let (domain, sweep) = match &self.what {
            What::Held(domain) => (domain, Sweep::Free),
            What::Marker(domain) => (domain, Sweep::Unmark),
            What::Overlay { path, id, empty: true } => {
                (domain, Sweep::Overlay { path: path.clone(), id: *id })
            }
            What::Scratch { path, id } => (domain, Sweep::Scratch { path: path.clone(), id: *id }),
            What::Pull { domain, path, .. } => (domain, Sweep::Pull(path.clone())),
            What::Unpublished(path) => (domain, Sweep::Folder(path.clone())),
            What::Half { path, id } => (domain, Sweep::Half { path: path.clone(), id: *id }),
            _ => return None,
        };
        Some((domain.clone(), *job, sweep))
    }

    /// What it is, in words.
    #[must_use]
    pub fn words(&self) -> String {
        let what = match &self.what {
            What::Overlay { path, empty, .. } => {
                let holds = if *empty { "holds nothing" } else { "holds data" };
                format!("the overlay {}, which {holds}", path.display())
            }
            What::Scratch { path, .. } => {
                format!("the scratch file {}, with what a guest has overwritten", path.display())
            }
            What::Pull { domain, path, grown } => format!(
                "a backup job on {}: what the guest overwrites goes to {} first, which takes {} and grows as long as the \
                 job lasts; until then nobody can save, migrate or back up the domain",
                domain.name,
                path.display(),
                bytes(*grown)
            ),
            What::State(path) => format!("the saved memory {}", path.display()),
            What::Unpublished(path) => format!("the folder {}, which is no backup", path.display()),
            What::Half { path, .. } => format!("the unfinished file {} of a restore", path.display()),
            What::Restored(path) => format!("the file {} of a restore that is not finished", path.display()),
            What::Withdrawn(path) => {
                format!("the folder {}, whose backup was about to be deleted", path.display())
            }
            What::Marker(domain) => format!("the note in {} that a job works on it", domain.name),
            What::Held(domain) => format!("the guest of {}, stopped or frozen", domain.name),
            What::OnOverlay { domain, path } => {
                format!("{} stands on the overlay {}", domain.name, path.display())
            }
            What::BlockJob { domain, disk } => format!("a block job on disk {disk} of {}", domain.name),
            What::Checkpoint { domain, name } => format!("the checkpoint {name} of {}", domain.name),
            What::Locked(domain) => {
                return format!(
                    "{}: {}; nobody can save, migrate or back it up, nor take a snapshot",
                    domain.name,
                    fence::LOST
                );
            }
            What::Unseen { object, why } => return format!("{object} could not be looked at: {why}"),
        };
        let used = if self.users.is_empty() {
            String::new()
        } else {
            format!("; in use: {}", self.users.join(", "))
        };
        format!("{what}: {}{used}", self.owner.words())
    }

    /// What there is to do.
    #[must_use]
    pub fn remedy(&self) -> String {
        match (&self.owner, &self.what) {
            (_, What::Unseen { .. }) => "See what keeps it from being looked at".to_owned(),
            (_, What::Locked(_)) => fence::LOST_REMEDY.to_owned(),
            (Owner::Open(job), _) => {
                format!(
                    "None as long as the job goes on: it settles that itself (vmkeep job show {})",
                    job.short()
                )
            }
            (Owner::NotOurs, _) => "None: whoever made it looks after it".to_owned(),
            (_, What::OnOverlay { domain, path }) => format!(
                "The overlay is part of the disk: commit it (virsh blockcommit {} DISK --active --pivot --wait), never \
                 remove {}",
                domain.id,
                path.display()
            ),
            (Owner::Elsewhere { .. }, What::Pull { domain, .. }) => format!(
                "None if that vmkeep is at work. If its store is gone for good: virsh metadata {} {} --remove --live \
                 --config, then vmkeep doctor --repair",
                domain.id,
                crate::hypervisor::MARKER_NAMESPACE
            ),
            (_, What::Pull { domain, .. }) if self.sweep().is_none() => format!(
                "If no other vmkeep backs it up: virsh domjobabort {0}, and virsh resume {0} if the guest is paused",
                domain.id
            ),
            (Owner::Unknown(_), What::Checkpoint { .. }) => {
                "None: the next backup into its vault begins with it if that vault has its backup, and deletes it otherwise"
                    .to_owned()
            }
            (_, What::Checkpoint { .. }) => "The next backup into its vault deletes it".to_owned(),
            _ if self.sweep().is_some() => "vmkeep doctor --repair".to_owned(),
            (_, What::Overlay { path, .. }) => format!(
                "Find out what it holds, and which domain's it was (qemu-img info -U {}), before removing it",
                path.display()
            ),
            (_, What::State(_)) => {
                "A guest's memory: remove it once it is certain that its guest need not come back with it"
                    .to_owned()
            }
            (_, What::Withdrawn(_)) => {
                "Delete the backup again (vmkeep delete), or see what is left in it".to_owned()
            }
            (_, What::Restored(path)) => format!(
                "See whether the job has made it, or somebody else (qemu-img info -U {}), and remove it by hand if nobody needs it",
                path.display()
            ),
            (_, What::Marker(domain)) => format!(
                "If no other vmkeep works on it: virsh metadata {} {} --remove --live --config",
                domain.id,
                crate::hypervisor::MARKER_NAMESPACE
            ),
            (_, What::Held(domain)) => {
                format!("If no other vmkeep works on it: virsh resume {0}, or virsh domfsthaw {0}", domain.id)
            }
            _ => "See whose it is, and remove it by hand if nobody needs it".to_owned(),
        }
    }
}
