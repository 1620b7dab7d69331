//! `qemu-img`, typed.
//!
//! **Names.** QEMU reads `nbd:…`, `json:…`, `fat:…` and any other `word:` before the first slash as a protocol, and
//! `qemu-img` reads a leading `-` as an option. An *absolute* path is neither, whatever it contains. So every image is
//! given by an absolute path, after `--`, and anything else is refused ([`QemuImgError::NotAbsolute`]); or, to keep what
//! it stands on shut, inside a JSON description that a JSON library wrote. Names that are
//! only to be recorded, not opened now (`rebase` to a relative name), are single components without a colon.
//!
//! **Formats** are always given. A raw disk belongs to a guest, who may write a qcow2 header into its first sector
//! that names any file of the host as its backing file; a probed format would then read that file.
//!
//! **Exit codes** count, never the text, but the text goes into the error.

mod info;
mod run;

pub use info::{Bitmap, CheckReport, ImageInfo, Snapshot};
pub use run::{Finished, RunError, run};

use super::qcow2::Format;
use super::root::Component;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why `qemu-img` did not do what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuImgError {
    /// It could not be run to its end.
    #[error(transparent)]
    Run(#[from] RunError),
    /// It failed.
    #[error("qemu-img could not {act} {image:?}: {complaint}")]
    Failed {
        /// What was being done.
        act: &'static str,
        /// To which image.
        image: PathBuf,
        /// What it said.
        complaint: String,
        /// Its exit status; none if a signal ended it.
        status: Option<i32>,
    },
    /// It printed something that is not its JSON.
    #[error("qemu-img {act} of {image:?} gave an answer that is not understood: {source}")]
    Answer {
        /// What was being done.
        act: &'static str,
        /// To which image.
        image: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Only absolute paths are safe from being taken for something else.
    #[error("{path:?} is not an absolute path")]
    NotAbsolute {
        /// As given.
        path: PathBuf,
    },
    /// QEMU takes options as JSON, which is UTF-8.
    #[error("{path:?} is not valid UTF-8")]
    NotUtf8 {
        /// As given.
        path: PathBuf,
    },
    /// A name to be recorded that QEMU would take for a protocol.
    #[error("{name:?} cannot be the relative name of a backing file")]
    BadBackingName {
        /// As given.
        name: String,
    },
    /// The result could not be made durable.
    #[error("cannot make {path:?} durable: {source}")]
    Sync {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Runs `qemu-img`.
#[derive(Clone, Debug)]
pub struct QemuImg {
    program: PathBuf,
    limit: Duration,
}

impl Default for QemuImg {
    fn default() -> Self {
        Self { program: PathBuf::from("qemu-img"), limit: Duration::from_secs(60) }
    }
}

/// How the words of one call are put together.
struct Call<'a> {
    act: &'static str,
    image: &'a Path,
    words: Vec<OsString>,
}

impl<'a> Call<'a> {
    fn new(act: &'static str, command: &str, image: &'a Path) -> Result<Self, QemuImgError> {
        absolute(image)?;
        Ok(Self { act, image, words: vec![command.into()] })
    }

    fn words<S: Into<OsString>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(words.into_iter().map(Into::into));
        self
    }

    fn when(self, condition: bool, word: &str) -> Self {
        if condition { self.words([word]) } else { self }
    }

    /// The image itself, and whatever comes after it.
    fn image(self) -> Self {
        let image = self.image.as_os_str().to_owned();
        self.words([OsString::from("--"), image])
    }
}

fn absolute(path: &Path) -> Result<(), QemuImgError> {
    if path.is_absolute() { Ok(()) } else { Err(QemuImgError::NotAbsolute { path: path.to_owned() }) }
}

fn never() -> bool {
    false
}

impl QemuImg {
    /// Another program in place of the `qemu-img` that `PATH` leads to, and the time limit for all but
    /// [`Self::convert`].
    pub fn new(program: impl Into<PathBuf>, limit: Duration) -> Self {
        Self { program: program.into(), limit }
    }

    fn run(
        &self,
        call: &Call<'_>,
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<Finished, QemuImgError> {
        Ok(run(&self.program, &call.words, limit, stop)?)
    }

    fn must(&self, call: &Call<'_>) -> Result<Finished, QemuImgError> {
        self.must_within(call, self.limit, &never)
    }

    fn must_within(
        &self,
        call: &Call<'_>,
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<Finished, QemuImgError> {
        let done = self.run(call, limit, stop)?;
        if done.status.success() { Ok(done) } else { Err(failed(call, &done)) }
    }

    /// Its version, as it prints it (`7.2.22 (Debian …)`).
    pub fn version(&self) -> Result<String, QemuImgError> {
        let call = Call { act: "tell its version", image: Path::new("/"), words: vec!["--version".into()] };
        let done = self.must(&call)?;
        let text = String::from_utf8_lossy(&done.stdout);
        let first = text.lines().next().unwrap_or_default();
        Ok(first.strip_prefix("qemu-img version ").unwrap_or(first).to_owned())
    }

    /// What an image says about itself. With `shared`, also while QEMU has it open for writing; the answer may then
    /// be a mixture of two moments.
    pub fn info(&self, image: &Path, format: Format, shared: bool) -> Result<ImageInfo, QemuImgError> {
        let call = Call::new("look at", "info", image)?
            .words(["--output=json", "-f", format.as_str()])
            .when(shared, "-U")
            .image();
        parse(&call, &self.must(&call)?)
    }

    /// The same of an image and all that is behind it, from the top down.
    pub fn chain(&self, image: &Path, format: Format, shared: bool) -> Result<Vec<ImageInfo>, QemuImgError> {
        let call = Call::new("look at the chain of", "info", image)?
            .words(["--output=json", "--backing-chain", "-f", format.as_str()])
            .when(shared, "-U")
            .image();
        parse(&call, &self.must(&call)?)
    }

    /// Makes an empty overlay on `backing`. The file must not exist. File and folder are durable on return.
    pub fn create_overlay(
        &self,
        image: &Path,
        backing: &Path,
        backing_format: Format,
        virtual_size: u64,
    ) -> Result<(), QemuImgError> {
        absolute(backing)?;
        if image.symlink_metadata().is_ok() {
            let complaint = "it exists already".to_owned();
            return Err(QemuImgError::Failed {
                act: "make",
                image: image.to_owned(),
                complaint,
                status: None,
            });
        }
        let call = Call::new("make", "create", image)?
            .words(["-q", "-f", "qcow2", "-F", backing_format.as_str(), "-b"])
            .words([backing])
            .image()
            .words([virtual_size.to_string()]);
        self.must(&call)?;
        sync(image)
    }

    /// Checks an image by itself: what it stands on is not opened, whatever its header names. Damage is in the report,
    /// not an error; raw images have nothing to check.
    pub fn check(&self, image: &Path, format: Format, limit: Duration) -> Result<CheckReport, QemuImgError> {
        if format == Format::Raw {
            return Ok(CheckReport::default());
        }
        self.look_into(image, format, &["--output=json", "--"], limit)
    }

    /// Frees the clusters of an image of ours that nothing in it refers to: those of bitmaps that it has forgotten. What
    /// it shows is not touched. Durable on return. What was wrong with it, and how much was mended, is in the report.
    pub fn free_leaks(&self, image: &Path, limit: Duration) -> Result<CheckReport, QemuImgError> {
        let report = self.look_into(image, Format::Qcow2, &["--output=json", "-r", "leaks", "--"], limit)?;
        sync(image)?;
        Ok(report)
    }

    fn look_into(
        &self,
        image: &Path,
        format: Format,
        words: &[&str],
        limit: Duration,
    ) -> Result<CheckReport, QemuImgError> {
        let mut call = Call::new("check", "check", image)?.words(words);
        let Some(path) = image.to_str() else {
            return Err(QemuImgError::NotUtf8 { path: image.to_owned() });
        };
        // The one place where the image is not given by its path: only so can the backing file be kept shut.
        let file = serde_json::json!({ "driver": "file", "filename": path });
        let options = serde_json::json!({ "driver": format.as_str(), "backing": null, "file": file });
        call = call.words([format!("json:{options}")]);
        let done = self.run(&call, limit, &never)?;
        match done.status.code() {
            // 2: damaged, 3: leaked clusters. Both come with a report.
            Some(0 | 2 | 3) => parse(&call, &done),
            _ => Err(failed(&call, &done)),
        }
    }

    /// Writes the content of a chain into one new file without backing. Durable on return, its name after the folder
    /// is synced. Takes as long as it takes, up to `limit`; `stop` is asked several times a second.
    pub fn convert(
        &self,
        from: (&Path, Format),
        to: (&Path, Format),
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), QemuImgError> {
        absolute(to.0)?;
        // Its own default for the target is `unsafe`: no flush at all.
        let call = Call::new("convert", "convert", from.0)?
            .words(["-q", "-t", "writeback", "-T", "writeback", "-f", from.1.as_str(), "-O", to.1.as_str()])
            .image()
            .words([to.0]);
        self.must_within(&call, limit, stop)?;
        sync(to.0)
    }

    /// Writes another backing name into an image, without looking whether that file holds the same content.
    ///
    /// `name` is relative to the image's folder.
    pub fn rebase_unsafe(
        &self,
        image: &Path,
        name: &Component,
        backing_format: Format,
    ) -> Result<(), QemuImgError> {
        if name.as_str().contains(':') || name.as_str().starts_with('-') {
            return Err(QemuImgError::BadBackingName { name: name.as_str().to_owned() });
        }
        let call = Call::new("rename the backing file of", "rebase", image)?
            .words(["-q", "-u", "-f", "qcow2", "-F", backing_format.as_str(), "-b", name.as_str()])
            .image();
        self.must(&call)?;
        sync(image)
    }

    /// Commits an overlay that nobody has open into its backing file, and empties the overlay when that is done: a
    /// second commit then writes nothing, whatever the backing file has become. It is unlinked by whoever proved that the
    /// commit succeeded. The *backing file* is durable on return.
    pub fn commit(
        &self,
        image: &Path,
        backing: &Path,
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), QemuImgError> {
        absolute(backing)?;
        let call =
            Call::new("commit", "commit", image)?.words(["-q", "-t", "writeback", "-f", "qcow2"]).image();
        self.must_within(&call, limit, stop)?;
        sync(backing)
    }

    /// Adds a persistent bitmap to an image that nobody has open.
    pub fn add_bitmap(&self, image: &Path, bitmap: &str, granularity: u64) -> Result<(), QemuImgError> {
        let call = Call::new("add a bitmap to", "bitmap", image)?
            .words(["-f", "qcow2", "--add", "-g", &granularity.to_string()])
            .image()
            .words([bitmap]);
        self.must(&call)?;
        sync(image)
    }

    /// Removes a persistent bitmap from an image that nobody has open.
    pub fn remove_bitmap(&self, image: &Path, bitmap: &str) -> Result<(), QemuImgError> {
        let call = Call::new("remove a bitmap from", "bitmap", image)?
            .words(["-f", "qcow2", "--remove"])
            .image()
            .words([bitmap]);
        self.must(&call)?;
        sync(image)
    }
}

fn failed(call: &Call<'_>, done: &Finished) -> QemuImgError {
    let mut complaint = done.complaint();
    if complaint.is_empty() {
        complaint = done.status.to_string();
    }
    QemuImgError::Failed {
        act: call.act,
        image: call.image.to_owned(),
        complaint,
        status: done.status.code(),
    }
}

fn parse<T: serde::de::DeserializeOwned>(call: &Call<'_>, done: &Finished) -> Result<T, QemuImgError> {
    serde_json::from_slice(&done.stdout).map_err(|source| QemuImgError::Answer {
        act: call.act,
        image: call.image.to_owned(),
        source,
    })
}

/// Makes a file and the folder it lies in durable.
fn sync(path: &Path) -> Result<(), QemuImgError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    for path in [path, folder] {
        std::fs::File::open(path)
            .and_then(|file| crate::blocking::sync(&file))
            .map_err(|source| QemuImgError::Sync { path: path.to_owned(), source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
