//! [`Storage`] on this host's file systems, with `qemu-img` for what only QEMU can do.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::definition::Layer;
use super::error::{HvError, HvResult, Trouble};
use super::storage::{Bitmap, FileId, Image, OverlaySpec, Space, Storage};
use crate::image::qcow2::{Format, Header};
use crate::image::qemu_img::{QemuImg, QemuImgError};
use crate::image::rights::{self, RightsError};
use crate::image::{chain, open, space};

/// A commit may take as long as it makes sense to wait for anything.
const COMMIT_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// The images on this host.
#[derive(Clone, Debug, Default)]
pub struct LocalStorage {
    qemu_img: QemuImg,
}

impl LocalStorage {
    /// With this `qemu-img`.
    #[must_use]
    pub fn new(qemu_img: QemuImg) -> Self {
        Self { qemu_img }
    }
}

/// Runs what blocks where blocking is allowed.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> HvResult<T> + Send + 'static) -> HvResult<T> {
    crate::blocking::run(work).await.unwrap_or_else(|e| Err(HvError::new(Trouble::Refused, e.to_string())))
}

fn io(act: &str, path: &Path, e: &std::io::Error) -> HvError {
    let trouble = match e.kind() {
        ErrorKind::NotFound => Trouble::Missing,
        ErrorKind::AlreadyExists => Trouble::Exists,
        ErrorKind::PermissionDenied => Trouble::Denied,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Trouble::NoSpace,
        _ => Trouble::Io,
    };
    HvError::new(trouble, format!("cannot {act} {}: {e}", path.display()))
}

fn qemu_img(e: &QemuImgError) -> HvError {
    let text = e.to_string();
    // `qemu-img` has no codes: these are the words of QEMU and of the C library.
    let trouble = if text.contains("No space left on device") || text.contains("Disk quota exceeded") {
        Trouble::NoSpace
    } else if text.contains("lock") && text.contains("Failed to get") {
        Trouble::Locked
    } else if text.contains("Permission denied") {
        Trouble::Denied
    } else if text.contains("Input/output error") {
        Trouble::Io
    } else {
        Trouble::Refused
    };
    HvError::new(trouble, text)
}

fn format(layer: &Layer) -> HvResult<Format> {
    Format::from_name(&layer.format).ok_or_else(|| {
        HvError::new(
            Trouble::Unsupported,
            format!(
                "{} is of format {:?}, which is neither qcow2 nor raw",
                layer.path.display(),
                layer.format
            ),
        )
    })
}

fn sync(path: &Path) -> HvResult<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| io("sync", path, &e))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// Whether a qcow2 file holds no data of its own: none of its first-level entries is in use.
///
/// An entry in use may still stand for nothing but unallocated clusters; that counts as data, on the safe side. What
/// lies beyond the end of the file reads as zeroes, as QEMU reads it.
fn reads_through(file: &File) -> std::io::Result<bool> {
    let mut header = [0; 48];
    file.read_exact_at(&mut header, 0)?;
    let field =
        |at: usize, len: usize| header[at..at + len].iter().fold(0_u64, |n, b| n << 8 | u64::from(*b));
    let (entries, table) = (field(36, 4), field(40, 8));
    let mut at = 0;
    let mut chunk = vec![0; 64 << 10];
    while at < entries * 8 {
        let want = usize::try_from(entries * 8 - at).unwrap_or(usize::MAX).min(chunk.len());
        let got = file.read_at(&mut chunk[..want], table + at)?;
        if got == 0 {
            return Ok(true);
        }
        if chunk[..got].iter().any(|b| *b != 0) {
            return Ok(false);
        }
        at += got as u64;
    }
    Ok(true)
}

/// A file that was cut off before anything was written into it: all zeroes, or nothing at all.
fn blank(file: &File) -> std::io::Result<bool> {
    Ok(space::data_bytes(file)? == 0 || {
        let mut at = 0;
        let mut chunk = vec![0; 64 << 10];
        loop {
            match file.read_at(&mut chunk, at)? {
                0 => break true,
                got if chunk[..got].iter().any(|b| *b != 0) => break false,
                got => at += got as u64,
            }
        }
    })
}

