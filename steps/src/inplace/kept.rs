//! A machine that is kept aside: what a restore in place has put another in the place of.
//!
//! Its images stay where they are, under their own names. All else that it was lies in a folder of its own:
//! definition, memory, managed save image, checkpoints, and last the *record*, which says what is kept. A machine is
//! kept aside if and only if its record is there; the record alone is enough to bring the machine back or to discard
//! it, with no journal at all.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::{Code, Fault, JobId};

use crate::blocking::touch;
use crate::codes;
use crate::hypervisor::{DomainRef, RunState, Target};
use crate::image::copy::Identity;
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::manifest::{Digest, tpm_place};
use crate::snapshot::Places;
use crate::snapshot::copy::place_fault;
use crate::snapshot::memory::WHOLE;

/// The folder, below the folder of restored domains, in which machines are kept.
pub const FOLDER: &str = "kept";
/// The record's name.
pub const RECORD: &str = "kept.json";
/// The definition's name.
pub const DEFINITION: &str = "domain.xml";
/// The memory's name.
pub const MEMORY: &str = "memory.save";
/// The managed save image's name.
pub const MANAGED_SAVE: &str = "managed.save";

/// What a machine did before it was set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Was {
    /// It was off.
    Off,
    /// It ran.
    Running,
    /// An operator had paused it.
    Paused,
}

impl Was {
    /// From its state.
    #[must_use]
    pub fn of(state: RunState) -> Self {
        match state {
            RunState::Off => Self::Off,
            RunState::Paused(_) => Self::Paused,
            RunState::Running | RunState::Other => Self::Running,
        }
    }
}

/// A disk of a machine that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptDisk {
    /// Which.
    pub target: Target,
    /// Its image.
    pub path: PathBuf,
    /// The image's format.
    pub format: String,
    /// All files of the disk, from the top down.
    pub chain: Vec<PathBuf>,
    /// Which file the image is, and as of when.
    pub identity: Identity,
    /// The machine that took this one's place has another image for it. A disk that is not replaced is used by both.
    pub replaced: bool,
}

/// Firmware variables of a machine that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptVariables {
    /// Their file.
    pub path: PathBuf,
    /// Which file that is, and as of when.
    pub identity: Identity,
    /// The machine that took this one's place has another file for them.
    pub replaced: bool,
}

/// A file of the state of a TPM that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptState {
    /// The file in the folder of what is kept.
    pub file: Component,
    /// Where it belongs in the folder of the domain's TPM: `tpm2/tpm2-00.permall`.
    pub path: String,
    /// The hash of its content.
    pub blake3: Digest,
}

impl KeptState {
    /// The folder and the name in the folder of the domain's TPM.
    pub(super) fn place(&self) -> Option<(&str, &str)> {
        tpm_place(&self.path)
    }
}

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The version of this form.
    pub version: u32,
    /// The job that set it aside; also the name of its folder.
    pub job: JobId,
    /// When.
    pub at: Timestamp,
    /// Whose machine.
    pub domain: DomainRef,
    /// What took its place, for people.
    pub because: String,
    /// What it did.
    pub was: Was,
    /// The hash of its definition.
    pub definition: Digest,
    /// Its disks on files.
    pub disks: Vec<KeptDisk>,
    /// Its memory was saved.
    pub memory: bool,
    /// It had a managed save image.
    pub managed_save: bool,
    /// Names of libvirt's checkpoints, parents before children.
    pub checkpoints: Vec<String>,
    /// Its firmware variables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variables: Option<KeptVariables>,
    /// The state of its TPM, where the other machine got another: none of its files if it had no state yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Vec<KeptState>>,
}

/// The newest version that this program reads. Since 2 a record knows of variables and TPM state; whoever does not must
/// not bring such a machine back.
const VERSION: u32 = 2;
/// No record is longer.
const LONGEST: u64 = 16 << 20;

