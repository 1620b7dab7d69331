//! Restores in place, the way back, and what is kept aside.

use axum::extract::State as Extract;
use axum::http::HeaderMap;

use super::changes::{Asked, place};
use super::{State, key};
use crate::api::answer::{Answer, Json};
use crate::api::types::{Accepted, DiscardRequest, InPlaceRequest, KeptRow, UndoRequest};

pub(super) async fn in_place(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<InPlaceRequest>,
) -> Answer<Accepted> {
    app.ready("restore the backup", &request.backup)?;
    let order = app.site.in_place(&request).await?;
    let asked = Asked { reason: request.reason, dry_run: request.dry_run, queue: false };
    place(&app, order, asked, key(&headers)?).await
}

pub(super) async fn undo(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<UndoRequest>,
) -> Answer<Accepted> {
    app.ready("undo the restore", &request.job)?;
    let order = app.site.undo(&request).await?;
    let asked = Asked { reason: request.reason, dry_run: request.dry_run, queue: false };
    place(&app, order, asked, key(&headers)?).await
}

pub(super) async fn discard(
    Extract(app): State,
    headers: HeaderMap,
    Json(request): Json<DiscardRequest>,
) -> Answer<Accepted> {
    app.ready("discard what is kept aside", &request.job)?;
    let order = app.site.discard(&request).await?;
    let asked = Asked { reason: request.reason, dry_run: request.dry_run, queue: false };
    place(&app, order, asked, key(&headers)?).await
}

pub(super) async fn kept(Extract(app): State) -> Answer<Vec<KeptRow>> {
    Ok(Json(app.site.kept().await?.0))
}
