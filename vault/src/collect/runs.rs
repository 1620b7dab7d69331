//! The run that takes the place of the condemned ones (`FORMAT.md`, §7, Collection 8).
//!
//! It says what those say that count, but for packs that are given up; what was moved; and what packs that stay hold that no
//! run names. Nothing is taken from a void run: it may name packs that are long gone. The names of lost runs are inherited for
//! ever: one may still arrive.

use std::collections::{BTreeSet, HashMap};

use super::Work;
use crate::error::VaultError;
use crate::ids::{BlobId, RunId};
use crate::index::run::{MOST_ENTRIES, Place, RunDraft};
use crate::mutation;

impl Work<'_> {
    pub(super) async fn put_runs(&mut self) -> Result<(), VaultError> {
        let index = self.survey.index.clone();
        let states = index.states();
        let moved = self.store.own_runs();
        let counts = |run: &RunId| {
            let carried = self.choice.runs.contains(run) && self.survey.named_by.contains_key(run);
            let wrongly = mutation::on("void_runs_carried") && self.choice.runs.contains(run);
            carried || wrongly || moved.contains(run)
        };
        let sources: Vec<RunId> = states.iter().map(|state| state.id).filter(counts).collect();
        let mut lost: BTreeSet<RunId> = states.iter().flat_map(|state| state.lost.iter().copied()).collect();
        if mutation::on("lost_names_inherited") {
            lost.clear();
        }
        let mut draft = RunDraft::default();
        let mut numbers = HashMap::new();
        for run in sources {
            let mut places: Vec<(BlobId, Place)> = Vec::new();
            index.scan(run, &mut |id, place| places.push((id, place))).await?;
            self.take_in(&mut draft, &mut numbers, places).await?;
        }
        self.take_in(&mut draft, &mut numbers, index.noted_places()).await?;
        // Only the last says what they take the place of.
        draft.replaces = self.choice.runs.iter().copied().chain(moved).collect();
        draft.lost = lost.into_iter().collect();
        self.store.put_other(draft).await?;
        Ok(())
    }

    /// Adds places in packs that stay; what is more than a run may have is put first.
    async fn take_in(
        &mut self,
        draft: &mut RunDraft,
        numbers: &mut HashMap<crate::ids::PackId, u32>,
        mut places: Vec<(BlobId, Place)>,
    ) -> Result<(), VaultError> {
        places.retain(|(_, place)| !self.choice.give_up.contains_key(&place.pack));
        let mut rest = &places[..];
        while !rest.is_empty() {
            let room = MOST_ENTRIES - draft.len();
            let (fits, more) = rest.split_at(room.min(rest.len()));
            draft.add_places(fits, numbers);
            rest = more;
            if draft.len() == MOST_ENTRIES {
                numbers.clear();
                Box::pin(self.store.put_other(std::mem::take(draft))).await?;
            }
        }
        Ok(())
    }
}
