//! Attempts and probes: a step's code in a task of its own, so that neither a panic nor a call that never returns
//! takes the job's driver with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::event::Verdict;
use crate::fault::{Code, Fault};
use crate::ids::{Phase, StepName};
use crate::plan::StepSpec;
use crate::step::{AnyStep, StepContext};

use super::Shared;
use super::inbox::Message;

/// An attempt that this process has started.
pub(super) struct Live {
    /// Its number.
    pub(super) attempt: u32,
    /// Raised to ask it to give way.
    pub(super) stop: CancellationToken,
    /// Whether its code has returned.
    pub(super) returned: bool,
    /// How far it is.
    pub(super) progress: crate::progress::Progress,
}

/// Counts an attempt as long as its code runs.
pub(super) struct Running(Arc<AtomicUsize>);

impl Running {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Starts an attempt. Its outcome, and a stall if there is one, arrive as messages.
pub(super) fn launch(
    shared: &Arc<Shared>,
    spec: &StepSpec,
    cx: StepContext,
    output: Option<Arc<Value>>,
    running: Running,
    inbox: mpsc::UnboundedSender<Message>,
) {
    let (step, phase, attempt) = (cx.step.clone(), cx.phase, cx.attempt);
    let span = tracing::info_span!("attempt", job = %cx.job, step = %step, attempt, ?phase);
    let Some(kind) = shared.registry.find_step(&spec.kind) else {
        let fault = Fault::permanent(
            Code::UNKNOWN_STEP_KIND,
            format!("carry out the step \"{}\"", spec.title),
            spec.name.to_string(),
            format!("this release does not know the step kind {}", spec.kind),
        )
        .class(crate::fault::Class::Fatal)
        .remedy("Run the release that made the plan, then settle the job");
        let _ = inbox.send(Message::Outcome { step, phase, attempt, result: Err(fault) });
        return;
    };
    let (input, title, stall) = (spec.input.clone(), spec.title.clone(), spec.stall);
    let progress = cx.progress.clone();
    let name = step.clone();
    let code = tokio::spawn(
        async move {
            let _running = running;
            tracing::info!("begins");
            cx.progress.settle().await?;
            match phase {
                Phase::Forward => kind.run(&cx, &input).await,
                Phase::Undo if crate::mutation::on("undo-skipped") => Ok(Value::Null),
                Phase::Undo => kind.undo(&cx, &input, output.as_deref()).await.map(|()| Value::Null),
            }
        }
        .instrument(span.clone()),
    );
    let clock = shared.clock.clone();
    tokio::spawn(
        async move {
            let mut code = code;
            let mut told = false;
            let joined = loop {
                let Some(stall) = stall.filter(|_| !told).map(|s| Duration::from_millis(s.0)) else {
                    break (&mut code).await;
                };
                let wait = stall.saturating_sub(progress.idle()).max(Duration::from_millis(50));
                tokio::select! {
                    joined = &mut code => break joined,
                    () = clock.sleep(wait) => {
                        if progress.idle() >= stall {
                            told = true;
                            let _ = inbox.send(Message::Stalled { step: name.clone(), phase, attempt });
                        }
                    }
                }
            };
            let result = joined.unwrap_or_else(|panic| Err(panicked(&title, &name, &panic)));
            match &result {
                Ok(_) => tracing::info!("succeeded"),
                Err(fault) => tracing::warn!(code = fault.code.0, class = ?fault.class, "{fault}"),
            }
            let _ = inbox.send(Message::Outcome { step, phase, attempt, result });
        }
        .instrument(span),
    );
}

/// Asks the world about an attempt, after a wait.
pub(super) fn probe(
    shared: &Arc<Shared>,
    spec: &StepSpec,
    cx: StepContext,
    output: Option<Arc<Value>>,
    wait: Duration,
    inbox: mpsc::UnboundedSender<Message>,
) -> tokio::task::AbortHandle {
    let (step, phase, attempt) = (cx.step.clone(), cx.phase, cx.attempt);
    let span = tracing::info_span!("probe", job = %cx.job, step = %step, attempt, ?phase);
    let kind: Option<Arc<dyn AnyStep>> = shared.registry.find_step(&spec.kind);
    let (input, wanted) = (spec.input.clone(), spec.kind.clone());
    let clock = shared.clock.clone();
    let task = tokio::spawn(
        async move {
            if !wait.is_zero() {
                clock.sleep(wait).await;
            }
            let Some(kind) = kind else {
                return Verdict::Diverged(format!("this release does not know the step kind {wanted}"));
            };
            match phase {
                Phase::Forward => kind.probe(&cx, &input).await,
                Phase::Undo => kind.probe_undo(&cx, &input, output.as_deref()).await,
            }
        }
        .instrument(span.clone()),
    );
    let handle = task.abort_handle();
    tokio::spawn(
        async move {
            let verdict = match task.await {
                Ok(verdict) => verdict,
                Err(gone) if gone.is_cancelled() => return,
                Err(panic) => Verdict::Unknown(format!("the probe itself failed: {panic}")),
            };
            tracing::info!(?verdict, "probed");
            let _ = inbox.send(Message::Probed { step, phase, attempt, verdict });
        }
        .instrument(span),
    );
    handle
}

fn panicked(title: &str, step: &StepName, panic: &tokio::task::JoinError) -> Fault {
    Fault::permanent(Code::UNDEFINED, format!("carry out the step \"{title}\""), step.to_string(), panic)
        .in_doubt()
        .remedy("This is a fault in vmkeep itself. Please report it with the job's exported history")
}
