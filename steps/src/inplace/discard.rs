//! `restore-discard`: a machine that is kept aside is removed for good, once nothing uses a file of it.
//!
//! What is removed: the images that were replaced, images under them that a restore of ours has made, and the folder with
//! its memory and records. Templates of others stay. Asked is everybody who could need such a file: the definitions of
//! all domains of this host, what lies under their disks, every QEMU, and every other machine that is kept. The record
//! goes last, so a discard that was cut off can be repeated.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::{StepKind, WorkflowName};
use vmkeep_workflow::{Class, Code, Fault, Plan, PlanContext, Step, StepContext, Verdict, Workflow};

use super::check;
use super::kept::{self, Kept, blocking};
use super::options::DiscardOptions;
use super::swap::files;
use super::workflow::{RestoreInPlace, misread};
use crate::codes;
use crate::hypervisor::{DomainRef, FileId, Observation, OwnFolders, Trouble};
use crate::image::chain;
use crate::image::copy::Identity;
use crate::image::qcow2::Format;
use crate::recipe::step;
use crate::snapshot::{Places, World};

/// The name of the workflow.
pub const NAME: &str = "restore-discard";
/// The version of the recipe.
pub const VERSION: u32 = 1;

const DOING: &str = "discard the machine that is kept aside";

/// The recipe. The subject of its jobs is the domain.
#[derive(Debug)]
pub struct RestoreDiscard(pub RestoreInPlace);

/// Removes a machine that is kept.
#[derive(Debug)]
pub struct Discard {
    /// The world.
    pub world: World,
    /// Where it is kept.
    pub places: Places,
    /// The folder of restored domains.
    pub restored: PathBuf,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardInput {
    /// Whose machine it is.
    pub domain: DomainRef,
    /// Its folder.
    pub kept: PathBuf,
    /// Files that go, by what they are: another file of such a name stays.
    pub files: Vec<(PathBuf, FileId)>,
    /// Files of it that stay, because they may be others' as well.
    pub stay: Vec<PathBuf>,
}

/// What it leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discarded {
    /// Files that were removed, the folder not counted.
    pub removed: Vec<PathBuf>,
    /// Files that stay.
    pub stay: Vec<PathBuf>,
}

/// All files that a domain uses or would use.
fn used_by(seen: &Observation, own: Option<&OwnFolders>) -> Vec<PathBuf> {
    let definitions = [&seen.persistent, &seen.live].into_iter().flatten();
    let mut found: Vec<PathBuf> = Vec::new();
    for nvram in definitions.clone().filter_map(|definition| definition.devices.nvram.as_ref()) {
        let default = own.map(|own| own.variables(nvram, &seen.domain.name));
        found.extend(nvram.file.clone().or(default));
    }
    for (_, layer) in definitions.flat_map(files) {
        match Format::from_name(&layer.format).map(|format| chain::probe(&layer.path, format)) {
            Some(Ok(chain)) => found.extend(chain.into_iter().map(|element| element.path)),
            _ => found.push(layer.path),
        }
    }
    if let Some(qemu) = &seen.qemu {
        found.extend(qemu.open.iter().cloned());
        found.extend(qemu.disks.iter().flat_map(|disk| disk.chain.iter().map(|layer| layer.path.clone())));
    }
    found
}

