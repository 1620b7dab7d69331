//! Words about jobs.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use vmkeep_workflow::{JobStatus, Settle};

use crate::text::parse_span;

/// Which jobs.
#[derive(Clone, Debug, Args)]
pub struct Jobs {
    /// Only of this domain
    #[arg(long, value_name = "NAME")]
    pub domain: Option<String>,
    /// Only of this workflow
    #[arg(long, value_name = "NAME")]
    pub workflow: Option<String>,
    /// Only in these states
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = job_status)]
    pub state: Vec<JobStatus>,
    /// Only those asked for within this span: 2d
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    pub within: Option<Duration>,
    /// At most so many
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub limit: usize,
}

/// Look at a job, follow it, steer it.
#[derive(Clone, Debug, Subcommand)]
pub enum Job {
    /// Its steps and where it stands
    Show {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// Follow it until it ends; the exit status is its own
    Watch {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// Its journal, event by event
    History {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// What happened and why, in plain words
    Explain {
        /// The job: its id or the beginning of it
        job: String,
    },
    /// Give it up and take back what it did (past its point of no return it finishes instead)
    Cancel(JobAct),
    /// Let it wait at its next safe place
    Pause {
        /// The job and why.
        #[command(flatten)]
        act: JobAct,
        /// How long, at most
        #[arg(long = "for", value_name = "SPAN", value_parser = parse_span, default_value = "1h")]
        span: Duration,
    },
    /// End a pause
    Resume(JobAct),
    /// Send a job the word that it waits for: retain, merge
    Signal {
        /// The job and why.
        #[command(flatten)]
        act: JobAct,
        /// The signal's name
        name: String,
    },
    /// Let a job that needs attention look at the world again and go on
    Settle {
        /// The job and why.
        #[command(flatten)]
        act: JobAct,
        /// Go on from what is there; also run failed steps anew; or take everything back
        #[arg(long, value_enum, default_value_t)]
        how: How,
    },
    /// Give up a job that needs attention and leave what it made; lists what that is
    Abandon(JobAct),
}

/// How a job that needs attention is settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Look again and go on from what is there
    #[default]
    Probe,
    /// Look again, then run the failed steps anew
    Retry,
    /// Look again, then take back what can still be taken back
    Undo,
}

impl From<How> for Settle {
    fn from(how: How) -> Self {
        match how {
            How::Probe => Self::Probe,
            How::Retry => Self::Retry,
            How::Undo => Self::Undo,
        }
    }
}

/// What is done to a job, and why.
#[derive(Clone, Debug, Args)]
pub struct JobAct {
    /// The job: its id or the beginning of it
    pub job: String,
    /// Why, for the journal
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Say what it would do and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

pub(super) fn job_status(text: &str) -> Result<JobStatus, String> {
    let value = serde_json::Value::String(text.replace('-', "_"));
    serde_json::from_value(value).map_err(|_| {
        "states are queued, running, paused, unwinding, needs_attention, succeeded, rolled_back, cancelled, refused, abandoned"
            .to_owned()
    })
}
