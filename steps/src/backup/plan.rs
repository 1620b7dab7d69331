//! The plan itself (`BACKUP.md`, §2).

use jiff::Timestamp;
use vmkeep_vault::header::Cipher;
use vmkeep_vault::manifest::Host;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{Code, Fault, JobId, Millis, Plan, StepSpec};

use super::begin::{BeginInput, BeginPull};
use super::choose::{Choice, Power};
use super::commit::{CommitBackup, CommitInput};
use super::end::{EndInput, EndPull};
use super::forget::{self, ForgetCheckpoints, ForgetInput};
use super::from::ReadFrom;
use super::lease::{LeaseInput, ReleaseInput, ReleaseLease, TakeLease};
use super::options::{Asked, BackupOptions, BackupSettings};
use super::read::{About, ReadDisks, ReadInput};
use super::workflow::{Facts, NAME, VERSION};
use crate::hypervisor::{DomainRef, Observation};
use crate::recipe::{PATIENT_LOOK, PATIENTLY, patient, step};
use crate::snapshot::World;
use crate::snapshot::disk::JobDisk;
use crate::snapshot::freeze::{FreezeGuest, FreezeInput, FreezePolicy, ThawGuest};
use crate::snapshot::mark::{Mark, MarkInput, Unmark};
use crate::snapshot::rest::{RestInput, TakeAtRest};
use crate::text::bytes;
use crate::vaults::Opened;
use crate::workflows::snapshot::{Overlays, SWITCH, TIDY, can_be_kept, kept_state};

const LEASE: &str = "lease";
const FREEZE: &str = "freeze";
const BEGIN: &str = "begin";
const TAKE: &str = "take";
const READ: &str = "read";
const COMMIT: &str = "commit";

pub(super) struct Builder<'a> {
    pub(super) world: &'a World,
    pub(super) settings: &'a BackupSettings,
    pub(super) options: &'a BackupOptions,
    pub(super) job: JobId,
}