/// Who uses any of these files.
async fn users(
    world: &World,
    places: &Places,
    restored: &Path,
    kept: &Path,
    mine: &[(PathBuf, FileId)],
) -> Result<Vec<String>, Fault> {
    let look = |e: crate::hypervisor::HvError, object: &str| {
        e.fault(codes::CANNOT_REMOVE_OLD_DISK_IMAGE, "see who uses it", object).class(Class::Transient)
    };
    let mut seen = Vec::new();
    for domain in world.hypervisor.domains().await.map_err(|e| look(e, "all domains"))? {
        match world.hypervisor.observe_from_outside(&domain.id).await {
            Ok(observation) => seen.push(observation),
            Err(e) if e.trouble == Trouble::NoSuchDomain => {}
            Err(e) => return Err(look(e, &domain.name)),
        }
    }
    // Where that is not known a machine with such state cannot have been set aside.
    let own = world.hypervisor.own_folders().await.ok();
    let (mine, restored, kept) = (mine.to_vec(), restored.to_owned(), kept.to_owned());
    blocking(places, codes::CANNOT_REMOVE_OLD_DISK_IMAGE, "see who uses it", &kept.clone(), move |places| {
        let is_mine = |path: &Path| {
            mine.iter().any(|(own, id)| {
                own == path
                    || Identity::at(path).is_ok_and(|other| (other.dev, other.ino) == (id.dev, id.ino))
            })
        };
        let mut users = Vec::new();
        for observation in &seen {
            if let Some(path) = used_by(observation, own.as_ref()).into_iter().find(|path| is_mine(path)) {
                users.push(format!("domain {} uses {}", observation.domain.name, path.display()));
            }
        }
        for other in kept::list(places, &restored).0.iter().filter(|other| other.folder != kept) {
            let of_other = other.kept.disks.iter().flat_map(|disk| disk.chain.iter().chain([&disk.path]));
            let of_other = of_other.chain(other.kept.variables.iter().map(|variables| &variables.path));
            if let Some(path) = of_other.into_iter().find(|path| is_mine(path)) {
                users.push(format!(
                    "{} belongs to what job {} keeps aside of {} as well",
                    path.display(),
                    other.kept.job,
                    other.kept.domain.name
                ));
            }
        }
        Ok(users)
    })
    .await
}

fn refused(domain: &DomainRef, users: &[String]) -> Fault {
    Fault::permanent(codes::CANNOT_REMOVE_OLD_DISK_IMAGE, DOING, &domain.name, users.join("; "))
        .remedy("Nothing was removed. Discard the other one first, or keep this one")
}

/// Files with what each of them is.
type Known = Vec<(PathBuf, FileId)>;

/// Which files go and which stay.
fn split(kept: &Kept) -> Result<(Known, Vec<PathBuf>), Fault> {
    let own = kept.own_files();
    let all = kept.disks.iter().filter(|disk| disk.replaced).flat_map(|disk| disk.chain.iter());
    let mut stay: Vec<PathBuf> = all.filter(|path| !own.contains(path)).cloned().collect();
    stay.sort();
    stay.dedup();
    let mut go = Vec::new();
    for path in own {
        let disks = kept.disks.iter().map(|disk| (&disk.path, disk.identity));
        let variables = kept.variables.iter().map(|variables| (&variables.path, variables.identity));
        let recorded = disks.chain(variables).find(|(of, _)| **of == path).map(|(_, identity)| identity);
        match (check::there(&path)?, recorded) {
            // Another file bears its name by now.
            (Some(now), Some(then)) if !now.same_file(&then) => stay.push(path),
            (Some(now), _) => go.push((path, FileId { dev: now.dev, ino: now.ino })),
            (None, _) => {}
        }
    }
    Ok((go, stay))
}

#[async_trait]
impl Step for Discard {
    const KIND: StepKind = StepKind::new("discard", 1);
    type Input = DiscardInput;
    type Output = Discarded;

    async fn run(&self, _: &StepContext, input: DiscardInput) -> Result<Discarded, Fault> {
        let users = users(&self.world, &self.places, &self.restored, &input.kept, &input.files).await?;
        if !users.is_empty() {
            return Err(refused(&input.domain, &users));
        }
        for (path, id) in &input.files {
            let gone = self.world.storage.remove(path, *id).await;
            gone.map_err(|e| {
                e.fault(
                    codes::CANNOT_REMOVE_OLD_DISK_IMAGE,
                    "remove an old image",
                    path.display().to_string(),
                )
            })?;
        }
        let kept = input.kept.clone();
        let code = codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION;
        blocking(&self.places, code, "remove what was kept aside", &input.kept, move |places| {
            kept::remove(places, &kept)
        })
        .await?;
        Ok(Discarded { removed: input.files.into_iter().map(|(path, _)| path).collect(), stay: input.stay })
    }

