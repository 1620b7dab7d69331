//! A job's history in plain words: what happened, why, and what was undone.
//!
//! One line per thing that a person would tell another. What only the engine cares about (a start that succeeded at
//! once, a probe that found what was expected) is left out; what surprises is not.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::event::{Actor, Body, Cause, Event, Settle, Timer, Verdict};
use crate::ids::{Phase, Seq, StepName};
use crate::state::State;

/// One line of the tale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// The event that it tells of.
    pub seq: Seq,
    /// When.
    pub at: Timestamp,
    /// What happened.
    pub text: String,
}

/// Tells a history.
#[must_use]
pub fn explain(history: &[(Seq, Event)]) -> Vec<Line> {
    let mut teller = Teller { state: Some(State::new()), ..Teller::default() };
    let mut lines = Vec::new();
    for (seq, event) in history {
        let waited = teller.pause_waits_for();
        teller.state = teller.state.take().and_then(|mut state| state.apply(event).is_ok().then_some(state));
        if let Some(mut text) = teller.tell(event) {
            if waited.is_some() && teller.paused().is_some() && teller.pause_waits_for().is_none() {
                text.push_str("; now the pause takes effect");
            }
            lines.push(Line { seq: *seq, at: event.at, text });
        }
    }
    lines
}

#[derive(Default)]
struct Teller {
    /// Where the job stands; a history that this release cannot fold is told without.
    state: Option<State>,
    titles: HashMap<StepName, String>,
    since: HashMap<(StepName, Phase), Timestamp>,
    planned: bool,
}

impl Teller {
    /// The state of a job that is to pause. One that rolls back does not pause any more.
    fn paused(&self) -> Option<&State> {
        self.state.as_ref().filter(|state| state.paused().is_some() && state.cause().is_none())
    }

    /// The last thing that keeps a pause from taking effect.
    fn pause_waits_for(&self) -> Option<String> {
        let state = self.paused()?;
        state.until_safe().last().map(|step| step.title.clone())
    }

    fn title(&self, step: &StepName) -> String {
        self.titles.get(step).cloned().unwrap_or_else(|| step.to_string())
    }

    fn act(&self, step: &StepName, phase: Phase) -> String {
        match phase {
            Phase::Forward => format!("\"{}\"", self.title(step)),
            Phase::Undo => format!("taking back \"{}\"", self.title(step)),
        }
    }