/// The folder of one machine that is kept.
#[must_use]
pub fn folder_of(restored: &Path, job: JobId) -> PathBuf {
    restored.join(FOLDER).join(job.to_string())
}

/// The name of the file of a checkpoint.
pub(super) fn checkpoint_name(number: usize) -> Component {
    Component::literal(format!("checkpoint-{number}.xml"))
}

pub(super) fn fixed(name: &'static str) -> Component {
    Component::literal(name.to_owned())
}

/// Writes a file of such a folder, whatever is there. Durable on return.
pub(super) fn write(folder: &Folder, name: &Component, bytes: &[u8]) -> Result<(), RootError> {
    use std::io::Write as _;
    let aside = Component::literal(format!("{name}.new"));
    folder.remove_file(&aside)?;
    let io = |act: &'static str| {
        let path = folder.path_of(&aside);
        move |source| RootError::Io { act, path, source }
    };
    let mut file = folder.create_file(&aside)?;
    let written = touch("write").map_err(std::io::Error::from).and_then(|()| file.write_all(bytes));
    written.map_err(io("write"))?;
    crate::blocking::sync(&file).map_err(io("sync"))?;
    folder.replace(&aside, name)?;
    folder.sync()
}

/// Reads a file of such a folder.
pub(super) fn read(folder: &Folder, name: &Component) -> Result<String, RootError> {
    let file = folder.open_file(&RelPath::from(name.clone()))?;
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).map_err(|source| RootError::Io {
        act: "read",
        path: folder.path_of(name),
        source,
    })?;
    Ok(text)
}

/// Removes all files of such a folder, the record last, and the folder itself. `Ok` if it is not there.
pub(super) fn remove(places: &Places, folder: &Path) -> Result<(), RootError> {
    let open = match places.roots.open_folder(folder) {
        // Whether that is durable an earlier attempt may not have learnt.
        Err(RootError::Missing { .. }) => return sync_above(places, folder),
        open => open?,
    };
    let record = fixed(RECORD);
    for (name, _) in open.entries()? {
        if name != record {
            open.remove_file(&name)?;
        }
    }
    open.sync()?;
    open.remove_file(&record)?;
    open.sync()?;
    let (Some(above), Some(name)) = (folder.parent(), folder.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    let above = places.roots.open_folder(above)?;
    above.remove_folder(&Component::new(name)?)?;
    above.sync()
}

fn sync_above(places: &Places, folder: &Path) -> Result<(), RootError> {
    match folder.parent().map(|above| places.roots.open_folder(above)) {
        None | Some(Err(RootError::Missing { .. })) => Ok(()),
        Some(above) => above?.sync(),
    }
}

/// Whether such a folder is there with its definition and its record.
pub(super) fn is_there(places: &Places, folder: &Path) -> Result<bool, RootError> {
    let open = match places.roots.open_folder(folder) {
        Err(RootError::Missing { .. }) => return Ok(false),
        open => open?,
    };
    Ok(open.stat(&fixed(DEFINITION))?.is_some() && open.stat(&fixed(RECORD))?.is_some())
}

impl Kept {
    /// The oldest version that says all that this record says.
    pub(super) fn needed_version(variables: Option<&KeptVariables>, tpm: Option<&Vec<KeptState>>) -> u32 {
        if variables.is_some() || tpm.is_some() { VERSION } else { 1 }
    }

    /// Writes the record. From then on the machine is kept aside.
    pub(super) fn store(&self, folder: &Folder) -> Result<(), RootError> {
        let bytes = serde_json::to_vec_pretty(self).map_err(|e| RootError::Io {
            act: "write",
            path: folder.path().to_owned(),
            source: e.into(),
        })?;
        folder.remove_file(&fixed(RECORD))?;
        write(folder, &fixed(RECORD), &bytes)
    }

    /// Reads a record.
    pub(super) fn load(folder: &Folder) -> Result<Self, RootError> {
        let text = read(folder, &fixed(RECORD))?;
        let bad = |e: String| RootError::Io {
            act: "understand",
            path: folder.path_of(&fixed(RECORD)),
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, e),
        };
        let kept: Self = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
        if kept.version > VERSION {
            return Err(bad(format!("it is of version {}, this release knows {VERSION}", kept.version)));
        }
        Ok(kept)
    }

    /// Files that nothing else needs once it is discarded: variables and images that were replaced, and what lies under
    /// them as far as a restore of ours has put it there. Templates of others are not ours to remove.
    #[must_use]
    pub fn own_files(&self) -> Vec<PathBuf> {
        let variables = self.variables.iter().filter(|variables| variables.replaced);
        let mut found: Vec<PathBuf> = variables.map(|variables| variables.path.clone()).collect();
        for disk in self.disks.iter().filter(|disk| disk.replaced) {
            let below = disk.chain.iter().skip(1).filter(|path| restored_by(path).is_some());
            for path in std::iter::once(&disk.path).chain(below) {
                if !found.contains(path) {
                    found.push(path.clone());
                }
            }
        }
        found
    }
}

