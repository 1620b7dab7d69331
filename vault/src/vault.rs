//! A vault: how one is made, and how one is attached (`FORMAT.md`, §3 and §4).
//!
//! **Made**: nothing is put before the recovery key has been typed in again. Then the first wrapped key, then the header;
//! then the headers are listed: where two `init` have met, both see two of them, or the later one does, and both vaults are
//! refused from then on. A crash before the header leaves a wrapped key that belongs to nothing.
//!
//! **Attached**: the header is found by listing, never by a guess, so a folder that is not mounted is no empty vault. A host
//! that knew the vault before compares: nobody turns encryption off by replacing a file.

use std::sync::Arc;

use bytes::Bytes;
use zeroize::Zeroizing;

use crate::backend::Backend;
use crate::error::VaultError;
use crate::header::{Cipher, FORMAT, Header};
use crate::ids::{DomainId, KeyId, VaultId, random};
use crate::keys::wrap::{self, Cost, Credential};
use crate::keys::{IdKeys, KeyError, Keys, Role, Root, Secret32, recovery};
use crate::names::ObjectName;
use crate::{codec, envelope};

/// A vault that is open.
#[derive(Clone, Debug)]
pub struct Vault {
    backend: Arc<dyn Backend>,
    header: Header,
    header_bytes: Bytes,
    keys: Arc<Keys>,
}

/// What a host keeps of a vault since it was attached: with it, the vault is opened although `keys/` or the header are lost,
/// and an exchanged one is refused.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Remembered {
    /// The vault.
    pub id: VaultId,
    /// The header, as it was.
    pub header: String,
    /// The wrapped keys that were there.
    pub keys: Vec<(KeyId, Vec<u8>)>,
}

/// A vault that is to be made, and whose recovery key has to be typed in again.
pub struct Draft {
    id: VaultId,
    master: Secret32,
    separate: bool,
}

/// A vault that may be made now.
pub struct Confirmed {
    keys: Keys,
    separate: bool,
}

impl Draft {
    /// An encrypted vault with a new master key. With `separate`, domains share no chunks.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn encrypted(separate: bool) -> Result<Self, VaultError> {
        let mut master = Zeroizing::new([0; 32]);
        random(&mut master[..])?;
        Ok(Self { id: VaultId::random()?, master, separate })
    }

    /// The recovery key, to be shown once.
    ///
    /// # Errors
    /// Never, for a key of its length.
    pub fn recovery_words(&self) -> Result<Zeroizing<String>, VaultError> {
        Ok(recovery::words(&self.master)?)
    }

    /// Takes the recovery key as it was typed in again.
    ///
    /// # Errors
    /// If it is not that one; the draft may be asked again.
    pub fn confirm(&self, typed: &str) -> Result<Confirmed, VaultError> {
        if *recovery::master(typed)? != *self.master {
            return Err(KeyError::Words("these are the words of another vault".into()).into());
        }
        Ok(Confirmed { keys: Keys::new(self.id, Root::Master(self.master.clone())), separate: self.separate })
    }
}

impl Confirmed {
    /// A vault without encryption.
    ///
    /// # Errors
    /// If the kernel has no random bytes.
    pub fn plain(separate: bool) -> Result<Self, VaultError> {
        Ok(Self { keys: Keys::new(VaultId::random()?, Root::None), separate })
    }

    /// Puts the vault there, with a first key to open it. An encrypted vault may be put without one: the recovery key alone
    /// opens it then.
    ///
    /// # Errors
    /// If there is a vault already, or another came there at the same time; or what the backend could not do.
    pub async fn put(
        self,
        backend: Arc<dyn Backend>,
        first: Option<(Credential, Cost, String)>,
    ) -> Result<Vault, VaultError> {
        let found = headers(&*backend).await?;
        if !found.is_empty() {
            return Err(VaultError::Occupied { place: backend.place().to_owned(), found });
        }
        let header = Header::new(&self.keys, self.separate);
        let header_bytes = header.encode(&self.keys)?;
        let vault = Vault { backend, header, header_bytes, keys: Arc::new(self.keys) };
        if let Some((by, cost, label)) = first {
            vault.add_key(by, Role::Full, cost, label).await?;
        }
        let name = ObjectName::Header(vault.id()).to_string();
        vault.backend.put(&name, vault.header_bytes.clone()).await?;
        let found = headers(&*vault.backend).await?;
        if found != [vault.id()] {
            return Err(VaultError::Occupied { place: vault.backend.place().to_owned(), found });
        }
        Ok(vault)
    }
}

