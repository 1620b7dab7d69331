//! The recipe: from a backup in a vault and a name to a plan.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use vmkeep_vault::ids::VaultId;
use vmkeep_vault::manifest::{Manifest, Stream};
use vmkeep_workflow::ids::WorkflowName;
use vmkeep_workflow::{
    Code, Fault, Millis, Outputs, Plan, PlanContext, Registry, StepName, StepSpec, Workflow,
};

use super::check::{self, Facts, mismatch};
use super::fetch::{Wanted, What, step_name};
use super::image::{FetchImage, FetchInput};
use super::machine_state::tpm_files;
use super::options::VaultRestoreOptions;
use super::reader::{EndReading, EndReadingInput, Readers, ReadingInput, Source, TakeReading};
use super::tpm::{FetchTpm, FetchTpmInput, TpmFile};
use crate::backup::state;
use crate::codes;
use crate::hypervisor::{Definition, DomainId, DomainRef, Target};
use crate::image::name::encode;
use crate::image::qcow2::Format;
use crate::image::root::Component;
use crate::recipe::{self, PATIENTLY, patient, step};
use crate::restore::check as backup;
use crate::restore::ending::{self, Ending};
use crate::restore::folder::PlaceInput;
use crate::restore::identity::{NewDisk, NewDomain, Original};
use crate::restore::layout::{self, Asked};
use crate::restore::options::RestoreSettings;
use crate::snapshot::{Places, World};
use crate::text::bytes;
use crate::vaults::Vaults;

/// The name of the workflow.
pub const NAME: &str = "restore-vault";
/// The version of the recipe.
pub const VERSION: u32 = 1;

const LEASE: &str = "lease";

/// The recipe. The subject of its jobs is the *new* domain: its UUID is made by whoever asks, at random.
pub struct VaultRestore {
    world: World,
    places: Places,
    readers: Readers,
    settings: RestoreSettings,
}

impl std::fmt::Debug for VaultRestore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VaultRestore")
    }
}

impl VaultRestore {
    /// With this world, these places, vaults and settings.
    #[must_use]
    pub fn new(world: World, places: Places, vaults: Arc<dyn Vaults>, settings: RestoreSettings) -> Self {
        Self { world, places, readers: Readers::new(vaults), settings }
    }

    /// Makes the workflow and its steps known, but for those that `restore` has as well.
    #[must_use]
    pub fn register(self, registry: Registry) -> Registry {
        let (places, readers) = (self.places.clone(), self.readers.clone());
        registry
            .step(TakeReading(readers.clone()))
            .step(FetchImage { places, readers: readers.clone() })
            .step(FetchTpm { world: self.world.clone(), readers: readers.clone() })
            .step(EndReading(readers))
            .workflow(self)
    }
}

/// Everything that the steps have in common.
struct Build {
    options: VaultRestoreOptions,
    id: VaultId,
    original: String,
    definition: String,
    new: NewDomain,
    places: Vec<PlaceInput>,
    images: Vec<FetchInput>,
    variables: Option<FetchInput>,
    tpm: Option<FetchTpmInput>,
    notes: Vec<String>,
    watch_ms: u64,
}

