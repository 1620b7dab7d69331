//! Restores from a vault in memory to an invented hypervisor.

mod crash;
mod refused;
mod step;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};
use vmkeep_store::MemoryStore;
use vmkeep_vault::backend::memory::Memory;
use vmkeep_vault::backups::Backups;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::header::CHUNK;
use vmkeep_vault::ids::{BackupId, DomainId as VaultDomain};
use vmkeep_vault::lease;
use vmkeep_vault::manifest::{Disk, Manifest, Stream};
use vmkeep_vault::vault::{Confirmed, Draft, Vault};
use vmkeep_vault::write::{Extent, Options, Outcome, Parts, Readiness, Session, Written};
use vmkeep_workflow::engine::{Engine, JobView};
use vmkeep_workflow::{Actor, EventStore, Fault, IfBusy, JobRequest, JobStatus, Registry, Subject};

use super::*;
use crate::codes;
use crate::hypervisor::{DomainId, LocalStorage};
use crate::image::qcow2::Format;
use crate::image::qemu_img::QemuImg;
use crate::image::root::Roots;
use crate::image::space::LowWater;
use crate::mortal::engine;
use crate::restore::tests::fake::{Fake, field};
use crate::restore::{Report, Restore, RestoreSettings, RightsSettings};
use crate::snapshot::{Places, World};
use crate::vaults::{Opened, Vaults};

const C: usize = CHUNK as usize;
const ORIGINAL: VaultDomain = VaultDomain::new([0x11; 16]);
const DEFINITION: &str = "name=web 01\nuuid=11111111-1111-1111-1111-111111111111\n\
                          disk=vda qcow2 /var/lib/a\ndisk=vdb raw /var/lib/b\ncards=1\n";

/// A vault that is always there.
struct There(Vault);

#[async_trait]
impl Vaults for There {
    async fn open(&self, _: &str) -> Result<Opened, Fault> {
        Ok(Opened { vault: self.0.clone(), cache: None, host: "host".to_owned() })
    }
}

/// Bytes that do not shrink, zeroes in between, and an end in the middle of a chunk.
fn disk(seed: u64) -> Vec<Extent> {
    let mut state = seed;
    let mut noise = |length: usize| {
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        Extent::Data((0..length).map(next).collect::<Vec<u8>>().into())
    };
    vec![noise(2 * C), Extent::Zero(9 * C as u64), noise(C), Extent::Zero(C as u64), noise(512)]
}

fn flat(parts: &[Extent]) -> Vec<u8> {
    let bytes = |part: &Extent| match part {
        Extent::Data(bytes) => bytes.to_vec(),
        part => vec![0; usize::try_from(part.len()).unwrap()],
    };
    parts.iter().flat_map(bytes).collect()
}

async fn put(session: &mut Session, kind: BlobType, parts: Vec<Extent>) -> Written {
    let size = parts.iter().map(Extent::len).sum();
    Box::pin(session.write_image(&mut Parts::new(parts), size, kind, None)).await.unwrap()
}

/// A host, a vault with a backup, and a hypervisor.
struct Host {
    dir: tempfile::TempDir,
    hypervisor: Fake,
    vault: Vault,
    backup: BackupId,
    /// Where the chunks of the first disk are.
    packs: Vec<String>,
}

impl Host {
    async fn new() -> Self {
        Self::with(true, DEFINITION, &[]).await
    }

    async fn with(encrypted: bool, definition: &str, streams: &[(&str, &str)]) -> Self {
        Box::pin(Self::committed(encrypted, definition, streams)).await
    }

    async fn committed(encrypted: bool, definition: &str, streams: &[(&str, &str)]) -> Self {
        let (host, manifest, mut session) = Self::written(encrypted, definition, streams).await;
        let Readiness::Ready(prepared) = session.prepare(&manifest).await.unwrap() else { panic!() };
        assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
        session.end().await.unwrap();
        host
    }

