//! A private, unprivileged hypervisor with small real guests, and an oracle of what their disks must hold.
//!
//! ```no_run
//! use replay_tests::testbed::{DiskSpec, Format, Guest, GuestSpec, Hypervisor, MIB, assert_consistent, ticks_on};
//!
//! # fn main() -> Result<(), replay_tests::testbed::Error> {
//! let hypervisor = Hypervisor::start_temp()?;
//! let spec = GuestSpec::new("web server").disk(DiskSpec::new(64 * MIB)).disk(DiskSpec::new(64 * MIB).raw());
//! let guest = Guest::boot(&hypervisor, &spec)?;
//! guest.wait_tick(20)?;
//! guest.destroy()?;
//! let reports = [
//!     ticks_on(&guest.disk("vda")?, Format::Qcow2)?, //
//!     ticks_on(&guest.disk("vdb")?, Format::Raw)?,
//! ];
//! assert_consistent(&reports[0], &reports[1]);
//! assert!(reports[1].last >= guest.last_tick());
//! # Ok(())
//! # }
//! ```
//!
//! Invariants
//! - No domain, file or process of the host is touched: everything lies in one folder, belongs to one
//!   unprivileged user, and each process is ended by its id after its start time was compared.
//! - A hypervisor ends with its [`Hypervisor`], in every path that runs destructors; what a killed test leaves
//!   is found again by its folder and ended by the next [`Hypervisor::start_temp`] or by `testbed sweep`.
//! - Waiting is always for a condition and up to a deadline, never for a time.
//! - Nothing here uses vmkeep's own code. It asks `virsh`, `qemu-img`, QEMU's monitor and `/proc`.

mod capabilities;
mod channel;
mod command;
mod console;
mod crashed;
mod error;
mod guest;
mod hypervisor;
mod image;
mod observe;
mod parts;
mod process;
mod spec;
mod state;
mod system;
mod ticks;
mod user;

pub use console::{Console, Gap, TickLine};
pub use error::{Error, Result};
pub use guest::Guest;
pub use hypervisor::{HideKvm, Hypervisor, Options};
pub use image::{Format, ImageInfo, files_in, image_info, images_equal, pattern_on};
pub use observe::{DomainState, QemuDisk, disk_files, leftovers};
pub use parts::GuestParts;
pub use process::{Process, ProcessId, Role};
pub use spec::{DiskSpec, GuestSpec, data_offset};
pub use ticks::{Boot, Defect, TickReport, assert_consistent, consistency, ticks_on};
pub use user::TestUser;

/// 1024 × 1024 bytes.
pub const MIB: u64 = 1024 * 1024;
