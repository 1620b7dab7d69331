//! Backups into a vault, against what else there is for a libvirt host: `virtnbdbackup` (which makes backups of the same
//! kind, in Python over libnbd), and the plain copies `nbdcopy` and `qemu-img convert`. All of Debian's packages.
//!
//! A guest has 2 GiB of data in a disk of 8 GiB, in qcow2, and runs. Peers get a guest of their own with the same content:
//! `virtnbdbackup` refuses a domain that has checkpoints of others. Ours is timed as a user waits for it, from the command
//! `vmkeep` to its return, with plan, journal, point in time, manifest and check; a command of theirs alone, and what it
//! leaves is synced within that time, files and folders. What was written before is flushed before anybody is timed. Images
//! and backups are in the page cache for all.
//!
//! - `nbdcopy --flush` to a new file, from an export that libvirt's backup job shows and that is begun and ended around it,
//!   with its defaults (four connections, 64 requests, as many threads as processors).
//! - `virtnbdbackup -l full`, `-l inc`, its own format (`stream`), which leaves holes out, one worker for each disk, no progress
//!   bar; with `-z`, its only compression, lz4, where that is said. It also saves the kernel and the initial RAM disk of a guest
//!   that is started with them; those are neither synced nor counted.
//! - `qemu-img convert` from a qcow2 image to a raw one, with its defaults.
//!
//! The vault has no encryption, as theirs have none, but where that is said. Random data go to a new vault each time: what is
//! the same is not stored twice. *CPU* is the time of vmkeepd, or of the peer's processes; what QEMU spends on showing the
//! disk comes on top, for all.
//!
//! Environment: `VMKEEP_BENCH_MIB`, the data in MiB instead of 2048 (the disk is four times as large), to try the benchmark
//! itself. Figures of other sizes mean nothing.

pub mod corpus;
pub mod full;
pub mod growth;
pub mod incremental;
mod peers;
pub mod restore;
mod rig;

/// Rounds after the one that warms up.
const ROUNDS: usize = 5;
