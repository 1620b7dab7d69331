//! Requests translated into what the workflows are told.
//!
//! All defaults are filled in here, so that the journal of a job says what was in force when it was asked for, and not
//! what a configuration says today.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use vmkeep_steps::hypervisor::DomainRef;
use vmkeep_steps::snapshot::freeze::FreezePolicy;
use vmkeep_steps::snapshot::memory::IfSlow;
use vmkeep_steps::workflows::snapshot::{self, MemoryOptions, SnapshotOptions};
use vmkeep_workflow::{Fault, Subject, WorkflowName};

use super::Order;
use crate::api::types::{OnBusyMemory, SnapshotRequest};
use crate::codes;
use crate::config::Config;

/// The name of the limit that jobs count against that write below a root.
pub(super) fn limit_name(root: &Path) -> String {
    format!("root {}", root.display())
}

/// The order for a backup.
pub(super) fn snapshot(
    config: &Config,
    request: &SnapshotRequest,
    domain: &DomainRef,
) -> Result<Order, Fault> {
    if request.memory && request.quiesce == Some(true) {
        return Err(usage(
            "--quiesce and memory exclude each other: a guest restored from frozen memory would be frozen",
            "Use --disk-only with --quiesce, or memory without",
        ));
    }
    let target = target(config, request.to.as_deref())?;
    let memory_time = request.memory_time_ms.map_or(config.limits.memory_time, Duration::from_millis);
    let options = SnapshotOptions {
        target: target.clone(),
        memory: request.memory.then(|| MemoryOptions {
            bytes: request.memory_limit.or(config.limits.memory),
            seconds: Some(memory_time.as_secs().max(1)),
            if_slow: match request.on_busy_memory {
                OnBusyMemory::Pause => IfSlow::Pause,
                OnBusyMemory::DiskOnly => IfSlow::DiskOnly,
                OnBusyMemory::Fail => IfSlow::Fail,
            },
        }),
        freeze: match request.quiesce {
            Some(true) => FreezePolicy::Required,
            Some(false) => FreezePolicy::Never,
            None => FreezePolicy::IfPossible,
        },
        disks: request.disks.clone(),
        bandwidth: request.bandwidth.unwrap_or(config.limits.bandwidth),
        merge_bandwidth: 0,
    };
    Ok(Order {
        workflow: WorkflowName::from(snapshot::NAME),
        subject: Subject { id: domain.id.to_string(), label: domain.name.clone() },
        options: json(&options)?,
        limits: limits(config, &target),
    })
}

/// The limits that a job counts against that writes there.
pub(super) fn limits(config: &Config, target: &Path) -> Vec<String> {
    // The deepest root is the one that the target belongs to.
    let root =
        config.roots.iter().filter(|root| target.starts_with(root)).max_by_key(|root| root.as_os_str().len());
    root.map(|root| limit_name(root)).into_iter().collect()
}

fn target(config: &Config, wanted: Option<&Path>) -> Result<PathBuf, Fault> {
    match (wanted, config.roots.first()) {
        // Without the blanks and slashes at its end that a completion leaves.
        (Some(path), _) => Ok(path.components().collect()),
        (None, Some(root)) => Ok(root.clone()),
        (None, None) => Err(usage("no root is configured", "Name one in the configuration: targets.roots")),
    }
}

pub(super) fn json<T: serde::Serialize>(options: &T) -> Result<Value, Fault> {
    serde_json::to_value(options)
        .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "write the options down", "", e))
}

pub(super) fn usage(cause: &str, remedy: &str) -> Fault {
    Fault::permanent(codes::USAGE, "understand the request", "", cause).remedy(remedy)
}
