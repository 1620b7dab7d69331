//! An image at rest: the frozen base of a domain that is off, or runs on an overlay.

use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::qemu_nbd::{QemuNbd, QemuNbdOptions};
use super::{DiskSource, NbdOptions, NbdSource, Region, SourceError};
use crate::nbd::NbdError;

/// How to read an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// What to show, and how; as many connections are made as it lets in.
    pub show: QemuNbdOptions,
    /// Requests in flight on each connection.
    pub in_flight: usize,
    /// How long one request may take; for ever if nothing is said.
    pub patience: Option<Duration>,
}

/// An image that nobody writes to, shown by a `qemu-nbd` that ends with this.
#[derive(Debug)]
pub struct ImageSource {
    nbd: NbdSource,
    program: QemuNbd,
}

impl ImageSource {
    /// Starts the program, and connects to it.
    ///
    /// # Errors
    /// [`SourceError::Ended`] if it cannot show the image: it is not there, in use, or lacks the bitmap.
    pub async fn open(options: &ImageOptions) -> Result<Self, SourceError> {
        let mut program = QemuNbd::start(&options.show).await?;
        let nbd = NbdOptions {
            bitmap: options.show.bitmap.clone(),
            connections: options.show.connections,
            in_flight: options.in_flight,
            patience: options.patience,
        };
        let address = program.address();
        let opened = NbdSource::open(&address, &nbd).await;
        match opened {
            Ok(nbd) => {
                program.hide();
                Ok(Self { nbd, program })
            }
            Err(error) => Err(cause(&program, error).await),
        }
    }

    /// The export.
    #[must_use]
    pub fn nbd(&self) -> &NbdSource {
        &self.nbd
    }

    /// The program's process id.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.program.process()
    }

    /// Ends the program, and waits until it has let go of the image.
    pub async fn close(self) {
        let Self { nbd, program } = self;
        nbd.close().await;
        program.end().await;
    }
}

/// A connection that is lost is so because the program ends: then it is its end that is told.
async fn cause(program: &QemuNbd, error: SourceError) -> SourceError {
    match error {
        SourceError::Nbd(NbdError::Lost { .. }) => {
            // The connection may be seen to end before the program is. If it should live, it is of no use any more, and ends by
            // this signal; if it does not, this changes nothing, and how it ended is still told.
            program.kill();
            program.ended().await
        }
        other => program.has_ended().unwrap_or(other),
    }
}

#[async_trait]
impl DiskSource for ImageSource {
    fn size(&self) -> u64 {
        self.nbd.size()
    }

    fn knows_changes(&self) -> bool {
        self.nbd.knows_changes()
    }

    async fn regions(&self, part: Range<u64>) -> Result<Vec<Region>, SourceError> {
        match self.nbd.regions(part).await {
            Ok(regions) => Ok(regions),
            Err(error) => Err(cause(&self.program, error).await),
        }
    }

    async fn read(&self, part: Range<u64>) -> Result<Bytes, SourceError> {
        match self.nbd.read(part).await {
            Ok(bytes) => Ok(bytes),
            Err(error) => Err(cause(&self.program, error).await),
        }
    }

    fn received(&self) -> u64 {
        self.nbd.received()
    }
}
