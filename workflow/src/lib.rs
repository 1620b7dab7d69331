//! A durable DAG engine.
//!
//! A *job* is one execution of a *workflow* on one subject. Its *plan*, a DAG of idempotent *steps*, is built once from
//! observed facts and stored whole in the job's *journal*; every transition after that is an event in the same
//! journal. Whatever ends the process, the next one folds the journal, looks at the world, and either goes on or takes
//! everything back, by the same rules and with the same outcome.
//!
//! | to learn about | read |
//! |---|---|
//! | what a job is made of | [`plan`], [`step`] |
//! | what is written down | [`event`], [`journal`], [`summary`] |
//! | which event may follow which | [`state`] |
//! | what happens next | [`decide`] |
//! | how it is carried out | [`engine`] |
//! | how a history is checked | [`replay`] |
//!
//! This crate knows nothing of virtual machines, hypervisors or disks.
//!
//! # An example
//!
//! A kettle: fill it, boil it, and whatever happens to the boiling, switch it off again.
//!
//! ```
//! use std::sync::Arc;
//! use async_trait::async_trait;
//! use serde_json::json;
//! use vmkeep_workflow::engine::{Config, Limits, NoEnvironment, SystemClock};
//! use vmkeep_workflow::event::{IfBusy, JobRequest, Subject};
//! use vmkeep_workflow::{
//!     Actor, Code, Engine, Fault, JobStatus, Plan, PlanContext, Registry, Step, StepContext, StepKind, StepSpec,
//!     Verdict, Workflow, WorkflowName, replay,
//! };
//!
//! /// A folder stands for the kettle: a file is there, or it is not.
//! struct Put(std::path::PathBuf);
//!
//! #[async_trait]
//! impl Step for Put {
//!     const KIND: StepKind = StepKind::new("put", 1);
//!     type Input = String;
//!     type Output = ();
//!
//!     async fn run(&self, _: &StepContext, name: String) -> Result<(), Fault> {
//!         let file = std::fs::File::create(self.0.join(&name))
//!             .and_then(|file| file.sync_all())
//!             .and_then(|()| std::fs::File::open(&self.0)?.sync_all());
//!         file.map_err(|e| Fault::transient(Code(6), "put the file", name, e))
//!     }
//!
//!     async fn probe(&self, _: &StepContext, name: String) -> Verdict<()> {
//!         match self.0.join(name).try_exists() {
//!             Ok(true) => Verdict::Done(()),
//!             Ok(false) => Verdict::NotDone,
//!             Err(e) => Verdict::Unknown(e.to_string()),
//!         }
//!     }
//!
//!     async fn undo(&self, _: &StepContext, name: String, _: Option<()>) -> Result<(), Fault> {
//!         match std::fs::remove_file(self.0.join(&name)) {
//!             Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
//!                 Err(Fault::transient(Code(13), "remove the file", name, e))
//!             }
//!             _ => Ok(()),
//!         }
//!     }
//! }
//!
//! struct Tea;
//!
//! #[async_trait]
//! impl Workflow for Tea {
//!     fn name(&self) -> WorkflowName {
//!         "tea".into()
//!     }
//!     async fn plan(&self, _: &PlanContext) -> Result<Plan, Fault> {
//!         let put = |name: &'static str| StepSpec::new(name, Put::KIND, format!("put {name}"), json!(name));
//!         let steps = vec![
//!             put("water").undoable(),
//!             put("heat").after("water").undoable(),
//!             put("off").after("heat").closes("heat"),
//!         ];
//!         Plan::new("tea", 1, "tea for one", steps, None, json!({}))
//!             .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan tea", "", e))
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let kettle = tempfile::tempdir()?;
//! let store = Arc::new(vmkeep_store::MemoryStore::new());
//! let engine = Engine::new(Config {
//!     store,
//!     registry: Registry::new().step(Put(kettle.path().to_owned())).workflow(Tea),
//!     clock: Arc::new(SystemClock),
//!     environment: Arc::new(NoEnvironment),
//!     limits: Limits::default(),
//!     on_fatal: Arc::new(|why| eprintln!("{why}")),
//! });
//! engine.recover().await?;
//! let job = engine
//!     .request(JobRequest {
//!         workflow: "tea".into(),
//!         subject: Subject { id: "kettle-1".into(), label: "the kettle".into() },
//!         options: json!({}),
//!         key: None,
//!         by: Actor { who: "ann".into(), why: None },
//!         if_busy: IfBusy::Refuse,
//!         limits: vec![],
//!         retry_of: None,
//!     })
//!     .await?;
//! assert_eq!(engine.wait(job).await?.status, JobStatus::Succeeded);
//! assert!(kettle.path().join("off").exists());
//!
//! // The whole history is there, and every decision in it can be taken again.
//! let history: Vec<_> = engine.history(job).await?.into_iter().map(|(_, event)| event).collect();
//! assert_eq!(replay::decisions(&history)?.decisions, 4);
//! # Ok(())
//! # }
//! ```

pub mod crash;
pub mod decide;
pub mod engine;
pub mod event;
pub mod explain;
pub mod fault;
pub mod ids;
pub mod journal;
pub mod mutation;
pub mod plan;
pub mod progress;
pub mod replay;
pub mod state;
pub mod step;
pub mod summary;

pub use engine::{Clock, Engine, Environment, JobView};
pub use event::{Actor, Body, Event, IfBusy, JobRequest, Settle, Subject, Verdict};
pub use fault::{Class, Code, Fault};
pub use ids::{JobId, Phase, Seq, StepKind, StepName, StreamId, WorkflowName};
pub use journal::EventStore;
pub use plan::{Millis, Plan, PlanError, StepSpec};
pub use step::{Outputs, PlanContext, Registry, Step, StepContext, Workflow};
pub use summary::{JobStatus, JobSummary};
