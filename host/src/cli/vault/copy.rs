//! Copying backups into another vault.

use std::sync::Arc;

use async_trait::async_trait;
use vmkeep_vault::copy::{self, Choice, Fate, Options, Progress};
use vmkeep_vault::ids::{BackupId, LeaseId};
use vmkeep_vault::write::Written;
use vmkeep_workflow::Fault;

use super::look::status;
use super::{Opened, holder, open, open_other};
use crate::cli::args::{Global, VaultCopy};
use crate::cli::show::vault as show;
use crate::cli::{Ended, Out};
use crate::codes;
use crate::text::{bytes, safe};
use crate::vaults::named;
use crate::vaults::types::FateRow;

/// Says on standard error how far it is: a line for each disk and backup, so that a log stays a log.
struct Lines;

#[async_trait]
impl Progress for Lines {
    async fn begun(&self, backup: BackupId, _: LeaseId) -> std::io::Result<()> {
        eprintln!("{backup}");
        Ok(())
    }

    async fn written(&self, _: BackupId, image: &str, written: &Written) -> std::io::Result<()> {
        let (read, stored) = (bytes(written.read), bytes(written.stored));
        eprintln!("  {}  {read} read, {stored} put", safe(image));
        Ok(())
    }

    async fn done(&self, backup: BackupId, fate: &Fate) -> std::io::Result<()> {
        match fate {
            Fate::Copied(_) => eprintln!("  copied"),
            Fate::Already => eprintln!("{backup}\n  is there already"),
            Fate::Refused(refusal) => eprintln!("{backup}\n  not copied: {}", safe(&refusal.to_string())),
        }
        Ok(())
    }
}

pub(super) async fn copy(global: &Global, out: &Out, args: &VaultCopy) -> Ended {
    let from = open(global, &args.vault).await?;
    let to = open_other(global, &args.to, &args.other).await?;
    let all = from.backups().await?;
    let choices = if let Some(domain) = &args.domain {
        named::domains(&all, domain)?.into_iter().map(Choice::Domain).collect()
    } else if args.backups.is_empty() {
        vec![Choice::All]
    } else {
        let ids = args.backups.iter().map(|word| named::backup(&all, word, false));
        vec![Choice::Backups(ids.collect::<Result<_, _>>()?)]
    };
    let mut rows = Vec::new();
    for choice in choices {
        rows.extend(one(&from, &to, &choice, out, args.allow_plain).await?);
    }
    out.show(&rows, |rows| show::copied(rows))?;
    let refused = rows.iter().any(|row| row.fate == "refused");
    Ok(if refused { status(codes::VAULT_COPY_REFUSED) } else { 0 })
}

async fn one(
    from: &Opened,
    to: &Opened,
    choice: &Choice,
    out: &Out,
    allow_plain: bool,
) -> Result<Vec<FateRow>, Fault> {
    let options = Options {
        holder: holder("copy"),
        from_folder: Some(from.cache()),
        to_folder: Some(to.cache()),
        allow_plain,
        ..Options::default()
    };
    let options = if out.json { options } else { Options { progress: Arc::new(Lines), ..options } };
    let copied = Box::pin(copy::copy(&from.vault, &to.vault, choice, options)).await;
    let report = copied.map_err(|error| {
        let object = format!("{} to {}", from.settings, to.settings);
        crate::vaults::fault("copy backups", &object, &error)
    })?;
    Ok(FateRow::all(&report))
}
