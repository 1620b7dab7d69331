//! What jobs have left behind: as findings of the doctor, as orders to take it away, and in the log.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmkeep_steps::hypervisor::LocalStorage;
use vmkeep_steps::reconcile::restores::placed;
use vmkeep_steps::reconcile::workflow::{NAME, RepairOptions};
use vmkeep_steps::reconcile::{Leftover, Look, Owner, What};
use vmkeep_steps::snapshot::World;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{EventStore, Fault, Subject, WorkflowName};

use super::Order;
use super::orders::json;
use crate::api::types::{Finding, Grade};
use crate::codes;
use crate::config::Config;
use crate::hypervisor::Libvirt;

const TOPIC: &str = "leftovers";

/// What there is, by this store's journals.
///
/// # Errors
/// When the store or the hypervisor cannot be asked.
pub(crate) async fn around(
    libvirt: &Libvirt,
    store: &Arc<dyn EventStore>,
    config: &Config,
) -> Result<Vec<Leftover>, Fault> {
    let doing = "look for what jobs have left";
    let mut look = Look {
        store: store.id().to_string(),
        overlays: [&config.snapshot.overlay_dir, &config.backup.scratch_dir]
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
        ram_disk: config.snapshot.ram_disk.clone(),
        roots: config.roots.clone(),
        placed: Vec::new(),
    };
    let world = World { hypervisor: Arc::new(libvirt.clone()), storage: Arc::new(LocalStorage::default()) };
    // Journals last: a job that begins meanwhile would be unknown.
    let before = store.jobs(&JobFilter::default()).await.map_err(|e| e.fault(doing, ""))?;
    let unreachable =
        |e: vmkeep_steps::hypervisor::HvError| e.fault(codes::HYPERVISOR_UNREACHABLE, doing, &config.connect);
    look.placed = placed(&**store, &before).await;
    let found = look.around(&world, &before).await.map_err(unreachable)?;
    let unknown = |owner: &Owner| matches!(owner, Owner::Unknown(_) | Owner::Lost { .. });
    if !found.iter().any(|one| unknown(&one.owner)) {
        return Ok(found);
    }
    let after = store.jobs(&JobFilter::default()).await.map_err(|e| e.fault(doing, ""))?;
    look.placed = placed(&**store, &after).await;
    look.around(&world, &after).await.map_err(unreachable)
}

/// How much it matters.
fn grade(one: &Leftover) -> Grade {
    match (&one.owner, &one.what) {
        (_, What::Unseen { .. }) => Grade::Warning,
        (_, What::Locked(_)) => Grade::Bad,
        (Owner::Open(_) | Owner::NotOurs, _) => Grade::Note,
        // It may be the parent of the next backup, or goes with it.
        (Owner::Unknown(_), What::Checkpoint { .. }) => Grade::Note,
        (Owner::Elsewhere { .. }, What::Pull { .. }) => Grade::Warning,
        (_, What::OnOverlay { .. } | What::Held(_) | What::Pull { .. }) => Grade::Bad,
        _ => Grade::Warning,
    }
}

/// For the doctor.
pub(super) fn findings(found: &[Leftover]) -> Vec<Finding> {
    let finding = |grade, text, remedy| Finding { topic: TOPIC.to_owned(), grade, text, remedy };
    if found.is_empty() {
        return vec![finding(Grade::Good, "no job has left anything behind".to_owned(), String::new())];
    }
    found.iter().map(|one| finding(grade(one), one.words(), one.remedy())).collect()
}

/// For the doctor, when it is not known.
pub(super) fn unknown(fault: &Fault) -> Finding {
    Finding {
        topic: TOPIC.to_owned(),
        grade: Grade::Warning,
        text: format!("what jobs have left is not known: {}", fault.cause),
        remedy: "Ask again when libvirt answers".to_owned(),
    }
}

/// An order per domain.
pub(super) fn orders(found: &[Leftover]) -> Result<Vec<Order>, Fault> {
    let mut domains: BTreeMap<String, (String, RepairOptions)> = BTreeMap::new();
    for (domain, job, sweep) in found.iter().filter_map(Leftover::sweep) {
        let (_, options) =
            domains.entry(domain.id.to_string()).or_insert_with(|| (domain.name, RepairOptions::default()));
        options.leftovers.push((job, sweep));
    }
    let order = |(id, (label, options)): (String, (String, RepairOptions))| {
        Ok(Order {
            workflow: WorkflowName::from(NAME),
            subject: Subject { id, label },
            options: json(&options)?,
            limits: Vec::new(),
        })
    };
    domains.into_iter().map(order).collect()
}

/// Into the log: what no job settles by itself.
pub(crate) fn tell(found: &[Leftover]) {
    for one in found {
        match grade(one) {
            Grade::Bad | Grade::Warning => {
                tracing::warn!(what = one.words(), remedy = one.remedy(), "something is left behind");
            }
            Grade::Good | Grade::Note => tracing::debug!(what = one.words(), "seen"),
        }
    }
}
