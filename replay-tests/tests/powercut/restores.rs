//! The files of a restore: whatever a cut leaves, the job that goes on makes them whole, or leaves nothing of them; and the
//! backup that they come from stays as it was.
//!
//! The program is an engine with the product's own steps, on a plan of folders and files alone. Its journal tells of each
//! append and each note once it is durable, so that it is known for every instant what a restart finds in it. After a cut the
//! files are built anew *at their old paths*, the journal is filled with what was durable, and another engine goes on; in
//! half of the cases it is asked to cancel the job. Files that were built anew have other inodes: what the journal says of the
//! old ones is put into words of the new.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use fastrand::Rng;
use replay_tests::powercut::disk::{Disk, Image};
use replay_tests::powercut::trace;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use vmkeep_steps::image::root::Roots;
use vmkeep_steps::restore::folder::RestoreFolder;
use vmkeep_steps::restore::image::RestoreImage;
use vmkeep_steps::restore::machine::RestoreVariables;
use vmkeep_steps::snapshot::Places;
use vmkeep_store::MemoryStore;
use vmkeep_workflow::engine::{Config, Limits, NoEnvironment, SystemClock};
use vmkeep_workflow::journal::{Append, AppendError, Appended, JobFilter, Record, Reserve, StoreError};
use vmkeep_workflow::{
    Actor, Code, Engine, EventStore, Fault, IfBusy, JobId, JobRequest, JobStatus, JobSummary, Plan,
    PlanContext, Registry, Seq, Step, StepSpec, StreamId, Subject, Workflow, WorkflowName,
};

use crate::stores::{copy, number, workshop};
use crate::workload::{Act, program, runtime, say};

const NAME: &str = "restore-files";
/// Bytes of each disk.
const SIZE: u64 = 256 << 10;
/// What each file of the backup becomes.
const FILES: [(&str, &str); 4] = [
    ("vda.base1.raw", "copy-vda.base1.raw"),
    ("vda.qcow2", "copy-vda.qcow2"),
    ("vdb.raw", "copy-vdb.raw"),
    ("nvram.fd", "copy_VARS.fd"),
];

fn backup(root: &Path) -> PathBuf {
    root.join("backups/b")
}

fn images(root: &Path) -> PathBuf {
    root.join("images/new")
}

/// A journal that tells what is durable in it.
struct Telling(MemoryStore);

#[async_trait]
impl EventStore for Telling {
    fn id(&self) -> uuid::Uuid {
        self.0.id()
    }

    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let records: Vec<String> =
            append.records.iter().map(|bytes| String::from_utf8(bytes.clone()).unwrap()).collect();
        let told = json!({
            "stream": append.stream.to_string(), "expected": append.expected.0, "records": records,
            "summary": append.summary,
        });
        let appended = self.0.append(append).await?;
        say(&format!("append {told}"));
        Ok(appended)
    }

    async fn put_row(&self, job: JobId, row: &str, value: &Value) -> Result<(), StoreError> {
        self.0.put_row(job, row, value).await?;
        say(&format!("row {}", json!({ "job": job.to_string(), "row": row, "value": value })));
        Ok(())
    }

    async fn clear_rows(&self, job: JobId) -> Result<(), StoreError> {
        self.0.clear_rows(job).await?;
        say(&format!("clear {}", json!({ "job": job.to_string() })));
        Ok(())
    }

    async fn read(&self, stream: &StreamId, from: Seq, limit: usize) -> Result<Vec<Record>, StoreError> {
        self.0.read(stream, from, limit).await
    }

    async fn last(&self, stream: &StreamId) -> Result<Seq, StoreError> {
        self.0.last(stream).await
    }

    async fn streams(&self) -> Result<Vec<StreamId>, StoreError> {
        self.0.streams().await
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobSummary>, StoreError> {
        self.0.jobs(filter).await
    }

    async fn job(&self, job: JobId) -> Result<Option<JobSummary>, StoreError> {
        self.0.job(job).await
    }

    async fn key(&self, key: &str) -> Result<Option<StreamId>, StoreError> {
        self.0.key(key).await
    }

    async fn rows(&self, job: JobId) -> Result<Vec<(String, Value)>, StoreError> {
        self.0.rows(job).await
    }

    fn subscribe(&self) -> broadcast::Receiver<Record> {
        self.0.subscribe()
    }

    async fn reserve(&self) -> Result<Reserve, StoreError> {
        self.0.reserve().await
    }
}

