//! nbdkit, with filters that fail, wait, and limit.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tempfile::TempDir;
use tokio::time::Instant;
use vmkeep_vault::nbd::{Address, BASE_ALLOCATION, Client, NbdError, Options, ZERO};
use vmkeep_vault::source::{DiskSource, NbdOptions, NbdSource};

use crate::support::{Server, image, restore, text};

/// nbdkit on a raw file of these bytes.
fn serve(bytes: &[u8], filters: &[&str], parameters: &[&str]) -> (TempDir, Server, Address) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    write_sparse(&file, bytes);
    let parameter = format!("file={}", text(&file));
    let filters: Vec<String> = filters.iter().map(|filter| format!("--filter={filter}")).collect();
    let mut args = vec!["-f", "-r"];
    args.extend(filters.iter().map(String::as_str));
    args.extend(["file", &parameter]);
    args.extend(parameters);
    let socket = folder.path().join("s");
    let server = Server::unix(&socket, "nbdkit", &args);
    (folder, server, Address::unix(socket, ""))
}

fn write_sparse(file: &Path, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let to = std::fs::File::create(file).unwrap();
    to.set_len(bytes.len() as u64).unwrap();
    for (at, page) in bytes.chunks(4096).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            to.write_all_at(page, at as u64 * 4096).unwrap();
        }
    }
}

async fn connect(address: &Address, connections: usize) -> Client {
    let options = Options { contexts: vec![BASE_ALLOCATION.into()], connections, ..Options::default() };
    Client::connect(address, &options, None).await.unwrap()
}

#[tokio::test]
async fn any_part_of_a_disk_of_any_size_is_read_as_it_is_within_the_servers_limits() {
    let limits = ["blocksize-minimum=4096", "blocksize-preferred=8192", "blocksize-maximum=131072"];
    let strict = ["blocksize-error-policy=error"];
    for (size, filters, parameters) in [
        (3_000_001, &[][..], vec![]),
        (3 << 20, &["blocksize-policy"], [&limits[..], &strict].concat()),
        (3 << 20, &["noextents"], vec![]),
    ] {
        let bytes = image(1, size);
        let (_folder, _server, address) = serve(&bytes, filters, &parameters);
        let client = connect(&address, 1).await;
        assert_eq!(client.export().size, size as u64);
        if filters == ["blocksize-policy"] {
            assert_eq!((client.export().minimum, client.export().maximum), (4096, 131_072));
        }
        let mut rng = fastrand::Rng::with_seed(2);
        let parts: Vec<_> = (0..100)
            .map(|round| {
                let start = rng.usize(0..size);
                let end = if round % 10 == 0 { size } else { rng.usize(start..size) };
                start..end
            })
            .collect();
        let reads = parts.iter().map(|part| client.read(part.start as u64..part.end as u64, None));
        for (part, read) in parts.iter().zip(join_all(reads).await) {
            assert!(read.unwrap() == bytes[part.clone()], "{part:?}");
        }
        let said = client.status(0..size as u64, || None).await.unwrap();
        let said = said[0].as_ref().unwrap();
        let mut at = 0;
        for (length, flags) in said.iter() {
            let part = &bytes[at..at + length as usize];
            assert!(flags & ZERO == 0 || part.iter().all(|byte| *byte == 0));
            at += part.len();
        }
        assert_eq!(at, size);
    }
}

#[tokio::test]
async fn a_source_tells_all_of_a_disk_over_one_connection_and_over_several() {
    let bytes = image(3, 40_000_123);
    for connections in [1, 4] {
        let (_folder, _server, address) = serve(&bytes, &[], &[]);
        let options = NbdOptions { connections, ..NbdOptions::default() };
        let source = Arc::new(NbdSource::open(&address, &options).await.unwrap());
        assert_eq!(source.client().connections(), connections);
        assert!(!source.knows_changes());
        let (restored, told) = restore(source.clone(), None).await;
        assert!(restored == bytes);
        assert_eq!(told.unchanged, 0);
        assert!(told.zero > 5_000_000, "holes are not read: {told:?}");
        assert!(source.received() >= told.data);
        // Nothing is left out for a bitmap that the server does not know.
        let without = NbdOptions { bitmap: Some("none".into()), ..options };
        let source = Arc::new(NbdSource::open(&address, &without).await.unwrap());
        assert!(!source.knows_changes());
        assert!(restore(source, Some(&vec![9; bytes.len()])).await.0 == bytes);
    }
}

