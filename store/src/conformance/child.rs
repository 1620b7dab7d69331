//! Crashes: what a store is after its process was killed, its disk was full, or its files might not grow.
//!
//! The test program runs itself as a child, with the test `child` and an act in its environment. The child tells on its
//! standard error what was acknowledged, one line each; whatever happens to it after that, those records must be there.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;

use vmkeep_workflow::event::{Actor, Body};
use vmkeep_workflow::ids::{JobId, StreamId};
use vmkeep_workflow::journal::{AppendError, Reserve, StoreError};

use super::sample::{Job, append, assert_holds, assert_whole, at, of};
use super::{Candidate, small};
use crate::burial::bury;
use crate::{Options, Store};

const ACT: &str = "VMKEEP_STORE_ACT";
const FOLDER: &str = "VMKEEP_STORE_FOLDER";

/// What the child does; nothing when the test program runs as usual.
pub fn act(engine: &dyn Candidate) {
    let (Ok(act), Some(folder)) = (std::env::var(ACT), std::env::var_os(FOLDER)) else { return };
    let folder = PathBuf::from(folder);
    runtime().block_on(async {
        match act.as_str() {
            "write" => write(engine.open(&folder, small()).unwrap()).await,
            "hold" => {
                let store = engine.open(&folder, small()).unwrap();
                store.append(append("held", 0, 3)).await.unwrap();
                eprintln!("held by {}", std::process::id());
                // Until the parent ends it.
                std::future::pending::<()>().await;
            }
            "bury" => bury_jobs(engine.open(&folder, small()).unwrap()).await,
            "fill" => fill(engine, &folder).await,
            "exceed" => exceed(engine.open(&folder, small()).unwrap()).await,
            other => panic!("unknown act {other}"),
        }
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The command that runs the test `child` of a module of this test program.
fn this_program(
    module: &str,
    act: &str,
    folder: &Path,
) -> (PathBuf, Vec<String>, [(&'static str, PathBuf); 2]) {
    let test = match module.split_once("::") {
        Some((_, rest)) => format!("{rest}::child"),
        None => "child".to_owned(),
    };
    let program = std::env::current_exe().unwrap();
    let arguments = [test.as_str(), "--exact", "--nocapture", "--test-threads=1"].map(str::to_owned).to_vec();
    (program, arguments, [(ACT, PathBuf::from(act)), (FOLDER, folder.to_path_buf())])
}

fn start(module: &str, act: &str, folder: &Path) -> (Child, BufReader<ChildStderr>) {
    let (program, arguments, environment) = this_program(module, act, folder);
    let mut child = Command::new(program)
        .args(arguments)
        .envs(environment)
        // What a killed process leaves among temporary files goes with the test's own folder.
        .env("TMPDIR", temporary(folder))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let errors = BufReader::new(child.stderr.take().unwrap());
    (child, errors)
}

/// A folder beside a store.
fn temporary(folder: &Path) -> PathBuf {
    let temporary = folder.with_extension("tmp");
    std::fs::create_dir_all(&temporary).unwrap();
    temporary
}

fn stop(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Eight writers append to their streams and acknowledge, until the process is ended.
async fn write(store: Arc<dyn Store>) {
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let name = format!("writer {writer}");
                let mut last = store.last(&StreamId::from(name.clone())).await.unwrap().0;
                // Some appends have many records, so that a torn one would show.
                while let Ok(appended) = store.append(append(&name, last, 1 + last % 5)).await {
                    last = appended.last.0;
                    eprintln!("ack {writer} {last}");
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

/// Takes acknowledgements in, at most so many.
fn listen(
    errors: &mut BufReader<ChildStderr>,
    most: usize,
    acknowledged: &mut HashMap<String, u64>,
) -> usize {
    let mut line = String::new();
    let mut count = 0;
    while count < most {
        line.clear();
        if errors.read_line(&mut line).unwrap() == 0 {
            break;
        }
        let mut words = line.strip_suffix('\n').unwrap_or_default().split(' ');
        match (words.next(), words.next(), words.next()) {
            (Some("ack"), Some(writer), Some(last)) => {
                acknowledged.insert(format!("writer {writer}"), last.parse().unwrap());
                count += 1;
            }
            // The line that the kill tore.
            _ if !line.ends_with('\n') => break,
            _ => panic!("the child said {line:?}"),
        }
    }
    count
}

/// Kills a writing process at many points and compares the store with what it acknowledged.
pub fn kill_while_writing(engine: &dyn Candidate, module: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("store");
    let mut acknowledged = HashMap::new();
    for round in 0..15 {
        let (child, mut errors) = start(module, "write", &folder);
        let wanted = [1, 3, 10, 50, 200, 700][round % 6] + round;
        let heard = listen(&mut errors, wanted, &mut acknowledged);
        assert_eq!(heard, wanted, "the child ended by itself");
        stop(child);
        // What it said until it was killed counts as well.
        listen(&mut errors, usize::MAX, &mut acknowledged);
        runtime().block_on(async {
            let store = engine.open(&folder, small()).unwrap();
            for (stream, &last) in &acknowledged {
                let found = store.last(&StreamId::from(stream.clone())).await.unwrap().0;
                assert!(found >= last, "round {round}: {stream} ends at {found}, {last} was acknowledged");
                // An append is there as a whole or not at all.
                let mut end = 0;
                while end < found {
                    end += 1 + end % 5;
                }
                assert_eq!(end, found, "round {round}: {stream} holds a part of an append");
                assert_holds(&*store, stream, found).await;
            }
            assert_whole(&*store).await;
        });
    }
}

/// Writes jobs and buries them, and tells of each.
async fn bury_jobs(store: Arc<dyn Store>) {
    loop {
        let mut job = Job::new();
        store.append(job.request(0, "snapshot", "web1", Some(&job.id.to_string()))).await.unwrap();
        store.append(job.next(1, vec![Body::JobRecovered; 30])).await.unwrap();
        store.append(job.refuse(2)).await.unwrap();
        bury(&*store, job.id, Actor::default(), at(3)).await.unwrap();
        eprintln!("buried {}", job.id);
    }
}

/// Kills a process that buries jobs at many points, and looks at what is left.
pub fn kill_while_burying(engine: &dyn Candidate, module: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("store");
    let mut buried: Vec<JobId> = Vec::new();
    for round in 0..10 {
        let (child, mut errors) = start(module, "bury", &folder);
        let mut line = String::new();
        for _ in 0..round * 2 + 1 {
            line.clear();
            assert!(errors.read_line(&mut line).unwrap() > 0, "the child ended by itself");
            buried.push(line.trim().strip_prefix("buried ").unwrap().parse().unwrap());
        }
        stop(child);
        runtime().block_on(async {
            let store = engine.open(&folder, small()).unwrap();
            assert_whole(&*store).await;
            let tombstones = crate::verify::verify(&*store).await.unwrap().pruned;
            for &job in &buried {
                assert_eq!(store.job(job).await, Ok(None));
                assert_eq!(store.key(&job.to_string()).await, Ok(Some(StreamId::job(job))));
                assert!(tombstones.iter().any(|t| t.stream == StreamId::job(job) && t.events == 32));
            }
        });
    }
}

/// Kills a process while it makes a store, at many points.
pub fn kill_while_creating(engine: &dyn Candidate, module: &str) {
    let parent = tempfile::tempdir().unwrap();
    let mut young = 0;
    for round in 0..40_u64 {
        let folder = parent.path().join(format!("{round}/store"));
        let (child, mut errors) = start(module, "write", &folder);
        // The delay only spreads the kills; nothing depends on what the child has done by then.
        std::thread::sleep(std::time::Duration::from_micros(round * 1_500));
        stop(child);
        let mut acknowledged = HashMap::new();
        listen(&mut errors, usize::MAX, &mut acknowledged);
        young += u32::from(folder.exists() && acknowledged.is_empty());
        runtime().block_on(async {
            let store = engine.open(&folder, small()).unwrap();
            for (stream, &last) in &acknowledged {
                assert!(store.last(&StreamId::from(stream.clone())).await.unwrap().0 >= last, "{stream}");
            }
            assert_whole(&*store).await;
        });
    }
    assert!(young > 0, "no kill came while the store was young");
}

/// A process finds the store held by another one, may read it all the same, and gets it when that one is gone, whatever
/// ended it.
pub fn second_process(engine: &dyn Candidate, module: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("store");
    let (child, mut errors) = start(module, "hold", &folder);
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    assert_eq!(line, format!("held by {}\n", child.id()));
    let Err(StoreError::InUse { holder, .. }) = engine.open(&folder, small()) else {
        panic!("it was let in")
    };
    assert!(holder.contains(&format!("process {}", child.id())), "{holder}");
    runtime().block_on(async {
        let reading = engine.open_read_only(&folder).unwrap();
        assert_holds(&*reading, "held", 3).await;
        stop(child);
        assert_holds(&*reading, "held", 3).await;
        drop(reading);
        assert_holds(&*engine.open_read_only(&folder).unwrap(), "held", 3).await;
        let store = engine.open(&folder, small()).unwrap();
        store.append(append("held", 3, 1)).await.unwrap();
        assert_whole(&*store).await;
    });
}

/// Runs the child's act `fill` with file systems of its own: a RAM disk, and ext4 where that can be had.
pub fn full_disk(module: &str) {
    let place = tempfile::tempdir().unwrap();
    let mount = place.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let (program, arguments, environment) = this_program(module, "fill", &mount);
    let image = place.path().join("image");
    let ext4 = format!(
        "truncate -s 64M '{0}' && mkfs.ext4 -q -F '{0}' && mount -o loop '{0}' \"$MOUNT\"",
        image.display()
    );
    let mut tried = 0;
    for prepare in ["mount -t tmpfs -o size=48m none \"$MOUNT\"", &ext4] {
        // A mount namespace of its own: nothing is left mounted, whatever happens.
        let script = format!("{{ {prepare}; }} >&2 || exit 77; exec \"$@\"");
        let output = Command::new("unshare")
            .args(if rustix::process::geteuid().is_root() { &["-m"][..] } else { &["-U", "-r", "-m"] })
            .args(["sh", "-c", &script, "sh"])
            .arg(&program)
            .args(&arguments)
            .envs(environment.clone())
            .env("MOUNT", &mount)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(77) || said.contains("unshare:") {
            eprintln!("not possible here: {prepare}: {said}");
            continue;
        }
        let out = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{prepare}: {}: {said}{out}", output.status);
        tried += 1;
    }
    assert!(tried > 0, "no file system could be mounted to be filled");
}

/// Fills the disk, and checks at each stage what is promised.
async fn fill(engine: &dyn Candidate, folder: &Path) {
    let options = || Options { reserve: 4 << 20, ..Options::default() };
    let ballast = folder.join("ballast");
    let folder = folder.join("store");
    let store = engine.open(&folder, options()).unwrap();
    store.append(append("kept", 0, 3)).await.unwrap();
    assert_eq!(store.reserve().await, Ok(Reserve::Intact));

    // Somebody else takes all the room there is.
    let take_all = || {
        let mut file = std::fs::File::options().create(true).append(true).open(&ballast).unwrap();
        let full = std::io::copy(&mut std::io::repeat(7), &mut file).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        file.sync_all().unwrap();
    };
    take_all();

    // Records still fit into the reserve, and more than one job's worth of them, until at last there is no room.
    let record = format!("\"{}\"", "x".repeat(100_000)).into_bytes();
    let mut count = 0;
    let error = loop {
        match store.append(of("bulk", count, vec![record.clone()])).await {
            Ok(appended) => count = appended.last.0,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, AppendError::Full(_)), "{error:?}");
    assert!(count >= 30, "only {count} records of 100 kB fitted");
    assert_eq!(store.reserve().await, Ok(Reserve::Spent), "the reserve was given up first");

    // What is small may still fit; what does not is refused, again and again, and nothing is half there.
    for _ in 0..3 {
        let outcome = store.append(of("bulk", count, vec![record.clone()])).await;
        assert!(matches!(outcome, Err(AppendError::Full(_))), "{outcome:?}");
    }
    assert_holds(&*store, "kept", 3).await;
    assert_eq!(store.last(&StreamId::from("bulk")).await.unwrap().0, count);
    assert_whole(&*store).await;

    // A tool can read beside it, a daemon can be started anew, both on the full disk.
    assert_whole(&*engine.open_read_only(&folder).unwrap()).await;
    drop(store);
    assert_whole(&*engine.open_read_only(&folder).unwrap()).await;
    // Also what room that gave.
    take_all();
    let store = engine.open(&folder, options()).unwrap();
    assert_eq!(store.reserve().await, Ok(Reserve::Spent), "that it was spent is not forgotten");
    assert_eq!(store.last(&StreamId::from("bulk")).await.unwrap().0, count);

    std::fs::remove_file(&ballast).unwrap();
    assert_eq!(store.reserve().await, Ok(Reserve::Intact), "with room again it is restored");
    store.append(of("bulk", count, vec![record])).await.unwrap();
    assert_whole(&*store).await;
}

/// Runs the child's act `exceed` where no file may grow beyond a limit, then looks at what it left.
pub fn limited_file(engine: &dyn Candidate, module: &str) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("store");
    let (program, arguments, environment) = this_program(module, "exceed", &folder);
    let output = Command::new("sh")
        // In blocks of 512 bytes. The signal is ignored, so that writing fails instead.
        .args(["-c", "trap '' XFSZ; ulimit -f 49152; exec \"$@\"", "sh"])
        .arg(program)
        .args(arguments)
        .envs(environment)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
    let acknowledged: u64 =
        said.lines().rev().find_map(|l| l.strip_prefix("bulk ")).unwrap().parse().unwrap();
    runtime().block_on(async {
        let store = engine.open(&folder, small()).unwrap();
        assert!(store.last(&StreamId::from("bulk")).await.unwrap().0 >= acknowledged);
        assert_whole(&*store).await;
    });
}

async fn exceed(store: Arc<dyn Store>) {
    let record = format!("\"{}\"", "x".repeat(1_000_000)).into_bytes();
    let mut last = 0;
    let error = loop {
        match store.append(of("bulk", last, vec![record.clone()])).await {
            Ok(appended) => last = appended.last.0,
            Err(error) => break error,
        }
        assert!(last < 1000, "the limit was not felt");
    };
    assert!(matches!(error, AppendError::Full(_) | AppendError::Unknown(_)), "{error:?}");
    assert!(last > 10);
    let found = store.last(&StreamId::from("bulk")).await.unwrap().0;
    assert!(found >= last);
    eprintln!("bulk {last}");
}
