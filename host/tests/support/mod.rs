//! A daemon's API over a real Unix socket, with a store in memory, a workflow that is a toy, and a host of its own
//! making.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, watch};
use vmkeep_host::api::listener::Socket;
use vmkeep_host::api::serve::{Manners, serve};
use vmkeep_host::api::types::{
    BackupDetail, BackupRequest, BackupRow, Backups, DaemonPhase, DeleteRequest, DiscardRequest, DomainRow,
    Finding, ForgetRequest, InPlaceRequest, KeptRow, LibvirtStatus, ProtectRequest, PruneRequest,
    RebuildRequest, Rebuilt, RestoreRequest, SnapshotRequest, UndoRequest, VaultedRow,
};
use vmkeep_host::api::{App, router};
use vmkeep_host::client::Client;
use vmkeep_host::codes;
use vmkeep_host::config::{Config, Limits, Log, SnapshotDefaults};
use vmkeep_host::site::{Order, Site};
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{self, NoEnvironment, SystemClock};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::journal::Record;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{
    Actor, Engine, EventStore, Fault, Plan, PlanContext, Registry, Step, StepContext, StepSpec, Subject,
    Verdict, Workflow, WorkflowName,
};

/// The name of the domain that the toy knows: as nasty as libvirt allows.
pub(crate) const NASTY: &str = "we b'1\"$(id)\n\u{1b}[2Jü";
const UUID: &str = "11111111-1111-4111-8111-111111111111";

/// A step that waits until the test lets it, and can be told to fail.
struct Gate(Arc<Semaphore>);

#[async_trait]
impl Step for Gate {
    const KIND: StepKind = StepKind::new("gate", 1);
    type Input = Value;
    type Output = Value;

    async fn run(&self, cx: &StepContext, input: Value) -> Result<Value, Fault> {
        cx.progress.report(1, 4, "bytes");
        tokio::select! {
            permit = self.0.acquire() => permit.unwrap().forget(),
            () = cx.stop.cancelled() => return Err(Fault::stopped("wait", "the gate")),
        }
        match input["fail"].as_u64() {
            None => Ok(json!({ "passed": true })),
            Some(code) => {
                let code = vmkeep_workflow::Code(u16::try_from(code).unwrap());
                Err(Fault::permanent(code, "pass the gate", NASTY, "it was told to fail")
                    .remedy("Tell it not to"))
            }
        }
    }

    async fn probe(&self, _: &StepContext, _: Value) -> Verdict<Value> {
        Verdict::NotDone
    }
}

struct Toy;

#[async_trait]
impl Workflow for Toy {
    fn name(&self) -> WorkflowName {
        "snapshot".into()
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let steps = vec![
            StepSpec::new("one", Gate::KIND, "pass the first gate", json!({})).undoable(),
            StepSpec::new("two", Gate::KIND, "pass the second gate", cx.request.options.clone())
                .after("one")
                .retry(Retry::NEVER),
        ];
        Ok(Plan::new(
            "snapshot",
            1,
            format!("a toy of {}", cx.request.subject.label),
            steps,
            None,
            Value::Null,
        )
        .unwrap())
    }
}

/// A host with one domain, and the backups that a test says.
#[derive(Clone, Default)]
pub(crate) struct ToySite(
    pub(crate) Arc<std::sync::Mutex<(Vec<BackupRow>, Vec<String>)>>,
    pub(crate) Arc<std::sync::Mutex<Vec<VaultedRow>>>,
);

/// A backup that a job made.
pub(crate) fn backup_of(job: &str) -> BackupRow {
    BackupRow {
        id: job.into(),
        short: job.into(),
        domain: NASTY.into(),
        domain_uuid: UUID.into(),
        at: Timestamp::now(),
        memory: false,
        disks: vec![],
        size: 0,
        folder: "/b".into(),
        job: Some(job.into()),
        protection: None,
        verified: None,
        copies: vec![],
    }
}

