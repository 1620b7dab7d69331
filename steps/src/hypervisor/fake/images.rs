//! The images beside the guests' own.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use vmkeep_vault::source::SourceError;

use super::effects::part;
use super::{Client, Inner, disk, io, no, shown};
use crate::hypervisor::{FileId, HvResult, Image, Layer, OverlaySpec, Shown, Space, Storage, Trouble, local};

/// Who has an image open for writing, or stands on it.
fn open(inner: &Inner, path: &Path) -> bool {
    let processes = inner.domains.values().filter_map(|domain| domain.process.as_ref());
    processes.flat_map(|p| &p.disks).flat_map(|open| &open.chain).any(|layer| layer.path == path)
}

#[async_trait]
impl Storage for Client {
    async fn inspect(&self, layer: &Layer) -> HvResult<Option<Image>> {
        self.look(|_| local::inspect(layer)).await
    }

    async fn create_overlay(&self, spec: &OverlaySpec) -> HvResult<Image> {
        let layer = Layer { path: spec.path.clone(), format: "qcow2".to_owned() };
        let (path, spec) = (spec.path.clone(), spec.clone());
        let torn = part(move |_| match path.exists() {
            true => no(Trouble::Exists, format!("{} exists already", path.display())),
            false => std::fs::write(path, b"").map_err(io),
        });
        let whole = part(move |inner| {
            let when = inner.stamp();
            disk::create(&spec.path, "qcow2", spec.virtual_size, Some(&spec.base)).map_err(io)?;
            disk::empty(&spec.path, when).map_err(io)
        });
        self.own("create-overlay", vec![torn, whole]).await?;
        match local::inspect(&layer)? {
            Some(image) => Ok(image),
            None => no(Trouble::Missing, "it is gone"),
        }
    }

    async fn remove(&self, path: &Path, id: FileId) -> HvResult<bool> {
        let there = std::fs::symlink_metadata(path).is_ok_and(|data| FileId::of(&data) == id);
        let path = path.to_owned();
        let remove = part(move |_| match std::fs::symlink_metadata(&path) {
            Ok(data) if FileId::of(&data) == id => std::fs::remove_file(&path).map_err(io),
            _ => Ok(()),
        });
        self.own("remove", vec![remove]).await?;
        Ok(there)
    }

    async fn commit_offline(
        &self,
        overlay: &Layer,
        base: &Layer,
        give_way: &CancellationToken,
    ) -> HvResult<()> {
        let (top, below) = (overlay.path.clone(), base.clone());
        let files: Vec<PathBuf> = vec![top.clone(), below.path.clone()];
        let (held, raised) = (files.clone(), give_way.clone());
        let begin = part(move |inner| {
            if raised.is_cancelled() {
                return no(Trouble::Cancelled, "gives way");
            }
            let taken = |file: &PathBuf| {
                open(inner, file) || inner.helpers.contains(file) || inner.readers.contains(file)
            };
            if held.iter().any(taken) {
                return no(Trouble::Locked, "Failed to get \"write\" lock");
            }
            inner.helpers.extend(held);
            Ok(())
        });
        let (from, to, raised) = (top.clone(), below, give_way.clone());
        let copy = part(move |inner| {
            if raised.is_cancelled() {
                return no(Trouble::Cancelled, "gives way");
            }
            let when = inner.stamp();
            inner.committed(&from, &to, when).map_err(io)
        });
        let end = part(move |inner| {
            let when = inner.stamp();
            disk::empty(&top, when).map_err(io)
        });
        let outcome = self.own("commit-offline", vec![begin, copy, end]).await;
        self.world.inner().helpers.retain(|held| !files.contains(held));
        outcome
    }

    async fn open_image(&self, image: &Layer) -> Result<Shown, SourceError> {
        shown::image(self, image).await
    }

    async fn space(&self, _: &Path) -> HvResult<Space> {
        self.look(|_| Ok(Space { total: 1 << 40, free: 1 << 39, dev: 1 })).await
    }

    async fn flush(&self, _: &Path) {}
}
