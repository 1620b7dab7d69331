//! Commands that remove, protect and count backups.

use std::path::PathBuf;

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use vmkeep_workflow::{Fault, JobStatus};

use super::args::{Catalogue, Delete, Doctor, Protect, Prune, Waiting};
use super::make::{folder_or_id, whole};
use super::{Ended, Out, show, wait};
use crate::api::types::{
    Accepted, BackupRow, DeleteRequest, ForgetRequest, HistoryRow, JobDetail, JobRow, ProtectRequest,
    PruneRequest, RebuildRequest, Rebuilt, RepairRequest,
};
use crate::client::Client;
use crate::codes;
use crate::text::safe;

pub(super) async fn delete(client: &Client, out: &Out, args: Delete) -> Ended {
    let request = DeleteRequest {
        backups: args.backups.into_iter().map(folder_or_id).collect::<Result<_, _>>()?,
        last_copy: args.last_copy,
        reason: args.waiting.reason.clone(),
        dry_run: args.waiting.dry_run,
    };
    let accepted = client.post("/v1/backups/delete", &request, args.waiting.key.as_deref()).await?;
    go_on(client, out, &args.waiting, accepted).await
}

pub(super) async fn prune(client: &Client, out: &Out, args: Prune) -> Ended {
    let request = PruneRequest {
        domain: args.domain,
        keep: args.keep,
        reason: args.waiting.reason.clone(),
        dry_run: args.waiting.dry_run,
    };
    let accepted = client.post("/v1/backups/prune", &request, args.waiting.key.as_deref()).await?;
    go_on(client, out, &args.waiting, accepted).await
}

pub(super) async fn repair(client: &Client, out: &Out, args: Doctor) -> Ended {
    let Doctor { no_wait, dry_run, reason, key, repair: _ } = args;
    let waiting = Waiting { no_wait, dry_run, reason, key };
    let request = RepairRequest { reason: waiting.reason.clone(), dry_run };
    let accepted: Vec<Accepted> = client.post("/v1/doctor/repair", &request, waiting.key.as_deref()).await?;
    if accepted.is_empty() {
        out.show(&accepted, |_| {
            "There is nothing that can safely be taken away; `vmkeep doctor` tells the rest.".to_owned()
        })?;
        return Ok(0);
    }
    go_on(client, out, &waiting, accepted).await
}

/// Several plans, or several jobs, one after the other. The exit status is that of the first that did not go well.
async fn go_on(client: &Client, out: &Out, waiting: &Waiting, accepted: Vec<Accepted>) -> Ended {
    let (mut plans, mut jobs) = (Vec::new(), Vec::<JobRow>::new());
    for one in accepted {
        match one {
            Accepted::Plan(plan) => plans.push(*plan),
            Accepted::Job(job) => jobs.push(*job),
        }
    }
    if waiting.dry_run {
        out.show(&plans, |plans| match plans.as_slice() {
            [] => "No backups.".to_owned(),
            plans => plans.iter().map(show::plan).collect::<Vec<_>>().join("\n"),
        })?;
        return Ok(0);
    }
    if waiting.no_wait {
        out.show(&jobs, |jobs| {
            let line = |job: &JobRow| {
                format!("job {} was started; follow it: vmkeep job watch {}", job.short, job.short)
            };
            jobs.iter().map(line).collect::<Vec<_>>().join("\n")
        })?;
        return Ok(0);
    }
    let (mut status, mut ends) = (0, Vec::new());
    for job in &jobs {
        let Some(detail) = wait::to_its_end(client, out, &job.id.to_string(), &job.short).await? else {
            return Ok(super::INTERRUPTED);
        };
        if !out.json {
            out.text(&show::ending(&detail))?;
        }
        if status == 0 {
            status = status_of(&detail);
        }
        ends.push(detail);
    }
    if out.json || ends.is_empty() {
        out.show(&ends, |_| "No backups.".to_owned())?;
    }
    Ok(status)
}

