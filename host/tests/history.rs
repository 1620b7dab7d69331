//! The journal as an administrator handles it: parts of it taken out, old histories let go, moved to another engine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::process::Output;

use support::{Daemon, NASTY, backup_of};
use vmkeep_host::api::types::{Accepted, Audited, HistoryPruneRequest, Pruned};
use vmkeep_host::codes;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{Code, Seq};

async fn run(args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_vmkeep"));
    command.args(args).env_clear().env("HOME", "/nowhere").env("TZ", "UTC").output().await.unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

async fn at(daemon: &Daemon, args: &[&str]) -> Output {
    let socket = daemon.socket.to_str().unwrap();
    run(&[&["--socket", socket], args].concat()).await
}

/// Has the toy make so many jobs, one after the other, and returns their ids, the oldest first.
async fn jobs(daemon: &Daemon, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for _ in 0..count {
        daemon.gates.add_permits(2);
        let accepted: Accepted = daemon.client.post("/v1/snapshot", &Daemon::request(), None).await.unwrap();
        let Accepted::Job(row) = accepted else { panic!("it only showed a plan") };
        daemon.engine.wait(row.id).await.unwrap();
        ids.push(row.id.to_string());
    }
    ids
}

async fn prune(daemon: &Daemon, request: &HistoryPruneRequest) -> Result<Pruned, vmkeep_workflow::Fault> {
    daemon.client.post("/v1/audit/prune", request, None).await
}

async fn left(daemon: &Daemon) -> Vec<String> {
    let mut jobs = daemon.engine.jobs(&JobFilter::default()).await.unwrap();
    jobs.reverse();
    jobs.iter().map(|job| job.job.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn old_histories_go_but_not_those_of_jobs_that_run_or_made_a_backup_that_exists() {
    let daemon = Daemon::start().await;
    let ended = jobs(&daemon, 5).await;
    let running: Accepted = daemon.client.post("/v1/snapshot", &Daemon::request(), None).await.unwrap();
    let Accepted::Job(running) = running else { panic!() };
    daemon.site.0.lock().unwrap().0 = vec![backup_of(&ended[1])];

    // Nothing says how much to keep, so nothing goes.
    let fault = prune(&daemon, &HistoryPruneRequest::default()).await.unwrap_err();
    assert_eq!(fault.code, codes::USAGE);
    let two = HistoryPruneRequest {
        keep_jobs: Some(2),
        reason: Some("room".into()),
        ..HistoryPruneRequest::default()
    };
    let rehearsed = prune(&daemon, &HistoryPruneRequest { dry_run: true, ..two.clone() }).await.unwrap();
    assert_eq!((rehearsed.jobs.len(), rehearsed.kept_for_backups, rehearsed.dry_run), (2, 1, true));
    assert_eq!(left(&daemon).await.len(), 6);

    let pruned = prune(&daemon, &two).await.unwrap();
    let gone: Vec<&str> = pruned.jobs.iter().map(|job| job.job.as_str()).collect();
    assert_eq!((gone, pruned.kept_for_backups), (vec![ended[0].as_str(), ended[2].as_str()], 1));
    assert_eq!(
        left(&daemon).await,
        [ended[1].clone(), ended[3].clone(), ended[4].clone(), running.id.to_string()]
    );
    let audited: Audited = daemon.client.get("/v1/audit/verify").await.unwrap();
    assert_eq!(audited.pruned.len(), 2);
    assert_eq!(audited.pruned[0].by.why.as_deref(), Some("room"));
    let fault = daemon.client.get::<serde_json::Value>(&format!("/v1/jobs/{}", ended[0])).await.unwrap_err();
    assert_eq!(fault.code, Code::NO_SUCH_JOB);

    // Again: there is nothing more to be done.
    assert_eq!(prune(&daemon, &two).await.unwrap().jobs.len(), 0);
    // A day has not passed.
    let days = HistoryPruneRequest { keep_days: Some(1), ..HistoryPruneRequest::default() };
    assert_eq!(prune(&daemon, &days).await.unwrap().jobs.len(), 0);
    daemon.gates.add_permits(2);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_goes_while_not_all_backups_can_be_seen() {
    let daemon = Daemon::start().await;
    jobs(&daemon, 3).await;
    daemon.site.0.lock().unwrap().1 = vec!["/mnt/nas: not mounted".to_owned()];
    let one = HistoryPruneRequest { keep_jobs: Some(1), ..HistoryPruneRequest::default() };
    for dry_run in [true, false] {
        let fault = prune(&daemon, &HistoryPruneRequest { dry_run, ..one.clone() }).await.unwrap_err();
        assert_eq!(fault.code, codes::BACKUP_ROOT_DIRECTORY_DOES_NOT_EXIST);
        assert!(fault.cause.contains("not mounted"), "{}", fault.cause);
    }
    assert_eq!(left(&daemon).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_a_pruned_job_is_not_free_again() {
    let daemon = Daemon::start().await;
    daemon.gates.add_permits(2);
    let request = Daemon::request();
    let first: Accepted = daemon.client.post("/v1/snapshot", &request, Some("monday")).await.unwrap();
    let Accepted::Job(row) = first else { panic!() };
    daemon.engine.wait(row.id).await.unwrap();
    jobs(&daemon, 1).await;
    let one = HistoryPruneRequest { keep_jobs: Some(1), ..HistoryPruneRequest::default() };
    assert_eq!(prune(&daemon, &one).await.unwrap().jobs.len(), 1);
    let again = daemon.client.post::<_, Accepted>("/v1/snapshot", &request, Some("monday")).await;
    let fault = again.unwrap_err();
    assert_eq!(fault.code, Code::DUPLICATE_KEY);
    assert!(fault.cause.contains("pruned"), "{}", fault.cause);
    assert_eq!(left(&daemon).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_prunes_and_verifies_and_says_so() {
    let daemon = Daemon::start().await;
    let ended = jobs(&daemon, 3).await;
    let output = at(&daemon, &["audit", "prune"]).await;
    assert_eq!(output.status.code(), Some(64), "{}", said(&output));
    let output = at(&daemon, &["audit", "prune", "--keep-jobs", "1", "--dry-run"]).await;
    assert!(said(&output).contains("of 2 jobs would be pruned"), "{}", said(&output));
    let output = at(&daemon, &["audit", "prune", "--keep-jobs", "1"]).await;
    assert!(said(&output).contains("of 2 jobs were pruned"), "{}", said(&output));
    let output = at(&daemon, &["audit", "verify"]).await;
    let text = said(&output);
    assert!(text.contains(&format!("job/{} pruned ", ended[0])) && text.contains("final hash "), "{text}");
    let file = daemon.dir.path().join("whole.jsonl");
    let path = file.to_str().unwrap();
    assert!(at(&daemon, &["audit", "export", "-o", path]).await.status.success());
    let output = run(&["audit", "verify", path]).await;
    assert!(output.status.success() && said(&output).contains("final hash "), "{}", said(&output));
    let output = run(&["replay", path]).await;
    assert!(output.status.success() && said(&output).contains(&ended[2]), "{}", said(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_the_journal_is_exported_by_domain_state_and_time() {
    let daemon = Daemon::start().await;
    let ended = jobs(&daemon, 2).await;
    let one = HistoryPruneRequest { keep_jobs: Some(1), ..HistoryPruneRequest::default() };
    prune(&daemon, &one).await.unwrap();
    let mut n = 0;
    let mut export = async |args: &[&str]| {
        n += 1;
        let file = daemon.dir.path().join(format!("{n}.jsonl"));
        let path = file.to_str().unwrap();
        let output = at(&daemon, &[&["audit", "export", "-o", path], args].concat()).await;
        assert!(output.status.success(), "{args:?}: {}", said(&output));
        let output = run(&["audit", "verify", path]).await;
        assert!(output.status.success(), "{args:?}: {}", said(&output));
        (std::fs::read_to_string(&file).unwrap(), said(&output))
    };
    for (args, wanted) in [
        (&["--domain", NASTY][..], true),
        (&["--domain", "another"], false),
        (&["--state", "succeeded,refused"], true),
        (&["--state", "rolled-back"], false),
        (&["--job", &ended[1][..]], true),
        (&["--since", "1h", "--domain", NASTY], true),
        (&["--until", "2000-01-01", "--domain", NASTY], false),
        (&["--since", "2100-01-01T00:00:00Z", "--domain", NASTY], false),
    ] {
        let (text, _) = export(args).await;
        assert_eq!(text.contains(&format!("job/{}", ended[1])), wanted, "{args:?}");
        assert!(!text.contains("\"stream\":\"history\""), "{args:?}");
    }
    // By time alone, what is not a job's comes along.
    let (text, _) = export(&["--since", "1h"]).await;
    assert!(text.contains("\"stream\":\"history\""));
    let output = at(&daemon, &["audit", "export", "--since", "someday"]).await;
    assert_eq!(output.status.code(), Some(64));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_looked_at_and_moved_while_no_daemon_runs() {
    use vmkeep_store::{EngineName, StoreConfig, open};
    use vmkeep_workflow::journal::Append;
    let place = tempfile::tempdir().unwrap();
    let state = place.path().join("state");
    let file = place.path().join("vmkeep.toml");
    let config = file.to_str().unwrap();
    std::fs::write(&file, format!("state_dir = {:?}\n", state)).unwrap();
    let output = run(&["--config", config, "store", "info"]).await;
    assert_eq!(output.status.code(), Some(i32::from(codes::STORE_UNAVAILABLE.0)), "{}", said(&output));
    let store = open(&StoreConfig::new(state.join("store"))).unwrap();
    let records = vec![b"{}".to_vec(); 3];
    let append = Append { stream: "a".into(), expected: Seq(0), records, summary: None, key: None };
    store.append(append).await.unwrap();
    let output = run(&["--config", config, "store", "info"]).await;
    assert!(output.status.success() && said(&output).contains("engine   sqlite"), "{}", said(&output));

    let migrate = ["--config", config, "store", "migrate", "--to", "sled"];
    let output = run(&migrate).await;
    assert_eq!(output.status.code(), Some(i32::from(codes::STORE_IN_USE.0)), "{}", said(&output));
    drop(store);
    let output = run(&[&migrate[..], &["--dry-run"]].concat()).await;
    assert!(output.status.success() && said(&output).contains("can be moved"), "{}", said(&output));
    let output = run(&migrate).await;
    let text = said(&output);
    assert!(output.status.success() && text.contains("store.engine = \"sled\""), "{text}");
    let output = run(&migrate).await;
    assert_eq!(output.status.code(), Some(64), "{}", said(&output));

    // What keeps a daemon from starting can be named without one.
    let socket = place.path().join("s");
    let verify = ["--config", config, "--socket", socket.to_str().unwrap(), "audit", "verify"];
    let output = run(&verify).await;
    assert!(output.status.success() && said(&output).contains("3 records in 1 streams"), "{}", said(&output));
    let head = state.join("store/journal.sled/head");
    let kept = std::fs::read(&head).unwrap();
    std::fs::write(&head, "").unwrap();
    assert_eq!(run(&verify).await.status.code(), Some(i32::from(codes::STORE_DAMAGED.0)));
    std::fs::write(&head, kept).unwrap();

    // Whatever is configured, it tells what there is; a daemon is told what to do.
    let output = run(&["--config", config, "store", "info", "--json"]).await;
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((info["engine"].as_str(), info["records"].as_u64()), (Some("sled"), Some(3)));
    let error = open(&StoreConfig::new(state.join("store"))).err().unwrap();
    let fault = vmkeep_host::store::fault("open the store", &state, &error);
    assert_eq!(fault.code, codes::UNSUPPORTED_CONFIGURATION_PARAMETER);
    assert!(fault.remedy.contains("vmkeep store migrate --to sqlite"), "{}", fault.remedy);
    let store = open(&StoreConfig { engine: EngineName::Sled, ..StoreConfig::new(state.join("store")) });
    drop(store.unwrap());
}
