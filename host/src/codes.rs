//! The stable codes that the daemon and the command line report: the registry's, under one roof.

pub use vmkeep_steps::codes::*;
use vmkeep_workflow::Fault;

/// What helps: in the fault's own words, or else in those of its code. No error is shown without.
#[must_use]
pub fn remedy(fault: &Fault) -> String {
    if fault.remedy.is_empty() {
        return entry(fault.code).map(|entry| entry.remedy.to_owned()).unwrap_or_default();
    }
    fault.remedy.clone()
}
