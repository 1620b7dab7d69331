//! A client of the network block device protocol (NBD), which is how QEMU shows the disks of a guest as they were.
//!
//! It reads, and asks what is dirty, allocated or zero; it never writes. What it needs of a server is the fixed newstyle
//! handshake; structured replies and meta contexts where there are any. It was written against the protocol's document
//! (`doc/proto.md` of the NBD project) and is tested against QEMU, `qemu-nbd` and `nbdkit`.
//!
//! # Many requests, several connections
//!
//! A connection has one task that sends requests and takes in replies, which may come in any order; each request has a
//! cookie of its own. A caller who gives up (a future that is dropped, a deadline that is over) leaves nothing half sent
//! and nothing half read: the reply is taken in when it comes, and thrown away. A connection that ends, or whose server says
//! something that it must not say, fails every request that is on it with the same [`NbdError`], and is never used again.
//!
//! # Time
//!
//! The client has no limits of its own: a server on a slow or stalled medium is no error. Callers hand over a deadline
//! with each call, or watch [`Client::received`].
//!
//! # A server that lies
//!
//! Everything that comes is checked before it is believed, and before anything is allocated for it: magic numbers, cookies,
//! places of chunks, which must lie in the request, must not overlap and must cover it; lengths of extents; contexts that
//! nobody asked for. A lie is an error of the whole connection ([`NbdError::Protocol`]). What a server can do is say that
//! bytes are there which are not: the same it can do to its guest.
//!
//! # Who may read what
//!
//! A Unix socket is guarded by its folder. Over TCP there is TLS, always: an address without it cannot be made.

mod address;
mod assemble;
mod client;
mod connection;
mod error;
mod handshake;
mod proto;
mod receive;
mod status;
mod tls;

pub use address::{Address, Endpoint};
pub use client::{Client, Options, Peer};
pub use error::NbdError;
pub use handshake::Export;
pub use status::{Extents, HOLE, ZERO};
pub use tls::Tls;

/// The context that tells holes and zeroes ([`HOLE`], [`ZERO`]).
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The context that tells in which file of a chain something lies: 0 in none, 1 in the top one.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// The most bytes of one call of [`Client::read`].
pub const MOST_AT_ONCE: u64 = 32 << 20;

/// The context of a dirty bitmap of QEMU's: 1 is dirty.
#[must_use]
pub fn dirty_bitmap(name: &str) -> String {
    format!("qemu:dirty-bitmap:{name}")
}