#[async_trait]
impl Workflow for VaultRestore {
    fn name(&self) -> WorkflowName {
        WorkflowName::from(NAME)
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let misread = |object: &str, e: &dyn std::fmt::Display| {
            Fault::permanent(codes::USAGE, "understand the options of the restore", object, e)
        };
        let options: VaultRestoreOptions =
            serde_json::from_value(cx.request.options.clone()).map_err(|e| misread("", &e))?;
        let id = &cx.request.subject.id;
        let domain =
            DomainRef { id: DomainId(id.parse().map_err(|e| misread(id, &e))?), name: options.name.clone() };

        let opened = self.readers.vaults.open(&options.vault).await?;
        let wanted = (options.domain, options.backup);
        let manifest = check::manifest(&opened, &options.vault, wanted, options.unchecked).await?;
        let targets: Vec<&str> = manifest.disks.iter().map(|disk| disk.target.as_str()).collect();
        let original = DomainId(uuid::Uuid::from_bytes(*manifest.domain.bytes()));
        let held = backup::Holds { name: &manifest.domain_name, id: original, disks: &targets };
        if targets.is_empty() || manifest.definition.is_empty() {
            return Err(mismatch(&manifest, "it has no disks, or no definition"));
        }
        let parsed = self.world.hypervisor.parse_definition(&manifest.definition).map_err(|e| {
            Fault::permanent(codes::CANNOT_READ_XML_FILE, "read the definition", held.name, e)
        })?;
        check::harmless(&opened, options.trusted, &parsed, held)?;
        backup::name(&self.world, &domain).await?;
        let links_down = backup::original_exists(&self.world, held).await? && !options.connect;
        let (without, mut notes) = backup::others(&parsed, held).await?;

        let source = Source {
            vault: options.vault.clone(),
            id: opened.vault.id(),
            domain: manifest.domain,
            lease: LEASE.into(),
        };
        let (images, disks) = self.lay_out(&options, &manifest, &source)?;
        let beside = images.first().map(|image| image.folder.clone());
        let (variables, files, more) =
            self.state(&options, &manifest, &parsed, &source, beside.as_deref())?;
        notes.extend(more);
        let tpm = files.map(|files| FetchTpmInput { domain: domain.clone(), files });
        let nvram = variables.as_ref().map(FetchInput::path);
        let new = NewDomain { domain, disks, without, links_down, same: false, nvram };
        let weights = check::weights(&opened, &options.vault, &manifest).await?;
        let places = self.room(&images, &weights, variables.as_ref()).await?;
        notes.extend(advice(&manifest, &new, parsed.devices.network_cards));
        notes.extend(ending::autostart(manifest.autostart, options.autostart, &new));

        let facts = Facts {
            vault: options.vault.clone(),
            id: opened.vault.id(),
            of: manifest.domain,
            backup: manifest.backup,
            unchecked: options.unchecked,
            definition: check::hash(&manifest.definition),
            roots: check::roots(&manifest),
            domain: new.domain.clone(),
            free: images.iter().map(FetchInput::path).chain(new.nvram.clone()).collect(),
        };
        Build {
            options,
            id: opened.vault.id(),
            original: manifest.domain_name,
            definition: manifest.definition,
            new,
            places,
            images,
            variables,
            tpm,
            notes,
            watch_ms: self.settings.watch_ms,
        }
        .plan(&facts)
    }

    async fn check_facts(&self, plan: &Plan, _: &StepName, _: &Outputs) -> Result<Option<String>, Fault> {
        let facts: Facts = recipe::facts(plan)?;
        facts.differ(&self.world, &self.places, &*self.readers.vaults).await
    }
}

/// Firmware variables, the files of a TPM's state, and what to say of what there is not.
type MachineState = (Option<FetchInput>, Option<Vec<TpmFile>>, Vec<String>);

impl VaultRestore {
    /// Where the disks go.
    fn lay_out(
        &self,
        options: &VaultRestoreOptions,
        manifest: &Manifest,
        source: &Source,
    ) -> Result<(Vec<FetchInput>, Vec<NewDisk>), Fault> {
        let held: Vec<&str> = manifest.disks.iter().map(|disk| disk.target.as_str()).collect();
        layout::all_known(&options.disks, &held)?;
        let asked = Asked { name: &options.name, folder: options.folder.as_deref(), disks: &options.disks };
        let (mut images, mut disks) = (Vec::new(), Vec::new());
        for disk in &manifest.disks {
            let (folder, name, _) = layout::top(asked, &disk.target, options.format.as_str())?;
            let (target, path) = (Target(disk.target.clone()), folder.join(name.as_str()));
            disks.push(NewDisk { target, path, format: options.format });
            images.push(FetchInput {
                wanted: Wanted {
                    source: source.clone(),
                    what: What::Disk(disk.target.clone()),
                    image: disk.image,
                },
                folder,
                name,
                format: options.format,
                bandwidth: options.bandwidth,
                rights: self.settings.rights.file_of_nobody(),
            });
        }
        layout::all_apart(images.iter().map(FetchInput::path))?;
        Ok((images, disks))
    }

    /// What the machine kept outside its disks. The variables go beside the first disk.
    fn state(
        &self,
        options: &VaultRestoreOptions,
        manifest: &Manifest,
        definition: &Definition,
        source: &Source,
        beside: Option<&Path>,
    ) -> Result<MachineState, Fault> {
        let mut notes = Vec::new();
        let wanted = |stream: &Stream| Wanted {
            source: source.clone(),
            what: What::Stream(stream.name.clone()),
            image: stream.image,
        };
        let nvram = manifest.streams.iter().find(|stream| stream.name == state::NVRAM);
        let variables = match (nvram, &definition.devices.nvram, beside) {
            (Some(stream), Some(nvram), Some(folder)) => {
                let suffix = if nvram.format == "qcow2" { "qcow2" } else { "fd" };
                Some(FetchInput {
                    wanted: wanted(stream),
                    folder: folder.to_owned(),
                    name: Component::literal(format!("{}_VARS.{suffix}", encode(&options.name))),
                    format: Format::Raw,
                    bandwidth: 0,
                    rights: self.settings.rights.file_of_nobody(),
                })
            }
            (None, Some(_), _) => {
                notes.push(ending::NO_VARIABLES.to_owned());
                None
            }
            _ => None,
        };
        if definition.devices.tpm.is_none() {
            return Ok((variables, None, notes));
        }
        let file = |(below, name, stream)| TpmFile { wanted: wanted(stream), below, name };
        let files: Vec<TpmFile> = tpm_files(manifest)?.into_iter().map(file).collect();
        notes.push(if files.is_empty() { ending::NO_TPM } else { ending::SAME_TPM }.to_owned());
        Ok((variables, (!files.is_empty()).then_some(files), notes))
    }

