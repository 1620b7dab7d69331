//! A small world for the tests of the steps: one domain, one QEMU, some image files.
//!
//! It is honest about the two things that matter most: a persistent definition is not durable before it was synced, and
//! a guest that runs writes to what QEMU has on top. Whenever the guest is running at the end of a call the first rule
//! of the live cycle is asserted ([`State::assert_safe`]), so that every test checks it without asking for it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::hypervisor::*;
use crate::snapshot::World;
use crate::snapshot::disk::JobDisk;

pub(crate) const STORE: &str = "store-1";

/// What happens at the next call of that name.
pub(crate) enum Trap {
    /// It fails and does nothing.
    Fail(HvError),
    /// It does what it should, and the answer is lost.
    Lose,
    /// Something happens right after it.
    Then(Box<dyn FnOnce(&mut State) + Send>),
}

#[derive(Clone, Debug)]
pub(crate) struct File {
    pub(crate) id: FileId,
    pub(crate) format: &'static str,
    pub(crate) backing: Option<PathBuf>,
    pub(crate) empty: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) number: u32,
    pub(crate) tops: BTreeMap<Target, PathBuf>,
    /// Commits: whether they are ready.
    pub(crate) jobs: BTreeMap<Target, bool>,
}

pub(crate) struct State {
    pub(crate) run: RunState,
    pub(crate) files: BTreeMap<PathBuf, File>,
    pub(crate) persistent: BTreeMap<Target, PathBuf>,
    pub(crate) durable: BTreeMap<Target, PathBuf>,
    pub(crate) live: BTreeMap<Target, PathBuf>,
    pub(crate) qemu: Option<Process>,
    pub(crate) marker: Option<Marker>,
    pub(crate) persistent_marker: Option<Marker>,
    pub(crate) frozen: bool,
    pub(crate) agent: bool,
    pub(crate) job: Option<DomainJob>,
    pub(crate) stragglers: Option<String>,
    pub(crate) bare: String,
    pub(crate) managed_save: bool,
    /// A save that goes on until the guest is stopped or the job is aborted.
    pub(crate) endless: bool,
    pub(crate) aborted: bool,
    /// libvirtd was killed while it began a backup.
    pub(crate) locked: bool,
    /// For so many looks libvirt has a snapshot with memory begun, but not its file, and lets nobody else at its job.
    pub(crate) preparing: usize,
    /// So many aborts come before QEMU has begun to write: they are accepted, and stop nothing.
    pub(crate) early_aborts: usize,
    pub(crate) saved: Option<bool>,
    pub(crate) crashed: bool,
    /// Bytes that are free on every file system.
    pub(crate) free: u64,
    pub(crate) calls: Vec<String>,
    pub(crate) traps: HashMap<&'static str, VecDeque<Trap>>,
    starts: u32,
    inode: u64,
}

#[derive(Clone)]
pub(crate) struct Fake(Arc<Mutex<State>>);

pub(crate) fn domain() -> DomainRef {
    DomainRef { id: DomainId(Uuid::from_u128(7)), name: "web".to_owned() }
}

pub(crate) fn target(name: &str) -> Target {
    Target::from(name)
}

impl State {
    fn layer(&self, path: &Path) -> Layer {
        let format = self.files.get(path).map_or("raw", |file| file.format);
        Layer { path: path.to_owned(), format: format.to_owned() }
    }

    fn definition(&self, files: &BTreeMap<Target, PathBuf>) -> Definition {
        let disk = |(target, path): (&Target, &PathBuf)| DiskDef {
            target: target.clone(),
            device: DiskDevice::Disk,
            source: DiskSource::File(path.clone()),
            format: Some(self.layer(path).format),
            backing: Backing::Probed,
            read_only: false,
            shareable: false,
            transient: false,
            encrypted: false,
            mirror: None,
        };
        Definition {
            xml: serde_json::to_string(files).unwrap(),
            bare: self.bare.clone(),
            disks: files.iter().map(disk).collect(),
            devices: Devices { memory: 1 << 20, agent: self.agent, ..Devices::default() },
        }
    }

