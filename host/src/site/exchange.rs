//! Orders for exchanges of machines, and what is kept aside.

use std::path::PathBuf;
use std::time::Duration;

use vmkeep_steps::inplace::kept::{self, KeptMachine};
use vmkeep_steps::inplace::{self, DiscardOptions, InPlaceOptions, Rest, UndoOptions};
use vmkeep_steps::restore::Then;
use vmkeep_steps::snapshot::Places;
use vmkeep_workflow::{Fault, JobId, Subject, WorkflowName};

use super::Order;
use super::backups::Backup;
use super::orders::{json, limits};
use crate::api::prefix::{self, Found, Shorts};
use crate::api::types::{InPlaceRequest, KeptRow, RestRequest, StartAs, UndoRequest};
use crate::codes;
use crate::config::Config;

pub(super) fn then(start: StartAs) -> Then {
    match start {
        StartAs::Default => Then::Default,
        StartAs::Running => Then::Running,
        StartAs::Paused => Then::Paused,
    }
}

fn rest(request: &RestRequest) -> Rest {
    let given = request.shutdown_ms.map(|ms| Duration::from_millis(ms).as_secs().max(1));
    let seconds = given.unwrap_or(Rest::default().seconds);
    Rest { seconds, destroy: request.destroy, save: request.save_old }
}

/// The order for a restore in place. Its subject is the domain that the backup is of.
pub(super) fn in_place(config: &Config, request: &InPlaceRequest, backup: &Backup) -> Result<Order, Fault> {
    let folder: Option<PathBuf> = request.folder.as_deref().map(super::orders::clean).transpose()?;
    let options = InPlaceOptions {
        backup: backup.path.clone(),
        outside: backup.outside,
        trusted: request.trust_definition,
        disks: request.disks.clone(),
        folder: folder.clone(),
        cold: request.cold,
        definition: request.definition,
        rest: rest(&request.rest),
        then: then(request.start),
        bandwidth: request.bandwidth.unwrap_or(config.limits.bandwidth),
    };
    let domain = &backup.stored.manifest.domain;
    Ok(Order {
        workflow: WorkflowName::from(inplace::workflow::NAME),
        subject: Subject { id: domain.uuid.to_string(), label: domain.name.clone() },
        options: json(&options)?,
        limits: folder.map(|folder| limits(config, &folder)).unwrap_or_default(),
    })
}

fn about(workflow: &'static str, machine: &KeptMachine, options: serde_json::Value) -> Order {
    let domain = &machine.kept.domain;
    Order {
        workflow: WorkflowName::from(workflow),
        subject: Subject { id: domain.id.to_string(), label: domain.name.clone() },
        options,
        limits: Vec::new(),
    }
}

/// The order for bringing a machine back.
pub(super) fn undo(request: &UndoRequest, machine: &KeptMachine) -> Result<Order, Fault> {
    let options = UndoOptions {
        job: machine.kept.job,
        cold: request.cold,
        rest: rest(&request.rest),
        then: then(request.start),
    };
    Ok(about(inplace::undo::NAME, machine, json(&options)?))
}

/// The order for removing a machine.
pub(super) fn discard(machine: &KeptMachine) -> Result<Order, Fault> {
    Ok(about(inplace::discard::NAME, machine, json(&DiscardOptions { job: machine.kept.job })?))
}

/// All machines that are kept. Blocks.
pub(super) fn all(config: &Config, places: &Places) -> (Vec<KeptRow>, Vec<String>) {
    let (found, warnings) = kept::list(places, &config.restore_dir);
    let ids: Vec<JobId> = found.iter().map(|machine| machine.kept.job).collect();
    let shorts = Shorts::of(&ids);
    let row = |machine: KeptMachine| KeptRow {
        job: machine.kept.job.to_string(),
        short: shorts.short(&machine.kept.job),
        domain: machine.kept.domain.name.clone(),
        domain_uuid: machine.kept.domain.id.to_string(),
        at: machine.kept.at,
        because: machine.kept.because.clone(),
        memory: machine.kept.memory,
        images: machine.kept.own_files(),
        folder: machine.folder,
        bytes: machine.bytes,
    };
    (found.into_iter().map(row).collect(), warnings)
}

/// The machine that somebody means, by the beginning of the id of the job that set it aside. Blocks.
pub(super) fn find(config: &Config, places: &Places, wanted: &str) -> Result<KeptMachine, Fault> {
    let doing = "find the machine that is kept aside";
    let (found, _) = kept::list(places, &config.restore_dir);
    let ids: Vec<JobId> = found.iter().map(|machine| machine.kept.job).collect();
    let none = || {
        let cause =
            "nothing is kept aside under that job: it was brought back or discarded, or the restore failed";
        Fault::permanent(codes::CANNOT_WORK_ON_UNDEFINED_OBJECT, doing, wanted, cause)
            .remedy("`vmkeep status` lists what is kept")
    };
    match prefix::find(wanted, &ids) {
        Found::One(id) => found.into_iter().find(|machine| machine.kept.job == id).ok_or_else(none),
        Found::None => Err(none()),
        Found::Many(shown) => Err(prefix::ambiguous(doing, wanted, &shown)),
    }
}
