//! Images at rest, shown by a `qemu-nbd` of our own.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;
use vmkeep_vault::source::{
    DiskSource, Format, ImageOptions, ImageSource, Owner, QemuNbd, QemuNbdOptions, SourceError,
};

use crate::support::{CHUNK, image, restore, run, text};

fn options(folder: &Path, image: Format) -> ImageOptions {
    let show = QemuNbdOptions { image, bitmap: None, connections: 4, owner: None, folder: folder.to_owned() };
    ImageOptions { show, in_flight: 16, patience: None }
}

fn named(format: &str, file: &Path) -> Format {
    Format::Named { format: format.into(), file: file.to_owned() }
}

/// A folder for sockets, in which nothing may be left.
fn sockets() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn is_empty(folder: &TempDir) -> bool {
    std::fs::read_dir(folder.path()).unwrap().next().is_none()
}

fn qcow2(folder: &Path, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let (raw, file) = (folder.join(format!("{name}.raw")), folder.join(format!("{name}.qcow2")));
    std::fs::write(&raw, bytes).unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&file)]);
    file
}

fn write(file: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(text(file));
    run("qemu-io", &args);
}

#[tokio::test]
async fn a_frozen_base_is_read_in_full_and_since_its_bitmap_and_is_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let before = image(20, 30 << 20);
    let base = qcow2(folder.path(), "base", &before);
    run("qemu-img", &["bitmap", "--add", "-g", "65536", text(&base), "since"]);
    write(&base, &["write -P 0xAA 3M 70k", "write -z 9M 1M"]);
    let mut now = before.clone();
    now[3 << 20..][..70 << 10].fill(0xAA);
    now[9 << 20..][..1 << 20].fill(0);
    // As a domain that was started meanwhile has it.
    let overlay = folder.path().join("overlay.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&base), text(&overlay)]);
    let sockets = sockets();
    let mut options = options(sockets.path(), named("qcow2", &base));
    options.show.bitmap = Some("since".into());
    let source = ImageSource::open(&options).await.unwrap();
    assert!(is_empty(&sockets), "what is connected needs no socket any more");
    assert_eq!(source.nbd().client().connections(), 4);
    let process = source.process();
    write(&overlay, &["write -P 0x11 0 30M"]);
    let source = Arc::new(source);
    let (restored, told) = restore(source.clone(), Some(&before)).await;
    assert!(restored == now);
    assert_eq!((told.data, told.zero), (2 * CHUNK as u64, 1 << 20));
    assert!(restore(source.clone(), None).await.0 == now);
    Arc::into_inner(source).unwrap().close().await;
    assert!(!Path::new(&format!("/proc/{process}")).exists());
    run("qemu-img", &["commit", "-q", text(&overlay)]);
}

#[tokio::test]
async fn a_chain_is_read_as_it_is_spelled_out_whatever_its_headers_say() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = image(21, 4 << 20);
    let base = qcow2(folder.path(), "base", &bytes);
    let top = folder.path().join("top.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", "/nowhere", text(&top), "4M"],
    );
    write_unbacked(&top, "write -P 0x42 1M 64k");
    let chain = format!(
        "driver=qcow2,file.driver=file,file.filename={},backing.driver=qcow2,backing.file.driver=file,backing.file.filename={}",
        text(&top),
        text(&base)
    );
    let sockets = sockets();
    let source = ImageSource::open(&options(sockets.path(), Format::Options(chain))).await.unwrap();
    let mut expected = bytes;
    expected[1 << 20..][..64 << 10].fill(0x42);
    assert!(restore(Arc::new(source), None).await.0 == expected);
}

fn write_unbacked(file: &Path, command: &str) {
    let options = format!("driver=qcow2,backing=,file.driver=file,file.filename={}", text(file));
    run("qemu-io", &["--image-opts", "-c", command, &options]);
}

#[tokio::test]
async fn an_image_that_cannot_be_shown_is_told_in_the_words_of_qemu_nbd() {
    let folder = tempfile::tempdir().unwrap();
    let file = qcow2(folder.path(), "disk", &[1; 1 << 20]);
    let sockets = sockets();
    let missing = options(sockets.path(), named("raw", Path::new("/nowhere/disk")));
    let wrong = options(sockets.path(), named("vdi", &file));
    let mut lacks = options(sockets.path(), named("qcow2", &file));
    lacks.show.bitmap = Some("since".into());
    for (options, words) in [(missing, "/nowhere/disk"), (wrong, "VDI"), (lacks, "Bitmap 'since'")] {
        match ImageSource::open(&options).await.unwrap_err() {
            SourceError::Ended { complaint, .. } => assert!(complaint.contains(words), "{complaint}"),
            other => panic!("{other}"),
        }
    }
    assert!(is_empty(&sockets));
    let nowhere = options(Path::new("/nowhere"), named("qcow2", &file));
    assert_eq!(ImageSource::open(&nowhere).await.unwrap_err().code(), "SOURCE_NOT_STARTED");
}

