//! Jobs, plans and histories as text.

use jiff::Timestamp;
use vmkeep_workflow::JobStatus;
use vmkeep_workflow::engine::StepState;
use vmkeep_workflow::plan::Plan;

use super::{heads, pair};
use crate::api::types::{Explanation, HistoryRow, JobDetail, JobRow, PhaseRow, Replayed, StepRow};
use crate::text::{ago, local, safe, safe_lines, span, table};

pub(in crate::cli) fn jobs(jobs: &[JobRow]) -> String {
    if jobs.is_empty() {
        return "No jobs.".to_owned();
    }
    let now = Timestamp::now();
    let mut rows = vec![heads(&["JOB", "STATUS", "STEPS", "ASKED FOR", "BY", "WHAT"])];
    for job in jobs {
        rows.push(vec![
            job.short.clone(),
            words(job.status).to_owned(),
            format!("{}/{}", job.steps_done, job.steps),
            ago(job.requested, now),
            safe(&job.by),
            safe(&job.title),
        ]);
    }
    table(&rows)
}

/// A status in words.
fn words(status: JobStatus) -> &'static str {
    match status {
        JobStatus::NeedsAttention => "needs attention",
        JobStatus::RolledBack => "rolled back",
        other => other.as_str(),
    }
}

pub(in crate::cli) fn job(detail: &JobDetail) -> String {
    let job = &detail.job;
    let now = Timestamp::now();
    let reason = job.reason.as_ref().map(|why| format!(", because {why}")).unwrap_or_default();
    let mut rows = vec![
        pair("job", &job.id.to_string()),
        pair("what", &job.title),
        pair("domain", &format!("{} ({})", job.domain, job.domain_uuid)),
        pair("status", words(job.status)),
        pair("asked for", &format!("{} by {}{reason}", local(job.requested), job.by)),
    ];
    let end = job.ended.unwrap_or(now);
    if let Ok(took) = std::time::Duration::try_from(end.duration_since(job.requested)) {
        rows.push(pair(if job.ended.is_some() { "took" } else { "so far" }, &span(took)));
    }
    if let Some(until) = detail.paused_until.filter(|_| job.status == JobStatus::Paused) {
        rows.push(match crate::explain::pause_waits(&detail.safe_after) {
            None => pair("paused until", &local(until)),
            Some(why) => pair("to pause", &format!("until {}; {why}", local(until))),
        });
    }
    if let Some(who) = &detail.cancelled_too_late {
        rows.push(pair(
            "cancelled",
            &format!("by {who}, after the point of no return: it goes on to its end"),
        ));
    }
    if let Some(parked) = &detail.parked {
        rows.push(pair("set aside", &parked.cause));
    }
    rows.extend(
        detail.phases.iter().map(|phase| pair(&format!("phase {}", phase.name), &phase_words(phase, now))),
    );
    let mut text = table(&rows);
    if !detail.steps.is_empty() {
        text.push('\n');
        let steps = detail.steps.iter().map(|step| step_row(step, detail.point_of_no_return.as_deref()));
        text.push_str(&table(&steps.collect::<Vec<_>>()));
    }
    text.push_str(&trouble(detail));
    text
}

/// How a phase stands, and how long it took or has been going on.
fn phase_words(phase: &PhaseRow, now: Timestamp) -> String {
    let state = match phase.state {
        StepState::Pending => return "to come".to_owned(),
        StepState::Done => "done",
        StepState::Failed | StepState::Stuck => "failed",
        StepState::Stopped => "given up",
        StepState::Running | StepState::Probing | StepState::Waiting => "going on",
    };
    let took = phase.began.map(|began| phase.ended.unwrap_or(now).duration_since(began));
    match took.and_then(|took| std::time::Duration::try_from(took).ok()) {
        Some(took) => format!("{state}, {}", span(took)),
        None => state.to_owned(),
    }
}

