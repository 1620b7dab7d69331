//! Copying one image file: sparse, hashed, throttled, resumable.
//!
//! The source is a *frozen* file: nobody writes to it while it is copied. That is checked, not assumed: its identity
//! (device, inode, size, time of change of its content) is compared before, on a resume, and after the last byte.
//!
//! ```text
//!  calling thread            hashing threads             flushing thread
//!  SEEK_DATA / SEEK_HOLE
//!  read a segment  ────────▶ chaining value ──▶ in order
//!  write it                                        │
//!  … every 256 MiB or 2 s ─────────────────────────┼────▶ fdatasync, then hand out a token
//!  end: length, fsync, folder fsync, source looked at again
//! ```
//!
//! - **Holes stay holes.** They are found with `SEEK_DATA`, never read, never written, and hashed as the zeroes that
//!   they are. The source is synced first: on some file systems the holes of a file with dirty pages are reported
//!   wrongly, and a hole too many is lost data.
//! - **How bytes move.** A clone of the whole file (`FICLONE`) where the file system can do that; then only hashing is
//!   left to do. Else `copy_file_range`, where it does more than the page cache does anyway (network file systems with
//!   server-side copy); else read and write. Which was used is in the result. Each falls back to the next in the
//!   middle of a file without a seam.
//! - **Hash.** Plain BLAKE3 of what was read and, where the caller has the header of the copy rewritten on the way
//!   ([`Options::header`]), of what was written. See `tree` for how that survives an interruption.
//! - **Durability.** A [`ResumeToken`] is handed out only after an `fdatasync` that began after all its bytes were
//!   written; success is returned only after the file *and* its folder are synced. A failed sync is never repeated:
//!   the kernel may have dropped the dirty pages and marked them clean, so a second sync would succeed and mean
//!   nothing. The file is discarded and the error says so ([`CopyError::Sync`]).
//! - **Giving way.** Between segments the [`Observer`] is asked whether to go on. *Stop* syncs what there is and hands
//!   out a last token; *give up* returns at once, because the reason is that space runs out.

mod files;
mod pump;
mod throttle;
mod token;
mod tree;

pub use files::{Identity, SourceFile};
pub use throttle::{Clock, SystemClock, Throttle};
pub use token::ResumeToken;

use super::root::{Component, Folder, RootError};
use files::TargetFile;
use rustix::io::Errno;
use std::path::PathBuf;
use std::time::Duration;

