//! A guest that exists on paper: two disks on a common base, memory, an agent. Enough for planners, good for nothing
//! else: whatever would change something is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use uuid::Uuid;
use vmkeep_steps::backup::left::LeftLeases;
use vmkeep_steps::backup::{Asked, Backup, BackupOptions, BackupSettings};
use vmkeep_steps::deletion::options::Chosen;
use vmkeep_steps::deletion::workflow::{DELETE, PRUNE};
use vmkeep_steps::deletion::{DeleteOptions, Deletion, PruneOptions, Users};
use vmkeep_steps::hypervisor::FileId;
use vmkeep_steps::image::copy::Identity;
use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::root::{Component, Roots};
use vmkeep_steps::inplace::kept::{KeptDisk, Was};
use vmkeep_steps::inplace::undo::RestoreUndo;
use vmkeep_steps::inplace::{self, InPlaceOptions, InPlaceSettings, Kept, Rest, RestoreInPlace, UndoOptions};
use vmkeep_steps::manifest::{
    self, BackupId, Consistency, Disk, FileEntry, Manifest, Memory, Role, SavedMemory,
};
use vmkeep_steps::reconcile::Sweep;
use vmkeep_steps::reconcile::sweep::Jobs;
use vmkeep_steps::reconcile::workflow::{Repair, RepairOptions};
use vmkeep_steps::restore::from_vault::{self, VaultRestore, VaultRestoreOptions};
use vmkeep_steps::restore::{Restore, RestoreOptions, RestoreSettings, Then};
use vmkeep_steps::save::AfterReboot;
use vmkeep_steps::snapshot::freeze::FreezePolicy;
use vmkeep_steps::snapshot::{Places, World};
use vmkeep_steps::vaults::Vaults;
use vmkeep_steps::workflows::snapshot::{
    self as live, MemoryOptions, Phase, SaveOptions, Settings, Snapshot, SnapshotOptions, Waits,
};
use vmkeep_vault::ids::DomainId as VaultDomain;
use vmkeep_workflow::{
    Actor, Event, Fault, IfBusy, JobId, JobRequest, JobStatus, JobSummary, Plan, PlanContext, Registry, Seq,
    Subject, Workflow, WorkflowName,
};

use super::paper_guest::{Guest, guest};
use super::paper_vault::PaperVault;
use crate::codes;

pub(super) const GIB: u64 = 1 << 30;
/// The definition of the machine that is kept aside.
pub(super) const KEPT: &str = "<kept/>";

/// The paper.
pub(super) struct Scene {
    folder: PathBuf,
    job: JobId,
    guest: Arc<Guest>,
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn fault(error: &dyn std::fmt::Display) -> Fault {
    Fault::permanent(codes::UNDEFINED_ERROR, "draw the workflows", "", error)
}

impl Scene {
    /// Images that hold nothing, in a folder that is gone afterwards.
    pub(super) fn new() -> Result<Self, Fault> {
        let folder = std::env::temp_dir().join(format!("vmkeep-diagram-{}", Uuid::new_v4().simple()));
        let made = || {
            std::fs::create_dir_all(folder.join("root/backup"))?;
            std::fs::create_dir_all(folder.join("root/older"))?;
            std::fs::create_dir_all(folder.join("kept"))?;
            for name in ["vda.raw", "vdb.raw", "kept/vda.raw", "kept/vdb.raw"] {
                std::fs::File::create(folder.join(name))?.set_len(2 * GIB)?;
            }
            Ok::<_, std::io::Error>(())
        };
        made().map_err(|e| fault(&e))?;
        backup(&folder.join("root"), "backup", 7)?;
        backup(&folder.join("root"), "older", 6)?;
        let guest = Arc::new(Guest { folder: folder.clone() });
        Ok(Self { folder, job: JobId::from(Uuid::from_u128(0x1234_5678_9abc)), guest })
    }

    fn world(&self) -> World {
        World { hypervisor: self.guest.clone(), storage: self.guest.clone() }
    }

