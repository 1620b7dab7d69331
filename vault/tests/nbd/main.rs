//! The NBD client and the sources on top of it, against servers: one in here that lies, QEMU, `qemu-nbd` and `nbdkit`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod image;
mod lies;
mod nbdkit;
mod qemu;
mod support;
mod tls;