/// The folder and the files of a restore, without a domain.
struct Files(PathBuf);

impl Files {
    fn step(&self, from: &str, to: &str) -> StepSpec {
        let bytes = fs::read(backup(&self.0).join(from)).unwrap();
        let mut input = json!({
            "wanted": {
                "backup": backup(&self.0), "name": from, "size": bytes.len(),
                "blake3": blake3::hash(&bytes).to_hex().as_str(),
            },
            "folder": images(&self.0), "name": to,
        });
        let kind = match from {
            "nvram.fd" => <RestoreVariables as Step>::KIND,
            _ => <RestoreImage as Step>::KIND,
        };
        if from != "nvram.fd" {
            input["virtual_size"] = json!(SIZE);
            input["format"] = json!("raw");
        }
        if from == "vda.qcow2" {
            input["format"] = json!("qcow2");
            input["backing"] = json!({ "name": FILES[0].1, "format": "raw" });
        }
        StepSpec::new(format!("image/{to}"), kind, format!("restore {to}"), input)
            .after("folder/0")
            .undoable()
    }
}

#[async_trait]
impl Workflow for Files {
    fn name(&self) -> WorkflowName {
        NAME.into()
    }

    async fn plan(&self, _: &PlanContext) -> Result<Plan, Fault> {
        let folder = json!({ "folder": images(&self.0), "missing": [images(&self.0)] });
        let kind = <RestoreFolder as Step>::KIND;
        let mut steps = vec![StepSpec::new("folder/0", kind, "make the folder", folder).undoable()];
        steps.extend(FILES.map(|(from, to)| self.step(from, to)));
        Plan::new(NAME, 1, "restore files", steps, None, Value::Null)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the restore", "files", e))
    }
}

fn engine(store: Arc<dyn EventStore>, root: &Path) -> Engine {
    let roots = Roots::open([root.join("backups"), root.join("images")]).unwrap();
    let places = Places { roots: Arc::new(roots) };
    let registry = Registry::new()
        .step(RestoreFolder(places.clone()))
        .step(RestoreImage(places.clone()))
        .step(RestoreVariables(places))
        .workflow(Files(root.to_owned()));
    Engine::new(Config {
        store,
        registry,
        clock: Arc::new(SystemClock),
        environment: Arc::new(NoEnvironment),
        limits: Limits::default(),
        on_fatal: Arc::new(|why| panic!("{why}")),
    })
}

fn who() -> Actor {
    Actor { who: "test".to_owned(), why: None }
}

/// What is recorded.
pub(crate) fn restore(root: &Path) {
    runtime().block_on(async {
        let engine = engine(Arc::new(Telling(MemoryStore::new())), root);
        let request = JobRequest {
            workflow: NAME.into(),
            subject: Subject { id: "copy".to_owned(), label: "copy".to_owned() },
            options: Value::Null,
            key: None,
            by: who(),
            if_busy: IfBusy::Refuse,
            limits: Vec::new(),
            retry_of: None,
        };
        let job = engine.request(request).await.unwrap();
        let summary = engine.wait(job).await.unwrap();
        assert_eq!(summary.status, JobStatus::Succeeded, "{:?}", summary.fault);
    });
}

/// A backup of two disks, one of them a chain, and of firmware variables.
fn prepare(root: &Path) {
    for folder in [backup(root), root.join("images")] {
        fs::create_dir_all(folder).unwrap();
    }
    let mut rng = Rng::with_seed(1);
    let mut bytes = |count: u64| -> Vec<u8> { (0..count).map(|_| rng.u8(..)).collect() };
    let at = |name: &str| backup(root).join(name);
    // Data, a hole, data.
    let mut base = bytes(SIZE);
    base[64 << 10..192 << 10].fill(0);
    fs::write(at("vda.base1.raw"), base).unwrap();
    fs::write(at("vdb.raw"), bytes(SIZE)).unwrap();
    fs::write(at("nvram.fd"), bytes(16 << 10)).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let done = Command::new(program).args(arguments).current_dir(backup(root)).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "vda.base1.raw", "vda.qcow2"]);
    run("qemu-io", &["-c", "write -q -P 7 64k 64k", "vda.qcow2"]);
}