    fn tell(&mut self, event: &Event) -> Option<String> {
        Some(match &event.body {
            Body::JobRequested(request) => {
                format!(
                    "{} asked for {} of {}{}",
                    request.by.who,
                    request.workflow,
                    request.subject.label,
                    why(&request.by)
                )
            }
            Body::JobPlanned(plan) => {
                self.titles = plan.steps.iter().map(|step| (step.name.clone(), step.title.clone())).collect();
                let again =
                    if std::mem::replace(&mut self.planned, true) { "Planned anew" } else { "Planned" };
                format!("{again}: {} in {} steps", plan.title, plan.steps.len())
            }
            Body::JobRefused(fault) => format!("Refused, nothing was touched: {fault}"),
            Body::FactsChecked { difference: None, .. } => return None,
            Body::FactsChecked { before, difference: Some(difference) } => {
                format!(
                    "Before {} the world was found changed: {difference}",
                    self.act(before, Phase::Forward)
                )
            }
            Body::StepStarted { step, phase, attempt, resume } => {
                self.since.insert((step.clone(), *phase), event.at);
                match (attempt, resume) {
                    (1, _) => return None,
                    (_, Some(_)) => format!(
                        "Went on with {} from where it stood (attempt {attempt})",
                        self.act(step, *phase)
                    ),
                    (_, None) => format!("Began {} again (attempt {attempt})", self.act(step, *phase)),
                }
            }
            Body::StepSucceeded { step, phase, .. } => {
                format!("Done: {}{}", self.act(step, *phase), self.took(step, *phase, event.at))
            }
            Body::StepFailed { step, phase, fault, .. } => {
                format!("Failed: {}{}: {fault}", self.act(step, *phase), self.took(step, *phase, event.at))
            }
            Body::StepStalled { step, phase, .. } => {
                format!("No progress any more: {}", self.act(step, *phase))
            }
            Body::StepProbed { step, phase, verdict, .. } => self.verdict(step, *phase, verdict)?,
            Body::RetryScheduled { step, phase, attempt, at } => {
                let wait = words(at.duration_since(event.at));
                format!("Will try {} again in {wait} (attempt {attempt})", self.act(step, *phase))
            }
            Body::SignalAwaited { step, until } => {
                format!("Waits for {} until {until}", self.act(step, Phase::Forward))
            }
            Body::SignalReceived { name, value, by } => {
                format!("{} sent the signal {name}: {value}{}", by.who, why(by))
            }
            Body::TimerFired(Timer::Retry { .. }) => return None,
            Body::TimerFired(Timer::Deadline { step, phase, .. }) => {
                format!("Past its deadline: {}; the world is asked how far it came", self.act(step, *phase))
            }
            Body::TimerFired(Timer::Signal { step }) => {
                format!("Nobody answered in time: {}; its default was taken", self.act(step, Phase::Forward))
            }
            Body::TimerFired(Timer::Pause) => "The pause ended by itself".to_owned(),
            Body::JobRecovered => "vmkeepd had ended in the middle; a new one took the job over".to_owned(),
            Body::CancelRequested(by) => format!("{} asked to cancel{}", by.who, why(by)),
            Body::PauseRequested { by, until } => {
                let asked = format!("{} asked to pause until {until}{}", by.who, why(by));
                match self.pause_waits_for() {
                    Some(last) => format!(
                        "{asked}; it takes effect after \"{last}\", because what the job has begun must not be left \
                         standing until then"
                    ),
                    None => asked,
                }
            }
            Body::ResumeRequested(by) => format!("{} ended the pause{}", by.who, why(by)),
            Body::SettleRequested { by, how } => {
                let how = match how {
                    Settle::Probe => "look again and go on",
                    Settle::Retry => "look again and run the failed steps anew",
                    Settle::Undo => "look again and roll back",
                };
                format!("{} settled the job: {how}{}", by.who, why(by))
            }
            Body::JobAbandoned { by, left } => {
                let left = if left.is_empty() { "nothing".to_owned() } else { left.join("; ") };
                format!("{} gave the job up{}; left behind: {left}", by.who, why(by))
            }
            Body::Intervened { act, outcome } => format!("To keep the guest safe: {act} ({outcome})"),
            Body::UnwindBegan(cause) => format!("Rolls back, because {}", self.cause(cause)),
            Body::JobNeedsAttention(items) => {
                let items: Vec<String> = items
                    .iter()
                    .map(|item| format!("{}: {}", self.act(&item.step, item.phase), item.fault))
                    .collect();
                format!("Needs attention: {}", items.join("; "))
            }
            Body::JobSucceeded => "Succeeded".to_owned(),
            Body::JobRolledBack(cause) => {
                format!("Rolled back: everything that was done is undone, because {}", self.cause(cause))
            }
        })
    }

    fn verdict(&self, step: &StepName, phase: Phase, verdict: &Verdict) -> Option<String> {
        let act = self.act(step, phase);
        Some(match verdict {
            Verdict::Done(_) => format!("Looked at the world: {act} had taken effect"),
            Verdict::NotDone => format!("Looked at the world: {act} had not taken effect"),
            Verdict::Partial(_) => format!("Looked at the world: {act} had come part of the way"),
            Verdict::InFlight(what) => format!("Looked at the world: {act} is still going on ({what})"),
            Verdict::Diverged(what) => {
                format!("Looked at the world: {act} found neither the state before nor after it ({what})")
            }
            Verdict::Unknown(why) => format!("Could not learn whether {act} had taken effect ({why})"),
        })
    }

    fn cause(&self, cause: &Cause) -> String {
        match cause {
            Cause::Failure { step, fault } => {
                format!("{} failed ({})", self.act(step, Phase::Forward), fault.cause)
            }
            Cause::Cancel(by) => format!("{} cancelled it{}", by.who, why(by)),
            Cause::Settled(by) => format!("{} settled it so{}", by.who, why(by)),
        }
    }

    fn took(&self, step: &StepName, phase: Phase, at: Timestamp) -> String {
        let since = self.since.get(&(step.clone(), phase));
        since.map_or_else(String::new, |since| format!(" after {}", words(at.duration_since(*since))))
    }
}

fn why(by: &Actor) -> String {
    by.why.as_ref().map_or_else(String::new, |why| format!(" ({why})"))
}

/// A span of time as people say it: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 4 min`.
#[must_use]
pub fn words(span: SignedDuration) -> String {
    let millis = span.as_millis().max(0);
    let (secs, mins, hours) = (millis / 1000, millis / 60_000, millis / 3_600_000);
    match (hours, mins, secs) {
        (0, 0, 0..10) => format!("{}.{} s", secs, millis % 1000 / 100),
        (0, 0, _) => format!("{secs} s"),
        (0, _, _) => format!("{mins} min {} s", secs % 60),
        _ => format!("{hours} h {} min", mins % 60),
    }
}
