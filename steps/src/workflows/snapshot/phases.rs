//! The phases of a backup, and the places between them at which it can wait.
//!
//! People know three acts: *snapshot* (the guest is moved onto overlays), *retain* (what stands still is copied and
//! published) and *merge* (the overlays go back). They are one job here, because only one job can promise that each is
//! followed by the next; but each can be seen, and between them the job can wait for a word from outside: until a
//! database has been told, or the night has come. The copy comes before the merge, not after it as it once did: what a
//! merge writes into the base is no point in time any more.
//!
//! A wait never lasts for ever. It ends with the signal, with its limit, or as soon as the overlays leave too little
//! room ([`must_go_on`], asked by the daemon every second); what ended it is in the journal. A job that fails or is
//! cancelled does not wait: its merge comes at once.

use serde::{Deserialize, Serialize};
use serde_json::json;
use vmkeep_workflow::plan::AwaitSignal;
use vmkeep_workflow::{Fault, Millis, Plan, StepName, StepSpec};

use super::facts::Facts;
use crate::codes;
use crate::image::space::LowWater;
use crate::snapshot::{World, growth};

/// A phase of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The guest is moved onto overlays; with `--save`, it is saved, loaded again and resumed.
    Snapshot,
    /// What stands still is copied, and the backup published.
    Retain,
    /// The overlays are committed, and the guest goes home.
    Merge,
}

impl Phase {
    /// The word that plans and people use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Retain => "retain",
            Self::Merge => "merge",
        }
    }

    fn of(step: &StepName) -> Self {
        match step.as_str().split('/').next().unwrap_or_default() {
            "copy" | "memory" | "publish" | "clear" => Self::Retain,
            "commit" | "pivot" | "tidy" | "unmark" => Self::Merge,
            _ => Self::Snapshot,
        }
    }
}

/// Waits between phases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Waits {
    /// The phases before which the job waits; the name of each is the signal's.
    pub before: Vec<Phase>,
    /// Milliseconds after which it goes on by itself.
    pub limit_ms: u64,
}

/// Says of each step to which phase it belongs, and puts the waits in.
///
/// # Errors
/// When a wait is asked for before the first phase.
pub(super) fn arrange(steps: &mut Vec<StepSpec>, waits: Option<&Waits>) -> Result<(), Fault> {
    for step in steps.iter_mut() {
        step.stage = Some(Phase::of(&step.name).as_str().to_owned());
    }
    let Some(waits) = waits else { return Ok(()) };
    if waits.before.contains(&Phase::Snapshot) || waits.limit_ms == 0 {
        return Err(Fault::permanent(
            codes::USAGE,
            "plan the waits of the backup",
            "",
            "a job can wait before \"retain\" and before \"merge\", for longer than no time",
        ));
    }
    for phase in [Phase::Retain, Phase::Merge].into_iter().filter(|phase| waits.before.contains(phase)) {
        wait_before(steps, phase, waits.limit_ms);
    }
    Ok(())
}

fn wait_before(steps: &mut Vec<StepSpec>, phase: Phase, limit_ms: u64) {
    let earlier = |name: &StepName| Phase::of(name) < phase;
    let name = StepName::from(format!("wait/{}", phase.as_str()));
    let mut after: Vec<StepName> = Vec::new();
    for step in steps.iter_mut().filter(|step| Phase::of(&step.name) == phase) {
        let crossing: Vec<_> = step.after.iter().filter(|before| earlier(before)).cloned().collect();
        if crossing.is_empty() {
            continue;
        }
        step.after.push(name.clone());
        after.extend(crossing);
    }
    after.sort();
    after.dedup();
    let signal = AwaitSignal {
        name: phase.as_str().to_owned(),
        limit: Millis(limit_ms),
        default: json!("the time to wait is over"),
    };
    let wait = StepSpec::signal(name, format!("the word to {}", phase.as_str()), signal).after_all(after);
    let place = steps.iter().position(|step| Phase::of(&step.name) == phase).unwrap_or(steps.len());
    steps.insert(place, wait);
}

/// Why a job of this plan must not wait any longer: its guest's overlays leave too little room. Nothing as long as
/// there is enough, or when it could not be found out just now.
pub async fn must_go_on(world: &World, plan: &Plan, low: LowWater) -> Option<String> {
    let facts = Facts::deserialize(&plan.facts).ok()?;
    match growth::outgrown(world, &facts.domain.id, &facts.disks, low).await {
        Ok(why) => why,
        Err(error) => {
            tracing::debug!(%error, "could not look at the overlays of a job that waits");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use vmkeep_workflow::StepKind;

    use super::*;

    fn plan() -> Vec<StepSpec> {
        let step = |name: &'static str| StepSpec::new(name, StepKind::new("kind", 1), name, Value::Null);
        vec![
            step("mark"),
            step("take").after("mark"),
            step("thaw").after("take").closes("take"),
            step("copy/vda").after("take"),
            step("publish").after("copy/vda").after("thaw"),
            step("commit/vda").after("publish").closes("take"),
            step("pivot").after("commit/vda").closes("take"),
        ]
    }

    fn after<'a>(steps: &'a [StepSpec], name: &str) -> Vec<&'a str> {
        let step = steps.iter().find(|step| step.name.as_str() == name).unwrap();
        step.after.iter().map(|before| before.as_str()).collect()
    }

    #[test]
    fn every_step_belongs_to_a_phase_and_a_plan_without_waits_is_as_it_was() {
        let mut steps = plan();
        arrange(&mut steps, None).unwrap();
        let stages: Vec<_> = steps.iter().filter_map(|step| step.stage.as_deref()).collect();
        assert_eq!(stages, ["snapshot", "snapshot", "snapshot", "retain", "retain", "merge", "merge"]);
        for (with, without) in steps.iter().zip(plan()) {
            assert_eq!(with.after, without.after);
        }
    }

    #[test]
    fn nothing_of_a_phase_begins_before_the_wait_for_it_is_over() {
        let mut steps = plan();
        let waits = Waits { before: vec![Phase::Merge, Phase::Retain], limit_ms: 5000 };
        arrange(&mut steps, Some(&waits)).unwrap();
        assert_eq!(after(&steps, "wait/retain"), ["take", "thaw"]);
        assert!(after(&steps, "copy/vda").contains(&"wait/retain"));
        assert_eq!(after(&steps, "wait/merge"), ["publish"]);
        assert!(after(&steps, "commit/vda").contains(&"wait/merge"));
        assert_eq!(after(&steps, "pivot"), ["commit/vda"]);
        let wait = steps.iter().find(|step| step.name.as_str() == "wait/merge").unwrap();
        let signal = wait.signal.as_ref().unwrap();
        assert_eq!((signal.name.as_str(), signal.limit), ("merge", Millis(5000)));
        Plan::new("w", 1, "t", steps, Some("publish".into()), Value::Null).expect("a plan that can be run");
    }

    #[test]
    fn waits_that_make_no_sense_are_refused() {
        for waits in [
            Waits { before: vec![Phase::Snapshot], limit_ms: 5 },
            Waits { before: vec![Phase::Merge], limit_ms: 0 },
        ] {
            assert_eq!(arrange(&mut plan(), Some(&waits)).unwrap_err().code, codes::USAGE);
        }
    }
}