pub(super) fn inspect(layer: &Layer) -> HvResult<Option<Image>> {
    let path = &layer.path;
    // Neither through a link nor, should a pipe be there, until somebody writes to it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => {
            return Err(HvError::new(Trouble::Refused, format!("{} is a symbolic link", path.display())));
        }
        file => File::from(file.map_err(|e| io("open", path, &e.into()))?),
    };
    let data = file.metadata().map_err(|e| io("look at", path, &e))?;
    if !data.is_file() {
        return Err(HvError::new(Trouble::Refused, format!("{} is not a regular file", path.display())));
    }
    let mut image = Image {
        path: path.clone(),
        id: FileId::of(&data),
        size: data.len(),
        allocated: data.blocks() * 512,
        format: layer.format.clone(),
        virtual_size: data.len().next_multiple_of(512),
        cluster: 512,
        backing: None,
        empty: false,
    };
    if format(layer)? == Format::Raw {
        return Ok(Some(image));
    }
    match Header::read(&file) {
        Ok(header) => {
            image.virtual_size = header.virtual_size;
            image.cluster = header.cluster;
            image.empty = header.snapshots == 0 && reads_through(&file).map_err(|e| io("read", path, &e))?;
            image.backing = backing(path, &header);
        }
        Err(e) => {
            if !blank(&file).map_err(|e| io("read", path, &e))? {
                return Err(HvError::new(Trouble::Refused, format!("{}: {e}", path.display())));
            }
            image.format = "none".to_owned();
            image.virtual_size = 0;
            image.empty = true;
        }
    }
    Ok(Some(image))
}

fn backing(path: &Path, header: &Header) -> Option<Layer> {
    let name = header.backing.as_deref()?;
    let below = chain::resolve(path, name)?;
    Some(Layer { path: below, format: header.backing_format.clone().unwrap_or_default() })
}

/// What the base has, so that the same QEMU that opens the base can open the overlay.
fn like_base(overlay: &Path, base: &Path) -> HvResult<()> {
    let overlay = open::just_made(overlay).map_err(|e| io("open", overlay, &e))?;
    let model = open::to_read(base, OFlags::empty()).map_err(|e| io("open", base, &e))?;
    rights::like(&overlay, &model).map_err(|e| {
        let trouble = match e {
            RightsError::Look(_) => Trouble::Io,
            RightsError::Owner { .. } => Trouble::OwnerRefused,
            RightsError::Mode { .. } | RightsError::List(_) => Trouble::ModeRefused,
        };
        HvError::new(trouble, format!("it must have the rights of {}: {e}", base.display()))
    })
}

/// Only to the very file that the overlay was made for: whoever owns the folder may have put another name there.
fn give_back(base: &Path, id: FileId, overlay: &Path) -> Result<(), RightsError> {
    let file = open::to_read(base, OFlags::empty()).map_err(RightsError::Look)?;
    let data = file.metadata().map_err(RightsError::Look)?;
    if !data.is_file() || FileId::of(&data) != id {
        return Err(RightsError::Look(std::io::Error::other("it is not the file of the backup")));
    }
    let overlay = open::to_read(overlay, OFlags::NOFOLLOW).map_err(RightsError::Look)?;
    rights::owned_like(&file, &overlay)?;
    file.sync_all().map_err(RightsError::Look)
}

#[async_trait]
impl Storage for LocalStorage {
    async fn inspect(&self, layer: &Layer) -> HvResult<Option<Image>> {
        let layer = layer.clone();
        blocking(move || inspect(&layer)).await
    }

