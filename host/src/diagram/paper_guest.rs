//! The guest on paper: what planners ask is answered, and whatever would change something is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vmkeep_steps::hypervisor::{
    Backing, Commit, Control, Definition, Devices, DiskChange, DiskDef, DiskDevice, DiskSource, DomainId,
    DomainJob, DomainRef, FileId, FreezeState, HvError, HvResult, Hypervisor, Image, Layer, Marker,
    NewIdentity, Observation, OverlaySpec, OwnFolders, Pulling, Qemu, QemuDisk, RunState, Space, Storage,
    Take, Target, Trouble,
};

use super::sketch::{GIB, KEPT};

pub(super) fn guest() -> DomainRef {
    DomainRef { id: DomainId(Uuid::from_u128(0x0123_4567)), name: "GUEST".to_owned() }
}

/// The guest on paper.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) folder: PathBuf,
}

impl Guest {
    fn layer(&self, target: &str) -> Layer {
        Layer { path: self.folder.join(format!("{target}.raw")), format: "raw".to_owned() }
    }

    fn definition(&self) -> Definition {
        self.definition_in("")
    }

    /// The definition with its disks in a folder of its own.
    fn definition_in(&self, folder: &str) -> Definition {
        let disk = |target: &str| DiskDef {
            target: target.into(),
            device: DiskDevice::Disk,
            source: DiskSource::File(self.folder.join(folder).join(format!("{target}.raw"))),
            format: Some("raw".to_owned()),
            backing: Backing::Probed,
            read_only: false,
            shareable: false,
            transient: false,
            encrypted: false,
            mirror: None,
        };
        Definition {
            xml: String::new(),
            bare: String::new(),
            disks: vec![disk("vda"), disk("vdb")],
            devices: Devices { memory: GIB, agent: true, ..Devices::default() },
        }
    }
}

fn refused<T>() -> HvResult<T> {
    Err(HvError::new(Trouble::Unsupported, "this guest exists on paper only"))
}

