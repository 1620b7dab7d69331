//! Connections without end: none of them is at the expense of whoever asks for something.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use support::Daemon;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vmkeep_host::api::serve::Manners;
use vmkeep_host::api::types::{Accepted, JobDetail, Live, Status};

/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3600);

async fn silent(daemon: &Daemon) -> UnixStream {
    UnixStream::connect(&daemon.socket).await.unwrap()
}

/// Waits until the daemon has ended a connection; what it said before.
async fn ended(stream: &mut UnixStream) -> String {
    let mut said = String::new();
    // One that was ended with something unread is reset.
    let _ = stream.read_to_string(&mut said).await;
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_request_ends_by_itself_also_after_one() {
    let daemon = Daemon::with(Manners { most: 100, idle: Duration::from_millis(100) }).await;
    assert_eq!(ended(&mut silent(&daemon).await).await, "");
    let mut slow = silent(&daemon).await;
    slow.write_all(b"GET /v1/status HTTP/1.1\r\nhost: ").await.unwrap();
    ended(&mut slow).await;
    let mut kept = silent(&daemon).await;
    kept.write_all(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert!(ended(&mut kept).await.starts_with("HTTP/1.1 200 OK\r\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_connections_without_a_request_give_way_and_a_job_that_is_watched_is_not_lost() {
    let daemon = Daemon::with(Manners { most: 4, idle: NEVER }).await;
    let accepted: Accepted = daemon.client.post("/v1/snapshot", &Daemon::request(), None).await.unwrap();
    let Accepted::Job(job) = accepted else { panic!("{accepted:?}") };
    let mut watched = daemon.client.stream(&format!("/v1/jobs/{}/watch", job.short)).await.unwrap();
    let mut all = Vec::new();
    for _ in 0..500 {
        all.push(silent(&daemon).await);
    }
    for _ in 0..10 {
        daemon.client.get::<Status>("/v1/status").await.unwrap();
    }
    // The watcher has one of four places, and three are left to the rest.
    for stream in &mut all[..490] {
        assert_eq!(ended(stream).await, "");
    }
    daemon.gates.add_permits(2);
    let end: JobDetail = loop {
        match watched.event::<Live>().await.unwrap().expect("the stream ends with the job") {
            Live::Job(_) => {}
            Live::End(detail) => break *detail,
        }
    };
    assert!(end.job.ended.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn when_every_connection_is_at_work_a_new_one_is_told_so() {
    let daemon = Daemon::with(Manners { most: 2, idle: NEVER }).await;
    let accepted: Accepted = daemon.client.post("/v1/snapshot", &Daemon::request(), None).await.unwrap();
    let Accepted::Job(job) = accepted else { panic!("{accepted:?}") };
    let path = format!("/v1/jobs/{}/watch", job.short);
    let mut watching =
        [daemon.client.stream(&path).await.unwrap(), daemon.client.stream(&path).await.unwrap()];
    for stream in &mut watching {
        stream.event::<Live>().await.unwrap().unwrap();
    }
    let said = ended(&mut silent(&daemon).await).await;
    assert!(said.starts_with("HTTP/1.1 503 ") && said.contains("2 requests are being answered"), "{said}");
    drop(watching);
    daemon.gates.add_permits(2);
    // As soon as the daemon has noticed.
    while daemon.client.get::<Status>("/v1/status").await.is_err() {
        tokio::task::yield_now().await;
    }
}
