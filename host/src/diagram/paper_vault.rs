//! A vault that exists on paper: one backup of two disks that hold nothing, in memory.

use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use vmkeep_steps::vaults::{Opened, Vaults};
use vmkeep_vault::backend::memory::Memory;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_vault::manifest::Disk;
use vmkeep_vault::vault::{Draft, Vault};
use vmkeep_vault::write::{Extent, Options, Parts, Readiness, Session};
use vmkeep_workflow::Fault;

/// The vault, and its backup.
pub(super) struct PaperVault {
    vault: Vault,
    pub(super) backup: BackupId,
}

impl PaperVault {
    /// With a backup of a domain that has disks of this size.
    pub(super) async fn new(domain: DomainId, name: &str, size: u64) -> Result<Self, VaultError> {
        let draft = Draft::encrypted(false)?;
        let confirmed = draft.confirm(&draft.recovery_words()?)?;
        let vault = confirmed.put(Arc::new(Memory::default()), None).await?;
        let mut session = Box::pin(Session::begin(&vault, domain, Options::default())).await?;
        let backup = BackupId::now();
        let mut manifest = session.manifest(backup, Timestamp::UNIX_EPOCH);
        for target in ["vda", "vdb"] {
            let source = &mut Parts::new(vec![Extent::Zero(size)]);
            let written = Box::pin(session.write_image(source, size, BlobType::Data, None)).await?;
            manifest.disks.push(Disk {
                target: target.to_owned(),
                image: written.image,
                source_format: "raw".to_owned(),
                dirty: 0,
                stored: 0,
                whole: None,
                whole_because: None,
                unchanged_since: None,
                bitmap: false,
                files: Vec::new(),
            });
        }
        name.clone_into(&mut manifest.domain_name);
        "<domain/>".clone_into(&mut manifest.definition);
        match Box::pin(session.prepare(&manifest)).await? {
            Readiness::Ready(prepared) => drop(session.commit(&prepared).await?),
            _ => return Err(VaultError::Contract("a backup on paper was not ready".to_owned())),
        }
        session.end().await?;
        Ok(Self { vault, backup })
    }
}

#[async_trait]
impl Vaults for PaperVault {
    async fn open(&self, _: &str) -> Result<Opened, Fault> {
        Ok(Opened { vault: self.vault.clone(), cache: None, host: String::new() })
    }
}
