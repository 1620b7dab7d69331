//! Restores on an invented hypervisor: every refusal, every failure, and the end of the process at every event.

mod crash;
pub(super) mod fake;
mod rights;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{Engine, JobView};
use vmkeep_workflow::{Actor, EventStore, IfBusy, JobRequest, JobStatus, Registry, Subject};

use super::*;
use crate::codes;
use crate::hypervisor::{DomainId, LocalStorage};
use crate::image::qcow2::Format;
use crate::image::qemu_img::QemuImg;
use crate::image::root::Roots;
use crate::image::space::LowWater;
use crate::manifest::{self, Manifest, samples};
use crate::mortal::engine;
use crate::snapshot::{Places, World};
use fake::{Fake, HEAD, field, memory_image};

/// What stands behind the head of the memory image.
pub(super) const STREAM: &[u8] = b"the memory of a guest";

/// The original's definition.
const DEFINITION: &str = "name=web 01\nuuid=11111111-1111-4111-8111-111111111111\n\
                          disk=vda qcow2 /var/lib/a\ndisk=vdb raw /var/lib/b\ncards=1\n";

/// A host: a root with a backup, and a hypervisor.
struct Host {
    dir: tempfile::TempDir,
    hypervisor: Fake,
    rights: RightsSettings,
}

impl Host {
    fn new() -> Self {
        Self::with(DEFINITION, |_| {})
    }

    fn with(definition: &str, change: impl FnOnce(&mut Manifest)) -> Self {
        Self::of(definition, definition, change)
    }

