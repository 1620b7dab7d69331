//! The steps of a live backup on a real hypervisor and a real guest, without the daemon around them: backups come out
//! whole, and whoever dies on the way the guest ends on its own images with everything it has flushed.
//!
//! The engine runs in a process of its own (this very binary, as the hypervisor's unprivileged user), so that it can be
//! killed as kill -9 kills.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may fail like a test"
)]

use replay_tests::testbed::{
    DiskSpec, Format, Guest, GuestSpec, Hypervisor, MIB, TickReport, assert_consistent, files_in, ticks_on,
};
use serde_json::{Value, json};
use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmkeep_host::hypervisor::Libvirt;
use vmkeep_steps::hypervisor::{Hypervisor as _, LocalStorage};
use vmkeep_steps::image::root::Roots;
use vmkeep_steps::snapshot::{Places, World};
use vmkeep_steps::workflows::snapshot::{Settings, Snapshot};
use vmkeep_store::{StoreConfig, open};
use vmkeep_workflow::engine::{Config, Limits, NoEnvironment, SystemClock};
use vmkeep_workflow::{Actor, Engine, EventStore, IfBusy, JobRequest, Registry, Subject};

const STORE: &str = "the-test-store";

/// Plays vmkeepd: recovers what there is, asks for the backup if that was not done yet, and tells how it ended.
#[test]
#[ignore = "plays vmkeepd for the other tests"]
fn daemon() {
    let env = |name: &str| std::env::var(name).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let summary = runtime.block_on(async {
        let libvirt = Libvirt::start(&env("LIVE_URI")).unwrap();
        while libvirt.reachable().is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let domain = libvirt.find(&env("LIVE_DOMAIN")).await.unwrap();
        let store = open(&StoreConfig { reserve: 0, ..StoreConfig::new(env("LIVE_STORE")) }).unwrap();
        let store: Arc<dyn EventStore> = store;
        let world = World { hypervisor: Arc::new(libvirt), storage: Arc::new(LocalStorage::default()) };
        let released = vmkeep_steps::snapshot::safety::release(&world, STORE, &domain.id).await.unwrap();
        println!("RELEASED {}", serde_json::to_string(&released).unwrap());
        let places = Places { roots: Arc::new(Roots::open([env("LIVE_ROOT")]).unwrap()) };
        let settings = Settings::new(STORE, "vmkeep test");
        let registry = Snapshot::new(world, places, settings).register(Registry::new());
        let engine = Engine::new(Config {
            store,
            registry,
            clock: Arc::new(SystemClock),
            environment: Arc::new(NoEnvironment),
            limits: Limits::default(),
            on_fatal: Arc::new(|why| panic!("{why}")),
        });
        let recovery = engine.recover().await.unwrap();
        assert!(recovery.parked.is_empty(), "{:?}", recovery.parked);
        let request = JobRequest {
            workflow: "snapshot".into(),
            subject: Subject { id: domain.id.to_string(), label: domain.name.clone() },
            options: serde_json::from_str(&env("LIVE_OPTIONS")).unwrap(),
            key: Some("the-one".to_owned()),
            by: Actor { who: "test".to_owned(), why: None },
            if_busy: IfBusy::Refuse,
            limits: Vec::new(),
            retry_of: None,
        };
        let job = engine.request(request).await.unwrap();
        let told = tell_steps(engine.clone(), job);
        let summary = engine.wait(job).await.unwrap();
        told.abort();
        for (seq, event) in engine.history(job).await.unwrap() {
            let text = serde_json::to_string(&event.body).unwrap();
            println!("EVENT {} {} {}", seq.0, event.at, text.chars().take(600).collect::<String>());
        }
        summary
    });
    println!("SUMMARY {}", serde_json::to_string(&summary).unwrap());
}

