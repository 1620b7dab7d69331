//! One run: a world is made, the jobs before are done, and the job under test lives as many lives as it takes.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use vmkeep_steps::backup::BackupSettings;
use vmkeep_steps::deletion::OpenJobs;
use vmkeep_steps::hypervisor::fake::{Client, Fake, Picture};
use vmkeep_steps::hypervisor::{DomainId, Hypervisor};
use vmkeep_steps::image::root::Roots;
use vmkeep_steps::image::space::LowWater;
use vmkeep_steps::inplace::InPlaceSettings;
use vmkeep_steps::reconcile::sweep::Journals;
use vmkeep_steps::restore::RestoreSettings;
use vmkeep_steps::snapshot::safety::{Release, release};
use vmkeep_steps::snapshot::{Places, World};
use vmkeep_steps::workflows::snapshot::{Settings, reboot};
use vmkeep_steps::workflows::{self as product, Parts};
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{Config, Limits};
use vmkeep_workflow::event::JobRequest;
use vmkeep_workflow::journal::JobFilter;
use vmkeep_workflow::{
    Actor, Clock, Engine, Environment, Event, EventStore, JobId, JobStatus, JobSummary, Registry,
};

use super::director::{Act, Director, Mortal, Reached};
use super::judge::{self, Verdict};
use super::scenario::{At, Scenario, Stage};
use super::vault;

/// What happens at which place, by its number.
pub type Acts = BTreeMap<usize, Act>;

/// What became of a run.
pub struct Ran {
    pub reached: Vec<Reached>,
    /// Looks at files.
    pub looked: Vec<&'static str>,
    pub verdict: Verdict,
    pub history: Vec<Event>,
    pub lives: usize,
}

/// A job that has not ended by then does not.
const PATIENCE: Duration = Duration::from_secs(12 * 3600);

struct Time {
    world: Fake,
    began: Timestamp,
}

#[async_trait]
impl Clock for Time {
    fn now(&self) -> Timestamp {
        self.began + self.world.elapsed()
    }
    async fn sleep(&self, wait: Duration) {
        tokio::time::sleep(wait).await;
    }
}

struct Facts(Fake);

impl Environment for Facts {
    fn facts(&self) -> BTreeMap<String, String> {
        self.0.instances()
    }
}

/// A folder that is gone with the run.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn folder() -> Folder {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let shm = Path::new("/dev/shm");
    let below = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = below.join(format!("vmkeep-sim-{}-{number:07}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    for name in ["backups", "restored", "ram"] {
        std::fs::create_dir_all(path.join(name)).unwrap();
    }
    Folder(path)
}

/// A process of vmkeepd.
struct Daemon {
    engine: Engine,
    hypervisor: Arc<Client>,
    world: World,
    store: String,
}

struct Play<'a> {
    scenario: &'a Scenario,
    stage: Stage,
    director: Arc<Director>,
    began: Timestamp,
    /// How many there have been.
    processes: Cell<u64>,
}

enum Life {
    Ended(Box<JobSummary>),
    Died,
    Stuck,
}

