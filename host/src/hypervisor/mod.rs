//! The adapter: libvirt as the steps see it.
//!
//! Invariants:
//! - no libvirt call runs on an async thread, and none is waited for without end, except where waiting is the point (a
//!   snapshot with memory takes as long as it takes, and has a call that ends it);
//! - a call that was given up is *not forgotten*: it stays in the client's list of calls in flight, and
//!   [`Hypervisor::stragglers`] speaks of it until it has returned or can no longer take effect;
//! - what returns `Ok` and claims to be durable is: libvirt fsyncs the files of its definitions but not their folder,
//!   so the folder is fsynced here (`folders`);
//! - what a caller reads of QEMU comes from QEMU's monitor (`graph`), never from a definition.
//!
//! What changes a guest's disks is in `changes`, how calls are made and timed in `calls`.

mod calls;
mod changes;
mod definition;
mod folders;
mod graph;
mod machine;
mod marker;
mod observe;
mod pulling;
mod reach;
mod restored;
mod saving;
mod stragglers;
mod trouble;
mod versions;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use vmkeep_libvirt::flags::{
    CreateFlags, DestroyFlags, ImpactFlags, JobStatsFlags, ListFlags, SaveImageXmlFlags, UndefineFlags,
    XmlFlags,
};
use vmkeep_libvirt::xml::DomainXml;
use vmkeep_libvirt::{Client, ClientOptions, Status};
use vmkeep_steps::hypervisor::{
    Bitmap, Commit, Control, Definition, DiskChange, DomainId, DomainJob, DomainRef, FreezeState, HvError,
    HvResult, Hypervisor, Layer, MARKER_NAMESPACE, Marker, NewIdentity, Observation, OwnFolders, Pull,
    Pulling, Qemu, RunState, Standstills, Take, Target, Trouble,
};

pub use definition::{read as read_definition, rewrite as rewrite_definition};
pub use observe::Overview;
pub use restored::changes as definition_changes;

/// libvirt on this host. Cheap to clone; clones share the connection.
#[derive(Clone, Debug)]
pub struct Libvirt {
    client: Client,
    began: Arc<Began>,
    turns: calls::Turns,
    standstills: Standstills,
    greetings: Standstills,
    versions: versions::Versions,
}

/// When this process began to make calls: what its predecessor left behind is older.
#[derive(Debug)]
struct Began {
    at: Instant,
    /// Clock ticks since boot, as the kernel counts a process's start.
    tick: Option<u64>,
}

impl Libvirt {
    /// Begins to connect and returns at once.
    ///
    /// # Errors
    /// When the URI makes no sense.
    pub fn start(uri: &str) -> HvResult<Self> {
        let client = Client::start(uri, ClientOptions::default()).map_err(|e| trouble::of(&e))?;
        let tick = vmkeep_libvirt::ProcessId::of(std::process::id()).ok().map(|process| process.start);
        Ok(Self {
            client,
            began: Arc::new(Began { at: Instant::now(), tick }),
            turns: calls::Turns::default(),
            standstills: Standstills::default(),
            greetings: Standstills::default(),
            versions: versions::Versions::default(),
        })
    }

    /// The connection.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The QEMU process of a domain: number, start and boot in one string; nothing if it does not run or is not known.
    pub async fn qemu_instance(&self, domain: uuid::Uuid) -> Option<String> {
        let process = self.glance(&DomainId(domain), "QEMU process", |d| d.qemu_process()).await.ok()??;
        Some(calls::instance_name(&process))
    }

    /// All domains in brief, by name.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub async fn overview(&self) -> HvResult<Vec<Overview>> {
        self.look_over().await
    }

    /// Whether there is a connection, and why not.
    ///
    /// # Errors
    /// Why there is none.
    pub fn reachable(&self) -> HvResult<()> {
        match self.client.status() {
            Status::Connected { .. } => Ok(()),
            Status::Disconnected { error: Some(error) } => {
                Err(HvError::new(Trouble::Unreachable, error.message.clone()))
            }
            Status::Disconnected { error: None } => {
                Err(HvError::new(Trouble::Unreachable, "the connection is being made"))
            }
        }
    }
}

