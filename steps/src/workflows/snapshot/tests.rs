//! What is refused, what is left out, and the shape of what is planned.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vmkeep_workflow::{Code, JobId, Plan};

use super::check::{choose, observe, wait_until_free};
use super::facts::Facts;
use super::options::{MemoryOptions, Settings, SnapshotOptions};
use super::plan::Builder;
use crate::codes;
use crate::hypervisor::{
    Backing, DiskDevice, DiskSource, DomainJob, FileId, HvError, HvResult, Image, Layer, LocalStorage,
    Marker, Mirror, NvramDef, Observation, OverlaySpec, RunState, Space, Storage, TpmDef, TpmKind, Trouble,
};
use crate::image::root::Roots;
use crate::image::space::LowWater;
use crate::save::AfterReboot;
use crate::snapshot::freeze::FreezePolicy;
use crate::snapshot::tests::fake::{Fake, STORE, domain, target};
use crate::snapshot::{Places, World};

fn settings() -> Settings {
    let none = LowWater { bytes: 0, percent: 0 };
    Settings { guests: none, targets: none, ..Settings::new(STORE, "test") }
}

fn options(target: &Path) -> SnapshotOptions {
    SnapshotOptions {
        target: target.to_owned(),
        memory: None,
        freeze: FreezePolicy::IfPossible,
        disks: Vec::new(),
        bandwidth: 0,
        merge_bandwidth: 0,
        save: None,
        after_reboot: AfterReboot::Start,
        waits: None,
        keep: None,
    }
}

async fn refused(change: impl FnOnce(&mut Observation, &mut SnapshotOptions)) -> Code {
    let fake = Fake::new();
    let mut seen = observe(&fake.world(), &domain().id).await.unwrap();
    let mut options = options(Path::new("/t"));
    change(&mut seen, &mut options);
    choose(&fake.world(), &settings(), &options, &seen).await.err().expect("a refusal").code
}

#[tokio::test]
async fn each_reason_to_refuse_has_its_code() {
    assert_eq!(refused(|seen, _| seen.state = RunState::Other).await, codes::DOMAIN_NOT_RUNNING);
    assert_eq!(refused(|seen, _| seen.persistent = None).await, codes::DOMAIN_TRANSIENT);
    let other = Marker { store: "another".to_owned(), job: "j".to_owned(), hold: None };
    assert_eq!(refused(|seen, _| seen.persistent_marker = Some(other)).await, codes::FOREIGN_MARKER);
    let external = vec![("inner".to_owned(), false), ("outer".to_owned(), true)];
    assert_eq!(refused(|seen, _| seen.snapshots = external).await, codes::FOREIGN_SNAPSHOT);
    assert_eq!(refused(|_, options| options.disks = vec!["vdz".to_owned()]).await, codes::NO_SUCH_DISK);
    let code = refused(|seen, _| {
        let kind = TpmKind::Other("passthrough".to_owned());
        seen.live.as_mut().unwrap().devices.tpm = Some(TpmDef { kind, version: None, encrypted: false });
    });
    assert_eq!(code.await, codes::FIRMWARE_STATE_UNSUPPORTED);
    let code = refused(|seen, _| {
        let elsewhere = Some("block /dev/x".to_owned());
        seen.live.as_mut().unwrap().devices.nvram = Some(NvramDef { elsewhere, ..NvramDef::default() });
    });
    assert_eq!(code.await, codes::FIRMWARE_STATE_UNSUPPORTED);
    let code = refused(|seen, options| {
        options.memory = Some(MemoryOptions::default());
        seen.live.as_mut().unwrap().devices.unsaveable.push("a host device (pci)".to_owned());
    });
    assert_eq!(code.await, codes::MEMORY_UNSAVEABLE);
    let code = refused(|seen, _| seen.live.as_mut().unwrap().disks[0].mirror = Some(Mirror::Pivoting));
    assert_eq!(code.await, codes::HYPERVISOR_LOST_TRACK);
}

