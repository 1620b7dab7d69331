//! What the stream says, folded: every backup that was seen and not deleted or forgotten since.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use vmkeep_steps::manifest::BackupId;
use vmkeep_vault::ids::VaultId;

use super::View;
use super::checks::Check;
use super::event::{Body, Event, Place};
use super::look::{Known, Look};
use super::vaulted::Vaulted;

/// The known backups. One may lie in several folders: somebody copied it.
#[derive(Clone, Debug, Default)]
pub(super) struct Shelf {
    places: HashMap<BackupId, BTreeMap<PathBuf, Place>>,
    /// What the last reading of each found.
    checks: HashMap<(BackupId, PathBuf), Check>,
    /// The jobs whose readings are known.
    readings: HashSet<String>,
    /// The last backup of each domain, by its UUID, in each vault.
    vaulted: BTreeMap<(String, VaultId), Vaulted>,
    /// The jobs whose backups in vaults are known.
    vaulting: HashSet<String>,
}

/// A backup that is there.
#[derive(Clone, Debug)]
pub struct Listed {
    /// What its manifest says.
    pub place: Place,
    /// What its last reading found, if there was one since its manifest is this one.
    pub check: Option<Check>,
    /// Further folders in which the very same backup lies.
    pub copies: Vec<PathBuf>,
}

/// A backup that is not there any more.
#[derive(Clone, Debug)]
pub struct Missing {
    /// What its manifest said, and where it lay.
    pub place: Place,
    /// What is known of why.
    pub why: String,
}

impl Shelf {
    /// Folds a record; says whether it was understood.
    pub(super) fn fold(&mut self, bytes: &[u8]) -> bool {
        match serde_json::from_slice::<Event>(bytes) {
            Ok(event) => {
                self.apply(&event.body);
                true
            }
            Err(_) => false,
        }
    }

    pub(super) fn apply(&mut self, body: &Body) {
        match body {
            Body::Seen(place) => {
                let places = self.places.entry(place.backup).or_default();
                let before = places.insert(place.folder.clone(), (**place).clone());
                if before.is_some_and(|before| before.manifest != place.manifest) {
                    self.checks.remove(&(place.backup, place.folder.clone()));
                }
            }
            Body::Checked(check) => {
                self.readings.insert(check.job.clone());
                self.checks.insert((check.backup, check.folder.clone()), (**check).clone());
            }
            Body::Vaulted(vaulted) => {
                self.vaulting.insert(vaulted.job.clone());
                let of = (vaulted.domain_uuid.clone(), vaulted.vault);
                if self.vaulted.get(&of).is_none_or(|known| known.at <= vaulted.at) {
                    self.vaulted.insert(of, (**vaulted).clone());
                }
            }
            Body::Deleted { backup, folder, .. } => {
                if let Some(places) = self.places.get_mut(backup) {
                    places.remove(folder);
                    if places.is_empty() {
                        self.places.remove(backup);
                    }
                }
                self.checks.remove(&(*backup, folder.clone()));
            }
            Body::Forgotten { backup, .. } => {
                self.places.remove(backup);
                self.checks.retain(|(of, _), _| of != backup);
            }
            // The note itself is what counts, and a changed note is seen like a changed manifest.
            Body::Protected { .. } | Body::Unprotected { .. } | Body::Rebuilt { .. } => {}
        }
    }

    /// What is known, for a look that is not to read it again.
    pub(super) fn stamps(&self) -> Known {
        let mut stamps = Known::new();
        for place in self.places() {
            stamps.entry(place.folder.clone()).or_default().push(place.stamp);
        }
        stamps
    }

    /// Whether exactly that is known.
    pub(super) fn knows(&self, place: &Place) -> bool {
        self.places.get(&place.backup).and_then(|places| places.get(&place.folder)) == Some(place)
    }

    /// Whether a backup is known, wherever it lies.
    pub(super) fn has(&self, backup: BackupId) -> bool {
        self.places.contains_key(&backup)
    }

    /// Whether what a job has read is known.
    pub(super) fn knows_check(&self, job: &str) -> bool {
        self.readings.contains(job)
    }

    /// Whether what a job has put into a vault is known.
    pub(super) fn knows_vaulted(&self, job: &str) -> bool {
        self.vaulting.contains(job)
    }

    /// The last backup of each domain in each vault.
    pub(super) fn vaulted(&self) -> Vec<Vaulted> {
        self.vaulted.values().cloned().collect()
    }

    /// Where backups were and a look did not find them.
    pub(super) fn vanished(&self, look: &Look) -> Vec<Place> {
        let read: HashSet<(BackupId, &PathBuf)> =
            look.read.iter().map(|place| (place.backup, &place.folder)).collect();
        let there = |place: &Place| {
            look.has(place) || read.contains(&(place.backup, &place.folder)) || look.halfway(place.backup)
        };
        self.places().filter(|place| !there(place)).cloned().collect()
    }

    fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.values().flat_map(BTreeMap::values)
    }

    /// Backups that a look found in no folder; each by the folder that was seen last of all by name.
    pub(super) fn lost(&self, look: &Look) -> Vec<Place> {
        let read: HashSet<BackupId> = look.read.iter().map(|place| place.backup).collect();
        let lost = |(backup, places): (&BackupId, &BTreeMap<PathBuf, Place>)| {
            if places.values().any(|place| look.has(place)) || read.contains(backup) || look.halfway(*backup)
            {
                return None;
            }
            places.values().next_back().cloned()
        };
        self.places.iter().filter_map(lost).collect()
    }

    /// The backup that is known to lie in a folder.
    pub(super) fn at(&self, folder: &std::path::Path) -> Option<&Place> {
        self.places().find(|place| place.folder == folder)
    }

    /// What there is now.
    pub(super) fn view(&self, look: &Look, mut warnings: Vec<String>) -> View {
        let mut backups: Vec<Listed> = self
            .places()
            .filter(|place| look.has(place))
            .chain(&look.read)
            .map(|place| Listed {
                place: place.clone(),
                check: self.checks.get(&(place.backup, place.folder.clone())).cloned(),
                copies: Vec::new(),
            })
            .collect();
        // One root may lie below another: a backup is one backup however it was reached.
        backups.sort_by(|a, b| a.place.folder.cmp(&b.place.folder));
        backups.dedup_by(|a, b| a.place.folder == b.place.folder);
        let mut folders: BTreeMap<BackupId, Vec<PathBuf>> = BTreeMap::new();
        for one in &backups {
            folders.entry(one.place.backup).or_default().push(one.place.folder.clone());
        }
        for one in &mut backups {
            let all = folders.get(&one.place.backup).map(Vec::as_slice).unwrap_or_default();
            one.copies = all.iter().filter(|folder| **folder != one.place.folder).cloned().collect();
        }
        backups.sort_by_key(|one| std::cmp::Reverse(one.place.at));
        let mut missing: Vec<Missing> = self
            .lost(look)
            .into_iter()
            .map(|place| Missing { why: look.why_missing(&place.folder), place })
            .collect();
        missing.sort_by_key(|one| std::cmp::Reverse(one.place.at));
        warnings.extend(look.warnings.iter().cloned());
        View { backups, missing, warnings, partial: look.partial() }
    }
}
