//! Words of `vmkeep --offline`: what can be done on a host that has nothing but the address of a vault and its key.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::vault::{OpenBy, VaultRef};
use crate::api::types::ImageFormat;

/// A vault that is named by an option.
#[derive(Clone, Debug, Args)]
pub struct OfflineVault {
    /// The vault: its name in the configuration, or its address: file:///srv/vault
    #[arg(long, value_name = "VAULT")]
    pub vault: String,
    /// What opens it.
    #[command(flatten)]
    pub key: OpenBy,
}

impl From<OfflineVault> for VaultRef {
    fn from(named: OfflineVault) -> Self {
        Self { vault: named.vault, key: named.key }
    }
}

/// Without vmkeepd, on a host that may have nothing but a vault's address and its key.
#[derive(Clone, Debug, Subcommand)]
pub enum Offline {
    /// The backups in a vault
    List {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: OfflineVault,
        /// Only those of this domain: its name or UUID
        domain: Option<String>,
    },
    /// Read every byte of a vault, and find out whether its backups are whole
    Verify {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: OfflineVault,
        /// Only look whether all that backups need is there
        #[arg(long)]
        quick: bool,
    },
    /// Bring a backup back as a new domain: its disks and state into a folder, its definition beside them
    Restore(OfflineRestore),
}

/// Bring a backup back without a daemon.
#[derive(Clone, Debug, Args)]
pub struct OfflineRestore {
    /// Its id, or the beginning or the end of it
    pub backup: String,
    /// Which vault, and what opens it.
    #[command(flatten)]
    pub vault: OfflineVault,
    /// The name of the new domain
    #[arg(long = "as", value_name = "NAME")]
    pub name: String,
    /// The folder that all goes to: a new one or an empty one (default: one of that name where restored images go)
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Only these disks, by target: vda,vdb
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    pub disks: Vec<String>,
    /// What the new images are (default: what the original ones were)
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<ImageFormat>,
    /// Also a backup that is unchecked, to be pruned, or known to be damaged
    #[arg(long)]
    pub unchecked: bool,
    /// Use a definition from a vault without encryption although it reaches into this host (read it first!)
    #[arg(long)]
    pub trust_definition: bool,
    /// Let its network links be up from the start (the original may be running!)
    #[arg(long)]
    pub connect: bool,
    /// Define the domain at this hypervisor: qemu:///system (default: its definition is only written)
    #[arg(long, value_name = "URI")]
    pub define: Option<String>,
}
