//! vmkeepd and vmkeep as they are used, on a real libvirt, QEMU and guest: one program, so that the tests share the
//! machine's processors to the end. Each file holds one concern.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

mod busy;
mod catalogue;
mod checkpoints;
mod cut_off;
mod deletion;
mod devices;
mod disks;
mod domains;
mod faults;
mod histories;
mod holds;
mod host_ends;
mod in_place;
mod in_place_killed;
mod intruders;
mod jobs;
mod killed;
mod kinds;
mod leftovers;
mod libvirtd_killed;
mod live;
mod lost_journal;
mod manifest;
mod memory;
mod names;
mod restores;
mod rights;
mod room;
mod save;
mod save_lost;
mod sealed;
mod store;
mod suspended;
mod system;
mod targets;
mod unknown;
mod unresponsive;
mod vault;
mod vault_attacks;
mod vault_known;
mod vault_offline;
mod vault_random;
mod vault_restore;
mod waits;
mod watchdog;
mod weaknesses;
