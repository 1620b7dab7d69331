//! Guests that QEMU has stopped, and guests that were thawed too early.

use super::act::take;
use super::context;
use super::fake::*;
use crate::codes;
use crate::hypervisor::*;
use crate::snapshot::freeze::{FreezeGuest, FreezeOutput};
use crate::snapshot::mark::{MarkInput, Unmark};
use crate::snapshot::rescue::{ROOM, Rescue, rescue};
use crate::snapshot::take::TakeSnapshot;
use vmkeep_workflow::{Outputs, Step};

const STOPPED: RunState = RunState::Paused(PauseReason::IoError);

fn marked(hold: Option<Hold>) -> Marker {
    Marker { store: STORE.to_owned(), job: context(1).job.to_string(), hold }
}

/// On its overlays, which cannot grow.
fn stopped() -> Fake {
    let fake = Fake::new();
    fake.taken();
    let mut state = fake.state();
    (state.run, state.free, state.marker) = (STOPPED, ROOM - 1, Some(marked(None)));
    drop(state);
    fake
}

#[tokio::test]
async fn a_guest_on_an_overlay_that_could_not_grow_runs_as_soon_as_there_is_room() {
    let fake = stopped();
    let found = rescue(&fake.world(), STORE, &domain().id).await.unwrap();
    assert!(matches!(found, Rescue::NoRoom { free, .. } if free == ROOM - 1), "{found:?}");
    assert_eq!(fake.state().run, STOPPED);
    fake.state().free = ROOM;
    let found = rescue(&fake.world(), STORE, &domain().id).await.unwrap();
    assert!(matches!(&found, Rescue::Resumed { files } if files.len() == 2), "{found:?}");
    assert_eq!(fake.state().run, RunState::Running);
    assert_eq!(rescue(&fake.world(), STORE, &domain().id).await.unwrap(), Rescue::NotOurs);
}

#[tokio::test]
async fn a_guest_that_somebody_holds_or_that_is_on_its_own_images_is_left_to_them() {
    let others = Marker { store: "another".to_owned(), ..marked(None) };
    for marker in [Some(marked(Some(Hold::Suspended))), Some(others), None] {
        let fake = stopped();
        (fake.state().marker, fake.state().free) = (marker, ROOM);
        assert_eq!(rescue(&fake.world(), STORE, &domain().id).await.unwrap(), Rescue::NotOurs);
        assert_eq!(fake.state().run, STOPPED);
    }
    let at_home = Fake::new();
    (at_home.state().run, at_home.state().marker) = (STOPPED, Some(marked(None)));
    assert_eq!(rescue(&at_home.world(), STORE, &domain().id).await.unwrap(), Rescue::NotOurs);
    let by_its_operator = stopped();
    (by_its_operator.state().run, by_its_operator.state().free) =
        (RunState::Paused(PauseReason::Asked), ROOM);
    assert_eq!(rescue(&by_its_operator.world(), STORE, &domain().id).await.unwrap(), Rescue::NotOurs);
}

/// Brought home while the overlays still took the room that it lacked.
#[tokio::test]
async fn a_guest_that_stopped_on_its_own_images_runs_when_the_job_leaves_it_if_there_is_room() {
    let unmark = async |fake: &Fake| {
        let input = MarkInput { domain: domain(), store: STORE.to_owned() };
        Unmark(fake.world()).run(&context(1), input).await.unwrap();
        assert_eq!(fake.state().marker, None);
        fake.state().run
    };
    let at_home = |free| {
        let fake = Fake::new();
        let mut state = fake.state();
        (state.run, state.free, state.marker) = (STOPPED, free, Some(marked(None)));
        drop(state);
        fake
    };
    assert_eq!(unmark(&at_home(ROOM)).await, RunState::Running);
    assert_eq!(unmark(&at_home(ROOM - 1)).await, STOPPED);
    let by_its_operator = at_home(ROOM);
    by_its_operator.state().run = RunState::Paused(PauseReason::Asked);
    assert_eq!(unmark(&by_its_operator).await, RunState::Paused(PauseReason::Asked));
}

#[tokio::test]
async fn a_snapshot_that_came_after_the_thaw_is_not_one_of_a_frozen_guest() {
    for (thawed_early, must) in [(false, true), (true, false), (true, true)] {
        let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
        fake.switched();
        let mut input = take(&fake, folder.path(), None);
        (input.frozen, input.must_be_frozen) = (Some("freeze".into()), must);
        let mut cx = context(1);
        let frozen = FreezeOutput { file_systems: 2, why_not: None };
        cx.outputs = Outputs::from_iter([("freeze".into(), serde_json::to_value(&frozen).unwrap())]);
        assert_eq!(cx.outputs.of::<FreezeGuest>(&"freeze".into()).unwrap(), Some(frozen));
        {
            let mut state = fake.state();
            (state.agent, state.frozen) = (true, !thawed_early);
            state.marker = Some(marked(Some(Hold::Frozen)));
        }
        let taken = TakeSnapshot(fake.world()).run(&cx, input).await;
        match (thawed_early, must) {
            (false, _) => assert_eq!(taken.unwrap().thawed, None),
            (true, false) => assert!(taken.unwrap().thawed.is_some_and(|why| why.contains("too late"))),
            (true, true) => assert_eq!(taken.unwrap_err().code, codes::CANNOT_FREEZE),
        }
    }
}