impl Play<'_> {
    fn daemon(&self) -> Daemon {
        let client = Arc::new(self.stage.world.client(self.director.clone()));
        let world = World { hypervisor: client.clone(), storage: client.clone() };
        let store: Arc<dyn EventStore> =
            Arc::new(Mortal { inner: self.stage.store.clone(), director: self.director.clone() });
        // Whoever cannot open these does not begin at all.
        self.processes.set(self.processes.get() + 1);
        let process = self.processes.get();
        vmkeep_steps::simulation::direct(None, process);
        let roots =
            Arc::new(Roots::open(["backups", "restored", "images"].map(|n| self.stage.at(n))).unwrap());
        vmkeep_steps::simulation::direct(Some(self.director.clone()), process);
        let places = Places { roots: roots.clone() };
        let id = store.id().to_string();
        let none = LowWater { bytes: 0, percent: 0 };
        let restore = RestoreSettings { targets: none, ..RestoreSettings::default() };
        let parts = Parts {
            world: world.clone(),
            places,
            snapshot: Settings {
                guests: none,
                targets: none,
                ..Settings::new(id.clone(), "vmkeep simulated")
            },
            backup: BackupSettings { low_water: none, ..BackupSettings::new(id.clone(), "vmkeep simulated") },
            vaults: Arc::new(vault::One::new(
                self.stage.vault.clone(),
                self.director.clone(),
                self.stage.world.clone(),
            )),
            restore,
            in_place: InPlaceSettings { store: id.clone(), restored: self.stage.at("restored"), restore },
            users: Arc::new(OpenJobs(store.clone())),
            jobs: Arc::new(Journals(store.clone())),
        };
        let registry = Registry::new()
            .workflow(vmkeep_host::verify::Verify)
            .step(vmkeep_host::verify::VerifyBackup { roots });
        let director = self.director.clone();
        let engine = Engine::new(Config {
            store,
            registry: product::register(registry, parts),
            clock: Arc::new(Time { world: self.stage.world.clone(), began: self.began }),
            environment: Arc::new(Facts(self.stage.world.clone())),
            limits: Limits::default(),
            on_fatal: Arc::new(move |why| director.fatal(why)),
        });
        Daemon { engine, hypervisor: client, world, store: id }
    }

    /// One life of vmkeepd: guests first, then the jobs that are there, then the one that is asked for.
    fn live(&self, request: &JobRequest) -> Life {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            self.stage.world.new_life();
            let daemon = self.daemon();
            let life = async {
                daemon.set_guests_free().await;
                daemon.engine.recover().await.unwrap();
                let starts = daemon.start_again().await;
                let job = daemon.engine.request(request.clone()).await.unwrap();
                let summary = daemon.engine.wait(job).await.unwrap();
                starts.join_all().await;
                (job, summary)
            };
            tokio::pin!(life);
            let end = tokio::time::sleep(PATIENCE);
            tokio::pin!(end);
            let ended = loop {
                tokio::select! {
                    biased;
                    () = self.director.told.notified() => {
                        if self.director.died() {
                            break Life::Died;
                        }
                        if self.director.cancels() {
                            // Beside this: whoever dies now never answers.
                            tokio::spawn(cancel(daemon.engine.clone()));
                        } else if !self.director.faults().is_empty() {
                            break Life::Stuck;
                        }
                    }
                    (_, summary) = &mut life => break Life::Ended(Box::new(summary)),
                    () = &mut end => break Life::Stuck,
                }
            };
            self.stage.world.end_life();
            ended
        })
    }

    fn history(&self, job: JobId) -> Vec<Event> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let stream = vmkeep_workflow::StreamId::job(job);
        let records = runtime.block_on(self.stage.store.read(&stream, vmkeep_workflow::Seq(1), 0)).unwrap();
        records.iter().map(|record| serde_json::from_slice(&record.bytes).unwrap()).collect()
    }

    fn summary(&self, request: &JobRequest) -> Option<JobSummary> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let filter = JobFilter { workflow: Some(request.workflow.to_string()), ..JobFilter::default() };
        runtime.block_on(self.stage.store.jobs(&filter)).unwrap().into_iter().next()
    }
}