    fn chain(&self, top: &Path) -> Vec<Layer> {
        let mut chain = Vec::new();
        let mut next = Some(top.to_owned());
        while let Some(path) = next {
            next = self.files.get(&path).and_then(|file| file.backing.clone());
            chain.push(self.layer(&path));
        }
        chain
    }

    /// While the guest runs, the durable definition names what QEMU writes to, or an empty overlay right on top of it.
    pub(crate) fn assert_safe(&self, after: &str) {
        let Some(qemu) = self.qemu.as_ref().filter(|_| self.run == RunState::Running) else { return };
        for (target, top) in &qemu.tops {
            let named = &self.durable[target];
            let on_top = self.files.get(named).is_some_and(|f| f.empty && f.backing.as_ref() == Some(top));
            assert!(
                named == top || on_top,
                "after {after} the guest runs, writes {target} to {top:?}, and would start on {named:?}"
            );
        }
    }

    pub(crate) fn guest_writes(&mut self) {
        assert_eq!(self.run, RunState::Running);
        for top in self.qemu.clone().unwrap().tops.values() {
            self.files.get_mut(top).unwrap().empty = false;
        }
    }

    pub(crate) fn die(&mut self) {
        (self.run, self.qemu, self.marker, self.job, self.frozen) = (RunState::Off, None, None, None, false);
    }

    pub(crate) fn power_cut(&mut self) {
        self.die();
        self.persistent = self.durable.clone();
    }

    pub(crate) fn start(&mut self) {
        self.starts += 1;
        (self.managed_save, self.crashed) = (false, false);
        let tops = self.persistent.clone();
        self.live = tops.clone();
        self.marker = self.persistent_marker.clone();
        self.run = RunState::Running;
        self.qemu = Some(Process { number: self.starts, tops, jobs: BTreeMap::new() });
    }

    pub(crate) fn add(&mut self, path: &str, format: &'static str, backing: Option<&str>) -> FileId {
        self.inode += 1;
        let id = FileId { dev: 1, ino: self.inode };
        let empty = backing.is_some();
        self.files.insert(path.into(), File { id, format, backing: backing.map(PathBuf::from), empty });
        id
    }

    fn moves(&mut self, target: &Target, to: &Path) {
        self.qemu.as_mut().unwrap().tops.insert(target.clone(), to.to_owned());
    }
}

