//! The list. A workflow that is added here is put through every family; the test
//! `every_workflow_of_the_product_is_simulated` fails as long as one is missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use replay_tests::testbed::files_in;
use serde_json::{Value, json};
use vmkeep_steps::hypervisor::fake::{DISK_SIZE, Fake};
use vmkeep_steps::hypervisor::{DomainRef, Hypervisor, Layer, Marker, OverlaySpec, Storage};
use vmkeep_steps::image::root::TargetRoot;
use vmkeep_steps::manifest::catalogue;
use vmkeep_steps::reconcile::Sweep;
use vmkeep_steps::reconcile::workflow::RepairOptions;
use vmkeep_steps::simulation::{Order, Place, Witness};
use vmkeep_steps::snapshot::disk::overlay_path;
use vmkeep_store::MemoryStore;
use vmkeep_workflow::event::{IfBusy, JobRequest, Subject};
use vmkeep_workflow::{Actor, EventStore, JobId};

use super::vault;

/// What the domain does when the job begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    Running,
    Off,
    /// Off, with its memory saved by libvirt.
    Saved,
}

/// What the job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// One backup more, and the domain as it was.
    Backup,
    /// The same in the vault.
    IntoVault,
    /// Another domain.
    Another,
    /// Other disks under the domain.
    Exchange,
    /// What was kept aside goes.
    Discard,
    /// So many backups less.
    Fewer(usize),
    /// What a job that is over has left goes.
    Tidy,
    /// Nothing changes.
    Look,
}

/// A workflow, in a situation.
pub struct Scenario {
    pub name: &'static str,
    pub workflow: &'static str,
    pub formats: &'static [&'static str],
    pub agent: bool,
    /// With firmware variables and a TPM.
    pub sealed: bool,
    pub at: At,
    /// Jobs that are done before, undisturbed.
    pub before: &'static [fn(&Stage) -> JobRequest],
    pub order: fn(&Stage) -> JobRequest,
    pub purpose: Purpose,
}

/// Bytes of the disks of those that have to do with a vault: some of its chunks never change.
const LARGE: u64 = 256 << 10;

impl Scenario {
    pub fn of_vault(&self) -> bool {
        matches!(self.workflow, "backup" | "restore-vault")
    }

    /// How many files a machine has beside the others' images.
    pub fn files(&self) -> usize {
        self.formats.len() + usize::from(self.sealed)
    }

    pub fn disk_size(&self) -> u64 {
        if self.of_vault() { LARGE } else { DISK_SIZE }
    }
}

/// Where it is played.
pub struct Stage {
    pub folder: PathBuf,
    pub world: Fake,
    pub domain: DomainRef,
    pub store: Arc<MemoryStore>,
    pub vault: Arc<vault::Place>,
    /// The jobs that were done before.
    pub done: Vec<JobId>,
}

impl Stage {
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The files beside the images, those of firmware variables included.
    pub fn images(&self) -> BTreeSet<PathBuf> {
        let variables =
            files(&self.at("libvirt/nvram")).into_iter().map(|file| Path::new("nvram").join(file));
        files(&self.at("images")).into_iter().chain(variables).collect()
    }

    /// The domains, by UUID, of which libvirt has the state of a TPM.
    pub fn tpms(&self) -> BTreeSet<PathBuf> {
        let state = files(&self.at("libvirt/tpm"));
        state.iter().filter_map(|file| file.iter().next()).map(PathBuf::from).collect()
    }

    /// Backups with their folders, oldest first.
    pub fn backups(&self) -> Vec<(String, PathBuf)> {
        let Ok(root) = TargetRoot::open(&self.at("backups")) else { return Vec::new() };
        let mut all: Vec<_> = catalogue::scan(&root)
            .unwrap()
            .into_iter()
            .filter_map(|entry| match entry {
                catalogue::Entry::Backup { stored, path } => {
                    Some((stored.manifest.finished, stored.manifest.backup.to_string(), path))
                }
                _ => None,
            })
            .collect();
        all.sort();
        all.into_iter().map(|(_, id, path)| (id, path)).collect()
    }

