//! A server that says what a server must not say. Nothing of it is believed, and nobody waits for ever.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::Instant;
use vmkeep_vault::nbd::{Address, BASE_ALLOCATION, Client, NbdError, Options};

const SIZE: u64 = 1 << 20;
const DONE: u16 = 1;
const NONE: u16 = 0;
const DATA: u16 = 1;
const HOLE: u16 = 2;
const STATUS: u16 = 5;
const ERROR: u16 = (1 << 15) + 1;
const ERROR_AT: u16 = (1 << 15) + 2;

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u32).to_be_bytes();
    [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes(), &length, data]
        .concat()
}

fn greeting() -> Vec<u8> {
    [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 3]].concat()
}

fn export(size: u64) -> Vec<u8> {
    [&[0, 0][..], &size.to_be_bytes(), &[1, 1]].concat()
}

fn granted(id: u32, name: &str) -> Vec<u8> {
    reply(10, 4, &[&id.to_be_bytes(), name.as_bytes()].concat())
}

/// What an honest server says up to the first request.
fn honest() -> Vec<u8> {
    let context = [granted(9, BASE_ALLOCATION), reply(10, 1, &[])].concat();
    [greeting(), reply(8, 1, &[]), context, reply(7, 3, &export(SIZE)), reply(7, 1, &[])].concat()
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    headed(flags, kind, cookie, payload.len() as u32, payload)
}

fn headed(flags: u16, kind: u16, cookie: u64, length: u32, payload: &[u8]) -> Vec<u8> {
    let head = [&0x668e_33ef_u32.to_be_bytes()[..], &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), &length.to_be_bytes(), payload].concat()
}

fn data(at: u64, bytes: &[u8]) -> Vec<u8> {
    [&at.to_be_bytes()[..], bytes].concat()
}

fn extents(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let pairs = extents.iter().flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()]);
    std::iter::once(context.to_be_bytes()).chain(pairs).flatten().collect()
}

/// A server of one connection.
fn serve<F: Future<Output = ()> + Send + 'static>(
    life: impl FnOnce(UnixStream) -> F + Send + 'static,
) -> (TempDir, Address) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move { life(listener.accept().await.unwrap().0).await });
    (folder, Address::unix(socket, ""))
}

/// Says all of this whatever it hears, and then that this was all.
fn say(bytes: Vec<u8>) -> (TempDir, Address) {
    serve(async move |mut stream: UnixStream| {
        // A client that has heard enough ends the connection.
        stream.write_all(&bytes).await.ok();
        stream.shutdown().await.ok();
        stream.read_to_end(&mut Vec::new()).await.ok();
    })
}

/// Is honest up to the first request, and then says this, and that this was all.
fn answer(bytes: Vec<u8>) -> (TempDir, Address) {
    serve(async move |mut stream: UnixStream| {
        hear_handshake(&mut stream).await;
        request(&mut stream).await;
        stream.write_all(&bytes).await.ok();
        stream.shutdown().await.ok();
        stream.read_to_end(&mut Vec::new()).await.ok();
    })
}

async fn connect(address: &Address) -> Result<Client, NbdError> {
    let options = Options { contexts: vec![BASE_ALLOCATION.into()], ..Options::default() };
    Client::connect(address, &options, None).await
}

/// The cookie of the next request, after the handshake has been taken in.
async fn request(stream: &mut UnixStream) -> (u16, u64, u64, u32) {
    let mut bytes = [0; 28];
    stream.read_exact(&mut bytes).await.unwrap();
    let number = |from: usize| u64::from_be_bytes(bytes[from..from + 8].try_into().unwrap());
    (u16::from_be_bytes([bytes[6], bytes[7]]), number(8), number(16), number(20) as u32)
}

/// The bytes that the client sends before its first request.
async fn hear_handshake(stream: &mut UnixStream) {
    stream.write_all(&honest()).await.unwrap();
    let context = 16 + 4 + 4 + 4 + BASE_ALLOCATION.len();
    let mut bytes = vec![0; 4 + 16 + context + 16 + 4 + 2 + 2];
    stream.read_exact(&mut bytes).await.unwrap();
}