fn step_row(step: &StepRow, barrier: Option<&str>) -> Vec<String> {
    let mark = match step.state {
        StepState::Pending => " ",
        StepState::Running => ">",
        StepState::Probing => "?",
        StepState::Waiting => "~",
        StepState::Done => "+",
        StepState::Failed | StepState::Stuck => "!",
        StepState::Stopped => "-",
    };
    let mut notes = Vec::new();
    if step.attempts > 1 {
        notes.push(format!("attempt {}", step.attempts));
    }
    if let Some(progress) = step.progress.as_ref().filter(|p| p.total > 0 && step.state == StepState::Running)
    {
        notes.push(format!("{} %", progress.done.min(progress.total).saturating_mul(100) / progress.total));
    }
    match step.undo {
        Some(StepState::Done) => notes.push("undone".to_owned()),
        Some(StepState::Stuck | StepState::Failed) => notes.push("could not be undone".to_owned()),
        Some(_) => notes.push("is being undone".to_owned()),
        None => {}
    }
    if let (Some(signal), Some(until)) = (&step.awaits, step.awaits_until) {
        notes.push(format!("waits for the signal {} until {}", safe(signal), local(until)));
    }
    if barrier == Some(step.name.as_str()) {
        notes.push("point of no return".to_owned());
    }
    if let Some(fault) = step.undo_fault.as_ref().or(step.fault.as_ref())
        && step.state != StepState::Done
    {
        notes.push(safe(&fault.cause));
    }
    vec![mark.to_owned(), safe(&step.name), safe(&step.title), notes.join("; ")]
}

fn trouble(detail: &JobDetail) -> String {
    let job = &detail.job;
    let mut text = String::new();
    if job.status == JobStatus::NeedsAttention {
        text.push_str("\nIt needs attention:\n");
        for item in &job.needs {
            text.push_str(&format!(
                "  {}: {} (code {} {})\n",
                safe(&item.step),
                safe(&item.fault.cause),
                item.fault.code,
                safe(&item.fault.name)
            ));
            if !item.fault.remedy.is_empty() {
                text.push_str(&format!("    {}\n", safe(&item.fault.remedy)));
            }
        }
        text.push_str(&format!("  then: vmkeep job settle {}\n", job.short));
    } else if let Some(fault) = &job.fault
        && job.status != JobStatus::Succeeded
    {
        text.push_str(&format!(
            "\nIt failed: could not {} ({}): {}\n  code   {} {}\n",
            safe(&fault.doing),
            safe(&fault.object),
            safe(&fault.cause),
            fault.code,
            safe(&fault.name)
        ));
        if !fault.remedy.is_empty() {
            text.push_str(&format!("  remedy {}\n", safe(&fault.remedy)));
        }
    }
    text
}

/// What is printed after a job that was followed.
pub(in crate::cli) fn ending(detail: &JobDetail) -> String {
    let job = &detail.job;
    let took = std::time::Duration::try_from(job.ended.unwrap_or(job.updated).duration_since(job.requested));
    let took = took.map(|took| format!(" after {}", span(took))).unwrap_or_default();
    let mut text = match job.status {
        JobStatus::Succeeded => format!("job {} succeeded{took}\n", job.short),
        JobStatus::RolledBack => format!("job {} failed{took}; what it had done is undone\n", job.short),
        JobStatus::Cancelled => {
            format!("job {} was cancelled{took}; what it had done is undone\n", job.short)
        }
        JobStatus::Refused => format!("job {} was refused; nothing was touched\n", job.short),
        JobStatus::Abandoned => format!("job {} was abandoned\n", job.short),
        other => format!("job {} {}\n", job.short, words(other)),
    };
    if let Some(who) = &detail.cancelled_too_late {
        text.push_str(&format!("{} asked to cancel it when it could only go forward\n", safe(who)));
    }
    for line in &detail.results {
        text.push_str(&format!("  {}\n", safe_lines(line)));
    }
    text.push_str(&trouble(detail));
    text
}