#[tokio::test]
async fn a_disk_on_somebodys_overlay_or_on_a_leftover_of_ours_is_refused() {
    for (path, expected) in [
        ("/i/theirs.qcow2", codes::ON_OVERLAY_OF_OTHERS),
        ("/i/vmkeep-ba9876543210-vda.qcow2", codes::OUR_LEFTOVERS),
    ] {
        let code = refused(|seen, _| {
            let top = Layer { path: path.into(), format: "qcow2".to_owned() };
            seen.qemu.as_mut().unwrap().disks[0].chain.insert(0, top);
        });
        assert_eq!(code.await, expected, "{path}");
    }
}

/// A commit that goes further down than to the named file would write into an image that others build on.
#[tokio::test]
async fn a_commit_is_proposed_only_down_to_the_file_that_the_definition_names() {
    let remedy = async |change: fn(&mut Observation)| {
        let fake = Fake::new();
        let mut seen = observe(&fake.world(), &domain().id).await.unwrap();
        change(&mut seen);
        let refusal = choose(&fake.world(), &settings(), &options(Path::new("/t")), &seen).await;
        let fault = refusal.err().expect("a refusal");
        assert_eq!(fault.code, codes::ON_OVERLAY_OF_OTHERS);
        fault.remedy
    };
    let on_top = remedy(|seen| {
        let chain = &mut seen.qemu.as_mut().unwrap().disks[0].chain;
        chain.insert(0, Layer { path: "/i/theirs.qcow2".into(), format: "qcow2".to_owned() });
        chain.push(Layer { path: "/i/template.qcow2".into(), format: "qcow2".to_owned() });
    });
    let on_top = on_top.await;
    let base = observe(&Fake::new().world(), &domain().id).await.unwrap().qemu.unwrap().disks[0].chain[0]
        .path
        .clone();
    assert!(
        on_top.contains("blockcommit") && on_top.contains(&format!("--base {}", base.display())),
        "{on_top}"
    );
    let elsewhere = remedy(|seen| {
        let chain = &mut seen.qemu.as_mut().unwrap().disks[0].chain;
        chain[0].path = "/i/clone.qcow2".into();
        chain.push(Layer { path: "/i/template.qcow2".into(), format: "qcow2".to_owned() });
    });
    let elsewhere = elsewhere.await;
    assert!(!elsewhere.contains("blockcommit") && elsewhere.contains("--disks"), "{elsewhere}");
    let unnamed = remedy(|seen| seen.persistent.as_mut().unwrap().disks.remove(0).target.0.clear());
    let unnamed = unnamed.await;
    assert!(!unnamed.contains("blockcommit") && unnamed.contains("--config"), "{unnamed}");
}

fn job(operation: &str) -> DomainJob {
    DomainJob {
        operation: operation.to_owned(),
        elapsed_ms: 1,
        done: 0,
        remaining: 1,
        total: 1,
        dirty_rate: 0,
        iteration: 0,
    }
}

#[tokio::test(start_paused = true)]
async fn a_domain_that_is_busy_for_a_moment_is_waited_for_and_one_that_stays_busy_is_not() {
    let fake = Fake::new();
    let (world, id) = (fake.world(), domain().id);
    let chosen = async || {
        let seen = observe(&world, &id).await.unwrap();
        choose(&world, &settings(), &options(Path::new("/t")), &seen).await.map(drop)
    };
    fake.state().job = Some(job("start"));
    let ends = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        fake.state().job = None;
    };
    tokio::join!(wait_until_free(&world, &id), ends);
    chosen().await.unwrap();

    fake.state().job = Some(job("save"));
    wait_until_free(&world, &id).await;
    assert_eq!(chosen().await.unwrap_err().code, codes::DOMAIN_BUSY_ELSEWHERE);
}

#[tokio::test]
async fn a_domain_that_libvirt_works_on_is_refused() {
    let fake = Fake::new();
    fake.state().job = Some(job("backup"));
    let seen = observe(&fake.world(), &domain().id).await.unwrap();
    let fault = choose(&fake.world(), &settings(), &options(Path::new("/t")), &seen).await.err().unwrap();
    assert_eq!(fault.code, codes::DOMAIN_BUSY_ELSEWHERE);
    assert!(fault.cause.contains("backup"));
}

