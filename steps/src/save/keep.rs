//! `retain-state` and `clear-state`: the saved state becomes part of the backup, and leaves the RAM disk.
//!
//! The state is of the same instant as the bases, whatever has become of the guest since: also one that the guest could
//! not be brought back with belongs to the backup. Only one that is *gone* does not; whether a backup without it is
//! wanted is the caller's choice.
//!
//! A copy on a RAM disk is removed when the copy in the backup is durable, or when the job fails: in both cases after
//! the guest has been let run, when nobody can need it any more.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, StepName, Verdict};

use super::guest::SaveGuest;
use super::state::{self, SavedState};
use super::{Saving, WithoutState};
use crate::codes;
use crate::image::copy::{self, Options, SourceFile, Start, Throttle};
use crate::image::root::Component;
use crate::image::space::LowWater;
use crate::manifest::folder::{MEMORY, fixed};
use crate::snapshot::copy::place_fault;
use crate::snapshot::growth::Watch;
use crate::snapshot::memory;
use crate::snapshot::publish::{SealOutput, Sealed};
use crate::snapshot::transfer::{self, Failing, Reports, transfer};
use crate::snapshot::{Places, World};

/// Brings the state into the backup's folder.
#[derive(Debug)]
pub struct RetainState {
    /// The world.
    pub world: World,
    /// Where may be written.
    pub places: Places,
}

/// Removes it from the RAM disk.
#[derive(Debug)]
pub struct ClearState;

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetainInput {
    /// What was saved.
    #[serde(flatten)]
    pub saving: Saving,
    /// The step that saved it.
    pub saved: StepName,
    /// The backup's folder.
    pub folder: PathBuf,
    /// How much room the overlays must leave meanwhile.
    pub low_water: LowWater,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
    /// What to do when the state is gone.
    pub without: WithoutState,
}

const DOING: &str = "bring the guest's state into the backup";

fn lost(input: &RetainInput, what: String) -> Result<SealOutput, Fault> {
    if input.without == WithoutState::DiskOnly {
        return Ok(SealOutput { memory: None, lost: Some(what) });
    }
    let object = input.saving.file.display().to_string();
    Err(Fault::permanent(codes::CANNOT_READ_STATE_FILE, DOING, object, what).remedy(
        "Start the backup again; or let such a backup hold the disks alone: `--without-state disk-only`",
    ))
}

#[async_trait]
impl Step for RetainState {
    const KIND: StepKind = StepKind::new("retain-state", 1);
    type Input = RetainInput;
    type Output = SealOutput;

    async fn run(&self, cx: &StepContext, input: RetainInput) -> Result<SealOutput, Fault> {
        let Some(saved) = cx.outputs.of::<SaveGuest>(&input.saved)? else {
            return lost(&input, "the guest was not saved".to_owned());
        };
        let Some(state) = saved.state else {
            return lost(&input, saved.unusable.unwrap_or_else(|| "there is none".to_owned()));
        };
        let disks = input.saving.disks.iter().map(|(disk, _)| disk.clone()).collect();
        let watch = Watch::start(self.world.clone(), input.saving.domain.id, disks, input.low_water);
        let work = Work {
            places: self.places.clone(),
            start: transfer::start(cx),
            reports: Reports::of(cx, watch),
            state,
            input: input.clone(),
        };
        match crate::blocking::run(move || work.keep()).await {
            Ok(Ok(Ok(sealed))) => Ok(SealOutput { memory: Some(sealed), lost: None }),
            Ok(Ok(Err(what))) => lost(&input, what),
            Ok(Err(fault)) => Err(fault),
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, input.saving.domain.name, e)),
        }
    }

    async fn probe(&self, cx: &StepContext, input: RetainInput) -> Verdict<SealOutput> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        if !input.saving.ram_disk {
            return Verdict::NotDone;
        }
        transfer::how_far(cx, &self.places, input.folder, fixed(MEMORY)).await
    }
}

struct Work {
    places: Places,
    input: RetainInput,
    state: SavedState,
    start: Start,
    reports: Reports,
}

impl Work {
    /// The state sealed; or why there is none.
    fn keep(mut self) -> Result<Result<Sealed, String>, Fault> {
        let object = self.state.file.display().to_string();
        let unread = |e: std::io::Error| Fault::transient(codes::CANNOT_READ_STATE_FILE, DOING, &object, e);
        match state::look(&self.state.file).map_err(unread)? {
            Some(found) if found == self.state => {}
            Some(_) => return Ok(Err("it is not as it was saved".to_owned())),
            None => return Ok(Err("it is gone or torn".to_owned())),
        }
        let mut header = [0; 32];
        std::fs::File::open(&self.state.file)
            .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut header))
            .map_err(unread)?;
        let form = memory::form(&header);
        let failing =
            Failing { doing: DOING, object: &object, code: codes::CANNOT_COPY_STATE_FILE_TO_RETAIN };
        let source = SourceFile::open(&self.state.file).map_err(|e| failing.fault(e))?;
        let name: Component = fixed(MEMORY);
        let start = std::mem::take(&mut self.start);
        let (size, hash) = if self.input.saving.ram_disk {
            let folder = self.places.roots.open_folder(&self.input.folder).map_err(|e| {
                place_fault(&e, codes::CANNOT_WRITE_TO_BACKUP_LOCATION, "open the backup's folder", &object)
            })?;
            let options = Options { throttle: Throttle::new(self.input.bandwidth), ..Options::default() };
            let done = transfer(&source, (&folder, &name), start, &options, &self.reports, &failing)?;
            (done.size, done.hash)
        } else {
            let hash = copy::hash(&source, None, &self.reports).map_err(|e| failing.fault(e))?;
            (source.identity().size, hash)
        };
        Ok(Ok(Sealed { size, hash: hash.to_hex().to_string(), form }))
    }
}

