//! How often, how long and how patiently: the policies of a step.

use jiff::SignedDuration;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A span of time in milliseconds, as plans store it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    /// So many seconds.
    #[must_use]
    pub const fn secs(secs: u64) -> Self {
        Self(secs * 1000)
    }

    pub(crate) fn span(self) -> SignedDuration {
        SignedDuration::from_millis(i64::try_from(self.0).unwrap_or(i64::MAX))
    }
}

/// How often and how soon a failed attempt is repeated. Only transient failures are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// Attempts in all, the first included; at least 1.
    pub attempts: u32,
    /// The wait before the second attempt; doubles with each further one.
    pub first: Millis,
    /// The longest wait.
    pub most: Millis,
}

impl Retry {
    /// One attempt only.
    pub const NEVER: Self = Self { attempts: 1, first: Millis(0), most: Millis(0) };

    /// The wait before attempt number `next` (2 for the first repetition).
    #[must_use]
    pub fn backoff(&self, next: u32) -> Millis {
        let doublings = next.saturating_sub(2).min(32);
        Millis(self.first.0.saturating_mul(1_u64 << doublings).min(self.most.0))
    }
}

impl Default for Retry {
    /// Four attempts within about seven seconds.
    fn default() -> Self {
        Self { attempts: 4, first: Millis(1000), most: Millis::secs(30) }
    }
}

/// How a step's effect is looked for when its outcome is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probing {
    /// How long a probe may answer "in flight" or "unknown" before the job needs attention.
    pub limit: Millis,
    /// The wait between two probes; doubles up to `most`.
    pub first: Millis,
    /// The longest wait between two probes.
    pub most: Millis,
}

impl Default for Probing {
    fn default() -> Self {
        Self { limit: Millis::secs(600), first: Millis(250), most: Millis::secs(15) }
    }
}

/// A step's compensation. What it does is the step kind's business; here stand its limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// Repetition of a failed undo.
    pub retry: Retry,
    /// The longest time for one attempt.
    pub deadline: Option<Millis>,
}

/// A wait for an outside party.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AwaitSignal {
    /// The signal's name.
    pub name: String,
    /// How long to wait.
    pub limit: Millis,
    /// What is taken as answer when nobody answers.
    pub default: Value,
}