#[tokio::test]
async fn disks_that_cannot_take_part_are_left_out_by_name_and_refused_if_asked_for() {
    let fake = Fake::new();
    let mut seen = observe(&fake.world(), &domain().id).await.unwrap();
    let live = seen.live.as_mut().unwrap();
    let first = live.disks[0].clone();
    let named = |name: &str| {
        let mut disk = first.clone();
        disk.target = target(name);
        disk
    };
    let mut odd = Vec::new();
    for (name, device) in [("sda", DiskDevice::Cdrom), ("fda", DiskDevice::Floppy), ("sdb", DiskDevice::Lun)]
    {
        odd.push(crate::hypervisor::DiskDef { device, ..named(name) });
    }
    for (name, source) in [
        ("vdc", DiskSource::Block("/dev/sdx".into())),
        ("vdd", DiskSource::Network("rbd:pool/image".to_owned())),
        ("vde", DiskSource::Other("the pool volume v".to_owned())),
        ("vdf", DiskSource::Empty),
    ] {
        odd.push(crate::hypervisor::DiskDef { source, ..named(name) });
    }
    odd.push(crate::hypervisor::DiskDef { read_only: true, ..named("vdg") });
    odd.push(crate::hypervisor::DiskDef { shareable: true, ..named("vdh") });
    odd.push(crate::hypervisor::DiskDef { transient: true, ..named("vdi") });
    odd.push(crate::hypervisor::DiskDef { encrypted: true, ..named("vdj") });
    odd.push(crate::hypervisor::DiskDef { format: Some("vmdk".to_owned()), ..named("vdk") });
    let names: Vec<_> = odd.iter().map(|disk| disk.target.0.clone()).collect();
    live.disks.extend(odd);
    let choice = choose(&fake.world(), &settings(), &options(Path::new("/t")), &seen).await.unwrap();
    assert_eq!(choice.disks.len(), 2);
    assert_eq!(choice.left_out.iter().map(|disk| disk.target.clone()).collect::<Vec<_>>(), names);
    assert_eq!(choice.warnings.len(), names.len());
    for name in names {
        let asked = SnapshotOptions { disks: vec![name.clone()], ..options(Path::new("/t")) };
        let fault = choose(&fake.world(), &settings(), &asked, &seen).await.err().unwrap();
        assert_eq!(fault.code, codes::DISK_CANNOT_TAKE_PART, "{name}");
    }
}

#[tokio::test]
async fn a_disk_on_a_device_takes_part_if_its_overlay_has_a_place_and_its_age_does_not_matter() {
    let fake = Fake::new();
    let mut seen = observe(&fake.world(), &domain().id).await.unwrap();
    for definition in [&mut seen.persistent, &mut seen.live].into_iter().flatten() {
        for disk in &mut definition.disks {
            let Some(path) = disk.source.image().cloned() else { unreachable!() };
            (disk.source, disk.format) = (DiskSource::Block(path), Some("raw".to_owned()));
        }
    }
    let plain = options(Path::new("/t"));
    let none = choose(&fake.world(), &settings(), &plain, &seen).await.err().unwrap();
    assert_eq!(none.code, codes::NO_DISK_TO_BACK_UP);
    let asked = SnapshotOptions { disks: vec!["vda".to_owned()], ..plain.clone() };
    let fault = choose(&fake.world(), &settings(), &asked, &seen).await.err().unwrap();
    assert_eq!(fault.code, codes::DISK_CANNOT_TAKE_PART);
    assert!(fault.remedy.contains("overlay_dir"));

    let at = |folder: &str| Settings { overlay_dir: Some(folder.into()), ..settings() };
    let here = at(env!("CARGO_MANIFEST_DIR"));
    assert_eq!(choose(&fake.world(), &here, &plain, &seen).await.unwrap().disks.len(), 2);
    for unfit in ["/nothing", "/dev"] {
        let fault = choose(&fake.world(), &at(unfit), &plain, &seen).await.err().unwrap();
        assert_eq!(fault.code, codes::DISK_CANNOT_TAKE_PART, "{unfit}");
    }
    let save = SnapshotOptions { save: Some(super::SaveOptions::default()), ..plain.clone() };
    let fault = choose(&fake.world(), &here, &save, &seen).await.err().unwrap();
    assert_eq!(fault.code, codes::MEMORY_UNSAVEABLE);
    for disk in &mut seen.live.as_mut().unwrap().disks {
        disk.format = Some("qcow2".to_owned());
    }
    let none = choose(&fake.world(), &here, &plain, &seen).await.err().unwrap();
    assert_eq!(none.code, codes::NO_DISK_TO_BACK_UP, "an image format on a device is left out");
}

