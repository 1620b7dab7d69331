//! The daemon.

pub mod logs;
pub mod notify;
