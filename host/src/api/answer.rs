//! Answers, and the one shape that every error has.

use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmkeep_workflow::{Code, Fault};

use super::types::ErrorBody;
use crate::codes;

/// How long the body of a request may take to arrive.
const ARRIVING: Duration = Duration::from_secs(30);

/// An error on its way out.
#[derive(Debug)]
pub struct Failure(pub Fault);

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self(fault)
    }
}

/// What a handler returns.
pub type Answer<T> = Result<Json<T>, Failure>;

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (status_of(self.0.code), Json(ErrorBody::from(&self.0))).into_response()
    }
}

/// The HTTP status that goes with a code. Programs should look at the code; this is for proxies and people.
#[must_use]
pub fn status_of(code: Code) -> StatusCode {
    match code {
        codes::USAGE | codes::AMBIGUOUS_NAME => StatusCode::BAD_REQUEST,
        codes::NOT_PERMITTED => StatusCode::FORBIDDEN,
        codes::NO_SUCH_JOB | codes::CANNOT_FIND_MACHINE | codes::NO_SUCH_BACKUP => StatusCode::NOT_FOUND,
        Code::SUBJECT_BUSY | Code::NEEDS_ATTENTION | Code::INVALID_STATE | Code::DUPLICATE_KEY => {
            StatusCode::CONFLICT
        }
        codes::HYPERVISOR_UNREACHABLE => StatusCode::SERVICE_UNAVAILABLE,
        Code::STORE_RESERVE_SPENT | codes::NOT_ENOUGH_DISK_SPACE => StatusCode::INSUFFICIENT_STORAGE,
        Code::UNDEFINED => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    }
}

/// A JSON body, either way, whose errors have codes.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let bytes = tokio::time::timeout(ARRIVING, axum::body::Bytes::from_request(request, state))
            .await
            .map_err(|_| misused("body", &format!("it did not arrive within {} s", ARRIVING.as_secs())))?
            .map_err(|e| misused("body", &e.body_text()))?;
        // An absent body is an empty object: every field of an act is optional.
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        serde_json::from_slice(text).map(Self).map_err(|e| misused("body", &e.to_string()))
    }
}

/// The query of a request, whose errors have codes.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Failure> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|query| Self(query.0))
            .map_err(|e| misused("query", &e.body_text()))
    }
}

/// A request that does not say what it has to.
#[must_use]
pub fn misused(part: &str, why: &str) -> Failure {
    Failure(
        Fault::permanent(codes::USAGE, "understand the request", part, why)
            .remedy("See the API's description for the fields and their types"),
    )
}
