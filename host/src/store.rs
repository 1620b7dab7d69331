//! The store as an administrator meets it: what its errors mean, and what can be done with it while no daemon runs.

use std::path::Path;
use std::sync::Arc;

use vmkeep_store::migrate::{MigrateError, Migrated, migrate as migrate_store};
use vmkeep_store::verify::verify;
use vmkeep_store::{EngineName, Store, StoreConfig, engine_of, open_read_only};
use vmkeep_workflow::Fault;
use vmkeep_workflow::journal::{AppendError, StoreError};

use crate::api::types::{Audited, StoreInfo};
use crate::codes;
use crate::config::Config;
use crate::heads::Witness;

/// An error of the store, with its code.
#[must_use]
pub fn fault(doing: &str, path: &Path, error: &StoreError) -> Fault {
    let fault = error.fault(doing, path.display().to_string());
    match error {
        StoreError::InUse { .. } => {
            fault.remedy("Stop the other vmkeepd, or give this one a state folder of its own: --state-dir")
        }
        StoreError::TooNew { .. } => fault.remedy("Use the newer release; nothing was touched"),
        StoreError::OtherEngine { found, wanted, .. } => Fault::permanent(
            codes::UNSUPPORTED_CONFIGURATION_PARAMETER,
            doing,
            path.display().to_string(),
            error,
        )
        .remedy(format!(
            "Set store.engine = \"{found}\", or move the journal over: `vmkeep store migrate --to {wanted}`"
        )),
        StoreError::Damaged(_) => {
            fault.remedy("Keep the folder as it is, restore a copy of it, and report this")
        }
        _ => fault,
    }
}

/// Opens the store for reading only, whatever engine is configured: the question is what there is.
async fn open_to_read(config: &Config, doing: &str) -> Result<(EngineName, Arc<dyn Store>), Fault> {
    let path = config.store_dir();
    let refuse = |error: StoreError| fault(doing, &path, &error);
    let engine = engine_of(&path).map_err(refuse)?.unwrap_or(config.engine);
    let wanted = StoreConfig { engine, ..config.store() };
    let opened = tokio::task::spawn_blocking(move || open_read_only(&wanted)).await;
    let store = opened.unwrap_or_else(|e| Err(StoreError::Io(e.to_string()))).map_err(refuse)?;
    Ok((engine, store))
}

/// Checks every record of the store without a daemon: one that is damaged may not let any start. The heads were read before.
///
/// # Errors
/// What is wrong with it.
pub async fn audit(config: &Config, heads: Option<&Witness>) -> Result<Audited, Fault> {
    let (_, store) = open_to_read(config, "verify the journal").await?;
    crate::audit::verify_store(&*store, heads).await
}

/// What keeps the journal, and how much is in it. Reads all of it, and changes nothing.
///
/// # Errors
/// When there is no store, or it cannot be read.
pub async fn info(config: &Config) -> Result<StoreInfo, Fault> {
    let doing = "look at the store";
    let (path, (engine, store)) = (config.store_dir(), open_to_read(config, doing).await?);
    let refuse = |error: StoreError| fault(doing, &path, &error);
    let report = verify(&*store).await.map_err(refuse)?;
    Ok(StoreInfo {
        size: size(&path),
        engine: engine.to_string(),
        id: store.id(),
        created: store.created(),
        records: report.records,
        streams: report.streams,
        commits: report.commits,
        jobs: report.jobs,
        pruned: report.pruned.len() as u64,
        head: (report.found == 0).then_some(report.link),
        found: report.found,
        path,
    })
}

/// The bytes of all files below a folder.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => size(&entry.path()),
            _ => entry.metadata().map_or(0, |meta| meta.len()),
        })
        .sum()
}

/// Moves the journal to another engine. No daemon may have it open.
///
/// # Errors
/// When it cannot be moved; it is what it was then.
pub async fn migrate(config: &Config, to: EngineName, dry_run: bool) -> Result<Migrated, Fault> {
    let path = config.store_dir();
    migrate_store(&config.store(), to, dry_run).await.map_err(|error| match &error {
        MigrateError::Store(StoreError::InUse { .. }) => {
            Fault::permanent(codes::STORE_IN_USE, "migrate the store", path.display().to_string(), &error)
                .remedy("Stop vmkeepd first; the journal is moved while nobody writes it")
        }
        MigrateError::Store(error) => fault("migrate the store", &path, error),
        other => {
            let (code, remedy) = refusal(other);
            Fault::permanent(code, "migrate the store", path.display().to_string(), other).remedy(remedy)
        }
    })
}

fn refusal(error: &MigrateError) -> (vmkeep_workflow::Code, &'static str) {
    match error {
        MigrateError::Already { .. } | MigrateError::KeepsNothing(_) => {
            (codes::USAGE, "`vmkeep store info` tells what keeps it; nothing was changed")
        }
        MigrateError::Fill { error: AppendError::Full(_), .. } => (
            codes::STORE_RESERVE_SPENT,
            "Make as much room as the store takes, twice, on its file system; nothing was changed",
        ),
        MigrateError::NoExchange(_) => (
            codes::UNSUPPORTED_CONFIGURATION_PARAMETER,
            "Move the state folder to a local file system (ext4, XFS, btrfs); nothing was changed",
        ),
        _ => (codes::STORE_DAMAGED, "Nothing was changed: `vmkeep audit verify` names what is damaged"),
    }
}