    /// What the domain would have started from and what it ran with differ.
    fn of(definition: &str, live: &str, change: impl FnOnce(&mut Manifest)) -> Self {
        // In memory where that is possible: hundreds of restores fsync thousands of times.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let host = Self { dir, hypervisor: Fake::default(), rights: RightsSettings::default() };
        host.hypervisor.inner().root = host.at("libvirt");
        for folder in ["backups", "images", "backups/b"] {
            std::fs::create_dir(host.at(folder)).unwrap();
        }
        let folder = samples::folder(&host.backup());
        let mut manifest = samples::unpublished(&folder);
        samples::write(&folder, "domain.xml", definition.as_bytes());
        samples::write(&folder, "memory.save", &memory_image(live, STREAM));
        for (name, role) in
            [("domain.xml", manifest::Role::Definition), ("memory.save", manifest::Role::Memory)]
        {
            let entry = samples::entry(&folder, name, role);
            let place = manifest.files.iter_mut().find(|f| f.name == entry.name).unwrap();
            *place = entry;
        }
        manifest.domain.uuid = "11111111-1111-4111-8111-111111111111".parse().unwrap();
        change(&mut manifest);
        manifest::publish(&folder, &manifest).unwrap();
        host
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn backup(&self) -> PathBuf {
        self.at("backups/b")
    }

    /// The original exists on this host.
    fn with_original(self) -> Self {
        let id = DomainId("11111111-1111-4111-8111-111111111111".parse().unwrap());
        self.hypervisor.inner().defined.insert(id, DEFINITION.to_owned());
        self
    }

    fn engine(&self, store: Arc<dyn EventStore>) -> Engine {
        let world = World {
            hypervisor: Arc::new(self.hypervisor.clone()),
            storage: Arc::new(LocalStorage::default()),
        };
        let roots = Roots::open([self.at("backups"), self.at("images")]).unwrap();
        let targets = LowWater { bytes: 1, percent: 0 };
        let settings = RestoreSettings { targets, watch_ms: 0, rights: self.rights };
        let places = Places { roots: Arc::new(roots) };
        let registry = Restore::new(world, places, settings).register(Registry::new());
        engine(store, registry)
    }

    fn options(&self, more: &Value) -> Value {
        let mut options =
            json!({ "backup": self.backup(), "name": "copy of web", "folder": self.at("images/new/place") });
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        options
    }

    /// Runs one restore to its end.
    async fn restore(&self, more: Value) -> (JobView, DomainId) {
        let engine = self.engine(Arc::new(MemoryStore::new()));
        engine.recover().await.unwrap();
        let (request, id) = request(self.options(&more));
        let job = engine.request(request).await.unwrap();
        engine.wait(job).await.unwrap();
        (engine.view(job).await.unwrap(), id)
    }

    async fn refused(&self, more: Value) -> u16 {
        let before = self.everything();
        let (view, _) = self.restore(more).await;
        assert_eq!(view.summary.status, JobStatus::Refused, "{:?}", view.summary.fault);
        assert_eq!(self.everything(), before, "a refused restore touched something");
        view.summary.fault.unwrap().code.0
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
        let state = self.hypervisor.inner();
        found.extend(state.defined.keys().map(|id| format!("defined {id}")));
        found.extend(state.running.keys().map(|id| format!("running {id}")));
        found.sort();
        found
    }

    fn assert_restored(&self, id: DomainId) {
        let xml = self.hypervisor.inner().defined[&id].clone();
        assert_eq!(field(&xml, "name"), Some("copy of web"));
        let place = self.at("images/new/place");
        let mut names: Vec<_> = std::fs::read_dir(&place)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected = ["vda.base1.raw", "vda.qcow2", "vdb.raw"].map(|n| format!("copy%20of%20web-{n}"));
        assert_eq!(names, expected, "exactly the images are there, and nothing that only a job needs");
        let top = place.join("copy%20of%20web-vda.qcow2");
        let chain = QemuImg::default().chain(&top, Format::Qcow2, false).unwrap();
        assert_eq!(chain.len(), 2);
        assert_eq!(chain[1].filename, place.join("copy%20of%20web-vda.base1.raw").to_str().unwrap());
    }
}

fn request(options: Value) -> (JobRequest, DomainId) {
    let id = DomainId(uuid::Uuid::new_v4());
    let request = JobRequest {
        workflow: "restore".into(),
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

fn steps(view: &JobView) -> Vec<&str> {
    view.steps.iter().map(|s| s.name.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn with_memory_it_goes_on_paused_and_nothing_of_the_original_is_touched() {
    let host = Host::new().with_original();
    let backup: Vec<_> = host.everything().into_iter().filter(|p| p.contains("backups")).collect();
    let (view, id) = host.restore(json!({})).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    host.assert_restored(id);
    let running = host.hypervisor.inner().running[&id].clone();
    assert!(running.memory && running.paused && running.pulled, "{running:?}");
    let report: Report = serde_json::from_value(output(&view, "settle")).unwrap();
    assert!(report.with_memory);
    assert!(report.notes.iter().any(|n| n.contains("still believes in its old identity")), "{report:?}");
    assert!(report.notes.iter().any(|n| n.contains("links are down")), "{report:?}");
    assert_eq!(report.changes, ["links are down"]);
    let now: Vec<_> = host.everything().into_iter().filter(|p| p.contains("backups")).collect();
    assert_eq!(now, backup);
    assert_eq!(host.hypervisor.inner().defined.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_a_network_card_is_told_nothing_of_cables() {
    let host = Host::with(&DEFINITION.replace("cards=1\n", ""), |_| {}).with_original();
    let (view, _) = host.restore(json!({})).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    let report: Report = serde_json::from_value(output(&view, "settle")).unwrap();
    assert!(!report.notes.iter().any(|n| n.contains("links") || n.contains("domif-setlink")), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_way_to_end_has_its_steps() {
    for (more, last, running) in [
        (json!({ "cold": true }), "define", None),
        (json!({ "cold": true, "then": "paused" }), "start", Some((true, false))),
        (json!({ "cold": true, "then": "running" }), "resume", Some((false, false))),
        (json!({ "then": "running" }), "resume", Some((false, true))),
        (json!({ "then": "paused" }), "start", Some((true, true))),
    ] {
        let host = Host::new();
        let (view, id) = host.restore(more.clone()).await;
        assert_eq!(view.summary.status, JobStatus::Succeeded, "{more} {:?}", view.summary.fault);
        assert_eq!(steps(&view)[steps(&view).len() - 2..], [last, "settle"]);
        assert_eq!(steps(&view).contains(&"memory"), more.get("cold").is_none());
        let state = host.hypervisor.inner().running.get(&id).map(|r| (r.paused, r.memory));
        assert_eq!(state, running, "{more}");
        let point = view.plan.unwrap().point_of_no_return.map(|s| s.to_string());
        assert_eq!(point.as_deref(), (last == "resume").then_some("resume"));
        host.assert_restored(id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn links_are_up_when_the_original_is_gone_or_the_caller_says_so() {
    for (original, connect, down) in [(true, false, true), (true, true, false), (false, false, false)] {
        let host = if original { Host::new().with_original() } else { Host::new() };
        let (_, id) = host.restore(json!({ "connect": connect })).await;
        let state = host.hypervisor.inner();
        assert_eq!(field(&state.defined[&id], "links"), Some(if down { "down" } else { "up" }));
        assert_eq!(state.running[&id].pulled, down, "what the definition says is not what QEMU does");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_goes_where_the_caller_says_and_what_it_stands_on_goes_beside_it() {
    let host = Host::new();
    let vda = host.at("images/x.qcow2");
    let (view, id) = host.restore(json!({ "disks": { "vda": vda } })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    let chain = QemuImg::default().chain(&vda, Format::Qcow2, false).unwrap();
    assert_eq!(chain[1].filename, host.at("images/x.qcow2.vda.base1.raw").to_str().unwrap());
    assert!(host.at("images/new/place/copy%20of%20web-vdb.raw").exists());
    assert!(host.hypervisor.inner().defined[&id].contains("images/x.qcow2\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_with_its_code_and_nothing_is_touched() {
    let host = Host::new().with_original();
    std::fs::write(host.at("images/taken"), "mine").unwrap();
    std::os::unix::fs::symlink(host.dir.path(), host.at("images/link")).unwrap();
    for (more, code) in [
        (json!({ "name": "web 01" }), 111),
        (json!({ "name": "a/b" }), 64),
        (json!({ "name": "" }), 64),
        (json!({ "name": "a\nb" }), 64),
        (json!({ "folder": "/tmp" }), 105),
        (json!({ "folder": host.at("images/../../x") }), 106),
        (json!({ "folder": host.at("images/link/x") }), 106),
        (json!({ "folder": null }), 64),
        (json!({ "disks": { "vdz": "/x" } }), 92),
        (json!({ "disks": { "vda": host.at("images/taken") } }), 110),
        (json!({ "disks": { "vda": host.at("images/s"), "vdb": host.at("images/s") } }), 110),
        (json!({ "disks": { "vdb": host.at("images/..") } }), 106),
        (json!({ "backup": host.at("backups") }), 109),
        (json!({ "backup": "/etc" }), 105),
        (json!({ "surprise": 1 }), 64),
    ] {
        assert_eq!(host.refused(more.clone()).await, code, "{more}");
    }
    assert_eq!(std::fs::read(host.at("images/taken")).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_not_whole_is_refused() {
    let host = Host::new();
    let file = |name: &str| host.backup().join(name);
    std::fs::rename(file("vdb.raw"), file("hidden")).unwrap();
    assert_eq!(host.refused(json!({})).await, 37);
    std::fs::rename(file("hidden"), file("vdb.raw")).unwrap();
    std::fs::File::options().write(true).open(file("vdb.raw")).unwrap().set_len(5).unwrap();
    assert_eq!(host.refused(json!({})).await, 107);
    std::fs::write(file("manifest.json"), r#"{"format":"vmkeep-backup","min_reader":9}"#).unwrap();
    assert_eq!(host.refused(json!({})).await, 108);
}

#[tokio::test(flavor = "multi_thread")]
async fn firmware_variables_and_tpm_state_become_the_new_domains_own() {
    let definition = format!("{DEFINITION}nvram=/var/lib/x.fd\ntpm=2.0\n");
    let host = Host::with(&definition, |_| {});
    let folder = host.backup();
    let bytes = std::fs::read(folder.join("manifest.json")).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    for (name, role, content) in
        [("nvram", "nvram", "variables"), ("tpm.tpm2.tpm2-00.permall", "tpm", "sealed")]
    {
        std::fs::write(folder.join(name), content).unwrap();
        manifest["files"].as_array_mut().unwrap().push(json!({ "name": name, "role": role,
            "size": content.len(), "blake3": blake3::hash(content.as_bytes()).to_hex().as_str() }));
    }
    let (written, at_instant) = ("2026-01-31T23:59:59Z", true);
    manifest["nvram"] =
        json!({ "file": "nvram", "format": "raw", "written": written, "at_instant": at_instant });
    manifest["tpm"] = json!({ "files": [{ "file": "tpm.tpm2.tpm2-00.permall", "path": "tpm2/tpm2-00.permall" }],
        "written": written, "at_instant": at_instant });
    std::fs::write(folder.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();

    let (view, id) = host.restore(json!({ "cold": true, "autostart": true })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    assert_eq!(host.hypervisor.inner().autostart, [id]);
    let defined = host.hypervisor.inner().defined[&id].clone();
    let variables = PathBuf::from(field(&defined, "nvram").unwrap());
    assert!(
        variables.starts_with(host.dir.path()) && variables.ends_with("copy%20of%20web_VARS.fd"),
        "{defined}"
    );
    assert_eq!(std::fs::read(&variables).unwrap(), b"variables");
    let state = host.hypervisor.inner().root.join("swtpm").join(id.to_string()).join("tpm2/tpm2-00.permall");
    assert_eq!(std::fs::read(state).unwrap(), b"sealed");

    // What a tampered manifest names as a place is refused before anything is written.
    manifest["tpm"]["files"][0]["path"] = json!("tpm2/../../../x");
    std::fs::write(folder.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    assert_eq!(host.refused(json!({ "name": "other" })).await, 107);
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_cannot_be_used_is_refused_and_the_cold_restore_works() {
    let newer = Host::with(DEFINITION, |m| m.host.qemu = Some("8.1.0".to_owned()));
    assert_eq!(newer.refused(json!({})).await, 113);
    let strange = Host::with(DEFINITION, |m| {
        let manifest::Memory::Saved(saved) = &mut m.memory else { panic!() };
        saved.version = 3;
    });
    assert_eq!(strange.refused(json!({})).await, 112);
    let older = Host::with(DEFINITION, |m| m.host.qemu = Some("7.1.9".to_owned()));
    assert_eq!(older.restore(json!({})).await.0.summary.status, JobStatus::Succeeded);
    for host in [newer, strange] {
        let (view, id) = host.restore(json!({ "cold": true, "then": "running" })).await;
        assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
        host.assert_restored(id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_are_not_in_the_backup_stay_only_if_nobody_writes_to_them() {
    let shared = format!("{DEFINITION}disk=vdc raw /shared/disk\n");
    let host = Host::with(&shared, |_| {});
    assert_eq!(host.refused(json!({})).await, 113, "the guest's memory expects that disk");
    let (view, id) = host.restore(json!({ "cold": true })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    assert!(!host.hypervisor.inner().defined[&id].contains("/shared/disk"));
    let report: Report = serde_json::from_value(output(&view, "settle")).unwrap();
    assert!(report.notes.iter().any(|n| n.contains("vdc was left out")), "{report:?}");

    let medium = tempfile::NamedTempFile::new().unwrap();
    let with_cd = format!("{DEFINITION}cdrom={}\n", medium.path().display());
    let host = Host::with(&with_cd, |m| m.left_out.clear());
    assert_eq!(host.restore(json!({})).await.0.summary.status, JobStatus::Succeeded);
    drop(medium);
    let host = Host::with(&with_cd, |m| m.left_out.clear());
    assert_eq!(host.refused(json!({})).await, 113, "the medium is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_found_while_it_is_copied_and_everything_is_taken_back() {
    for name in ["vda.qcow2", "vda.base1.raw", "vdb.raw", "memory.save", "domain.xml"] {
        let host = Host::new();
        let path = host.backup().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let before = host.everything();
        let (view, _) = host.restore(json!({ "then": "running" })).await;
        let code = view.summary.fault.map(|f| f.code.0);
        // The definition is read before anything is planned.
        let expected =
            if name == "domain.xml" { (JobStatus::Refused, 107) } else { (JobStatus::RolledBack, 38) };
        assert_eq!((view.summary.status, code.unwrap()), expected, "{name}");
        assert_eq!(host.everything(), before, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whichever_call_fails_everything_is_taken_back() {
    for (call, more, code) in [
        ("define", json!({}), codes::CANNOT_DEFINE_MACHINE),
        ("start_from_memory", json!({ "then": "running" }), codes::CANNOT_RESTORE_MACHINE),
        ("start", json!({ "cold": true, "then": "running" }), codes::CANNOT_START_MACHINE),
        ("pull_links", json!({}), codes::CANNOT_START_MACHINE),
    ] {
        let host = Host::new().with_original();
        host.hypervisor.inner().fail = vec![call; 10];
        let before = host.everything();
        let (view, id) = host.restore(more).await;
        let fault = view.summary.fault.unwrap();
        codes::assert_told(&fault, code, "copy of web");
        assert_eq!(view.summary.status, JobStatus::RolledBack, "{call}");
        assert_eq!(host.everything(), before, "{call}");
        assert!(!host.hypervisor.inner().ran.contains(&id));
        if call == "start_from_memory" {
            assert!(fault.remedy.contains("--cold"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_that_cannot_be_taken_back_needs_an_operator_and_names_the_way() {
    let host = Host::new();
    host.hypervisor.inner().fail = [["start_from_memory"; 10], ["undefine"; 10]].concat();
    let (view, id) = host.restore(json!({ "then": "running" })).await;
    assert_eq!(view.summary.status, JobStatus::NeedsAttention, "{:?}", view.summary.fault);
    let define = view.steps.iter().find(|step| step.name.as_str() == "define").unwrap();
    let fault = define.undo_fault.clone().expect("the step that is left says why");
    codes::assert_told(&fault, codes::UNDO_FAILED, "copy of web");
    assert!(fault.remedy.contains(&format!("virsh undefine {id}")), "{fault}");
    assert!(host.hypervisor.inner().defined.contains_key(&id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_took_effect_and_said_it_failed_is_found_done() {
    for call in ["define", "start_from_memory", "resume"] {
        let host = Host::new().with_original();
        host.hypervisor.inner().doubt.push(call);
        let (view, id) = host.restore(json!({ "then": "running" })).await;
        assert_eq!(view.summary.status, JobStatus::Succeeded, "{call} {:?}", view.summary.fault);
        host.assert_restored(id);
        let state = host.hypervisor.inner();
        assert_eq!(state.calls.iter().filter(|c| **c == call).count(), 1, "{call} was repeated");
        assert!(state.running[&id].pulled && state.running[&id].memory);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_dies_before_it_is_let_go_rolls_back_and_one_that_dies_after_is_started_cold() {
    let host = Host::new();
    host.hypervisor.inner().die_after = Some("start_from_memory");
    let before = host.everything();
    let (view, _) = host.restore(json!({ "then": "running" })).await;
    assert_eq!(view.summary.status, JobStatus::RolledBack, "{:?}", view.summary.fault);
    assert_eq!(host.everything(), before);

    let host = Host::new();
    host.hypervisor.inner().die_after = Some("resume");
    host.hypervisor.inner().doubt.push("resume");
    let (view, id) = host.restore(json!({ "then": "running" })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    let running = host.hypervisor.inner().running[&id].clone();
    assert!(!running.paused && !running.memory, "the disks are the truth");
    let report: Report = serde_json::from_value(output(&view, "settle")).unwrap();
    assert!(
        !report.with_memory && report.notes.iter().any(|n| n.contains("without its memory")),
        "{report:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_head_of_a_memory_image_that_has_no_room_is_refused_with_the_offer_of_a_cold_restore() {
    let host = Host::new();
    let before = host.everything();
    let name = "n".repeat(HEAD);
    let (view, _) = host
        .restore(json!({ "name": name, "disks": {
        "vda": host.at("images/a"), "vdb": host.at("images/b") } }))
        .await;
    assert_eq!(view.summary.status, JobStatus::RolledBack, "{:?}", view.summary.fault);
    let fault = view.summary.fault.unwrap();
    codes::assert_told(&fault, codes::MEMORY_FORMAT_UNKNOWN, "memory.save");
    assert!(fault.remedy.contains("--cold"));
    assert_eq!(host.everything(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_shows_the_plan_and_touches_nothing() {
    let host = Host::new();
    let before = host.everything();
    let engine = host.engine(Arc::new(MemoryStore::new()));
    engine.recover().await.unwrap();
    let (request, _) = request(host.options(&json!({ "then": "running" })));
    let plan = engine.dry_run(request).await.unwrap();
    let names: Vec<_> = plan.steps.iter().map(|s| s.name.to_string()).collect();
    let expected = [
        "folder/0",
        "image/copy%20of%20web-vda.qcow2",
        "image/copy%20of%20web-vda.base1.raw",
        "image/copy%20of%20web-vdb.raw",
        "memory",
        "define",
        "start",
        "resume",
        "settle",
    ];
    assert_eq!(names, expected);
    assert_eq!(host.everything(), before);
}

/// A disk that was added to the definition for the next start, or taken from it, is none that the guest's memory knows.
#[tokio::test]
async fn memory_is_judged_by_the_disks_that_the_guest_had_and_not_by_those_of_its_next_start() {
    let more = format!("{DEFINITION}disk=vdc raw /var/lib/c\n");
    let host = Host::of(&more, DEFINITION, |_| {});
    let (view, id) = host.restore(json!({ "then": "running" })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
    let (defined, memory) = {
        let state = host.hypervisor.inner();
        (state.defined[&id].clone(), state.running[&id].memory)
    };
    assert!(!defined.contains("vdc"), "the original writes to it: {defined}");
    assert!(memory, "the guest has its memory");

    let host = Host::of(DEFINITION, &more, |_| {});
    assert_eq!(host.refused(json!({})).await, codes::MEMORY_INCOMPATIBLE.0);
    let (view, _) = host.restore(json!({ "cold": true })).await;
    assert_eq!(view.summary.status, JobStatus::Succeeded, "{:?}", view.summary.fault);
}
