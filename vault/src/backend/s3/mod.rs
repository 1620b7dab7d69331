//! A bucket of S3, Amazon's or another's (`FORMAT.md`, §1).
//!
//! Consistency is what every S3 promises since 2020: after a put or a deletion has returned, every get and list sees it. An
//! object is one PUT with a CRC-32C of its bytes, which the server compares before it keeps them; never several parts, whose
//! leftovers nobody would see and everybody pay for.
//!
//! The PUT asks the server to refuse a name that is taken (`If-None-Match: *`). Nothing relies upon it, and a server that
//! doesn't know it is asked without. **Absent** is only what the server calls `NoSuchKey`: a proxy's 404 is an error.

mod credentials;
mod failures;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::TryStreamExt;
use opendal::{ErrorKind, Operator};

use self::credentials::Credentials;
use super::{Address, Backend, BackendError, BackendErrorKind, Listed, Options, checked, is_plain};

/// How long a server may take to answer, besides the time for the bytes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes a second that a line has at least.
const SLOWEST: u64 = 32 * 1024;

/// A vault in a bucket.
#[derive(Debug)]
pub struct S3 {
    place: String,
    operator: Operator,
    /// The server doesn't know the condition.
    unconditional: AtomicBool,
}

impl S3 {
    /// Prepares the requests; the first call finds out whether they are answered.
    ///
    /// # Errors
    /// If there are no credentials, or the address isn't one of S3.
    pub async fn open(address: &Address, options: &Options) -> Result<Self, BackendError> {
        let place = address.to_string();
        let fail = |kind, cause: String| BackendError::new(&place, "", kind, cause);
        let Address::S3 { bucket, prefix, endpoint, region } = address else {
            return Err(fail(BackendErrorKind::Broken, "not an address of S3".into()));
        };
        let file = options.credentials.clone();
        let read = tokio::task::spawn_blocking(move || Credentials::read(file.as_deref())).await;
        let credentials = read
            .map_err(|error| fail(BackendErrorKind::Broken, error.to_string()))?
            .map_err(|cause| fail(BackendErrorKind::Denied, cause))?;
        // The first in a process counts, and any does; an error says that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Nothing but the address and these keys: neither the configuration of some other program nor a cloud's metadata.
        let mut builder = opendal::services::S3::default()
            .bucket(bucket)
            .root(&format!("/{prefix}"))
            .region(region.as_deref().unwrap_or("us-east-1"))
            .access_key_id(&credentials.id)
            .secret_access_key(&credentials.secret)
            .checksum_algorithm("crc32c")
            .disable_config_load()
            .disable_ec2_metadata();
        if let Some(token) = &credentials.token {
            builder = builder.session_token(token);
        }
        if let Some(endpoint) = endpoint {
            builder = builder.endpoint(endpoint);
        }
        let operator = Operator::new(builder)
            .map_err(|error| fail(BackendErrorKind::Broken, failures::cause(&error)))?;
        Ok(Self { place, operator: operator.finish(), unconditional: AtomicBool::new(false) })
    }

    fn failure(&self, name: &str, error: &opendal::Error) -> BackendError {
        BackendError::new(&self.place, name, failures::kind(error), failures::cause(error))
    }

    /// The outcome of a request that moves so many bytes, if it comes in time.
    async fn timely<T>(
        &self,
        name: &str,
        bytes: u64,
        request: impl Future<Output = opendal::Result<T>>,
    ) -> Result<opendal::Result<T>, BackendError> {
        let patience = PATIENCE + Duration::from_secs(bytes / SLOWEST);
        tokio::time::timeout(patience, request).await.map_err(|_| {
            let cause = format!("no answer within {} s", patience.as_secs());
            BackendError::new(&self.place, name, BackendErrorKind::Transient, cause)
        })
    }

