//! The order for a restore from a vault.

use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::restore::from_vault::{VaultRestoreOptions, workflow};
use vmkeep_steps::vaults::Vaults;
use vmkeep_vault::backups::Backups;
use vmkeep_workflow::{Fault, Subject, WorkflowName};

use super::Order;
use super::orders::{json, limits, new_uuid, places, usage};
use crate::api::types::{ImageFormat, RestoreRequest};
use crate::codes;
use crate::config::Config;
use crate::vaults::{fault, named};

const DOING: &str = "find the backup";

/// The order. Which backup a word means is found out here, so that the journal says it.
pub(super) async fn restore(
    config: &Config,
    vaults: &dyn Vaults,
    vault: &str,
    request: &RestoreRequest,
    key: Option<&str>,
) -> Result<Order, Fault> {
    let (folder, disks) = places(config, request)?;
    if request.backup.is_empty() || request.from.is_some() {
        return Err(usage(
            "a backup in a vault is named by its id",
            "`vmkeep vault list VAULT` shows the ids",
        ));
    }
    let opened = vaults.open(vault).await?;
    let all = Box::pin(Backups::load(&opened.vault, None)).await;
    let all = all.map_err(|error| fault(DOING, &vault, &error))?;
    let backup = named::backup(&all, &request.backup, false)?;
    let Some(found) = all.get(backup) else {
        return Err(Fault::permanent(codes::NO_SUCH_BACKUP, DOING, backup.to_string(), "it is gone"));
    };
    let options = VaultRestoreOptions {
        vault: vault.to_owned(),
        backup,
        domain: found.domain,
        unchecked: request.unchecked,
        trusted: request.trust_definition,
        name: request.name.clone(),
        folder: Some(folder.clone()),
        disks,
        format: match request.format.unwrap_or_default() {
            ImageFormat::Raw => Format::Raw,
            ImageFormat::Qcow2 => Format::Qcow2,
        },
        then: super::exchange::then(request.start),
        connect: request.connect,
        autostart: request.autostart,
        bandwidth: request.bandwidth.unwrap_or(config.limits.bandwidth),
    };
    Ok(Order {
        workflow: WorkflowName::from(workflow::NAME),
        subject: Subject { id: new_uuid(key).to_string(), label: request.name.clone() },
        options: json(&options)?,
        limits: limits(config, &folder),
    })
}

/// Refuses what only a restore from a vault can be told.
pub(super) fn none_of(request: &RestoreRequest) -> Result<(), Fault> {
    if request.unchecked || request.format.is_some() {
        return Err(usage(
            "`unchecked` and `format` are about a backup in a vault",
            "Name the vault: `--vault NAME`",
        ));
    }
    Ok(())
}
