//! The API over a real Unix socket.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use serde_json::{Value, json};
use support::{Daemon, NASTY};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use vmkeep_host::api::listener::Socket;
use vmkeep_host::api::types::{
    Accepted, Acted, Audited, DaemonPhase, Explanation, HistoryRow, JobDetail, JobRow, Live, Replayed,
    SnapshotRequest, Status, VerifiedRow,
};
use vmkeep_host::codes;
use vmkeep_workflow::{Fault, JobStatus};

async fn make(daemon: &Daemon, request: &SnapshotRequest, key: Option<&str>) -> Result<JobRow, Fault> {
    match daemon.client.post("/v1/snapshot", request, key).await? {
        Accepted::Job(job) => Ok(*job),
        Accepted::Plan(plan) => panic!("a plan: {plan:?}"),
    }
}

/// A raw request, with the status line and the body of the answer.
async fn raw(daemon: &Daemon, request: &str) -> (String, Value) {
    let mut stream = UnixStream::connect(&daemon.socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), serde_json::from_str(body).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_made_watched_told_and_replayed() {
    let daemon = Daemon::start().await;
    let mut request = Daemon::request();
    request.reason = Some("because".into());
    let job = make(&daemon, &request, None).await.unwrap();
    assert_eq!((job.by.as_str(), job.reason.as_deref()), ("ada", Some("because")));
    assert_eq!(job.domain, NASTY);

    let mut pieces = daemon.client.stream(&format!("/v1/jobs/{}/watch", job.short)).await.unwrap();
    daemon.gates.add_permits(2);
    let end: JobDetail = loop {
        match pieces.event::<Live>().await.unwrap().expect("the stream ends with the job") {
            Live::Job(_) => {}
            Live::End(detail) => break *detail,
        }
    };
    assert_eq!(end.job.status, JobStatus::Succeeded);
    assert_eq!(pieces.event::<Live>().await.unwrap().map(|_| ()), None);

    let history: Vec<HistoryRow> = daemon.client.get(&format!("/v1/jobs/{}/history", job.id)).await.unwrap();
    assert_eq!(history[0].event["body"]["type"], "job_requested");
    assert_eq!(history.last().unwrap().event["body"]["type"], "job_succeeded");
    let story: Explanation = daemon.client.get(&format!("/v1/jobs/{}/explain", job.short)).await.unwrap();
    assert!(story.lines[0].text.contains("ada") && story.lines[0].text.contains("because"));
    let replayed: Replayed = daemon.client.get(&format!("/v1/jobs/{}/replay", job.short)).await.unwrap();
    assert_eq!(replayed.events, history.len() as u64);
    let audited: Audited = daemon.client.get("/v1/audit/verify").await.unwrap();
    assert_eq!(audited.records, history.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_is_seen_while_a_step_goes_on() {
    let daemon = Daemon::start().await;
    let job = make(&daemon, &Daemon::request(), None).await.unwrap();
    let mut pieces = daemon.client.stream(&format!("/v1/jobs/{}/watch", job.id)).await.unwrap();
    loop {
        let Some(Live::Job(detail)) = pieces.event::<Live>().await.unwrap() else { panic!("it ended") };
        let Some(step) = detail.steps.first() else { continue };
        if let Some(progress) = &step.progress {
            assert_eq!((progress.done, progress.total, progress.unit.as_str()), (1, 4, "bytes"));
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_has_the_same_shape_and_says_what_helps() {
    let daemon = Daemon::start().await;
    for (request, status, code) in [
        ("GET /v1/nothing HTTP/1.0\r\n\r\n", "404", 64),
        ("PUT /v1/status HTTP/1.0\r\n\r\n", "404", 64),
        ("GET /v1/jobs/abcd HTTP/1.0\r\n\r\n", "404", 66),
        ("GET /v1/jobs?status=asleep HTTP/1.0\r\n\r\n", "400", 64),
        ("GET /v1/jobs?colour=red HTTP/1.0\r\n\r\n", "400", 64),
        ("GET /v1/backups/show HTTP/1.0\r\n\r\n", "400", 64),
        ("GET /v1/backups/show?backup=abcd HTTP/1.0\r\n\r\n", "404", 109),
        ("POST /v1/snapshot HTTP/1.0\r\ncontent-length: 9\r\n\r\nnot JSON!", "400", 64),
        ("POST /v1/snapshot HTTP/1.0\r\ncontent-length: 24\r\n\r\n{\"domain\":\"x\",\"nope\": 1}", "400", 64),
        ("POST /v1/snapshot HTTP/1.0\r\ncontent-length: 14\r\n\r\n{\"domain\":\"x\"}", "404", 23),
    ] {
        let (line, body) = raw(&daemon, request).await;
        assert!(line.contains(status), "{request}: {line}");
        let keys: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["cause", "code", "doing", "name", "object", "remedy"], "{request}");
        assert_eq!(body["code"], code, "{request}: {body}");
        assert_eq!(body["name"], codes::name(vmkeep_workflow::Code(code)), "{request}");
        for field in ["doing", "cause"] {
            assert!(!body[field].as_str().unwrap().is_empty(), "{request}: {body}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_its_owners_alone_and_gone_when_the_daemon_is() {
    let daemon = Daemon::start().await;
    assert_eq!(std::fs::metadata(&daemon.socket).unwrap().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(daemon.socket.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
    let dir = tempfile::Builder::new().prefix("vk").tempdir().unwrap();
    let path = dir.path().join("wide/open.sock");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    std::fs::set_permissions(path.parent().unwrap(), PermissionsExt::from_mode(0o777)).unwrap();
    let socket = Socket::bind(&path).await.unwrap();
    assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);
    drop(socket);
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_is_refused_by_the_kernels_word_also_when_the_socket_is_open_to_all() {
    // The daemon belongs to a user that this process is not, so this process is the stranger.
    let daemon = Daemon::owned_by(rustix::process::geteuid().as_raw() + 1).await;
    for (method, path) in [("GET", "/v1/status"), ("POST", "/v1/snapshot"), ("GET", "/v1/nothing")] {
        let (line, body) = raw(&daemon, &format!("{method} {path} HTTP/1.0\r\n\r\n")).await;
        assert!(line.contains("403"), "{line}");
        assert_eq!(body["code"], codes::NOT_PERMITTED.0);
    }
    assert!(daemon.engine.jobs(&Default::default()).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_with_a_living_daemon_is_not_taken_and_a_dead_ones_is() {
    let daemon = Daemon::start().await;
    let error = Socket::bind(&daemon.socket).await.unwrap_err();
    assert_eq!(error.code, codes::DAEMON_UNREACHABLE);
    assert!(error.cause.contains("another daemon"), "{error}");
    let _: Status = daemon.client.get("/v1/status").await.unwrap();

    let dir = tempfile::Builder::new().prefix("vk").tempdir().unwrap();
    let path = dir.path().join("run/left.sock");
    std::fs::create_dir(path.parent().unwrap()).unwrap();
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a killed daemon leaves its socket");
    Socket::bind(&path).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_with_its_key_is_the_same_job_and_another_with_it_is_refused() {
    let daemon = Daemon::start().await;
    let first = make(&daemon, &Daemon::request(), Some("k1")).await.unwrap();
    let again = make(&daemon, &Daemon::request(), Some("k1")).await.unwrap();
    assert_eq!(first.id, again.id);
    let mut other = Daemon::request();
    other.disks = vec!["47".into()];
    let error = make(&daemon, &other, Some("k1")).await.unwrap_err();
    assert_eq!(error.code, codes::DUPLICATE_KEY);
    let error = make(&daemon, &Daemon::request(), None).await.unwrap_err();
    assert_eq!(error.code, codes::SUBJECT_BUSY);
    assert!(!error.remedy.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_no_plan_yet_is_called_by_what_was_asked_for() {
    let daemon = Daemon::start().await;
    let first = make(&daemon, &Daemon::request(), None).await.unwrap();
    let waiting = SnapshotRequest { queue: true, ..Daemon::request() };
    let second = make(&daemon, &waiting, None).await.unwrap();
    assert_eq!((second.status, second.steps), (JobStatus::Queued, 0));
    assert_eq!(second.title, format!("snapshot of {NASTY}"));
    let listed: Vec<JobRow> = daemon.client.get("/v1/jobs").await.unwrap();
    assert!(listed.iter().all(|job| !job.title.is_empty()), "{listed:?}");
    daemon.gates.add_permits(4);
    wait_for(&daemon, &second, |job| job.job.ended.is_some()).await;
    let planned: JobDetail = daemon.client.get(&format!("/v1/jobs/{}", second.id)).await.unwrap();
    assert_eq!(planned.job.title, format!("a toy of {NASTY}"));
    wait_for(&daemon, &first, |job| job.job.ended.is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_verification_failed_is_not_the_last_good_one_and_status_says_why() {
    let daemon = Daemon::start().await;
    let (good, mut bad) = (support::backup_of("good"), support::backup_of("bad"));
    bad.at = good.at + jiff::SignedDuration::from_secs(1);
    let problem = Some("vda.qcow2 has another hash".to_owned());
    bad.verified = Some(VerifiedRow { at: bad.at, job: "j".into(), problem });
    daemon.site.0.lock().unwrap().0 = vec![bad, good];
    let status: Status = daemon.client.get("/v1/status").await.unwrap();
    assert_eq!(status.domains[0].last_backup.as_ref().map(|last| last.id.as_str()), Some("good"));
    let told =
        status.warnings.iter().any(|w| w.contains("verification failed at") && w.contains("another hash"));
    assert!(told, "{:?}", status.warnings);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_shows_the_plan_and_makes_no_job() {
    let daemon = Daemon::start().await;
    let request = SnapshotRequest { dry_run: true, ..Daemon::request() };
    let Accepted::Plan(plan) = daemon.client.post("/v1/snapshot", &request, None).await.unwrap() else {
        panic!("a job")
    };
    assert_eq!(plan.steps.len(), 2);
    assert!(daemon.engine.jobs(&Default::default()).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_not_ready_answers_looks_and_refuses_changes_with_the_reason() {
    let daemon = Daemon::start().await;
    for (phase, code) in [
        (DaemonPhase::WaitingForLibvirt, codes::HYPERVISOR_UNREACHABLE),
        (DaemonPhase::Recovering, codes::INVALID_STATE),
        (DaemonPhase::Stopping, codes::INVALID_STATE),
    ] {
        daemon.phase.send_replace(phase);
        let status: Status = daemon.client.get("/v1/status").await.unwrap();
        assert_eq!(status.daemon.phase, phase);
        let error = make(&daemon, &Daemon::request(), None).await.unwrap_err();
        assert_eq!(error.code, code);
        assert!(!error.remedy.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_takes_back_and_says_who_and_why() {
    let daemon = Daemon::start().await;
    let job = make(&daemon, &Daemon::request(), None).await.unwrap();
    daemon.gates.add_permits(1);
    wait_for(&daemon, &job, |detail| detail.job.steps_done == 1).await;
    let path = format!("/v1/jobs/{}/cancel", job.short);
    let dry: Acted = daemon.client.post(&path, &json!({ "dry_run": true }), None).await.unwrap();
    assert!(dry.message.contains("not touched"), "{}", dry.message);
    let _: Acted = daemon.client.post(&path, &json!({ "reason": "too slow" }), None).await.unwrap();
    let summary = daemon.engine.wait(job.id).await.unwrap();
    assert_eq!(summary.status, JobStatus::Cancelled);
    let story: Explanation = daemon.client.get(&format!("/v1/jobs/{}/explain", job.id)).await.unwrap();
    assert!(story.lines.iter().any(|line| line.text.contains("ada asked to cancel (too slow)")), "{story:?}");
    assert!(story.summary.iter().any(|line| line.contains("undone") && line.contains("first gate")));
    let error = daemon.client.post::<_, Acted>(&path, &json!({}), None).await.unwrap_err();
    assert_eq!(error.code, codes::INVALID_STATE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_shows_its_code_its_step_and_what_was_undone() {
    let daemon = Daemon::start().await;
    let mut request = Daemon::request();
    request.disks = vec!["47".into()];
    let job = make(&daemon, &request, None).await.unwrap();
    daemon.gates.add_permits(2);
    daemon.engine.wait(job.id).await.unwrap();
    let detail: JobDetail = daemon.client.get(&format!("/v1/jobs/{}", job.id)).await.unwrap();
    assert_eq!(detail.job.status, JobStatus::RolledBack);
    let fault = detail.job.fault.unwrap();
    assert_eq!((fault.code, fault.name.as_str()), (47, "NOT_ENOUGH_DISK_SPACE"));
    assert_eq!(fault.object, NASTY, "JSON carries names as they are");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_whole_and_can_be_checked_elsewhere() {
    let daemon = Daemon::start().await;
    daemon.gates.add_permits(2);
    let job = make(&daemon, &Daemon::request(), None).await.unwrap();
    daemon.engine.wait(job.id).await.unwrap();
    for (path, streams) in
        [("/v1/audit/export".to_owned(), 1), (format!("/v1/audit/export?job={}", job.short), 1)]
    {
        let mut pieces = daemon.client.stream(&path).await.unwrap();
        let file = daemon.dir.path().join("export.jsonl");
        let mut text = Vec::new();
        while let Some(piece) = pieces.next().await.unwrap() {
            text.extend_from_slice(&piece);
        }
        std::fs::write(&file, &text).unwrap();
        assert_eq!(vmkeep_host::audit::verify_file(&file, None).unwrap().streams, streams);
        assert_eq!(vmkeep_host::audit::replay_file(&file).unwrap().len(), 1);
        // One changed letter is found, and has the code of damage.
        let changed =
            String::from_utf8(text).unwrap().replacen("pass the second gate", "pass the seconD gate", 1);
        std::fs::write(&file, changed).unwrap();
        assert_eq!(vmkeep_host::audit::verify_file(&file, None).unwrap_err().code, codes::STORE_DAMAGED);
    }
    let error = daemon.client.stream("/v1/audit/export?job=ffff").await.unwrap_err();
    assert_eq!(error.code, codes::NO_SUCH_JOB);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_found_by_any_unique_beginning_and_an_ambiguous_one_is_refused() {
    let daemon = Daemon::start().await;
    daemon.gates.add_permits(64);
    let mut jobs = Vec::new();
    for _ in 0..20 {
        let job = make(&daemon, &Daemon::request(), None).await.unwrap();
        daemon.engine.wait(job.id).await.unwrap();
        jobs.push(job);
    }
    let list: Vec<JobRow> = daemon.client.get("/v1/jobs").await.unwrap();
    for row in &list {
        let found: JobDetail = daemon.client.get(&format!("/v1/jobs/{}", row.short)).await.unwrap();
        assert_eq!(found.job.id, row.id);
    }
    // All ids of one minute begin with the same time.
    let error = daemon.client.get::<JobDetail>("/v1/jobs/0").await.unwrap_err();
    assert_eq!(error.code, codes::AMBIGUOUS_NAME);
    let limited: Vec<JobRow> = daemon.client.get("/v1/jobs?limit=3&status=succeeded").await.unwrap();
    assert_eq!(limited.len(), 3);
    assert_eq!(limited[0].id, list[0].id, "newest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_when_the_daemon_does() {
    let daemon = Daemon::start().await;
    let job = make(&daemon, &Daemon::request(), None).await.unwrap();
    let mut pieces = daemon.client.stream(&format!("/v1/jobs/{}/watch", job.id)).await.unwrap();
    assert!(pieces.event::<Live>().await.unwrap().is_some());
    daemon.phase.send_replace(DaemonPhase::Stopping);
    while pieces.event::<Live>().await.unwrap().is_some() {}
}

async fn wait_for(daemon: &Daemon, job: &JobRow, seen: impl Fn(&JobDetail) -> bool) {
    let mut pieces = daemon.client.stream(&format!("/v1/jobs/{}/watch", job.id)).await.unwrap();
    loop {
        match pieces.event::<Live>().await.unwrap().expect("it goes on") {
            Live::Job(detail) | Live::End(detail) if seen(&detail) => return,
            _ => {}
        }
    }
}
