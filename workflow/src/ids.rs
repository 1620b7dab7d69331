//! Identifiers. Each is a type of its own, so that a step's name cannot be handed over where a job is meant.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A job. Version 7: sorts by the time it was made, and stays unique across hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(Uuid);

impl JobId {
    /// A fresh id.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id as a UUID.
    #[must_use]
    pub fn uuid(self) -> Uuid {
        self.0
    }

    /// The last twelve hexadecimal digits: random, hence short and still telling. For names of files and overlays.
    #[must_use]
    pub fn short(self) -> String {
        let text = self.0.simple().to_string();
        text[20..].to_owned()
    }
}

impl From<Uuid> for JobId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for JobId {
    type Err = uuid::Error;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(s).map(Self)
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $type(Cow<'static, str>);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl From<&'static str> for $type {
            fn from(s: &'static str) -> Self {
                Self(Cow::Borrowed(s))
            }
        }
        impl From<String> for $type {
            fn from(s: String) -> Self {
                Self(Cow::Owned(s))
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name! {
    /// A step's name within its plan, stable over restarts and releases: `copy-image/vda`.
    StepName
}
name! {
    /// A workflow's name: `snapshot`.
    WorkflowName
}
name! {
    /// A stream of the store: `job/<uuid>`, `catalogue`.
    StreamId
}

impl StreamId {
    /// The stream that is a job's journal.
    #[must_use]
    pub fn job(job: JobId) -> Self {
        Self::from(format!("job/{job}"))
    }

    /// The job whose journal this stream is, if it is one.
    #[must_use]
    pub fn as_job(&self) -> Option<JobId> {
        self.as_str().strip_prefix("job/")?.parse().ok()
    }
}

/// A step's kind with the version of its meaning: `copy-image@1`. A plan that was stored years ago names the
/// version it was made for, and a newer binary either still knows that version or says that it does not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StepKind {
    /// The kind: `copy-image`.
    pub name: Cow<'static, str>,
    /// The version of input, output and meaning, from 1.
    pub version: u32,
}

impl StepKind {
    /// A kind known at compile time.
    #[must_use]
    pub const fn new(name: &'static str, version: u32) -> Self {
        Self { name: Cow::Borrowed(name), version }
    }
}

impl fmt::Display for StepKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)
    }
}

impl From<StepKind> for String {
    fn from(kind: StepKind) -> Self {
        kind.to_string()
    }
}

impl TryFrom<String> for StepKind {
    type Error = String;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.rsplit_once('@') {
            Some((name, version)) if !name.is_empty() => match version.parse() {
                Ok(version) => Ok(Self { name: Cow::Owned(name.to_owned()), version }),
                Err(_) => Err(format!("the version of step kind {text:?} is not a number")),
            },
            _ => Err(format!("step kind {text:?} is not of the form name@version")),
        }
    }
}

/// The place of a record in its stream: the first is 1, and there are no gaps. 0 stands for "before the first".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// The place after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Forward, or the compensation of what forward did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The step itself.
    Forward,
    /// Its undo.
    Undo,
}
