//! The files of a restore: whatever a cut leaves, the job that goes on makes them whole, or leaves nothing of them; and the
//! backup that they come from stays as it was.
//!
//! The program is an engine with the product's own steps, on a plan of folders and files alone; [`crate::fetches`] has another
//! such plan, for a vault. After a cut the files are built anew *at their old paths*, the journal is filled with what was
//! durable, and another engine goes on; in half of the cases it is asked to cancel the job. Files that were built anew have other
//! inodes: what the journal says of the old ones is put into words of the new.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use fastrand::Rng;
use replay_tests::powercut::disk::Disk;
use replay_tests::powercut::trace;
use serde_json::{Value, json};
use vmkeep_steps::image::root::Roots;
use vmkeep_steps::restore::folder::RestoreFolder;
use vmkeep_steps::restore::image::RestoreImage;
use vmkeep_steps::restore::machine::RestoreVariables;
use vmkeep_steps::snapshot::Places;
use vmkeep_workflow::{
    Code, Fault, JobId, JobStatus, Plan, PlanContext, Registry, Step, StepSpec, Workflow, WorkflowName,
};

use crate::journals::{Telling, filled, go_on, succeed, translated};
use crate::stores::{copy, number, workshop};
use crate::workload::{Act, program, runtime};

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

pub(crate) fn places(root: &Path, kept: &str) -> Places {
    Places { roots: Arc::new(Roots::open([root.join(kept), root.join("images")]).unwrap()) }
}

fn registry(root: &Path) -> Registry {
    let places = places(root, "backups");
    Registry::new()
        .step(RestoreFolder(places.clone()))
        .step(RestoreImage(places.clone()))
        .step(RestoreVariables(places))
        .workflow(Files(root.to_owned()))
}

/// What is recorded.
pub(crate) fn restore(root: &Path) {
    runtime().block_on(succeed(NAME, registry(root)));
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

/// What the files come from.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) act: Act,
    /// Makes it below a root.
    pub(crate) prepare: fn(&Path),
    /// The steps and the workflow.
    pub(crate) registry: fn(&Path) -> Registry,
    /// Folders that a job may write to besides that of the images.
    pub(crate) others: &'static [&'static str],
    /// The names of the files that are made.
    pub(crate) files: &'static [&'static str],
    /// Whether qcow2 images are converted from raw ones.
    pub(crate) converts: bool,
}

pub(crate) struct Recording {
    place: tempfile::TempDir,
    root: PathBuf,
    pub(crate) disk: Disk,
    kind: Kind,
    /// What there was before.
    before: BTreeMap<PathBuf, Vec<u8>>,
    /// The files as they are in the end.
    whole: BTreeMap<PathBuf, Vec<u8>>,
    /// The final paths of the files by the inodes that they had.
    inodes: HashMap<u64, PathBuf>,
    /// What was durable of the journal when this began.
    journal: Vec<String>,
    /// Files that the journal spoke of when this began and that were not there: another that has their name now is not they.
    gone: HashSet<u64>,
    /// Whether the job may have been asked to take itself back.
    cancelled: bool,
}

impl Recording {
    pub(crate) fn make(kind: Kind) -> Self {
        let place = workshop();
        let (root, before) = (place.path().join("root"), place.path().join("before"));
        (kind.prepare)(&root);
        copy(&root, &before);
        let (program, arguments, environment) = program("none", kind.act, &root);
        let environment = environment.iter().map(|(name, value)| (*name, OsStr::new(value)));
        let disk = Disk::of(&trace::record(&program, &arguments, environment), &root, Some(&before)).unwrap();
        let whole = contents(&images(&root));
        assert_eq!(whole.len(), kind.files.len(), "{:?}", whole.keys());
        let inode = |path: PathBuf| (path.metadata().unwrap().ino(), path);
        let inodes = contents(&root).keys().map(|path| inode(root.join(path))).collect();
        let (journal, before) = (Vec::new(), contents(&before));
        Self {
            place,
            root,
            disk,
            kind,
            before,
            whole,
            inodes,
            journal,
            gone: HashSet::new(),
            cancelled: false,
        }
    }