/// Nothing is known of it at the instant of the others, and a restore must be told that it is missing.
#[tokio::test]
async fn a_disk_that_is_only_defined_for_the_next_start_is_left_out_by_name_and_refused_if_asked_for() {
    let fake = Fake::new();
    let mut seen = observe(&fake.world(), &domain().id).await.unwrap();
    let persistent = seen.persistent.as_mut().unwrap();
    let mut disk = persistent.disks[0].clone();
    (disk.target, disk.source) = (target("vdz"), DiskSource::File("/i/new".into()));
    persistent.disks.push(disk);
    let choice = choose(&fake.world(), &settings(), &options(Path::new("/t")), &seen).await.unwrap();
    assert_eq!(choice.disks.len(), 2);
    let [left_out] = choice.left_out.as_slice() else { panic!("{:?}", choice.left_out) };
    assert_eq!(left_out.target, "vdz");
    assert!(choice.warnings[0].contains("vdz") && choice.warnings[0].contains("next start"));
    let asked = SnapshotOptions { disks: vec!["vdz".to_owned()], ..options(Path::new("/t")) };
    let fault = choose(&fake.world(), &settings(), &asked, &seen).await.err().unwrap();
    assert_eq!(fault.code, codes::DISK_CANNOT_TAKE_PART);
}

#[tokio::test]
async fn a_domain_without_a_disk_that_can_take_part_is_refused() {
    let code = refused(|seen, _| {
        for disk in &mut seen.live.as_mut().unwrap().disks {
            disk.read_only = true;
        }
    });
    assert_eq!(code.await, codes::NO_DISK_TO_BACK_UP);
}

/// A world whose bases are real files below a folder that is also the root of targets.
struct Real {
    folder: tempfile::TempDir,
    fake: Fake,
    seen: Observation,
}

impl Real {
    async fn new() -> Self {
        let (folder, fake) = (tempfile::tempdir().unwrap(), Fake::new());
        for name in ["a", "b"] {
            std::fs::write(folder.path().join(name), vec![1; 8192]).unwrap();
        }
        let mut seen = observe(&fake.world(), &domain().id).await.unwrap();
        let real = |path: &Path| folder.path().join(path.file_name().unwrap());
        for disk in &mut seen.qemu.as_mut().unwrap().disks {
            disk.chain[0] = Layer { path: real(&disk.chain[0].path), format: "raw".to_owned() };
        }
        for definition in [&mut seen.persistent, &mut seen.live].into_iter().flatten() {
            for disk in &mut definition.disks {
                let DiskSource::File(path) = &disk.source else { unreachable!() };
                (disk.source, disk.format) = (DiskSource::File(real(path)), Some("raw".to_owned()));
            }
        }
        Self { folder, fake, seen }
    }

    async fn plan(
        &self,
        settings: &Settings,
        options: &SnapshotOptions,
    ) -> Result<Plan, vmkeep_workflow::Fault> {
        self.plan_on(Arc::new(LocalStorage::default()), settings, options).await
    }

    async fn plan_on(
        &self,
        storage: Arc<dyn Storage>,
        settings: &Settings,
        options: &SnapshotOptions,
    ) -> Result<Plan, vmkeep_workflow::Fault> {
        let world = World { hypervisor: Arc::new(self.fake.clone()), storage };
        let places = Places { roots: Arc::new(Roots::open([self.folder.path()]).unwrap()) };
        let choice = choose(&world, settings, options, &self.seen).await?;
        let job = JobId::from(uuid::Uuid::from_u128(0x0123_4567_89ab));
        let builder = Builder { world: &world, places: &places, settings, options, job };
        builder.build(&self.seen, &choice).await
    }
}