#[tokio::test]
async fn a_handshake_that_does_not_fit_is_refused() {
    let go = |info: &[Vec<u8>]| {
        let infos = info.iter().map(|info| reply(7, 3, info)).collect::<Vec<_>>().concat();
        [greeting(), reply(8, 1, &[]), reply(10, 1, &[]), infos, reply(7, 1, &[])].concat()
    };
    let contexts =
        |said: &[Vec<u8>]| [greeting(), reply(8, 1, &[]), said.concat(), reply(10, 1, &[])].concat();
    let sizes = |minimum: u32, preferred: u32, maximum: u32| {
        [&[0, 3][..], &minimum.to_be_bytes(), &preferred.to_be_bytes(), &maximum.to_be_bytes()].concat()
    };
    let lies = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53 oldstyle".to_vec(),
        b"NBDMAGICIHAVEOPT\0\0".to_vec(),
        [greeting(), reply(7, 1, &[])].concat(),
        [greeting(), b"sixteen bytes of it".to_vec()].concat(),
        [greeting(), reply(8, 77, &[])].concat(),
        [greeting(), [&reply(8, 1, &[])[..16], &u32::MAX.to_be_bytes()].concat()].concat(),
        contexts(&[granted(1, "base:allocatioN")]),
        contexts(&[granted(1, BASE_ALLOCATION), granted(1, BASE_ALLOCATION)]),
        contexts(&[granted(1, BASE_ALLOCATION), granted(2, BASE_ALLOCATION)]),
        contexts(&[reply(10, 4, &[1, 2])]),
        go(&[]),
        go(&[export(SIZE)[..11].to_vec()]),
        go(&[[0].to_vec()]),
        go(&[export(1 << 63)]),
        go(&[[&export(SIZE)[..10], &[0, 0]].concat()]),
        go(&[export(SIZE), sizes(0, 4096, 1 << 25)]),
        go(&[export(SIZE), sizes(513, 4096, 1 << 25)]),
        go(&[export(SIZE), sizes(1 << 17, 1 << 17, 1 << 25)]),
        go(&[export(SIZE), sizes(4096, 512, 1 << 25)]),
        go(&[export(SIZE), sizes(4096, 4096, 512)]),
        go(&vec![vec![0, 2]; 100]),
    ];
    for (which, lie) in lies.into_iter().enumerate() {
        let (_folder, address) = say(lie);
        let error = connect(&address).await.unwrap_err();
        assert!(matches!(error, NbdError::Protocol { .. }), "{which}: {error}");
    }
    let unknown = [greeting(), reply(8, 1, &[]), reply(10, (1 << 31) + 6, b"no \x1b[31mexport")].concat();
    let (_folder, address) = say(unknown);
    match connect(&address).await.unwrap_err() {
        NbdError::Refused { option: "SET_META_CONTEXT", cause, .. } => {
            assert_eq!(
                cause, "there is no such export: no [31mexport",
                "no escape sequence goes into messages"
            );
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_reply_to_a_read_that_does_not_fit_ends_the_connection_for_all_who_wait() {
    let c = 1;
    let most = (64 << 10) / 512 + 16;
    let errno = 5_u32.to_be_bytes();
    let lies: Vec<(&str, Vec<u8>)> = vec![
        ("magic", b"fine, and you?".to_vec()),
        ("cookie", chunk(DONE, DATA, 0x4711, &data(0, &[1; 65536]))),
        ("beyond the end", chunk(DONE, DATA, c, &data(65536, &[1; 1]))),
        ("across the end", chunk(0, DATA, c, &data(65535, &[1; 2]))),
        ("before the beginning", chunk(0, DATA, c, &data(u64::MAX, &[1; 2]))),
        ("huge", headed(0, DATA, c, u32::MAX, &data(0, &[1; 100]))),
        ("huge hole", chunk(0, HOLE, c, &data(0, &u32::MAX.to_be_bytes()))),
        (
            "overlap",
            [chunk(0, DATA, c, &data(0, &[1; 512])), chunk(0, HOLE, c, &data(511, &[0, 0, 0, 9]))].concat(),
        ),
        ("a part left out", chunk(DONE, DATA, c, &data(0, &[1; 65535]))),
        ("nothing", chunk(DONE, NONE, c, &[])),
        ("nothing and more", chunk(0, NONE, c, &[])),
        ("nothing with bytes", chunk(DONE, NONE, c, &[1])),
        ("an empty chunk", chunk(0, DATA, c, &data(0, &[]))),
        ("no place", chunk(0, DATA, c, &[0; 7])),
        ("a short hole", chunk(0, HOLE, c, &[0; 11])),
        ("a status", chunk(DONE, STATUS, c, &extents(9, &[(65536, 0)]))),
        ("a kind of its own", chunk(DONE, 4711, c, &[0; 8])),
        (
            "not structured",
            [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &1_u64.to_be_bytes(), &[1; 65536]].concat(),
        ),
        ("an error that is none", chunk(DONE, ERROR, c, &[0; 6])),
        ("an error that is short", chunk(DONE, ERROR, c, &[0, 0, 0, 5, 0])),
        ("an error with half a message", chunk(DONE, ERROR, c, &[&errno[..], &[0, 9], b"disk"].concat())),
        ("an error without its place", chunk(DONE, ERROR_AT, c, &[&errno[..], &[0, 0]].concat())),
        ("a huge error", headed(DONE, ERROR, c, 1 << 20, &[0; 100])),
        ("no end", (0..=most).map(|at| chunk(0, DATA, c, &data(at * 2, &[1]))).collect::<Vec<_>>().concat()),
    ];
    for (which, lie) in lies {
        let (_folder, address) = serve(async move |mut stream: UnixStream| {
            hear_handshake(&mut stream).await;
            assert_eq!(request(&mut stream).await, (0, 1, 0, 65536), "the cookie of the lies");
            request(&mut stream).await;
            stream.write_all(&lie).await.ok();
            stream.read_to_end(&mut Vec::new()).await.ok();
        });
        let client = connect(&address).await.unwrap();
        let (one, two) = tokio::join!(client.read(0..65536, None), client.read(65536..65636, None));
        let later = client.read(0..512, None).await;
        for answer in [one, two, later] {
            let error = answer.unwrap_err();
            assert!(matches!(error, NbdError::Protocol { .. }), "{which}: {error}");
        }
        assert!(!client.is_alive());
    }
}

#[tokio::test]
async fn a_block_status_that_does_not_fit_ends_the_connection() {
    let c = 1;
    let twice = chunk(0, STATUS, c, &extents(9, &[(512, 0)]));
    let lies: Vec<(&str, Vec<u8>)> = vec![
        ("a context that was not granted", chunk(DONE, STATUS, c, &extents(8, &[(512, 0)]))),
        ("one twice", [twice.clone(), twice].concat()),
        ("no progress", chunk(DONE, STATUS, c, &extents(9, &[(0, 0)]))),
        ("no progress after some", chunk(DONE, STATUS, c, &extents(9, &[(512, 0), (0, 0)]))),
        ("no extents", chunk(DONE, STATUS, c, &extents(9, &[]))),
        ("half an extent", chunk(DONE, STATUS, c, &[0, 0, 0, 9, 0, 0, 2, 0])),
        ("a huge one", headed(DONE, STATUS, c, u32::MAX - 3, &extents(9, &[(512, 0)]))),
        ("nothing of a context", chunk(DONE, NONE, c, &[])),
        ("beyond the end", chunk(DONE, STATUS, c, &extents(9, &[(SIZE as u32, 0), (512, 3)]))),
        ("data", chunk(DONE, DATA, c, &data(0, &[1; 512]))),
        ("not structured", [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &1_u64.to_be_bytes()].concat()),
    ];
    for (which, lie) in lies {
        let (_folder, address) = answer(lie);
        let client = connect(&address).await.unwrap();
        let error = client.status(0..SIZE, || None).await.unwrap_err();
        assert!(matches!(error, NbdError::Protocol { .. }), "{which}: {error}");
    }
}

#[tokio::test]
async fn short_answers_are_continued_and_the_last_extent_may_reach_beyond() {
    let (_folder, address) = serve(async move |mut stream: UnixStream| {
        hear_handshake(&mut stream).await;
        for answer in [&[(4096, 0), (512, 3)][..], &[(512, 3)], &[(u32::MAX, 1)]] {
            let (command, cookie, ..) = request(&mut stream).await;
            assert_eq!(command, 7);
            stream.write_all(&chunk(DONE, STATUS, cookie, &extents(9, answer))).await.unwrap();
        }
        stream.read_to_end(&mut Vec::new()).await.ok();
    });
    let client = connect(&address).await.unwrap();
    let said = client.status(512..SIZE, || None).await.unwrap();
    let said: Vec<_> = said[0].as_ref().unwrap().iter().collect();
    assert_eq!(said, [(4096, 0), (1024, 3), (SIZE - 512 - 5120, 1)]);
}

#[tokio::test]
async fn chunks_in_any_order_and_errors_with_their_place_find_their_request() {
    let (_folder, address) = serve(async move |mut stream: UnixStream| {
        hear_handshake(&mut stream).await;
        let (one, two) = (request(&mut stream).await.1, request(&mut stream).await.1);
        let error = [&5_u32.to_be_bytes()[..], &[0, 4], b"worn", &70_000_u64.to_be_bytes()].concat();
        let answer = [
            chunk(0, DATA, one, &data(1024, &[3; 64512])),
            chunk(0, ERROR_AT, two, &error),
            chunk(0, DATA, one, &data(0, &[1; 512])),
            chunk(DONE, NONE, two, &[]),
            chunk(DONE, HOLE, one, &data(512, &512_u32.to_be_bytes())),
        ];
        stream.write_all(&answer.concat()).await.unwrap();
        let third = request(&mut stream).await.1;
        stream.write_all(&chunk(DONE, DATA, third, &data(0, &[7; 512]))).await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.ok();
    });
    let client = connect(&address).await.unwrap();
    let (one, two) = tokio::join!(client.read(0..65536, None), client.read(65536..131_072, None));
    assert!(one.unwrap() == [&[1; 512][..], &[0; 512], &[3; 64512]].concat());
    match two.unwrap_err() {
        NbdError::Server { errno: 5, at: Some(70_000), message, offset: 65536, length: 65536, .. } => {
            assert_eq!(message, "worn");
        }
        other => panic!("{other}"),
    }
    assert!(
        client.read(0..512, None).await.unwrap() == [7; 512][..],
        "the connection goes on after an error"
    );
}

#[tokio::test]
async fn a_connection_that_ends_fails_every_request_on_it() {
    for half in
        [vec![], chunk(0, DATA, 1, &data(0, &[1; 512])), headed(0, DATA, 1, 1008, &data(0, &[1; 300]))]
    {
        let (_folder, address) = serve(async move |mut stream: UnixStream| {
            hear_handshake(&mut stream).await;
            for _ in 0..8 {
                request(&mut stream).await;
            }
            stream.write_all(&half).await.unwrap();
        });
        let client = connect(&address).await.unwrap();
        let reads = (0..8_u64).map(|at| client.read(at * 1000..at * 1000 + 1000, None));
        for answer in futures_util::future::join_all(reads).await {
            let error = answer.unwrap_err();
            assert!(matches!(error, NbdError::Lost { .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn who_gives_up_disturbs_nobody_else() {
    let go_on = Arc::new(Notify::new());
    let told = go_on.clone();
    let (_folder, address) = serve(async move |mut stream: UnixStream| {
        hear_handshake(&mut stream).await;
        let (one, two) = (request(&mut stream).await.1, request(&mut stream).await.1);
        told.notified().await;
        let late =
            [chunk(DONE, DATA, one, &data(0, &[1; 512])), chunk(DONE, DATA, two, &data(512, &[2; 512]))];
        stream.write_all(&late.concat()).await.unwrap();
        let three = request(&mut stream).await.1;
        stream.write_all(&chunk(DONE, DATA, three, &data(1024, &[3; 512]))).await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.ok();
    });
    let options = Options { contexts: vec![BASE_ALLOCATION.into()], in_flight: 2, ..Options::default() };
    let client = Client::connect(&address, &options, None).await.unwrap();
    // Sent, and dropped at its deadline.
    let soon = Some(Instant::now() + Duration::from_millis(20));
    let error = client.read(0..512, soon).await.unwrap_err();
    assert!(matches!(error, NbdError::Deadline { .. }), "{error}");
    let error = client.read(512..1024, Some(Instant::now())).await;
    assert!(matches!(error, Ok(_) | Err(NbdError::Deadline { .. })));
    // Both places are taken by requests that nobody waits for: a third waits for their answers.
    let third = client.read(1024..1536, None);
    let third = async {
        go_on.notify_one();
        third.await
    };
    assert!(third.await.unwrap() == [3; 512][..]);
}

/// All of it with one bit flipped, at each byte, and all of its beginnings.
fn spoiled(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut rng = fastrand::Rng::with_seed(5);
    let flipped = (0..bytes.len()).map(|at| {
        let mut flipped = bytes.to_vec();
        flipped[at] ^= 1 << rng.u8(0..8);
        flipped
    });
    flipped.chain((0..bytes.len()).map(|cut| bytes[..cut].to_vec())).collect()
}

#[tokio::test]
async fn any_flipped_bit_and_any_cut_ends_in_an_error_or_an_answer_of_the_right_length() {
    let (mut errors, mut answers) = (0, 0);
    for said in spoiled(&honest()) {
        let (_folder, address) = say(said);
        match connect(&address).await {
            Ok(client) => drop(client.read(0..1024, None).await.unwrap_err()),
            Err(_) => errors += 1,
        }
    }
    let read =
        [chunk(0, DATA, 1, &data(0, &[1; 700])), chunk(DONE, HOLE, 1, &data(700, &324_u32.to_be_bytes()))];
    for said in spoiled(&read.concat()) {
        let (_folder, address) = answer(said);
        let client = connect(&address).await.unwrap();
        match client.read(0..1024, None).await {
            Ok(bytes) => {
                assert_eq!(bytes.len(), 1024);
                answers += 1;
            }
            Err(_) => errors += 1,
        }
    }
    assert!(answers > 690, "flips in the data itself cannot be told: {answers}");
    for said in spoiled(&chunk(DONE, STATUS, 1, &extents(9, &[(512, 3), (SIZE as u32 - 512, 0)]))) {
        let (_folder, address) = answer(said);
        let client = connect(&address).await.unwrap();
        match client.status(0..SIZE, || None).await {
            Ok(said) => assert!(said.iter().flatten().all(|extents| extents.len() == SIZE)),
            Err(_) => errors += 1,
        }
    }
    assert!(errors > 900, "{errors}");
}