    /// Backups in the vault with what is in them, oldest first.
    pub fn kept(&self) -> Vec<vault::Kept> {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(self.vault.backups())
    }

    /// What backups are in the vault, oldest first.
    pub fn manifests(&self) -> Vec<vault::Manifest> {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(self.vault.manifests())
    }

    fn last_backup(&self) -> (String, PathBuf) {
        self.backups().pop().unwrap()
    }
}

/// A backup of a running guest with two disks: each scenario says what is otherwise.
const USUAL: Scenario = Scenario {
    name: "disks of a running guest",
    workflow: "snapshot",
    formats: &["qcow2", "raw"],
    agent: false,
    sealed: false,
    at: At::Running,
    before: &[],
    order: |stage| snapshot(stage, json!({})),
    purpose: Purpose::Backup,
};

pub const SCENARIOS: &[Scenario] = &[
    USUAL,
    Scenario {
        name: "memory of a running guest",
        sealed: true,
        order: |stage| snapshot(stage, json!({ "memory": {} })),
        ..USUAL
    },
    Scenario {
        name: "disks of a guest that is frozen",
        formats: &["raw", "raw"],
        agent: true,
        order: |stage| snapshot(stage, json!({ "freeze": "required" })),
        ..USUAL
    },
    Scenario {
        name: "the classic act",
        sealed: true,
        order: |stage| snapshot(stage, json!({ "save": { "use_ram_disk": "never" } })),
        ..USUAL
    },
    Scenario {
        name: "the classic act with a RAM disk",
        order: |stage| {
            snapshot(stage, json!({ "save": { "ram_disk": stage.at("ram"), "use_ram_disk": "require" } }))
        },
        ..USUAL
    },
    Scenario { name: "a domain that is off", sealed: true, at: At::Off, ..USUAL },
    Scenario { name: "a domain that libvirt has saved", at: At::Saved, ..USUAL },
    Scenario {
        name: "a new domain, which runs",
        sealed: true,
        workflow: "restore",
        before: &[|stage| snapshot(stage, json!({}))],
        order: |stage| restore(stage, json!({ "then": "running" })),
        purpose: Purpose::Another,
        ..USUAL
    },
    Scenario {
        name: "a new domain with its memory",
        sealed: true,
        workflow: "restore",
        before: &[|stage| snapshot(stage, json!({ "memory": {} }))],
        order: |stage| restore(stage, json!({ "then": "running" })),
        purpose: Purpose::Another,
        ..USUAL
    },
    Scenario {
        name: "in place, from the disks",
        sealed: true,
        workflow: "restore-in-place",
        before: &[|stage| snapshot(stage, json!({}))],
        order: |stage| in_place(stage, json!({ "cold": true, "rest": { "seconds": 60, "destroy": true } })),
        purpose: Purpose::Exchange,
        ..USUAL
    },
    Scenario {
        name: "in place, with both memories",
        sealed: true,
        workflow: "restore-in-place",
        before: &[|stage| snapshot(stage, json!({ "memory": {} }))],
        order: |stage| in_place(stage, json!({ "rest": { "seconds": 60, "save": true } })),
        purpose: Purpose::Exchange,
        ..USUAL
    },
    Scenario {
        name: "the way back",
        sealed: true,
        workflow: "restore-undo",
        before: &[
            |stage| snapshot(stage, json!({})),
            |stage| in_place(stage, json!({ "cold": true, "rest": { "seconds": 60, "save": true } })),
        ],
        order: |stage| undo(stage),
        purpose: Purpose::Exchange,
        ..USUAL
    },
    Scenario {
        name: "what was kept goes",
        sealed: true,
        workflow: "restore-discard",
        before: &[
            |stage| snapshot(stage, json!({})),
            |stage| in_place(stage, json!({ "cold": true, "rest": { "seconds": 60, "destroy": true } })),
        ],
        order: |stage| of_domain(stage, "restore-discard", json!({ "job": stage.done[1] })),
        purpose: Purpose::Discard,
        ..USUAL
    },
    Scenario {
        name: "one of two backups",
        workflow: "delete",
        formats: &["raw"],
        before: &[|stage| snapshot(stage, json!({})), |stage| snapshot(stage, json!({}))],
        order: |stage| {
            let (backup, folder) = stage.backups().remove(0);
            of_domain(stage, "delete", json!({ "backups": [{ "backup": backup, "folder": folder }] }))
        },
        purpose: Purpose::Fewer(1),
        ..USUAL
    },
    Scenario {
        name: "all but the newest of three backups",
        workflow: "prune",
        formats: &["raw"],
        before: &[
            |stage| snapshot(stage, json!({})),
            |stage| snapshot(stage, json!({})),
            |stage| snapshot(stage, json!({})),
        ],
        order: |stage| of_domain(stage, "prune", json!({ "keep": 1 })),
        purpose: Purpose::Fewer(2),
        ..USUAL
    },
    Scenario {
        name: "every file of a backup",
        workflow: "verify",
        formats: &["raw"],
        before: &[|stage| snapshot(stage, json!({}))],
        order: |stage| {
            let (backup, folder) = stage.last_backup();
            of_domain(stage, "verify", json!({ "backup": backup, "folder": folder, "depth": "full" }))
        },
        purpose: Purpose::Look,
        ..USUAL
    },
    Scenario {
        name: "what a job has left",
        workflow: "repair",
        before: &[|stage| snapshot(stage, json!({}))],
        order: |stage| of_domain(stage, "repair", left_by(stage, stage.done[0])),
        purpose: Purpose::Tidy,
        ..USUAL
    },
    Scenario {
        name: "a domain that is off, into a vault",
        workflow: "backup",
        at: At::Off,
        order: |stage| backup(stage, json!({})),
        purpose: Purpose::IntoVault,
        ..USUAL
    },
    Scenario {
        name: "a new domain from a vault",
        workflow: "restore-vault",
        at: At::Off,
        before: &[|stage| backup(stage, json!({}))],
        order: |stage| restore_kept(stage, json!({ "then": "running" })),
        purpose: Purpose::Another,
        ..USUAL
    },
    Scenario {
        name: "a running guest, into a vault",
        workflow: "backup",
        order: |stage| backup(stage, json!({})),
        purpose: Purpose::IntoVault,
        ..USUAL
    },
    Scenario {
        name: "a frozen guest, into a vault",
        workflow: "backup",
        formats: &["raw", "raw"],
        agent: true,
        order: |stage| backup(stage, json!({ "freeze": "required" })),
        purpose: Purpose::IntoVault,
        ..USUAL
    },
    Scenario {
        name: INCREMENTAL,
        workflow: "backup",
        formats: &["qcow2", "qcow2"],
        before: &[|stage| backup(stage, json!({}))],
        order: |stage| backup(stage, json!({})),
        purpose: Purpose::IntoVault,
        ..USUAL
    },
    Scenario {
        name: "a new domain from two backups of a running guest",
        workflow: "restore-vault",
        before: &[|stage| backup(stage, json!({})), |stage| backup(stage, json!({}))],
        order: |stage| restore_kept(stage, json!({})),
        purpose: Purpose::Another,
        ..USUAL
    },
];

