//! The decision rules.
/// Version of the decision rules.
pub const VERSION: u32 = 1;
