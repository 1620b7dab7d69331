//! Runs a test in a child under a small library (`faults.c`) that makes writes and fsyncs fail on demand.

#![allow(dead_code)]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use vmkeep_store::conformance::sample::append;
use vmkeep_workflow::EventStore;
use vmkeep_workflow::ids::JobId;

const CONTROL: &str = "VMKEEP_FAULTS";

pub(crate) const EIO: u32 = 5;
pub(crate) const ENOSPC: u32 = 28;
pub(crate) const EDQUOT: u32 = 122;

/// The library, compiled once.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/faults.c");
        let library =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("faults-{}.so", std::process::id()));
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
        let done = Command::new(compiler)
            .args(["-O1", "-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(source)
            .arg("-ldl")
            .status();
        assert!(done.unwrap().success(), "the library of faults could not be compiled");
        library
    })
}

/// The faults that a test turns on and off, and its store.
pub(crate) struct Stage {
    pub(crate) folder: PathBuf,
    pub(crate) control: PathBuf,
}

impl Stage {
    pub(crate) fn fail(&self, operation: &str, errno: u32, suffix: &str) {
        std::fs::write(&self.control, format!("{operation} {errno} {suffix}")).unwrap();
    }

    pub(crate) fn heal(&self) {
        std::fs::remove_file(&self.control).unwrap();
    }

    /// How often a file that holds records was fsynced.
    pub(crate) fn fsyncs(&self) -> u64 {
        std::fs::metadata(self.control.with_extension("fsyncs")).map_or(0, |file| file.len())
    }
}

/// Runs a test in a child under the library.
pub(crate) fn under_faults(name: &str, test: impl AsyncFnOnce(&Stage)) {
    if let Some(control) = std::env::var_os(CONTROL) {
        let control = PathBuf::from(control);
        let stage = Stage { folder: control.with_file_name("store"), control };
        tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(test(&stage));
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .arg0("faults")
        .args([name, "--exact", "--nocapture"])
        .env("LD_PRELOAD", library())
        .env(CONTROL, place.path().join("control"))
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
    assert!(String::from_utf8_lossy(&said).contains("1 passed"), "the child ran no test");
}

/// A durable append costs one fsync, whichever engine writes it; a row and a refusal cost none.
pub(crate) async fn assert_an_append_is_one_fsync(store: &impl EventStore, stage: &Stage) {
    store.append(append("a", 0, 1)).await.unwrap();
    let before = stage.fsyncs();
    for n in 1..=100 {
        store.append(append("a", n, 1)).await.unwrap();
    }
    assert_eq!(stage.fsyncs() - before, 100);
    store.put_row(JobId::new(), "copy", &serde_json::json!(1)).await.unwrap();
    assert!(store.append(append("a", 0, 1)).await.is_err(), "a conflict");
    assert_eq!(stage.fsyncs() - before, 100, "neither a row nor a refusal is fsynced");
}
