//! A job live, as server-sent events.
//!
//! The journal's own broadcast says when something happened; progress is no event and is looked at twice a second
//! while anything runs. What did not change is not sent again. A reader that is too slow for the broadcast loses
//! nothing, since every message carries the whole job.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::{Path, State as Extract};
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use tokio::sync::broadcast::error::RecvError;
use vmkeep_workflow::{JobId, JobStatus, StreamId};

use super::{App, State};
use crate::api::answer::Failure;
use crate::api::types::{DaemonPhase, JobDetail, Live};

const LOOK: Duration = Duration::from_millis(500);

pub(super) async fn watch(
    Extract(app): State,
    Path(job): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    let job = app.find_job(&job).await?;
    // Subscribed before the first look, so that nothing falls between the two.
    let records = app.store.subscribe();
    let phase = app.phase.clone();
    // Looked up once: the short form is made from the ids of all jobs there are.
    let short = app.row(job).await?.short;
    let state = Watching { app, job, short, records, phase, last: None, over: false };
    let stream = futures_util::stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok(event), state))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))))
}

struct Watching {
    app: std::sync::Arc<App>,
    job: JobId,
    short: String,
    records: tokio::sync::broadcast::Receiver<vmkeep_workflow::journal::Record>,
    phase: tokio::sync::watch::Receiver<DaemonPhase>,
    last: Option<String>,
    over: bool,
}

impl Watching {
    async fn next(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        let stream = StreamId::job(self.job);
        loop {
            let view = self.app.engine.view(self.job).await.ok()?;
            let detail = super::detail_of(view, self.short.clone());
            let over = over(&detail);
            let live = if over { Live::End(Box::new(detail)) } else { Live::Job(Box::new(detail)) };
            let text = serde_json::to_string(&live).ok()?;
            if self.last.as_ref() != Some(&text) {
                self.over = over;
                self.last = Some(text.clone());
                return Some(Event::default().data(text));
            }
            tokio::select! {
                // A daemon that stops closes its streams, so that it need not wait for whoever watches.
                _ = self.phase.wait_for(|phase| *phase == DaemonPhase::Stopping) => return None,
                () = tokio::time::sleep(LOOK) => {}
                () = async {
                    loop {
                        match self.records.recv().await {
                            Ok(record) if record.stream != stream => {}
                            Ok(_) | Err(RecvError::Lagged(_)) => return,
                            Err(RecvError::Closed) => std::future::pending().await,
                        }
                    }
                } => {}
            }
        }
    }
}

fn over(detail: &JobDetail) -> bool {
    detail.job.status.ended() || detail.job.status == JobStatus::NeedsAttention || detail.parked.is_some()
}