/// A backup of what has changed since another one.
pub const INCREMENTAL: &str = "what has changed, into a vault";

fn request(workflow: &str, subject: (String, &str), options: Value, key: &str) -> JobRequest {
    JobRequest {
        workflow: workflow.to_owned().into(),
        subject: Subject { id: subject.0, label: subject.1.to_owned() },
        options,
        key: Some(key.to_owned()),
        by: Actor { who: "simulation".to_owned(), why: Some("to see what becomes of it".to_owned()) },
        if_busy: IfBusy::Refuse,
        limits: vec![],
        retry_of: None,
    }
}

fn of_domain(stage: &Stage, workflow: &str, options: Value) -> JobRequest {
    let key = format!("{workflow} {}", stage.done.len());
    request(workflow, (stage.domain.id.to_string(), &stage.domain.name), options, &key)
}

fn with(mut options: Value, more: Value) -> Value {
    let (Value::Object(all), Value::Object(more)) = (&mut options, more) else { unreachable!() };
    all.extend(more);
    options
}

fn snapshot(stage: &Stage, more: Value) -> JobRequest {
    of_domain(stage, "snapshot", with(json!({ "target": stage.at("backups") }), more))
}

pub const COPY: uuid::Uuid = uuid::Uuid::from_u128(0xc0);