#[async_trait]
impl Step for ClearState {
    const KIND: StepKind = StepKind::new("clear-state", 1);
    type Input = Saving;
    type Output = ();

    async fn run(&self, _: &StepContext, input: Saving) -> Result<(), Fault> {
        let file = input.file.clone();
        match crate::blocking::remove(file).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Fault::transient(
                codes::CANNOT_REMOVE_FILE,
                "remove the state from the RAM disk",
                input.file.display().to_string(),
                e,
            )),
            _ => Ok(()),
        }
    }

    /// Removing what is gone is harmless.
    async fn probe(&self, _: &StepContext, _: Saving) -> Verdict<()> {
        Verdict::NotDone
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::*;
    use crate::codes::assert_told;
    use crate::image::root::Roots;
    use crate::save::AfterReboot;
    use crate::snapshot::tests::context;
    use crate::snapshot::tests::fake::{Fake, STORE, domain};

    /// A state on a RAM disk, and a backup's folder.
    fn retaining(dir: &Path, fake: &Fake) -> (RetainInput, SavedState) {
        let (ram, folder) = (dir.join("ram"), dir.join("backup"));
        std::fs::create_dir(&ram).unwrap();
        std::fs::create_dir(&folder).unwrap();
        let file = ram.join("state");
        std::fs::write(&file, [memory::WHOLE.as_slice(), &[0; 64]].concat()).unwrap();
        let saving = Saving {
            domain: domain(),
            store: STORE.to_owned(),
            instance: "1".to_owned(),
            boot: "this".to_owned(),
            disks: Vec::new(),
            file: file.clone(),
            ram_disk: true,
            running: true,
            after_reboot: AfterReboot::Start,
        };
        let low_water = LowWater { bytes: 0, percent: 0 };
        let without = WithoutState::Fail;
        let input = RetainInput { saving, saved: "save".into(), folder, low_water, bandwidth: 0, without };
        assert_eq!(fake.state().run, crate::hypervisor::RunState::Running);
        (input, state::look(&file).unwrap().unwrap())
    }

    async fn keep(dir: &Path, fake: &Fake, input: &RetainInput, state: SavedState) -> Result<Sealed, Fault> {
        let (places, cx) = (Places { roots: Arc::new(Roots::open([dir]).unwrap()) }, context(1));
        let watch = Watch::start(fake.world(), domain().id, Vec::new(), input.low_water);
        let reports = Reports::of(&cx, watch);
        let start = transfer::start(&cx);
        let work = Work { places, input: input.clone(), state, start, reports };
        match crate::blocking::run(move || work.keep()).await.unwrap()? {
            Ok(sealed) => Ok(sealed),
            Err(what) => lost(input, what).map(|_| unreachable!()),
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_state_that_cannot_be_copied_stays_where_it_is() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let (input, state) = retaining(dir.path(), &fake);
        let way = input.folder.join(MEMORY);
        std::fs::create_dir(&way).unwrap();
        let fault = keep(dir.path(), &fake, &input, state.clone()).await.unwrap_err();
        assert_told(&fault, codes::CANNOT_COPY_STATE_FILE_TO_RETAIN, input.saving.file.to_str().unwrap());
        assert_eq!(state::look(&input.saving.file).unwrap().as_ref(), Some(&state), "as it was saved");
        std::fs::remove_dir(&way).unwrap();
        assert_eq!(keep(dir.path(), &fake, &input, state).await.unwrap().size, 80);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_state_that_went_with_its_ram_disk_is_told_and_the_way_without_it() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let (input, state) = retaining(dir.path(), &fake);
        std::fs::remove_file(&input.saving.file).unwrap();
        let fault = keep(dir.path(), &fake, &input, state).await.unwrap_err();
        assert_told(&fault, codes::CANNOT_READ_STATE_FILE, input.saving.file.to_str().unwrap());
        assert!(fault.remedy.contains("--without-state"), "{fault}");
        let alone = RetainInput { without: WithoutState::DiskOnly, ..input };
        assert!(lost(&alone, "gone".to_owned()).unwrap().lost.is_some());
    }

    #[tokio::test]
    async fn a_state_that_cannot_be_taken_from_the_ram_disk_is_named() {
        let (dir, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        let (input, _) = retaining(dir.path(), &fake);
        std::fs::remove_file(&input.saving.file).unwrap();
        std::fs::create_dir(&input.saving.file).unwrap();
        let fault = ClearState.run(&context(1), input.saving.clone()).await.unwrap_err();
        assert_told(&fault, codes::CANNOT_REMOVE_FILE, input.saving.file.to_str().unwrap());
    }
}