/// Which boot of the host this is. A test can say that there has been another.
#[must_use]
pub(crate) fn this_boot() -> Option<String> {
    #[cfg(feature = "crash-points")]
    if let Ok(boot) = std::env::var("VMKEEP_TEST_BOOT") {
        return Some(boot);
    }
    vmkeep_libvirt::instance::boot_id().ok()
}

#[async_trait]
impl Hypervisor for Libvirt {
    async fn environment(&self) -> HvResult<BTreeMap<String, String>> {
        self.reachable()?;
        self.ask_versions().await?;
        Ok(self.instances())
    }

    async fn own_folders(&self) -> HvResult<OwnFolders> {
        self.folders_of_libvirt().await
    }

    async fn domains(&self) -> HvResult<Vec<DomainRef>> {
        let list = self
            .look("list domains", |c| {
                let all = c.domains(ListFlags::NONE)?;
                Ok(all.iter().map(|d| (d.uuid(), d.name().to_owned())).collect::<Vec<_>>())
            })
            .await?;
        let mut list: Vec<DomainRef> =
            list.into_iter().map(|(uuid, name)| DomainRef { id: DomainId(uuid), name }).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    async fn find(&self, name: &str) -> HvResult<DomainRef> {
        let all = self.domains().await?;
        observe::pick(name, &all)
    }

    async fn observe(&self, domain: &DomainId) -> HvResult<Observation> {
        self.observe_all(domain, true).await
    }

    async fn observe_from_outside(&self, domain: &DomainId) -> HvResult<Observation> {
        self.observe_all(domain, false).await
    }

    async fn marker(&self, domain: &DomainId) -> HvResult<Option<Marker>> {
        // Of a running domain libvirt gives the live definition. It asks QEMU for nothing.
        let text = self.glance(domain, "marker", |d| d.xml(XmlFlags::NONE)).await?;
        let xml = DomainXml::parse(&text).map_err(|e| definition::broken(&e))?;
        Ok(marker::read(&xml))
    }

    async fn state(&self, domain: &DomainId) -> HvResult<RunState> {
        self.glance(domain, "state", |d| d.state()).await.map(observe::run_state)
    }

    async fn qemu(&self, domain: &DomainId) -> HvResult<Option<Qemu>> {
        self.ask_qemu(domain).await
    }

    async fn control(&self, domain: &DomainId) -> HvResult<Control> {
        let control = self.glance(domain, "control", |d| d.control()).await?;
        Ok(match control {
            vmkeep_libvirt::Control::Idle => Control::Idle,
            vmkeep_libvirt::Control::Busy { for_ms } => Control::Busy { for_ms },
            vmkeep_libvirt::Control::Broken => Control::Broken,
        })
    }

    async fn domain_job(&self, domain: &DomainId) -> HvResult<Option<DomainJob>> {
        let stats = self.look_at(domain, "job", |d| d.job_stats(JobStatsFlags::NONE)).await?;
        Ok(observe::domain_job(&stats))
    }

    async fn abort_domain_job(&self, domain: &DomainId) -> HvResult<()> {
        match self.urgent(domain, "abort the job", |d| d.abort_job()).await {
            // Nothing to abort: "no job is active on the domain".
            Err(e) if e.trouble == Trouble::Refused && e.message.contains("no job is active") => Ok(()),
            Err(e) if e.trouble == Trouble::NotRunning => Ok(()),
            other => other,
        }
    }

    async fn stragglers(&self, domain: &DomainId) -> HvResult<Option<String>> {
        self.find_stragglers(domain).await
    }

    async fn redefine_disks(&self, domain: &DomainId, change: &DiskChange) -> HvResult<()> {
        self.change_disks(domain, change.clone()).await
    }

    async fn sync_definitions(&self) -> HvResult<()> {
        self.sync_folders().await
    }

    async fn set_marker(&self, domain: &DomainId, marker: &Marker) -> HvResult<()> {
        let xml = marker::write(marker).map_err(|e| definition::broken(&e))?;
        self.change(domain, "set the marker", move |d| marker::set_everywhere(d, &xml)).await?;
        self.sync_folders().await
    }

    async fn set_hold(&self, domain: &DomainId, marker: &Marker) -> HvResult<()> {
        let xml = marker::write(marker).map_err(|e| definition::broken(&e))?;
        self.urgent(domain, "set the hold", move |d| {
            d.set_metadata(MARKER_NAMESPACE, marker::PREFIX, Some(&xml), ImpactFlags::LIVE)
        })
        .await
    }

    async fn clear_marker(&self, domain: &DomainId) -> HvResult<()> {
        self.change(domain, "remove the marker", marker::clear_everywhere).await?;
        self.sync_folders().await
    }

    async fn take(&self, domain: &DomainId, take: &Take) -> HvResult<()> {
        self.take_snapshot(domain, take.clone()).await
    }

    async fn save(&self, domain: &DomainId, file: &Path) -> HvResult<()> {
        self.save_guest(domain, file).await
    }

    async fn note(&self, domain: &DomainId, marker: &Marker) -> HvResult<()> {
        self.note_durably(domain, marker).await
    }

    fn reloaded_definition(&self, xml: &str, disks: &[(Target, Layer)], marker: &Marker) -> HvResult<String> {
        saving::reloaded(xml, disks, marker)
    }

    async fn bitmaps(&self, domain: &DomainId, image: &Path) -> HvResult<Vec<Bitmap>> {
        self.bitmaps_of(domain, image).await
    }

    async fn suspend(&self, domain: &DomainId) -> HvResult<()> {
        self.urgent(domain, "suspend", |d| d.suspend()).await
    }

    fn standstills(&self) -> Option<&Standstills> {
        Some(&self.standstills)
    }

    fn greetings(&self) -> Option<&Standstills> {
        Some(&self.greetings)
    }

    async fn resume(&self, domain: &DomainId) -> HvResult<()> {
        self.urgent(domain, "resume", |d| {
            if observe::run_state(d.state()?) == RunState::Running { Ok(()) } else { d.resume() }
        })
        .await
    }

    async fn freeze_state(&self, domain: &DomainId) -> HvResult<FreezeState> {
        let answer = self.ask_agent(domain, r#"{"execute":"guest-fsfreeze-status"}"#).await?;
        observe::freeze_state(&answer)
    }

    async fn freeze(&self, domain: &DomainId) -> HvResult<u32> {
        self.change(domain, "freeze", |d| d.fs_freeze(&[])).await
    }

    async fn thaw(&self, domain: &DomainId) -> HvResult<u32> {
        self.urgent(domain, "thaw", |d| d.fs_thaw()).await
    }

    async fn commit_begin(&self, domain: &DomainId, commit: &Commit) -> HvResult<()> {
        self.begin_commit(domain, commit.clone()).await
    }

    async fn commit_pivot(&self, domain: &DomainId, commit: &Commit) -> HvResult<()> {
        self.pivot_commit(domain, commit.clone()).await
    }

    async fn commit_abort(&self, domain: &DomainId, commit: &Commit) -> HvResult<()> {
        self.abort_commit(domain, commit.clone()).await
    }

    async fn close_unused(&self, domain: &DomainId, files: &[PathBuf]) -> HvResult<()> {
        self.close_files(domain, files.to_vec()).await
    }

    async fn memory_image_definition(&self, path: &Path) -> HvResult<String> {
        let path = definition::path_text(path)?.to_owned();
        self.look("read the memory image", move |c| c.save_image_xml(&path, SaveImageXmlFlags::SECURE)).await
    }

    async fn define_new(&self, xml: &str) -> HvResult<DomainRef> {
        self.define_another(xml.to_owned()).await
    }

    async fn undefine(&self, domain: &DomainId) -> HvResult<()> {
        let removed = self
            .change(domain, "undefine", |d| {
                if d.is_active()? {
                    return Ok(false);
                }
                // With no more than this flag libvirt refuses as long as anything else hangs on the definition.
                d.undefine(UndefineFlags::KEEP_NVRAM).map(|()| true)
            })
            .await;
        match removed {
            Ok(true) => self.sync_folders().await,
            Ok(false) => Err(HvError::new(Trouble::Busy, "the domain runs")),
            Err(e) if e.trouble == Trouble::NoSuchDomain => self.sync_folders().await,
            Err(e) => Err(e),
        }
    }

    async fn start(&self, domain: &DomainId, paused: bool) -> HvResult<()> {
        self.change(domain, "start", move |d| {
            if d.is_active()? {
                return Ok(());
            }
            d.start(CreateFlags::NONE.with(CreateFlags::PAUSED, paused))
        })
        .await
    }

    async fn start_from_memory(&self, image: &Path, xml: &str, paused: bool) -> HvResult<()> {
        self.load_memory(image, xml, paused).await
    }

    async fn memory_image_head(&self, image: &Path, xml: &str) -> HvResult<Vec<u8>> {
        restored::head(image, xml).await
    }

    async fn pull_links(&self, domain: &DomainId) -> HvResult<u32> {
        self.pull_cables(domain).await
    }

    async fn set_autostart(&self, domain: &DomainId, on: bool) -> HvResult<()> {
        self.change(domain, "set autostart", move |d| d.set_autostart(on)).await?;
        self.sync_folders().await
    }

    async fn destroy(&self, domain: &DomainId) -> HvResult<()> {
        let ended =
            self.change(domain, "destroy", |d| {
                if d.is_active()? { d.destroy(DestroyFlags::NONE) } else { Ok(()) }
            })
            .await;
        match ended {
            Err(e) if e.trouble == Trouble::NotRunning => Ok(()),
            other => other,
        }
    }

    async fn shutdown(&self, domain: &DomainId) -> HvResult<()> {
        self.ask_to_shut_down(domain).await
    }

    async fn save_memory(&self, domain: &DomainId, path: &Path) -> HvResult<()> {
        self.save_to(domain, path).await
    }

    async fn redefine(&self, domain: &DomainId, xml: &str) -> HvResult<()> {
        self.replace_definition(domain, xml).await
    }

    async fn take_managed_save(&self, domain: &DomainId, to: &Path) -> HvResult<bool> {
        self.keep_managed_save(domain, to).await
    }

    async fn give_managed_save(&self, domain: &DomainId, from: &Path) -> HvResult<()> {
        self.return_managed_save(domain, from).await
    }

    async fn checkpoint_definitions(&self, domain: &DomainId) -> HvResult<Vec<(String, String)>> {
        self.read_checkpoints(domain).await
    }

    async fn forget_checkpoints(&self, domain: &DomainId) -> HvResult<()> {
        self.drop_checkpoints(domain).await
    }

    async fn give_checkpoint(&self, domain: &DomainId, name: &str, xml: &str) -> HvResult<()> {
        self.return_checkpoint(domain, name, xml).await
    }

    async fn socket_folder(&self, domain: &DomainId) -> HvResult<PathBuf> {
        self.folder_of_sockets(domain).await
    }

    async fn pull_begin(&self, domain: &DomainId, pull: &Pull) -> HvResult<()> {
        self.begin_pull(domain, pull.clone()).await
    }

    async fn pulling(&self, domain: &DomainId) -> HvResult<Pulling> {
        self.look_at_pulls(domain).await
    }

    async fn pull_clean(&self, domain: &DomainId, scratch: &[PathBuf]) -> HvResult<()> {
        self.clean_after_pull(domain, scratch).await
    }

    async fn delete_checkpoint(&self, domain: &DomainId, name: &str) -> HvResult<()> {
        self.remove_checkpoint(domain, name).await
    }

    fn with_marker(&self, xml: &str, marker: &Marker) -> HvResult<String> {
        machine::marked(xml, marker)
    }

    fn rewrite_definition(&self, xml: &str, identity: &NewIdentity) -> HvResult<String> {
        definition::rewrite(xml, identity)
    }

    fn definition_changes(&self, old: &str, new: &str) -> HvResult<Vec<String>> {
        restored::changes(old, new)
    }

    fn parse_definition(&self, xml: &str) -> HvResult<Definition> {
        definition::read(xml)
    }
}