/// Why a copy did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The source cannot be opened or looked at.
    #[error("cannot {act} the source {path:?}: {source}")]
    Source {
        /// What was being done.
        act: &'static str,
        /// The source.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The source is a device, a folder, a pipe.
    #[error("the source {path:?} is not a regular file")]
    NotAFile {
        /// The source.
        path: PathBuf,
    },
    /// The source cannot be read (EIO: the medium is bad).
    #[error("cannot read the source at byte {offset}: {source}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The source ends earlier than its size said.
    #[error("the source ends at byte {offset} of {size}: somebody shortened it")]
    SourceShrunk {
        /// Where it ends.
        offset: u64,
        /// Its size when the copy began.
        size: u64,
    },
    /// The source was written, replaced or resized while it was copied. The copy is worthless.
    #[error("the source changed while it was copied (it was {was}, it is {is})")]
    SourceChanged {
        /// Before.
        was: Identity,
        /// After.
        is: Identity,
    },
    /// The target cannot be opened, made, or removed.
    #[error(transparent)]
    Place(#[from] RootError),
    /// No room, or a quota is used up.
    #[error("no space left at byte {offset} of the copy")]
    NoSpace {
        /// Where.
        offset: u64,
    },
    /// The file system, or a limit of the process, allows no files so large.
    #[error("files of {size} bytes are not possible there (stopped at byte {offset})")]
    TooLarge {
        /// Where.
        offset: u64,
        /// What was to be written.
        size: u64,
    },
    /// The copy cannot be written.
    #[error("cannot write the copy at byte {offset}: {source}")]
    Write {
        /// Where.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
    /// The copy could not be made durable. What is on disk is unknown; it must be written again from the beginning.
    #[error("the copy could not be made durable ({source}); it was {}and has to be written again from the beginning",
            if *.discarded { "discarded " } else { "left behind " })]
    Sync {
        /// Why.
        source: std::io::Error,
        /// Whether the file could be removed.
        discarded: bool,
    },
    /// The token does not fit what is there: start again.
    #[error("the copy cannot be resumed: {why}")]
    StaleToken {
        /// Why.
        why: &'static str,
    },
    /// Asked to stop. What is done is durable and the last token handed out tells how much.
    #[error("stopped at byte {offset}, as asked")]
    Stopped {
        /// So much is durable.
        offset: u64,
    },
    /// Told to give up.
    #[error("given up at byte {offset}: {why}")]
    GaveUp {
        /// So far the copy had come.
        offset: u64,
        /// As the observer said.
        why: String,
    },
    /// The header that is to be put in place is longer than 1 MiB or than the file.
    #[error("a header of {len} bytes is too long for this file")]
    Header {
        /// Its length.
        len: usize,
    },
    /// What was noted of an earlier attempt could not be forgotten, so nothing was begun.
    #[error("cannot forget how far an earlier attempt came: {why}")]
    Unforgotten {
        /// Why.
        why: String,
    },
    /// A fault of this program.
    #[error("internal fault: {what}")]
    Internal {
        /// Which.
        what: &'static str,
    },
}

impl CopyError {
    fn write(offset: u64, size: u64, source: std::io::Error) -> Self {
        match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT) => Self::NoSpace { offset },
            Some(Errno::FBIG) => Self::TooLarge { offset, size },
            _ => Self::Write { offset, source },
        }
    }
}

/// How a copy begins.
#[derive(Clone, Debug, Default)]
pub enum Start {
    /// Nothing with that name may be there.
    #[default]
    Fresh,
    /// An earlier attempt of ours may have left something: it is removed first.
    Again,
    /// Where the token says. Refused with [`CopyError::StaleToken`] if that is not possible.
    Resume(Box<ResumeToken>),
}

/// How bytes are moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// The best that works: clone, then server-side copy on file systems that have one, then read and write.
    #[default]
    Auto,
    /// Share the source's blocks (`FICLONE`), or fail over to the next.
    Clone,
    /// `copy_file_range`, or fail over to read and write.
    CopyRange,
    /// Read and write.
    ReadWrite,
}

/// What a copy is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// How bytes are moved.
    pub method: Method,
    /// A bandwidth limit on data (holes are free).
    pub throttle: Option<Throttle>,
    /// Bytes that replace the beginning of the copy; at most 1 MiB. Empty: the copy equals the source.
    pub header: Vec<u8>,
    /// A token after so many bytes …
    pub checkpoint_bytes: u64,
    /// … or after so long, whichever comes first.
    pub checkpoint_time: Duration,
    /// Threads that hash; 0: as many as there are processors, at most four.
    pub hashers: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            method: Method::Auto,
            throttle: None,
            header: Vec::new(),
            checkpoint_bytes: 256 << 20,
            checkpoint_time: Duration::from_secs(2),
            hashers: 0,
        }
    }
}

/// What an observer wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Make durable what there is and return.
    Stop,
    /// Return at once; the reason is for the error.
    GiveUp(String),
}

