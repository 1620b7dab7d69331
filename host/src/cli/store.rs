//! The files of the journal, without a daemon.

use vmkeep_store::EngineName;
use vmkeep_workflow::Fault;

use super::args::Global;
use super::{Out, config, show};

pub(super) async fn info(global: &Global, out: &Out) -> Result<(), Fault> {
    let info = crate::store::info(&config(global)?).await?;
    out.show(&info, show::store)
}

pub(super) async fn migrate(global: &Global, out: &Out, to: EngineName, dry_run: bool) -> Result<(), Fault> {
    let migrated = crate::store::migrate(&config(global)?, to, dry_run).await?;
    out.show(&migrated, show::migrated)
}
