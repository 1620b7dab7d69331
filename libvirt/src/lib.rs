//! libvirt for vmkeep: every call it needs, safe and typed, and nothing that panics.
//!
//! # What is where
//! | module | what |
//! |---|---|
//! | [`conn`], [`domain`], [`save`], [`block`], [`job`], [`snapshot`], [`checkpoint`], [`guest`], [`monitor`] | the blocking calls |
//! | [`error`] | typed errors, and what may be concluded from each |
//! | [`uri`], [`instance`] | which daemon executes the calls |
//! | [`client`], [`event`], [`inflight`] | the async face: reconnecting, events, calls that have not come back |
//! | [`qemu`] | QEMU's own answer: images, block jobs, its process and the files it holds |
//! | [`saveimage`] | the file of a saved guest, read and copied with another definition |
//! | [`leave()`] | ending a process in which libvirt's threads still run |
//! | [`few_arenas()`] | less memory that was freed and stays resident |
//! | [`xml`] | definitions read and edited, snapshot/checkpoint/backup descriptions built |
//!
//! # The binding
//! The crate `virt` is used for what it does soundly: opening connections, host and node queries,
//! looking up, listing and defining domains, their simple getters and life cycle, and its names of
//! error numbers. It is kept at arm's length in four places. Its handles' drops panic on error, so they
//! sit in `ManuallyDrop` and are released here. It never closes connections, so they are closed here.
//! It panics on a NUL byte inside a string, so strings are checked before they reach it. Its error type
//! forgets numbers it does not know and `errno`, so errors are read from libvirt again, on the same
//! thread, right after a failure. Everything else (backup, checkpoints, saving, block jobs, freezing,
//! events) it does not wrap, or wraps unsoundly (its event helpers free memory twice on their error
//! path); those calls go straight to `virt-sys`. Each `unsafe` block says why it is sound.
//!
//! libvirt's objects are reference counted and may be used from several threads at once; the last
//! error is kept per thread, which is why it is always read where the call was made.

mod arenas;
pub mod block;
pub mod checkpoint;
pub mod client;
pub mod conn;
pub mod control;
pub mod domain;
pub mod error;
pub mod event;
mod eventloop;
mod ffi;
pub mod flags;
pub mod guest;
pub mod inflight;
pub mod instance;
pub mod job;
mod leave;
mod lines;
pub mod monitor;
pub mod qemu;
pub mod save;
pub mod saveimage;
pub mod snapshot;
pub mod uri;
pub mod xml;

pub use arenas::few_arenas;
pub use client::{Client, ClientOptions, DomainHandle, Status};
pub use conn::{ConnectOptions, Connection, NodeInfo, Version};
pub use control::Control;
pub use domain::{Domain, DomainInfo, DomainState, PausedReason, StateReason};
pub use error::{Class, Error, ErrorCode, Result};
pub use event::Event;
pub use ffi::{ParamValue, Params};
pub use inflight::{InFlight, InFlightCall};
pub use instance::{DaemonInstance, ProcessId};
pub use leave::leave;
pub use uri::LocalUri;
