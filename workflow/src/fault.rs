//! What a failure looks like: a stable code, what was being done to which object, the cause, and the remedy.
//!
//! One type serves steps, planners and the interface alike, because all of them end before the same person: somebody
//! who has to know what happened and what to type next.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A stable error code; the registry with names, causes and remedies lives above this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Code(pub u16);

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The codes that the engine itself reports.
impl Code {
    /// An internal fault: a step panicked.
    pub const UNDEFINED: Self = Self(1);
    /// No job has that id.
    pub const NO_SUCH_JOB: Self = Self(66);
    /// Another job holds the subject.
    pub const SUBJECT_BUSY: Self = Self(67);
    /// A job that needs attention holds the subject.
    pub const NEEDS_ATTENTION: Self = Self(68);
    /// The world changed between planning and doing.
    pub const FACTS_CHANGED: Self = Self(69);
    /// A step ran past its deadline.
    pub const STEP_DEADLINE: Self = Self(70);
    /// A step made no progress for longer than its stall limit.
    pub const STEP_STALLED: Self = Self(71);
    /// The plan, or an event, names something that this binary does not know.
    pub const UNKNOWN_STEP_KIND: Self = Self(72);
    /// The probe found a world that is neither before nor after the step.
    pub const EFFECT_DIVERGED: Self = Self(73);
    /// The probe could not learn in time whether the step took effect.
    pub const EFFECT_UNKNOWN: Self = Self(74);
    /// The job was cancelled.
    pub const CANCELLED: Self = Self(75);
    /// The store is damaged.
    pub const STORE_DAMAGED: Self = Self(77);
    /// The store lives on its reserve; no new job starts.
    pub const STORE_RESERVE_SPENT: Self = Self(78);
    /// Another process has the store.
    pub const STORE_IN_USE: Self = Self(79);
    /// A newer release wrote the store.
    pub const STORE_TOO_NEW: Self = Self(80);
    /// The verb does not fit the job's state.
    pub const INVALID_STATE: Self = Self(81);
    /// The idempotency key was used for another request.
    pub const DUPLICATE_KEY: Self = Self(82);
    /// The store cannot be read or written.
    pub const STORE_UNAVAILABLE: Self = Self(124);
}

/// What the engine may do about a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// May well work the next time: retried by the step's policy.
    Transient,
    /// Will not work the next time either: the job rolls back, or, past the point of no return, needs attention.
    Permanent,
    /// Neither going on nor undoing is known to be safe: the job needs attention and nothing is undone.
    Fatal,
    /// The step gave way to a request to stop; what it did so far is kept for a later attempt.
    Stopped,
}

/// A failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct Fault {
    /// The stable code.
    pub code: Code,
    /// What the engine may do about it.
    pub class: Class,
    /// Whether the effect may still take place after this failure was reported (the call did not return, the
    /// connection broke in its middle). Such a step is probed before anything else happens.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_doubt: bool,
    /// What was being done: "create the overlay".
    pub doing: String,
    /// To which object: "disk vda of web1".
    pub object: String,
    /// Why it failed.
    pub cause: String,
    /// What the reader can do about it; a command where there is one.
    pub remedy: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error {}: could not {}", self.code, self.doing)?;
        if !self.object.is_empty() {
            write!(f, " ({})", self.object)?;
        }
        write!(f, ": {}", self.cause)?;
        if !self.remedy.is_empty() {
            write!(f, ". {}", self.remedy)?;
        }
        Ok(())
    }
}

impl Fault {
    /// A failure that will not go away by itself.
    #[must_use]
    pub fn permanent(
        code: Code,
        doing: impl Into<String>,
        object: impl Into<String>,
        cause: impl fmt::Display,
    ) -> Self {
        Self {
            code,
            class: Class::Permanent,
            in_doubt: false,
            doing: doing.into(),
            object: object.into(),
            cause: cause.to_string(),
            remedy: String::new(),
        }
    }

    /// A failure that may go away by itself.
    #[must_use]
    pub fn transient(
        code: Code,
        doing: impl Into<String>,
        object: impl Into<String>,
        cause: impl fmt::Display,
    ) -> Self {
        Self { class: Class::Transient, ..Self::permanent(code, doing, object, cause) }
    }

    /// The answer of a step that was asked to stop and did.
    #[must_use]
    pub fn stopped(doing: impl Into<String>, object: impl Into<String>) -> Self {
        Self { class: Class::Stopped, ..Self::permanent(Code::CANCELLED, doing, object, "asked to stop") }
    }

    /// The same with a remedy.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into();
        self
    }

    /// The same in another class.
    #[must_use]
    pub fn class(mut self, class: Class) -> Self {
        self.class = class;
        self
    }

    /// The same, with the effect in doubt.
    #[must_use]
    pub fn in_doubt(mut self) -> Self {
        self.in_doubt = true;
        self
    }
}
