//! The vaults of this host, as the steps see them: by name, opened by whoever keeps their addresses and keys.

use std::path::PathBuf;

use async_trait::async_trait;
use vmkeep_vault::lease::Holder;
use vmkeep_vault::vault::Vault;
use vmkeep_workflow::Fault;

mod fault;
pub mod files;
pub mod onto;
pub mod read_back;

pub use fault::{backend_fault, fault};

/// A vault that is open, and what its users need besides.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The vault.
    pub vault: Vault,
    /// A folder for copies of its index.
    pub cache: Option<PathBuf>,
    /// This host.
    pub host: String,
}

impl Opened {
    /// Who uses it, and what for.
    #[must_use]
    pub fn holder(&self, purpose: &str) -> Holder {
        Holder { host: self.host.clone(), purpose: purpose.to_owned(), collects: false }
    }
}

/// Who opens vaults.
#[async_trait]
pub trait Vaults: Send + Sync + 'static {
    /// Opens the vault of that name. Cheap if it is open already, and its address still leads to it.
    ///
    /// # Errors
    /// If there is none of that name, or it cannot be opened.
    async fn open(&self, name: &str) -> Result<Opened, Fault>;

    /// The name of the vault whose id begins with these digits, if this host knows it. No vault is opened.
    async fn known_as(&self, beginning: &str) -> Option<String> {
        let _ = beginning;
        None
    }
}

/// A host without vaults.
#[derive(Clone, Copy, Debug)]
pub struct NoVaults;

#[async_trait]
impl Vaults for NoVaults {
    async fn open(&self, name: &str) -> Result<Opened, Fault> {
        let cause = "this host has no vaults";
        Err(Fault::permanent(crate::codes::CANNOT_FIND_CONFIGURATION_ENTRY, "open the vault", name, cause))
    }
}
