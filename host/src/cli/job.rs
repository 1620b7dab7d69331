//! Commands about one job.

use jiff::{SignedDuration, Timestamp};
use vmkeep_workflow::{Fault, Settle};

use super::args::{JobAct, Jobs};
use super::{Out, show as render};
use crate::api::types::{Act, Acted, Explanation, HistoryRow, JobDetail};
use crate::client::{Client, segment};
use crate::codes;

/// What some acts take besides the job and the reason.
#[derive(Clone, Debug, Default)]
pub(super) struct More {
    pub(super) pause_ms: Option<u64>,
    pub(super) settle: Option<Settle>,
    pub(super) signal: Option<String>,
}

/// The path that asks for these jobs.
pub(super) fn query(args: &Jobs) -> Result<String, Fault> {
    let mut parts = vec![format!("limit={}", args.limit)];
    if let Some(domain) = &args.domain {
        parts.push(format!("domain={}", segment(domain)));
    }
    if let Some(workflow) = &args.workflow {
        parts.push(format!("workflow={}", segment(workflow)));
    }
    if !args.state.is_empty() {
        let states: Vec<&str> = args.state.iter().map(|state| state.as_str()).collect();
        parts.push(format!("status={}", states.join(",")));
    }
    if let Some(within) = args.within {
        let since = SignedDuration::try_from(within)
            .and_then(|span| Timestamp::now().checked_sub(span))
            .map_err(|e| Fault::permanent(codes::USAGE, "read --within", "", e))?;
        parts.push(format!("since={}", segment(&since.to_string())));
    }
    Ok(format!("/v1/jobs?{}", parts.join("&")))
}

pub(super) fn path(job: &str, rest: &str) -> String {
    format!("/v1/jobs/{}{rest}", segment(job))
}

pub(super) async fn show(client: &Client, out: &Out, job: &str) -> Result<(), Fault> {
    let detail: JobDetail = client.get(&path(job, "")).await?;
    out.show(&detail, render::job)
}

pub(super) async fn history(client: &Client, out: &Out, job: &str) -> Result<(), Fault> {
    let rows: Vec<HistoryRow> = client.get(&path(job, "/history")).await?;
    out.show(&rows, |rows| render::history(rows))
}

pub(super) async fn explain(client: &Client, out: &Out, job: &str) -> Result<(), Fault> {
    let story: Explanation = client.get(&path(job, "/explain")).await?;
    out.show(&story, render::explanation)
}

pub(super) async fn act(
    client: &Client,
    out: &Out,
    verb: &str,
    act: JobAct,
    more: More,
) -> Result<(), Fault> {
    let body = Act {
        reason: act.reason,
        pause_ms: more.pause_ms,
        settle: more.settle,
        signal: more.signal,
        dry_run: act.dry_run,
    };
    let acted: Acted = client.post(&path(&act.job, &format!("/{verb}")), &body, None).await?;
    out.show(&acted, |acted| crate::text::safe_lines(&acted.message))
}
