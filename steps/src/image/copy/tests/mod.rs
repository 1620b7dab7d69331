//! Copying on real files; what disks do only when they break is in `faults`.

use super::*;
use crate::image::root::Roots;
use crate::image::space::data_bytes;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

mod faults;

const MIB: u64 = 1 << 20;

struct Bench {
    dir: tempfile::TempDir,
    folder: Folder,
}

impl Bench {
    fn new() -> Self {
        Self::at(tempfile::tempdir().unwrap())
    }

    /// For tests that copy hundreds of times: no disk is waited for.
    fn in_memory() -> Self {
        Self::at(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap())
    }

    fn at(dir: tempfile::TempDir) -> Self {
        let roots = Roots::open([dir.path()]).unwrap();
        let folder = roots.open_folder(dir.path()).unwrap();
        Self { dir, folder }
    }

    /// A file of `size` bytes with data at the given stretches and holes elsewhere.
    fn source(&self, size: u64, data: &[(u64, u64)]) -> std::path::PathBuf {
        let path = self.dir.path().join("source");
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        for &(from, len) in data {
            let to = (from + len).min(size);
            let bytes: Vec<u8> = (from..to).map(|i| (i * 31 + (i >> 9) + 7) as u8).collect();
            file.write_all_at(&bytes, from).unwrap();
        }
        path
    }

    fn copy(&self, start: Start, options: &Options, observer: &dyn Observer) -> Result<Copied, CopyError> {
        let source = SourceFile::open(&self.dir.path().join("source"))?;
        copy(&source, &self.folder, &name(), start, options, observer)
    }

    fn target(&self) -> std::path::PathBuf {
        self.dir.path().join("copy")
    }

    fn assert_same(&self, copied: &Copied) {
        let (a, b) =
            (std::fs::read(self.dir.path().join("source")).unwrap(), std::fs::read(self.target()).unwrap());
        assert!(a == b, "the copy differs from its source");
        assert_eq!(copied.source_hash, blake3::hash(&a));
        assert_eq!(copied.hash, copied.source_hash);
        assert_eq!(copied.size, a.len() as u64);
    }
}

fn name() -> Component {
    Component::new("copy").unwrap()
}

/// Tokens often: after every MiB, if the flushing thread is free.
fn eager() -> Options {
    Options { checkpoint_bytes: MIB, hashers: 2, ..Options::default() }
}

/// Keeps tokens; ends the copy when it is asked for the n-th time, and insists.
struct Watcher {
    asked: AtomicU64,
    end_at: u64,
    end: Control,
    tokens: Mutex<Vec<ResumeToken>>,
}

impl Watcher {
    fn new(end_at: u64, end: Control) -> Self {
        Self { asked: AtomicU64::new(0), end_at, end, tokens: Mutex::default() }
    }

    fn last(&self) -> Option<ResumeToken> {
        self.tokens.lock().unwrap().last().cloned()
    }
}

impl Observer for Watcher {
    fn control(&self) -> Control {
        if self.asked.fetch_add(1, Ordering::SeqCst) + 1 >= self.end_at {
            self.end.clone()
        } else {
            Control::Continue
        }
    }
    fn durable(&self, token: &ResumeToken) {
        self.tokens.lock().unwrap().push(token.clone());
    }
}

fn through_json(token: &ResumeToken) -> ResumeToken {
    let text = serde_json::to_string(token).unwrap();
    ResumeToken::parse(&serde_json::from_str(&text).unwrap()).unwrap()
}

fn resume(token: &ResumeToken) -> Start {
    Start::Resume(Box::new(through_json(token)))
}