impl Fake {
    /// A running domain with two disks.
    pub(crate) fn new() -> Self {
        let mut state = State {
            run: RunState::Off,
            files: BTreeMap::new(),
            persistent: BTreeMap::new(),
            durable: BTreeMap::new(),
            live: BTreeMap::new(),
            qemu: None,
            marker: None,
            persistent_marker: None,
            frozen: false,
            agent: false,
            job: None,
            stragglers: None,
            bare: "as it was".to_owned(),
            managed_save: false,
            saved: None,
            crashed: false,
            endless: false,
            aborted: false,
            locked: false,
            preparing: 0,
            early_aborts: 0,
            free: 1 << 39,
            calls: Vec::new(),
            traps: HashMap::new(),
            starts: 0,
            inode: 0,
        };
        state.add("/i/a", "qcow2", None);
        state.add("/i/b", "raw", None);
        state.persistent = [(target("vda"), "/i/a".into()), (target("vdb"), "/i/b".into())].into();
        state.durable = state.persistent.clone();
        state.start();
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn world(&self) -> World {
        World { hypervisor: Arc::new(self.clone()), storage: Arc::new(self.clone()) }
    }

    pub(crate) fn disks(&self) -> Vec<JobDisk> {
        let disk = |name: &str, base: &str| {
            let overlay = PathBuf::from(format!("/i/vmkeep-0123456789ab-{name}.qcow2"));
            let state = self.state();
            JobDisk {
                target: target(name),
                base: state.layer(Path::new(base)),
                base_id: state.files[Path::new(base)].id,
                device: false,
                lasting: None,
                virtual_size: 1 << 20,
                overlay,
            }
        };
        vec![disk("vda", "/i/a"), disk("vdb", "/i/b")]
    }

    /// The definition before the job, as the steps are told it.
    pub(crate) fn definition(&self) -> String {
        let files: BTreeMap<Target, PathBuf> =
            [(target("vda"), "/i/a".into()), (target("vdb"), "/i/b".into())].into();
        serde_json::to_string(&files).unwrap()
    }

    /// Overlays made, definition switched.
    pub(crate) fn switched(&self) {
        let disks = self.disks();
        let mut state = self.state();
        for disk in &disks {
            state.add(disk.overlay.to_str().unwrap(), "qcow2", disk.base.path.to_str());
            state.persistent.insert(disk.target.clone(), disk.overlay.clone());
        }
        state.durable = state.persistent.clone();
    }

    /// The snapshot taken, the guest has written.
    pub(crate) fn taken(&self) {
        self.switched();
        let disks = self.disks();
        let mut state = self.state();
        for disk in &disks {
            state.moves(&disk.target, &disk.overlay);
            state.live.insert(disk.target.clone(), disk.overlay.clone());
        }
        state.guest_writes();
    }

    pub(crate) fn instance(&self) -> String {
        self.state().qemu.as_ref().unwrap().number.to_string()
    }

    pub(crate) fn trap(&self, call: &'static str, trap: Trap) {
        self.state().traps.entry(call).or_default().push_back(trap);
    }

    /// Carries a call out, with whatever lies in wait for it.
    fn call<T>(
        &self,
        name: &'static str,
        detail: impl std::fmt::Display,
        act: impl FnOnce(&mut State) -> HvResult<T>,
    ) -> HvResult<T> {
        let mut state = self.state();
        state.calls.push(format!("{name}{detail}"));
        let trap = state.traps.get_mut(name).and_then(VecDeque::pop_front);
        if let Some(Trap::Fail(error)) = trap {
            return Err(error);
        }
        let outcome = act(&mut state);
        if let Some(Trap::Then(more)) = trap {
            more(&mut state);
        } else if let Some(Trap::Lose) = trap {
            outcome?;
            return Err(HvError::new(Trouble::Unreachable, "the connection broke").in_doubt());
        }
        state.assert_safe(name);
        outcome
    }

    /// Whoever comes too early waits until all is over.
    async fn is_let_at_the_job(&self) {
        if self.state().preparing > 0 {
            std::future::pending().await
        }
    }

    /// Whether memory is saved: at once, or when the guest stands still.
    fn save_may_end(&self, take: &Take) -> HvResult<bool> {
        let mut state = self.state();
        if std::mem::take(&mut state.aborted) {
            let _ = take.memory.as_ref().map(std::fs::remove_file);
            return Err(HvError::new(Trouble::Cancelled, "canceled by client"));
        }
        Ok(take.memory.is_none() || !state.endless || matches!(state.run, RunState::Paused(_)))
    }

    fn running(state: &State) -> HvResult<()> {
        match &state.qemu {
            Some(_) => Ok(()),
            None => Err(HvError::new(Trouble::NotRunning, "domain is not running")),
        }
    }
}

fn qemu(state: &State) -> Option<Qemu> {
    let process = state.qemu.as_ref()?;
    let disks = process
        .tops
        .iter()
        .map(|(target, top)| QemuDisk { target: target.clone(), chain: state.chain(top), read_only: false })
        .collect();
    let job = |(target, ready): (&Target, &bool)| BlockJob {
        id: format!("commit-{target}"),
        target: Some(target.clone()),
        kind: BlockJobKind::Commit,
        ready: *ready,
        done: 1,
        total: 1,
        error: None,
    };
    let open = process.tops.values().flat_map(|top| state.chain(top)).map(|layer| layer.path).collect();
    Some(Qemu {
        instance: process.number.to_string(),
        disks,
        jobs: process.jobs.iter().map(job).collect(),
        open,
    })
}

#[async_trait]
impl Hypervisor for Fake {
    async fn environment(&self) -> HvResult<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }

    async fn own_folders(&self) -> HvResult<OwnFolders> {
        Ok(OwnFolders { nvram: "/own/nvram".into(), tpm: "/own/tpm".into(), save: "/own/save".into() })
    }

    async fn domains(&self) -> HvResult<Vec<DomainRef>> {
        Ok(vec![domain()])
    }

