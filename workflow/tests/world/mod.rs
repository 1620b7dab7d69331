//! A world of named switches, a workflow over it, and stores that misbehave.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::{Notify, broadcast, mpsc, watch};
use vmkeep_workflow::engine::{Config, Limits, NoEnvironment, SystemClock};
use vmkeep_workflow::event::{IfBusy, JobRequest, Subject};
use vmkeep_workflow::journal::{
    Append, AppendError, Appended, EventStore, JobFilter, Record, Reserve, StoreError,
};
use vmkeep_workflow::plan::{Millis, Retry};
use vmkeep_workflow::{
    Actor, Class, Code, Engine, Fault, JobId, JobSummary, Plan, PlanContext, Registry, Seq, Step,
    StepContext, StepKind, StepSpec, StreamId, Verdict, Workflow, WorkflowName,
};

/// What a switch does when it is thrown.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Script {
    Work,
    Fail(Class),
    Panic,
    /// Saves a token, then waits to be stopped; goes on at once when it has a token.
    Resumable,
    /// Saves a token; with one, says so and waits to be let go on.
    Careful,
    /// Saves a token, throws the switch, and fails for good as if it had not; nor does a probe see it.
    Halfway,
}

/// Holds up whoever throws its switch first.
pub struct Gate {
    reached: watch::Sender<bool>,
    open: watch::Sender<bool>,
}

impl Gate {
    pub async fn reached(&self) {
        self.reached.subscribe().wait_for(|reached| *reached).await.unwrap();
    }
    pub fn open(&self) {
        self.open.send_replace(true);
    }
}

#[derive(Default)]
struct Inner {
    on: BTreeSet<String>,
    scripts: HashMap<String, Script>,
    gates: HashMap<String, Arc<Gate>>,
    resumed_from: Option<Value>,
    /// What undos were told of the attempts before them.
    left: HashMap<String, Option<Value>>,
    /// Calls of an engine that is gone must not change the world any more.
    generation: u64,
}

#[derive(Clone, Default)]
pub struct World(Arc<Mutex<Inner>>, Arc<Notify>, Arc<Notify>);

impl World {
    pub fn new() -> Self {
        Self::default()
    }
    pub fn on(&self) -> Vec<String> {
        self.0.lock().unwrap().on.iter().cloned().collect()
    }
    pub fn script(&self, switch: &str, script: Script) {
        self.0.lock().unwrap().scripts.insert(switch.to_owned(), script);
    }
    pub fn block(&self, switch: &str) -> Arc<Gate> {
        let gate = Arc::new(Gate { reached: watch::Sender::new(false), open: watch::Sender::new(false) });
        self.0.lock().unwrap().gates.insert(switch.to_owned(), gate.clone());
        gate
    }
    pub fn abandon_calls(&self) {
        self.0.lock().unwrap().generation += 1;
    }
    pub async fn resumable_reached(&self) {
        self.1.notified().await;
    }
    pub fn let_go_on(&self) {
        self.2.notify_one();
    }
    pub fn left(&self, switch: &str) -> Option<Value> {
        self.0.lock().unwrap().left.get(switch).cloned().flatten()
    }
    pub fn resumed_from(&self) -> Option<Value> {
        self.0.lock().unwrap().resumed_from.clone()
    }
}

pub struct Switch {
    world: World,
    generation: u64,
}

impl Switch {
    fn set(&self, name: &str, on: bool) {
        let mut inner = self.world.0.lock().unwrap();
        if inner.generation != self.generation {
            return;
        }
        if on {
            inner.on.insert(name.to_owned());
        } else {
            inner.on.remove(name);
        }
    }
}

#[async_trait]
impl Step for Switch {
    const KIND: StepKind = StepKind::new("switch", 1);
    type Input = String;
    type Output = String;