fn layouts() -> impl Strategy<Value = (u64, Vec<(u64, u64)>)> {
    let stretch = (0..12 * MIB, prop_oneof![1..9000u64, 1..3 * MIB]);
    (prop_oneof![0..3 * MIB, 3 * MIB..12 * MIB], prop::collection::vec(stretch, 0..6))
        .prop_map(|(size, data)| (size, data.into_iter().filter(|(from, _)| *from < size).collect()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_layout_of_holes_is_copied_exactly_and_stays_sparse((size, data) in layouts(), range in any::<bool>()) {
        let bench = Bench::in_memory();
        bench.source(size, &data);
        let method = if range { Method::CopyRange } else { Method::Auto };
        let copied = bench.copy(Start::Fresh, &Options { method, ..eager() }, &()).unwrap();
        bench.assert_same(&copied);
        let holes = |path: &Path| data_bytes(File::open(path).unwrap()).unwrap();
        prop_assert!(holes(&bench.target()) <= holes(&bench.dir.path().join("source")));
    }

    #[test]
    fn stopped_anywhere_and_as_often_as_you_like_the_copy_comes_out_the_same(
        (size, data) in layouts(),
        ends in prop::collection::vec((1..14u64, any::<bool>()), 1..4),
        junk in prop::collection::vec(any::<u8>(), 1..5000),
    ) {
        let bench = Bench::in_memory();
        bench.source(size, &data);
        let mut token: Option<ResumeToken> = None;
        for (end_at, politely) in ends {
            let end = if politely { Control::Stop } else { Control::GiveUp("low water".into()) };
            let watcher = Watcher::new(end_at, end);
            let start = token.as_ref().map_or(Start::Again, resume);
            match bench.copy(start, &eager(), &watcher) {
                Ok(copied) => bench.assert_same(&copied),
                Err(CopyError::Stopped { offset }) if offset > token.as_ref().map_or(0, |t| t.offset) => {
                    // Whoever stops politely loses nothing.
                    prop_assert_eq!(watcher.last().unwrap().offset, offset);
                }
                Err(CopyError::Stopped { .. } | CopyError::GaveUp { .. }) => {}
                Err(other) => prop_assert!(false, "{}", other),
            }
            token = watcher.last().or(token);
            // What was written after the last token is anything after a power cut.
            if let Some(token) = &token {
                let file = File::options().write(true).open(bench.target()).unwrap();
                file.write_all_at(&junk, token.offset).unwrap();
            }
        }
        let copied = bench.copy(token.as_ref().map_or(Start::Again, resume), &eager(), &()).unwrap();
        bench.assert_same(&copied);
        let holes = |path: &Path| data_bytes(File::open(path).unwrap()).unwrap();
        prop_assert!(holes(&bench.target()) <= holes(&bench.dir.path().join("source")));
    }

    #[test]
    fn a_torn_or_edited_token_is_no_token(cut in 0..900usize, flip in 0..900usize) {
        let bench = Bench::in_memory();
        bench.source(4 * MIB, &[(0, 4 * MIB)]);
        let watcher = Watcher::new(3, Control::Stop);
        bench.copy(Start::Fresh, &eager(), &watcher).unwrap_err();
        let text = serde_json::to_string(&watcher.last().unwrap()).unwrap();
        let torn = &text[..cut.min(text.len() - 1)];
        let parsed = serde_json::from_str(torn).ok().and_then(|v| ResumeToken::parse(&v));
        prop_assert!(parsed.is_none());
        let mut edited = text.clone().into_bytes();
        let at = flip % edited.len();
        if edited[at].is_ascii_digit() {
            edited[at] = b'0' + (edited[at] - b'0' + 1) % 10;
            let parsed = serde_json::from_slice(&edited).ok().and_then(|v| ResumeToken::parse(&v));
            prop_assert!(parsed.is_none(), "{}", String::from_utf8_lossy(&edited));
        }
    }
}

#[test]
fn awkward_sizes_are_copied() {
    for size in [0, 1, 4095, MIB - 1, MIB, MIB + 1, 3 * MIB] {
        let bench = Bench::new();
        bench.source(size, &[(0, size)]);
        let copied = bench.copy(Start::Fresh, &eager(), &()).unwrap();
        bench.assert_same(&copied);
        assert_eq!(copied.moved, size);
    }
}

#[test]
fn the_copy_is_private_and_never_replaces_anything() {
    let bench = Bench::new();
    let source = bench.source(100, &[(0, 100)]);
    std::fs::set_permissions(source, std::fs::Permissions::from_mode(0o777)).unwrap();
    bench.copy(Start::Fresh, &eager(), &()).unwrap();
    assert_eq!(std::fs::metadata(bench.target()).unwrap().permissions().mode() & 0o7777, 0o600);
    std::fs::write(bench.target(), "mine").unwrap();
    let again = bench.copy(Start::Fresh, &eager(), &());
    assert!(matches!(again, Err(CopyError::Place(RootError::Exists { .. }))), "{again:?}");
    assert_eq!(std::fs::read(bench.target()).unwrap(), b"mine");
    let copied = bench.copy(Start::Again, &eager(), &()).unwrap();
    bench.assert_same(&copied);
}

#[test]
fn a_resumed_copy_moves_only_what_is_left() {
    let bench = Bench::new();
    bench.source(10 * MIB, &[(0, 10 * MIB)]);
    let watcher = Watcher::new(7, Control::Stop);
    bench.copy(Start::Fresh, &eager(), &watcher).unwrap_err();
    let token = watcher.last().unwrap();
    assert_eq!(token.offset, 6 * MIB);
    let copied = bench.copy(resume(&token), &eager(), &()).unwrap();
    bench.assert_same(&copied);
    assert_eq!(copied.moved, 4 * MIB);
}

#[test]
fn a_token_is_stale_when_either_file_is_not_what_it_was() {
    let stale = |spoil: &dyn Fn(&Bench)| {
        let bench = Bench::new();
        bench.source(6 * MIB, &[(0, 6 * MIB)]);
        let watcher = Watcher::new(4, Control::Stop);
        bench.copy(Start::Fresh, &eager(), &watcher).unwrap_err();
        spoil(&bench);
        let got = bench.copy(resume(&watcher.last().unwrap()), &eager(), &());
        assert!(matches!(got, Err(CopyError::StaleToken { .. })), "{got:?}");
        // And the way out of it works.
        let copied = bench.copy(Start::Again, &eager(), &()).unwrap();
        bench.assert_same(&copied);
    };
    stale(&|b| {
        let file = File::options().write(true).open(b.dir.path().join("source")).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    });
    stale(&|b| {
        let source = b.dir.path().join("source");
        std::fs::copy(&source, b.dir.path().join("other")).unwrap();
        std::fs::rename(b.dir.path().join("other"), source).unwrap();
    });
    stale(&|b| File::options().write(true).open(b.target()).unwrap().set_len(3 * MIB - 1).unwrap());
    stale(&|b| {
        std::fs::copy(b.target(), b.dir.path().join("other")).unwrap();
        std::fs::rename(b.dir.path().join("other"), b.target()).unwrap();
    });
}

#[test]
fn a_replaced_header_is_in_the_copy_and_in_its_hash_also_after_a_resume() {
    let bench = Bench::new();
    bench.source(5 * MIB + 17, &[(100, 2 * MIB), (4 * MIB, MIB)]);
    let options = Options { header: b"another beginning".to_vec(), ..eager() };
    let watcher = Watcher::new(4, Control::Stop);
    bench.copy(Start::Fresh, &options, &watcher).unwrap_err();
    let token = watcher.last().unwrap();
    // With another header the first part would be wrong.
    let got = bench.copy(resume(&token), &Options { header: b"else".to_vec(), ..eager() }, &());
    assert!(matches!(got, Err(CopyError::StaleToken { .. })), "{got:?}");
    let copied = bench.copy(resume(&token), &options, &()).unwrap();
    let mut expected = std::fs::read(bench.dir.path().join("source")).unwrap();
    assert_eq!(copied.source_hash, blake3::hash(&expected));
    expected[..options.header.len()].copy_from_slice(&options.header);
    assert!(std::fs::read(bench.target()).unwrap() == expected);
    assert_eq!(copied.hash, blake3::hash(&expected));
}

#[test]
fn a_header_longer_than_the_file_is_refused() {
    let bench = Bench::new();
    bench.source(10, &[(0, 10)]);
    let got = bench.copy(Start::Fresh, &Options { header: vec![1; 11], ..eager() }, &());
    assert!(matches!(got, Err(CopyError::Header { len: 11 })), "{got:?}");
}

/// Does something to the source when the copy has come half way.
struct Meddler<'a>(AtomicU64, &'a (dyn Fn() + Sync));

impl Observer for Meddler<'_> {
    fn control(&self) -> Control {
        if self.0.fetch_add(1, Ordering::SeqCst) == 3 {
            (self.1)();
        }
        Control::Continue
    }
}