#[async_trait]
impl Hypervisor for Guest {
    async fn environment(&self) -> HvResult<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }
    async fn own_folders(&self) -> HvResult<OwnFolders> {
        refused()
    }
    async fn domains(&self) -> HvResult<Vec<DomainRef>> {
        Ok(vec![guest()])
    }
    async fn find(&self, _: &str) -> HvResult<DomainRef> {
        Err(HvError::new(Trouble::NoSuchDomain, "there is no such domain"))
    }
    async fn observe(&self, _: &DomainId) -> HvResult<Observation> {
        let disk = |target: &str| QemuDisk {
            target: Target(target.to_owned()),
            chain: vec![self.layer(target)],
            read_only: false,
        };
        Ok(Observation {
            domain: guest(),
            state: RunState::Running,
            persistent: Some(self.definition()),
            live: Some(self.definition()),
            qemu: Some(Qemu {
                instance: "paper".to_owned(),
                disks: vec![disk("vda"), disk("vdb")],
                jobs: Vec::new(),
                open: Vec::new(),
            }),
            marker: None,
            persistent_marker: None,
            managed_save: false,
            autostart: false,
            saved: None,
            crashed: false,
            snapshots: Vec::new(),
            checkpoints: Vec::new(),
        })
    }
    async fn state(&self, _: &DomainId) -> HvResult<RunState> {
        Ok(RunState::Running)
    }
    async fn qemu(&self, _: &DomainId) -> HvResult<Option<Qemu>> {
        refused()
    }
    async fn control(&self, _: &DomainId) -> HvResult<Control> {
        Ok(Control::Idle)
    }
    async fn pulling(&self, _: &DomainId) -> HvResult<Pulling> {
        Ok(Pulling::default())
    }
    async fn domain_job(&self, _: &DomainId) -> HvResult<Option<DomainJob>> {
        Ok(None)
    }
    async fn abort_domain_job(&self, _: &DomainId) -> HvResult<()> {
        refused()
    }
    async fn stragglers(&self, _: &DomainId) -> HvResult<Option<String>> {
        Ok(None)
    }
    async fn redefine_disks(&self, _: &DomainId, _: &DiskChange) -> HvResult<()> {
        refused()
    }
    async fn sync_definitions(&self) -> HvResult<()> {
        refused()
    }
    async fn set_marker(&self, _: &DomainId, _: &Marker) -> HvResult<()> {
        refused()
    }
    async fn set_hold(&self, _: &DomainId, _: &Marker) -> HvResult<()> {
        refused()
    }
    async fn clear_marker(&self, _: &DomainId) -> HvResult<()> {
        refused()
    }
    async fn take(&self, _: &DomainId, _: &Take) -> HvResult<()> {
        refused()
    }
    async fn suspend(&self, _: &DomainId) -> HvResult<()> {
        refused()
    }
    async fn resume(&self, _: &DomainId) -> HvResult<()> {
        refused()
    }
    async fn freeze_state(&self, _: &DomainId) -> HvResult<FreezeState> {
        refused()
    }
    async fn freeze(&self, _: &DomainId) -> HvResult<u32> {
        refused()
    }
    async fn thaw(&self, _: &DomainId) -> HvResult<u32> {
        refused()
    }
    async fn commit_begin(&self, _: &DomainId, _: &Commit) -> HvResult<()> {
        refused()
    }
    async fn commit_pivot(&self, _: &DomainId, _: &Commit) -> HvResult<()> {
        refused()
    }
    async fn commit_abort(&self, _: &DomainId, _: &Commit) -> HvResult<()> {
        refused()
    }
    async fn close_unused(&self, _: &DomainId, _: &[PathBuf]) -> HvResult<()> {
        refused()
    }
    async fn memory_image_definition(&self, _: &Path) -> HvResult<String> {
        Ok(String::new())
    }
    async fn memory_image_head(&self, _: &Path, _: &str) -> HvResult<Vec<u8>> {
        refused()
    }
    async fn pull_links(&self, _: &DomainId) -> HvResult<u32> {
        refused()
    }
    async fn define_new(&self, _: &str) -> HvResult<DomainRef> {
        refused()
    }
    async fn undefine(&self, _: &DomainId) -> HvResult<()> {
        refused()
    }
    async fn start(&self, _: &DomainId, _: bool) -> HvResult<()> {
        refused()
    }
    async fn start_from_memory(&self, _: &Path, _: &str, _: bool) -> HvResult<()> {
        refused()
    }
    async fn set_autostart(&self, _: &DomainId, _: bool) -> HvResult<()> {
        refused()
    }
    async fn destroy(&self, _: &DomainId) -> HvResult<()> {
        refused()
    }
    fn rewrite_definition(&self, _: &str, _: &NewIdentity) -> HvResult<String> {
        Ok(String::new())
    }
    fn definition_changes(&self, _: &str, _: &str) -> HvResult<Vec<String>> {
        Ok(Vec::new())
    }
    fn parse_definition(&self, xml: &str) -> HvResult<Definition> {
        Ok(self.definition_in(if xml == KEPT { "kept" } else { "" }))
    }
}

#[async_trait]
impl Storage for Guest {
    async fn inspect(&self, _: &Layer) -> HvResult<Option<Image>> {
        refused()
    }
    async fn create_overlay(&self, _: &OverlaySpec) -> HvResult<Image> {
        refused()
    }
    async fn remove(&self, _: &Path, _: FileId) -> HvResult<bool> {
        refused()
    }
    async fn commit_offline(&self, _: &Layer, _: &Layer, _: &CancellationToken) -> HvResult<()> {
        refused()
    }
    async fn space(&self, _: &Path) -> HvResult<Space> {
        Ok(Space { total: 1024 * GIB, free: 1024 * GIB, dev: 0 })
    }
    async fn flush(&self, _: &Path) {}
}