    async fn run(&self, cx: &StepContext, name: String) -> Result<String, Fault> {
        let (script, gate) = {
            let mut inner = self.world.0.lock().unwrap();
            (inner.scripts.get(&name).copied().unwrap_or(Script::Work), inner.gates.remove(&name))
        };
        if let Some(gate) = gate {
            gate.reached.send_replace(true);
            gate.open.subscribe().wait_for(|open| *open).await.unwrap();
        }
        match script {
            Script::Work => {}
            Script::Fail(class) => {
                return Err(Fault::permanent(Code(9), "throw the switch", name, "it is rusty").class(class));
            }
            Script::Panic => panic!("a fault in the step's code"),
            Script::Resumable => match &cx.resume {
                Some(token) => self.world.0.lock().unwrap().resumed_from = Some(token.clone()),
                None => {
                    cx.progress.save(&json!({"offset": 7})).await?;
                    self.world.1.notify_one();
                    cx.stop.cancelled().await;
                    return Err(Fault::stopped("throw the switch", name));
                }
            },
            Script::Careful => match cx.progress.saved() {
                Some(_) => {
                    self.world.1.notify_one();
                    self.world.2.notified().await;
                }
                None => cx.progress.save(&json!({"offset": 7})).await?,
            },
            Script::Halfway => {
                cx.progress.save(&json!({"offset": 7})).await?;
                self.set(&name, true);
                return Err(Fault::permanent(Code(9), "throw the switch", name, "it is rusty"));
            }
        }
        self.set(&name, true);
        Ok(name)
    }

    async fn probe(&self, cx: &StepContext, name: String) -> Verdict<String> {
        {
            let inner = self.world.0.lock().unwrap();
            if inner.on.contains(&name) && inner.scripts.get(&name) != Some(&Script::Halfway) {
                return Verdict::Done(name);
            }
        }
        match cx.progress.saved() {
            Some(token) => Verdict::Partial(token),
            None => Verdict::NotDone,
        }
    }

    async fn undo(&self, cx: &StepContext, name: String, _: Option<String>) -> Result<(), Fault> {
        self.world.0.lock().unwrap().left.insert(name.clone(), cx.left.clone());
        self.set(&name, false);
        Ok(())
    }
}

/// a, then b1 and b2 side by side, then commit (the point of no return), then close, which closes a.
struct Toy;

#[async_trait]
impl Workflow for Toy {
    fn name(&self) -> WorkflowName {
        "toy".into()
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        if cx.request.options["refuse"] == json!(true) {
            return Err(Fault::permanent(Code(23), "plan", "web1", "no such thing"));
        }
        let quick = Retry { attempts: 2, first: Millis(1), most: Millis(1) };
        let step = |name: &'static str| {
            let mut spec =
                StepSpec::new(name, Switch::KIND, format!("switch {name}"), json!(name)).retry(quick);
            spec.deadline = cx.request.options["deadline_ms"].as_u64().map(Millis);
            spec.stall = cx.request.options["stall_ms"].as_u64().map(Millis);
            spec
        };
        let mut first = step("a").undoable();
        first.critical = cx.request.options["critical"] == json!(true);
        let steps = vec![
            first,
            step("b1").after("a").undoable(),
            step("b2").after("a").undoable(),
            step("commit").after("b1").after("b2").undoable(),
            step("close").after("commit").closes("a"),
        ];
        Plan::new("toy", 1, "a toy", steps, Some("commit".into()), json!({}))
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan", "toy", e))
    }
}

pub fn who(name: &str) -> Actor {
    Actor { who: name.to_owned(), why: None }
}

pub fn request(subject: &str) -> JobRequest {
    JobRequest {
        workflow: "toy".into(),
        subject: Subject { id: subject.to_owned(), label: subject.to_owned() },
        options: json!({}),
        key: None,
        by: who("ann"),
        if_busy: IfBusy::Refuse,
        limits: vec![],
        retry_of: None,
    }
}

pub fn engine(store: Arc<dyn EventStore>, world: &World) -> Engine {
    engine_that_tells(store, world).0
}

pub fn engine_that_tells(
    store: Arc<dyn EventStore>,
    world: &World,
) -> (Engine, mpsc::UnboundedReceiver<String>) {
    let (tell, told) = mpsc::unbounded_channel();
    let generation = world.0.lock().unwrap().generation;
    let engine = Engine::new(Config {
        store,
        registry: Registry::new().step(Switch { world: world.clone(), generation }).workflow(Toy),
        clock: Arc::new(SystemClock),
        environment: Arc::new(NoEnvironment),
        limits: Limits::default(),
        on_fatal: Arc::new(move |why| {
            let _ = tell.send(why.to_owned());
        }),
    });
    (engine, told)
}