#[test]
fn a_source_that_is_written_while_it_is_copied_is_found_out() {
    let bench = Bench::new();
    let path = bench.source(6 * MIB, &[(0, 6 * MIB)]);
    let write = || {
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        // The clock of the file system is coarse; a write later than that shows by itself.
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    };
    let got = bench.copy(Start::Fresh, &eager(), &Meddler(AtomicU64::new(0), &write));
    assert!(matches!(got, Err(CopyError::SourceChanged { .. })), "{got:?}");
}

#[test]
fn a_source_that_shrinks_while_it_is_copied_is_found_out() {
    for (layout, to) in [(vec![(0, 6 * MIB)], 2 * MIB), (vec![(0, MIB)], MIB)] {
        let bench = Bench::new();
        let path = bench.source(6 * MIB, &layout);
        let shrink = || File::options().write(true).open(&path).unwrap().set_len(to).unwrap();
        let got = bench.copy(Start::Fresh, &eager(), &Meddler(AtomicU64::new(0), &shrink));
        let found = matches!(got, Err(CopyError::SourceShrunk { .. } | CopyError::SourceChanged { .. }));
        assert!(found, "{got:?}");
    }
}

#[test]
fn giving_up_says_why() {
    let bench = Bench::new();
    bench.source(6 * MIB, &[(0, 6 * MIB)]);
    let watcher = Watcher::new(3, Control::GiveUp("overlay at low water".into()));
    let got = bench.copy(Start::Fresh, &Options::default(), &watcher);
    assert!(
        matches!(got, Err(CopyError::GaveUp { offset, ref why }) if offset == 2 * MIB && why.contains("low water"))
    );
    assert!(watcher.last().is_none());
}

