//! The steps against a small world of their own.

mod act;
mod broken;
mod copies;
pub(crate) mod fake;
mod rescue;
mod rest;
mod way_back;

use std::sync::Arc;

use serde_json::Value;
use tokio_util::sync::CancellationToken;
use vmkeep_workflow::ids::Phase;
use vmkeep_workflow::progress::Progress;
use vmkeep_workflow::{Actor, IfBusy, JobId, JobRequest, Outputs, StepContext, Subject};

pub(crate) fn context(attempt: u32) -> StepContext {
    let request = JobRequest {
        workflow: "snapshot".into(),
        subject: Subject { id: fake::domain().id.to_string(), label: "web".to_owned() },
        options: Value::Null,
        key: None,
        by: Actor { who: "test".to_owned(), why: None },
        if_busy: IfBusy::Refuse,
        limits: Vec::new(),
        retry_of: None,
    };
    StepContext {
        job: JobId::from(uuid::Uuid::from_u128(0x0123_4567_89ab)),
        step: "step".into(),
        phase: Phase::Forward,
        attempt,
        resume: None,
        request: Arc::new(request),
        facts: Arc::new(Value::Null),
        outputs: Outputs::default(),
        stop: CancellationToken::new(),
        started_in: Arc::default(),
        still_running: false,
        progress: Progress::detached(),
        left: None,
    }
}
