//! The files of a restore from a vault: the same as [`crate::restores`] says, with the steps that take a lease in a vault, fetch
//! from it, convert, and end the lease. The vault lies on the disk that is cut: nothing that was in it before changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};
use vmkeep_steps::hypervisor::LocalStorage;
use vmkeep_steps::hypervisor::fake::Fake;
use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::root::Component;
use vmkeep_steps::restore::RestoreSettings;
use vmkeep_steps::restore::folder::RestoreFolder;
use vmkeep_steps::restore::from_vault::VaultRestore;
use vmkeep_steps::restore::from_vault::fetch::{Wanted, What};
use vmkeep_steps::restore::from_vault::image::{FetchImage, FetchInput};
use vmkeep_steps::restore::from_vault::reader::{EndReading, Source, TakeReading};
use vmkeep_steps::simulation::{Order, Place, Witness};
use vmkeep_steps::snapshot::World;
use vmkeep_steps::vaults::{Opened, Vaults, fault};
use vmkeep_vault::backups::Backups;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::header::CHUNK;
use vmkeep_vault::ids::BackupId;
use vmkeep_vault::manifest::{Disk, Manifest, Stream};
use vmkeep_vault::vault::Vault;
use vmkeep_vault::write::{Extent, Options, Outcome, Parts, Readiness, Session};
use vmkeep_workflow::{Code, Fault, Plan, PlanContext, Registry, Step, StepSpec, Workflow, WorkflowName};

use crate::journals::succeed;
use crate::restores::{Kind, Recording, becomes_whole_or_nothing, places, recover, survives_a_second_cut};
use crate::vaults::{DOMAIN, attach, make, noise};
use crate::workload::{Act, runtime};

const NAME: &str = "fetch-files";
const VAULT: &str = "away";
const FILES: [&str; 3] = ["copy-vda.qcow2", "copy-vdb.raw", "copy_VARS.fd"];

fn vault(root: &Path) -> PathBuf {
    root.join("vault")
}

/// The content of what a file is made of: data, zeroes, data.
fn content(n: usize) -> Vec<u8> {
    let chunk = CHUNK as usize;
    let mut bytes = noise(n as u64, if n == 2 { 16 << 10 } else { 5 * chunk });
    if n < 2 {
        bytes[chunk..3 * chunk].fill(0);
    }
    bytes
}

/// A host with one vault, whose key lies beside it.
struct One(PathBuf);

#[async_trait]
impl Vaults for One {
    async fn open(&self, name: &str) -> Result<Opened, Fault> {
        let words = fs::read_to_string(self.0.join("words")).unwrap();
        let vault = Box::pin(attach(&vault(&self.0), &words)).await;
        let vault = vault.map_err(|e| fault("open the vault", &name, &e))?;
        Ok(Opened { vault, cache: None, host: "host".to_owned() })
    }
}

/// A vault with a backup of two disks and of firmware variables.
fn prepare(root: &Path) {
    fs::create_dir_all(root.join("images")).unwrap();
    runtime().block_on(Box::pin(async {
        let vault = make(&vault(root), |words| fs::write(root.join("words"), words).unwrap()).await;
        let mut session = Session::begin(&vault, DOMAIN, Options::default()).await.unwrap();
        let mut manifest = session.manifest(BackupId::now(), Timestamp::UNIX_EPOCH);
        for n in 0..FILES.len() {
            let (bytes, kind) = (content(n), if n == 2 { BlobType::Stream } else { BlobType::Data });
            let size = bytes.len() as u64;
            let mut parts = Parts::new(vec![Extent::Data(bytes.into())]);
            let image = session.write_image(&mut parts, size, kind, None).await.unwrap().image;
            match kind {
                BlobType::Stream => manifest.streams.push(Stream { name: "nvram".to_owned(), image }),
                _ => manifest.disks.push(Disk::new(["vda", "vdb"][n], image, "raw")),
            }
        }
        let Readiness::Ready(prepared) = session.prepare(&manifest).await.unwrap() else { panic!() };
        assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
        session.end().await.unwrap();
    }));
}

/// The lease, the folder and the files of a restore, without a domain.
struct Files(PathBuf);

