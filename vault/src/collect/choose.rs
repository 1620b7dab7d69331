//! Which packs are given up, and which runs go with them (`FORMAT.md`, §7, Collection 4 and 5).

use std::collections::{BTreeMap, BTreeSet};

use super::Frees;
use super::doom::Doom;
use super::mark::Needed;
use super::survey::Survey;
use crate::blob;
use crate::error::VaultError;
use crate::ids::{BackupId, BlobId, DomainId, LeaseId, PackId, RunId};
use crate::index::run::{MOST_ENTRIES, Place};
use crate::names::Area;

/// So many runs of little are merged.
const MANY_RUNS: usize = 16;
/// So many leases that have ended are reason enough for a collection.
const MANY_LEASES: usize = 256;

/// What will be condemned.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// Packs that are given up.
    pub(super) give_up: BTreeMap<PackId, Area>,
    /// Runs that another will take the place of, or that are void.
    pub(super) runs: BTreeSet<RunId>,
    /// Older condemnations.
    pub(super) takes_over: Vec<LeaseId>,
    /// Their manifests.
    pub(super) older_manifests: Vec<(DomainId, BackupId, LeaseId)>,
    doomed: bool,
    /// Stored bytes that are needed of packs that are given up because too little of them is.
    alive: u64,
}

impl Choice {
    /// Whether there is no reason to go on.
    pub(super) fn is_nothing(&self, survey: &Survey) -> bool {
        let ended = survey.leases.values().filter(|standing| standing.ended && !standing.revoked).count();
        !self.doomed
            && self.give_up.is_empty()
            && self.runs.is_empty()
            && self.takes_over.is_empty()
            && survey.unnamed.is_empty()
            && ended < MANY_LEASES
    }
}

#[derive(Default)]
struct Use {
    alive: u64,
    all: u64,
}

/// Chooses.
pub(super) async fn choose(
    survey: &Survey,
    needed: &mut Needed,
    doom: &Doom,
    worth: u64,
) -> Result<Choice, VaultError> {
    let mut choice = Choice { older_manifests: doom.older.clone(), ..Choice::default() };
    choice.doomed = !doom.backups.is_empty();
    let index = &survey.index;
    let (mut older_packs, mut older_runs) = (BTreeSet::new(), BTreeSet::new());
    for (lease, condemnation) in index.condemnations() {
        choice.takes_over.push(*lease);
        older_packs.extend(condemnation.packs.iter().map(|(_, pack)| *pack));
        older_runs.extend(condemnation.runs.iter().copied());
    }
    // Whatever of these is needed must be moved, however much it is.
    let damaged = index.damaged_packs();
    let unwanted = |pack: &PackId| older_packs.contains(pack) || damaged.contains(pack);
    for (pack, (area, _)) in &survey.packs {
        if survey.is_over(pack.lease()) && unwanted(pack) {
            choice.give_up.insert(*pack, *area);
        }
    }
    choice.give_up.extend(survey.missing.iter().map(|(pack, area)| (*pack, *area)));

    let mut uses: BTreeMap<PackId, Use> = BTreeMap::new();
    {
        let mut see = |id: BlobId, place: Place| {
            if choice.give_up.contains_key(&place.pack) {
                return;
            }
            let bytes = blob::HEADER as u64 + u64::from(place.stored);
            let used = uses.entry(place.pack).or_default();
            used.all += bytes;
            if needed.claim(&id) {
                used.alive += bytes;
            }
        };
        for state in index.states().iter().filter(|state| state.usable) {
            match index.scan(state.id, &mut see).await {
                // Of a writer that is at work: those of others were read before.
                Ok(()) | Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        index.noted_places().into_iter().for_each(|(id, place)| see(id, place));
    }
    for (pack, (area, _)) in &survey.packs {
        if !survey.is_over(pack.lease()) || choice.give_up.contains_key(pack) {
            continue;
        }
        let used = uses.remove(pack).unwrap_or_default();
        if used.alive == 0 || used.alive * 100 < used.all * worth {
            choice.give_up.insert(*pack, *area);
            choice.alive += used.alive;
        }
    }
    runs(survey, &older_runs, &mut choice).await?;
    Ok(choice)
}

/// What carrying a choice out would free. Afterwards nothing more can be asked for of what is needed.
pub(super) async fn frees(
    survey: &Survey,
    needed: &mut Needed,
    choice: &Choice,
) -> Result<Frees, VaultError> {
    let size = |pack: &PackId| survey.packs.get(pack).map_or(0, |(_, size)| *size);
    let mut frees = Frees { given_up: choice.give_up.keys().map(size).sum(), moved: choice.alive };
    // What lies in packs that stay, or are given up for having little, was claimed there: the rest has no other place.
    let mut see = |id: BlobId, place: Place| {
        if survey.packs.contains_key(&place.pack)
            && choice.give_up.contains_key(&place.pack)
            && needed.claim(&id)
        {
            frees.moved += blob::HEADER as u64 + u64::from(place.stored);
        }
    };
    let index = &survey.index;
    for state in index.states().iter().filter(|state| state.usable) {
        match index.scan(state.id, &mut see).await {
            Ok(()) | Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    index.noted_places().into_iter().for_each(|(id, place)| see(id, place));
    Ok(frees)
}

async fn runs(survey: &Survey, older: &BTreeSet<RunId>, choice: &mut Choice) -> Result<(), VaultError> {
    let states = survey.index.states();
    let little: Vec<RunId> = states
        .iter()
        .filter(|state| survey.named_by.contains_key(&state.id) && state.entries < MOST_ENTRIES as u64 / 4)
        .map(|state| state.id)
        .collect();
    if little.len() >= MANY_RUNS {
        choice.runs.extend(little);
    }
    for (run, packs) in &survey.named_by {
        if packs.iter().any(|(_, pack)| choice.give_up.contains_key(pack)) {
            choice.runs.insert(*run);
        }
    }
    for state in &states {
        let run = state.id;
        if !survey.is_over(run.lease()) || survey.named_by.contains_key(&run) {
            if older.contains(&run) {
                choice.runs.insert(run);
            }
            continue;
        }
        // Void, replaced, or broken: a hint, as long as a pack may need it that this collection has not looked at.
        let all_seen = match survey.index.packs_of_run(run).await {
            Ok(packs) => seen(survey, &packs).await?,
            Err(VaultError::Damaged { .. } | VaultError::Missing { .. }) => survey.broken.contains(&run),
            Err(error) => return Err(error),
        };
        if all_seen || older.contains(&run) {
            choice.runs.insert(run);
        }
    }
    // Never reprieved, although it cannot be read.
    let unreadable = survey.index.unreadable().iter().map(|(run, _)| *run);
    choice.runs.extend(unreadable.filter(|run| older.contains(run)));
    Ok(())
}

/// Whether none of these packs is there without having been listed.
async fn seen(survey: &Survey, packs: &BTreeSet<(Area, PackId)>) -> Result<bool, VaultError> {
    for (area, pack) in packs {
        let looked_at = survey.listed.contains(pack) && survey.is_over(pack.lease());
        if !looked_at && super::survey::size_of(survey.index.vault(), *area, *pack).await?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}
