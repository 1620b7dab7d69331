//! The workflows: recipes that build plans from what is observed.

pub mod snapshot;
