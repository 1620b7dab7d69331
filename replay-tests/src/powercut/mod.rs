//! Power cuts: a program is recorded while it writes, and what its disk may hold after the power has gone at any
//! instant is built from the recording.
//!
//! Neither kill -9 nor the end of all processes shows what a power cut does: the kernel still holds what was written
//! and not synced. Here nothing is durable but what the program has synced. Of the rest, each write may be there, be
//! missing, or be torn at a sector; each change of a directory may be there as long as those before it are.
//!
//! | module | what it holds |
//! |---|---|
//! | [`trace`] | the recording: strace runs the program, its system calls are read |
//! | [`disk`] | what they do to files and folders, and the images that a cut may leave |
//!
//! Like the rest of the test bed it shares no code with what it judges.

#![allow(clippy::expect_used, clippy::panic, reason = "what this model does not know must end the test")]

pub mod disk;
pub mod trace;