/// Passes everything on but for `append`, and `reserve` and `put_row` where they are given.
macro_rules! passes_on {
    ($type:ty, $append:item) => {
        passes_on!(
            $type,
            $append,
            async fn reserve(&self) -> Result<Reserve, StoreError> {
                self.inner.reserve().await
            }
        );
    };
    ($type:ty, $append:item, $reserve:item) => {
        passes_on!(
            $type,
            $append,
            $reserve,
            async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
                self.inner.put_row(job, row, value).await
            }
        );
    };
    ($type:ty, $append:item, $reserve:item, $put_row:item) => {
        #[async_trait]
        impl EventStore for $type {
            $append
            fn id(&self) -> uuid::Uuid {
                self.inner.id()
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
            $put_row
            async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
                self.inner.rows(job).await
            }
            async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
                self.inner.clear_rows(job).await
            }
            fn subscribe(&self) -> broadcast::Receiver<Record> {
                self.inner.subscribe()
            }
            $reserve
        }
    };
}

/// Lives on its reserve as long as it is told to.
pub struct Narrow {
    inner: Arc<dyn EventStore>,
    pub full: std::sync::atomic::AtomicBool,
}

impl Narrow {
    pub fn new(inner: Arc<dyn EventStore>) -> Self {
        Self { inner, full: true.into() }
    }
}

passes_on!(
    Narrow,
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        self.inner.append(append).await
    },
    async fn reserve(&self) -> Result<Reserve, StoreError> {
        match self.full.load(Ordering::SeqCst) {
            true => Ok(Reserve::Spent),
            false => self.inner.reserve().await,
        }
    }
);

/// Never answers the append that would write a certain record: the process "dies" there, before the record is durable
/// or right after.
pub struct Tripwire {
    inner: Arc<dyn EventStore>,
    cut: u64,
    durable: bool,
    tripped: watch::Sender<bool>,
}

impl Tripwire {
    pub fn new(inner: Arc<dyn EventStore>, cut: u64, durable: bool) -> Self {
        Self { inner, cut, durable, tripped: watch::Sender::new(false) }
    }
    pub async fn tripped(&self) {
        self.tripped.subscribe().wait_for(|tripped| *tripped).await.unwrap();
    }
}

passes_on!(
    Tripwire,
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let reaches = append.expected.0 + append.records.len() as u64;
        if reaches < self.cut {
            return self.inner.append(append).await;
        }
        if self.durable {
            self.inner.append(append).await?;
        }
        self.tripped.send_replace(true);
        std::future::pending().await
    }
);

/// Fails for good at a certain append.
pub struct Fatal {
    inner: Arc<dyn EventStore>,
    left: AtomicU64,
}

impl Fatal {
    pub fn new(inner: Arc<dyn EventStore>, left: u64) -> Self {
        Self { inner, left: AtomicU64::new(left) }
    }
}

passes_on!(
    Fatal,
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            return Err(AppendError::Fatal("fsync: input/output error".to_owned()));
        }
        self.inner.append(append).await
    }
);

/// Does not know the result of a certain append.
pub struct Unsure {
    inner: Arc<dyn EventStore>,
    left: AtomicU64,
    written: bool,
}

impl Unsure {
    pub fn new(inner: Arc<dyn EventStore>, left: u64, written: bool) -> Self {
        Self { inner, left: AtomicU64::new(left), written }
    }
}

passes_on!(
    Unsure,
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            if self.written {
                self.inner.append(append).await?;
            }
            return Err(AppendError::Unknown("the connection broke".to_owned()));
        }
        self.inner.append(append).await
    }
);

/// A disk that does not write for a while: what is appended is not there.
pub struct Dead {
    inner: Arc<dyn EventStore>,
    from: u64,
    pub tries: AtomicU64,
    until: u64,
}

impl Dead {
    pub fn new(inner: Arc<dyn EventStore>, from: u64, until: u64) -> Self {
        Self { inner, from, tries: AtomicU64::new(0), until }
    }
}

passes_on!(
    Dead,
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        if append.expected.0 >= self.from && self.tries.fetch_add(1, Ordering::SeqCst) < self.until {
            return Err(AppendError::Unknown("disk I/O error".to_owned()));
        }
        self.inner.append(append).await
    }
);

/// Cannot store progress the first so many times.
pub struct Forgetful {
    inner: Arc<dyn EventStore>,
    left: AtomicU64,
}

impl Forgetful {
    pub fn new(inner: Arc<dyn EventStore>, left: u64) -> Self {
        Self { inner, left: AtomicU64::new(left) }
    }
}

passes_on!(
    Forgetful,
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        self.inner.append(append).await
    },
    async fn reserve(&self) -> Result<Reserve, StoreError> {
        self.inner.reserve().await
    },
    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        let refuses = |left: u64| left.checked_sub(1);
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, refuses) {
            Ok(_) => Err(StoreError::Io("disk full".to_owned())),
            Err(_) => self.inner.put_row(job, row, value).await,
        }
    }
);
