//! Listing a folder of objects, several folders at a time.

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::failures::Reason;
use super::protocol::{Attributes, NO_SUCH_FILE, What};
use super::session::Outcome;
use super::{Connected, Inner};
use crate::backend::{Listed, is_wanted};

/// Folders that are read at once: a vault has 256 of packs, and a line its delay for each.
const FOLDERS_AT_ONCE: usize = 16;

impl Inner {
    /// Every object below a prefix. An object that stays keeps its place in its folder, so no reading of a folder misses it;
    /// a folder that goes meanwhile held nothing that stays.
    pub(super) async fn list(&self, prefix: &str) -> Result<Vec<Listed>, Reason> {
        let connected = &self.connected().await?;
        let top = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
        let mut found = Vec::new();
        let mut folders = vec![top.to_owned()];
        while !folders.is_empty() {
            let read = folders.drain(..).map(|folder| self.read_folder(connected, folder, prefix));
            let read: Vec<_> = stream::iter(read).buffer_unordered(FOLDERS_AT_ONCE).try_collect().await?;
            for (objects, below) in read {
                found.extend(objects);
                folders.extend(below);
            }
        }
        self.stands(connected).await?;
        self.are_folders(connected, top).await?;
        Ok(found)
    }

    /// The objects in a folder, and the folders.
    async fn read_folder(
        &self,
        connected: &Connected,
        folder: String,
        prefix: &str,
    ) -> Result<(Vec<Listed>, Vec<String>), Reason> {
        let (mut objects, mut folders) = (Vec::new(), Vec::new());
        let names = match names(connected, &self.path(&folder)).await {
            Ok(names) => names,
            Err(failure) if failure.code() == Some(NO_SUCH_FILE) => return Ok((objects, folders)),
            Err(failure) => return Err(failure.into()),
        };
        for (last, mut attributes) in names {
            let Ok(last) = str::from_utf8(&last) else { continue };
            let path = if folder.is_empty() { last.to_owned() } else { format!("{folder}/{last}") };
            if !is_wanted(&path, true, prefix) {
                continue;
            }
            if attributes.what() == What::Unknown || attributes.size.is_none() {
                attributes = match connected.stat(&self.path(&path), false).await {
                    Ok(attributes) => attributes,
                    Err(failure) if failure.code() == Some(NO_SUCH_FILE) => continue,
                    Err(failure) => return Err(failure.into()),
                };
            }
            match (attributes.what(), attributes.size) {
                (What::Folder, _) => folders.push(path),
                (What::File, Some(size)) if is_wanted(&path, false, prefix) => {
                    objects.push(Listed { name: path, size });
                }
                (What::File, Some(_)) => {}
                // Left out it would be an object that is absent; nobody can be certain of that.
                _ => return Err(Reason::broken(format!("{path} is neither a file nor a folder"))),
            }
        }
        Ok((objects, folders))
    }
}

async fn names(connected: &Connected, path: &str) -> Outcome<Vec<(Bytes, Attributes)>> {
    let _permit = connected
        .handles
        .acquire()
        .await
        .map_err(|error| super::session::Failure::Ended(error.to_string()))?;
    let handle = connected.opendir(path).await?;
    let mut all = Vec::new();
    let read = loop {
        match connected.readdir(&handle).await {
            Ok(names) if names.is_empty() => break Ok(all),
            Ok(names) => all.extend(names),
            Err(failure) => break Err(failure),
        }
    };
    let closed = connected.close(&handle).await;
    read.and_then(|all| closed.map(|()| all))
}