/// Whoever watches a copy. Called from several threads.
pub trait Observer: Sync {
    /// Asked before every segment, and while waiting for bandwidth: cheap, please.
    fn control(&self) -> Control {
        Control::Continue
    }
    /// So many bytes of the file are behind us, holes included; of so many.
    fn progress(&self, done: u64, total: u64) {
        let _ = (done, total);
    }
    /// What the token says is durable.
    fn durable(&self, token: &ResumeToken) {
        let _ = token;
    }
    /// The copy begins anew: no earlier token may be handed to a later attempt, not even after a power cut. The new file may
    /// well get the inode of the old one, and then the token would speak for bytes that are not there.
    fn anew(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Nobody watches.
impl Observer for () {}

/// A finished copy. File and folder are durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Size of the file in bytes, holes included.
    pub size: u64,
    /// Bytes of data moved (or shared) by this call: holes, and what an earlier attempt did, left out.
    pub moved: u64,
    /// BLAKE3 of the source's content.
    pub source_hash: blake3::Hash,
    /// BLAKE3 of the copy's content: the same unless a header was replaced.
    pub hash: blake3::Hash,
    /// How bytes were moved in the end.
    pub method: Method,
    /// The source as it was copied.
    pub source: Identity,
    /// The copy.
    pub copy: Identity,
}

/// Copies `source` to `folder/name` and returns when the copy is durable. Blocks.
pub fn copy(
    source: &SourceFile,
    folder: &Folder,
    name: &Component,
    start: Start,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Copied, CopyError> {
    source.prepare()?;
    if !matches!(start, Start::Resume(_)) {
        observer.anew().map_err(|why| CopyError::Unforgotten { why })?;
    }
    let mut resume = None;
    let file = match start {
        Start::Fresh => folder.create_file(name)?,
        Start::Again => {
            folder.remove_file(name)?;
            folder.create_file(name)?
        }
        Start::Resume(token) => {
            let file = match folder.open_file_for_writing(name) {
                Err(RootError::Missing { .. }) => {
                    return Err(CopyError::StaleToken { why: "what there was of the copy is gone" });
                }
                file => file?,
            };
            let stat = rustix::fs::fstat(&file)
                .map_err(|e| RootError::from_errno("look at", folder.path_of(name), e))?;
            resume = Some(token.resume(source.identity(), &stat, &options.header)?);
            file
        }
    };
    // Before the first token exists the name must be durable, or a power cut leaves a token without its file.
    folder.sync()?;
    let target = TargetFile::new(file);
    let job = pump::Job { source, target: &target, options, observer, clock: &SystemClock::default() };
    let done = match job.run(resume) {
        Ok(done) => done,
        Err(CopyError::Sync { source, .. }) => {
            let discarded = folder.remove_file(name).is_ok() && folder.sync().is_ok();
            return Err(CopyError::Sync { source, discarded });
        }
        Err(other) => return Err(other),
    };
    source.unchanged()?;
    folder.sync()?;
    let copy = target.identity().map_err(|e| CopyError::Write { offset: done.size, source: e })?;
    Ok(Copied {
        size: done.size,
        moved: done.moved,
        source_hash: done.source_hash,
        hash: done.hash,
        method: done.method,
        source: source.identity(),
        copy,
    })
}

/// Does as [`copy`] does, and begins anew where the token of an earlier attempt does not fit any more. Blocks.
pub fn copy_or_anew(
    source: &SourceFile,
    folder: &Folder,
    name: &Component,
    start: Start,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Copied, CopyError> {
    match copy(source, folder, name, start, options, observer) {
        Err(CopyError::StaleToken { why }) => {
            tracing::info!(why, "the copy begins anew");
            copy(source, folder, name, Start::Again, options, observer)
        }
        done => done,
    }
}

/// BLAKE3 of a file's logical content, holes skipped over and hashed as zeroes. Blocks.
///
/// Also what checks a published file: same reading, same errors, nothing written.
pub fn hash(
    source: &SourceFile,
    throttle: Option<Throttle>,
    observer: &dyn Observer,
) -> Result<blake3::Hash, CopyError> {
    source.prepare()?;
    let options = Options { throttle, ..Options::default() };
    let target = files::Nowhere;
    let job =
        pump::Job { source, target: &target, options: &options, observer, clock: &SystemClock::default() };
    let done = job.run(None)?;
    source.unchanged()?;
    Ok(done.hash)
}

#[cfg(test)]
mod tests;
