//! Putting and getting objects: parts of them, many in flight.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};

use super::failures::Reason;
use super::protocol::{CREATE_NEW, NO_SUCH_FILE, READ, What};
use super::session::Outcome;
use super::{ATTEMPTS, Connected, FILES, Inner, TEMPORARY, split};
use crate::backend::BackendErrorKind;

/// Parts of one object in flight: 8 MiB of OpenSSH's, which fills a line of 1 Gbit/s over 60 ms.
const IN_FLIGHT: usize = 32;

impl Inner {
    pub(super) async fn put(&self, name: &str, temporary: &str, bytes: Bytes) -> Result<(), Reason> {
        let connected = self.connected().await?;
        let put = match self.upload(&connected, temporary, &bytes).await {
            Ok(()) => self.publish(&connected, name, temporary, &bytes).await,
            Err(reason) => Err(reason),
        };
        match put {
            Ok(true) => {
                self.notice(name);
                Ok(())
            }
            other => {
                // Left behind it would only take room; its name tells the collector whose it was.
                let _ = connected.remove(&self.path(temporary)).await;
                other.map(|_| ())
            }
        }
    }

    async fn upload(&self, connected: &Connected, temporary: &str, bytes: &Bytes) -> Result<(), Reason> {
        let path = self.path(temporary);
        let _permit = connected.handles.acquire().await.map_err(|error| Reason::broken(error.to_string()))?;
        let mut opened = connected.open(&path, CREATE_NEW, Some(FILES)).await;
        if opened.as_ref().is_err_and(|failure| failure.code() == Some(NO_SUCH_FILE)) {
            self.make_all(connected, TEMPORARY).await?;
            opened = connected.open(&path, CREATE_NEW, Some(FILES)).await;
        }
        let size = bytes.len() as u64;
        let handle = match opened {
            Ok(handle) => handle,
            Err(failure) => return Err(self.full_or(connected, failure, size).await),
        };
        let written = write(connected, &handle, bytes).await;
        // Some servers write when they close.
        let closed = connected.close(&handle).await;
        match written.and(closed) {
            Ok(()) => Ok(()),
            Err(failure) => Err(self.full_or(connected, failure, size).await),
        }
    }

    /// Gives the object its name. `false` if the same is there already, and the temporary one with it.
    async fn publish(
        &self,
        connected: &Connected,
        name: &str,
        temporary: &str,
        bytes: &Bytes,
    ) -> Result<bool, Reason> {
        let (folder, _) = split(name);
        for _ in 0..ATTEMPTS {
            let failure = match connected.rename(&self.path(temporary), &self.path(name)).await {
                Ok(()) => return Ok(true),
                Err(failure) => failure,
            };
            if failure.code() == Some(NO_SUCH_FILE) && !folder.is_empty() {
                // Not made yet, or removed by somebody who deleted the last object in it.
                self.make_all(connected, folder).await?;
            } else if failure.may_be_taken() {
                return match self.get(name, None).await? {
                    Some(there) if there == *bytes => Ok(false),
                    Some(_) => Err(Reason::broken("the name is taken by other bytes")),
                    None => Err(self.full_or(connected, failure, 0).await),
                };
            } else {
                return Err(failure.into());
            }
        }
        Err(Reason::Other(BackendErrorKind::Transient, format!("{folder} was removed again and again")))
    }

    pub(super) async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Option<Bytes>, Reason> {
        let connected = self.connected().await?;
        let permit = connected.handles.acquire().await.map_err(|error| Reason::broken(error.to_string()))?;
        let handle = match connected.open(&self.path(name), READ, None).await {
            Ok(handle) => handle,
            Err(failure) if failure.code() == Some(NO_SUCH_FILE) => {
                drop(permit);
                return self.absent(&connected, name, None).await;
            }
            Err(failure) => return Err(failure.into()),
        };
        let read = read(&connected, &handle, range).await;
        let closed = connected.close(&handle).await;
        let bytes = read?;
        closed?;
        Ok(Some(bytes))
    }
}

async fn write(connected: &Connected, handle: &Bytes, bytes: &Bytes) -> Outcome<()> {
    // Whatever the umask there.
    connected.set_mode(handle, FILES).await?;
    let part = connected.part as usize;
    let parts = (0..bytes.len()).step_by(part).map(|at| {
        let end = (at + part).min(bytes.len());
        connected.write(handle, at as u64, &bytes[at..end])
    });
    stream::iter(parts).buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
    if connected.can_sync { connected.fsync(handle).await } else { Ok(()) }
}

async fn read(connected: &Connected, handle: &Bytes, range: Option<Range<u64>>) -> Result<Bytes, Reason> {
    let attributes = connected.fstat(handle).await?;
    let (What::File | What::Unknown, Some(size)) = (attributes.what(), attributes.size) else {
        return Err(Reason::broken("it is not a file, or the server does not say how long it is"));
    };
    let range = range.unwrap_or(0..size);
    let (start, end) = (range.start.min(size), range.end.min(size));
    let part = u64::from(connected.part);
    let parts = (start..end).step_by(connected.part as usize).map(|at| {
        let wanted = at..(at + part).min(end);
        async move {
            let mut bytes = BytesMut::new();
            // A server may give less than was asked for.
            while wanted.start + (bytes.len() as u64) < wanted.end {
                let at = wanted.start + bytes.len() as u64;
                let length = u32::try_from(wanted.end - at).unwrap_or(u32::MAX);
                let more = connected.read(handle, at, length).await?;
                if more.is_empty() {
                    return Err(Reason::broken("it is shorter than the server said"));
                }
                bytes.extend_from_slice(&more);
            }
            Ok(bytes)
        }
    });
    let whole =
        stream::iter(parts).buffered(IN_FLIGHT).try_fold(BytesMut::new(), |mut whole, part| async move {
            whole.extend_from_slice(&part);
            Ok(whole)
        });
    Ok(whole.await?.freeze())
}