/// A machine that is kept, and how much room it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptMachine {
    /// The record.
    #[serde(flatten)]
    pub kept: Kept,
    /// Its folder.
    pub folder: PathBuf,
    /// Bytes that would be free without it.
    pub bytes: u64,
}

/// All machines that are kept below a folder of restored domains, the newest first; and what could not be read.
#[must_use]
pub fn list(places: &Places, restored: &Path) -> (Vec<KeptMachine>, Vec<String>) {
    let (mut found, mut warnings) = (Vec::new(), Vec::new());
    let all = restored.join(FOLDER);
    let open = match places.roots.open_folder(&all) {
        Ok(open) => open,
        Err(RootError::Missing { .. }) => return (found, warnings),
        Err(e) => return (found, vec![e.to_string()]),
    };
    for (name, _) in open.entries().unwrap_or_default() {
        let folder = all.join(name.as_str());
        match places.roots.open_folder(&folder).and_then(|open| Kept::load(&open)) {
            Ok(kept) => found.push(KeptMachine { bytes: room(&kept, &folder), kept, folder }),
            // No record: a job is about to set a machine aside.
            Err(RootError::Missing { .. } | RootError::WrongKind { .. }) => {}
            Err(e) => warnings.push(e.to_string()),
        }
    }
    found.sort_by_key(|machine| std::cmp::Reverse(machine.kept.at));
    (found, warnings)
}

fn room(kept: &Kept, folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let of = |path: &Path| std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks() * 512);
    let beside: u64 = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| of(&e.path())).sum();
    kept.own_files().iter().map(|path| of(path)).sum::<u64>() + beside
}

/// How names of images that were restored in place tell their job.
const MARK: &str = ".restored-";

/// The name of the image that takes another's place: of the same stem, with the job's id.
pub(super) fn new_name(old: &Path, job: JobId, format: &str) -> String {
    let name = old.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = match name.find(MARK) {
        Some(at) => &name[..at],
        None => name.rsplit_once('.').map_or(name.as_str(), |(stem, _)| stem),
    };
    // Within the 255 bytes that a name may have, with what images below it add.
    let mut cut = stem.len().min(120);
    while !stem.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}{MARK}{}.{format}", &stem[..cut], job.short())
}

/// The job (its short id) that restored an image in place, if its name says so.
pub(super) fn restored_by(path: &Path) -> Option<&str> {
    let (_, rest) = path.file_name()?.to_str()?.split_once(MARK)?;
    let job = rest.get(..12)?;
    (job.bytes().all(|b| b.is_ascii_hexdigit()) && rest[12..].starts_with('.')).then_some(job)
}

/// Whether a memory image is whole.
pub(super) fn is_whole(memory: &Path) -> bool {
    let mut magic = [0; 16];
    File::open(memory).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && &magic == WHOLE
}

