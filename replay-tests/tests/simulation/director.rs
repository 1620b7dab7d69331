//! Who decides what happens to the world, and when: at each place of a run that is numbered from 1 in the order in which
//! it is reached. The same acts at the same places are the same run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Notify, broadcast};
use vmkeep_steps::hypervisor::fake::Fake;
use vmkeep_steps::hypervisor::{DomainId, HvError, Trouble};
use vmkeep_steps::simulation::{Hands, Order, Place, Side, Witness};
use vmkeep_store::MemoryStore;
use vmkeep_workflow::journal::{
    Append, AppendError, Appended, EventStore, JobFilter, Record, Reserve, StoreError,
};
use vmkeep_workflow::{JobId, JobSummary, Seq, StreamId};

/// What is done at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Act {
    /// vmkeepd is killed. What libvirt has begun it finishes.
    Killed,
    /// The same, but the call in progress waits in libvirt for so many milliseconds.
    KilledAndLate(u64),
    /// vmkeepd and libvirtd are killed at once.
    KilledWithLibvirtd,
    /// vmkeepd and QEMU.
    KilledWithQemu,
    /// The host loses power. Guests start with it, before vmkeepd, or do not.
    Host { autostart: bool },
    /// libvirtd is killed, and comes back at once.
    Libvirtd,
    /// QEMU is killed.
    Qemu,
    /// QEMU is killed, and an operator starts the domain.
    QemuAndStart,
    /// An operator starts, ends, pauses or resumes the domain.
    Start,
    /// See [`Act::Start`].
    Destroy,
    /// See [`Act::Start`].
    Pause,
    /// See [`Act::Start`].
    Resume,
    /// The call fails, and does nothing.
    Fail(Trouble_),
    /// The call does what it should, and the answer is lost.
    Lost,
    /// The answer is lost, and the call takes effect so many milliseconds later.
    LostAndLate(u64),
    /// From here on every call of this kind fails, hundreds of times.
    FailForEver,
    /// From here on no change of a file that takes room succeeds, hundreds of times.
    Full,
    /// Somebody cancels the job.
    Cancel,
    /// The same, and the call in progress takes so many milliseconds more.
    CancelInCall(u64),
}

/// A kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Trouble_ {
    Transient,
    Permanent,
    NoSpace,
}

impl Act {
    /// Whether it ends this vmkeepd.
    pub fn kills(self) -> bool {
        matches!(
            self,
            Self::Killed
                | Self::KilledAndLate(_)
                | Self::KilledWithLibvirtd
                | Self::KilledWithQemu
                | Self::Host { .. }
        )
    }
}

fn failure(of: Trouble_) -> HvError {
    match of {
        Trouble_::Transient => HvError::new(Trouble::Unreachable, "told to fail: the connection broke"),
        Trouble_::Permanent => HvError::new(Trouble::Refused, "told to fail: refused"),
        Trouble_::NoSpace => HvError::new(Trouble::NoSpace, "told to fail: no space left on device"),
    }
}

/// A place that was reached, for people and for comparison: it names nothing that differs from run to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reached {
    pub what: String,
    pub side: Side,
    pub hands: Hands,
}

