//! `[vaults.NAME]`: the vaults that this host knows by name, and how each is reached and opened.
//!
//! An address is looked at when the configuration is read, because it must not be found out to be wrong in the night of a
//! backup. Files with secrets are not: they may come with a credential service, and whoever only asks for the status has
//! no business to read them. That none but their owner may is found by whoever opens the vault.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use vmkeep_vault::backend::{Address, Options};

use super::ConfigError;
use super::file::{absolute, impossible};
use super::keep::{self, FileKeep, Keep};

/// The longest name.
const LONGEST: usize = 40;

/// A vault as the file names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileVault {
    /// Where it is: `file:///srv/vault`, `s3://…`, `sftp://…`.
    pub url: Option<String>,
    /// A file whose bytes open it.
    pub key_file: Option<PathBuf>,
    /// A file with the passphrase that opens it.
    pub passphrase_file: Option<PathBuf>,
    /// S3: the keys, in a file as `~/.aws/credentials` is one.
    pub credentials: Option<PathBuf>,
    /// SFTP: the private key to log in with.
    pub identity: Option<PathBuf>,
    /// SFTP: the keys of known hosts.
    pub known_hosts: Option<PathBuf>,
    /// SFTP: `ssh`'s configuration.
    pub ssh_config: Option<PathBuf>,
    /// SFTP: a server that cannot sync will do.
    #[serde(default)]
    pub allow_volatile: bool,
    /// Other hosts use it too.
    #[serde(default)]
    pub several_hosts: bool,
    /// `[vaults.NAME.keep]`
    #[serde(default)]
    pub keep: FileKeep,
}

/// What a vault is called on this host: 1 to 40 small letters, digits and `-`. A file may be named after it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VaultName(String);

impl VaultName {
    /// As it is written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VaultName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Not the name of a vault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a vault's name has 1 to 40 small letters, digits and -")]
pub struct NotAName;

impl FromStr for VaultName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if text.is_empty() || text.len() > LONGEST || !text.bytes().all(fits) {
            return Err(NotAName);
        }
        Ok(Self(text.to_owned()))
    }
}

/// Where the secret lies that opens a vault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A key file. Absolute.
    KeyFile(PathBuf),
    /// A file with the passphrase on its only line. Absolute.
    PassphraseFile(PathBuf),
}

impl KeySource {
    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::KeyFile(path) | Self::PassphraseFile(path) => path,
        }
    }
}

/// A vault, how it is reached, and what opens it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultSettings {
    /// Its name on this host; nothing for one that was given by its address alone.
    pub name: Option<VaultName>,
    /// Where it is.
    pub url: Address,
    /// What opens it, if that lies in a file.
    pub key: Option<KeySource>,
    /// S3: the file of keys. Absolute.
    pub credentials: Option<PathBuf>,
    /// SFTP: the private key. Absolute.
    pub identity: Option<PathBuf>,
    /// SFTP: the keys of known hosts. Absolute.
    pub known_hosts: Option<PathBuf>,
    /// SFTP: `ssh`'s configuration. Absolute.
    pub ssh_config: Option<PathBuf>,
    /// SFTP: a server that cannot sync will do.
    pub allow_volatile: bool,
    /// Other hosts use it too.
    pub several_hosts: bool,
    /// Which backups stay when it is pruned by rules.
    pub keep: Keep,
}

impl VaultSettings {
    /// One that is known by its address alone.
    #[must_use]
    pub fn at(url: Address) -> Self {
        Self {
            name: None,
            url,
            key: None,
            credentials: None,
            identity: None,
            known_hosts: None,
            ssh_config: None,
            allow_volatile: false,
            several_hosts: false,
            keep: Keep::default(),
        }
    }

    /// What the backend is told. With `create`, a folder is made that is not there.
    #[must_use]
    pub fn options(&self, create: bool) -> Options {
        Options {
            credentials: self.credentials.clone(),
            identity: self.identity.clone(),
            known_hosts: self.known_hosts.clone(),
            ssh_config: self.ssh_config.clone(),
            allow_volatile: self.allow_volatile,
            several_hosts: self.several_hosts,
            create,
        }
    }

    /// What people call it: its name, or its address.
    #[must_use]
    pub fn label(&self) -> String {
        self.name.as_ref().map_or_else(|| self.url.to_string(), ToString::to_string)
    }
}

/// By its name, or else its address.
impl fmt::Display for VaultSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label())
    }
}

pub(super) fn resolve(
    file: BTreeMap<String, FileVault>,
) -> Result<BTreeMap<VaultName, VaultSettings>, ConfigError> {
    let mut vaults = BTreeMap::new();
    for (name, vault) in file {
        let name: VaultName = name
            .parse()
            .map_err(|error: NotAName| impossible(&format!("vaults.{name}"), &error.to_string()))?;
        let settings = one(&name, vault)?;
        vaults.insert(name, settings);
    }
    Ok(vaults)
}

fn one(name: &VaultName, file: FileVault) -> Result<VaultSettings, ConfigError> {
    let key = |key: &str| format!("vaults.{name}.{key}");
    let path = |of: &str, path: Option<PathBuf>| path.map(|path| absolute(&key(of), &path)).transpose();
    let url = file.url.ok_or_else(|| ConfigError::Missing(format!("{} is missing", key("url"))))?;
    // What was written is not repeated: there may be a secret in it.
    let url: Address = url.parse().map_err(|error: vmkeep_vault::backend::address::AddressError| {
        impossible(&key("url"), &format!("{error}; {}", error.remedy))
    })?;
    let key = match (path("key_file", file.key_file)?, path("passphrase_file", file.passphrase_file)?) {
        (None, None) => None,
        (Some(path), None) => Some(KeySource::KeyFile(path)),
        (None, Some(path)) => Some(KeySource::PassphraseFile(path)),
        (Some(_), Some(_)) => {
            return Err(impossible(&format!("vaults.{name}"), "key_file or passphrase_file, not both"));
        }
    };
    Ok(VaultSettings {
        name: Some(name.clone()),
        url,
        key,
        credentials: path("credentials", file.credentials)?,
        identity: path("identity", file.identity)?,
        known_hosts: path("known_hosts", file.known_hosts)?,
        ssh_config: path("ssh_config", file.ssh_config)?,
        allow_volatile: file.allow_volatile,
        several_hosts: file.several_hosts,
        keep: keep::resolve(&format!("vaults.{name}.keep"), &file.keep)?,
    })
}
