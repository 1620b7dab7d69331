use std::collections::BTreeMap;

use async_trait::async_trait;
use serde_json::json;
use vmkeep_vault::backend::memory::Memory;
use vmkeep_vault::lease::{Holder, Standing};
use vmkeep_vault::vault::{Confirmed, Vault};
use vmkeep_workflow::{Actor, Phase, Plan, Seq, StepSpec, Subject};

use super::*;

const DOMAIN: &str = "00000000-0000-0000-0000-000000000007";

/// Journals that a test has written.
#[derive(Default)]
struct Told(Mutex<Vec<(JobSummary, Vec<Event>)>>);

#[async_trait]
impl Jobs for Told {
    async fn all(&self) -> Result<Vec<JobSummary>, Fault> {
        Ok(self.0.lock().unwrap().iter().map(|(job, _)| job.clone()).collect())
    }

    async fn history(&self, job: JobId) -> Result<Vec<Event>, Fault> {
        let told = self.0.lock().unwrap();
        Ok(told.iter().find(|(one, _)| one.job == job).map(|(_, events)| events.clone()).unwrap_or_default())
    }
}

fn summary(workflow: &'static str, status: JobStatus) -> JobSummary {
    let now = jiff::Timestamp::UNIX_EPOCH;
    JobSummary {
        job: JobId::new(),
        workflow: workflow.into(),
        subject: Subject { id: DOMAIN.into(), label: "web".into() },
        title: String::new(),
        status,
        by: Actor::default(),
        requested: now,
        updated: now,
        ended: status.ended().then_some(now),
        seq: Seq(9),
        steps: 2,
        steps_done: 2,
        fault: None,
        items: Vec::new(),
    }
}

impl Told {
    fn job(
        &self,
        status: JobStatus,
        workflow: &'static str,
        steps: Vec<StepSpec>,
        outputs: [Value; 2],
    ) -> JobId {
        let summary = summary(workflow, status);
        let job = summary.job;
        let names: Vec<StepName> = steps.iter().map(|step| step.name.clone()).collect();
        let plan = Plan::new(workflow, 1, "a job", steps, None, Value::Null).unwrap();
        let mut bodies = vec![Body::JobPlanned(Box::new(plan))];
        for (step, output) in names.into_iter().zip(outputs) {
            bodies.push(Body::StepSucceeded { step, phase: Phase::Forward, attempt: 1, output });
        }
        let event = |body| Event::new(jiff::Timestamp::UNIX_EPOCH, Default::default(), body);
        self.0.lock().unwrap().push((summary, bodies.into_iter().map(event).collect()));
        job
    }

    /// A backup that has taken this lease, and has left it for that reason.
    fn backup(&self, status: JobStatus, vault: VaultId, lease: LeaseId, left: Option<&str>) -> JobId {
        let domain = json!({ "id": DOMAIN, "name": "web" });
        let take = json!({
            "vault": "main", "domain": domain, "kind": "auto", "disks": [], "full_every_days": 35,
        });
        let steps = vec![
            StepSpec::new("lease", TakeLease::KIND, "take", take),
            StepSpec::new("release", ReleaseLease::KIND, "release", Value::Null).after("lease"),
        ];
        let taken = json!({ "lease": lease, "vault": vault, "disks": [] });
        self.job(status, NAME, steps, [taken, json!({ "left": left })])
    }
}

/// A vault with a lease whose holder is gone for each of these.
async fn vault(leases: usize) -> (Opened, Vec<LeaseId>) {
    let vault = Confirmed::plain(false).unwrap().put(Arc::new(Memory::default()), None).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..leases {
        ids.push(Lease::begin(&vault, &Holder::default()).await.unwrap().id());
    }
    (Opened { vault, cache: None, host: "h".into() }, ids)
}

async fn standing(vault: &Vault) -> BTreeMap<LeaseId, Standing> {
    lease::all(vault).await.unwrap()
}

