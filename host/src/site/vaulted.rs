//! What this host has put into vaults, as rows: by the names that the vaults have now.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use vmkeep_steps::vaults::Vaults;
use vmkeep_vault::ids::VaultId;

use crate::api::types::VaultedRow;
use crate::catalogue::Vaulted;

/// By domain and vault.
pub(super) async fn rows(found: Vec<Vaulted>, vaults: &dyn Vaults) -> Vec<VaultedRow> {
    let mut names: HashMap<VaultId, Option<String>> = HashMap::new();
    let mut rows = Vec::with_capacity(found.len());
    for one in found {
        let name = match names.entry(one.vault) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(new) => new.insert(vaults.known_as(&one.vault.to_string()).await).clone(),
        };
        rows.push(VaultedRow {
            domain: one.domain,
            domain_uuid: one.domain_uuid,
            configured: name.is_some(),
            vault: name.unwrap_or(one.vault_name),
            vault_id: one.vault.to_string(),
            id: one.backup.to_string(),
            at: one.at,
            kind: one.kind,
            job: one.job,
        });
    }
    rows.sort_by(|a, b| (&a.domain, &a.domain_uuid, &a.vault).cmp(&(&b.domain, &b.domain_uuid, &b.vault)));
    rows
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use jiff::Timestamp;
    use vmkeep_steps::vaults::Opened;
    use vmkeep_vault::ids::BackupId;
    use vmkeep_vault::manifest::BackupKind;
    use vmkeep_workflow::Fault;

    use super::*;

    struct Renamed;

    #[async_trait]
    impl Vaults for Renamed {
        async fn open(&self, _: &str) -> Result<Opened, Fault> {
            unreachable!("nothing is opened for this")
        }

        async fn known_as(&self, id: &str) -> Option<String> {
            id.starts_with("0101").then(|| "second".to_owned())
        }
    }

    #[tokio::test]
    async fn a_vault_has_its_name_of_now_and_one_that_is_configured_no_more_says_so() {
        let made = |vault: u8| Vaulted {
            vault: VaultId::new([vault; 16]),
            vault_name: "home".into(),
            backup: BackupId::now(),
            kind: BackupKind::Full,
            domain: "web".into(),
            domain_uuid: "u".into(),
            at: Timestamp::UNIX_EPOCH,
            job: "j".into(),
        };
        let rows = rows(vec![made(1), made(2)], &Renamed).await;
        let told: Vec<_> = rows.iter().map(|row| (row.vault.as_str(), row.configured)).collect();
        assert_eq!(told, [("home", false), ("second", true)]);
    }
}
