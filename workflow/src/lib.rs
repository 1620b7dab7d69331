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

pub mod crash;
pub mod decide;
pub mod engine;
pub mod event;
pub mod fault;
pub mod ids;
pub mod journal;
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
