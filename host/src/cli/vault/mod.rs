//! `vmkeep vault`: acts on vaults. They go to the vault itself and need no daemon, for a vault is made for many who use it at
//! once, and a host that has lost everything else has no daemon either.
//!
//! Whoever is interrupted leaves a lease behind, which nobody may end for them: something may still be on its way. So that is
//! said, with the command that gives it up.

mod classic;
mod copy;
pub(super) mod export;
mod import;
pub(super) mod look;
pub(super) mod make;
mod one;
mod plain;
pub(super) mod retain;
mod tarball;
mod target;
pub(super) mod tend;
mod users;

use std::path::PathBuf;

pub(super) use target::refuse_dev;
use vmkeep_vault::backups::Backups;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::BackupId;
use vmkeep_vault::keys::wrap::Credential;
use vmkeep_vault::lease::Holder;
use vmkeep_vault::vault::Vault;
use vmkeep_workflow::Fault;

use super::args::{self, Global, OpenBy, OpenOtherBy, VaultRef};
use super::make::whole;
use super::terminal::Terminal;
use super::{Ended, INTERRUPTED, Out, config};
use crate::config::{Config, KeySource, VaultSettings};
use crate::text::safe;
use crate::vaults::remembered::Memory;
use crate::vaults::{self, named, secrets};

/// Carries a command out, unless it is interrupted.
pub(super) async fn carry_out(command: args::Vault, global: &Global, out: &Out) -> Ended {
    tokio::select! {
        ended = Box::pin(act(command, global, out)) => ended,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("Interrupted. What was put into the vault stays, and is reused.");
            eprintln!("  collections wait a day for this process; to give it up at once:  vmkeep vault leases VAULT");
            Ok(INTERRUPTED)
        }
    }
}

async fn act(command: args::Vault, global: &Global, out: &Out) -> Ended {
    use args::Vault as V;
    match command {
        V::Init(args) => make::init(global, out, args).await?,
        V::Attach { vault, new } => make::attach(global, out, &vault, &new).await?,
        V::Forget { vault } => make::forget(global, out, &vault)?,
        V::Key(command) => make::key(global, out, command).await?,
        V::List { vault, domain } => look::list(global, out, &vault, domain.as_deref()).await?,
        V::Show { vault, backup } => look::show(global, out, &vault, &backup).await?,
        V::Stats { vault } => look::stats(global, out, &vault).await?,
        V::Check(args) => return look::check(global, out, &args).await,
        V::Leases { vault } => look::leases(global, out, &vault).await?,
        V::Revoke { vault, lease } => tend::revoke(global, out, &vault, &lease).await?,
        V::Gc(args) => return tend::gc(global, out, &args).await,
        V::Verify(args) => return look::verify(global, out, &args).await,
        V::Prune(args) if args.backups.is_empty() => return retain::prune(global, out, &args).await,
        V::Prune(args) => return tend::prune(global, out, &args).await,
        V::Protect { vault, backup } => return tend::protect(global, out, &vault, &backup).await,
        V::Unprotect { vault, backup, dry_run } => {
            tend::unprotect(global, out, &vault, &backup, dry_run).await?;
        }
        V::Repair(args) => return tend::repair(global, out, &args).await,
        V::Copy(args) => return copy::copy(global, out, &args).await,
        V::Import(args) => import::import(global, out, &args).await?,
        V::Export(args) => export::export(global, out, &args).await?,
    }
    Ok(0)
}

/// A vault that is open.
pub(super) struct Opened {
    pub(super) settings: VaultSettings,
    pub(super) vault: Vault,
    memory: Memory,
}

impl Opened {
    /// The folder for copies of its index.
    pub(super) fn cache(&self) -> PathBuf {
        self.memory.cache()
    }

    /// An error of the vault.
    pub(super) fn fault(&self, doing: &str, error: &VaultError) -> Fault {
        vaults::fault(doing, &self.settings, error)
    }

    pub(super) async fn backups(&self) -> Result<Backups, Fault> {
        Box::pin(Backups::load(&self.vault, None))
            .await
            .map_err(|error| self.fault("list the backups", &error))
    }

    /// The vault's backups, and the one of them that a word names.
    pub(super) async fn backup(&self, word: &str) -> Result<(Backups, BackupId), Fault> {
        let all = self.backups().await?;
        let id = named::backup(&all, word, false)?;
        Ok((all, id))
    }
}

/// Who this process is, for those who look at the vault's leases.
pub(super) fn holder(purpose: &str) -> Holder {
    vaults::holder(&format!("vmkeep vault {purpose}, process {}", std::process::id()))
}

/// What a vault is reached by, with what the command line says about it.
fn settings(config: &Config, vault: &str, by: &OpenBy) -> Result<VaultSettings, Fault> {
    let mut settings = vaults::find(config, vault)?;
    settings.allow_volatile |= by.allow_volatile;
    if let Some(key) = key_source(by.key_file.as_deref(), by.passphrase_file.as_deref())? {
        settings.key = Some(key);
    }
    Ok(settings)
}

fn key_source(
    key_file: Option<&std::path::Path>,
    passphrase_file: Option<&std::path::Path>,
) -> Result<Option<KeySource>, Fault> {
    Ok(match (key_file, passphrase_file) {
        (Some(path), _) => Some(KeySource::KeyFile(whole(path)?)),
        (None, Some(path)) => Some(KeySource::PassphraseFile(whole(path)?)),
        (None, None) => None,
    })
}

/// The 24 words, if that is what the vault is to be opened with.
async fn recovery(by: &OpenBy, label: &str) -> Result<Option<Credential>, Fault> {
    if let Some(path) = &by.recovery_file {
        return Ok(Some(Credential::Recovery(secrets::text(&whole(path)?)?)));
    }
    if !by.recovery {
        return Ok(None);
    }
    let mut terminal = Terminal::open(label, "Name a file with the 24 words: --recovery-file")?;
    let question = format!("The 24 words of {}:\n", safe(label));
    Ok(Some(Credential::Recovery(terminal.words(&question).await?)))
}

/// Asks for a passphrase at the terminal; nothing if there is none.
async fn passphrase(label: &str) -> Result<Option<Credential>, Fault> {
    let Ok(mut terminal) = Terminal::open(label, "") else { return Ok(None) };
    let typed = terminal.line(&format!("Passphrase of {}: ", safe(label)), true).await?;
    Ok(Some(Credential::Passphrase(typed)))
}

pub(super) async fn open(global: &Global, vault: &VaultRef) -> Result<Opened, Fault> {
    let config = config(global)?;
    let settings = settings(&config, &vault.vault, &vault.key)?;
    let given = recovery(&vault.key, &settings.label()).await?;
    opened(&config, settings, given).await
}

/// The second vault of a command.
async fn open_other(global: &Global, vault: &str, by: &OpenOtherBy) -> Result<Opened, Fault> {
    let config = config(global)?;
    let by = OpenBy {
        key_file: by.other_key_file.clone(),
        passphrase_file: by.other_passphrase_file.clone(),
        ..OpenBy::default()
    };
    let settings = settings(&config, vault, &by)?;
    opened(&config, settings, None).await
}

async fn opened(
    config: &Config,
    settings: VaultSettings,
    given: Option<Credential>,
) -> Result<Opened, Fault> {
    let label = settings.label();
    let ask = async || passphrase(&label).await;
    let vault = Box::pin(vaults::open_asking(&settings, &config.state_dir, given, ask)).await?;
    let memory = Memory::of(&settings, &config.state_dir);
    Ok(Opened { settings, vault, memory })
}
