//! The command line's way to the daemon: HTTP over its Unix socket.
//!
//! One connection per request: a command makes one or two, and a connection that is never kept can never be stale.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use vmkeep_workflow::Fault;

use crate::api::types::{ErrorBody, IDEMPOTENCY_KEY};
use crate::codes;

/// A daemon, by its socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the daemon behind that socket. Connects to nothing yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for something.
    ///
    /// # Errors
    /// The daemon's error, or [`codes::DAEMON_UNREACHABLE`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Fault> {
        let body = whole(self.send(Method::GET, path, Bytes::new(), None).await?, path).await?;
        decode(&body, path)
    }

    /// Asks to change something. The key makes a repetition harmless.
    ///
    /// # Errors
    /// The daemon's error, or [`codes::DAEMON_UNREACHABLE`].
    pub async fn post<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        key: Option<&str>,
    ) -> Result<T, Fault> {
        let body = serde_json::to_vec(body).map_err(|e| garbled(path, &e))?;
        let body = whole(self.send(Method::POST, path, body.into(), key).await?, path).await?;
        decode(&body, path)
    }

    /// Asks for something that arrives piece by piece.
    ///
    /// # Errors
    /// The daemon's error, or [`codes::DAEMON_UNREACHABLE`].
    pub async fn stream(&self, path: &str) -> Result<Pieces, Fault> {
        let response = self.send(Method::GET, path, Bytes::new(), None).await?;
        if !response.status().is_success() {
            whole(response, path).await?;
            return Err(broken(path, "an answer that is neither an error nor a stream"));
        }
        Ok(Pieces { body: response.into_body(), path: path.to_owned(), rest: Vec::new() })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        key: Option<&str>,
    ) -> Result<Response<Incoming>, Fault> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable(&e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| broken(path, &e.to_string()))?;
        tokio::spawn(async move {
            // Whatever ends the connection early shows up in the request as well.
            let _ = connection.await;
        });
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "vmkeepd")
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = key {
            request = request.header(IDEMPOTENCY_KEY, key);
        }
        let request = request.body(Full::new(body)).map_err(|e| garbled(path, &e))?;
        sender.send_request(request).await.map_err(|e| broken(path, &e.to_string()))
    }

    fn unreachable(&self, error: &std::io::Error) -> Fault {
        use std::io::ErrorKind;
        let (cause, remedy) = match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => (
                "vmkeepd is not running, or listens elsewhere".to_owned(),
                "Start vmkeepd (systemctl start vmkeepd, or just: vmkeepd), or name its socket with --socket",
            ),
            ErrorKind::PermissionDenied => (
                "the socket belongs to another user".to_owned(),
                "Run vmkeep as the user that vmkeepd runs as: only that user may use it",
            ),
            _ => (error.to_string(), "See whether vmkeepd is running"),
        };
        Fault::permanent(codes::DAEMON_UNREACHABLE, "reach vmkeepd", self.socket.display().to_string(), cause)
            .remedy(remedy)
    }
}

/// An answer that arrives piece by piece.
#[derive(Debug)]
pub struct Pieces {
    body: Incoming,
    path: String,
    rest: Vec<u8>,
}

impl Pieces {
    /// The next raw piece; nothing at the end.
    ///
    /// # Errors
    /// When the daemon went away in the middle.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(broken(&self.path, &error.to_string())),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// The data of the next server-sent event; nothing at the end.
    ///
    /// # Errors
    /// When the daemon went away in the middle, or the data is not a `T`.
    pub async fn event<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Fault> {
        loop {
            while let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                // Our events have one line of data each; comments keep the connection alive.
                if let Some(data) = line.strip_prefix(b"data:") {
                    return decode(data, &self.path).map(Some);
                }
            }
            match self.next().await? {
                None => return Ok(None),
                Some(piece) => self.rest.extend_from_slice(&piece),
            }
        }
    }
}

/// Percent-encodes one segment of a path, or one value of a query.
#[must_use]
pub fn segment(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

async fn whole(response: Response<Incoming>, path: &str) -> Result<Bytes, Fault> {
    let status = response.status();
    let body = response.into_body().collect().await.map_err(|e| broken(path, &e.to_string()))?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    match serde_json::from_slice::<ErrorBody>(&body) {
        Ok(error) => Err(error.into()),
        Err(_) => Err(broken(path, &format!("HTTP status {status}"))),
    }
}

fn decode<T: DeserializeOwned>(body: &[u8], path: &str) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|e| garbled(path, &e))
}

fn broken(path: &str, cause: &str) -> Fault {
    Fault::permanent(codes::DAEMON_UNREACHABLE, "talk to vmkeepd", path, cause)
        .remedy("See vmkeepd's log; a request that changes something can be repeated with the same --key")
}

fn garbled(path: &str, error: &dyn std::fmt::Display) -> Fault {
    Fault::permanent(codes::UNDEFINED_ERROR, "understand vmkeepd's answer", path, error)
        .remedy("Use vmkeep and vmkeepd of the same release")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_survives_as_one_segment() {
        assert_eq!(segment("a b/c?d#e%\n"), "a%20b%2Fc%3Fd%23e%25%0A");
        assert_eq!(segment("web-1.x_~"), "web-1.x_~");
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_a_coded_error_with_a_remedy() {
        let error = Client::new("/nonexistent/socket").get::<()>("/v1/status").await.unwrap_err();
        assert_eq!(error.code, codes::DAEMON_UNREACHABLE);
        assert!(error.remedy.contains("vmkeepd"));
    }
}