    /// A backup that is about to be committed.
    async fn written(
        encrypted: bool,
        definition: &str,
        streams: &[(&str, &str)],
    ) -> (Self, Manifest, Session) {
        let confirmed = match encrypted {
            true => {
                let draft = Draft::encrypted(false).unwrap();
                draft.confirm(&draft.recovery_words().unwrap()).unwrap()
            }
            false => Confirmed::plain(false).unwrap(),
        };
        let vault = confirmed.put(Arc::new(Memory::default()), None).await.unwrap();
        let mut session = Box::pin(Session::begin(&vault, ORIGINAL, Options::default())).await.unwrap();
        let backup = BackupId::now();
        let mut manifest = session.manifest(backup, Timestamp::UNIX_EPOCH);
        let mut packs = Vec::new();
        for (target, seed) in [("vda", 1), ("vdb", 2)] {
            let image = put(&mut session, BlobType::Data, disk(seed)).await.image;
            manifest.disks.push(Disk {
                target: target.to_owned(),
                image,
                source_format: "raw".to_owned(),
                dirty: 0,
                stored: 0,
                whole: None,
                whole_because: None,
                unchanged_since: None,
                bitmap: false,
                files: Vec::new(),
            });
            session.make_durable().await.unwrap();
            if packs.is_empty() {
                let listed = vault.backend().list("data/").await.unwrap();
                packs.extend(listed.into_iter().map(|pack| pack.name));
            }
        }
        for (name, text) in streams {
            let parts = vec![Extent::Data(text.as_bytes().to_vec().into())];
            let image = put(&mut session, BlobType::Stream, parts).await.image;
            manifest.streams.push(Stream { name: (*name).to_owned(), image });
        }
        manifest.domain_name = "web 01".to_owned();
        manifest.consistency = "crash".to_owned();
        manifest.definition = definition.to_owned();
        // In memory where that is possible: hundreds of restores fsync thousands of times.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let host = Self { dir, hypervisor: Fake::default(), vault, backup, packs };
        host.hypervisor.inner().root = host.at("libvirt");
        std::fs::create_dir(host.at("images")).unwrap();
        (host, manifest, session)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn places(&self) -> Places {
        Places { roots: Arc::new(Roots::open([self.at("images")]).unwrap()) }
    }

    fn engine(&self, store: Arc<dyn EventStore>) -> Engine {
        let world = World {
            hypervisor: Arc::new(self.hypervisor.clone()),
            storage: Arc::new(LocalStorage::default()),
        };
        let targets = LowWater { bytes: 1, percent: 0 };
        let settings = RestoreSettings { targets, watch_ms: 0, rights: RightsSettings::default() };
        let registry = Restore::new(world.clone(), self.places(), settings).register(Registry::new());
        let vaults = Arc::new(There(self.vault.clone()));
        engine(store, VaultRestore::new(world, self.places(), vaults, settings).register(registry))
    }

    fn options(&self, more: &Value) -> Value {
        let mut options = json!({
            "vault": "main",
            "backup": self.backup,
            "domain": ORIGINAL,
            "name": "copy of web",
            "folder": self.at("images/new/place"),
        });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    }

    async fn restore(&self, more: &Value) -> (JobView, DomainId) {
        let engine = self.engine(Arc::new(MemoryStore::new()));
        engine.recover().await.unwrap();
        let (request, id) = request(self.options(more));
        let job = engine.request(request).await.unwrap();
        engine.wait(job).await.unwrap();
        (engine.view(job).await.unwrap(), id)
    }

    /// Every path below the host's folder, and every domain.
    fn everything(&self) -> Vec<String> {
        fn walk(dir: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                found.push(path.display().to_string());
                if path.is_dir() {
                    walk(&path, found);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.dir.path(), &mut found);
        found.extend(self.hypervisor.inner().defined.keys().map(|id| format!("defined {id}")));
        found.sort();
        found
    }

    /// Exactly the images are there, with every byte, and the domain has them.
    fn assert_restored(&self, case: &str, id: DomainId, format: Format) {
        let xml = self.hypervisor.inner().defined[&id].clone();
        assert_eq!(field(&xml, "name"), Some("copy of web"), "{case}");
        let place = self.at("images/new/place");
        let mut names: Vec<_> = std::fs::read_dir(&place)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with("_VARS.fd"))
            .collect();
        names.sort();
        let expected = ["vda", "vdb"].map(|disk| format!("copy%20of%20web-{disk}.{}", format.as_str()));
        assert_eq!(names, expected, "{case}");
        for (name, seed) in names.iter().zip([1, 2]) {
            let path = place.join(name);
            let raw = match format {
                Format::Raw => std::fs::read(&path).unwrap(),
                Format::Qcow2 => {
                    let raw = self.at("converted");
                    let limit = std::time::Duration::from_secs(60);
                    let to = (raw.as_path(), Format::Raw);
                    QemuImg::default().convert((&path, format), to, limit, &|| false).unwrap();
                    let bytes = std::fs::read(&raw).unwrap();
                    std::fs::remove_file(raw).unwrap();
                    bytes
                }
            };
            // What the invented guest has written when it ran stands behind it.
            let mut wanted = flat(&disk(seed));
            if format == Format::Qcow2 {
                wanted.resize(raw.len(), 0);
            }
            assert!(raw.len() >= wanted.len() && raw[..wanted.len()] == wanted, "{case}: {name}");
            assert!(xml.contains(&format!("{} {}", format.as_str(), path.display())), "{case}: {xml}");
        }
    }

    /// Whether no lease in the vault keeps anybody waiting.
    async fn nobody_reads(&self) -> bool {
        lease::all(&self.vault).await.unwrap().values().all(|standing| standing.is_over())
    }
}

fn request(options: Value) -> (JobRequest, DomainId) {
    let id = DomainId(uuid::Uuid::new_v4());
    let request = JobRequest {
        workflow: workflow::NAME.into(),
        subject: Subject { id: id.to_string(), label: "copy of web".to_owned() },
        options,
        key: None,
        by: Actor::default(),
        if_busy: IfBusy::Refuse,
        limits: Vec::new(),
        retry_of: None,
    };
    (request, id)
}

fn output(view: &JobView, step: &str) -> Value {
    view.steps.iter().find(|s| s.name.as_str() == step).and_then(|s| s.output.clone()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_of_a_backup_becomes_a_new_domains_in_either_format() {
    for (format, then) in [("raw", "default"), ("qcow2", "default"), ("raw", "running"), ("raw", "paused")] {
        for encrypted in [true, false] {
            let host = Host::with(encrypted, DEFINITION, &[]).await;
            let (view, id) = host.restore(&json!({ "format": format, "then": then })).await;
            assert_eq!(view.summary.status, JobStatus::Succeeded, "{format} {:?}", view.summary.fault);
            host.assert_restored(then, id, Format::from_name(format).unwrap());
            let running = host.hypervisor.inner().running.get(&id).map(|running| running.paused);
            let wanted = match then {
                "default" => None,
                then => Some(then == "paused"),
            };
            assert_eq!(running, wanted);
            assert!(host.nobody_reads().await, "a collection would wait for a day");
            let report: Report = serde_json::from_value(output(&view, "settle")).unwrap();
            assert!(report.notes.iter().any(|note| note.contains("as after a power cut")), "{report:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_the_backup_takes_no_room() {
    use std::os::unix::fs::MetadataExt as _;
    let host = Host::new().await;
    let (view, _) = host.restore(&json!({})).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    let data = std::fs::metadata(host.at("images/new/place/copy%20of%20web-vda.raw")).unwrap();
    assert_eq!(data.len(), flat(&disk(1)).len() as u64);
    let most = (4 * C) as u64;
    assert!(data.blocks() * 512 <= most, "{} bytes for {most} that are not zero", data.blocks() * 512);
}

#[tokio::test(flavor = "multi_thread")]
async fn firmware_variables_and_tpm_state_become_the_new_domains_own() {
    let definition = format!("{DEFINITION}nvram=/var/lib/x.fd\ntpm=2.0\n");
    let streams = [("nvram", "variables"), ("tpm/tpm2/tpm2-00.permall", "sealed")];
    let host = Host::with(true, &definition, &streams).await;
    let (view, id) = host.restore(&json!({ "then": "running" })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    host.assert_restored("with state", id, Format::Raw);
    let defined = host.hypervisor.inner().defined[&id].clone();
    let variables = PathBuf::from(field(&defined, "nvram").unwrap());
    assert!(variables.ends_with("place/copy%20of%20web_VARS.fd"), "{defined}");
    assert_eq!(std::fs::read(&variables).unwrap(), b"variables");
    let state = host.at("libvirt/swtpm").join(id.to_string()).join("tpm2/tpm2-00.permall");
    assert_eq!(std::fs::read(state).unwrap(), b"sealed");

    // Where a backup that cannot have been made by us would put something else.
    for path in ["tpm/tpm2/../../x", "tpm/x", "tpm/etc/tpm"] {
        let host = Host::with(true, &definition, &[(path, "sealed")]).await;
        let before = host.everything();
        let (view, _) = host.restore(&json!({})).await;
        assert_eq!(view.summary.fault.unwrap().code, codes::MANIFEST_MISMATCH, "{path}");
        assert_eq!(host.everything(), before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_fails_at_its_end_leaves_nothing_and_no_lease() {
    let streams = [("nvram", "variables"), ("tpm/tpm2/tpm2-00.permall", "sealed")];
    let definition = format!("{DEFINITION}nvram=/var/lib/x.fd\ntpm=2.0\n");
    let host = Host::with(true, &definition, &streams).await;
    host.hypervisor.inner().fail = vec!["start"; 10];
    let before = host.everything();
    for format in ["raw", "qcow2"] {
        let (view, _) = host.restore(&json!({ "then": "running", "format": format })).await;
        assert_eq!(view.summary.status, JobStatus::RolledBack, "{:?}", view.summary.fault);
        let after: Vec<String> = host
            .everything()
            .into_iter()
            .filter(|path| !path.ends_with("libvirt") && !path.ends_with("swtpm"))
            .collect();
        assert_eq!(after, before);
        assert!(host.nobody_reads().await);
    }
}