    /// The representative plans, by name.
    pub(super) async fn plans(&self) -> Result<Vec<(&'static str, Plan)>, Fault> {
        let roots = Roots::open([self.folder.join("root")]).map_err(|e| fault(&e))?;
        let roots = Arc::new(roots);
        let places = Places { roots: roots.clone() };
        let snapshot = Snapshot::new(self.world(), places.clone(), Settings::new("store", "vmkeep"));
        let options = |memory: Option<MemoryOptions>| SnapshotOptions {
            target: self.folder.join("root"),
            memory,
            freeze: FreezePolicy::IfPossible,
            disks: Vec::new(),
            bandwidth: 0,
            merge_bandwidth: 0,
            save: None,
            after_reboot: AfterReboot::default(),
            waits: None,
            keep: None,
        };
        let with_memory = self.plan(&snapshot, live::NAME, &options(Some(MemoryOptions::default()))).await?;
        let disks_only = self.plan(&snapshot, live::NAME, &options(None)).await?;
        let saving = SnapshotOptions {
            save: Some(SaveOptions::default()),
            waits: Some(Waits { before: vec![Phase::Retain, Phase::Merge], limit_ms: 1_800_000 }),
            ..options(None)
        };
        let saving = self.plan(&snapshot, live::NAME, &saving).await?;
        let verify = crate::verify::Options {
            backup: "ID".to_owned(),
            folder: self.folder.join("root"),
            published: None,
            depth: vmkeep_steps::manifest::Depth::Full,
            bandwidth: 0,
        };
        let verify = self.plan(&crate::verify::Verify, crate::verify::NAME, &verify).await?;
        let delete = DeleteOptions {
            backups: [("backup", 7), ("older", 6)]
                .map(|(name, id)| Chosen {
                    backup: BackupId(Uuid::from_u128(id)),
                    folder: self.folder.join("root").join(name),
                })
                .into(),
            last_copy: true,
        };
        let prune = PruneOptions { keep: 1, successor: None, bandwidth: 0 };
        let registry = Deletion::new(places.clone(), Arc::new(Nobody)).register(Registry::new());
        let recipe = |name: &'static str| {
            registry
                .find_workflow(&WorkflowName::from(name))
                .ok_or_else(|| fault(&"there is no such workflow"))
        };
        let delete = self.plan(&*recipe(DELETE)?, DELETE, &delete).await?;
        let prune = self.plan(&*recipe(PRUNE)?, PRUNE, &prune).await?;
        let leftovers = [
            Sweep::Free,
            Sweep::Unmark,
            Sweep::Overlay { path: "/images/OVERLAY".into(), id: FileId { dev: 1, ino: 1 } },
            Sweep::Folder("/backups/UNPUBLISHED".into()),
        ];
        let repair = RepairOptions {
            leftovers: leftovers.map(|sweep| (JobId::from(Uuid::from_u128(9)), sweep)).into(),
        };
        let recipe = Repair::new(self.world(), places.clone(), Arc::new(Over), "store".to_owned());
        let repair = self.plan(&recipe, vmkeep_steps::reconcile::workflow::NAME, &repair).await?;
        let restore = Restore::new(self.world(), places, RestoreSettings::default());
        let options = |cold: bool, then: Then| RestoreOptions {
            backup: self.folder.join("root/backup"),
            outside: false,
            trusted: false,
            name: "COPY".to_owned(),
            folder: Some(self.folder.join("root/restored")),
            disks: BTreeMap::new(),
            cold,
            then,
            connect: false,
            autostart: false,
            bandwidth: 0,
        };
        let name = vmkeep_steps::restore::workflow::NAME;
        let warm = self.plan(&restore, name, &options(false, Then::Running)).await?;
        let cold = self.plan(&restore, name, &options(true, Then::Default)).await?;
        let vaulted = Box::pin(self.vaulted(&roots)).await?;
        let exchange = self.exchange(&roots)?;
        let options = InPlaceOptions {
            backup: self.folder.join("root/backup"),
            outside: false,
            trusted: false,
            disks: Vec::new(),
            folder: None,
            cold: false,
            definition: false,
            rest: Rest::default(),
            then: Then::Default,
            bandwidth: 0,
        };
        let in_place = self.plan(&exchange, inplace::workflow::NAME, &options).await?;
        let options = UndoOptions { job: self.job, cold: false, rest: Rest::default(), then: Then::Default };
        let undo = self.plan(&RestoreUndo(exchange), inplace::undo::NAME, &options).await?;
        let [backup, restore_vault] = vaulted;
        Ok(vec![
            ("backup", backup),
            ("restore-vault", restore_vault),
            ("snapshot", with_memory),
            ("snapshot-disk-only", disks_only),
            ("snapshot-save", saving),
            ("restore", warm),
            ("restore-cold", cold),
            ("restore-in-place", in_place),
            ("restore-undo", undo),
            ("verify", verify),
            ("delete", delete),
            ("prune", prune),
            ("repair", repair),
        ])
    }

