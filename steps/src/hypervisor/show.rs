//! Disks that are shown to be read: an image that nobody writes to, or a pull's export.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmkeep_vault::nbd::Address;
use vmkeep_vault::source::{
    DiskSource, Format, ImageOptions, ImageSource, NbdOptions, NbdSource, QemuNbdOptions, SourceError,
};

use super::pull::EXPORT_BITMAP;
use super::{DomainId, Layer, Standstills, Target};

/// A disk at one point in time, to be read.
pub type Shown = Arc<dyn DiskSource>;

/// Connections to one export, requests in flight on each, and how long an answer may take: QEMU may be flushing the guest's own
/// images.
const CONNECTIONS: usize = 4;
const IN_FLIGHT: usize = 16;
const PATIENCE: Duration = Duration::from_secs(300);

/// Why an export cannot be read.
#[derive(Debug)]
pub enum NotShown {
    /// It could not be opened.
    Source(SourceError),
    /// This process answers there, and it is not the domain's QEMU.
    Stranger(i32),
}

impl From<SourceError> for NotShown {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

/// By a `qemu-nbd` that ends with what it shows.
pub(super) async fn image(image: &Layer) -> Result<Shown, SourceError> {
    let options = ImageOptions {
        show: QemuNbdOptions {
            image: Format::Named { format: image.format.clone(), file: image.path.clone() },
            bitmap: None,
            connections: CONNECTIONS,
            owner: None,
            folder: std::env::temp_dir(),
        },
        in_flight: IN_FLIGHT,
        patience: Some(PATIENCE),
    };
    Ok(Arc::new(ImageSource::open(&options).await?))
}

/// By this QEMU process, and nobody else.
pub(super) async fn export(
    instance: &str,
    socket: &Path,
    disk: &Target,
    changes: bool,
) -> Result<Shown, NotShown> {
    let options = NbdOptions {
        bitmap: changes.then(|| EXPORT_BITMAP.to_owned()),
        connections: CONNECTIONS,
        in_flight: IN_FLIGHT,
        patience: Some(PATIENCE),
    };
    let address = Address::unix(socket, disk.0.clone());
    let source = NbdSource::open(&address, &options).await?;
    let qemu = instance.split('@').next().and_then(|pid| pid.parse::<i32>().ok());
    let mut peers = source.client().peers().flatten().filter_map(|peer| peer.process);
    if let Some(other) = peers.find(|peer| Some(*peer) != qemu) {
        return Err(NotShown::Stranger(other));
    }
    drop(peers);
    Ok(Arc::new(source))
}

/// The same. Who began to be greeted is greeted to the end, also when nobody waits for it any more: a connection that is dropped
/// half made may still be in its handshake for QEMU when somebody ends the pull.
pub(super) async fn greeted(
    greetings: &Standstills,
    domain: &DomainId,
    instance: &str,
    (socket, disk): (&Path, &Target),
    changes: bool,
) -> Result<Shown, NotShown> {
    let greeting = greetings.take(domain).await;
    let (instance, socket, disk) = (instance.to_owned(), socket.to_owned(), disk.clone());
    let connecting = tokio::spawn(async move {
        let shown = export(&instance, &socket, &disk, changes).await;
        drop(greeting);
        shown
    });
    match connecting.await {
        Ok(shown) => shown,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => {
                let what = "connect to the export".to_owned();
                Err(SourceError::Start { what, cause: error.to_string() }.into())
            }
        },
    }
}