#[tokio::test]
async fn the_plan_has_the_shape_that_the_table_of_steps_promises() {
    let real = Real::new().await;
    let options = SnapshotOptions {
        memory: Some(MemoryOptions::default()),
        ..options(&real.folder.path().join("backups"))
    };
    let plan = real.plan(&settings(), &options).await.unwrap();
    let names: Vec<_> = plan.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "mark",
            "prepare",
            "overlay/vda",
            "overlay/vdb",
            "switch",
            "take",
            "copy/vda.raw",
            "copy/vdb.raw",
            "memory",
            "publish",
            "commit/vda",
            "commit/vdb",
            "pivot",
            "tidy",
            "unmark"
        ]
    );
    assert_eq!(plan.point_of_no_return.as_ref().unwrap().as_str(), "publish");
    let closers: Vec<_> =
        plan.steps.iter().filter(|step| step.closes.is_some()).map(|step| step.name.as_str()).collect();
    assert_eq!(closers, ["commit/vda", "commit/vdb", "pivot", "tidy"]);
    assert!(
        plan.steps.iter().all(|step| step.closes.as_ref().is_none_or(|opener| opener.as_str() == "switch"))
    );
    let critical: Vec<_> =
        plan.steps.iter().filter(|step| step.critical).map(|step| step.name.as_str()).collect();
    assert_eq!(critical, ["switch"], "from there until the guest is home the job cannot be paused");
    let checked: Vec<_> =
        plan.steps.iter().filter(|step| step.check_facts).map(|step| step.name.as_str()).collect();
    assert_eq!(checked, ["mark", "take"]);
    let undone: Vec<_> =
        plan.steps.iter().filter(|step| step.undo.is_some()).map(|step| step.name.as_str()).collect();
    assert_eq!(
        undone,
        ["mark", "prepare", "overlay/vda", "overlay/vdb", "switch", "copy/vda.raw", "copy/vdb.raw"]
    );
    plan.compile().unwrap();
}

#[tokio::test]
async fn firmware_variables_and_tpm_state_are_kept_from_where_libvirt_keeps_them() {
    let mut real = Real::new().await;
    let options = options(&real.folder.path().join("backups"));
    let devices = &mut real.seen.live.as_mut().unwrap().devices;
    devices.nvram = Some(NvramDef { format: "raw".to_owned(), ..NvramDef::default() });
    devices.tpm = Some(TpmDef { kind: TpmKind::Emulator, version: Some("2.0".to_owned()), encrypted: false });
    let plan = real.plan(&settings(), &options).await.unwrap();
    let step = |name: &str| plan.steps.iter().find(|step| step.name.as_str() == name).unwrap();
    let input = step("state").input.to_string();
    assert!(input.contains("/own/nvram/web_VARS.fd"), "{input}");
    assert!(input.contains("/own/tpm/00000000-0000-0000-0000-000000000007"), "{input}");
    assert!(step("publish").after.iter().any(|before| before.as_str() == "state"));
    real.seen.live.as_mut().unwrap().devices.nvram.as_mut().unwrap().file = Some("/v.fd".into());
    let plan = real.plan(&settings(), &options).await.unwrap();
    let step = plan.steps.iter().find(|step| step.name.as_str() == "state").unwrap();
    assert!(step.input.to_string().contains("\"/v.fd\""));
}

