//! Connections: how many, for how long, and what is kept back from them.
//!
//! A connection costs a file descriptor, and so does every file that a job works on. A client that opens connections
//! without end (a script that loops, a browser that never closes) must not be what makes a backup fail. So at most a part of
//! the descriptors goes to connections ([`Manners`]); the rest is the jobs'. When that part is used up, the connection that
//! was opened longest ago among those without a request gives way to the new one: whoever asks for something now is worth
//! more than whoever asks for nothing. Only when every one is at work is a new one refused, with an error that says so.
//! They are all accepted, because a queue in the kernel that is full refuses everybody.
//!
//! A connection on which no request begins, or goes on to arrive, is ended after a while by itself.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::{Extension, Router};
use http_body_util::BodyExt;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use vmkeep_workflow::Fault;

use super::listener::{Peer, Socket};
use super::types::ErrorBody;
use crate::codes;

/// Connections at a time, if there are descriptors for many more.
const MOST: usize = 512;
/// The part of all descriptors that connections may take.
const PART: u64 = 4;
/// How long a connection may be without a request.
const IDLE: Duration = Duration::from_secs(30);

/// How connections are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manners {
    /// So many at a time.
    pub most: usize,
    /// One without a request ends after so long.
    pub idle: Duration,
}

impl Manners {
    /// With so many descriptors in all.
    #[must_use]
    pub fn with(descriptors: u64) -> Self {
        let most = usize::try_from(descriptors / PART).unwrap_or(MOST).clamp(1, MOST);
        Self { most, idle: IDLE }
    }
}

/// Takes as many file descriptors as the system allows this process; returns how many that are.
#[must_use]
pub fn raise_descriptors() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok() {
        return maximum.unwrap_or(u64::MAX);
    }
    current.unwrap_or(u64::MAX)
}

/// Serves until `stop`; then until the requests under way are answered.
pub async fn serve(socket: Socket, router: Router, manners: Manners, stop: impl Future<Output = ()>) {
    let (open, mut tasks) = (Open::default(), JoinSet::new());
    tokio::pin!(stop);
    loop {
        let (stream, peer) = tokio::select! {
            () = &mut stop => break,
            Some(_) = tasks.join_next() => continue,
            accepted = socket.accept() => accepted,
        };
        match open.admit(manners.most) {
            Some(connection) => {
                let service = TowerToHyperService::new(router.clone().layer(Extension(ConnectInfo(peer))));
                tasks.spawn(converse(stream, service, connection, manners.idle));
            }
            None => refuse(&stream, peer, manners.most),
        }
    }
    // Whoever comes now finds no daemon.
    drop(socket);
    open.end();
    while tasks.join_next().await.is_some() {}
}

async fn converse(
    stream: UnixStream,
    service: TowerToHyperService<Router>,
    connection: Connection,
    idle: Duration,
) {
    let requests = connection.requests.clone();
    let service = service_fn(move |request| {
        let request_under_way = UnderWay::begin(&requests);
        let answer = service.call(request);
        async move {
            let response = answer.await?;
            // A request is under way until the last byte of its answer is.
            Ok::<_, std::convert::Infallible>(response.map(|body| {
                Body::new(body.map_frame(move |frame| {
                    let _ = &request_under_way;
                    frame
                }))
            }))
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(idle);
    let conversation = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(conversation);
    let ended = tokio::select! {
        ended = conversation.as_mut() => ended,
        () = connection.ending.cancelled() => {
            if connection.requests.load(Ordering::SeqCst) == 0 {
                return;
            }
            conversation.as_mut().graceful_shutdown();
            conversation.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}

/// One that there is no room for is told so, if it takes that at once.
fn refuse(stream: &UnixStream, peer: Peer, most: usize) {
    tracing::warn!(uid = ?peer.uid, most, "refused a connection: all are at work");
    let fault = Fault::transient(
        codes::DAEMON_UNREACHABLE,
        "answer the request",
        "",
        format!("{most} requests are being answered, and no more are taken at a time"),
    )
    .remedy("See what keeps so many requests open, and ask again");
    let body = serde_json::to_string(&ErrorBody::from(&fault)).unwrap_or_default();
    let length = body.len();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close";
    let _ = stream.try_write(format!("{head}\r\ncontent-length: {length}\r\n\r\n{body}").as_bytes());
}

/// The open connections, by the order in which they came.
#[derive(Clone, Default)]
struct Open(Arc<Mutex<(u64, BTreeMap<u64, Entry>)>>);

struct Entry {
    requests: Arc<AtomicUsize>,
    ending: CancellationToken,
}

/// An open connection. Counted until it is dropped.
struct Connection {
    open: Open,
    id: u64,
    requests: Arc<AtomicUsize>,
    ending: CancellationToken,
}

impl Open {
    /// Another connection, in place of one that asks for nothing if there are as many as there may be.
    fn admit(&self, most: usize) -> Option<Connection> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (next, all) = &mut *held;
        if all.len() >= most {
            let silent = |entry: &Entry| entry.requests.load(Ordering::SeqCst) == 0;
            let oldest = all.iter().find(|(_, entry)| silent(entry)).map(|(id, _)| *id)?;
            if let Some(entry) = all.remove(&oldest) {
                entry.ending.cancel();
            }
        }
        *next += 1;
        let (requests, ending) = (Arc::<AtomicUsize>::default(), CancellationToken::new());
        all.insert(*next, Entry { requests: requests.clone(), ending: ending.clone() });
        Some(Connection { open: self.clone(), id: *next, requests, ending })
    }

    fn end(&self) {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.1.values().for_each(|entry| entry.ending.cancel());
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut held = self.open.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.1.remove(&self.id);
    }
}

/// A request under way on a connection.
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn begin(requests: &Arc<AtomicUsize>) -> Self {
        requests.fetch_add(1, Ordering::SeqCst);
        Self(requests.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_take_a_part_of_the_descriptors_only() {
        assert_eq!(Manners::with(1024).most, 256);
        assert_eq!(Manners::with(1 << 20).most, MOST);
        assert_eq!(Manners::with(0).most, 1);
    }

    #[test]
    fn the_oldest_that_asks_for_nothing_gives_way_and_nobody_at_work_does() {
        let open = Open::default();
        let first = open.admit(2).unwrap();
        let at_work = UnderWay::begin(&first.requests);
        let second = open.admit(2).unwrap();
        let third = open.admit(2).unwrap();
        assert!(second.ending.is_cancelled() && !first.ending.is_cancelled());
        let _also = UnderWay::begin(&third.requests);
        assert!(open.admit(2).is_none());
        drop(at_work);
        assert!(open.admit(2).is_some());
        assert!(first.ending.is_cancelled());
    }
}
