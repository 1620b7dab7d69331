//! Progress of an attempt: how far it is, and from where a later attempt can go on.
//!
//! Neither is an event. They live in one mutable row per attempt of the store, outside the hash chain: how far a copy
//! was at noon is not history, and losing it costs work but no truth. A resume token enters the journal only through
//! a probe's verdict, which has compared it with what is really on disk.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fault::{Code, Fault};
use crate::ids::{JobId, Phase, StepName};
use crate::journal::EventStore;

/// The shortest time between two writes of progress to the store.
const INTERVAL: Duration = Duration::from_millis(500);

/// How far an attempt is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// So much is done.
    pub done: u64,
    /// Of so much; 0 when not known.
    pub total: u64,
    /// The unit: `bytes`.
    pub unit: String,
}

/// What the store's row of an attempt holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProgressRow {
    /// The attempt.
    pub attempt: u32,
    /// How far it is.
    #[serde(default)]
    pub amount: Amount,
    /// From where a later attempt can go on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Value>,
}

struct Inner {
    store: Option<Arc<dyn EventStore>>,
    job: JobId,
    row: String,
    state: Mutex<Live>,
    /// Held while the row is written: a report that was slow on its way must not undo a token that was stored since.
    writing: tokio::sync::Mutex<()>,
    runtime: Option<tokio::runtime::Handle>,
}

struct Live {
    row: ProgressRow,
    advanced: Instant,
    written: Option<Instant>,
    /// How many tokens there were, and how many of them are known to be stored.
    tokens: u64,
    stored: u64,
}

/// A token that an attempt has left.
#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub(crate) value: Value,
    /// Whether the store is known to have it.
    pub(crate) stored: bool,
}

/// The handle through which an attempt reports. Cheap to clone; may be used from blocking threads.
#[derive(Clone)]
pub struct Progress(Arc<Inner>);

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Progress").field(&self.0.row).finish()
    }
}

/// The name of the row of a step.
#[must_use]
pub fn row_name(step: &StepName, phase: Phase) -> String {
    match phase {
        Phase::Forward => format!("forward/{step}"),
        Phase::Undo => format!("undo/{step}"),
    }
}

impl Progress {
    pub(crate) fn new(
        store: Arc<dyn EventStore>,
        job: JobId,
        step: &StepName,
        phase: Phase,
        attempt: u32,
        token: Option<Token>,
    ) -> Self {
        let tokens = u64::from(token.is_some());
        let stored = u64::from(token.as_ref().is_some_and(|token| token.stored));
        let token = token.map(|token| token.value);
        Self(Arc::new(Inner {
            store: Some(store),
            job,
            row: row_name(step, phase),
            state: Mutex::new(Live {
                row: ProgressRow { attempt, amount: Amount::default(), token },
                advanced: Instant::now(),
                written: None,
                tokens,
                stored,
            }),
            writing: tokio::sync::Mutex::new(()),
            runtime: tokio::runtime::Handle::try_current().ok(),
        }))
    }

    /// A handle that reports to nobody, for tests of steps.
    #[must_use]
    pub fn detached() -> Self {
        Self(Arc::new(Inner {
            store: None,
            job: JobId::new(),
            row: String::new(),
            state: Mutex::new(Live {
                row: ProgressRow::default(),
                advanced: Instant::now(),
                written: None,
                tokens: 0,
                stored: 0,
            }),
            writing: tokio::sync::Mutex::new(()),
            runtime: None,
        }))
    }

    fn live(&self) -> std::sync::MutexGuard<'_, Live> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So much is done. Cheap: call it as often as convenient. Counts as a sign of life if `done` changed.
    pub fn report(&self, done: u64, total: u64, unit: &str) {
        {
            let mut live = self.live();
            let now = Instant::now();
            if live.row.amount.done != done {
                live.advanced = now;
            }
            live.row.amount = Amount { done, total, unit: unit.to_owned() };
            if live.written.is_some_and(|at| now.duration_since(at) < INTERVAL) {
                return;
            }
            live.written = Some(now);
        }
        let Some(runtime) = &self.0.runtime else { return };
        let this = self.clone();
        runtime.spawn(async move {
            // Lost progress is no fault: the next report carries all of it again.
            if let Err((_, error)) = this.write().await {
                tracing::debug!(job = %this.0.job, row = this.0.row, error, "progress was not stored");
            }
        });
    }

    /// A sign of life from a step that cannot count.
    pub fn alive(&self) {
        self.live().advanced = Instant::now();
    }

    /// Stores a resume token. Call it only after the data that it speaks of is durable.
    ///
    /// # Errors
    /// When the store did not take it.
    pub async fn save<T: Serialize + Sync>(&self, token: &T) -> Result<(), Fault> {
        let token = serde_json::to_value(token).map_err(|e| self.fault((Code::UNDEFINED, e.to_string())))?;
        {
            let mut live = self.live();
            live.row.token = Some(token);
            live.tokens += 1;
            live.advanced = Instant::now();
            live.written = Some(Instant::now());
        }
        self.write().await.map_err(|error| self.fault(error))
    }

    fn fault(&self, (code, cause): (Code, String)) -> Fault {
        Fault::transient(code, "store how far the step is", self.0.row.clone(), cause)
    }

    /// Stores the token that an attempt goes on from, if the attempt that left it could not. What a step does next may count on
    /// its being found after a crash.
    pub(crate) async fn settle(&self) -> Result<(), Fault> {
        let pending = {
            let live = self.live();
            live.stored < live.tokens
        };
        if pending { self.write().await.map_err(|error| self.fault(error)) } else { Ok(()) }
    }

    /// Writes the row as it is now, one after the other.
    async fn write(&self) -> Result<(), (Code, String)> {
        let Some(store) = &self.0.store else { return Ok(()) };
        let _writing = self.0.writing.lock().await;
        let (row, tokens) = {
            let live = self.live();
            (live.row.clone(), live.tokens)
        };
        let value = serde_json::to_value(&row).map_err(|e| (Code::UNDEFINED, e.to_string()))?;
        store.put_row(self.0.job, &self.0.row, &value).await.map_err(|e| (e.code(), e.to_string()))?;
        let mut live = self.live();
        live.stored = live.stored.max(tokens);
        Ok(())
    }

    /// What this attempt leaves to the next.
    pub(crate) fn token(&self) -> Option<Token> {
        let live = self.live();
        let value = live.row.token.clone()?;
        Some(Token { value, stored: live.stored >= live.tokens })
    }

    /// The resume token of an earlier attempt, or the one that this attempt has stored since. One that could not be stored by the
    /// attempt that left it is stored before the next begins.
    #[must_use]
    pub fn saved(&self) -> Option<Value> {
        self.live().row.token.clone()
    }

    /// How far the attempt is.
    #[must_use]
    pub fn amount(&self) -> Amount {
        self.live().row.amount.clone()
    }

    /// How long ago the last sign of life was.
    pub(crate) fn idle(&self) -> Duration {
        self.live().advanced.elapsed()
    }
}