    async fn create_overlay(&self, spec: &OverlaySpec) -> HvResult<Image> {
        let (spec, qemu) = (spec.clone(), self.qemu_img.clone());
        blocking(move || {
            if spec.path.symlink_metadata().is_ok() {
                return Err(HvError::new(Trouble::Exists, format!("{} exists already", spec.path.display())));
            }
            qemu.create_overlay(&spec.path, &spec.base.path, format(&spec.base)?, spec.virtual_size)
                .map_err(|e| qemu_img(&e))?;
            like_base(&spec.path, &spec.base.path)?;
            sync(&spec.path)?;
            sync(folder_of(&spec.path))?;
            let layer = Layer { path: spec.path.clone(), format: "qcow2".to_owned() };
            inspect(&layer)?
                .ok_or_else(|| HvError::new(Trouble::Missing, format!("{} is gone", spec.path.display())))
        })
        .await
    }

    async fn remove(&self, path: &Path, id: FileId) -> HvResult<bool> {
        let path = path.to_owned();
        blocking(move || {
            match path.symlink_metadata() {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
                Err(e) => return Err(io("look at", &path, &e)),
                Ok(data) if FileId::of(&data) != id => return Ok(false),
                Ok(_) => {}
            }
            std::fs::remove_file(&path).map_err(|e| io("remove", &path, &e))?;
            sync(folder_of(&path))?;
            Ok(true)
        })
        .await
    }

    async fn commit_offline(
        &self,
        overlay: &Layer,
        base: &Layer,
        give_way: &CancellationToken,
    ) -> HvResult<()> {
        let (overlay, base): (PathBuf, PathBuf) = (overlay.path.clone(), base.path.clone());
        let (qemu, give_way) = (self.qemu_img.clone(), give_way.clone());
        blocking(move || {
            qemu.commit(&overlay, &base, COMMIT_LIMIT, &|| give_way.is_cancelled()).map_err(|e| {
                if give_way.is_cancelled() {
                    return HvError::new(Trouble::Cancelled, "the domain is being started");
                }
                qemu_img(&e)
            })
        })
        .await
    }

    async fn give_back(&self, base: &Path, id: FileId, overlay: &Path) {
        let (base, overlay) = (base.to_owned(), overlay.to_owned());
        let given = move || {
            if let Err(error) = give_back(&base, id, &overlay) {
                tracing::warn!(base = %base.display(), %error, "the image may keep another owner");
            }
        };
        let _ = crate::blocking::run(given).await;
    }

    async fn add_bitmaps(&self, overlay: &Path, bitmaps: &[Bitmap]) -> HvResult<()> {
        let (overlay, bitmaps, qemu) = (overlay.to_owned(), bitmaps.to_vec(), self.qemu_img.clone());
        blocking(move || {
            for bitmap in &bitmaps {
                qemu.add_bitmap(&overlay, &bitmap.name, bitmap.granularity).map_err(|e| qemu_img(&e))?;
            }
            Ok(())
        })
        .await
    }

    async fn space(&self, path: &Path) -> HvResult<Space> {
        let path = path.to_owned();
        blocking(move || {
            let room = space::Space::at(&path).map_err(|e| io("find out the room at", &path, &e))?;
            let dev = std::fs::metadata(&path).map_err(|e| io("look at", &path, &e))?.dev();
            Ok(Space { total: room.total, free: room.free, dev })
        })
        .await
    }