pub(in crate::cli) fn history(rows: &[HistoryRow]) -> String {
    let mut text = String::new();
    for row in rows {
        let at = row.event["at"].as_str().and_then(|at| at.parse().ok()).map(local).unwrap_or_default();
        let body = &row.event["body"];
        let kind = body["type"].as_str().unwrap_or("(unreadable)");
        text.push_str(&format!("{:>5}  {at}  {}{}\n", row.seq, safe(kind), brief(kind, &body["data"])));
    }
    text
}

/// What of an event's data a person wants in one line.
fn brief(kind: &str, data: &serde_json::Value) -> String {
    let mut words = Vec::new();
    let mut push = |label: &str, value: &serde_json::Value| {
        let text = match value {
            serde_json::Value::Null => return,
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        words.push(if label.is_empty() { safe(&text) } else { format!("{label} {}", safe(&text)) });
    };
    match kind {
        "job_requested" => {
            push("", &data["workflow"]);
            push("of", &data["subject"]["label"]);
            push("by", &data["by"]["who"]);
            push("because", &data["by"]["why"]);
        }
        "job_planned" => push("", &data["title"]),
        "job_refused" => push("", &data["cause"]),
        "cancel_requested" | "resume_requested" => push("by", &data["who"]),
        "intervened" => {
            push("", &data["act"]);
            push("", &data["outcome"]);
        }
        "seen" => {
            push("", &data["backup"]);
            push("of", &data["domain"]);
            push("in", &data["folder"]);
        }
        "protected" | "unprotected" | "deleted" | "forgotten" => {
            push("", &data["backup"]);
            push("by job", &data["job"]);
            push("by", &data["by"]["who"]);
            push("until", &data["until"]);
            push("because", &data["by"]["why"]);
        }
        "rebuilt" => {
            push("by", &data["by"]["who"]);
            push("because", &data["by"]["why"]);
            push("found", &data["report"]["found"]);
        }
        _ => {
            push("", &data["step"]);
            push("", &data["before"]);
            if data["phase"] == "undo" {
                push("", &data["phase"]);
            }
            if data["attempt"].as_u64().is_some_and(|attempt| attempt > 1) {
                push("attempt", &data["attempt"]);
            }
            push("", &data["verdict"]["verdict"]);
            push("", &data["fault"]["cause"]);
            push("differs:", &data["difference"]);
            push("by", &data["by"]["who"]);
        }
    }
    if words.is_empty() { String::new() } else { format!("  {}", words.join(", ")) }
}

pub(in crate::cli) fn explanation(story: &Explanation) -> String {
    let mut text = String::new();
    for line in &story.lines {
        text.push_str(&format!("{}  {}\n", local(line.at), safe(&line.text)));
    }
    if !story.summary.is_empty() {
        text.push('\n');
        for line in &story.summary {
            text.push_str(&format!("{}\n", safe(line)));
        }
    }
    text
}

pub(in crate::cli) fn plan(plan: &Plan) -> String {
    let mut text = format!("{}\nNothing was changed. The steps would be:\n", safe(&plan.title));
    let steps: Vec<Vec<String>> = plan
        .steps
        .iter()
        .map(|step| {
            let mut notes = Vec::new();
            if !step.after.is_empty() {
                let after: Vec<String> = step.after.iter().map(|name| safe(name.as_str())).collect();
                notes.push(format!("after {}", after.join(", ")));
            }
            if plan.point_of_no_return.as_ref() == Some(&step.name) {
                notes.push("point of no return".to_owned());
            }
            let phase = step.stage.as_deref().map(safe).unwrap_or_default();
            vec![format!("  {}", safe(step.name.as_str())), phase, safe(&step.title), notes.join("; ")]
        })
        .collect();
    text.push_str(&table(&steps));
    text
}

pub(in crate::cli) fn replayed(all: &[Replayed]) -> String {
    let mut text = String::new();
    for one in all {
        text.push_str(&format!(
            "job {}: {} events folded, all {} decisions taken again and the same; {}\n",
            safe(&one.job),
            one.events,
            one.decisions,
            words(one.status)
        ));
    }
    text
}
