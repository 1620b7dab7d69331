//! The vaults of this host: the one place where they are opened, by the command line and by the daemon alike.
//!
//! A vault is reached by its name in the configuration, or by its address. What this host has learnt about one when it was
//! attached lies in `vaults/` of the state folder, in `NAME.json`, or for one without a name in a file after its address: the
//! header and the wrapped keys ([`mod@remembered`]). With it a vault opens although its `keys/` is lost, and one whose header
//! was exchanged is refused before anything of it is believed: a passphrase is not typed into somebody else's vault, and
//! encryption is not turned off by replacing a file. Beside it, in `NAME.cache/`, are copies of the index, which may be
//! removed at any time.
//!
//! What is written there is written when a vault is made or attached, and when its keys change; opening it adds what is
//! missing, and replaces nothing.

pub mod named;
mod registered;
pub mod remembered;
pub mod secrets;
mod service;
pub mod types;

use std::path::Path;

use vmkeep_vault::backend::address;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::keys::wrap::Credential;
use vmkeep_vault::lease::Holder;
use vmkeep_vault::vault::{Remembered, Vault};
use vmkeep_workflow::Fault;

pub use registered::find;
pub use service::HostVaults;
pub use vmkeep_steps::vaults::{backend_fault, fault};

use crate::config::VaultSettings;
use remembered::Memory;

const DOING: &str = "open the vault";

/// Opens a vault, and remembers it if this host does not know it yet. The key is the one that is given, or else the one in the
/// file that the settings name, or none.
///
/// # Errors
/// If the place cannot be reached or holds no vault; if it is not the vault that this host knows; if the key is missing,
/// wrong, or in a file that others may read; if it is of a newer release; or if what must be remembered cannot be written.
pub async fn open(
    settings: &VaultSettings,
    state_dir: &Path,
    credential: Option<Credential>,
) -> Result<Vault, Fault> {
    open_asking(settings, state_dir, credential, async || Ok(None)).await
}

/// The same, asking for the key when the vault turns out to need one and none is known. The question comes only once it is
/// the vault that this host knows.
///
/// # Errors
/// As [`open`], or why nobody could be asked.
pub async fn open_asking(
    settings: &VaultSettings,
    state_dir: &Path,
    credential: Option<Credential>,
    ask: impl AsyncFnOnce() -> Result<Option<Credential>, Fault>,
) -> Result<Vault, Fault> {
    let failed = |error: VaultError| fault(DOING, settings, &error);
    let credential = credential_of(settings, credential)?;
    let memory = Memory::of(settings, state_dir);
    let known = memory.load()?;
    let vault = match attach(settings, credential, known.as_ref()).await {
        Err(error @ VaultError::KeyNeeded { .. }) => match ask().await? {
            Some(typed) => attach(settings, Some(typed), known.as_ref()).await.map_err(failed)?,
            None => return Err(failed(error)),
        },
        attached => attached.map_err(failed)?,
    };
    if known.is_none() {
        memory.keep_new(&remember(settings, &vault).await?)?;
    }
    memory.prepare_cache();
    Ok(vault)
}

/// The key that was given, or else the one in the file that the settings name.
///
/// # Errors
/// If that file cannot be used.
pub fn credential_of(
    settings: &VaultSettings,
    given: Option<Credential>,
) -> Result<Option<Credential>, Fault> {
    match (given, &settings.key) {
        (Some(given), _) => Ok(Some(given)),
        (None, Some(source)) => secrets::of(source).map(Some),
        (None, None) => Ok(None),
    }
}

/// Keeps what is to be remembered of a vault that this host has made.
///
/// # Errors
/// If its keys cannot be read, or what must be remembered cannot be written.
pub async fn learn(settings: &VaultSettings, state_dir: &Path, vault: &Vault) -> Result<(), Fault> {
    let known = remember(settings, vault).await?;
    Memory::of(settings, state_dir).keep_new(&known)
}

/// Learns anew what is to be remembered of a vault that is open: after its keys have changed, or because an operator asks.
///
/// # Errors
/// If its keys cannot be read, or what must be remembered cannot be written.
pub async fn refresh(settings: &VaultSettings, state_dir: &Path, vault: &Vault) -> Result<(), Fault> {
    let known = remember(settings, vault).await?;
    Memory::of(settings, state_dir).replace(&known)
}

async fn attach(
    settings: &VaultSettings,
    credential: Option<Credential>,
    known: Option<&Remembered>,
) -> Result<Vault, VaultError> {
    let backend = address::open(&settings.url, &settings.options(false)).await?;
    Box::pin(Vault::attach(backend, credential, known)).await
}

async fn remember(settings: &VaultSettings, vault: &Vault) -> Result<Remembered, Fault> {
    vault.remember().await.map_err(|error| fault("read the vault's keys", settings, &error))
}

/// Who this host is, for those who look at a vault's leases and marks.
#[must_use]
pub fn holder(purpose: &str) -> Holder {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Holder { host, purpose: purpose.to_owned(), collects: false }
}

#[cfg(test)]
mod tests;