    async fn find(&self, _: &str) -> HvResult<DomainRef> {
        Ok(domain())
    }

    async fn observe(&self, _: &DomainId) -> HvResult<Observation> {
        self.call("observe", "", |state| {
            Ok(Observation {
                domain: domain(),
                state: state.run,
                persistent: Some(state.definition(&state.persistent)),
                live: state.qemu.as_ref().map(|_| state.definition(&state.live)),
                qemu: qemu(state),
                marker: if state.qemu.is_some() {
                    state.marker.clone()
                } else {
                    state.persistent_marker.clone()
                },
                persistent_marker: state.persistent_marker.clone(),
                managed_save: state.managed_save,
                autostart: false,
                saved: state.saved,
                crashed: state.crashed,
                snapshots: Vec::new(),
                checkpoints: Vec::new(),
            })
        })
    }

    async fn state(&self, _: &DomainId) -> HvResult<RunState> {
        Ok(self.state().run)
    }

    async fn qemu(&self, _: &DomainId) -> HvResult<Option<Qemu>> {
        self.call("qemu", "", |state| Ok(qemu(state)))
    }

    async fn control(&self, _: &DomainId) -> HvResult<Control> {
        Ok(Control::Idle)
    }

    async fn domain_job(&self, _: &DomainId) -> HvResult<Option<DomainJob>> {
        self.is_let_at_the_job().await;
        if self.state().locked {
            return Err(HvError::new(Trouble::JobLost, "backup job data missing"));
        }
        Ok(self.state().job.clone())
    }

    async fn abort_domain_job(&self, _: &DomainId) -> HvResult<()> {
        self.is_let_at_the_job().await;
        self.call("abort", "", |state| {
            state.aborted = state.early_aborts == 0;
            state.early_aborts = state.early_aborts.saturating_sub(1);
            Ok(())
        })
    }

    async fn stragglers(&self, _: &DomainId) -> HvResult<Option<String>> {
        Ok(self.state().stragglers.clone())
    }

    async fn redefine_disks(&self, _: &DomainId, change: &DiskChange) -> HvResult<()> {
        self.call("redefine", "", |state| {
            match change {
                DiskChange::Point(disks) => {
                    for (target, layer) in disks {
                        state.persistent.insert(target.clone(), layer.path.clone());
                    }
                }
                DiskChange::LikeIn { xml, targets } => {
                    let other: BTreeMap<Target, PathBuf> = serde_json::from_str(xml).unwrap();
                    for target in targets {
                        state.persistent.insert(target.clone(), other[target].clone());
                    }
                }
            }
            state.durable = state.persistent.clone();
            Ok(())
        })
    }

    async fn sync_definitions(&self) -> HvResult<()> {
        self.call("sync", "", |state| {
            state.durable = state.persistent.clone();
            Ok(())
        })
    }

    async fn set_marker(&self, _: &DomainId, marker: &Marker) -> HvResult<()> {
        self.call("mark", "", |state| {
            state.marker = state.qemu.as_ref().map(|_| marker.clone());
            state.persistent_marker = Some(marker.clone());
            Ok(())
        })
    }

    async fn set_hold(&self, _: &DomainId, marker: &Marker) -> HvResult<()> {
        self.call("hold", format_args!(" {:?}", marker.hold), |state| {
            Self::running(state)?;
            state.marker = Some(marker.clone());
            Ok(())
        })
    }

    async fn clear_marker(&self, _: &DomainId) -> HvResult<()> {
        self.call("unmark", "", |state| {
            (state.marker, state.persistent_marker) = (None, None);
            Ok(())
        })
    }

    async fn take(&self, _: &DomainId, take: &Take) -> HvResult<()> {
        if let Some(memory) = &take.memory {
            while self.state().preparing > 0 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                self.state().preparing -= 1;
            }
            std::fs::write(memory, b"LibvirtQemudPart").unwrap();
        }
        while !self.save_may_end(take)? {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        self.call("take", "", |state| {
            if let Some(missing) = take.disks.iter().find(|(_, path)| !state.files.contains_key(path)) {
                return Err(HvError::new(Trouble::Missing, format!("missing existing file {missing:?}")));
            }
            if let Some(memory) = &take.memory {
                std::fs::write(memory, b"LibvirtQemudSave and more than a header of 32 bytes").unwrap();
            }
            for (target, overlay) in &take.disks {
                state.moves(target, overlay);
                state.live.insert(target.clone(), overlay.clone());
            }
            Ok(())
        })
    }

