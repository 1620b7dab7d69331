//! How a driver is told things, and asked.

use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};

use super::view::JobView;
use crate::event::{Body, Timer, Verdict};
use crate::fault::Fault;
use crate::ids::{Phase, StepName};
use crate::plan::Plan;
use crate::summary::JobSummary;
/// Something that happened.
pub(super) enum Message {
    Outcome { step: StepName, phase: Phase, attempt: u32, result: Result<Value, Fault> },
    Stalled { step: StepName, phase: Phase, attempt: u32 },
    Probed { step: StepName, phase: Phase, attempt: u32, verdict: Verdict },
    Fired(Timer),
    Planned(Box<Result<Plan, Fault>>),
    Facts { before: StepName, found: Result<Option<String>, Fault> },
    Act { body: Box<Body>, reply: oneshot::Sender<Result<(), Fault>> },
    View(oneshot::Sender<JobView>),
    Drain,
}

/// How others reach a driver.
#[derive(Clone)]
pub(super) struct Handle {
    pub(super) inbox: mpsc::UnboundedSender<Message>,
    pub(super) summary: watch::Receiver<JobSummary>,
}

impl Handle {
    /// Sends an order and waits for its answer; nothing when the driver has ended without one.
    pub(super) async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        ask(&self.inbox, order).await
    }
}

/// A message that is sent in the very instant in which an inbox closes can lie in it, unread, for as long as it has a
/// sender; and whoever waits for the answer holds one. So the end of the inbox is watched as well.
async fn ask<M, T>(
    inbox: &mpsc::UnboundedSender<M>,
    order: impl FnOnce(oneshot::Sender<T>) -> M,
) -> Option<T> {
    let (reply, mut answer) = oneshot::channel();
    inbox.send(order(reply)).ok()?;
    tokio::select! {
        biased;
        answer = &mut answer => answer.ok(),
        // What was answered, was answered before that.
        () = inbox.closed() => answer.try_recv().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn whoever_asks_a_driver_that_ends_at_that_moment_does_not_wait_for_ever() {
        let (sender, mut inbox) = mpsc::unbounded_channel::<oneshot::Sender<()>>();
        let asked = ask(&sender, |reply| reply);
        // Closed with the message in it, which nobody will read.
        let closed = async { inbox.close() };
        let both = async { tokio::join!(asked, closed).0 };
        assert_eq!(tokio::time::timeout(Duration::from_secs(60), both).await, Ok(None));
        assert_eq!(inbox.len(), 1);
    }

    #[tokio::test]
    async fn an_answer_that_was_given_before_the_end_counts() {
        let (sender, mut inbox) = mpsc::unbounded_channel::<oneshot::Sender<u8>>();
        let answers = async {
            let reply = inbox.recv().await.unwrap();
            reply.send(7).unwrap();
            drop(inbox);
        };
        assert_eq!(tokio::join!(ask(&sender, |reply| reply), answers).0, Some(7));
    }
}
