//! Waiting for libvirt at the beginning of a job.
//!
//! libvirtd is restarted now and then (an update, a crash that systemd mends), and is away for a second. What is asked for
//! in that second must not be refused: nobody would be told of a nightly backup that was not made. So whoever looks at a
//! domain before anything is touched, when the request comes in and when the plan is made, looks again as soon as libvirt
//! is back. Not for long: a libvirt that stays away is told, with its code. Once a job runs its steps have patience of their
//! own.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;
use vmkeep_workflow::{Fault, Outputs, Plan, PlanContext, StepName, Workflow, WorkflowName};

use crate::codes;
use crate::hypervisor::Libvirt;

/// How long libvirt may be away.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between a look that found it gone and the next one, if the connection is not known to be broken.
const AGAIN: Duration = Duration::from_millis(200);

/// Looks, and looks again when libvirt is back.
pub(super) async fn patiently<T, F>(libvirt: &Libvirt, look: impl Fn() -> F) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let until = Instant::now() + PATIENCE;
    loop {
        let fault = match look().await {
            Err(fault) if fault.code == codes::HYPERVISOR_UNREACHABLE && Instant::now() < until => fault,
            answer => return answer,
        };
        tracing::info!(%fault, "libvirt is waited for");
        tokio::time::sleep(AGAIN).await;
        // Whether it is there for good the next look tells.
        let _ = libvirt.client().connected(until.saturating_duration_since(Instant::now())).await;
    }
}

/// A recipe that is patient while it plans.
struct Patient(Arc<dyn Workflow>, Libvirt);

/// The same recipe, patient while it plans.
pub(super) fn patient(workflow: Arc<dyn Workflow>, libvirt: &Libvirt) -> Arc<dyn Workflow> {
    Arc::new(Patient(workflow, libvirt.clone()))
}

#[async_trait]
impl Workflow for Patient {
    fn name(&self) -> WorkflowName {
        self.0.name()
    }

    fn exclusive(&self) -> bool {
        self.0.exclusive()
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        patiently(&self.1, || self.0.plan(cx)).await
    }

    async fn check_facts(
        &self,
        plan: &Plan,
        before: &StepName,
        outputs: &Outputs,
    ) -> Result<Option<String>, Fault> {
        self.0.check_facts(plan, before, outputs).await
    }
}