    /// `None` if the condition was not met.
    async fn write(&self, name: &str, bytes: &Bytes, unless_there: bool) -> opendal::Result<Option<()>> {
        let request = self.operator.write_with(name, bytes.clone());
        let request = if unless_there { request.if_not_exists(true) } else { request };
        match request.await {
            Ok(_) => Ok(Some(())),
            // Two at the same time is a condition too, that nobody can tell yet.
            Err(error) if error.kind() == ErrorKind::ConditionNotMatch && !error.is_temporary() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The name is taken: by the same bytes, that is a put that was repeated.
    async fn compare(&self, name: &str, bytes: &Bytes) -> Result<(), BackendError> {
        let fail = |kind, cause: &str| Err(BackendError::new(&self.place, name, kind, cause));
        match self.get(name, None).await? {
            Some(there) if there == *bytes => Ok(()),
            Some(_) => fail(BackendErrorKind::Broken, "the name is taken by other bytes"),
            None => fail(BackendErrorKind::Transient, "it was deleted while it was put again"),
        }
    }

    async fn read(
        &self,
        name: &str,
        range: Option<Range<u64>>,
    ) -> Result<opendal::Result<Bytes>, BackendError> {
        // How long an object is, is not known; a pack has 16 MiB, a stream of an unusual size a little more.
        let expected = range.as_ref().map_or(64 << 20, |range| range.end - range.start);
        let request = self.operator.read_with(name);
        let request = match range {
            Some(range) => request.range(range),
            None => request,
        };
        Ok(self.timely(name, expected, async { request.await }).await?.map(|buffer| buffer.to_bytes()))
    }

    /// Its size, of an object that is there.
    async fn size(&self, name: &str) -> Result<u64, BackendError> {
        let stat = self.timely(name, 0, self.operator.stat(name)).await?;
        stat.map(|stat| stat.content_length()).map_err(|error| match error.kind() {
            // A HEAD has no body to say why.
            ErrorKind::NotFound => {
                let cause = "it was there, and was not when its size was asked for";
                BackendError::new(&self.place, name, BackendErrorKind::Transient, cause)
            }
            _ => self.failure(name, &error),
        })
    }
}

#[async_trait]
impl Backend for S3 {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        checked(&self.place, name)?;
        let size = bytes.len() as u64;
        if !self.unconditional.load(Ordering::Relaxed) {
            match self.timely(name, size, self.write(name, &bytes, true)).await? {
                Ok(Some(())) => return Ok(()),
                Ok(None) => return self.compare(name, &bytes).await,
                Err(error) if failures::is_unknown_condition(&error) => {
                    self.unconditional.store(true, Ordering::Relaxed);
                }
                Err(error) => return Err(self.failure(name, &error)),
            }
        }
        let written = self.timely(name, size, self.write(name, &bytes, false)).await?;
        written.map(|_| ()).map_err(|error| self.failure(name, &error))
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, BackendError> {
        checked(&self.place, name)?;
        // A request for no bytes at all doesn't exist; whether the object does is asked by its first one.
        let empty = range.as_ref().is_some_and(|range| range.is_empty());
        let asked = if empty { Some(0..1) } else { range.clone() };
        let cut = |bytes: Bytes| if empty { Bytes::new() } else { bytes };
        match self.read(name, asked).await? {
            Ok(bytes) => Ok(Some(cut(bytes))),
            Err(error) if failures::is_absent(&error) => Ok(None),
            Err(error) if failures::is_beyond(&error) && range.is_some() => {
                let size = self.size(name).await?;
                let range = range.map_or(0..0, |range| range.start..range.end.min(size));
                if range.is_empty() {
                    return Ok(Some(Bytes::new()));
                }
                match self.read(name, Some(range)).await? {
                    Ok(bytes) => Ok(Some(bytes)),
                    Err(error) => Err(self.failure(name, &error)),
                }
            }
            Err(error) => Err(self.failure(name, &error)),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        let failed = |error: opendal::Error| self.failure(prefix, &error);
        if !prefix.is_empty() {
            checked(&self.place, prefix.strip_suffix('/').unwrap_or(prefix))?;
        }
        let lister =
            self.timely(prefix, 0, async { self.operator.lister_with(prefix).recursive(true).await });
        let mut lister = lister.await?.map_err(failed)?;
        let mut found = Vec::new();
        // Each page has its own time.
        while let Some(entry) = self.timely(prefix, 0, lister.try_next()).await?.map_err(failed)? {
            let name = entry.path();
            // Folders end with a slash: some consoles make objects of them.
            if name.starts_with(prefix) && is_plain(name) {
                found.push(Listed { name: name.to_owned(), size: entry.metadata().content_length() });
            }
        }
        Ok(found)
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        checked(&self.place, name)?;
        let deleted = self.timely(name, 0, self.operator.delete(name)).await?;
        deleted.map_err(|error| self.failure(name, &error))
    }

    fn place(&self) -> &str {
        &self.place
    }
}
