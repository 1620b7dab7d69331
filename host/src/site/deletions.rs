//! Orders that remove backups: what somebody chose, and what a rule chooses.

use std::collections::BTreeMap;

use vmkeep_steps::deletion::workflow::{DELETE, PRUNE};
use vmkeep_steps::deletion::{DeleteOptions, PruneOptions};
use vmkeep_workflow::{Fault, Subject, WorkflowName};

use super::Order;
use super::backups::Backup;
use super::orders::{json, usage};
use crate::api::prefix;
use crate::catalogue::View;
use crate::codes;

/// An order per domain.
pub(super) fn delete(found: Vec<Backup>, last_copy: bool) -> Result<Vec<Order>, Fault> {
    let mut domains: BTreeMap<uuid::Uuid, Vec<Backup>> = BTreeMap::new();
    for one in found {
        domains.entry(one.stored.manifest.domain.uuid).or_default().push(one);
    }
    if domains.is_empty() {
        return Err(usage("no backup was named", "Name at least one: vmkeep list"));
    }
    let order = |(id, backups): (uuid::Uuid, Vec<Backup>)| {
        let options = DeleteOptions { backups: backups.iter().map(Backup::chosen).collect(), last_copy };
        let label = backups.first().map(|one| one.stored.manifest.domain.name.clone()).unwrap_or_default();
        Ok(Order {
            workflow: WorkflowName::from(DELETE),
            subject: Subject { id: id.to_string(), label },
            options: json(&options)?,
            limits: Vec::new(),
        })
    };
    domains.into_iter().map(order).collect()
}

/// An order for one domain, or for every domain that has backups.
pub(super) fn prune(
    view: &View,
    domain: Option<&str>,
    keep: u32,
    bandwidth: u64,
) -> Result<Vec<Order>, Fault> {
    if keep == 0 {
        return Err(usage(
            "keeping none is not a rule",
            "Keep at least one; `vmkeep delete --last-copy` deletes the last",
        ));
    }
    // The newest name of each domain: it may have been renamed since.
    let mut domains: BTreeMap<String, String> = BTreeMap::new();
    for one in view.backups.iter().rev() {
        let wanted =
            domain.is_none_or(|domain| domain == one.place.domain || domain == one.place.domain_uuid);
        if wanted {
            domains.insert(one.place.domain_uuid.clone(), one.place.domain.clone());
        }
    }
    if let Some(domain) = domain {
        if domains.is_empty() {
            let cause = "there is no backup of a domain of that name or UUID";
            return Err(Fault::permanent(codes::CANNOT_FIND_MACHINE, "find the domain", domain, cause)
                .remedy("List the backups: vmkeep list"));
        }
        if domains.len() > 1 {
            let shown: Vec<String> = domains.into_keys().collect();
            return Err(prefix::ambiguous("find the domain", domain, &shown));
        }
    }
    let order = |(id, label)| {
        Ok(Order {
            workflow: WorkflowName::from(PRUNE),
            subject: Subject { id, label },
            options: json(&PruneOptions { keep, successor: None, bandwidth })?,
            limits: Vec::new(),
        })
    };
    domains.into_iter().map(order).collect()
}
