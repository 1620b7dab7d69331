//! A place that is gone with its process: for tests.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use super::{Backend, BackendError, Listed, checked, is_wanted};

/// Keeps every promise of a backend but that of being durable.
#[derive(Debug, Default)]
pub struct Memory {
    objects: Mutex<BTreeMap<String, Bytes>>,
}

impl Memory {
    fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<String, Bytes>) -> T) -> T {
        f(&mut self.objects.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts something there that is none of a vault's.
    #[cfg(test)]
    pub(crate) fn place_stranger(&self, name: &str) {
        self.with(|objects| objects.insert(name.to_owned(), Bytes::new()));
    }

    /// Whether something is there, whatever its name.
    #[cfg(test)]
    pub(crate) fn has(&self, name: &str) -> bool {
        self.with(|objects| objects.contains_key(name))
    }
}

#[async_trait]
impl Backend for Memory {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        checked(self.place(), name)?;
        self.with(|objects| objects.insert(name.to_owned(), bytes));
        Ok(())
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        checked(self.place(), name)?;
        let whole = self.with(|objects| objects.get(name).cloned());
        Ok(whole.map(|bytes| match range {
            Some(range) => {
                let at = |place: u64| usize::try_from(place).unwrap_or(usize::MAX).min(bytes.len());
                bytes.slice(at(range.start)..at(range.end.max(range.start)))
            }
            None => bytes,
        }))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        let listed =
            |(name, bytes): (&String, &Bytes)| Listed { name: name.clone(), size: bytes.len() as u64 };
        let ours = |objects: &mut BTreeMap<String, Bytes>| {
            let from = objects.range(prefix.to_owned()..);
            let ours = from.take_while(|(name, _)| name.starts_with(prefix));
            ours.filter(|(name, _)| is_wanted(name, false, prefix)).map(listed).collect()
        };
        Ok(self.with(ours))
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        checked(self.place(), name)?;
        self.with(|objects| objects.remove(name));
        Ok(())
    }

    fn place(&self) -> &str {
        "memory"
    }
}