    /// The recovery from a cut at an instant that the seed chooses, as a recording of its own. Nothing if there was nothing to
    /// recover.
    pub(crate) fn of_recovery(&self, seed: u64) -> Option<Self> {
        let mut rng = Rng::with_seed(seed);
        let at = self.disk.instant(&mut rng);
        let image = self.disk.cut(at, &mut rng);
        image.said().find(|line| line.starts_with("append "))?;
        let place = workshop();
        let (root, before) = (self.root.clone(), place.path().join("before"));
        fs::remove_dir_all(&root).unwrap();
        fs::create_dir(&root).unwrap();
        image.write(&root).unwrap();
        copy(&root, &before);
        let cancelled = seed % 2 == 1;
        // What is said of files means those that are there now.
        let mut journal: Vec<String> =
            self.journal.iter().cloned().chain(image.said().map(str::to_owned)).collect();
        let job = translated(&mut journal, |value, job| self.translate(value, job))?;
        let gone = RefCell::new(HashSet::new());
        translated(&mut journal.clone(), |value, _| self.missing(value, &mut gone.borrow_mut()));
        let gone = gone.into_inner();
        fs::write(beside(&root, "journal"), journal.join("\n")).unwrap();
        fs::write(beside(&root, "cancelled"), cancelled.to_string()).unwrap();
        let act = if self.kind.converts { Act::FetchAgain } else { Act::RestoreAgain };
        let (program, arguments, environment) = program("none", act, &root);
        let environment = environment.iter().map(|(name, value)| (*name, OsStr::new(value)));
        let inode = |at: PathBuf, path: PathBuf| Some((at.metadata().ok()?.ino(), path));
        let mut inodes: HashMap<u64, PathBuf> = HashMap::new();
        for name in self.kind.files {
            let path = images(&root).join(name);
            let under_way = path.with_file_name(self.asides(name, job));
            inodes.extend([path.clone(), under_way].into_iter().filter_map(|at| inode(at, path.clone())));
        }
        let disk = Disk::of(&trace::record(&program, &arguments, environment), &root, Some(&before)).unwrap();
        let all = contents(&root).into_keys().map(|path| root.join(path));
        inodes.extend(all.filter_map(|path| inode(path.clone(), path)));
        let (before, whole) = (self.before.clone(), self.whole.clone());
        Some(Self { place, root, disk, kind: self.kind, before, whole, inodes, journal, gone, cancelled })
    }

    /// The files as they are in the end.
    pub(crate) fn whole(&self, name: &str) -> &[u8] {
        &self.whole[Path::new(name)]
    }

    /// Where a file of this name may be while it is under way.
    fn asides(&self, name: &str, job: JobId) -> String {
        let what = match self.kind.converts && name.ends_with(".qcow2") {
            true => format!("{name}, converted"),
            false => name.to_owned(),
        };
        aside(&what, job)
    }