    async fn save(&self, _: &DomainId, file: &Path) -> HvResult<()> {
        self.call("save", "", |state| {
            Self::running(state)?;
            let mut header = b"LibvirtQemudSave".to_vec();
            for field in [2, 100, u32::from(state.run == RunState::Running), 0] {
                header.extend(field.to_ne_bytes());
            }
            std::fs::write(file, header).unwrap();
            state.die();
            Ok(())
        })
    }

    async fn note(&self, _: &DomainId, marker: &Marker) -> HvResult<()> {
        self.call("note", format_args!(" {:?}", marker.hold), |state| {
            state.persistent_marker = Some(marker.clone());
            Ok(())
        })
    }

    fn reloaded_definition(&self, _: &str, disks: &[(Target, Layer)], marker: &Marker) -> HvResult<String> {
        let disks: BTreeMap<_, _> = disks.iter().map(|(t, layer)| (t.clone(), layer.path.clone())).collect();
        Ok(serde_json::to_string(&(disks, marker)).unwrap())
    }

    async fn suspend(&self, _: &DomainId) -> HvResult<()> {
        self.is_let_at_the_job().await;
        self.call("suspend", "", |state| {
            Self::running(state)?;
            state.run = RunState::Paused(PauseReason::Asked);
            Ok(())
        })
    }

    async fn resume(&self, _: &DomainId) -> HvResult<()> {
        self.call("resume", "", |state| {
            Self::running(state)?;
            state.run = RunState::Running;
            Ok(())
        })
    }

    async fn freeze_state(&self, _: &DomainId) -> HvResult<FreezeState> {
        let state = self.state();
        if !state.agent {
            return Err(HvError::new(Trouble::NoAgent, "QEMU guest agent is not configured"));
        }
        Ok(if state.frozen { FreezeState::Frozen } else { FreezeState::Thawed })
    }

    async fn freeze(&self, _: &DomainId) -> HvResult<u32> {
        self.call("freeze", "", |state| {
            state.frozen = true;
            Ok(1)
        })
    }

    async fn thaw(&self, _: &DomainId) -> HvResult<u32> {
        self.call("thaw", "", |state| Ok(u32::from(std::mem::take(&mut state.frozen))))
    }

    async fn commit_begin(&self, _: &DomainId, commit: &Commit) -> HvResult<()> {
        self.call("commit", format_args!(" {} {:?}", commit.target, commit.through), |state| {
            Self::running(state)?;
            state.qemu.as_mut().unwrap().jobs.insert(commit.target.clone(), true);
            Ok(())
        })
    }

    async fn commit_pivot(&self, _: &DomainId, commit: &Commit) -> HvResult<()> {
        self.call("pivot", format_args!(" {}", commit.target), |state| {
            Self::running(state)?;
            let ready = state.qemu.as_mut().unwrap().jobs.remove(&commit.target);
            assert_eq!(ready, Some(true), "a pivot of a commit that is not ready");
            state.moves(&commit.target, &commit.base);
            state.live.insert(commit.target.clone(), commit.base.clone());
            // libvirt rewrites it, and does not sync the folder.
            state.persistent.insert(commit.target.clone(), commit.base.clone());
            Ok(())
        })
    }

    async fn commit_abort(&self, _: &DomainId, commit: &Commit) -> HvResult<()> {
        self.call("give-up", "", |state| {
            state.qemu.as_mut().unwrap().jobs.remove(&commit.target);
            Ok(())
        })
    }

    async fn close_unused(&self, _: &DomainId, _: &[PathBuf]) -> HvResult<()> {
        Ok(())
    }

    async fn memory_image_definition(&self, _: &Path) -> HvResult<String> {
        Ok(String::new())
    }