/// The vaults whose headers are there, sorted.
pub(crate) async fn headers(backend: &dyn Backend) -> Result<Vec<VaultId>, VaultError> {
    let mut found: Vec<VaultId> = backend
        .list("vault.")
        .await?
        .iter()
        .filter_map(|listed| match listed.name.parse() {
            Ok(ObjectName::Header(vault)) => Some(vault),
            _ => None,
        })
        .collect();
    found.sort_unstable();
    Ok(found)
}

impl Vault {
    /// Opens the vault that is there.
    ///
    /// # Errors
    /// If there is none, or more than one; if it is not the one that is remembered; if the key is missing, wrong, or given
    /// for a vault without encryption; if it is newer than this program; or what the backend could not do.
    pub async fn attach(
        backend: Arc<dyn Backend>,
        by: Option<Credential>,
        remembered: Option<&Remembered>,
    ) -> Result<Self, VaultError> {
        let id = match headers(&*backend).await?.as_slice() {
            [] => return Err(VaultError::NoVault { place: backend.place().to_owned() }),
            [one] => *one,
            many => {
                return Err(VaultError::Occupied { place: backend.place().to_owned(), found: many.to_vec() });
            }
        };
        let name = ObjectName::Header(id);
        let header_bytes = backend
            .get(&name.to_string(), None)
            .await?
            .ok_or_else(|| VaultError::Missing { object: name.to_string() })?;
        // Before anything of it is believed.
        if remembered.is_some_and(|known| known.id != id || known.header.as_bytes() != header_bytes) {
            return Err(VaultError::HeaderChanged { vault: id });
        }
        let header = Header::decode(&name, &header_bytes)?;
        let keys = match (header.cipher, by) {
            (Cipher::None, None) => Keys::new(id, Root::None),
            (Cipher::None, Some(_)) => return Err(VaultError::NotEncrypted { vault: id }),
            (Cipher::XChaCha20Poly1305, None) => return Err(VaultError::KeyNeeded { vault: id }),
            (Cipher::XChaCha20Poly1305, Some(by)) => unlock(&*backend, id, by, remembered).await?,
        };
        header.check(&header_bytes, &keys)?;
        let keys = Arc::new(keys.with_verifier(header.public()));
        Ok(Self { backend, header, header_bytes, keys })
    }

    /// The vault.
    #[must_use]
    pub fn id(&self) -> VaultId {
        self.header.id
    }

    /// Its header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The header's bytes.
    #[must_use]
    pub fn header_bytes(&self) -> &Bytes {
        &self.header_bytes
    }

    /// Its keys.
    #[must_use]
    pub fn keys(&self) -> &Arc<Keys> {
        &self.keys
    }

    /// The keys that make the ids of a domain's blobs.
    #[must_use]
    pub fn ids(&self, domain: DomainId) -> IdKeys {
        self.keys.ids(self.header.separate.then_some(domain))
    }

    /// Where it is.
    #[must_use]
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// Whether this program may write to it.
    ///
    /// # Errors
    /// If the vault asks for a newer one.
    pub fn writable(&self) -> Result<(), VaultError> {
        if self.header.min_writer > FORMAT {
            let cause = format!("it asks writers for format {}, known is {FORMAT}", self.header.min_writer);
            return Err(VaultError::ReadOnly { vault: self.id(), cause });
        }
        Ok(())
    }