    /// Removing what is gone does no harm. But what has begun to go is not kept any more, so the job may end otherwise only if
    /// nothing is gone.
    async fn probe(&self, cx: &StepContext, input: DiscardInput) -> Verdict<Discarded> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        let places = self.places.clone();
        match crate::blocking::run(move || is_whole(&places, &input)).await {
            Ok(Ok(true)) => Verdict::NotDone,
            Ok(Ok(false)) => Verdict::Partial(serde_json::Value::from("a part is gone")),
            Ok(Err(why)) => Verdict::Unknown(why),
            Err(e) => Verdict::Unknown(e.to_string()),
        }
    }
}

/// Whether everything that is to be removed is still there.
fn is_whole(places: &Places, input: &DiscardInput) -> Result<bool, String> {
    for (path, id) in &input.files {
        match Identity::at(path) {
            Ok(now) if (now.dev, now.ino) == (id.dev, id.ino) => {}
            Ok(_) => return Ok(false),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(format!("{}: {e}", path.display())),
        }
    }
    kept::is_there(places, &input.kept).map_err(|e| e.to_string())
}

#[async_trait]
impl Workflow for RestoreDiscard {
    fn name(&self) -> WorkflowName {
        WorkflowName::from(NAME)
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let RestoreInPlace { world, places, settings } = &self.0;
        let options = DiscardOptions::deserialize(&cx.request.options).map_err(|e| misread("", e))?;
        let domain = check::subject(&cx.request.subject.id, &cx.request.subject.label)?;
        let folder = kept::folder_of(&settings.restored, options.job);
        let kept = kept::find(places, &folder).await?;
        if kept.domain.id != domain.id {
            return Err(misread(&options.job.to_string(), "that machine is of another domain"));
        }
        let (files, stay) = split(&kept)?;
        let users = users(world, places, &settings.restored, &folder, &files).await?;
        if !users.is_empty() {
            return Err(refused(&domain, &users));
        }
        let names: Vec<_> = files.iter().map(|(path, _)| path.display().to_string()).collect();
        let title = format!("remove {} and {}", names.join(", "), folder.display());
        let input = DiscardInput { domain: domain.clone(), kept: folder, files, stay };
        let steps = vec![step::<Discard>("discard", title, &input)?];
        let title = format!("discard what job {} keeps aside of {}", options.job.short(), domain.name);
        Plan::new(NAME, VERSION, title, steps, Some("discard".into()), serde_json::Value::Null)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, DOING, &domain.name, e))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::hypervisor::DomainId;
    use crate::image::root::Roots;
    use crate::inplace::kept::{DEFINITION, RECORD};

    #[test]
    fn what_has_begun_to_go_is_not_whole_any_more() {
        let whole_without = |gone: Option<&str>| {
            let dir = tempfile::tempdir().unwrap();
            let (kept, image) = (dir.path().join("kept"), dir.path().join("image"));
            std::fs::create_dir(&kept).unwrap();
            for file in [kept.join(DEFINITION), kept.join(RECORD), image.clone()] {
                std::fs::write(file, b"x").unwrap();
            }
            let is = Identity::at(&image).unwrap();
            let domain = DomainRef { id: DomainId(uuid::Uuid::from_u128(1)), name: "web".to_owned() };
            let files = vec![(image, FileId { dev: is.dev, ino: is.ino })];
            let input = DiscardInput { domain, kept, files, stay: Vec::new() };
            if let Some(gone) = gone {
                std::fs::rename(dir.path().join(gone), dir.path().join("gone")).unwrap();
            }
            is_whole(&Places { roots: Arc::new(Roots::open([dir.path()]).unwrap()) }, &input)
        };
        assert_eq!(whole_without(None), Ok(true));
        let record = format!("kept/{RECORD}");
        let definition = format!("kept/{DEFINITION}");
        for gone in ["image", definition.as_str(), record.as_str(), "kept"] {
            assert_eq!(whole_without(Some(gone)), Ok(false), "{gone}");
        }
    }
}