#[test]
fn only_regular_files_are_copied() {
    let bench = Bench::new();
    assert!(matches!(SourceFile::open(bench.dir.path()), Err(CopyError::NotAFile { .. })));
    assert!(matches!(SourceFile::open(Path::new("/dev/null")), Err(CopyError::NotAFile { .. })));
    let gone = SourceFile::open(&bench.dir.path().join("gone"));
    assert!(matches!(gone, Err(CopyError::Source { act: "open", .. })));
    rustix::fs::mknodat(
        &bench.folder,
        "pipe",
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    assert!(matches!(SourceFile::open(&bench.dir.path().join("pipe")), Err(CopyError::NotAFile { .. })));
}

#[test]
fn a_device_is_copied_whole_its_zeroes_become_holes_and_whoever_writes_to_it_is_noticed() {
    let Some(device) = crate::image::device::tests::Loop::new(5 * MIB) else { return };
    let open = File::options().write(true).open(&device.path).unwrap();
    let mut content = vec![0; 5 * MIB as usize];
    for (at, len) in [(0, 4096), (2 * MIB - 7, 9000), (5 * MIB - 512, 512)] {
        let part = &mut content[at as usize..(at + len) as usize];
        part.fill(0xA5);
        open.write_all_at(part, at).unwrap();
    }
    let bench = Bench::new();
    assert!(
        matches!(SourceFile::open(&device.path), Err(CopyError::NotAFile { .. })),
        "only where it is meant"
    );
    let source = SourceFile::open_raw(&device.path).unwrap();
    let copied = copy(&source, &bench.folder, &name(), Start::Fresh, &Options::default(), &()).unwrap();
    assert_eq!(copied.hash, blake3::hash(&content));
    assert!(std::fs::read(bench.target()).unwrap() == content);
    assert!(data_bytes(File::open(bench.target()).unwrap()).unwrap() < MIB, "it is not sparse");
    assert_eq!(data_bytes(File::open(&device.path).unwrap()).unwrap(), 5 * MIB);

    // Cut off and resumed; and resumed after somebody has written.
    let watcher = Watcher::new(4, Control::Stop);
    let cut = copy(&source, &bench.folder, &name(), Start::Again, &eager(), &watcher);
    assert!(matches!(cut, Err(CopyError::Stopped { .. })), "{cut:?}");
    let token = watcher.last().unwrap();
    let copied = copy(&source, &bench.folder, &name(), resume(&token), &eager(), &()).unwrap();
    assert_eq!(copied.hash, blake3::hash(&content));
    open.write_all_at(&[1; 512], MIB).unwrap();
    let changed = copy(&source, &bench.folder, &name(), Start::Again, &eager(), &());
    assert!(matches!(changed, Err(CopyError::SourceChanged { .. })), "{changed:?}");
    let now = SourceFile::open_raw(&device.path).unwrap();
    let stale = copy(&now, &bench.folder, &name(), resume(&token), &eager(), &());
    assert!(matches!(stale, Err(CopyError::StaleToken { .. })), "{stale:?}");
}

#[test]
fn hashing_alone_gives_the_same_hash_and_writes_nothing() {
    let bench = Bench::new();
    let path = bench.source(7 * MIB + 3, &[(5, 100), (3 * MIB, 2 * MIB)]);
    let got = hash(&SourceFile::open(&path).unwrap(), None, &()).unwrap();
    assert_eq!(got, blake3::hash(&std::fs::read(&path).unwrap()));
    assert_eq!(std::fs::read_dir(bench.dir.path()).unwrap().count(), 1);
}

/// Needs the right to mount; without it the same path is shown in `faults` with a target that says "full".
#[test]
fn a_full_file_system_is_said_to_be_full_and_the_copy_goes_on_when_there_is_room() {
    let bench = Bench::new();
    bench.source(12 * MIB, &[(0, 12 * MIB)]);
    let small = bench.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mount = |options: &str| {
        let run = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&small)
            .output();
        run.is_ok_and(|o| o.status.success())
    };
    if !mount("size=8m") {
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let roots = Roots::open([&small]).unwrap();
        let folder = roots.open_folder(&small).unwrap();
        let source = SourceFile::open(&bench.dir.path().join("source")).unwrap();
        let watcher = Watcher::new(u64::MAX, Control::Continue);
        let got = copy(&source, &folder, &name(), Start::Fresh, &eager(), &watcher);
        assert!(matches!(got, Err(CopyError::NoSpace { .. })), "{got:?}");
        assert!(mount("remount,size=32m"));
        let start = watcher.last().as_ref().map_or(Start::Again, resume);
        let copied = copy(&source, &folder, &name(), start, &eager(), &()).unwrap();
        assert_eq!(copied.hash, blake3::hash(&std::fs::read(bench.dir.path().join("source")).unwrap()));
        assert!(
            std::fs::read(small.join("copy")).unwrap()
                == std::fs::read(bench.dir.path().join("source")).unwrap()
        );
    });
    let unmounted = std::process::Command::new("umount").arg("-l").arg(&small).status().unwrap();
    assert!(unmounted.success());
    result.unwrap();
}