    /// Says of a file's inode and times what they are now.
    fn translate(&self, value: &mut Value, job: JobId) {
        if let Some(ino) = value.get("ino").and_then(Value::as_u64)
            && value.get("mtime_nsec").is_some()
        {
            let there = match self.inodes.get(&ino) {
                Some(path) => {
                    let name = path.file_name().unwrap().to_str().unwrap();
                    let aside = path.with_file_name(self.asides(name, job));
                    [path.clone(), aside].into_iter().find_map(|path| path.symlink_metadata().ok())
                }
                // Of a file that is gone in the end: the raw one of an image that was converted.
                None if self.gone.contains(&ino) => None,
                None => {
                    let mut converted = self.kind.files.iter().filter(|name| name.ends_with(".qcow2"));
                    let name = converted.next().filter(|_| self.kind.converts);
                    name.and_then(|name| images(&self.root).join(aside(name, job)).symlink_metadata().ok())
                }
            };
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

    /// Which files a value speaks of that are not there, or not as long as it says.
    fn missing(&self, value: &Value, gone: &mut HashSet<u64>) {
        if let (Some(ino), Some(size)) = (value["ino"].as_u64(), value["size"].as_u64()) {
            let there = contents(&self.root).into_keys().any(|path| {
                let data = self.root.join(path).metadata().unwrap();
                (data.ino(), data.len()) == (ino, size)
            });
            if !there {
                gone.insert(ino);
            }
        }
        match value {
            Value::Array(all) => all.iter().for_each(|one| self.missing(one, gone)),
            Value::Object(all) => all.values().for_each(|one| self.missing(one, gone)),
            _ => {}
        }
    }

    /// Cuts the power at an instant that the seed chooses, and lets the job go on. How it ended; nothing if it had not begun.
    pub(crate) fn cut(&self, seed: u64) -> Result<Option<JobStatus>, String> {
        let mut rng = Rng::with_seed(seed);
        let at = self.disk.instant(&mut rng);
        let image = self.disk.cut(at, &mut rng);
        fs::remove_dir_all(&self.root).unwrap();
        fs::create_dir(&self.root).unwrap();
        image.write(&self.root).unwrap();
        let cancels = rng.bool();
        let why = |what: String| format!("VMKEEP_SEED={seed}, at {at}, cancelled: {cancels}: {what}");
        let ended = runtime().block_on(async {
            let lines = self.journal.iter().map(String::as_str).chain(image.said());
            let store = filled(lines, |value, job| self.translate(value, job)).await;
            go_on(store, (self.kind.registry)(&self.root), cancels).await
        });
        let found = contents(&self.root);
        if let Some((path, _)) = self.before.iter().find(|(path, bytes)| found.get(*path) != Some(*bytes)) {
            return Err(why(format!("{} has changed", path.display())));
        }
        let free = |path: &&PathBuf| {
            let named = self.before.contains_key(*path) || path.starts_with("images");
            !named && !self.kind.others.iter().any(|other| path.starts_with(other))
        };
        if let Some(path) = found.keys().find(free) {
            return Err(why(format!("{} has no business there", path.display())));
        }
        let found = contents(&images(&self.root));
        let Some(summary) = ended else {
            return match found.keys().next() {
                None => Ok(None),
                Some(path) => Err(why(format!("{} and no job", path.display()))),
            };
        };
        match summary.status {
            JobStatus::Succeeded => {
                let names = found.keys().chain(self.whole.keys());
                let other = names.into_iter().find(|path| !self.is_whole(path, found.get(*path)));
                match other {
                    None => Ok(Some(summary.status)),
                    other => Err(why(format!("it succeeded, and {other:?} is not as it should be"))),
                }
            }
            JobStatus::Cancelled if cancels || self.cancelled => {
                match fs::read_dir(self.root.join("images")).unwrap().next() {
                    None => Ok(Some(summary.status)),
                    Some(left) => Err(why(format!("it was taken back, and left {:?}", left.unwrap().path()))),
                }
            }
            status => Err(why(format!("it is {status:?}: {:?}", summary.fault))),
        }
    }

    /// Whether a file is what it is in the end; one that QEMU has converted may have it in other places.
    fn is_whole(&self, name: &Path, found: Option<&Vec<u8>>) -> bool {
        let (Some(found), Some(whole)) = (found, self.whole.get(name)) else { return false };
        if found == whole {
            return true;
        }
        if !self.kind.converts || name.extension() != Some(OsStr::new("qcow2")) {
            return false;
        }
        let other = self.place.path().join("whole.qcow2");
        fs::write(&other, whole).unwrap();
        let images = [other, images(&self.root).join(name)];
        let run = |arguments: &[&str], images: &[PathBuf]| {
            Command::new("qemu-img").args(arguments).args(images).output().unwrap().status.success()
        };
        run(&["compare", "-q", "-f", "qcow2", "-F", "qcow2"], &images)
            && run(&["check", "-q", "-f", "qcow2"], &images[1..])
    }
}

fn beside(root: &Path, name: &str) -> PathBuf {
    root.with_file_name(name)
}

/// What is recorded of a recovery.
pub(crate) fn recover(root: &Path, registry: fn(&Path) -> Registry) {
    let journal = fs::read_to_string(beside(root, "journal")).unwrap();
    let cancels = fs::read_to_string(beside(root, "cancelled")).unwrap() == "true";
    runtime().block_on(async {
        let store = Arc::new(Telling(filled(journal.lines(), |_, _| {}).await));
        go_on(store, registry(root), cancels).await.unwrap();
    });
}

pub(crate) fn restore_again(root: &Path) {
    recover(root, registry);
}

/// The name of a file that a job is writing.
fn aside(what: &str, job: JobId) -> String {
    let digest = blake3::hash(what.as_bytes()).to_hex();
    format!(".vmkeep-{}-{}", job.short(), &digest.as_str()[..16])
}

/// Cuts as often as is asked for. How many became whole, how many were taken back.
pub(crate) fn becomes_whole_or_nothing(recording: &Recording, what: &str, images: u64) {
    let (seed, images) = (number("VMKEEP_SEED", fastrand::u64(..)), number("VMKEEP_IMAGES", images));
    let (mut whole, mut nothing) = (0, 0);
    for n in 0..images {
        match recording.cut(seed.wrapping_add(n)).unwrap_or_else(|why| panic!("{why}")) {
            Some(JobStatus::Succeeded) => whole += 1,
            Some(_) => nothing += 1,
            None => {}
        }
    }
    println!(
        "{images} images of {} instants of {what}: {whole} became whole, {nothing} were taken back (VMKEEP_SEED={seed})",
        recording.disk.instants()
    );
    assert!(whole > 0 && nothing > 0, "the cuts prove too little: {whole} whole, {nothing} taken back");
}

/// Cuts recoveries, each a few times.
pub(crate) fn survives_a_second_cut(recording: &Recording, what: &str, recoveries: u64) {
    const CUTS: u64 = 8;
    let (seed, pairs) =
        (number("VMKEEP_SEED", fastrand::u64(..)), number("VMKEEP_IMAGES", recoveries * CUTS));
    let (mut done, mut whole, mut nothing) = (0, 0, 0);
    for first in seed.. {
        let Some(recovery) = recording.of_recovery(first) else { continue };
        for second in 0..CUTS.min(pairs - done) {
            let second = first.wrapping_add(second);
            match recovery
                .cut(second)
                .unwrap_or_else(|why| panic!("after a cut with VMKEEP_SEED={first}: {why}"))
            {
                Some(JobStatus::Succeeded) => whole += 1,
                _ => nothing += 1,
            }
            done += 1;
        }
        if done == pairs {
            break;
        }
    }
    println!(
        "{pairs} pairs of cuts of {what}: {whole} became whole, {nothing} were taken back (VMKEEP_SEED={seed})"
    );
    assert!(whole > 0 && nothing > 0, "the cuts prove too little: {whole} whole, {nothing} taken back");
}

const KIND: Kind = Kind {
    act: Act::Restore,
    prepare,
    registry,
    others: &[],
    files: &["copy-vda.base1.raw", "copy-vda.qcow2", "copy-vdb.raw", "copy_VARS.fd"],
    converts: false,
};

#[test]
fn a_power_cut_leaves_a_restore_that_becomes_whole_or_nothing_and_never_harms_the_backup() {
    let recording = Recording::make(KIND);
    for (name, restored) in FILES.iter().filter(|(name, _)| !name.ends_with("qcow2")) {
        assert!(recording.before[&Path::new("backups/b").join(name)] == recording.whole(restored), "{name}");
    }
    becomes_whole_or_nothing(&recording, "a restore", 300);
}

#[test]
fn a_sync_of_a_restore_that_is_left_out_is_found_out() {
    for name in ["copy-vda.base1.raw", "copy-vda.qcow2", "copy-vdb.raw", "copy_VARS.fd", "new", "images"] {
        let mut recording = Recording::make(KIND);
        recording.disk.without_syncs_of(name);
        let found = (0..3000).position(|seed| recording.cut(seed).is_err());
        println!("a restore without the syncs of {name}: the first cut that costs something is {found:?}");
        assert!(found.is_some(), "nobody misses the syncs of {name}");
    }
}

#[test]
fn a_second_power_cut_in_the_recovery_of_a_restore_leaves_what_becomes_whole_or_nothing() {
    survives_a_second_cut(&Recording::make(KIND), "a restore", 12);
}

#[test]
fn a_sync_of_a_recovery_that_is_left_out_is_found_out() {
    let recording = Recording::make(KIND);
    for name in ["copy-vda.qcow2", "copy-vdb.raw", "new", "images"] {
        let found = (0..200_u64).find_map(|first| {
            let mut recovery = recording.of_recovery(first)?;
            recovery.disk.without_syncs_of(name);
            (0..20).find(|second| recovery.cut(*second).is_err()).map(|second| (first, second))
        });
        println!("a recovery without the syncs of {name}: the first cuts that cost something are {found:?}");
        assert!(found.is_some(), "nobody misses the syncs of {name}");
    }
}
