//! The command line as a process: its exit statuses, what it prints, and what an interruption does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::process::{Output, Stdio};

use serde_json::Value;
use support::{Daemon, NASTY};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use vmkeep_host::codes;
use vmkeep_workflow::{Code, JobStatus};

fn vmkeep() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmkeep"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("HOME", "/nonexistent");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(args: &[&str]) -> Output {
    vmkeep().args(args).output().await.unwrap()
}

async fn at(daemon: &Daemon, args: &[&str]) -> Output {
    vmkeep().arg("--socket").arg(&daemon.socket).args(args).output().await.unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn status(output: &Output) -> u16 {
    u16::try_from(output.status.code().expect("it ended by itself")).unwrap()
}

#[tokio::test]
async fn words_that_make_no_sense_exit_with_64_and_never_with_2() {
    for args in [
        &[][..],
        &["frobnicate"],
        &["snapshot"],
        &["snapshot", "a", "--bandwidth", "fast"],
        &["snapshot", "a", "--live", "--disk-only"],
        &["snapshot", "a", "--memory-time", "5y"],
        &["restore", "a"],
        &["restore", "a", "--as", "b", "--disk", "vda"],
        &["restore", "a", "--as", "b", "--start", "--paused"],
        &["restore", "a", "--as", "b", "--in-place"],
        &["restore", "a", "--from", "b", "--in-place"],
        &["restore", "--in-place"],
        &["restore", "a", "--undo", "b"],
        &["restore", "--discard", "b", "--cold"],
        &["restore", "a", "--as", "b", "--save-old"],
        &["restore", "a", "--in-place", "--connect"],
        &["restore", "a", "--as", "b", "--disks", "vda"],
        &["restore", "--undo", "b", "--definition"],
        &["job"],
        &["job", "settle", "a", "--how", "magic"],
        &["jobs", "--state", "asleep"],
        &["--nope"],
        &["diagram", "nothing-of-that-name"],
    ] {
        let output = run(args).await;
        assert_eq!(status(&output), codes::USAGE.0, "{args:?}: {}", err(&output));
        assert!(!err(&output).is_empty(), "{args:?}");
        assert!(out(&output).is_empty(), "{args:?}");
    }
    for args in [&["--help"][..], &["--version"], &["snapshot", "--help"], &["job", "watch", "--help"]] {
        let output = run(args).await;
        assert_eq!((status(&output), err(&output).as_str()), (0, ""), "{args:?}");
        assert!(!out(&output).is_empty());
    }
}

#[tokio::test]
async fn a_program_that_asks_for_json_gets_its_own_mistakes_as_json_too() {
    for args in
        [&["--json", "frobnicate"][..], &["snapshot", "--json"], &["jobs", "--json", "--within", "1x"]]
    {
        let output = run(args).await;
        let error: Value = serde_json::from_str(&err(&output)).unwrap_or_else(|e| panic!("{args:?}: {e}"));
        assert_eq!((status(&output), &error["name"]), (codes::USAGE.0, &Value::from("USAGE")), "{args:?}");
        assert!(!error["cause"].as_str().unwrap().contains("Usage:"), "{error}");
    }
    assert!(out(&run(&["--json", "--help"]).await).contains("Usage:"));
}

#[tokio::test]
async fn output_that_cannot_be_written_is_an_error_and_a_reader_that_went_away_is_none() {
    let into = async |to: Stdio| {
        let child = vmkeep().arg("diagram").stdout(to).stderr(Stdio::piped()).spawn().unwrap();
        child.wait_with_output().await.unwrap()
    };
    let full = into(std::fs::File::options().write(true).open("/dev/full").unwrap().into()).await;
    assert_eq!(status(&full), codes::NOT_ENOUGH_DISK_SPACE.0, "{}", err(&full));
    assert!(err(&full).contains("standard output"), "{}", err(&full));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let gone = into(writer.into()).await;
    assert_eq!((status(&gone), err(&gone).as_str()), (0, ""));
}

#[tokio::test]
async fn a_file_that_is_no_export_is_not_called_damaged() {
    let empty = tempfile::tempdir().unwrap();
    for path in ["/etc/passwd", empty.path().to_str().unwrap(), "/nonexistent/file"] {
        let output = run(&["replay", path]).await;
        assert_eq!(status(&output), codes::USAGE.0, "{path}: {}", err(&output));
    }
}

#[tokio::test]
async fn without_a_daemon_the_exit_status_and_the_message_say_so() {
    let output = run(&["--socket", "/nonexistent/s", "status"]).await;
    assert_eq!(status(&output), codes::DAEMON_UNREACHABLE.0);
    assert!(
        err(&output).contains("65 DAEMON_UNREACHABLE") && err(&output).contains("remedy"),
        "{}",
        err(&output)
    );
    let output = run(&["--socket", "/nonexistent/s", "--json", "status"]).await;
    let error: Value = serde_json::from_str(&err(&output)).unwrap();
    assert_eq!(error["name"], "DAEMON_UNREACHABLE");
}

#[tokio::test]
async fn what_needs_no_daemon_works_without() {
    let output = run(&["completions", "bash"]).await;
    assert!(out(&output).contains("complete") && out(&output).contains("vmkeep"));
    let output = run(&["diagram"]).await;
    assert!(out(&output).lines().any(|line| line == "snapshot"), "{}", out(&output));
    let output = run(&["diagram", "snapshot"]).await;
    assert!(out(&output).starts_with("digraph"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_without_a_backup_in_a_folder_is_not_said_to_have_none_at_all() {
    let daemon = Daemon::start().await;
    for args in [&["status"][..], &["domains"]] {
        let text = out(&at(&daemon, args).await);
        let told = text.to_lowercase().contains("in a folder") && text.contains("vmkeep vault list VAULT");
        assert!(told && text.contains("none"), "{args:?}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_backup_in_each_vault_is_told_by_status_domains_and_list() {
    let daemon = Daemon::start().await;
    let mut gone = support::vaulted("old");
    gone.configured = false;
    *daemon.site.1.lock().unwrap() = vec![support::vaulted("home"), gone.clone()];
    for args in [&["status"][..], &["domains"], &["list"]] {
        let text = out(&at(&daemon, args).await);
        let told =
            text.contains("2eafeac1") && text.contains("home") && text.contains("vmkeep vault list VAULT");
        assert!(told && text.contains(&format!("its id is {}", gone.vault_id)), "{args:?}: {text}");
    }
    let status: serde_json::Value =
        serde_json::from_str(&out(&at(&daemon, &["--json", "status"]).await)).unwrap();
    assert_eq!(status["domains"][0]["in_vaults"][0]["vault"], "home", "{status}");
    let list = async |domain| at(&daemon, &["--json", "list", domain]).await;
    let listed: serde_json::Value = serde_json::from_str(&out(&list(NASTY).await)).unwrap();
    assert_eq!(listed["in_vaults"].as_array().unwrap().len(), 2, "{listed}");
    let listed: serde_json::Value = serde_json::from_str(&out(&list("other").await)).unwrap();
    assert_eq!(listed["in_vaults"], serde_json::json!([]), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_shown_safely_and_json_carries_them_as_they_are() {
    let daemon = Daemon::start().await;
    daemon.gates.add_permits(2);
    let made = at(&daemon, &["snapshot", NASTY]).await;
    assert_eq!(status(&made), 0, "{}", err(&made));
    for args in [&["status"][..], &["domains"], &["jobs"], &["job", "show", "0"], &["job", "history", "0"]] {
        let output = at(&daemon, args).await;
        let text = out(&output);
        assert!(text.contains("we b'1\"$(id)\\n\\u{1b}[2Jü"), "{args:?}: {text}");
        assert!(!text.contains('\u{1b}'), "{args:?}");
    }
    assert!(!err(&made).contains('\u{1b}') && !out(&made).contains('\u{1b}'));
    let output = at(&daemon, &["domains", "--json"]).await;
    let domains: Value = serde_json::from_str(&out(&output)).unwrap();
    assert_eq!(domains[0]["name"], NASTY);
    let output = at(&daemon, &["snapshot", "a\u{1b}]0;owned\u{7}b"]).await;
    assert_eq!(status(&output), codes::CANNOT_FIND_MACHINE.0);
    assert!(!err(&output).contains('\u{1b}') && !err(&output).contains('\u{7}'), "{}", err(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_own_code_is_the_exit_status_of_whoever_waits_for_it() {
    let daemon = Daemon::start().await;
    daemon.gates.add_permits(1000);
    for code in [1, 5, 23, 47, 96, 119] {
        let output = at(&daemon, &["snapshot", NASTY, "--disks", &code.to_string()]).await;
        assert_eq!(status(&output), code, "{}", err(&output));
        assert!(out(&output).contains(codes::name(Code(code))), "{}", out(&output));
        assert!(out(&output).contains("undone"), "{}", out(&output));
    }
    let output = at(&daemon, &["snapshot", NASTY]).await;
    assert_eq!(status(&output), codes::SUCCESS_CODE.0);
    let output = at(&daemon, &["--json", "snapshot", NASTY]).await;
    let detail: Value = serde_json::from_str(&out(&output)).unwrap();
    assert_eq!(detail["job"]["status"], "succeeded");
    assert!(err(&output).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_is_shown_and_nothing_is_made() {
    let daemon = Daemon::start().await;
    let output = at(&daemon, &["snapshot", NASTY, "--dry-run"]).await;
    assert_eq!(status(&output), 0);
    assert!(out(&output).contains("pass the second gate") && out(&output).contains("Nothing was changed"));
    assert!(daemon.engine.jobs(&Default::default()).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interruption_ends_the_waiting_and_not_the_job() {
    let daemon = Daemon::start().await;
    let mut child = vmkeep()
        .arg("--socket")
        .arg(&daemon.socket)
        .args(["snapshot", NASTY])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // It waits once it has told that a step began.
    while !lines.next_line().await.unwrap().expect("it waits").contains("begins") {}
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut rest = String::new();
    while let Some(line) = lines.next_line().await.unwrap() {
        rest.push_str(&line);
    }
    assert_eq!(child.wait().await.unwrap().code(), Some(130));
    assert!(rest.contains("vmkeep job watch") && rest.contains("vmkeep job cancel"), "{rest}");

    let job = daemon.engine.jobs(&Default::default()).await.unwrap()[0].job;
    daemon.gates.add_permits(2);
    assert_eq!(daemon.engine.wait(job).await.unwrap().status, JobStatus::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_steers_a_job_and_the_journal_knows_who_and_why() {
    let daemon = Daemon::start().await;
    let output = at(&daemon, &["snapshot", NASTY, "--no-wait"]).await;
    assert_eq!(status(&output), 0);
    let job = daemon.engine.jobs(&Default::default()).await.unwrap()[0].job;
    let short = job.short();
    let output = at(&daemon, &["job", "cancel", &short, "--reason", "wrong day"]).await;
    assert_eq!(status(&output), 0, "{}", err(&output));
    let output = at(&daemon, &["job", "watch", &short]).await;
    assert_eq!(status(&output), codes::CANCELLED.0, "{}", out(&output));
    let output = at(&daemon, &["job", "explain", &short]).await;
    assert!(out(&output).contains("ada asked to cancel (wrong day)"), "{}", out(&output));
    let output = at(&daemon, &["job", "settle", &short]).await;
    assert_eq!(status(&output), codes::INVALID_STATE.0);
    let output = at(&daemon, &["job", "show", "ffffffffffff"]).await;
    assert_eq!(status(&output), codes::NO_SUCH_JOB.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_status_tells_a_divergence_from_damage_and_from_a_good_history() {
    let daemon = Daemon::start().await;
    daemon.gates.add_permits(2);
    at(&daemon, &["snapshot", NASTY]).await;
    let file = daemon.dir.path().join("export.jsonl");
    let path = file.to_str().unwrap();
    let output = at(&daemon, &["audit", "export", "-o", path]).await;
    assert_eq!(status(&output), 0, "{}", err(&output));
    assert_eq!(status(&run(&["replay", path]).await), 0);
    assert_eq!(status(&run(&["audit", "verify", path]).await), 0);
    let output = at(&daemon, &["audit", "export", "-o", path]).await;
    assert_eq!(status(&output), codes::CANNOT_CREATE_TARBALL.0, "evidence is never written over");
    assert!(err(&output).contains(path) && err(&output).contains("remedy"), "{}", err(&output));
    assert_eq!(status(&run(&["audit", "verify", path]).await), 0, "what is there is as it was");

    // A folder of them, to whatever depth: what a new release is asked before an upgrade.
    let folder = daemon.dir.path().join("histories");
    std::fs::create_dir_all(folder.join("snapshot@1")).unwrap();
    for name in ["a.jsonl", "snapshot@1/b.jsonl"] {
        std::fs::copy(&file, folder.join(name)).unwrap();
    }
    std::fs::write(folder.join("snapshot@1/notes.txt"), "no export").unwrap();
    let output = run(&["replay", folder.to_str().unwrap()]).await;
    assert_eq!((status(&output), out(&output).lines().count()), (0, 2), "{}", err(&output));

    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen("second gate", "seconD gate", 1)).unwrap();
    assert_eq!(status(&run(&["audit", "verify", path]).await), codes::STORE_DAMAGED.0);
    std::fs::copy(&file, folder.join("snapshot@1/b.jsonl")).unwrap();
    let output = run(&["replay", folder.to_str().unwrap()]).await;
    assert_eq!(status(&output), codes::STORE_DAMAGED.0);
    assert!(err(&output).contains("snapshot@1/b.jsonl"), "{}", err(&output));

    // A history that nobody tampered with, and that decides what these rules do not: made by a store of its own.
    let store = vmkeep_store::MemoryStore::new();
    diverging(&daemon, &store).await;
    let mut text = Vec::new();
    vmkeep_store::export::export(&store, vmkeep_store::export::Selection::Whole, &mut text).await.unwrap();
    std::fs::write(&file, text).unwrap();
    assert_eq!(status(&run(&["audit", "verify", path]).await), 0, "nobody tampered with it");
    let output = run(&["replay", path]).await;
    assert_eq!(status(&output), codes::REPLAY_DIVERGED.0, "{}", err(&output));
}

/// The toy's job again, but without its first step: its engine decided to begin with the second.
async fn diverging(daemon: &Daemon, store: &vmkeep_store::MemoryStore) {
    use vmkeep_workflow::journal::Append;
    use vmkeep_workflow::{Body, EventStore, JobSummary, Seq, StreamId};
    let job = daemon.engine.jobs(&Default::default()).await.unwrap()[0].job;
    let history = daemon.engine.history(job).await.unwrap();
    let mut summary: Option<JobSummary> = None;
    let mut records = Vec::new();
    for (_, event) in &history {
        let mut event = event.clone();
        if let Body::StepStarted { step, .. } = &mut event.body {
            *step = "two".into();
        }
        match &mut summary {
            None => summary = JobSummary::first(job, &event),
            Some(summary) => summary.apply(&event),
        }
        let last = matches!(event.body, Body::StepStarted { .. });
        records.push(serde_json::to_vec(&event).unwrap());
        if last {
            break;
        }
    }
    let append = Append { stream: StreamId::job(job), expected: Seq(0), records, summary, key: None };
    store.append(append).await.unwrap();
}
