//! The vaults as jobs use them: by name, opened once.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;
use vmkeep_steps::vaults::{Opened, Vaults};
use vmkeep_vault::vault::Vault;
use vmkeep_workflow::Fault;

use super::remembered::Memory;
use super::{holder, open};
use crate::codes;
use crate::config::{Config, VaultName, VaultSettings};
use crate::text::safe;

/// The vaults of the configuration.
#[derive(Debug)]
pub struct HostVaults {
    settings: BTreeMap<VaultName, VaultSettings>,
    state_dir: PathBuf,
    /// Those that are open. One is opened at a time: that may take a second for a passphrase, and nobody gains by two.
    open: Mutex<HashMap<VaultName, Vault>>,
}

impl HostVaults {
    /// Those that are configured.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self { settings: config.vaults.clone(), state_dir: config.state_dir.clone(), open: Mutex::default() }
    }
}

#[async_trait]
impl Vaults for HostVaults {
    async fn open(&self, name: &str) -> Result<Opened, Fault> {
        let known = name.parse::<VaultName>().ok().and_then(|name| self.settings.get_key_value(&name));
        let Some((key, settings)) = known else {
            let cause = "the configuration names no vault of that name";
            return Err(Fault::permanent(
                codes::CANNOT_FIND_CONFIGURATION_ENTRY,
                "open the vault",
                safe(name),
                cause,
            )
            .remedy("Add a table [vaults.NAME] with its url, and start vmkeepd again"));
        };
        // Asked without the lock: a file system that hangs keeps no other vault waiting.
        let known = self.open.lock().await.get(key).cloned();
        let stands = match &known {
            Some(vault) => vault.backend().stands().await,
            None => false,
        };
        let mut all = self.open.lock().await;
        if !stands
            && let (Some(gone), Some(now)) = (&known, all.get(key))
            && Arc::ptr_eq(gone.backend(), now.backend())
        {
            tracing::warn!(vault = %key, "something else is where the vault was: it is opened anew");
            all.remove(key);
        }
        let vault = match all.get(key) {
            Some(vault) => vault.clone(),
            None => {
                let vault = Box::pin(open(settings, &self.state_dir, None)).await?;
                all.insert(key.clone(), vault.clone());
                vault
            }
        };
        Ok(Opened {
            vault,
            cache: Some(Memory::of(settings, &self.state_dir).cache()),
            host: holder("").host,
        })
    }

    /// By what was learnt of each when it was opened. Two may begin alike: then it is not known which is meant.
    async fn known_as(&self, beginning: &str) -> Option<String> {
        let (settings, state_dir) = (self.settings.clone(), self.state_dir.clone());
        let wanted = beginning.to_owned();
        let found = tokio::task::spawn_blocking(move || {
            let is_it = |settings: &VaultSettings| match Memory::of(settings, &state_dir).load() {
                Ok(Some(known)) => known.id.to_string().starts_with(&wanted),
                _ => false,
            };
            let named = settings.iter().filter(|(_, settings)| is_it(settings));
            named.map(|(name, _)| name.to_string()).collect::<Vec<_>>()
        });
        let mut found = found.await.unwrap_or_default();
        if found.len() == 1 { found.pop() } else { None }
    }
}
