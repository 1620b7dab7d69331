//! The graphs of the workflows, in DOT, drawn from the plans that the code itself builds.
//!
//! A picture that somebody drew by hand is wrong a month later. These are made from representative plans (a guest with
//! two disks on a common base, with and without memory) by the very planners that plan real jobs, against a hypervisor
//! that only exists on paper (`sketch`). What differs from run to run (ids, times, places) is replaced by words, so
//! that a stored picture differs from a fresh one only when the code does.

mod dot;
mod paper_guest;
mod paper_vault;
mod sketch;

use vmkeep_workflow::Fault;

/// All workflows by name, each as DOT.
///
/// # Errors
/// When a representative plan cannot be built.
pub async fn all() -> Result<Vec<(String, String)>, Fault> {
    let scene = sketch::Scene::new()?;
    let mut drawn = Vec::new();
    for (name, plan) in Box::pin(scene.plans()).await? {
        drawn.push((name.to_owned(), scene.anonymous(&dot::draw(name, &plan))));
    }
    Ok(drawn)
}
