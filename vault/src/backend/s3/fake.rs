//! An S3 server for tests, in this process: the five requests that a vault makes, on the wire as Amazon documents them, with
//! its pages, conditions, checksums and errors. It knows who asks, but does not compute signatures.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

pub(super) const BUCKET: &str = "backups";
pub(super) const ID: &str = "AKIAEXAMPLE";
/// As Amazon's.
const PAGE: usize = 1000;

/// What the server keeps, and how it misbehaves.
#[derive(Default)]
pub(super) struct Store {
    pub(super) objects: Mutex<BTreeMap<String, Bytes>>,
    /// Says this to puts.
    pub(super) refuses: Mutex<Option<(u16, &'static str)>>,
    /// Doesn't know conditions.
    pub(super) is_old: AtomicBool,
    pub(super) puts: AtomicU32,
    pub(super) pages: AtomicU32,
}

/// Runs until it is dropped.
pub(super) struct Server {
    pub(super) store: Arc<Store>,
    pub(super) at: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(super) async fn start() -> Self {
        let store = Arc::new(Store::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let served = store.clone();
        let task = tokio::spawn(async move {
            // Its connections end with it.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let store = served.clone();
                let service = hyper::service::service_fn(move |request| {
                    let store = store.clone();
                    async move { store.answer(request).await }
                });
                let http = hyper::server::conn::http1::Builder::new();
                connections.spawn(async move {
                    let _ = http.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { store, at, task }
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.store.objects.lock().unwrap().contains_key(key)
    }
}

type Answer = Response<Full<Bytes>>;

fn say(status: u16, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer
}

fn refuse(status: u16, code: &str) -> Answer {
    say(
        status,
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>said the test</Message></Error>"),
    )
}

impl Store {
    async fn answer(&self, request: Request<Incoming>) -> Result<Answer, hyper::Error> {
        let header = |name: &str| Some(request.headers().get(name)?.to_str().unwrap().to_owned());
        let signed = header("authorization").unwrap_or_default();
        let (checksum, range) = (header("x-amz-checksum-crc32c"), header("range"));
        let condition = header("if-none-match");
        let path = request.uri().path().to_owned();
        let query = request.uri().query().unwrap_or_default().to_owned();
        let method = request.method().clone();
        // Also of a refused request: otherwise the connection could not go on. One that breaks off is never answered.
        let body = request.into_body().collect().await?.to_bytes();
        let (bucket, key) = path.trim_start_matches('/').split_once('/').unwrap_or((&path[1..], ""));
        Ok(if !signed.contains(&format!("Credential={ID}/")) {
            refuse(403, "InvalidAccessKeyId")
        } else if bucket != BUCKET {
            refuse(404, "NoSuchBucket")
        } else if method == Method::PUT {
            assert!(query.is_empty(), "a part of an object: {query}");
            self.put(key, body, checksum.as_deref(), condition.as_deref())
        } else if method == Method::GET && key.is_empty() {
            self.list(&query)
        } else if method == Method::GET || method == Method::HEAD {
            self.get(key, range.as_deref(), method == Method::HEAD)
        } else if method == Method::DELETE {
            self.objects.lock().unwrap().remove(key);
            say(204, "")
        } else {
            refuse(405, "MethodNotAllowed")
        })
    }

    fn put(&self, key: &str, body: Bytes, checksum: Option<&str>, condition: Option<&str>) -> Answer {
        self.puts.fetch_add(1, Ordering::Relaxed);
        match checksum {
            None => return refuse(400, "InvalidRequest"),
            Some(said) if said != base64(crc32c(&body)) => return refuse(400, "BadDigest"),
            Some(_) => {}
        }
        if let Some((status, code)) = *self.refuses.lock().unwrap() {
            return refuse(status, code);
        }
        if condition.is_some() && self.is_old.load(Ordering::Relaxed) {
            return refuse(501, "NotImplemented");
        }
        let mut objects = self.objects.lock().unwrap();
        if condition == Some("*") && objects.contains_key(key) {
            return refuse(412, "PreconditionFailed");
        }
        objects.insert(key.to_owned(), body);
        say(200, "")
    }

    fn get(&self, key: &str, range: Option<&str>, head: bool) -> Answer {
        let Some(whole) = self.objects.lock().unwrap().get(key).cloned() else {
            return if head { say(404, "") } else { refuse(404, "NoSuchKey") };
        };
        if head {
            let mut answer = say(200, "");
            answer.headers_mut().insert("content-length", whole.len().into());
            return answer;
        }
        let Some(range) = range else { return say(200, whole) };
        let (start, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let start: usize = start.parse().unwrap();
        let end = last.parse().map_or(whole.len(), |last: usize| (last + 1).min(whole.len()));
        if start >= whole.len() {
            return refuse(416, "InvalidRange");
        }
        let said = format!("bytes {start}-{}/{}", end - 1, whole.len());
        let mut answer = say(206, whole.slice(start..end));
        answer.headers_mut().insert("content-range", said.parse().unwrap());
        answer
    }

    fn list(&self, query: &str) -> Answer {
        self.pages.fetch_add(1, Ordering::Relaxed);
        let query: BTreeMap<_, _> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        assert_eq!(query.get("list-type").map(String::as_str), Some("2"));
        assert_eq!(query.get("delimiter").map_or("", String::as_str), "", "everything below is asked for");
        let get = |key: &str| query.get(key).cloned().unwrap_or_default();
        let (prefix, after) = (get("prefix"), get("continuation-token"));
        let objects = self.objects.lock().unwrap();
        let mut found = objects.iter().filter(|(key, _)| key.starts_with(&prefix) && **key > after);
        let page: Vec<_> = found.by_ref().take(PAGE).collect();
        let mut xml = "<?xml version=\"1.0\"?><ListBucketResult>".to_owned();
        for (key, bytes) in &page {
            let size = bytes.len();
            xml += &format!(
                "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>\"\"</ETag>\
                 <LastModified>2026-01-02T03:04:05.000Z</LastModified></Contents>"
            );
        }
        let more = found.next().is_some();
        if more {
            xml += &format!("<NextContinuationToken>{}</NextContinuationToken>", page.last().unwrap().0);
        }
        xml += &format!("<IsTruncated>{more}</IsTruncated></ListBucketResult>");
        say(200, xml)
    }
}

fn crc32c(bytes: &[u8]) -> [u8; 4] {
    let table: Vec<u32> = (0..256)
        .map(|byte| (0..8).fold(byte, |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 }))
        .collect();
    let next = |crc: u32, byte: &u8| crc >> 8 ^ table[usize::from(crc as u8 ^ byte)];
    (!bytes.iter().fold(!0, next)).to_be_bytes()
}

fn base64(bytes: [u8; 4]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let number = u64::from(u32::from_be_bytes(bytes)) << 4;
    let digit = |place: u32| char::from(DIGITS[(number >> (6 * place) & 63) as usize]);
    (0..6).rev().map(digit).chain(['=', '=']).collect()
}

#[test]
fn the_servers_checksum_is_the_documented_one() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283_u32.to_be_bytes());
    assert_eq!(base64(*b"abcd"), "YWJjZA==");
}