    /// A backup into a vault, and a restore from there.
    async fn vaulted(&self, roots: &Arc<Roots>) -> Result<[Plan; 2], Fault> {
        let domain = VaultDomain::new(*guest().id.0.as_bytes());
        let vault = Box::pin(PaperVault::new(domain, &guest().name, 2 * GIB)).await.map_err(|e| fault(&e))?;
        let backup = vault.backup;
        let vaults: Arc<dyn Vaults> = Arc::new(vault);
        let recipe = Backup::new(
            self.world(),
            vaults.clone(),
            LeftLeases::new(Arc::new(Over)),
            BackupSettings::new("store", "vmkeep"),
        );
        let options = BackupOptions {
            vault: "VAULT".to_owned(),
            kind: Asked::Auto,
            freeze: FreezePolicy::IfPossible,
            disks: Vec::new(),
            bandwidth: 0,
            allow_plaintext: false,
        };
        let made = self.plan(&recipe, vmkeep_steps::backup::NAME, &options).await?;
        let places = Places { roots: roots.clone() };
        let recipe = VaultRestore::new(self.world(), places, vaults, RestoreSettings::default());
        let options = VaultRestoreOptions {
            vault: "VAULT".to_owned(),
            backup,
            domain,
            unchecked: false,
            trusted: false,
            name: "COPY".to_owned(),
            folder: Some(self.folder.join("root/restored")),
            disks: BTreeMap::new(),
            format: Format::Raw,
            then: Then::Running,
            connect: false,
            autostart: false,
            bandwidth: 0,
        };
        Ok([made, self.plan(&recipe, from_vault::workflow::NAME, &options).await?])
    }

    /// Exchanges of machines, with one that is kept aside.
    fn exchange(&self, roots: &Arc<Roots>) -> Result<RestoreInPlace, Fault> {
        let root = self.folder.join("root");
        let kept = inplace::kept::folder_of(&root, self.job);
        let disk = |target: &str| {
            let path = self.folder.join("kept").join(format!("{target}.raw"));
            let identity = Identity::at(&path).map_err(|e| fault(&e))?;
            let chain = vec![path.clone()];
            let target = target.into();
            Ok::<_, Fault>(KeptDisk {
                target,
                path,
                format: "raw".to_owned(),
                chain,
                identity,
                replaced: true,
            })
        };
        let record = Kept {
            version: 1,
            job: self.job,
            at: Timestamp::UNIX_EPOCH,
            domain: guest(),
            because: "a restore".to_owned(),
            was: Was::Running,
            definition: blake3::hash(KEPT.as_bytes()).into(),
            disks: vec![disk("vda")?, disk("vdb")?],
            memory: false,
            managed_save: false,
            checkpoints: Vec::new(),
            variables: None,
            tpm: None,
        };
        let record = serde_json::to_vec(&record).map_err(|e| fault(&e))?;
        let written = std::fs::create_dir_all(&kept)
            .and_then(|()| std::fs::write(kept.join(inplace::kept::RECORD), record))
            .and_then(|()| std::fs::write(kept.join(inplace::kept::DEFINITION), KEPT));
        written.map_err(|e| fault(&e))?;
        let restore = RestoreSettings::default();
        let settings = InPlaceSettings { store: "store".to_owned(), restored: root, restore };
        Ok(RestoreInPlace::new(self.world(), Places { roots: roots.clone() }, settings))
    }

    async fn plan<O: serde::Serialize + Sync>(
        &self,
        workflow: &dyn Workflow,
        name: &'static str,
        options: &O,
    ) -> Result<Plan, Fault> {
        // The subject of a restore is the new domain.
        let new = [vmkeep_steps::restore::workflow::NAME, from_vault::workflow::NAME];
        let subject = if new.contains(&name) {
            Subject { id: Uuid::from_u128(8).to_string(), label: "COPY".to_owned() }
        } else {
            Subject { id: guest().id.to_string(), label: guest().name }
        };
        let request = JobRequest {
            workflow: WorkflowName::from(name),
            subject,
            options: serde_json::to_value(options).map_err(|e| fault(&e))?,
            key: None,
            by: Actor { who: String::new(), why: Some(String::new()) },
            if_busy: IfBusy::Refuse,
            limits: Vec::new(),
            retry_of: None,
        };
        workflow.plan(&PlanContext { job: self.job, request: Arc::new(request), dry_run: true }).await
    }