/// Every file below a folder, by its path from there.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().map(Result::unwrap) {
        let name = PathBuf::from(entry.file_name());
        if entry.path().is_dir() {
            found.extend(contents(&entry.path()).into_iter().map(|(below, bytes)| (name.join(below), bytes)));
        } else {
            found.insert(name, fs::read(entry.path()).unwrap());
        }
    }
    found
}

struct Recording {
    _place: tempfile::TempDir,
    root: PathBuf,
    disk: Disk,
    /// All files as they are in the end, those of the backup among them.
    whole: BTreeMap<PathBuf, Vec<u8>>,
    /// The final paths of the files by the inodes that they had.
    inodes: HashMap<u64, PathBuf>,
}

impl Recording {
    fn make() -> Self {
        let place = workshop();
        let (root, before) = (place.path().join("root"), place.path().join("before"));
        prepare(&root);
        copy(&root, &before);
        let (program, arguments, environment) = program("none", Act::Restore, &root);
        let environment = environment.iter().map(|(name, value)| (*name, OsStr::new(value)));
        let disk = Disk::of(&trace::record(&program, &arguments, environment), &root, Some(&before)).unwrap();
        let whole = contents(&root);
        let (from, to) = (contents(&backup(&root)), contents(&images(&root)));
        assert_eq!((from.len(), to.len()), (FILES.len(), FILES.len()), "{:?}", to.keys());
        for (name, restored) in FILES.iter().filter(|(name, _)| !name.ends_with("qcow2")) {
            assert!(from[Path::new(name)] == to[Path::new(restored)], "{name}");
        }
        let inodes = whole
            .keys()
            .map(|path| root.join(path))
            .map(|path| (path.metadata().unwrap().ino(), path))
            .collect();
        Self { _place: place, root, disk, whole, inodes }
    }

    /// Says of a file's inode and times what they are now.
    fn translate(&self, value: &mut Value, job: JobId) {
        if let Some(ino) = value.get("ino").and_then(Value::as_u64)
            && value.get("mtime_nsec").is_some()
            && let Some(path) = self.inodes.get(&ino)
        {
            let name = path.file_name().unwrap().to_str().unwrap();
            let digest = blake3::hash(name.as_bytes()).to_hex();
            let aside = path.with_file_name(format!(".vmkeep-{}-{}", job.short(), &digest.as_str()[..16]));
            let there = [path, &aside].into_iter().find_map(|path| path.symlink_metadata().ok());
            if let Some(data) = there {
                value["dev"] = json!(data.dev());
                value["ino"] = json!(data.ino());
                value["mtime"] = json!(data.mtime());
                value["mtime_nsec"] = json!(data.mtime_nsec());
            }
        }
        match value {
            Value::Array(all) => all.iter_mut().for_each(|one| self.translate(one, job)),
            Value::Object(all) => all.values_mut().for_each(|one| self.translate(one, job)),
            _ => {}
        }
    }

    /// The journal as it was durable.
    async fn journal(&self, image: &Image<'_>) -> Arc<MemoryStore> {
        let store = Arc::new(MemoryStore::new());
        for line in image.said() {
            let Some((what, told)) = line.split_once(' ') else { continue };
            if !["append", "row", "clear"].contains(&what) {
                continue;
            }
            let told: Value = serde_json::from_str(told).unwrap();
            if what == "append" {
                let summary: Option<JobSummary> = serde_json::from_value(told["summary"].clone()).unwrap();
                let records = told["records"].as_array().unwrap().iter().map(|record| {
                    let mut record: Value = serde_json::from_str(record.as_str().unwrap()).unwrap();
                    if let Some(summary) = &summary {
                        self.translate(&mut record, summary.job);
                    }
                    record.to_string().into_bytes()
                });
                let append = Append {
                    stream: StreamId::from(told["stream"].as_str().unwrap().to_owned()),
                    expected: Seq(told["expected"].as_u64().unwrap()),
                    records: records.collect(),
                    summary: summary.clone(),
                    key: None,
                };
                store.append(append).await.unwrap();
                continue;
            }
            let job: JobId = told["job"].as_str().unwrap().parse().unwrap();
            if what == "clear" {
                store.clear_rows(job).await.unwrap();
                continue;
            }
            let mut value = told["value"].clone();
            self.translate(&mut value, job);
            store.put_row(job, told["row"].as_str().unwrap(), &value).await.unwrap();
        }
        store
    }