/// Tells on the standard output which steps have begun, for tests that act at that moment.
fn tell_steps(engine: Engine, job: vmkeep_workflow::JobId) -> tokio::task::JoinHandle<()> {
    tokio::spawn(async move {
        let mut told = 0;
        loop {
            for (seq, event) in engine.history(job).await.unwrap() {
                if seq.0 > told {
                    told = seq.0;
                    let body = serde_json::to_string(&event.body).unwrap();
                    println!("NOW {body}");
                    let at = std::env::var("LIVE_CANCEL_AT").unwrap_or_default();
                    if !at.is_empty() && body.contains("step_started") && body.contains(&at) {
                        engine.cancel(job, Actor { who: "test".to_owned(), why: None }).await.unwrap();
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
}

/// A guest with its backups' folder and the engine's store.
struct Bed {
    hypervisor: Hypervisor,
    guest: Guest,
    root: PathBuf,
    store: PathBuf,
    options: Value,
    definition: String,
}

impl Bed {
    fn new(spec: &GuestSpec, options: &str) -> Self {
        let hypervisor = Hypervisor::start_temp().unwrap();
        let guest = Guest::boot(&hypervisor, spec).unwrap();
        guest.wait_tick(5).unwrap();
        let (root, store) = (hypervisor.dir().join("backups"), hypervisor.dir().join("store"));
        hypervisor.run("mkdir", [root.as_os_str()]).unwrap();
        let mut options: Value = serde_json::from_str(options).unwrap();
        options["target"] = json!(root);
        let definition = guest.virsh("dumpxml", &["--inactive", "--security-info"]).unwrap();
        Self { hypervisor, guest, root, store, options, definition }
    }

    fn daemon(&self) -> Command {
        let mut command = self.hypervisor.command(std::env::current_exe().unwrap());
        command
            .args(["--exact", "daemon", "--ignored", "--nocapture"])
            .env("LIVE_URI", self.hypervisor.socket_uri())
            .env("LIVE_DOMAIN", self.guest.uuid())
            .env("LIVE_STORE", &self.store)
            .env("LIVE_ROOT", &self.root)
            .env("LIVE_OPTIONS", self.options.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the engine to the end of its job.
    fn finish(&self) -> Ended {
        wait(self.daemon().spawn().unwrap(), "")
    }

    /// Runs it, and does something as soon as a line is told that holds all these words.
    fn finish_but(&self, words: &[&str], act: impl FnOnce()) -> Ended {
        let mut child = self.daemon().spawn().unwrap();
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        let mut text = String::new();
        let mut act = Some(act);
        for line in &mut lines {
            let line = line.unwrap();
            if line.starts_with("NOW ")
                && words.iter().all(|word| line.contains(word))
                && let Some(act) = act.take()
            {
                act();
            }
            text.push_str(&line);
            text.push('\n');
        }
        wait(child, &text)
    }

    fn backup(&self) -> Option<PathBuf> {
        let domain = std::fs::read_dir(&self.root).unwrap().next()?.unwrap().path();
        let mut backups: Vec<_> = std::fs::read_dir(domain).unwrap().map(|e| e.unwrap().path()).collect();
        backups.retain(|path| path.join("manifest.json").exists());
        assert!(backups.len() <= 1, "{backups:?}");
        backups.pop()
    }

    /// Nothing of the job is left in the domain, and the guest runs with all that it ever flushed.
    fn assert_home(&self, ended: &Ended) {
        let name = self.guest.name();
        let text = &ended.text;
        let definition = self.guest.virsh("dumpxml", &["--inactive", "--security-info"]).unwrap();
        // libvirt keeps the element that held the marker; it is empty.
        let definition = definition.replace("  <metadata/>\n", "");
        assert_eq!(definition, self.definition, "the definition is as it was\n{text}");
        assert_eq!(self.guest.state().unwrap().state, "running", "{text}");
        let live = self.hypervisor.disk_files_in_live_xml(name).unwrap();
        for (target, disk) in self.hypervisor.disk_files_in_qemu(name).unwrap() {
            assert_eq!(disk.file, self.guest.disk(&target).unwrap(), "{text}");
            assert_eq!(live[&target], disk.file, "{text}");
        }
        let held = format!("{:?}", self.hypervisor.files_held_by_qemu(name).unwrap());
        assert!(!held.contains("vmkeep-"), "{held}\n{text}");
        let left = format!("{:?}", files_in(&self.hypervisor.images()).unwrap());
        assert!(!left.contains("vmkeep-"), "{left}\n{text}");
        assert!(
            !self.guest.virsh("dumpxml", &[]).unwrap().contains("urn:vmkeep"),
            "the marker is gone\n{text}"
        );
        self.guest.wait_more(5).unwrap();
        self.assert_ticks();
    }

    /// Everything that the guest has told to be flushed is on both disks.
    fn assert_ticks(&self) {
        let printed = self.guest.last_tick();
        self.guest.destroy().unwrap();
        let [a, b] = ["vda", "vdb"].map(|target| ticks_of(&self.guest.disk(target).unwrap()));
        assert_consistent(&a, &b);
        assert!(b.last >= printed, "tick {printed} was printed, the disks end at {}", b.last);
    }

    /// The backup is whole, and holds a point in time.
    fn assert_backup(&self) -> Value {
        let backup = self.backup().expect("a backup");
        let text = std::fs::read_to_string(backup.join("manifest.json")).unwrap();
        let manifest: Value = serde_json::from_str(&text).unwrap();
        for file in manifest["files"].as_array().unwrap() {
            let path = backup.join(file["name"].as_str().unwrap());
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(file["size"], bytes.len(), "{}", path.display());
            assert_eq!(file["blake3"], blake3::hash(&bytes).to_hex().as_str(), "{}", path.display());
        }
        let disks = manifest["disks"].as_array().unwrap();
        let [a, b] = [0, 1].map(|at: usize| ticks_of(&backup.join(disks[at]["chain"][0].as_str().unwrap())));
        assert_consistent(&a, &b);
        manifest
    }
}

fn ticks_of(image: &Path) -> TickReport {
    ticks_on(image, Format::probe(image).unwrap()).unwrap()
}

struct Ended {
    summary: Option<Value>,
    text: String,
}

fn wait(child: Child, before: &str) -> Ended {
    let output = child.wait_with_output().unwrap();
    let lossy = String::from_utf8_lossy;
    let text = format!("{before}{}{}", lossy(&output.stdout), lossy(&output.stderr));
    let summary = text.lines().find_map(|line| line.strip_prefix("SUMMARY "));
    let summary = summary.map(|line| serde_json::from_str(line).unwrap());
    let text = text.lines().filter(|line| !line.starts_with("NOW ")).collect::<Vec<_>>().join("\n");
    Ended { summary, text }
}

impl Ended {
    fn status(&self) -> &str {
        self.summary.as_ref().unwrap_or_else(|| panic!("no summary: {}", self.text))["status"]
            .as_str()
            .unwrap()
    }
}

fn two_disks(name: &str) -> GuestSpec {
    GuestSpec::new(name).disk(DiskSpec::new(64 * MIB)).disk(DiskSpec::new(64 * MIB).raw())
}

/// A guest whose disks take some seconds to be copied at 4 MB/s.
fn slow_to_copy(name: &str) -> GuestSpec {
    let disk = || DiskSpec::new(64 * MIB).data(24 * MIB);
    GuestSpec::new(name).disk(disk()).disk(disk().raw())
}

const WITH_MEMORY: &str = r#"{"memory":{"if_slow":"fail"}}"#;
const DISKS_ONLY: &str = r#"{"freeze":"if-possible"}"#;

#[test]
fn a_live_backup_holds_memory_and_disks_and_leaves_the_guest_as_it_was() {
    let bed = Bed::new(&two_disks("web \"ä\" $(id)"), WITH_MEMORY);
    let ended = bed.finish();
    println!("{}", ended.text);
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    assert_eq!(bed.assert_backup()["consistency"], "memory-and-disks");
    bed.assert_home(&ended);
}

#[test]
fn a_backup_of_disks_freezes_a_guest_that_has_an_agent() {
    let spec = two_disks("a").disk(DiskSpec::new(64 * MIB).ext4()).agent();
    let bed = Bed::new(&spec, DISKS_ONLY);
    let ended = bed.finish();
    println!("{}", ended.text);
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    assert_eq!(bed.assert_backup()["consistency"], "quiesced", "{}", ended.text);
    bed.assert_home(&ended);
}

#[test]
fn libvirtd_killed_when_the_snapshot_has_begun_costs_nothing_but_time() {
    let bed = Bed::new(&two_disks("l"), WITH_MEMORY);
    let ended = bed.finish_but(&["\"step_started\"", "\"take\""], || {
        bed.hypervisor.kill_libvirtd().unwrap();
        bed.hypervisor.start_libvirtd().unwrap();
    });
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    bed.assert_backup();
    bed.assert_home(&ended);
}

#[test]
fn libvirtd_killed_when_the_pivot_has_begun_costs_nothing_but_time() {
    let bed = Bed::new(&two_disks("l"), DISKS_ONLY);
    let ended = bed.finish_but(&["\"step_started\"", "\"pivot\""], || {
        bed.hypervisor.kill_libvirtd().unwrap();
        bed.hypervisor.start_libvirtd().unwrap();
    });
    println!("{}", ended.text);
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    bed.assert_backup();
    bed.assert_home(&ended);
}

#[test]
fn a_guest_that_dies_while_it_is_copied_and_is_started_again_loses_nothing() {
    let bed = Bed::new(&slow_to_copy("q"), r#"{"bandwidth":4000000}"#);
    let ended = bed.finish_but(&["\"step_started\"", "\"copy/vda.qcow2\""], || {
        bed.guest.wait_more(5).unwrap();
        bed.hypervisor.kill_qemu(bed.guest.name()).unwrap();
        bed.guest.wait_state("shut off").unwrap();
        bed.guest.start().unwrap();
        bed.guest.wait_more(5).unwrap();
    });
    println!("{}", ended.text);
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    bed.assert_backup();
    bed.assert_home(&ended);
}

#[test]
fn a_guest_that_dies_while_it_is_copied_and_stays_off_is_brought_home_all_the_same() {
    let bed = Bed::new(&slow_to_copy("q"), r#"{"bandwidth":4000000}"#);
    let ended = bed.finish_but(&["\"step_started\"", "\"copy/vda.qcow2\""], || {
        bed.guest.wait_more(5).unwrap();
        bed.hypervisor.kill_qemu(bed.guest.name()).unwrap();
        bed.guest.wait_state("shut off").unwrap();
    });
    println!("{}", ended.text);
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    bed.assert_backup();
    bed.guest.start().unwrap();
    bed.assert_home(&ended);
}

#[test]
fn memory_that_takes_too_long_ends_as_the_caller_chose_and_the_guest_runs_on() {
    for (if_slow, status, consistency) in [
        ("pause", "succeeded", Some("memory-and-disks")),
        ("disk-only", "succeeded", Some("crash")),
        ("fail", "rolled_back", None),
    ] {
        let options = format!(r#"{{"memory":{{"if_slow":"{if_slow}","seconds":1}}}}"#);
        let bed = Bed::new(&two_disks("m").memory_mib(512), &options);
        // Faster than any disk: the save would never end by itself.
        bed.guest.send("mem 300 0").unwrap();
        let ended = bed.finish();
        bed.guest.send("mem 0").unwrap();
        assert_eq!(ended.status(), status, "{if_slow}: {}", ended.text);
        match consistency {
            Some(consistency) => {
                assert_eq!(bed.assert_backup()["consistency"], consistency, "{}", ended.text)
            }
            None => {
                assert_eq!(ended.summary.as_ref().unwrap()["fault"]["code"], 97, "{}", ended.text);
                assert_eq!(bed.backup(), None);
            }
        }
        bed.assert_home(&ended);
    }
}

#[test]
fn a_backup_that_is_cancelled_while_it_copies_brings_the_guest_home_and_leaves_nothing() {
    let bed = Bed::new(&slow_to_copy("c"), r#"{"bandwidth":4000000}"#);
    let mut daemon = bed.daemon();
    daemon.env("LIVE_CANCEL_AT", "copy/vda.qcow2");
    let ended = wait(daemon.spawn().unwrap(), "");
    assert_eq!(ended.status(), "cancelled", "{}", ended.text);
    assert_eq!(bed.backup(), None);
    let left = format!("{:?}", files_in(&bed.root).unwrap());
    assert!(!left.contains("vd"), "{left}");
    bed.assert_home(&ended);
}

#[test]
fn linked_clones_are_copied_with_their_templates_and_committed_only_to_their_own_top() {
    let clone = || DiskSpec::new(64 * MIB).data(8 * MIB).chain(2);
    let bed = Bed::new(&GuestSpec::new("clone").disk(clone()).disk(clone()), WITH_MEMORY);
    let ended = bed.finish();
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    let manifest = bed.assert_backup();
    assert!(manifest["disks"][0]["chain"].as_array().unwrap().len() > 1, "{manifest:#}");
    bed.assert_home(&ended);
}

/// libvirtd died between QEMU's transaction and its own status file: it believes that the domain is on its bases while
/// QEMU writes to the overlays. The same state is made here by giving it back the status file from before.
#[test]
fn a_libvirtd_that_missed_the_snapshot_is_healed_through_the_monitor() {
    let bed = Bed::new(&slow_to_copy("t"), r#"{"bandwidth":4000000}"#);
    let status = bed.hypervisor.env()["XDG_RUNTIME_DIR"].clone();
    let status = Path::new(&status).join("libvirt/qemu/run/t.xml");
    let before = std::fs::read(&status).unwrap();
    let ended = bed.finish_but(&["\"step_started\"", "\"copy/vda.qcow2\""], || {
        bed.hypervisor.kill_libvirtd().unwrap();
        std::fs::write(&status, &before).unwrap();
        bed.hypervisor.start_libvirtd().unwrap();
        let live = bed.hypervisor.disk_files_in_live_xml("t").unwrap();
        let qemu = bed.hypervisor.disk_files_in_qemu("t").unwrap();
        assert_ne!(live["vda"], qemu["vda"].file, "libvirt is wrong about the disk");
    });
    println!("{}", ended.text);
    assert_eq!(ended.status(), "succeeded", "{}", ended.text);
    bed.assert_backup();
    bed.assert_home(&ended);
}

/// Kills vmkeepd right before, and right after, each event that the job writes.
fn killed_at_every_event(name: &str, options: &str) {
    let first = Bed::new(&two_disks(name), options);
    let ended = first.finish();
    let events = ended.summary.as_ref().unwrap()["seq"].as_u64().unwrap();
    drop(first);
    let only: Option<u64> = std::env::var("LIVE_ONLY").ok().map(|n| n.parse().unwrap());
    for seq in (1..=events).filter(|seq| only.is_none_or(|only| only == *seq)) {
        for side in ["before", "after"] {
            let bed = Bed::new(&two_disks(name), options);
            let mut daemon = bed.daemon();
            daemon.env("VMKEEP_CRASH_AT", format!("append/{side}/snapshot/{seq}"));
            let killed = wait(daemon.spawn().unwrap(), "");
            let begun = Instant::now();
            let ended = bed.finish();
            let reached = if killed.summary.is_some() { "not reached" } else { "killed" };
            println!("{side} {seq}: {reached} -> {} in {:?}", ended.status(), begun.elapsed());
            assert_eq!(ended.status(), "succeeded", "{side} {seq}\n{}\n{}", killed.text, ended.text);
            bed.assert_backup();
            bed.assert_home(&ended);
        }
    }
}

#[test]
#[ignore = "minutes; run by name"]
fn vmkeepd_may_be_killed_at_every_event_of_a_backup_with_memory() {
    killed_at_every_event("k", WITH_MEMORY);
}

#[test]
#[ignore = "minutes; run by name"]
fn vmkeepd_may_be_killed_at_every_event_of_a_backup_of_disks() {
    killed_at_every_event("k", DISKS_ONLY);
}
