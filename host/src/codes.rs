//! The stable codes that the daemon and the command line report: the registry's, under one roof.

pub use vmkeep_steps::codes::*;