    async fn flush(&self, path: &Path) {
        let path = path.to_owned();
        let _ = blocking(move || {
            File::open(&path).and_then(|file| file.sync_data()).map_err(|e| io("sync", &path, &e))
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_given_back_to_the_very_file_and_to_nothing_that_took_its_name() {
        if !rustix::process::geteuid().is_root() {
            return println!("SKIPPED: only root gives files away");
        }
        let folder = tempfile::tempdir().unwrap();
        let [base, overlay, other] = ["base", "overlay", "other"].map(|name| folder.path().join(name));
        for path in [&base, &overlay, &other] {
            std::fs::write(path, b"x").unwrap();
        }
        std::os::unix::fs::chown(&overlay, Some(77), Some(78)).unwrap();
        let data = |path: &Path| std::fs::metadata(path).unwrap();
        let id = FileId::of(&data(&base));
        let aside = folder.path().join("aside");
        std::fs::rename(&base, &aside).unwrap();
        std::os::unix::fs::symlink(&other, &base).unwrap();
        give_back(&base, id, &overlay).unwrap_err();
        assert_eq!(data(&other).uid(), 0, "what the name leads to now is left alone");
        std::fs::rename(&aside, &base).unwrap();
        give_back(&base, id, &overlay).unwrap();
        assert_eq!((data(&base).uid(), data(&base).gid()), (77, 78));
    }

    #[test]
    fn a_file_that_somebody_put_in_an_overlays_place_gets_no_rights() {
        let folder = tempfile::tempdir().unwrap();
        let [base, overlay, secret] = ["base", "overlay", "secret"].map(|name| folder.path().join(name));
        std::fs::write(&base, b"x").unwrap();
        std::fs::write(&secret, b"x").unwrap();
        std::os::unix::fs::symlink(&secret, &overlay).unwrap();
        assert!(like_base(&overlay, &base).is_err(), "a link");
        std::fs::remove_file(&overlay).unwrap();
        std::fs::hard_link(&secret, &overlay).unwrap();
        assert!(like_base(&overlay, &base).is_err(), "another name of a file");
        std::fs::remove_file(&secret).unwrap();
        like_base(&overlay, &base).unwrap();
    }

    fn layer(path: PathBuf, format: &str) -> Layer {
        Layer { path, format: format.to_owned() }
    }

    async fn overlay_on(folder: &Path, base_format: &str) -> (LocalStorage, Layer, Layer, Image) {
        let base = layer(folder.join(format!("base image.{base_format}")), base_format);
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", base_format])
            .args([base.path.as_os_str(), "1G".as_ref()])
            .status();
        assert!(made.unwrap().success());
        let storage = LocalStorage::default();
        let overlay = layer(folder.join("vmkeep-0123456789ab-vda.qcow2"), "qcow2");
        let spec = OverlaySpec { path: overlay.path.clone(), base: base.clone(), virtual_size: 1 << 30 };
        let image = storage.create_overlay(&spec).await.unwrap();
        (storage, base, overlay, image)
    }

    fn qemu_io(path: &Path, command: &str) {
        qemu_io_as("qcow2", path, command);
    }

    fn qemu_io_as(format: &str, path: &Path, command: &str) {
        let done =
            std::process::Command::new("qemu-io").args(["-f", format, "-c", command]).arg(path).output();
        let done = done.unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success() && !said.contains("failed"), "{command}: {said}");
    }

    #[tokio::test]
    async fn an_overlay_is_empty_until_something_is_written_and_commits_into_its_base() {
        for base_format in ["raw", "qcow2"] {
            let folder = tempfile::tempdir().unwrap();
            let (storage, base, overlay, image) = overlay_on(folder.path(), base_format).await;
            assert!(image.empty);
            assert_eq!(image.backing.as_ref(), Some(&base));
            assert_eq!(image.virtual_size, 1 << 30);
            qemu_io(&overlay.path, "write -P 7 700M 64k");
            let image = storage.inspect(&overlay).await.unwrap().unwrap();
            assert!(!image.empty);
            storage.commit_offline(&overlay, &base, &CancellationToken::new()).await.unwrap();
            let image = storage.inspect(&base).await.unwrap().unwrap();
            assert!(image.allocated >= 64 << 10);
            // Done again, it takes nothing back that somebody has written to the base since.
            assert!(storage.inspect(&overlay).await.unwrap().unwrap().empty);
            qemu_io_as(base_format, &base.path, "write -P 9 700M 64k");
            storage.commit_offline(&overlay, &base, &CancellationToken::new()).await.unwrap();
            qemu_io_as(base_format, &base.path, "read -P 9 700M 64k");
        }
    }

    #[tokio::test]
    async fn zeroes_written_over_data_count_as_data() {
        let folder = tempfile::tempdir().unwrap();
        let (storage, _, overlay, _) = overlay_on(folder.path(), "qcow2").await;
        qemu_io(&overlay.path, "write -z 0 64k");
        assert!(!storage.inspect(&overlay).await.unwrap().unwrap().empty);
    }

    #[tokio::test]
    async fn an_existing_file_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (storage, base, overlay, _) = overlay_on(folder.path(), "raw").await;
        let spec = OverlaySpec { path: overlay.path.clone(), base, virtual_size: 1 << 30 };
        assert_eq!(storage.create_overlay(&spec).await.unwrap_err().trouble, Trouble::Exists);
    }

    #[tokio::test]
    async fn a_torn_file_is_empty_and_a_strange_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let storage = LocalStorage::default();
        let torn = layer(folder.path().join("torn"), "qcow2");
        assert_eq!(storage.inspect(&torn).await.unwrap(), None);
        for len in [0_u64, 1 << 20] {
            let file = File::create(&torn.path).unwrap();
            file.set_len(len).unwrap();
            assert!(storage.inspect(&torn).await.unwrap().unwrap().empty);
        }
        std::fs::write(&torn.path, b"somebody's diary").unwrap();
        assert_eq!(storage.inspect(&torn).await.unwrap_err().trouble, Trouble::Refused);
    }