    /// What a host should keep of it.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn remember(&self) -> Result<Remembered, VaultError> {
        let mut keys = Vec::new();
        for (id, object) in wrapped(&*self.backend).await? {
            keys.push((id, object.to_vec()));
        }
        let header = String::from_utf8_lossy(&self.header_bytes).into_owned();
        Ok(Remembered { id: self.id(), header, keys })
    }

    /// Wraps the key once more, for another passphrase or key file; a host that should not be able to prune gets
    /// [`Role::Writer`].
    ///
    /// # Errors
    /// If this key may not, a limit is not kept, or what the backend could not do.
    pub async fn add_key(
        &self,
        by: Credential,
        role: Role,
        cost: Cost,
        label: String,
    ) -> Result<KeyId, VaultError> {
        let id = KeyId::random()?;
        let name = ObjectName::Key(id);
        let (keys, wrapped_name) = (self.keys.clone(), name.clone());
        let work = move || wrap::wrap(&keys, &wrapped_name, &by, role, cost, &label);
        let body = crate::tasks::blocking(work).await??;
        self.put(&name, envelope::wrap(&name, true, &body)).await?;
        Ok(id)
    }

    /// The wrapped keys, with what they say of themselves; those that are damaged with the cause.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn wrapped_keys(&self) -> Result<Vec<(KeyId, Result<wrap::Label, VaultError>)>, VaultError> {
        let read = |(id, object): (KeyId, Bytes)| {
            let name = ObjectName::Key(id);
            let said = envelope::unwrap(&name, true, &object)
                .map_err(|error| codec::wrong(&name, error))
                .and_then(|body| Ok(wrap::label(&body)?));
            (id, said)
        };
        Ok(wrapped(&*self.backend).await?.into_iter().map(read).collect())
    }

    /// Takes a wrapped key away. Whoever kept a copy of it, or the master key, is not locked out by that.
    ///
    /// # Errors
    /// What the backend could not do.
    pub async fn remove_key(&self, key: KeyId) -> Result<(), VaultError> {
        Ok(self.backend.delete(&ObjectName::Key(key).to_string()).await?)
    }

    /// The same vault, reached in another way.
    #[cfg(test)]
    pub(crate) fn by(&self, backend: Arc<dyn Backend>) -> Self {
        Self { backend, ..self.clone() }
    }

    /// Puts an object.
    pub(crate) async fn put(&self, name: &ObjectName, object: Bytes) -> Result<(), VaultError> {
        Ok(self.backend.put(&name.to_string(), object).await?)
    }

    /// An object; nothing if it certainly is not there.
    pub(crate) async fn get(&self, name: &ObjectName) -> Result<Option<Bytes>, VaultError> {
        Ok(self.backend.get(&name.to_string(), None).await?)
    }

    /// All objects of ours under a prefix, with their sizes; names of others are ignored.
    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<(ObjectName, u64)>, VaultError> {
        let listed = self.backend.list(prefix).await?;
        Ok(listed.iter().filter_map(|one| Some((one.name.parse().ok()?, one.size))).collect())
    }
}

async fn wrapped(backend: &dyn Backend) -> Result<Vec<(KeyId, Bytes)>, VaultError> {
    let mut found = Vec::new();
    for listed in backend.list("keys/").await? {
        if let Ok(ObjectName::Key(id)) = listed.name.parse()
            && let Some(object) = backend.get(&listed.name, None).await?
        {
            found.push((id, object));
        }
    }
    Ok(found)
}

/// The keys that a credential opens: by those in the vault, or by those that the host remembers.
pub(crate) async fn unlock(
    backend: &dyn Backend,
    vault: VaultId,
    by: Credential,
    remembered: Option<&Remembered>,
) -> Result<Keys, VaultError> {
    if let Credential::Recovery(words) = &by {
        return Ok(Keys::new(vault, Root::Master(recovery::master(words)?)));
    }
    let known = remembered.map(|known| known.keys.clone()).unwrap_or_default();
    let mut candidates: Vec<(KeyId, Bytes)> =
        known.into_iter().map(|(id, object)| (id, Bytes::from(object))).collect();
    // What the vault has counts too: a passphrase may have changed since. A vault whose `keys/` cannot be read is opened by
    // what is remembered.
    match wrapped(backend).await {
        Ok(found) => candidates.extend(found),
        Err(error) if candidates.is_empty() => return Err(error),
        Err(error) => {
            tracing::warn!(%error, "keys/ of the vault cannot be read; trying those that are remembered")
        }
    }
    candidates.dedup();
    let mut refused = None;
    for (id, object) in candidates {
        let by = by.clone();
        let name = ObjectName::Key(id);
        let work = move || match envelope::unwrap(&name, true, &object) {
            Ok(body) => wrap::unwrap(vault, &name, &body, &by),
            Err(_) => Err(KeyError::NotGenuine),
        };
        match crate::tasks::blocking(work).await? {
            Ok(root) => return Ok(Keys::new(vault, root)),
            Err(KeyError::Wrong) => {}
            Err(error) => refused = Some(error),
        }
    }
    // One that could not be tried may have been the right one: its fault is said rather than a wrong key.
    Err(refused.map_or(VaultError::WrongKey { vault }, VaultError::Key))
}

#[cfg(test)]
mod tests;