/// A deletion that left something in a folder succeeded, and says so by its exit status.
fn status_of(detail: &JobDetail) -> u8 {
    let left = |step: &crate::api::types::StepRow| {
        let gone = step.output.as_ref().and_then(|output| output["backups"].as_array());
        gone.is_some_and(|gone| {
            gone.iter().any(|one| one["left"].as_array().is_some_and(|left| !left.is_empty()))
        })
    };
    if detail.job.status == JobStatus::Succeeded && detail.steps.iter().any(left) {
        return u8::try_from(codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION.0).unwrap_or(1);
    }
    wait::ending_status(detail)
}

/// Follows what a backup wants to be done with older ones, if it wants anything.
pub(super) async fn follow_up(client: &Client, out: &Out, job: &JobDetail) -> Ended {
    let path = super::job::path(&job.job.id.to_string(), "/follow-up");
    let Some(next): Option<JobRow> = client.post(&path, &serde_json::json!({}), None).await? else {
        return Ok(0);
    };
    let Some(detail) = wait::to_its_end(client, out, &next.id.to_string(), &next.short).await? else {
        return Ok(super::INTERRUPTED);
    };
    let status = status_of(&detail);
    if !out.json {
        out.text(&show::ending(&detail))?;
    } else if status != 0 {
        // The one document of this command is the backup's; what went wrong here belongs to the errors.
        if let Some(fault) = detail.job.fault.clone() {
            out.fault(&Fault::from(fault));
        }
    }
    Ok(status)
}

pub(super) async fn protect(client: &Client, out: &Out, args: Protect, on: bool) -> Result<(), Fault> {
    let dry_run = args.dry_run;
    let request = ProtectRequest {
        backup: folder_or_id(args.backup)?,
        until: args.until,
        reason: args.reason,
        dry_run,
    };
    let verb = if on { "protect" } else { "unprotect" };
    let row: BackupRow = client.post(&format!("/v1/backups/{verb}"), &request, None).await?;
    out.show(&row, |row| match &row.protection {
        _ if dry_run => format!("it would {verb} backup {} of {}", row.short, safe(&row.domain)),
        Some(note) => format!("backup {} is protected: {}", row.short, show::protection(note)),
        None => format!("backup {} is not protected", row.short),
    })
}

pub(super) async fn catalogue(client: &Client, out: &Out, command: Catalogue) -> Result<(), Fault> {
    match command {
        Catalogue::Rebuild { from, reason, dry_run } => {
            let from: Option<PathBuf> = from.as_deref().map(whole).transpose()?;
            let request = RebuildRequest { from, reason, dry_run };
            let report: Rebuilt = client.post("/v1/catalogue/rebuild", &request, None).await?;
            out.show(&report, show::rebuilt)
        }
        Catalogue::Forget { backup, reason, dry_run } => {
            let request = ForgetRequest { backup: backup.clone(), reason, dry_run };
            client.post::<_, ()>("/v1/catalogue/forget", &request, None).await?;
            out.show(&serde_json::json!({ "forgotten": backup, "dry_run": dry_run }), |_| {
                let is = if dry_run { "would be" } else { "is" };
                format!(
                    "backup {} {is} forgotten; its history stays in the catalogue's journal",
                    safe(&backup)
                )
            })
        }
        Catalogue::History => {
            let rows: Vec<HistoryRow> = client.get("/v1/catalogue/history").await?;
            out.show(&rows, |rows| show::history(rows))
        }
    }
}

/// An instant: RFC 3339, or a date, which is meant to its end in this place.
pub(super) fn end_of(text: &str) -> Result<Timestamp, String> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(at);
    }
    let date: Date = text
        .parse()
        .map_err(|_| "it must be a date (2027-01-31) or an instant (2027-01-31T12:00:00Z)".to_owned())?;
    let next = date.tomorrow().map_err(|e| e.to_string())?;
    next.to_zoned(TimeZone::system()).map(|at| at.timestamp()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_meant_to_its_end() {
        let end = end_of("2027-01-31").unwrap();
        let begin = "2027-01-31".parse::<Date>().unwrap().to_zoned(TimeZone::system()).unwrap().timestamp();
        assert!(end.duration_since(begin).as_hours() >= 23, "{end}");
        assert_eq!(end_of("2027-01-31T12:00:00Z").unwrap(), "2027-01-31T12:00:00Z".parse().unwrap());
        assert!(end_of("tomorrow").is_err());
    }
}
