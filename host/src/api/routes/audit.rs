//! The journal as evidence, over the wire.

use std::io::{self, Write};
use std::sync::mpsc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State as Extract};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::Deserialize;
use vmkeep_store::burial::Policy;
use vmkeep_store::export::{Choice, Selection, export as write_export};
use vmkeep_workflow::{Fault, StreamId};

use super::State;
use crate::api::answer::{Answer, Failure, Json, Query};
use crate::api::types::{Audited, HistoryPruneRequest, KeyChange, Pruned, Replayed};
use crate::{audit, codes};

/// Bytes that are gathered before they go on their way.
const PIECE: usize = 64 << 10;

pub(super) fn damaged(object: &str, error: &dyn std::fmt::Display) -> Fault {
    audit::damaged("read the journal", object, error)
}

pub(super) async fn replay(Extract(app): State, Path(job): Path<String>) -> Answer<Replayed> {
    let job = app.find_job(&job).await?;
    let records = super::jobs::records(&app, job).await?;
    Ok(Json(audit::replay(&StreamId::job(job), &records)?))
}

pub(super) async fn verify(Extract(app): State) -> Answer<Audited> {
    let state = app.config.state_dir.clone();
    // Before the store: a head that is signed meanwhile would be one that the walk does not come to.
    let beside = tokio::task::spawn_blocking(move || crate::heads::beside(&state)).await;
    let beside = beside.map_err(|e| super::changes::gone(&e))??;
    Ok(Json(audit::verify_store(&*app.store, beside.as_ref()).await?))
}

pub(super) async fn rotate(Extract(app): State) -> Answer<KeyChange> {
    let sealer = app.sealer.clone();
    // Detached from the connection: a client that goes away does not stop it halfway.
    let rotating = tokio::spawn(async move { sealer.rotate().await });
    Ok(Json(rotating.await.map_err(|e| super::changes::gone(&e))??))
}

pub(super) async fn prune(Extract(app): State, Json(request): Json<HistoryPruneRequest>) -> Answer<Pruned> {
    if !request.dry_run {
        app.ready("prune the journal", "")?;
    }
    let configured = app.config.history;
    let policy = Policy {
        keep_days: request.keep_days.or(configured.keep_days).filter(|days| *days > 0),
        keep_jobs: request.keep_jobs.or(configured.keep_jobs).filter(|jobs| *jobs > 0),
    };
    if policy.keeps_everything() {
        let fault = Fault::permanent(
            codes::USAGE,
            "prune the journal",
            "",
            "nothing says how long the history of ended jobs is to be kept",
        );
        return Err(fault
            .remedy("Say it: `vmkeep audit prune --keep-days 365`, or set history.keep_days")
            .into());
    }
    let (store, site, by) = (app.store.clone(), app.site.clone(), app.actor(request.reason));
    // Detached from the connection: a client that goes away does not stop it halfway.
    let pruning =
        tokio::spawn(
            async move { crate::history::prune(&*store, &*site, policy, by, request.dry_run).await },
        );
    let pruned = pruning.await.map_err(|e| super::changes::gone(&e))??;
    Ok(Json(pruned))
}

/// What to export. Absent is everything.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct What {
    job: Option<String>,
    /// Name or UUID of the domain, as it was when the job was asked for.
    domain: Option<String>,
    /// States, separated by commas.
    state: Option<String>,
    since: Option<Timestamp>,
    until: Option<Timestamp>,
}

pub(super) async fn export(Extract(app): State, Query(what): Query<What>) -> Result<Response, Failure> {
    let job = match what.job {
        Some(job) => {
            let job = app.find_job(&job).await?;
            app.engine.summary(job).await?;
            Some(job)
        }
        None => None,
    };
    let status = what.state.as_deref().map(super::jobs::statuses).transpose()?.unwrap_or_default();
    let choice = Choice { job, subject: what.domain, status, since: what.since, until: what.until };
    let parts = match choice.is_everything() {
        true => None,
        false => Some(choice.parts(&*app.store).await.map_err(|e| e.fault("read the journal", ""))?),
    };
    // Written, and waited for, on threads that may block: the export blocks while it writes.
    let (pieces, body) = mpsc::sync_channel::<io::Result<Bytes>>(4);
    let store = app.store.clone();
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || {
        let mut out = Pieces { buffer: Vec::with_capacity(PIECE), pieces };
        let selection = parts.as_deref().map_or(Selection::Whole, Selection::Parts);
        if let Err(error) = runtime.block_on(write_export(&*store, selection, &mut out)) {
            tracing::warn!(%error, "an export was cut off");
            // The answer breaks off, and the file lacks its last line: nobody takes it for whole.
            let _ = out.pieces.send(Err(io::Error::other(error.to_string())));
        }
    });
    let stream = futures_util::stream::unfold(body, |body| async move {
        let next = tokio::task::spawn_blocking(move || body.recv().ok().map(|piece| (piece, body))).await;
        next.ok().flatten()
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(stream)).into_response())
}

/// A writer whose bytes go over the wire.
struct Pieces {
    buffer: Vec<u8>,
    pieces: mpsc::SyncSender<io::Result<Bytes>>,
}

impl Write for Pieces {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(data);
        if self.buffer.len() >= PIECE {
            self.flush()?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = Bytes::from(std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE)));
        self.pieces
            .send(Ok(piece))
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the reader went away"))
    }
}