    async fn room(
        &self,
        images: &[FetchInput],
        weights: &[u64],
        variables: Option<&FetchInput>,
    ) -> Result<Vec<PlaceInput>, Fault> {
        let want = |image: &FetchInput, bytes: u64| backup::Want {
            folder: image.folder.clone(),
            own: false,
            name: Some(image.name.clone()),
            bytes,
        };
        let of = |(image, weight): (&FetchInput, &u64)| {
            // While one is converted it is there twice.
            let copies = if image.format == Format::Raw { 1 } else { 2 };
            want(image, weight.saturating_mul(copies))
        };
        let variables = variables.map(|image| want(image, image.wanted.image.size));
        let wants: Vec<_> = images.iter().zip(weights).map(of).chain(variables).collect();
        backup::room_for(&self.places, self.settings, move |_| Ok(wants)).await
    }
}

/// What the owner of the new domain must know.
fn advice(manifest: &Manifest, new: &NewDomain, network_cards: usize) -> Vec<String> {
    let mut notes = vec![ending::whose_disks(&manifest.domain_name, manifest.taken)];
    if manifest.consistency != "quiesced" {
        notes.push(ending::POWER_CUT.to_owned());
    }
    notes.extend(ending::links(new, network_cards));
    notes
}

impl Build {
    fn plan(&self, facts: &Facts) -> Result<Plan, Fault> {
        let undefined = |e: &dyn std::fmt::Display| {
            Fault::permanent(Code::UNDEFINED, "plan the restore", &self.options.name, e)
        };
        let (vault, name) = (&self.options.vault, &self.options.name);
        let mut steps = self.files()?;
        let files: Vec<PathBuf> = self.images.iter().map(FetchInput::path).collect();
        let ending = Ending {
            definition: Original::Text { definition: self.definition.clone() },
            new: &self.new,
            images: Vec::new(),
            others: files.clone(),
            files,
            memory: None,
            then: self.options.then,
            autostart: self.options.autostart,
            notes: &self.notes,
            watch_ms: self.watch_ms,
        };
        let point = ending.add(&mut steps)?;
        let title = format!("restore {} as {name} from the vault {vault}", self.original);
        let facts = serde_json::to_value(facts).map_err(|e| undefined(&e))?;
        Plan::new(NAME, VERSION, title, steps, point, facts).map_err(|e| undefined(&e))
    }

    fn files(&self) -> Result<Vec<StepSpec>, Fault> {
        let vault = &self.options.vault;
        let input = ReadingInput { vault: vault.clone(), id: self.id };
        let title = format!("take a lease in the vault {vault}");
        let lease: StepName = LEASE.into();
        let mut steps =
            vec![step::<TakeReading>(LEASE, title, &input)?.retry(PATIENTLY).stall(Millis::secs(900))];
        steps.extend(ending::folders(&self.places, Some(&lease))?);
        let mut fetched: Vec<StepName> = Vec::new();
        for image in &self.images {
            let path = image.path();
            let title = format!("fetch {} ({})", path.display(), bytes(image.wanted.image.size));
            let name: StepName = step_name(&path).into();
            steps.push(
                step::<FetchImage>(name.clone(), title, image)?
                    .after_all(ending::folder(&self.places, &image.folder))
                    .retry(PATIENTLY)
                    .undo(patient())
                    .stall(Millis::secs(900)),
            );
            fetched.push(name);
        }
        if let Some(variables) = &self.variables {
            let title = format!("fetch {} (firmware variables)", variables.path().display());
            steps.push(
                step::<FetchImage>("variables", title, variables)?
                    .after_all(ending::folder(&self.places, &variables.folder))
                    .retry(PATIENTLY)
                    .undo(patient())
                    .stall(Millis::secs(900)),
            );
            fetched.push("variables".into());
        }
        if let Some(tpm) = &self.tpm {
            steps.push(
                step::<FetchTpm>("tpm", "fetch the TPM's state", tpm)?
                    .after("folder/0")
                    .retry(PATIENTLY)
                    .undo(patient())
                    .stall(Millis::secs(900)),
            );
            fetched.push("tpm".into());
        }
        let input = EndReadingInput { vault: vault.clone(), id: self.id, lease: LEASE.into() };
        let title = format!("end the lease in the vault {vault}");
        let end = step::<EndReading>("release", title, &input)?;
        steps.push(end.after_all(fetched).closes(LEASE).retry(PATIENTLY));
        Ok(steps)
    }
}