    async fn memory_image_head(&self, _: &Path, _: &str) -> HvResult<Vec<u8>> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    async fn pull_links(&self, _: &DomainId) -> HvResult<u32> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    fn definition_changes(&self, _: &str, _: &str) -> HvResult<Vec<String>> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    async fn define_new(&self, _: &str) -> HvResult<DomainRef> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    async fn undefine(&self, _: &DomainId) -> HvResult<()> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    async fn start(&self, _: &DomainId, paused: bool) -> HvResult<()> {
        self.call("start", "", |state| {
            state.start();
            if paused {
                state.run = RunState::Paused(PauseReason::Asked);
            }
            Ok(())
        })
    }

    async fn start_from_memory(&self, _: &Path, xml: &str, paused: bool) -> HvResult<()> {
        self.call("load", "", |state| {
            if state.qemu.is_some() {
                return Err(HvError::new(Trouble::Refused, "domain is already active"));
            }
            let (tops, marker): (BTreeMap<Target, PathBuf>, Marker) = serde_json::from_str(xml).unwrap();
            state.start();
            (state.live, state.marker) = (tops.clone(), Some(marker));
            state.qemu.as_mut().unwrap().tops = tops;
            if paused {
                state.run = RunState::Paused(PauseReason::Asked);
            }
            Ok(())
        })
    }

    async fn set_autostart(&self, _: &DomainId, _: bool) -> HvResult<()> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    async fn destroy(&self, _: &DomainId) -> HvResult<()> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    fn rewrite_definition(&self, _: &str, _: &NewIdentity) -> HvResult<String> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }

    fn parse_definition(&self, _: &str) -> HvResult<Definition> {
        Err(HvError::new(Trouble::Unsupported, "not in this world"))
    }
}

#[async_trait]
impl Storage for Fake {
    async fn inspect(&self, layer: &Layer) -> HvResult<Option<Image>> {
        let state = self.state();
        Ok(state.files.get(&layer.path).map(|file| Image {
            path: layer.path.clone(),
            id: file.id,
            size: 1,
            allocated: 1,
            format: file.format.to_owned(),
            virtual_size: 1 << 20,
            backing: file.backing.as_ref().map(|path| state.layer(path)),
            empty: file.empty,
            cluster: 64 << 10,
        }))
    }

    async fn create_overlay(&self, spec: &OverlaySpec) -> HvResult<Image> {
        self.call("create", "", |state| {
            if state.files.contains_key(&spec.path) {
                return Err(HvError::new(Trouble::Exists, "it exists already"));
            }
            state.add(spec.path.to_str().unwrap(), "qcow2", spec.base.path.to_str());
            Ok(())
        })?;
        let layer = Layer { path: spec.path.clone(), format: "qcow2".to_owned() };
        Ok(self.inspect(&layer).await?.unwrap())
    }

    async fn remove(&self, path: &Path, id: FileId) -> HvResult<bool> {
        self.call("remove", "", |state| {
            let there = state.files.get(path).is_some_and(|file| file.id == id);
            if there {
                state.files.remove(path);
            }
            Ok(there)
        })
    }

    async fn commit_offline(
        &self,
        overlay: &Layer,
        base: &Layer,
        give_way: &CancellationToken,
    ) -> HvResult<()> {
        if give_way.is_cancelled() {
            return Err(HvError::new(Trouble::Cancelled, "gives way"));
        }
        self.call("offline", "", |state| {
            let open = state.qemu.iter().flat_map(|qemu| qemu.tops.values());
            let open: Vec<_> = open.flat_map(|top| state.chain(top)).map(|layer| layer.path).collect();
            if open.contains(&overlay.path) || open.contains(&base.path) {
                return Err(HvError::new(Trouble::Locked, "Failed to get \"write\" lock"));
            }
            if let Some(file) = state.files.get_mut(&overlay.path) {
                file.empty = true;
            }
            Ok(())
        })
    }

    async fn space(&self, _: &Path) -> HvResult<Space> {
        Ok(Space { total: 1 << 40, free: self.state().free, dev: 1 })
    }

    async fn flush(&self, _: &Path) {}
}