#[tokio::test]
async fn a_domain_that_is_off_is_led_home_from_the_switch_on_whatever_happens() {
    let mut real = Real::new().await;
    real.seen.state = RunState::Off;
    (real.seen.qemu, real.seen.live) = (None, None);
    real.seen.persistent.as_mut().unwrap().devices.agent = true;
    let memory = Some(MemoryOptions::default());
    let options = SnapshotOptions { memory, ..options(&real.folder.path().join("backups")) };
    let plan = real.plan(&settings(), &options).await.unwrap();
    assert!(plan.title.contains("off"), "{}", plan.title);
    let names: Vec<_> = plan.steps.iter().map(|step| step.name.as_str()).collect();
    for absent in ["memory", "freeze", "thaw"] {
        assert!(!names.contains(&absent), "{absent}");
    }
    let step = |name: &str| plan.steps.iter().find(|step| step.name.as_str() == name).unwrap();
    assert_eq!(step("take").kind.to_string(), "take-at-rest@1");
    for closer in ["commit/vda", "commit/vdb", "pivot", "tidy"] {
        assert_eq!(step(closer).closes.as_ref().unwrap().as_str(), "switch", "{closer}");
    }
    assert!(step("switch").critical && step("switch").undo.is_some());
    let warnings = serde_json::to_string(&step("publish").input).unwrap();
    assert!(warnings.contains("no memory to take"), "{warnings}");
    let facts: Facts = serde_json::from_value(plan.facts.clone()).unwrap();
    plan.compile().unwrap();
    assert_eq!(facts.instance, None);
    let fake = Fake::new();
    let facts = Facts { disks: fake.disks(), ..facts };
    assert!(facts.differ(&fake.world(), false).await.unwrap().unwrap().contains("started"));
    fake.state().die();
    assert_eq!(facts.differ(&fake.world(), false).await.unwrap(), None);
}

#[tokio::test]
async fn a_saved_domain_whose_image_cannot_be_read_is_refused() {
    let mut real = Real::new().await;
    (real.seen.state, real.seen.managed_save) = (RunState::Off, true);
    (real.seen.qemu, real.seen.live) = (None, None);
    let fault = real.plan(&settings(), &options(&real.folder.path().join("b"))).await.unwrap_err();
    assert_eq!(fault.code, codes::DOMAIN_NOT_RUNNING);
    assert!(fault.remedy.contains("managedsave-remove"), "{fault}");
}

#[tokio::test]
async fn a_definition_that_contradicts_its_images_is_refused_while_there_is_no_qemu_to_ask() {
    let mut real = Real::new().await;
    real.seen.state = RunState::Off;
    (real.seen.qemu, real.seen.live) = (None, None);
    let below = Layer { path: "/i/elsewhere".into(), format: "raw".to_owned() };
    real.seen.persistent.as_mut().unwrap().disks[0].backing = Backing::Explicit(vec![below]);
    let fault = real.plan(&settings(), &options(&real.folder.path().join("b"))).await.unwrap_err();
    assert_eq!(fault.code, codes::CHAIN_UNREADABLE);
}

#[tokio::test]
async fn a_guest_is_frozen_only_for_its_disks_alone_and_thawed_by_an_act_of_safety() {
    let mut real = Real::new().await;
    real.seen.persistent.as_mut().unwrap().devices.agent = true;
    let target = real.folder.path().join("backups");
    let with_memory = SnapshotOptions { memory: Some(MemoryOptions::default()), ..options(&target) };
    let plan = real.plan(&settings(), &with_memory).await.unwrap();
    assert!(plan.steps.iter().all(|step| step.name.as_str() != "freeze"));
    let plan = real.plan(&settings(), &options(&target)).await.unwrap();
    let step = |name: &str| plan.steps.iter().find(|step| step.name.as_str() == name).unwrap();
    assert!(step("freeze").critical && step("thaw").safety);
    assert_eq!(step("thaw").closes.as_ref().unwrap().as_str(), "freeze");
    assert!(step("publish").after.iter().any(|before| before.as_str() == "thaw"));
}

#[tokio::test]
async fn a_target_outside_the_roots_and_one_that_climbs_are_refused() {
    let real = Real::new().await;
    for (target, code) in [
        ("/somewhere/else".into(), codes::TARGET_OUTSIDE_ROOTS),
        ("relative".into(), codes::TARGET_OUTSIDE_ROOTS),
        (real.folder.path().join("../out"), codes::UNSAFE_PATH),
    ] {
        let fault = real.plan(&settings(), &options(&target)).await.unwrap_err();
        assert_eq!(fault.code, code, "{}", target.display());
    }
    let link = real.folder.path().join("link");
    std::os::unix::fs::symlink("/tmp", &link).unwrap();
    let fault = real.plan(&settings(), &options(&link)).await.unwrap_err();
    assert_eq!(fault.code, codes::UNSAFE_PATH);
}