struct State {
    acts: BTreeMap<usize, Act>,
    reached: Vec<Reached>,
    /// Looks at files, which change nothing: numbered apart, from [`LOOKS`] on.
    looked: Vec<&'static str>,
    /// Counting begins when the job under test is asked for.
    on: bool,
    dead: bool,
    /// Calls that fail, how, and how often they still do before somebody mends what is wrong.
    for_ever: Option<(Vec<&'static str>, Trouble_, u32)>,
    cancel: bool,
    fatal: Vec<String>,
}

/// See the module.
pub struct Director {
    state: Mutex<State>,
    world: Fake,
    domain: DomainId,
    /// Something for the process's main task to see to.
    pub told: Notify,
}

/// So often a call fails that fails "for ever": more than most steps try, and few enough to be played.
const OFTEN: u32 = 300;

/// Changes of files that take room.
pub const ROOM: [&str; 3] = ["make a folder", "create a file", "write"];

/// The number of the place before the first look at a file.
pub const LOOKS: usize = 1_000_000;

/// So many places, and a run goes round in circles.
const MOST: usize = 20_000;

impl Director {
    pub fn new(world: &Fake, domain: DomainId, acts: BTreeMap<usize, Act>) -> Arc<Self> {
        let state = State {
            acts,
            reached: Vec::new(),
            looked: Vec::new(),
            on: false,
            dead: false,
            for_ever: None,
            cancel: false,
            fatal: Vec::new(),
        };
        Arc::new(Self { state: Mutex::new(state), world: world.clone(), domain, told: Notify::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn count_from_now_on(&self, on: bool) {
        self.state().on = on;
    }

    pub fn reached(&self) -> Vec<Reached> {
        self.state().reached.clone()
    }

    /// The looks at files, in their order.
    pub fn looked(&self) -> Vec<&'static str> {
        self.state().looked.clone()
    }

    /// Whether this life is over; asked again it is another one's.
    pub fn died(&self) -> bool {
        std::mem::take(&mut self.state().dead)
    }

    pub fn dead(&self) -> bool {
        self.state().dead
    }

    pub fn cancels(&self) -> bool {
        std::mem::take(&mut self.state().cancel)
    }

    pub fn fatal(&self, why: &str) {
        self.state().fatal.push(why.to_owned());
        self.told.notify_one();
    }

    pub fn faults(&self) -> Vec<String> {
        self.state().fatal.clone()
    }

    pub fn step(&self, what: &'static str, side: Side, hands: Hands) -> Order {
        let (act, fails) = {
            let mut state = self.state();
            if state.dead {
                return Order::Die;
            }
            if !state.on {
                return Order::Go;
            }
            let number = if hands == Hands::Look {
                state.looked.push(what);
                LOOKS + state.looked.len()
            } else {
                let name = what.trim_start_matches("vmkeep_steps::").replace("::{{closure}}", "");
                state.reached.push(Reached { what: name, side, hands });
                state.reached.len()
            };
            if state.reached.len() > MOST {
                state.fatal.push(format!("it goes round in circles at {what}"));
                state.dead = true;
                self.told.notify_one();
                return Order::Die;
            }
            let fails = match &mut state.for_ever {
                Some((which, how, left)) if which.contains(&what) && side == Side::Before && *left > 0 => {
                    *left -= 1;
                    Some(*how)
                }
                _ => None,
            };
            (state.acts.get(&number).copied(), fails)
        };
        if let Some(how) = fails {
            return Order::Fail(failure(how));
        }
        match act {
            None => Order::Go,
            Some(act) => self.act(act, what, side),
        }
    }

    fn act(&self, act: Act, what: &'static str, side: Side) -> Order {
        let (world, id) = (&self.world, &self.domain);
        // Whoever runs since an earlier act has written, though nobody has looked.
        world.pass();
        match act {
            Act::Killed | Act::KilledAndLate(_) => {}
            Act::KilledWithLibvirtd | Act::Libvirtd => world.libvirtd_dies(),
            Act::KilledWithQemu | Act::Qemu => world.qemu_dies(id),
            Act::Host { autostart } => world.power_cut(autostart),
            Act::QemuAndStart => {
                world.qemu_dies(id);
                world.operator_starts(id);
            }
            Act::Start => world.operator_starts(id),
            Act::Destroy => world.operator_destroys(id),
            Act::Pause => world.operator_pauses(id, true),
            Act::Resume => world.operator_pauses(id, false),
            Act::Fail(of) => return Order::Fail(failure(of)),
            Act::Lost => return Order::Lose(failure(Trouble_::Transient)),
            Act::LostAndLate(ms) => {
                return Order::LoseAndLeave(Duration::from_millis(ms), failure(Trouble_::Transient));
            }
            Act::FailForEver => {
                self.state().for_ever = Some((vec![what], Trouble_::Permanent, OFTEN));
                let before = side == Side::Before;
                return if before { Order::Fail(failure(Trouble_::Permanent)) } else { Order::Go };
            }
            Act::Full => {
                self.state().for_ever = Some((ROOM.to_vec(), Trouble_::NoSpace, OFTEN));
                return Order::Fail(failure(Trouble_::NoSpace));
            }
            Act::Cancel | Act::CancelInCall(_) => {
                self.state().cancel = true;
                self.told.notify_one();
                if let Act::CancelInCall(ms) = act {
                    return Order::Linger(Duration::from_millis(ms));
                }
            }
        }
        if !act.kills() {
            return Order::Go;
        }
        self.state().dead = true;
        self.told.notify_one();
        match act {
            Act::KilledAndLate(ms) => Order::DieAndLeave(Duration::from_millis(ms)),
            _ => Order::Die,
        }
    }
}

impl Witness for Director {
    fn at(&self, place: &Place) -> Order {
        self.step(place.what, place.side, place.hands)
    }
}

/// The store, as a process that may die sees it.
pub struct Mortal {
    pub inner: Arc<MemoryStore>,
    pub director: Arc<Director>,
}

impl Mortal {
    async fn place(&self, side: Side) {
        if !matches!(
            self.director.step("append", side, Hands::Own),
            Order::Go | Order::Linger(_) | Order::Fail(_) | Order::Lose(_) | Order::LoseAndLeave(..)
        ) {
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl EventStore for Mortal {
    fn id(&self) -> uuid::Uuid {
        self.inner.id()
    }

    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.place(Side::Before).await;
        let appended = self.inner.append(append).await;
        self.place(Side::Within(1)).await;
        // Acknowledged: the engine acts on it, as far as it comes before it is ended.
        let _ = self.director.step("append", Side::After, Hands::Own);
        appended
    }

    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        if self.director.dead() {
            // A copy asks for this in its middle, where nobody waits.
            return Err(StoreError::Io("the process is dead".to_owned()));
        }
        self.inner.put_row(job, row, value).await
    }

    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
        self.inner.clear_rows(job).await
    }
    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        self.inner.read(stream, from, limit).await
    }
    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError> {
        self.inner.last(stream).await
    }
    async fn streams(&self) -> Result<Vec<StreamId>, StoreError> {
        self.inner.streams().await
    }
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        self.inner.jobs(filter).await
    }
    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError> {
        self.inner.job(job).await
    }
    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError> {
        self.inner.key(key).await
    }
    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        self.inner.rows(job).await
    }
    fn subscribe(&self) -> broadcast::Receiver<Record> {
        self.inner.subscribe()
    }
    async fn reserve(&self) -> Result<Reserve, StoreError> {
        self.inner.reserve().await
    }
}
