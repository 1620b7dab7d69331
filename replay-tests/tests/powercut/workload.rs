//! What is recorded: a program that writes, and tells what it was promised.
//!
//! The test program runs itself, with the test `child` and what it is to do in its environment. What it says on its
//! standard output is in the recording too, so that it is known what had been promised at every instant.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmkeep_store::conformance::sample::append;
use vmkeep_store::{EngineName, Store, StoreConfig, open};
use vmkeep_workflow::ids::StreamId;

const ENGINE: &str = "VMKEEP_POWERCUT_ENGINE";
const ACT: &str = "VMKEEP_POWERCUT_ACT";
const ROOT: &str = "VMKEEP_POWERCUT_ROOT";

/// So many streams are written at once.
pub(crate) const WRITERS: usize = 3;

/// What the program does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    /// It opens the store and writes a while.
    Write,
    /// The same for long, so that its files have been through everything they go through.
    Age,
    /// It makes a backup's folder.
    Publish,
    /// It restores the files of a backup.
    Restore,
    /// It goes on with that after a power cut.
    RestoreAgain,
    /// It restores the files of a backup in a vault.
    Fetch,
    /// It goes on with that after a power cut.
    FetchAgain,
    /// It makes a vault and backups in it.
    Fill,
    /// It makes overlays.
    Overlay,
    /// It opens the store and writes a while, and reacts to failures as the engine does.
    Endure,
}

/// The settings of the store below a root.
pub(crate) fn settings(engine: EngineName, root: &Path) -> StoreConfig {
    StoreConfig { engine, reserve: 64 << 10, ..StoreConfig::new(root.join("store")) }
}

/// The name of a writer's stream.
pub(crate) fn writer(n: usize) -> String {
    format!("writer-{n}")
}

/// What runs the test `child` with an act.
pub(crate) fn program(
    engine: &str,
    act: Act,
    root: &Path,
) -> (PathBuf, [&'static str; 4], [(&'static str, OsString); 3]) {
    let arguments = ["workload::child", "--exact", "--nocapture", "--test-threads=1"];
    let environment = [(ENGINE, engine.into()), (ACT, format!("{act:?}").into()), (ROOT, root.into())];
    (std::env::current_exe().unwrap(), arguments, environment)
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Does what the environment says; nothing if it says nothing.
#[test]
fn child() {
    let (Ok(engine), Ok(act), Some(root)) =
        (std::env::var(ENGINE), std::env::var(ACT), std::env::var_os(ROOT))
    else {
        return;
    };
    match act.as_str() {
        "Publish" => return crate::backups::publish_and_withdraw(Path::new(&root)),
        "Restore" => return crate::restores::restore(Path::new(&root)),
        "Fetch" => return crate::fetches::restore(Path::new(&root)),
        "RestoreAgain" => return crate::restores::restore_again(Path::new(&root)),
        "FetchAgain" => return crate::fetches::restore_again(Path::new(&root)),
        "Fill" => return crate::vaults::fill(Path::new(&root)),
        "Overlay" => return crate::overlays::make(Path::new(&root)),
        _ => {}
    }
    let engine =
        [EngineName::Sqlite, EngineName::Sled].into_iter().find(|name| name.to_string() == engine).unwrap();
    if act == "Endure" {
        return runtime().block_on(crate::faults::endure(settings(engine, Path::new(&root))));
    }
    let rounds = if act == "Age" { 300 } else { 25 };
    runtime().block_on(write(settings(engine, Path::new(&root)), rounds));
}

/// Writers that each keep their own stream. Each acknowledgement is told by one write.
async fn write(settings: StoreConfig, rounds: u64) {
    let store: Arc<dyn Store> = open(&settings).unwrap();
    say("open");
    let writers = (0..WRITERS).map(|n| {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            let name = writer(n);
            let mut last = store.last(&StreamId::from(name.clone())).await.unwrap().0;
            for _ in 0..rounds {
                last = store.append(append(&name, last, 1 + last % 5)).await.unwrap().last.0;
                say(&format!("ack {name} {last}"));
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

pub(crate) fn say(what: &str) {
    std::io::stdout().lock().write_all(format!("{what}\n").as_bytes()).unwrap();
}