#[tokio::test]
async fn a_server_that_does_not_allow_several_connections_gets_one() {
    let (_folder, _server, address) = serve(&[1; 4096], &["multi-conn"], &["multi-conn-mode=disable"]);
    let client = connect(&address, 4).await;
    assert_eq!((client.connections(), client.export().multi_conn), (1, false));
}

#[tokio::test]
async fn an_error_of_the_servers_is_told_and_the_connection_goes_on() {
    let bytes = image(4, 1 << 20);
    let folder = tempfile::tempdir().unwrap();
    let switch = folder.path().join("fail");
    let file = format!("error-file={}", text(&switch));
    let parameters = ["error-pread=EIO", "error-pread-rate=100%", &file];
    let (_folder, _server, address) = serve(&bytes, &["error"], &parameters);
    let client = connect(&address, 1).await;
    for round in 0..3 {
        assert!(client.read(0..1 << 20, None).await.unwrap() == bytes, "{round}");
        std::fs::write(&switch, "").unwrap();
        match client.read(1000..5000, None).await.unwrap_err() {
            NbdError::Server { errno: 5, offset: 1000, length: 4000, .. } => {}
            other => panic!("{other}"),
        }
        std::fs::remove_file(&switch).unwrap();
    }
    assert!(client.is_alive());
}

#[tokio::test]
async fn after_a_failure_a_reader_tells_nothing_more() {
    use vmkeep_vault::source::DiskReader;
    use vmkeep_vault::write::Source;
    let folder = tempfile::tempdir().unwrap();
    let switch = folder.path().join("fail");
    std::fs::write(&switch, "").unwrap();
    let file = format!("error-file={}", text(&switch));
    let parameters = ["error-pread=EIO", "error-pread-rate=100%", &file];
    let (_folder, _server, address) = serve(&[1; 8 << 20], &["error"], &parameters);
    let source = NbdSource::open(&address, &NbdOptions::default()).await.unwrap();
    let mut reader = DiskReader::new(Arc::new(source), None);
    let first = reader.next().await.unwrap_err().to_string();
    std::fs::remove_file(&switch).unwrap();
    // What could be read now would come out at the wrong place.
    assert_eq!(reader.next().await.unwrap_err().to_string(), first);
}

#[tokio::test]
async fn a_read_that_never_ends_ends_at_its_deadline_and_with_its_server() {
    let (_folder, mut server, address) = serve(&[1; 1 << 20], &["delay"], &["rdelay=3600"]);
    let client = connect(&address, 1).await;
    let soon = || Some(Instant::now() + Duration::from_millis(20));
    let error = client.read(0..512, soon()).await.unwrap_err();
    assert!(matches!(error, NbdError::Deadline { .. }), "{error}");
    // Other requests are answered meanwhile.
    client.status(0..1 << 20, || None).await.unwrap();
    let mut reads = Box::pin(join_all((0..8_u64).map(|at| client.read(at * 512..at * 512 + 512, None))));
    tokio::select! {
        biased;
        _ = &mut reads => panic!("nothing can have been answered"),
        () = std::future::ready(()) => {}
    }
    server.kill();
    for read in reads.await {
        let error = read.unwrap_err();
        assert!(matches!(error, NbdError::Lost { .. }), "{error}");
    }
    let error = client.read(0..512, None).await.unwrap_err();
    assert!(matches!(error, NbdError::Lost { .. }), "{error}");
}

#[tokio::test]
async fn answers_that_come_late_and_in_another_order_find_their_requests() {
    let bytes = image(6, 4 << 20);
    // Sixteen threads wait at once, and are done in any order.
    let (_folder, _server, address) = serve(&bytes, &["delay"], &["rdelay=30ms"]);
    let client = connect(&address, 2).await;
    let reads = (0..256_u64).map(|at| client.read(at * 16384..(at + 1) * 16384, None));
    for (at, read) in join_all(reads).await.into_iter().enumerate() {
        assert!(read.unwrap() == bytes[at * 16384..(at + 1) * 16384]);
    }
    client.close().await;
}