#[tokio::test]
async fn want_of_room_is_known_before_anything_is_touched() {
    let real = Real::new().await;
    let greedy = LowWater { bytes: u64::MAX, percent: 100 };
    // Half of the file system is never forbidden, so the demand has to be impossible.
    let memory = MemoryOptions { bytes: Some(1 << 62), ..MemoryOptions::default() };
    let options = SnapshotOptions { memory: Some(memory), ..options(&real.folder.path().join("backups")) };
    let settings = Settings { targets: greedy, ..settings() };
    let fault = real.plan(&settings, &options).await.unwrap_err();
    assert_eq!(fault.code, codes::NOT_ENOUGH_DISK_SPACE);
    assert!(fault.cause.contains("are free"));
}

/// File systems that do not say how much room they have.
struct Silent(LocalStorage);

#[async_trait::async_trait]
impl Storage for Silent {
    async fn inspect(&self, layer: &Layer) -> HvResult<Option<Image>> {
        self.0.inspect(layer).await
    }

    async fn create_overlay(&self, _: &OverlaySpec) -> HvResult<Image> {
        unreachable!("nothing may be made before there is known to be room")
    }

    async fn remove(&self, _: &Path, _: FileId) -> HvResult<bool> {
        unreachable!("nor removed")
    }

    async fn commit_offline(&self, _: &Layer, _: &Layer, _: &CancellationToken) -> HvResult<()> {
        unreachable!("nor written to")
    }

    async fn space(&self, path: &Path) -> HvResult<Space> {
        Err(HvError::new(Trouble::Io, format!("statvfs {}: Stale file handle", path.display())))
    }

    async fn flush(&self, _: &Path) {}
}

#[tokio::test]
async fn a_file_system_that_does_not_say_how_much_room_it_has_is_named() {
    let real = Real::new().await;
    let options = options(&real.folder.path().join("backups"));
    let silent = Arc::new(Silent(LocalStorage::default()));
    let fault = real.plan_on(silent, &settings(), &options).await.unwrap_err();
    codes::assert_told(&fault, codes::NO_DISK_SPACE_INFORMATION, real.folder.path().to_str().unwrap());
    assert!(fault.cause.contains("Stale file handle"), "{fault}");
}

#[tokio::test]
async fn facts_that_changed_are_named_before_the_first_change() {
    let (real, fake) = (Real::new().await, Fake::new());
    let plan = real.plan(&settings(), &options(&real.folder.path().join("backups"))).await.unwrap();
    let mut facts: Facts = serde_json::from_value(plan.facts).unwrap();
    facts.disks = fake.disks();
    facts.chains = facts.disks.iter().map(|disk| vec![disk.base.path.clone()]).collect();
    let world = fake.world();
    assert_eq!(facts.differ(&world, false).await.unwrap(), None);
    fake.state().bare = "edited".to_owned();
    assert!(facts.differ(&world, false).await.unwrap().unwrap().contains("definition"));
    fake.state().bare = "as it was".to_owned();
    fake.state().qemu.as_mut().unwrap().jobs.insert(target("vda"), false);
    assert!(facts.differ(&world, false).await.unwrap().unwrap().contains("block job"));
    fake.state().qemu.as_mut().unwrap().jobs.clear();
    // Right before the snapshot the definition names the overlays.
    assert!(facts.differ(&world, true).await.unwrap().is_some());
    fake.switched();
    assert_eq!(facts.differ(&world, true).await.unwrap(), None);
    {
        let mut state = fake.state();
        state.die();
        state.start();
    }
    for taking in [false, true] {
        assert!(facts.differ(&world, taking).await.unwrap().unwrap().contains("started anew"));
    }
}
