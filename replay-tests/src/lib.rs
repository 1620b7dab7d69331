//! End-to-end, crash and replay tests of vmkeep, and the test bed that they run on.
//!
//! The library holds the test bed, the simulated power cuts and the faults of file operations; the tests are integration tests beside it. It depends on none of
//! vmkeep's crates: it is the witness, and a witness that shares code with the accused proves little.

pub mod faults;
pub mod powercut;
pub mod testbed;