/// Why a memory image does not fit its disks any more: the first that was written to after the image. A disk is
/// written to for the last time before its memory image is finished, so a younger disk is one that has moved on.
pub(super) fn moved_on(memory: &Path, disks: &[PathBuf]) -> Option<String> {
    let time = |path: &Path| Identity::at(path).map(|i| (i.mtime, i.mtime_nsec));
    let Ok(saved) = time(memory) else { return Some("the memory image is not there".to_owned()) };
    disks.iter().find_map(|disk| match time(disk) {
        Ok(written) if written <= saved => None,
        Ok(_) => Some(format!("{} was written to since", disk.display())),
        Err(e) => Some(format!("{}: {e}", disk.display())),
    })
}

/// Does something with such folders where that may block.
pub(super) async fn blocking<T: Send + 'static>(
    places: &Places,
    code: Code,
    doing: &'static str,
    object: &Path,
    work: impl FnOnce(&Places) -> Result<T, RootError> + Send + 'static,
) -> Result<T, Fault> {
    let (places, object) = (places.clone(), object.display().to_string());
    match crate::blocking::run(move || work(&places)).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(e)) => {
            let fault = place_fault(&e, code, doing, &object);
            Err(if matches!(e, RootError::Io { .. }) {
                fault.class(vmkeep_workflow::Class::Transient)
            } else {
                fault
            })
        }
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, object, e)),
    }
}

/// The machine that a job has set aside.
///
/// # Errors
/// When there is none, or its record is not understood.
pub async fn find(places: &Places, folder: &Path) -> Result<Kept, Fault> {
    let path = folder.to_owned();
    let doing = "find the machine that is kept aside";
    let object = folder.display().to_string();
    let (places, shown) = (places.clone(), object.clone());
    let read = crate::blocking::run(move || places.roots.open_folder(&path).and_then(|f| Kept::load(&f)));
    match read.await {
        Ok(Ok(kept)) => Ok(kept),
        Ok(Err(RootError::Missing { .. })) => {
            let cause = "nothing is kept aside under that job: it was brought back or discarded, or the restore failed";
            Err(Fault::permanent(codes::CANNOT_WORK_ON_UNDEFINED_OBJECT, doing, object, cause)
                .remedy("`vmkeep status` lists what is kept"))
        }
        Ok(Err(e)) => Err(place_fault(&e, codes::CANNOT_READ_XML_FILE, doing, &shown)),
        Err(e) => Err(Fault::permanent(Code::UNDEFINED, doing, object, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_image_is_called_like_the_old_one_however_often_it_was_restored() {
        let job = JobId::new();
        let once = new_name(Path::new("/i/web 1.qcow2"), job, "qcow2");
        assert_eq!(once, format!("web 1.restored-{}.qcow2", job.short()));
        let twice = new_name(&Path::new("/i").join(&once), job, "raw");
        assert_eq!(twice, format!("web 1.restored-{}.raw", job.short()));
        assert_eq!(restored_by(Path::new(&once)), Some(job.short().as_str()));
        assert_eq!(restored_by(Path::new("/i/web.restored-by-hand.qcow2")), None);
        assert!(new_name(Path::new(&format!("/i/{}.raw", "ü".repeat(120))), job, "raw").len() < 255);
    }

    #[test]
    fn memory_fits_only_disks_that_were_not_written_to_since() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["disk", "memory"] {
            std::fs::write(at(name), WHOLE).unwrap();
        }
        let set = |name: &str, seconds: u64| {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            File::options().write(true).open(at(name)).unwrap().set_modified(time).unwrap();
        };
        set("disk", 100);
        set("memory", 100);
        assert!(is_whole(&at("memory")));
        assert_eq!(moved_on(&at("memory"), &[at("disk")]), None);
        set("disk", 101);
        assert!(moved_on(&at("memory"), &[at("disk")]).is_some());
        assert!(moved_on(&at("none"), &[at("disk")]).is_some());
        assert!(moved_on(&at("memory"), &[at("none")]).is_some());
    }
}
