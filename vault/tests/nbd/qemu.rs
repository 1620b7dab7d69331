//! QEMU's own export of a disk as it was, which is what a pull job of libvirt's shows.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use serde_json::{Value, json};
use vmkeep_vault::nbd::Address;
use vmkeep_vault::source::{DiskSource, NbdOptions, NbdSource};

use crate::support::{CHUNK, image, restore, run, text};

/// A QEMU without a guest, and its monitor.
struct Qemu {
    process: Child,
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Qemu {
    fn start() -> Self {
        // Not its standard output: `qemu-io` prints there what it did.
        let (to, its) = UnixStream::pair().unwrap();
        let process = Command::new("qemu-system-x86_64")
            .args(["-S", "-nodefaults", "-machine", "none", "-display", "none"])
            .args(["-chardev", "socket,id=q,fd=0", "-mon", "chardev=q,mode=control"])
            .stdin(OwnedFd::from(its))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let from = BufReader::new(to.try_clone().unwrap());
        let mut qemu = Self { process, to, from };
        qemu.line();
        qemu.call("qmp_capabilities", json!({}));
        qemu
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    fn call(&mut self, command: &str, arguments: impl Into<Value>) -> Value {
        writeln!(self.to, "{}", json!({"execute": command, "arguments": arguments.into()})).unwrap();
        loop {
            let mut line = self.line();
            if let Some(answer) = line.get_mut("return") {
                return answer.take();
            }
            assert!(line.get("event").is_some(), "{command}: {line}");
        }
    }

    fn open(&mut self, node: &str, file: &Path, backing: Option<&str>) {
        self.call(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": node, "backing": backing, "discard": "unmap",
                   "file": {"driver": "file", "filename": text(file)}}),
        );
    }

    /// As a guest would write to a node. What came of it is seen in what is read.
    fn io(&mut self, node: &str, command: &str) {
        let line = format!("qemu-io {node} \"{command}\"");
        self.call("human-monitor-command", json!({"command-line": line}));
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

fn qcow2(folder: &Path, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let (raw, file) = (folder.join(format!("{name}.raw")), folder.join(format!("{name}.qcow2")));
    std::fs::write(&raw, bytes).unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&file)]);
    file
}

#[tokio::test]
async fn a_pull_is_read_as_the_disk_was_in_full_and_since_a_bitmap_began() {
    let folder = tempfile::tempdir().unwrap();
    let before = image(9, 48 << 20);
    let disk = qcow2(folder.path(), "disk", &before);
    let scratch = folder.path().join("scratch.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&scratch), "48M"]);
    let mut qemu = Qemu::start();
    qemu.open("disk", &disk, None);
    qemu.call(
        "block-dirty-bitmap-add",
        json!({"node": "disk", "name": "since", "granularity": 65536, "persistent": true}),
    );
    // What happens between the parent and the point in time.
    qemu.io("disk", "write -P 0xBB 1M 100k");
    qemu.io("disk", "write -P 0xCC 20000k 512");
    qemu.io("disk", "write -z -u 8M 3M");
    qemu.io("disk", "discard 30M 1M");
    let mut at_point = before.clone();
    at_point[1 << 20..][..100 << 10].fill(0xBB);
    at_point[20000 << 10..][..512].fill(0xCC);
    at_point[8 << 20..][..3 << 20].fill(0);
    at_point[30 << 20..][..1 << 20].fill(0);
    qemu.open("scratch", &scratch, Some("disk"));
    qemu.call(
        "transaction",
        json!({"actions": [
            {"type": "blockdev-backup", "data": {"job-id": "pull", "device": "disk", "target": "scratch", "sync": "none",
                "filter-node-name": "guest"}},
            {"type": "block-dirty-bitmap-disable", "data": {"node": "disk", "name": "since"}},
        ]}),
    );
    let socket = folder.path().join("s");
    qemu.call("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": text(&socket)}}}));
    qemu.call(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "scratch", "name": "vda", "allocation-depth": true,
               "bitmaps": [{"node": "disk", "name": "since"}]}),
    );
    let options = NbdOptions { bitmap: Some("since".into()), ..NbdOptions::default() };
    let source = NbdSource::open(&Address::unix(&socket, "vda"), &options).await.unwrap();
    assert!(source.knows_changes());
    assert_eq!(source.client().connections(), 4);
    let peer = source.client().peers().next().flatten().unwrap();
    assert_eq!(peer.process, Some(qemu.process.id() as i32), "a caller can see that it is that QEMU");
    let source = Arc::new(source);
    // The guest goes on while it is read.
    qemu.io("guest", "write -P 0xDD 0 5M");
    let (restored, told) = restore(source.clone(), Some(&before)).await;
    assert!(restored == at_point);
    // 1 MiB and 100 KiB touch two chunks, the sector one; what was zeroed or discarded is not read.
    assert_eq!((told.data, told.zero), (3 * CHUNK as u64, 4 << 20), "{told:?}");
    qemu.io("guest", "write -P 0xEE 40M 5M");
    let (restored, full) = restore(source, None).await;
    assert!(restored == at_point);
    assert_eq!(full.unchanged, 0);
    // The same export through QEMU's own reader.
    let copy = folder.path().join("copy.raw");
    let uri = format!("nbd+unix:///vda?socket={}", text(&socket));
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, text(&copy)]);
    assert!(std::fs::read(copy).unwrap() == at_point);
}

#[tokio::test]
async fn a_bitmap_is_not_believed_beyond_what_both_sizes_have_in_common() {
    let folder = tempfile::tempdir().unwrap();
    let before = image(10, 5 * CHUNK + 512);
    let disk = qcow2(folder.path(), "disk", &before);
    let mut qemu = Qemu::start();
    qemu.open("disk", &disk, None);
    qemu.call("block-dirty-bitmap-add", json!({"node": "disk", "name": "since", "granularity": 65536}));
    // The bitmap calls what is new clean.
    qemu.call("block_resize", json!({"node-name": "disk", "size": 9 * CHUNK}));
    qemu.call("block-dirty-bitmap-disable", json!({"node": "disk", "name": "since"}));
    qemu.io("disk", "write -P 0x77 320k 200k");
    let socket = folder.path().join("s");
    qemu.call("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": text(&socket)}}}));
    qemu.call(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "disk", "name": "vda", "bitmaps": ["since"]}),
    );
    let options = NbdOptions { bitmap: Some("since".into()), ..NbdOptions::default() };
    let source = Arc::new(NbdSource::open(&Address::unix(&socket, "vda"), &options).await.unwrap());
    let mut now = before.clone();
    now.resize(9 * CHUNK, 0);
    now[320 << 10..][..200 << 10].fill(0x77);
    let (restored, told) = restore(source, Some(&before)).await;
    assert!(restored == now);
    assert_eq!(told.unchanged, 5 * CHUNK as u64);
}

#[tokio::test]
async fn an_export_that_is_not_there_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let mut qemu = Qemu::start();
    qemu.call("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": text(&socket)}}}));
    let address = Address::unix(&socket, "vdb");
    let error = NbdSource::open(&address, &NbdOptions::default()).await.unwrap_err();
    assert_eq!(error.code(), "NBD_REFUSED");
    assert!(error.to_string().contains("vdb"), "{error}");
}