impl Files {
    fn fetch(&self, vault: &Vault, manifest: &Manifest, n: usize) -> StepSpec {
        let (what, image) = match n {
            2 => (What::Stream("nvram".to_owned()), manifest.streams[0].image),
            n => (What::Disk(manifest.disks[n].target.clone()), manifest.disks[n].image),
        };
        let source =
            Source { vault: VAULT.to_owned(), id: vault.id(), domain: DOMAIN, lease: "lease".into() };
        let input = FetchInput {
            wanted: Wanted { source, what, image },
            folder: self.0.join("images/new"),
            name: Component::new(FILES[n]).unwrap(),
            format: if n == 0 { Format::Qcow2 } else { Format::Raw },
            bandwidth: 0,
            rights: Default::default(),
        };
        let (name, kind) = (format!("image/{}", FILES[n]), <FetchImage as Step>::KIND);
        let input = serde_json::to_value(input).unwrap();
        StepSpec::new(name, kind, format!("fetch {}", FILES[n]), input).after("folder/0").undoable()
    }
}

#[async_trait]
impl Workflow for Files {
    fn name(&self) -> WorkflowName {
        NAME.into()
    }

    async fn plan(&self, _: &PlanContext) -> Result<Plan, Fault> {
        let vault = One(self.0.clone()).open(VAULT).await?.vault;
        let all = Box::pin(Backups::load(&vault, Some(DOMAIN))).await.unwrap();
        let (_, backup) = all.iter().next().unwrap();
        let manifest = backup.manifest.as_ref().unwrap();
        let reading = json!({ "vault": VAULT, "id": vault.id() });
        let new = self.0.join("images/new");
        let folder = json!({ "folder": new, "missing": [new] });
        let mut steps = vec![
            StepSpec::new("lease", <TakeReading as Step>::KIND, "take a lease", reading.clone()),
            StepSpec::new("folder/0", <RestoreFolder as Step>::KIND, "make the folder", folder)
                .after("lease")
                .undoable(),
        ];
        steps.extend((0..FILES.len()).map(|n| self.fetch(&vault, manifest, n)));
        let mut ending = reading;
        ending["lease"] = json!("lease");
        let mut end = StepSpec::new("release", <EndReading as Step>::KIND, "end the lease", ending);
        for name in FILES {
            end = end.after(format!("image/{name}"));
        }
        steps.push(end.closes("lease"));
        Plan::new(NAME, 1, "fetch files", steps, None, Value::Null)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the restore", "files", e))
    }
}

/// Nobody disturbs the hypervisor, which nobody asks for anything.
struct Nobody;

impl Witness for Nobody {
    fn at(&self, _: &Place) -> Order {
        Order::Go
    }
}

fn registry(root: &Path) -> Registry {
    let folder = tempfile::tempdir().unwrap();
    let hypervisor = Fake::new(folder.path()).unwrap().client(Arc::new(Nobody));
    let world = World { hypervisor: Arc::new(hypervisor), storage: Arc::new(LocalStorage::default()) };
    let places = places(root, "vault");
    let vaults = Arc::new(One(root.to_owned()));
    let product = VaultRestore::new(world, places.clone(), vaults, RestoreSettings::default());
    product.register(Registry::new()).step(RestoreFolder(places)).workflow(Files(root.to_owned()))
}

/// What is recorded.
pub(crate) fn restore(root: &Path) {
    runtime().block_on(succeed(NAME, registry(root)));
}

pub(crate) fn restore_again(root: &Path) {
    recover(root, registry);
}

const KIND: Kind = Kind {
    act: Act::Fetch,
    prepare,
    registry,
    others: &["vault/leases", "vault/tmp"],
    files: &FILES,
    converts: true,
};

#[test]
fn a_power_cut_leaves_a_restore_from_a_vault_that_becomes_whole_or_nothing_and_never_harms_the_vault() {
    let recording = Recording::make(KIND);
    for (n, name) in FILES.into_iter().enumerate().skip(1) {
        assert!(recording.whole(name) == content(n), "{name}");
    }
    becomes_whole_or_nothing(&recording, "a restore from a vault", 40);
}

#[test]
fn a_sync_of_a_restore_from_a_vault_that_is_left_out_is_found_out() {
    for name in FILES.into_iter().chain(["new", "images"]) {
        let mut recording = Recording::make(KIND);
        recording.disk.without_syncs_of(name);
        let found = (0..3000).position(|seed| recording.cut(seed).is_err());
        println!(
            "a restore from a vault without the syncs of {name}: the first cut that costs something is {found:?}"
        );
        assert!(found.is_some(), "nobody misses the syncs of {name}");
    }
}

#[test]
fn a_second_power_cut_in_the_recovery_of_a_restore_from_a_vault_leaves_what_becomes_whole_or_nothing() {
    survives_a_second_cut(&Recording::make(KIND), "a restore from a vault", 12);
}