/// What this host has put into the vault of that name.
pub(crate) fn vaulted(vault: &str) -> VaultedRow {
    VaultedRow {
        domain: NASTY.into(),
        domain_uuid: UUID.into(),
        vault: vault.into(),
        vault_id: "4d".repeat(16),
        configured: true,
        id: "01a2038447737033bbe9e4962eafeac1".into(),
        at: Timestamp::now(),
        kind: vmkeep_vault::manifest::BackupKind::Full,
        job: "j".into(),
    }
}

#[async_trait]
impl Site for ToySite {
    async fn libvirt(&self) -> LibvirtStatus {
        LibvirtStatus { uri: "toy:///".into(), reachable: true, versions: Some("toy 1".into()), fault: None }
    }

    async fn domains(&self) -> Result<Vec<DomainRow>, Fault> {
        Ok(vec![DomainRow {
            name: NASTY.into(),
            uuid: UUID.into(),
            state: "running".into(),
            persistent: true,
            disks: vec![],
            last_backup: None,
            in_vaults: vec![],
            job: None,
            obstacle: None,
        }])
    }

    async fn back_up(&self, request: &BackupRequest) -> Result<Order, Fault> {
        self.snapshot(&SnapshotRequest { domain: request.domain.clone(), ..SnapshotRequest::default() }).await
    }

    async fn snapshot(&self, request: &SnapshotRequest) -> Result<Order, Fault> {
        if request.domain != NASTY {
            return Err(Fault::permanent(
                codes::CANNOT_FIND_MACHINE,
                "find the domain",
                &request.domain,
                "no",
            )
            .remedy("`vmkeep domains`"));
        }
        // The toy is told to fail through an option that it has no other use for.
        let fail = request.disks.first().and_then(|code| code.parse::<u64>().ok());
        Ok(Order {
            workflow: "snapshot".into(),
            subject: Subject { id: UUID.into(), label: NASTY.into() },
            options: fail.map_or_else(|| json!({}), |code| json!({ "fail": code })),
            limits: vec![],
        })
    }

