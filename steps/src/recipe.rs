//! What all recipes write and read their plans with.

use serde::de::DeserializeOwned;
use vmkeep_workflow::plan::{Probing, Retry, Undo};
use vmkeep_workflow::{Class, Code, Fault, Millis, Plan, Step, StepName, StepSpec};

/// What has to be brought back is tried for as long as it takes to restart a libvirtd, or to make room: more than an hour.
pub(crate) const PATIENTLY: Retry = Retry { attempts: 200, first: Millis(500), most: Millis::secs(30) };

/// Saving and loading a large memory takes its time, and so does a large merge; the effect is looked for as long.
pub(crate) const PATIENT_LOOK: Probing =
    Probing { limit: Millis::secs(3600), first: Millis(250), most: Millis::secs(15) };

/// An undo that is tried as long.
pub(crate) const fn patient() -> Undo {
    Undo { retry: PATIENTLY, deadline: None }
}

/// A step with its typed input.
pub(crate) fn step<S: Step>(
    name: impl Into<StepName>,
    title: impl Into<String>,
    input: &S::Input,
) -> Result<StepSpec, Fault> {
    let input = serde_json::to_value(input)
        .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the job", S::KIND.to_string(), e))?;
    Ok(StepSpec::new(name, S::KIND, title, input))
}

/// The facts on which a plan was built.
pub(crate) fn facts<F: DeserializeOwned>(plan: &Plan) -> Result<F, Fault> {
    F::deserialize(&plan.facts).map_err(|e| {
        Fault::permanent(Code::UNKNOWN_STEP_KIND, "read the plan's facts", plan.title.clone(), e)
            .class(Class::Fatal)
    })
}
