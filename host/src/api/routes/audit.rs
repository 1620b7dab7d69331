//! The journal as evidence.

use axum::extract::{Path, State as Extract};
use axum::response::Response;
use vmkeep_workflow::Fault;

use super::State;
use crate::api::answer::{Answer, Failure};
use crate::api::types::{Audited, Replayed};

pub trait Trail: Send + Sync {}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut out, b| {
        let _ = write!(out, "{b:02x}");
        out
    })
}

pub(super) fn damaged(object: &str, error: &dyn std::fmt::Display) -> Fault {
    Fault::permanent(crate::codes::STORE_DAMAGED, "read the journal", object, error)
        .remedy("`vmkeep audit verify` names what is damaged")
}

pub(super) async fn replay(Extract(_app): State, Path(job): Path<String>) -> Answer<Replayed> {
    Err(damaged(&job, &"").into())
}
pub(super) async fn verify(Extract(_app): State) -> Answer<Audited> {
    Err(damaged("", &"").into())
}
pub(super) async fn export(Extract(_app): State) -> Result<Response, Failure> {
    Err(damaged("", &"").into())
}
