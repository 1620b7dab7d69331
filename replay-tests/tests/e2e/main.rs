//! vmkeepd and vmkeep as they are used, on a real libvirt, QEMU and guest: one program, so that the tests share the
//! machine's processors to the end. Each file holds one concern.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

mod busy;
mod checkpoints;
mod cut_off;
mod disks;
mod domains;
mod holds;
mod in_place;
mod jobs;
mod killed;
mod libvirtd_killed;
mod live;
mod manifest;
mod memory;
mod names;
mod restores;
mod room;
mod store;
mod system;
mod targets;
mod unknown;
mod unresponsive;
