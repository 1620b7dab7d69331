//! Every workflow of the product, on a hypervisor that exists only here: killed at every boundary, failing at every call,
//! beside operators who do what they like. A run is decided by its scenario and by what is done at which place, so that
//! each can be repeated exactly; see README.md.

#![allow(unreachable_pub, missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::needless_pass_by_value)]

mod director;
mod families;
mod judge;
mod long;
mod outside;
mod player;
mod run;
mod scenario;
mod vault;