    /// Cuts the power at an instant that the seed chooses, and lets the job go on. How it ended; nothing if it had not begun.
    fn cut(&self, seed: u64) -> Result<Option<JobStatus>, String> {
        let mut rng = Rng::with_seed(seed);
        let at = self.disk.instant(&mut rng);
        let image = self.disk.cut(at, &mut rng);
        fs::remove_dir_all(&self.root).unwrap();
        fs::create_dir(&self.root).unwrap();
        image.write(&self.root).unwrap();
        let cancels = rng.bool();
        let why = |what: String| format!("VMKEEP_SEED={seed}, at {at}, cancelled: {cancels}: {what}");
        let ended = runtime().block_on(async {
            let store = self.journal(&image).await;
            let jobs = store.jobs(&JobFilter::default()).await.unwrap();
            let job = jobs.first().map(|job| job.job)?;
            let engine = engine(store, &self.root);
            engine.recover().await.unwrap();
            if cancels {
                // One that is over cannot be cancelled any more.
                let _ = engine.cancel(job, who()).await;
            }
            Some(engine.wait(job).await.unwrap())
        });
        let found = contents(&self.root);
        let backup = |path: &&PathBuf| path.starts_with("backups");
        for path in self.whole.keys().filter(backup) {
            if found.get(path) != self.whole.get(path) {
                return Err(why(format!("{} of the backup has changed", path.display())));
            }
        }
        let Some(summary) = ended else {
            let more = found.keys().find(|path| !backup(path));
            return more.map_or(Ok(None), |path| Err(why(format!("{} and no job", path.display()))));
        };
        match summary.status {
            JobStatus::Succeeded if found == self.whole => Ok(Some(summary.status)),
            JobStatus::Succeeded => {
                let names: Vec<_> = found.keys().chain(self.whole.keys()).collect();
                let other = names.into_iter().find(|path| found.get(*path) != self.whole.get(*path));
                Err(why(format!("it succeeded, and {other:?} is not as it should be")))
            }
            JobStatus::Cancelled if cancels => match fs::read_dir(self.root.join("images")).unwrap().next() {
                None => Ok(Some(summary.status)),
                Some(left) => Err(why(format!("it was taken back, and left {:?}", left.unwrap().path()))),
            },
            status => Err(why(format!("it is {status:?}: {:?}", summary.fault))),
        }
    }
}

#[test]
fn a_power_cut_leaves_a_restore_that_becomes_whole_or_nothing_and_never_harms_the_backup() {
    let recording = Recording::make();
    let (seed, images) = (number("VMKEEP_SEED", fastrand::u64(..)), number("VMKEEP_IMAGES", 300));
    let (mut whole, mut nothing) = (0, 0);
    for n in 0..images {
        match recording.cut(seed.wrapping_add(n)).unwrap_or_else(|why| panic!("{why}")) {
            Some(JobStatus::Succeeded) => whole += 1,
            Some(_) => nothing += 1,
            None => {}
        }
    }
    println!(
        "{images} images of {} instants of a restore: {whole} became whole, {nothing} were taken back (VMKEEP_SEED={seed})",
        recording.disk.instants()
    );
    assert!(whole > 0 && nothing > 0, "the cuts prove too little: {whole} whole, {nothing} taken back");
}

#[test]
fn a_sync_of_a_restore_that_is_left_out_is_found_out() {
    for name in ["copy-vda.base1.raw", "copy-vda.qcow2", "copy-vdb.raw", "copy_VARS.fd", "new", "images"] {
        let mut recording = Recording::make();
        recording.disk.without_syncs_of(name);
        let found = (0..3000).position(|seed| recording.cut(seed).is_err());
        println!("a restore without the syncs of {name}: the first cut that costs something is {found:?}");
        assert!(found.is_some(), "nobody misses the syncs of {name}");
    }
}