impl Builder<'_> {
    pub(super) async fn build(
        &self,
        seen: &Observation,
        choice: Choice,
        opened: &Opened,
    ) -> Result<Plan, Fault> {
        let domain = &seen.domain;
        can_be_kept(seen)?;
        let mut steps = Vec::new();
        self.opening(domain, &choice, &mut steps)?;
        match &choice.power {
            Power::Runs { instance } => self.running(seen, &choice, instance, opened, &mut steps).await?,
            Power::Off { disks, definition } => {
                self.off(seen, &choice, (disks, definition), &mut steps).await?;
            }
        }
        let title = self.title(domain, &choice, opened);
        let facts = Facts {
            domain: domain.clone(),
            instance: match choice.power {
                Power::Runs { instance } => Some(instance),
                Power::Off { .. } => None,
            },
            definition: seen.persistent.as_ref().map(|persistent| persistent.bare.clone()),
            disks: choice.disks,
        };
        let fault =
            |e: &dyn std::fmt::Display| Fault::permanent(Code::UNDEFINED, "plan the backup", &domain.name, e);
        let facts = serde_json::to_value(facts).map_err(|e| fault(&e))?;
        Plan::new(NAME, VERSION, title, steps, Some(COMMIT.into()), facts).map_err(|e| fault(&e))
    }

    fn title(&self, domain: &DomainRef, choice: &Choice, opened: &Opened) -> String {
        let what = match self.options.kind {
            Asked::Auto | Asked::Incremental => "",
            Asked::Full => "full ",
            Asked::Differential => "differential ",
        };
        let off = if matches!(choice.power, Power::Off { .. }) { ", which is off," } else { "" };
        let open = if opened.vault.header().cipher == Cipher::None { ", which is not encrypted" } else { "" };
        let left_out: Vec<String> =
            choice.left_out.iter().map(|disk| format!("{} ({})", disk.target, disk.reason)).collect();
        let without =
            if left_out.is_empty() { String::new() } else { format!(", without {}", left_out.join(", ")) };
        let vault = &self.options.vault;
        format!("{what}backup of {}{off} into the vault {vault}{open}{without}", domain.name)
    }

    /// By a pull.
    async fn running(
        &self,
        seen: &Observation,
        choice: &Choice,
        instance: &str,
        opened: &Opened,
        steps: &mut Vec<StepSpec>,
    ) -> Result<(), Fault> {
        let (domain, policy) = (&seen.domain, self.options.freeze);
        let prefix = forget::prefix(&opened.vault.id().to_string());
        let checkpoint = format!("{prefix}{}", self.job.uuid().simple());
        let agent = seen.live.as_ref().is_some_and(|live| live.devices.agent);
        let freeze = policy != FreezePolicy::Never && (agent || policy == FreezePolicy::Required);
        let frozen = FreezeInput { domain: domain.clone(), store: self.settings.store.clone(), policy };
        if freeze {
            steps.push(
                step::<FreezeGuest>(FREEZE, "freeze the guest's file systems", &frozen)?
                    .after(LEASE)
                    .retry(Retry::NEVER)
                    .deadline(Millis::secs(60))
                    .critical(),
            );
        }
        let begin = BeginInput {
            domain: domain.clone(),
            store: self.settings.store.clone(),
            instance: instance.to_owned(),
            disks: choice.disks.clone(),
            checkpoint: checkpoint.clone(),
            lease: LEASE.into(),
            frozen: freeze.then(|| FREEZE.into()),
            must_be_frozen: freeze && policy == FreezePolicy::Required,
        };
        steps.push(
            step::<BeginPull>(BEGIN, "begin the backup job", &begin)?
                .after(if freeze { FREEZE } else { LEASE })
                .check_facts()
                .critical()
                .retry(Retry::NEVER)
                .probing(PATIENT_LOOK)
                .deadline(Millis::secs(300)),
        );
        // A guest that cannot be thawed yet does not keep the backup job open: nobody looks after its scratch files once all is read.
        let mut before_commit = vec!["end"];
        if freeze {
            steps.push(
                step::<ThawGuest>("thaw", "thaw the guest's file systems", &frozen)?
                    .after(BEGIN)
                    .closes(FREEZE)
                    .safety()
                    .retry(PATIENTLY)
                    .probing(PATIENT_LOOK),
            );
            before_commit.push("thaw");
        }
        let from = ReadFrom::Pull { begin: BEGIN.into(), instance: instance.to_owned() };
        steps.push(self.read(seen, choice, from).await?.after(BEGIN));
        let scratch = choice.disks.iter().map(|disk| disk.scratch.clone()).collect();
        steps.push(
            step::<EndPull>("end", "end the backup job", &EndInput { domain: domain.clone(), scratch })?
                .after(READ)
                .closes(BEGIN)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        steps.push(self.commit(domain)?.after_all(before_commit));
        let forget = ForgetInput {
            domain: domain.clone(),
            prefix,
            checkpoint,
            lease: LEASE.into(),
            commit: COMMIT.into(),
            keep: Some(self.settings.checkpoints),
        };
        steps.push(
            step::<ForgetCheckpoints>("forget", "delete checkpoints that nobody needs", &forget)?
                .after(COMMIT)
                .closes(BEGIN)
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        self.closing(domain, "forget", steps)
    }

    /// At rest, while the domain is on overlays: whoever starts it meanwhile starts it there.
    async fn off(
        &self,
        seen: &Observation,
        choice: &Choice,
        (disks, definition): (&[JobDisk], &str),
        steps: &mut Vec<StepSpec>,
    ) -> Result<(), Fault> {
        let domain = &seen.domain;
        let overlays = Overlays {
            domain: domain.clone(),
            store: self.settings.store.clone(),
            definition: definition.to_owned(),
            disks: disks.to_vec(),
            instance: None,
            bandwidth: self.settings.merge_bandwidth,
        };
        overlays.onto(LEASE, &[], steps)?;
        let rest = RestInput { domain: domain.clone(), disks: disks.to_vec() };
        steps.push(
            step::<TakeAtRest>(TAKE, "see that the disks stand still", &rest)?
                .after(SWITCH)
                .probing(PATIENT_LOOK)
                .deadline(Millis::secs(300)),
        );
        let from = ReadFrom::AtRest { take: TAKE.into(), disks: disks.to_vec() };
        steps.push(self.read(seen, choice, from).await?.after(TAKE));
        steps.push(self.commit(domain)?.after(READ));
        overlays.home(COMMIT, steps)?;
        self.closing(domain, TIDY, steps)
    }

    fn opening(&self, domain: &DomainRef, choice: &Choice, steps: &mut Vec<StepSpec>) -> Result<(), Fault> {
        let mark = MarkInput { domain: domain.clone(), store: self.settings.store.clone() };
        steps.push(
            step::<Mark>("mark", "reserve the domain", &mark)?
                .check_facts()
                .undo(patient())
                .deadline(Millis::secs(180)),
        );
        let lease = LeaseInput {
            vault: self.options.vault.clone(),
            domain: domain.clone(),
            kind: self.options.kind,
            disks: choice.disks.clone(),
            full_every_days: self.settings.full_every_days,
        };
        let title = format!("take a lease in the vault {}", self.options.vault);
        steps.push(step::<TakeLease>(LEASE, title, &lease)?.after("mark").stall(Millis::secs(900)));
        Ok(())
    }

    async fn read(&self, seen: &Observation, choice: &Choice, from: ReadFrom) -> Result<StepSpec, Fault> {
        // What is not known is left out of the manifest; no backup fails for it.
        let world = self.world.hypervisor.environment().await.unwrap_or_default();
        let of = |name: &str| world.get(name).cloned().unwrap_or_default();
        let uname = rustix::system::uname();
        let host = Host {
            name: uname.nodename().to_string_lossy().into_owned(),
            boot: of("boot"),
            libvirt: of("libvirt"),
            qemu: of("qemu"),
            vmkeep: self.settings.tool.clone(),
        };
        let definition = seen.persistent.as_ref().or(seen.live.as_ref());
        let input = ReadInput {
            vault: self.options.vault.clone(),
            domain: seen.domain.clone(),
            from,
            kind: self.options.kind,
            disks: choice.disks.clone(),
            state: kept_state(self.world, seen).await?,
            lease: LEASE.into(),
            bandwidth: self.options.bandwidth,
            low_water: self.settings.low_water,
            allow_plaintext: self.options.allow_plaintext,
            planned: Timestamp::now(),
            about: About {
                definition: definition.map(|definition| definition.xml.clone()).unwrap_or_default(),
                autostart: seen.autostart,
                host,
                journal: self.settings.store.clone(),
            },
        };
        let total: u64 = choice.disks.iter().map(|disk| disk.virtual_size).sum();
        let title = format!("read {} of disks into the vault {}", bytes(total), self.options.vault);
        Ok(step::<ReadDisks>(READ, title, &input)?.stall(Millis::secs(900)))
    }

    fn commit(&self, domain: &DomainRef) -> Result<StepSpec, Fault> {
        let vault = self.options.vault.clone();
        let title = format!("commit the backup to the vault {vault}");
        let commit = CommitInput { vault, domain: domain.clone(), read: READ.into() };
        Ok(step::<CommitBackup>(COMMIT, title, &commit)?.retry(PATIENTLY))
    }

    fn closing(
        &self,
        domain: &DomainRef,
        after: &'static str,
        steps: &mut Vec<StepSpec>,
    ) -> Result<(), Fault> {
        let release = ReleaseInput {
            vault: self.options.vault.clone(),
            domain: domain.clone(),
            lease: LEASE.into(),
            read: READ.into(),
        };
        steps.push(
            step::<ReleaseLease>("release", "end the lease in the vault", &release)?
                .after(after)
                .closes(LEASE)
                .retry(PATIENTLY),
        );
        let mark = MarkInput { domain: domain.clone(), store: self.settings.store.clone() };
        steps.push(
            step::<Unmark>("unmark", "release the domain", &mark)?
                .after("release")
                .retry(PATIENTLY)
                .probing(PATIENT_LOOK),
        );
        Ok(())
    }
}