    #[tokio::test]
    async fn an_image_is_never_looked_at_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (storage, _, overlay, _) = overlay_on(folder.path(), "raw").await;
        let link = layer(folder.path().join("vmkeep-ba9876543210-vda.qcow2"), "qcow2");
        std::os::unix::fs::symlink(&overlay.path, &link.path).unwrap();
        assert_eq!(storage.inspect(&link).await.unwrap_err().trouble, Trouble::Refused);
        std::fs::remove_file(&overlay.path).unwrap();
        assert_eq!(storage.inspect(&link).await.unwrap_err().trouble, Trouble::Refused, "a link to nothing");
    }

    #[tokio::test]
    async fn only_the_very_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (storage, _, overlay, image) = overlay_on(folder.path(), "raw").await;
        std::fs::rename(&overlay.path, folder.path().join("moved")).unwrap();
        std::fs::write(&overlay.path, b"another file").unwrap();
        assert!(!storage.remove(&overlay.path, image.id).await.unwrap());
        assert!(overlay.path.exists());
        std::fs::rename(folder.path().join("moved"), &overlay.path).unwrap();
        assert!(storage.remove(&overlay.path, image.id).await.unwrap());
        assert!(!storage.remove(&overlay.path, image.id).await.unwrap());
    }

    #[tokio::test]
    async fn a_commit_gives_way_and_leaves_the_images_free() {
        let folder = tempfile::tempdir().unwrap();
        let (storage, base, overlay, _) = overlay_on(folder.path(), "raw").await;
        qemu_io(&overlay.path, "write -P 7 0 512M");
        let give_way = CancellationToken::new();
        give_way.cancel();
        let error = storage.commit_offline(&overlay, &base, &give_way).await.unwrap_err();
        assert_eq!(error.trouble, Trouble::Cancelled);
        qemu_io(&overlay.path, "read -P 7 0 64k");
    }

    #[tokio::test]
    async fn a_base_that_is_held_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let (storage, base, overlay, _) = overlay_on(folder.path(), "qcow2").await;
        qemu_io(&overlay.path, "write -P 7 0 64k");
        let mut holder = std::process::Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(&base.path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // Its prompt tells that the image is open.
        let mut prompt = [0; 1];
        std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut prompt).unwrap();
        let error = storage.commit_offline(&overlay, &base, &CancellationToken::new()).await.unwrap_err();
        drop(holder.stdin.take());
        holder.wait().unwrap();
        assert_eq!(error.trouble, Trouble::Locked, "{error}");
    }
}
