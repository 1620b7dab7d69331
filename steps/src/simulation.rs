//! Where a simulation takes part: every place at which something outside of this process changes, or is about to.
//!
//! The world is [`crate::hypervisor::fake`]; who decides what happens to it, and when, is a [`Witness`]. It is asked at
//! each [`Place`], and answers with an [`Order`]. What it does to the world besides (QEMU dies, the host goes down,
//! an operator starts the domain) it does before it answers.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::hypervisor::{DomainId, HvError, Trouble};

/// How far an effect is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Nothing of it has happened.
    Before,
    /// So many of its parts have.
    Within(usize),
    /// All of it has, and nobody has heard of it.
    After,
}

/// By whose hands an effect happens; decides what becomes of it when this process dies in its middle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hands {
    /// libvirt goes on with it.
    Libvirt,
    /// A helper that dies with this process.
    Helper,
    /// This process itself: a piece of work on files.
    Own,
    /// The file system: one change of a file, in the middle of such a piece of work. All of it happens, or nothing.
    Disk,
    /// The file system: one look at a file, in the middle of such a piece of work. It changes nothing.
    Look,
    /// Whoever keeps a vault: what was sent to it may arrive after its sender is gone.
    Vault,
}

/// A place at which a run can be disturbed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The call, or the code.
    pub what: &'static str,
    /// The domain that it is about, if it is about one.
    pub domain: Option<DomainId>,
    /// How far it is.
    pub side: Side,
    /// By whose hands.
    pub hands: Hands,
}

/// What happens there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// It goes on.
    Go,
    /// It goes on after so long.
    Linger(Duration),
    /// This process is dead: it never hears of anything again. What libvirt has begun, libvirt finishes.
    Die,
    /// The same, but what is left of the call waits in libvirt for so long before it is carried out.
    DieAndLeave(Duration),
    /// The call fails here; what is left of it does not happen.
    Fail(HvError),
    /// All of it happens, and the answer is lost.
    Lose(HvError),
    /// What is left of it happens later, and this is said now.
    LoseAndLeave(Duration, HvError),
}

/// Directs a simulation.
pub trait Witness: Send + Sync {
    /// A place is reached.
    fn at(&self, place: &Place) -> Order;
}

thread_local! {
    static WITNESS: RefCell<Option<Arc<dyn Witness>>> = const { RefCell::new(None) };
    /// Files that this process has made and not synced, by device and number: what the end of the host takes with it.
    static UNSYNCED: RefCell<BTreeMap<(u64, u64), File>> = const { RefCell::new(BTreeMap::new()) };
}

/// Whoever directs what happens on this thread from now on, to the process of this number. What is random in it follows from
/// that: the same each time, and another than in all others of the run.
pub fn direct(witness: Option<Arc<dyn Witness>>, process: u64) {
    vmkeep_vault::simulated::here(witness.is_some().then_some(process));
    WITNESS.set(witness);
    UNSYNCED.take();
}

/// A file was made: nothing of it is durable.
pub(crate) fn made(file: &File) -> std::io::Result<()> {
    if WITNESS.with_borrow(Option::is_some) {
        let (number, kept) = (number(file)?, file.try_clone()?);
        UNSYNCED.with_borrow_mut(|unsynced| unsynced.insert(number, kept));
    }
    Ok(())
}

/// All that was written to a file is durable.
pub(crate) fn synced(file: &File) -> std::io::Result<()> {
    let number = number(file)?;
    UNSYNCED.with_borrow_mut(|unsynced| unsynced.remove(&number));
    Ok(())
}

fn number(file: &File) -> std::io::Result<(u64, u64)> {
    let data = file.metadata()?;
    Ok((data.dev(), data.ino()))
}

/// The host goes down: of the files that were made and never synced nothing is left but their names. That is the most that a
/// file system may forget of them, and some do.
pub(crate) fn power_cut() {
    for file in UNSYNCED.take().into_values() {
        let _ = file.set_len(0);
    }
}

pub(crate) fn witness() -> Option<Arc<dyn Witness>> {
    WITNESS.with_borrow(Clone::clone)
}

/// How long anything takes, at least: so that others get their turn, and waiting ends.
pub(crate) const MOMENT: Duration = Duration::from_millis(1);

/// Work on files. Nothing but its director comes between its parts ([`touch`]).
pub(crate) async fn on_the_spot<T, W: FnOnce() -> T>(witness: &dyn Witness, work: W) -> T {
    let place = |side| Place { what: std::any::type_name::<W>(), domain: None, side, hands: Hands::Own };
    tokio::time::sleep(MOMENT).await;
    ask(witness, &place(Side::Before)).await;
    let done = work();
    ask(witness, &place(Side::After)).await;
    done
}

/// A piece of work fails where it changes a file: the orders that would let the whole of it fail are none.
async fn ask(witness: &dyn Witness, place: &Place) {
    if let Order::Die | Order::DieAndLeave(_) = witness.at(place) {
        std::future::pending::<()>().await;
    }
}

/// A change of a file is about to be made. Of a process that dies here nothing more happens: every further change is refused
/// too, and with the end of the piece of work it never hears of anything again.
pub(crate) fn touch(witness: &dyn Witness, what: &'static str) -> rustix::io::Result<()> {
    on_disk(witness, what, Hands::Disk)
}

/// A file is about to be read.
pub(crate) fn look(witness: &dyn Witness, what: &'static str) -> rustix::io::Result<()> {
    on_disk(witness, what, Hands::Look)
}

fn on_disk(witness: &dyn Witness, what: &'static str, hands: Hands) -> rustix::io::Result<()> {
    let place = Place { what, domain: None, side: Side::Before, hands };
    match witness.at(&place) {
        Order::Go | Order::Linger(_) => Ok(()),
        Order::Die | Order::DieAndLeave(_) => Err(Errno::IO),
        Order::Fail(e) | Order::Lose(e) | Order::LoseAndLeave(_, e) => Err(match e.trouble {
            Trouble::NoSpace => Errno::NOSPC,
            Trouble::Refused => Errno::ACCESS,
            _ => Errno::IO,
        }),
    }
}
