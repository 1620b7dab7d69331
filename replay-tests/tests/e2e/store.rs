//! A store that is damaged, of a newer release, or somebody else's at the moment.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Stdio;

use crate::support::bed::*;
use crate::support::mount::Mount;
use crate::support::{Host, files_below, run, until};

#[test]
fn a_store_that_is_damaged_newer_or_in_use_is_refused_untouched() {
    let bed = Bed::boot(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    host.ok(&["snapshot", "web1", "--disk-only"]);
    bed.assert_back_home();
    let store = host.hypervisor.dir().join("state/vmkeep/store");
    let refuses = |code: i32, name: &str| {
        // One that starts after all must not keep this test for ever.
        let mut command = host.hypervisor.command("timeout");
        let output = command.arg("60").arg(host.hypervisor.dir().join("bin/vmkeepd")).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        for word in [name, "remedy ", store.to_str().unwrap()] {
            assert!(said.contains(word), "{word}: {said}");
        }
    };
    // Often, because such a process ends while libvirt's threads in it begin.
    for _ in 0..20 {
        refuses(79, "STORE_IN_USE");
    }
    host.ok(&["status"]);
    assert_eq!(daemon.end(), Some(0));
    let content = || -> BTreeMap<PathBuf, Vec<u8>> {
        files_below(&store).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
    };
    let kept = content();
    let restore = || {
        for path in files_below(&store) {
            fs::remove_file(path).unwrap();
        }
        for (path, bytes) in &kept {
            fs::write(path, bytes).unwrap();
            give(host, path);
        }
    };
    let database =
        kept.iter().max_by_key(|(_, bytes)| bytes.starts_with(b"SQLite format 3")).unwrap().0.clone();
    let edit = |at: u64, bytes: &[u8]| {
        // What the log ahead of the database holds would stand before the edit. A store that was closed needs no log.
        for path in files_below(&store) {
            if path.to_string_lossy().ends_with("-wal") || path.to_string_lossy().ends_with("-shm") {
                fs::remove_file(path).unwrap();
            }
        }
        fs::File::options().write(true).open(&database).unwrap().write_all_at(bytes, at).unwrap();
    };
    // The user version of an SQLite database stands at byte 60.
    edit(60, &999_u32.to_be_bytes());
    let newer = fs::read(&database).unwrap();
    refuses(80, "STORE_TOO_NEW");
    assert_eq!(fs::read(&database).unwrap(), newer, "a store of a newer release was changed");
    restore();
    // A database that is none.
    edit(0, b"something else..");
    refuses(77, "STORE_DAMAGED");
    restore();
    // Bytes of an event: the daemon either does not start, or says so when it is asked to verify.
    let bytes = &kept[&database];
    let at = bytes.windows(9).rposition(|window| window == b"succeeded").unwrap();
    edit(at as u64, b"sUcceeded");
    let mut daemon = host.hypervisor.command(host.hypervisor.dir().join("bin/vmkeepd"));
    let mut daemon = daemon.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let ended = until("vmkeepd to start or to refuse", || match daemon.try_wait().unwrap() {
        Some(status) => Some(status.code()),
        None => host.ready().then_some(None),
    });
    match ended {
        None => drop(host.fails(&["audit", "verify"], 77, &["STORE_DAMAGED"])),
        Some(code) => assert_eq!(code, 77),
    }
    let _ = daemon.kill();
    daemon.wait().unwrap();
    restore();
    let _daemon = host.daemon();
    host.ok(&["audit", "verify"]);
    assert_eq!(host.jobs().len(), 1);
    bed.assert_back_home();
}

/// Started at the same moment on the same state folder, one serves and the other says why it does not.
#[test]
fn of_two_daemons_that_start_at_once_one_serves_and_the_other_says_why_not() {
    let host = Host::new();
    let mut winners = [0, 0];
    for round in 0..40 {
        let mut both = [(); 2].map(|()| {
            let mut command = host.hypervisor.command(host.hypervisor.dir().join("bin/vmkeepd"));
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
        });
        let (loser, status) = until("one of two daemons to give way", || {
            both.iter_mut().enumerate().find_map(|(n, daemon)| Some((n, daemon.try_wait().unwrap()?)))
        });
        let winner = 1 - loser;
        winners[winner] += 1;
        let mut said = String::new();
        both[loser].stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(status.code(), Some(79), "round {round}: {said}");
        for word in ["STORE_IN_USE", "remedy "] {
            assert!(said.contains(word), "round {round}: no {word}: {said}");
        }
        until("the other to serve", || {
            assert_eq!(both[winner].try_wait().unwrap(), None, "round {round}: neither serves");
            host.ready().then_some(())
        });
        // Killed and ended in turn: what either leaves keeps nobody from the store.
        if round % 2 == 0 {
            both[winner].kill().unwrap();
        } else {
            let pid = rustix::process::Pid::from_child(&both[winner]);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        }
        both[winner].wait().unwrap();
    }
    println!("the first won {} times, the second {}", winners[0], winners[1]);
}

#[test]
fn a_store_on_a_full_or_read_only_file_system_is_not_called_damaged() {
    let host = Host::new();
    let Some(mount) = Mount::new(&host, "small", 40) else { return };
    let state = folder(&host, &mount.0.join("state"));
    let start = || {
        let mut daemon = host.hypervisor.command(host.hypervisor.dir().join("bin/vmkeepd"));
        daemon.arg("--state-dir").arg(&state).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let refuses = || {
        let output = start().wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(124), "{said}");
        assert!(said.contains("STORE_UNAVAILABLE"), "{said}");
    };
    mount.fill(0);
    refuses();
    mount.clear();
    let mut daemon = start();
    host.until_ready();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    let at = mount.0.to_str().unwrap().to_owned();
    run("mount", &["-o", "remount,ro", &at]);
    refuses();
    run("mount", &["-o", "remount,rw", &at]);
    let mut daemon = start();
    host.until_ready();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