impl Daemon {
    /// As vmkeepd does it first of all: nothing else is done to a domain before its guest is free.
    async fn set_guests_free(&self) {
        for domain in self.hypervisor.domains().await.unwrap_or_default() {
            for _ in 0..20_000 {
                match release(&self.world, &self.store, &domain.id).await {
                    Ok(Release::Waiting) => {}
                    Err(e) if e.is_transient() => {}
                    _ => break,
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }

    async fn start_again(&self) -> tokio::task::JoinSet<()> {
        let mut starts = tokio::task::JoinSet::new();
        let boot = self.hypervisor.environment().await.unwrap_or_default()["boot"].clone();
        let jobs = self
            .engine
            .jobs(&JobFilter { status: reboot::OPEN.to_vec(), ..JobFilter::default() })
            .await
            .unwrap();
        for job in jobs {
            let view = self.engine.view(job.job).await.unwrap();
            let Some(plan) = view.plan else { continue };
            let done = |name: &vmkeep_workflow::StepName| {
                view.steps.iter().any(|step| step.name == *name && step.output.is_some())
            };
            let started = |name: &vmkeep_workflow::StepName| {
                view.steps.iter().any(|step| step.name == *name && step.attempts > 0)
            };
            if reboot::concerns(&plan, &boot, started, done) {
                let world = self.world.clone();
                starts.spawn(async move {
                    for _ in 0..600 {
                        if reboot::start(&world, &plan).await.is_ok() {
                            break;
                        }
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                });
            }
        }
        starts
    }
}

async fn cancel(engine: Engine) {
    let open = [JobStatus::Queued, JobStatus::Running].to_vec();
    let jobs = engine.jobs(&JobFilter { status: open, ..JobFilter::default() }).await.unwrap();
    for job in jobs {
        let by = Actor { who: "somebody".to_owned(), why: None };
        let _ = engine.cancel(job.job, by).await;
    }
}

fn arrange(scenario: &Scenario, stage: &Stage) {
    let id = &stage.domain.id;
    if scenario.agent {
        stage.world.gets_agent(id);
    }
    if scenario.sealed {
        stage.world.gets_sealed(id);
    }
    if scenario.at != At::Off || !scenario.before.is_empty() || scenario.of_vault() || scenario.sealed {
        stage.world.operator_starts(id);
        for _ in 0..5 {
            stage.world.pass();
        }
    }
    if scenario.at == At::Off {
        stage.world.operator_destroys(id);
    }
}

/// A vault without backups.
fn vault() -> Arc<vault::Place> {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(vault::Place::new())
}

/// Plays a scenario, with these acts.
pub fn run(scenario: &Scenario, acts: &Acts) -> Ran {
    let folder = folder();
    let world = Fake::new(&folder.0).unwrap();
    world.set_ram_disk(&folder.0.join("ram"));
    let domain = world.add_domain_of("web", 7, scenario.formats, scenario.disk_size()).unwrap();
    let director = Director::new(&world, domain.id, acts.clone());
    vmkeep_steps::simulation::direct(Some(director.clone()), 0);
    let store = Arc::new(MemoryStore::new());
    let vault = vault();
    let stage = Stage { folder: folder.0.clone(), world, domain, store, vault, done: Vec::new() };
    let mut play = Play { scenario, stage, director, began: Timestamp::now(), processes: Cell::new(0) };
    arrange(scenario, &play.stage);
    for prior in scenario.before {
        let request = prior(&play.stage);
        match play.live(&request) {
            Life::Ended(summary) if summary.status == JobStatus::Succeeded => {
                play.stage.done.push(summary.job)
            }
            Life::Ended(summary) => panic!("{}: what goes before failed: {:?}", scenario.name, summary.fault),
            _ => panic!("{}: what goes before did not end: {:?}", scenario.name, play.director.faults()),
        }
    }
    if scenario.at == At::Saved {
        play.stage.world.operator_saves(&play.stage.domain.id).unwrap();
    }
    play.stage.world.forget_theirs(&play.stage.domain.id);
    let ran = test(&play, acts);
    vmkeep_steps::simulation::direct(None, 0);
    ran
}

fn test(play: &Play<'_>, acts: &Acts) -> Ran {
    let was = before(play.scenario, &play.stage);
    let request = (play.scenario.order)(&play.stage);
    play.director.count_from_now_on(true);
    let mut lives = 0;
    let mut over = false;
    let ended = loop {
        lives += 1;
        match play.live(&request) {
            Life::Died => over |= play.summary(&request).is_some_and(|summary| summary.status.ended()),
            Life::Ended(summary) => break Some(*summary),
            Life::Stuck => break None,
        }
    };
    play.director.count_from_now_on(false);
    let (reached, looked) = (play.director.reached(), play.director.looked());
    let summary = ended.clone().or_else(|| play.summary(&request));
    let history = summary.map(|summary| play.history(summary.job)).unwrap_or_default();
    let verdict =
        judge::judge(play.scenario, &play.stage, &was, (ended, &history, over), acts, play.director.faults());
    Ran { reached, looked, verdict, history, lives }
}

/// The world before the job.
pub struct Before {
    pub images: BTreeSet<PathBuf>,
    /// Domains that libvirt has the state of a TPM of.
    pub tpms: BTreeSet<PathBuf>,
    pub backups: usize,
    pub kept: usize,
    /// Backups in the vault.
    pub in_vault: usize,
    pub picture: Picture,
}

fn before(scenario: &Scenario, stage: &Stage) -> Before {
    Before {
        images: stage.images(),
        tpms: stage.tpms(),
        backups: stage.backups().len(),
        kept: kept(&stage.at("restored")),
        in_vault: if scenario.of_vault() { stage.manifests().len() } else { 0 },
        picture: stage.world.picture(&stage.domain.id),
    }
}

/// How many machines are kept aside, whole or not.
pub fn kept(restored: &Path) -> usize {
    std::fs::read_dir(restored.join("kept")).map_or(0, |folder| folder.count())
}

pub fn copy() -> DomainId {
    DomainId(super::scenario::COPY)
}

/// The names of the product's workflows.
pub fn workflows() -> Vec<String> {
    let folder = folder();
    let world = Fake::new(&folder.0).unwrap();
    let domain = world.add_domain("web", 7, &["raw"]).unwrap();
    let director = Director::new(&world, domain.id, Acts::new());
    let store = Arc::new(MemoryStore::new());
    let vault = vault();
    let stage = Stage { folder: folder.0.clone(), world, domain, store, vault, done: Vec::new() };
    let play = Play {
        scenario: &super::scenario::SCENARIOS[0],
        stage,
        director,
        began: Timestamp::now(),
        processes: Cell::new(0),
    };
    play.daemon().engine.registry().workflow_names().iter().map(ToString::to_string).collect()
}