    /// A text without what differs from run to run.
    pub(super) fn anonymous(&self, text: &str) -> String {
        let root = self.folder.join("root").display().to_string();
        let text = text.replace(&root, "ROOT").replace(&self.folder.display().to_string(), "/images");
        let job = self.job.short();
        let mut out = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(at) = rest.find(&job) {
            // A folder's name of time and job, or the job alone.
            let time = at.checked_sub(17).filter(|from| {
                rest.as_bytes()[at - 2] == b'Z'
                    && rest.get(*from..).is_some_and(|time| time.starts_with("20"))
            });
            out.push_str(&rest[..time.unwrap_or(at)]);
            out.push_str(if time.is_some() { "TIME-JOB" } else { "JOB" });
            rest = &rest[at + job.len()..];
        }
        out.push_str(rest);
        out
    }
}

/// Nobody needs a backup.
struct Nobody;

#[async_trait]
impl Users for Nobody {
    async fn of(&self, _: &Path, _: BackupId) -> Result<Option<String>, Fault> {
        Ok(None)
    }
}

/// One job, which was given up.
struct Over;

#[async_trait]
impl Jobs for Over {
    async fn all(&self) -> Result<Vec<JobSummary>, Fault> {
        let now = Timestamp::UNIX_EPOCH;
        Ok(vec![JobSummary {
            job: JobId::from(Uuid::from_u128(9)),
            workflow: WorkflowName::from(live::NAME),
            subject: Subject { id: guest().id.to_string(), label: guest().name },
            title: String::new(),
            status: JobStatus::Abandoned,
            by: Actor { who: "vmkeep".to_owned(), why: None },
            requested: now,
            updated: now,
            ended: Some(now),
            seq: Seq(9),
            steps: 0,
            steps_done: 0,
            fault: None,
            items: Vec::new(),
        }])
    }

    async fn history(&self, _: JobId) -> Result<Vec<Event>, Fault> {
        Ok(Vec::new())
    }
}

/// A backup that holds nothing, in a folder below a root; one with a higher id is newer.
fn backup(root: &Path, name: &str, id: u8) -> Result<(), Fault> {
    let roots = Roots::open([root]).map_err(|e| fault(&e))?;
    let folder = roots.open_folder(&root.join(name)).map_err(|e| fault(&e))?;
    let mut files = Vec::new();
    let mut file = |name: &str, role: Role, bytes: &[u8]| {
        std::fs::write(folder.path().join(name), bytes).map_err(|e| fault(&e))?;
        let image = role == Role::Disk;
        let name = Component::new(name).map_err(|e| fault(&e))?;
        files.push(FileEntry {
            name: name.clone(),
            role,
            size: bytes.len() as u64,
            blake3: blake3::hash(bytes).into(),
            source_blake3: None,
            format: image.then_some(Format::Raw),
            virtual_size: image.then_some(bytes.len() as u64),
            backing: None,
            source: None,
            rights: None,
            unknown: BTreeMap::new(),
        });
        Ok::<_, Fault>(name)
    };
    let image = vec![0; 4096];
    let (a, b) = (file("vda.raw", Role::Disk, &image)?, file("vdb.raw", Role::Disk, &image)?);
    let definition = file("domain.xml", Role::Definition, b"<domain/>")?;
    let memory = file("memory", Role::Memory, b"LibvirtQemudSave")?;
    let disk = |target: &str, name: Component| Disk {
        target: target.to_owned(),
        virtual_size: 4096,
        chain: vec![name],
        unknown: BTreeMap::new(),
    };
    let manifest = Manifest {
        format: manifest::FORMAT.to_owned(),
        version: manifest::VERSION,
        min_reader: manifest::MIN_READER,
        backup: BackupId(Uuid::from_u128(id.into())),
        job: Uuid::from_u128(id.into()),
        tool: "vmkeep".to_owned(),
        point_in_time: Timestamp::from_second(id.into()).unwrap_or_default(),
        finished: Timestamp::UNIX_EPOCH,
        domain: manifest::Domain {
            uuid: guest().id.0,
            name: guest().name,
            machine: None,
            arch: None,
            memory: Some(GIB),
            unknown: BTreeMap::new(),
        },
        host: manifest::Host::default(),
        definition: manifest::Definition { inactive: definition, live: None },
        consistency: Consistency::MemoryAndDisks,
        disks: vec![disk("vda", a), disk("vdb", b)],
        memory: Memory::Saved(SavedMemory {
            file: memory,
            version: 2,
            compression: "raw".to_owned(),
            downtime_ms: None,
            unknown: BTreeMap::new(),
        }),
        nvram: None,
        tpm: None,
        autostart: None,
        left_out: Vec::new(),
        files,
        warnings: Vec::new(),
        unknown: BTreeMap::new(),
    };
    manifest::publish(&folder, &manifest).map_err(|e| fault(&e))?;
    Ok(())
}
