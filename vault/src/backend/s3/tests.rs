use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fake::{BUCKET, ID, Server};
use super::*;
use crate::backend::conformance::{Place, conformance, pack};
use crate::backend::testing::Cutting;
use crate::testing::noise;

const SECRET: &str = "hunter2-of-this-account";

async fn opened(at: std::net::SocketAddr, id: &str) -> S3 {
    let folder = tempfile::tempdir().unwrap();
    let credentials = folder.path().join("credentials");
    let text = format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {SECRET}\n");
    std::fs::write(&credentials, text).unwrap();
    let address = format!("s3://{BUCKET}/site/a?endpoint=http://{at}").parse().unwrap();
    S3::open(&address, &Options { credentials: Some(credentials), ..Options::default() }).await.unwrap()
}

async fn place() -> Place {
    let server = Server::start().await;
    let store = server.store.clone();
    Place {
        first: Arc::new(opened(server.at, ID).await),
        second: Arc::new(opened(server.at, ID).await),
        refuses: true,
        stranger: Box::new(move |name| {
            let (store, key) = (store.clone(), format!("site/a/{name}"));
            store.objects.lock().unwrap().insert(key.clone(), Bytes::new());
            Box::new(move || store.objects.lock().unwrap().contains_key(&key))
        }),
        _kept: Box::new(server),
    }
}

conformance!(place());

#[tokio::test]
async fn an_object_is_one_put_with_a_checksum() {
    let server = Server::start().await;
    let s3 = opened(server.at, ID).await;
    // Larger than what is usually sent in several parts; the server refuses one without a checksum.
    s3.put(&pack(0), noise(1, 24 << 20).into()).await.unwrap();
    assert_eq!(server.store.puts.load(Ordering::Relaxed), 1);
    assert!(server.has(&format!("site/a/{}", pack(0))));
}

#[tokio::test]
async fn a_list_asks_for_page_after_page() {
    let server = Server::start().await;
    let s3 = opened(server.at, ID).await;
    for number in 0..2500 {
        server.store.objects.lock().unwrap().insert(format!("site/a/{}", pack(number)), Bytes::new());
        // Another vault in the same bucket.
        server.store.objects.lock().unwrap().insert(format!("site/ab/{}", pack(number)), Bytes::new());
    }
    assert_eq!(s3.list("data/").await.unwrap().len(), 2500);
    assert_eq!(server.store.pages.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_server_that_knows_no_conditions_is_asked_without() {
    let server = Server::start().await;
    server.store.is_old.store(true, Ordering::Relaxed);
    let s3 = opened(server.at, ID).await;
    for number in 0..3 {
        s3.put(&pack(number), Bytes::from_static(b"x")).await.unwrap();
    }
    assert_eq!(s3.list("").await.unwrap().len(), 3);
    assert_eq!(server.store.puts.load(Ordering::Relaxed), 4, "it is asked once");
}

#[tokio::test]
async fn a_server_without_room_is_full() {
    let server = Server::start().await;
    let s3 = opened(server.at, ID).await;
    for (status, code) in [(403, "QuotaExceeded"), (507, "XMinioStorageFull"), (507, "SomethingOfTheirOwn")] {
        *server.store.refuses.lock().unwrap() = Some((status, code));
        let error = s3.put(&pack(0), Bytes::from_static(b"x")).await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::Full, "{error}");
        assert!(error.to_string().contains(code), "{error}");
    }
}

#[tokio::test]
async fn a_busy_server_is_transient() {
    let server = Server::start().await;
    let s3 = opened(server.at, ID).await;
    let busy =
        [(503, "SlowDown"), (500, "InternalError"), (502, "Whatever"), (429, "Whatever"), (400, "BadDigest")];
    for (status, code) in busy {
        *server.store.refuses.lock().unwrap() = Some((status, code));
        let error = s3.put(&pack(0), Bytes::from_static(b"x")).await.unwrap_err();
        assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    }
}

#[tokio::test]
async fn a_wrong_key_is_denied_and_not_repeated() {
    let server = Server::start().await;
    let s3 = opened(server.at, "AKIAOTHER").await;
    for error in [
        s3.put(&pack(0), Bytes::from_static(b"x")).await.unwrap_err(),
        s3.get(&pack(0), None).await.unwrap_err(),
        s3.list("").await.unwrap_err(),
        s3.delete(&pack(0)).await.unwrap_err(),
    ] {
        assert_eq!(error.kind, BackendErrorKind::Denied, "{error}");
        assert!(!format!("{error} {error:?} {s3:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_gone_is_transient() {
    let server = Server::start().await;
    let s3 = opened(server.at, ID).await;
    s3.put(&pack(0), Bytes::from_static(b"x")).await.unwrap();
    drop(server);
    for error in [
        s3.put(&pack(1), Bytes::from_static(b"x")).await.unwrap_err(),
        s3.get(&pack(0), None).await.unwrap_err(),
        s3.list("").await.unwrap_err(),
        s3.delete(&pack(0)).await.unwrap_err(),
    ] {
        assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    }
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_not_an_empty_one() {
    let server = Server::start().await;
    let mut s3 = opened(server.at, ID).await;
    let builder = opendal::services::S3::default()
        .bucket("elsewhere")
        .region("us-east-1")
        .endpoint(&format!("http://{}", server.at))
        .access_key_id(ID)
        .secret_access_key(SECRET);
    s3.operator = Operator::new(builder).unwrap().finish();
    assert_eq!(s3.get(&pack(0), None).await.unwrap_err().kind, BackendErrorKind::Broken);
    assert_eq!(s3.list("").await.unwrap_err().kind, BackendErrorKind::Broken);
}

#[tokio::test]
async fn a_line_that_is_cut_in_the_middle_of_a_put_leaves_nothing() {
    let server = Server::start().await;
    let cutting = Cutting::start(server.at, 1 << 20, u64::MAX).await;
    let s3 = opened(cutting.at, ID).await;
    let error = s3.put(&pack(0), noise(1, 8 << 20).into()).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    let s3 = opened(server.at, ID).await;
    assert_eq!(s3.get(&pack(0), None).await.unwrap(), None);
    assert_eq!(s3.list("").await.unwrap(), []);
}

#[tokio::test]
async fn a_line_that_is_cut_in_the_middle_of_a_get_is_no_shorter_object() {
    let server = Server::start().await;
    let s3 = opened(server.at, ID).await;
    s3.put(&pack(0), noise(1, 8 << 20).into()).await.unwrap();
    let cutting = Cutting::start(server.at, u64::MAX, 1 << 20).await;
    let s3 = opened(cutting.at, ID).await;
    let error = s3.get(&pack(0), None).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
    let error = s3.get(&pack(0), Some(10..7 << 20)).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Transient, "{error}");
}

/// Answers every request with the same.
async fn answering(answer: &'static str) -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(socket.read_u8().await.unwrap());
            }
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    at
}

#[tokio::test]
async fn a_404_of_somebody_else_is_not_absence() {
    let at =
        answering("HTTP/1.1 404 Not Found\r\ncontent-length: 9\r\nconnection: close\r\n\r\nnot here\n").await;
    let error = opened(at, ID).await.get(&pack(0), None).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Broken, "{error}");
}

#[tokio::test]
async fn without_credentials_nothing_is_asked() {
    let address = "s3://backups/".parse().unwrap();
    let missing = Some("/nonexistent/credentials".into());
    let error =
        S3::open(&address, &Options { credentials: missing, ..Options::default() }).await.unwrap_err();
    assert_eq!(error.kind, BackendErrorKind::Denied, "{error}");
}
