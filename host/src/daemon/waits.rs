//! Jobs that wait between two phases, and the room that their guests' overlays leave meanwhile.
//!
//! A wait for a signal is the engine's, and the engine knows nothing of overlays. While a job copies, the copy watches
//! them; while it waits, this does. When they leave too little room, the signal that the job waits for is sent in
//! vmkeepd's own name, with the reason: so the journal says who ended the wait and why.

use std::time::Duration;

use serde_json::json;
use vmkeep_steps::image::space::LowWater;
use vmkeep_steps::snapshot::World;
use vmkeep_steps::workflows::snapshot::phases::must_go_on;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{Actor, Engine, JobStatus};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);

/// Looks after jobs that wait, for as long as the daemon lives.
pub(super) async fn watch(engine: Engine, world: World, low: LowWater) {
    loop {
        tokio::time::sleep(LOOK).await;
        look(&engine, &world, low).await;
    }
}

async fn look(engine: &Engine, world: &World, low: LowWater) {
    let running = JobFilter { status: vec![JobStatus::Running], ..JobFilter::default() };
    let Ok(jobs) = engine.jobs(&running).await else { return };
    for job in jobs {
        let Ok(view) = engine.view(job.job).await else { continue };
        let waiting = view.steps.iter().find_map(|step| step.awaits.clone());
        let (Some((signal, _)), Some(plan)) = (waiting, &view.plan) else { continue };
        let Some(why) = must_go_on(world, plan, low).await else { continue };
        tracing::warn!(job = %job.job, why, "a job that waits goes on: its overlays leave too little room");
        let by = Actor { who: "vmkeepd".to_owned(), why: Some(why) };
        if let Err(fault) =
            engine.signal(job.job, signal, json!("the overlays leave too little room"), by).await
        {
            tracing::warn!(job = %job.job, %fault, "the job could not be told to go on");
        }
    }
}