fn restore(stage: &Stage, more: Value) -> JobRequest {
    let (_, backup) = stage.last_backup();
    let options = json!({ "backup": backup, "name": "copy", "folder": stage.at("restored/copy") });
    request("restore", (COPY.to_string(), "copy"), with(options, more), "restore")
}

fn backup(stage: &Stage, more: Value) -> JobRequest {
    of_domain(stage, "backup", with(json!({ "vault": vault::NAME }), more))
}

fn restore_kept(stage: &Stage, more: Value) -> JobRequest {
    let manifest = stage.manifests().pop().unwrap();
    let options = json!({
        "vault": vault::NAME,
        "backup": manifest.backup,
        "domain": manifest.domain,
        "name": "copy",
        "folder": stage.at("restored/copy"),
    });
    request("restore-vault", (COPY.to_string(), "copy"), with(options, more), "restore")
}

fn in_place(stage: &Stage, more: Value) -> JobRequest {
    let (_, backup) = stage.last_backup();
    of_domain(stage, "restore-in-place", with(json!({ "backup": backup }), more))
}

fn undo(stage: &Stage) -> JobRequest {
    let rest = json!({ "seconds": 60, "destroy": true });
    of_domain(stage, "restore-undo", json!({ "job": stage.done[1], "rest": rest }))
}

/// Nobody disturbs what is arranged.
struct Arranged;

impl Witness for Arranged {
    fn at(&self, _: &Place) -> Order {
        Order::Go
    }
}

/// Leaves behind what that job could have left, had it been given up: an empty overlay, a folder that is no backup, its
/// note in the domain. The order to take all of it away.
fn left_by(stage: &Stage, job: JobId) -> Value {
    let client = stage.world.client(Arc::new(Arranged));
    let marker = Marker { store: stage.store.id().to_string(), job: job.to_string(), hold: None };
    let base = Layer { path: stage.at("images/web-a.qcow2"), format: "qcow2".to_owned() };
    let path = overlay_path(&stage.at("images"), job, &"vda".into());
    let spec = OverlaySpec { path: path.clone(), base, virtual_size: DISK_SIZE };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let overlay = runtime.block_on(async {
        stage.world.new_life();
        client.set_marker(&stage.domain.id, &marker).await.unwrap();
        let overlay = client.create_overlay(&spec).await.unwrap();
        stage.world.end_life();
        overlay
    });
    let (_, backup) = stage.last_backup();
    let folder = backup.with_file_name(format!("20260131T235959Z-{}", job.short()));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("vda.qcow2"), b"half").unwrap();
    std::fs::write(folder.join("domain.xml.new"), b"").unwrap();
    let all = [Sweep::Unmark, Sweep::Overlay { path, id: overlay.id }, Sweep::Folder(folder)];
    let leftovers = all.map(|sweep| (job, sweep)).into();
    serde_json::to_value(RepairOptions { leftovers }).unwrap()
}

/// All files below a folder, by their path below it; none if it is not there.
pub fn files(folder: &Path) -> BTreeSet<PathBuf> {
    files_in(folder).unwrap_or_default()
}