#[tokio::test]
async fn what_jobs_that_are_over_have_left_is_ended_or_revoked_and_nothing_else_is_touched() {
    let (opened, leases) = vault(6).await;
    let (other, _) = vault(0).await;
    let told = Arc::new(Told::default());
    let id = opened.vault.id();
    let gone = Some("the vault was gone");
    let succeeded = told.backup(JobStatus::Succeeded, id, leases[0], gone);
    let cancelled = told.backup(JobStatus::Cancelled, id, leases[1], gone);
    let abandoned = told.backup(JobStatus::Abandoned, id, leases[2], None);
    for status in [JobStatus::Running, JobStatus::NeedsAttention, JobStatus::Paused] {
        told.backup(status, id, leases[3], gone);
    }
    told.backup(JobStatus::Succeeded, other.vault.id(), leases[4], gone);
    let left = LeftLeases::new(told);
    let mut ended = left.end("main", &opened).await.unwrap();
    ended.sort_unstable();
    let mut expected = [succeeded, cancelled, abandoned];
    expected.sort_unstable();
    assert_eq!(ended, expected);
    let found = standing(&opened.vault).await;
    let over: Vec<(bool, bool)> =
        leases.iter().map(|lease| (found[lease].ended, found[lease].revoked)).collect();
    let stands = (false, false);
    // Of a job that has not succeeded something may still arrive.
    assert_eq!(over, [(true, false), (false, true), (false, true), stands, stands, stands]);
    assert_eq!(left.end("main", &opened).await.unwrap(), [], "what is over is over");
}

#[tokio::test]
async fn a_restore_that_is_over_leaves_no_lease_either() {
    let (opened, leases) = vault(1).await;
    let told = Arc::new(Told::default());
    let take = json!({ "vault": "main", "id": opened.vault.id() });
    let steps = vec![
        StepSpec::new("lease", TakeReading::KIND, "take", take),
        StepSpec::new("release", EndReading::KIND, "release", Value::Null).after("lease"),
    ];
    let outputs = [json!({ "lease": leases[0] }), json!({ "left": "the vault was gone" })];
    let job = told.job(JobStatus::Succeeded, RESTORE, steps, outputs);
    let left = LeftLeases::new(told);
    assert_eq!(left.names().await.unwrap(), BTreeSet::from(["main".to_owned()]));
    assert_eq!(left.end("main", &opened).await.unwrap(), [job]);
    assert!(standing(&opened.vault).await[&leases[0]].ended);
}

#[tokio::test]
async fn a_job_that_was_open_at_the_last_look_is_looked_at_again_when_it_is_over() {
    let (opened, leases) = vault(1).await;
    let told = Arc::new(Told::default());
    let job = told.backup(JobStatus::Running, opened.vault.id(), leases[0], Some("gone"));
    let left = LeftLeases::new(told.clone());
    assert_eq!(left.end("main", &opened).await.unwrap(), []);
    told.0.lock().unwrap()[0].0.status = JobStatus::Succeeded;
    assert_eq!(left.end("main", &opened).await.unwrap(), [job]);
}

#[tokio::test]
async fn a_start_opens_only_vaults_in_which_something_was_left_and_outlives_one_that_is_gone() {
    struct Place(Mutex<Vec<String>>, Option<Opened>);

    #[async_trait]
    impl Vaults for Place {
        async fn open(&self, name: &str) -> Result<Opened, Fault> {
            self.0.lock().unwrap().push(name.to_owned());
            let gone = || Fault::permanent(codes::NO_VAULT, "open the vault", name, "it is gone");
            self.1.clone().ok_or_else(gone)
        }
    }

    let (opened, leases) = vault(1).await;
    let told = Arc::new(Told::default());
    let place = |opened| Place(Mutex::default(), opened);
    told.backup(JobStatus::Succeeded, opened.vault.id(), LeaseId::random().unwrap(), None);
    told.backup(JobStatus::Running, opened.vault.id(), LeaseId::random().unwrap(), Some("gone"));
    let (idle, gone, back) = (place(None), place(None), place(Some(opened.clone())));
    LeftLeases::new(told.clone()).end_everywhere(&idle).await;
    assert!(idle.0.lock().unwrap().is_empty(), "nothing was left anywhere");
    told.backup(JobStatus::RolledBack, opened.vault.id(), leases[0], Some("gone"));
    let left = LeftLeases::new(told);
    left.end_everywhere(&gone).await;
    assert_eq!(*gone.0.lock().unwrap(), ["main"]);
    assert!(!standing(&opened.vault).await[&leases[0]].is_over());
    left.end_everywhere(&back).await;
    assert!(standing(&opened.vault).await[&leases[0]].revoked);
}