#[tokio::test]
async fn an_image_that_somebody_writes_to_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = qcow2(folder.path(), "disk", &[1; 1 << 20]);
    let mut writer = writer_that_has_it_open(Command::new("qemu-io").args(["-f", "qcow2", text(&file)]));
    let sockets = sockets();
    let error = ImageSource::open(&options(sockets.path(), named("qcow2", &file))).await.unwrap_err();
    assert!(error.to_string().contains("lock"), "{error}");
    writer.kill().unwrap();
    writer.wait().unwrap();
}

/// It has opened the image when it has answered.
fn writer_that_has_it_open(command: &mut Command) -> Child {
    use std::io::Write;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut line = String::new();
    while !line.contains("MiB") {
        line.clear();
        assert!(BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap() > 0);
    }
    child
}

#[tokio::test]
async fn the_socket_can_be_reached_by_its_owner_only_and_goes_with_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, [1; 4096]).unwrap();
    let sockets = sockets();
    let program = QemuNbd::start(&options(sockets.path(), named("raw", &disk)).show).await.unwrap();
    let made = std::fs::read_dir(sockets.path()).unwrap().next().unwrap().unwrap();
    assert_eq!(made.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    let pidfd = pidfd_open(Pid::from_raw(program.process() as i32).unwrap(), PidfdFlags::empty()).unwrap();
    drop(program);
    assert!(is_empty(&sockets));
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], None).unwrap();
}

#[tokio::test]
async fn a_program_that_dies_in_the_middle_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, vec![1; 8 << 20]).unwrap();
    let sockets = sockets();
    let source = ImageSource::open(&options(sockets.path(), named("raw", &disk))).await.unwrap();
    kill_process(Pid::from_raw(source.process() as i32).unwrap(), Signal::KILL).unwrap();
    // Whatever was answered before, in the end it is gone.
    let error = loop {
        if let Err(error) = source.read(0..1 << 20).await {
            break error;
        }
    };
    assert!(matches!(&error, SourceError::Ended { status, .. } if status.contains("signal: 9")), "{error}");
}

/// What the next test starts as a process of its own: it says who shows the image, and waits to be killed.
#[tokio::test]
#[ignore = "started by the test of a parent's death"]
async fn a_parent() {
    let Ok(disk) = std::env::var("VMKEEP_TEST_DISK") else { return };
    let sockets = sockets();
    let mut options = options(sockets.path(), named("raw", Path::new(&disk)));
    if std::env::var("VMKEEP_TEST_OWNER").is_ok() {
        options.show.owner = Some(Owner { user: 65534, group: 65534 });
    }
    let source = ImageSource::open(&options).await.unwrap();
    println!("shown by {}", source.process());
    std::future::pending::<()>().await;
}

#[test]
fn a_program_dies_with_its_parent_also_as_another_user() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, [1; 4096]).unwrap();
    let root = rustix::process::geteuid().is_root();
    for as_another in if root { &[false, true][..] } else { &[false] } {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "image::a_parent", "--ignored", "--nocapture"])
            .env("VMKEEP_TEST_DISK", &disk);
        if *as_another {
            command.env("VMKEEP_TEST_OWNER", "1");
        }
        let mut parent = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(parent.stdout.take().unwrap()).lines();
        let process = lines
            .map_while(Result::ok)
            .find_map(|line| {
                line.split("shown by ").nth(1).map(|process| process.trim().parse::<i32>().unwrap())
            })
            .unwrap();
        let pidfd = pidfd_open(Pid::from_raw(process).unwrap(), PidfdFlags::empty()).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        assert_eq!(status.contains("Uid:\t65534\t65534\t65534\t65534"), *as_another, "{status}");
        parent.kill().unwrap();
        parent.wait().unwrap();
        let most = Timespec { tv_sec: 60, tv_nsec: 0 };
        let gone = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&most)).unwrap();
        // One that lives on shall not outlive the test.
        pidfd_send_signal(&pidfd, Signal::KILL).ok();
        assert_eq!(gone, 1, "it outlives its parent");
    }
}