    async fn restore(&self, request: &RestoreRequest, _: Option<&str>) -> Result<Order, Fault> {
        Err(Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", &request.backup, "there are none"))
    }

    async fn in_place(&self, request: &InPlaceRequest) -> Result<Order, Fault> {
        Err(Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", &request.backup, "there are none"))
    }

    async fn undo(&self, request: &UndoRequest) -> Result<Order, Fault> {
        Err(Fault::permanent(
            codes::CANNOT_WORK_ON_UNDEFINED_OBJECT,
            "find it",
            &request.job,
            "there is none",
        ))
    }

    async fn discard(&self, request: &DiscardRequest) -> Result<Order, Fault> {
        Err(Fault::permanent(
            codes::CANNOT_WORK_ON_UNDEFINED_OBJECT,
            "find it",
            &request.job,
            "there is none",
        ))
    }

    async fn kept(&self) -> Result<(Vec<KeptRow>, Vec<String>), Fault> {
        Ok((vec![], vec![]))
    }

    async fn verify(&self, backup: &str) -> Result<Order, Fault> {
        Err(Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", backup, "there are none"))
    }

    async fn backups(&self) -> Result<Backups, Fault> {
        let (backups, warnings) = self.0.lock().unwrap().clone();
        let partial = !warnings.is_empty();
        Ok(Backups { backups, missing: vec![], in_vaults: vec![], warnings, partial })
    }

    async fn in_vaults(&self) -> (Vec<VaultedRow>, Vec<String>) {
        (self.1.lock().unwrap().clone(), vec![])
    }

    async fn delete(&self, request: &DeleteRequest) -> Result<Vec<Order>, Fault> {
        let wanted = request.backups.first().cloned().unwrap_or_default();
        Err(Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", wanted, "there are none"))
    }

    async fn prune(&self, _: &PruneRequest) -> Result<Vec<Order>, Fault> {
        Ok(vec![])
    }

    async fn protect(&self, request: &ProtectRequest, _: bool, _: Actor) -> Result<BackupRow, Fault> {
        Err(Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", &request.backup, "there are none"))
    }

    async fn rebuild(&self, _: &RebuildRequest, _: Actor) -> Result<Rebuilt, Fault> {
        Ok(Rebuilt::default())
    }

    async fn forget(&self, request: &ForgetRequest, _: Actor) -> Result<(), Fault> {
        Err(Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", &request.backup, "there are none"))
    }

    async fn catalogue(&self) -> Result<Vec<Record>, Fault> {
        Ok(vec![])
    }

    async fn backup(&self, backup: &str) -> Result<BackupDetail, Fault> {
        Err(Fault::permanent(codes::NO_SUCH_BACKUP, "find the backup", backup, "there are none"))
    }

    async fn repair(&self) -> Result<Vec<Order>, Fault> {
        Ok(Vec::new())
    }

    async fn doctor(&self) -> Vec<Finding> {
        vec![]
    }
}

/// A daemon that serves until it is dropped.
pub(crate) struct Daemon {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) socket: PathBuf,
    pub(crate) client: Client,
    pub(crate) engine: Engine,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) gates: Arc<Semaphore>,
    pub(crate) site: ToySite,
    pub(crate) phase: watch::Sender<DaemonPhase>,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Daemon {
    /// One that the user of this process owns.
    pub(crate) async fn start() -> Self {
        Self::owned_by(rustix::process::geteuid().as_raw()).await
    }

    /// One that treats connections so.
    pub(crate) async fn with(manners: Manners) -> Self {
        Self::made(rustix::process::geteuid().as_raw(), manners).await
    }

    /// One that another user owns.
    pub(crate) async fn owned_by(owner: u32) -> Self {
        Self::made(owner, Manners::with(1024)).await
    }

    async fn made(owner: u32, manners: Manners) -> Self {
        let dir = tempfile::Builder::new().prefix("vk").tempdir().unwrap();
        let socket = dir.path().join("run/vmkeepd.sock");
        let listener = Socket::bind(&socket).await.unwrap();
        let store = Arc::new(MemoryStore::new());
        let gates = Arc::new(Semaphore::new(0));
        let events: Arc<dyn EventStore> = store.clone();
        let engine = Engine::new(engine::Config {
            store: events,
            registry: Registry::new().step(Gate(gates.clone())).workflow(Toy),
            clock: Arc::new(SystemClock),
            environment: Arc::new(NoEnvironment),
            limits: engine::Limits::default(),
            on_fatal: Arc::new(|why| panic!("{why}")),
        });
        let (phase, phases) = watch::channel(DaemonPhase::Ready);
        let config = Config {
            state_dir: dir.path().into(),
            socket: socket.clone(),
            connect: "test:///default".into(),
            roots: vec![dir.path().join("backups")],
            restore_dir: dir.path().join("restored"),
            restore: vmkeep_steps::restore::RightsSettings::default(),
            vaults: Default::default(),
            engine: vmkeep_store::EngineName::default(),
            history: vmkeep_store::burial::Policy::default(),
            limits: Limits::default(),
            snapshot: SnapshotDefaults::default(),
            backup: Default::default(),
            log: Log::default(),
            file: None,
        };
        let site = ToySite::default();
        let app = Arc::new(App {
            config,
            engine: engine.clone(),
            site: Arc::new(site.clone()),
            sealer: Arc::new(vmkeep_host::heads::Sealer::new(store.clone(), dir.path())),
            store: store.clone(),
            phase: phases,
            started: Timestamp::now(),
            owner,
            owner_name: "ada".into(),
        });
        let serving = tokio::spawn(serve(listener, router(app), manners, std::future::pending()));
        let client = Client::new(&socket);
        Self { dir, socket, client, engine, store, gates, site, phase, serving }
    }

    /// A request for a backup of the toy's domain.
    pub(crate) fn request() -> SnapshotRequest {
        SnapshotRequest { domain: NASTY.into(), ..SnapshotRequest::default() }
    }
}
