//! Guests that ran when their backup began, and that the end of the host took down: they are started again, once per
//! boot, if the configuration says so (`snapshot.after_reboot`). The act is written into the job's journal, which is
//! also how it is known to have been done: who is ended on this boot afterwards stays off.

use std::time::Duration;

use vmkeep_steps::hypervisor::{HvError, Trouble};
use vmkeep_steps::snapshot::World;
use vmkeep_steps::workflows::snapshot::reboot;
use vmkeep_workflow::event::Body;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{Engine, JobId, Plan};

/// How far apart the tries are, and how many there are.
const APART: Duration = Duration::from_secs(1);
const TRIES: u32 = 600;

/// Sees to the guest of every job that has not ended.
pub(super) async fn start_again(engine: &Engine, world: &World, boot: &str) {
    let Ok(jobs) = engine.jobs(&JobFilter { status: reboot::OPEN.to_vec(), ..JobFilter::default() }).await
    else {
        return;
    };
    for job in jobs {
        let Ok(view) = engine.view(job.job).await else { continue };
        let Some(plan) = view.plan else { continue };
        let done = |name: &vmkeep_workflow::StepName| {
            view.steps.iter().any(|step| step.name == *name && step.output.is_some())
        };
        let started = |name: &vmkeep_workflow::StepName| {
            view.steps.iter().any(|step| step.name == *name && step.attempts > 0)
        };
        if reboot::concerns(&plan, boot, started, done) && !seen_to(engine, job.job, boot).await {
            tokio::spawn(bring_up(engine.clone(), world.clone(), job.job, plan, act(boot)));
        }
    }
}

fn act(boot: &str) -> String {
    format!("started the guest again, which ended with the host (boot {boot})")
}

async fn seen_to(engine: &Engine, job: JobId, boot: &str) -> bool {
    let wanted = act(boot);
    let history = engine.history(job).await.unwrap_or_default();
    history.iter().any(|(_, event)| matches!(&event.body, Body::Intervened { act, .. } if *act == wanted))
}

async fn bring_up(engine: Engine, world: World, job: JobId, plan: Plan, act: String) {
    let mut last: Option<HvError> = None;
    for _ in 0..TRIES {
        let outcome = match reboot::start(&world, &plan).await {
            Ok(true) => "done",
            Ok(false) => "it runs already",
            Err(e) if e.trouble == Trouble::NoSuchDomain => return,
            Err(error) => {
                last = Some(error);
                tokio::time::sleep(APART).await;
                continue;
            }
        };
        tracing::warn!(%job, act, outcome, "a guest that the end of the host took down");
        if let Err(fault) = engine.intervened(job, act, outcome.to_owned()).await {
            tracing::warn!(%job, %fault, "that could not be written into its job's journal");
        }
        return;
    }
    if let Some(error) = last {
        tracing::error!(%job, %error, "a guest that the end of the host took down could not be started again");
    }
}
