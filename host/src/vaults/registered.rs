//! Which vault is meant: one of the configuration's by its name, or any by its address.

use std::str::FromStr;

use vmkeep_vault::backend::Address;
use vmkeep_workflow::Fault;

use crate::codes;
use crate::config::{Config, VaultName, VaultSettings};
use crate::text::safe;

/// The settings of the vault that a word names. An address that the configuration has under a name is that vault, with all
/// that is configured for it.
///
/// # Errors
/// If there is none of that name, or it is no address.
pub fn find(config: &Config, word: &str) -> Result<VaultSettings, Fault> {
    if word.contains(':') {
        // Not repeated: there may be a password in it.
        let url = Address::from_str(word).map_err(|error| {
            Fault::permanent(codes::USAGE, "understand the vault's address", "", &error).remedy(error.remedy)
        })?;
        let known = config.vaults.values().find(|vault| vault.url == url);
        return Ok(known.cloned().unwrap_or_else(|| VaultSettings::at(url)));
    }
    let found = word.parse::<VaultName>().ok().and_then(|name| config.vaults.get(&name));
    found.cloned().ok_or_else(|| {
        let names: Vec<&str> = config.vaults.keys().map(VaultName::as_str).collect();
        let (cause, known) = match names.as_slice() {
            [] => ("the configuration names no vault", "none".to_owned()),
            names => ("the configuration names no vault of that name", names.join(", ")),
        };
        Fault::permanent(codes::CANNOT_FIND_CONFIGURATION_ENTRY, "find the vault", safe(word), cause).remedy(
            format!(
                "Name one of those in the configuration (now: {known}), add a table [vaults.NAME] with its url, or \
                 give an address such as file:///srv/vault"
            ),
        )
    })
}
