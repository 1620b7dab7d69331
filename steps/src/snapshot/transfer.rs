//! How any file comes into the backup's folder: resumable, watched, and with the same failures.
//!
//! An attempt goes on where an earlier one was last known to be durable, whether that one was cut off (then a probe has
//! looked at what is there) or has failed by itself (then the token is compared when the copy is opened). The one
//! exception is a failed fsync: what is durable then is not known, and all is written again.

use std::path::PathBuf;

use tokio_util::sync::CancellationToken;
use vmkeep_workflow::progress::Progress;
use vmkeep_workflow::{Class, Code, Fault, StepContext, Verdict};

use super::Places;
use super::copy::place_fault;
use super::growth::Watch;
use crate::codes;
use crate::image::copy::{
    self, Control, Copied, CopyError, Observer, Options, ResumeToken, SourceFile, Start,
};
use crate::image::root::{Component, Folder};

/// Where an attempt begins.
pub(crate) fn start(cx: &StepContext) -> Start {
    let saved = cx.progress.saved();
    match cx.resume.as_ref().or(saved.as_ref()).and_then(ResumeToken::parse) {
        Some(token) => Start::Resume(Box::new(token)),
        None if cx.attempt > 1 => Start::Again,
        None => Start::Fresh,
    }
}

/// A step that only reads needs no more than its context: the engine is told how far it is, and says when to stop.
impl Observer for StepContext {
    fn control(&self) -> Control {
        if self.stopping() { Control::Stop } else { Control::Continue }
    }

    fn progress(&self, done: u64, total: u64) {
        self.progress.report(done, total, "bytes");
    }
}

/// Carries news from the copying threads to the engine, and wishes back.
pub(crate) struct Reports {
    progress: Progress,
    stop: CancellationToken,
    runtime: tokio::runtime::Handle,
    watch: Watch,
}

impl Reports {
    /// Of this attempt, as long as the overlays leave room.
    pub(crate) fn of(cx: &StepContext, watch: Watch) -> Self {
        let runtime = tokio::runtime::Handle::current();
        Self { progress: cx.progress.clone(), stop: cx.stop.clone(), runtime, watch }
    }

    /// Nothing of the copy is known to be durable.
    fn forget(&self) -> Result<(), Fault> {
        crate::blocking::wait(&self.runtime, self.progress.save(&serde_json::Value::Null))
    }
}

impl Observer for Reports {
    fn control(&self) -> Control {
        if let Some(why) = self.watch.alarm() {
            return Control::GiveUp(why);
        }
        if self.stop.is_cancelled() { Control::Stop } else { Control::Continue }
    }

    fn progress(&self, done: u64, total: u64) {
        self.progress.report(done, total, "bytes");
    }

    fn durable(&self, token: &ResumeToken) {
        if let Err(fault) = crate::blocking::wait(&self.runtime, self.progress.save(token)) {
            // Then a later attempt begins earlier; nothing else is lost.
            tracing::warn!(%fault, "how far the copy is was not stored");
        }
    }

    fn anew(&self) -> Result<(), String> {
        if self.progress.saved().is_none_or(|note| note.is_null()) {
            return Ok(());
        }
        self.forget().map_err(|fault| fault.to_string())
    }
}

/// Copies a file into a folder. Blocks.
pub(crate) fn transfer(
    source: &SourceFile,
    (folder, name): (&Folder, &Component),
    start: Start,
    options: &Options,
    reports: &Reports,
    what: &Failing<'_>,
) -> Result<Copied, Fault> {
    let done = copy::copy_or_anew(source, folder, name, start, options, reports);
    // The note first: it must not speak of what is not there.
    let forgotten = match &done {
        Err(CopyError::Sync { .. } | CopyError::GaveUp { .. } | CopyError::NoSpace { .. }) => {
            reports.forget()
        }
        _ => Ok(()),
    };
    if let Err(CopyError::GaveUp { .. } | CopyError::NoSpace { .. }) = &done {
        // Where the guest's overlays lie on the same file system this is what makes room for them, long before the undo.
        if let Err(e) = folder.remove_file(name) {
            tracing::warn!(error = %e, "what was copied so far is not removed yet");
        }
    }
    forgotten?;
    done.map_err(|e| what.fault(e))
}

/// How far a copy is that was cut off.
pub(crate) async fn how_far<T>(
    cx: &StepContext,
    places: &Places,
    folder: PathBuf,
    name: Component,
) -> Verdict<T> {
    let Some(token) = cx.progress.saved() else { return Verdict::NotDone };
    let places = places.clone();
    let fits = crate::blocking::run(move || {
        let found = places.roots.open_folder(&folder).and_then(|folder| folder.stat(&name));
        let parsed = ResumeToken::parse(&token)?;
        matches!(found, Ok(Some(stat)) if parsed.fits_target(&stat)).then_some(token)
    })
    .await;
    match fits {
        Ok(Some(token)) => Verdict::Partial(token),
        Ok(None) => Verdict::NotDone,
        Err(e) => Verdict::Unknown(e.to_string()),
    }
}

/// What a failure is said of.
pub(crate) struct Failing<'a> {
    /// What was being done.
    pub(crate) doing: &'a str,
    /// The file.
    pub(crate) object: &'a str,
    /// The code of a failure that has none of its own.
    pub(crate) code: Code,
}

impl Failing<'_> {
    /// The failure of a copy.
    pub(crate) fn fault(&self, e: CopyError) -> Fault {
        let Self { doing, object, code } = *self;
        let permanent = |code, e: CopyError| Fault::permanent(code, doing, object, e);
        match e {
            CopyError::Stopped { .. } => Fault::stopped(doing, object),
            CopyError::GaveUp { why, .. } => {
                Fault::permanent(codes::OVERLAYS_OUTGREW_SPACE, doing, object, why)
                    .remedy("Make room beside the guest's images, or back up at a quieter time")
            }
            CopyError::NoSpace { .. } => permanent(codes::NOT_ENOUGH_DISK_SPACE, e),
            CopyError::SourceChanged { .. } | CopyError::SourceShrunk { .. } => {
                permanent(codes::SOURCE_CHANGED, e)
            }
            CopyError::Place(place) => place_fault(&place, code, doing, object),
            CopyError::Internal { .. } => permanent(Code::UNDEFINED, e),
            e => {
                let transient =
                    matches!(e, CopyError::Read { .. } | CopyError::Write { .. } | CopyError::Sync { .. });
                let class = if transient { Class::Transient } else { Class::Permanent };
                permanent(code, e).class(class)
            }
        }
    }
}
