//! Against a real libvirtd and a real QEMU, in a private hypervisor.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod hypervisor;

use std::sync::{OnceLock, mpsc};

use hypervisor::{Hypervisor, domain_xml, guest_writes, wait_for};
use uuid::Uuid;
use vmkeep_libvirt::block::BlockJobKind;
use vmkeep_libvirt::event::BlockJobStatus;
use vmkeep_libvirt::flags::*;
use vmkeep_libvirt::job::{JobOperation, JobPhase};
use vmkeep_libvirt::qemu::BlockJobPhase;
use vmkeep_libvirt::xml::*;
use vmkeep_libvirt::{Class, Connection, Domain, DomainState, ErrorCode, Event, saveimage};

/// One hypervisor for the tests that leave it as they found it. It ends with this process.
fn shared() -> &'static Hypervisor {
    static SHARED: OnceLock<Hypervisor> = OnceLock::new();
    SHARED.get_or_init(Hypervisor::start)
}

fn listen(conn: &Connection) -> (vmkeep_libvirt::event::Subscription, mpsc::Receiver<Event>) {
    let (tx, rx) = mpsc::channel();
    let sub = conn.subscribe(move |e| drop(tx.send(e)), || {}).unwrap();
    (sub, rx)
}

fn is_block_job(event: &Event, domain: &Domain, wanted: BlockJobStatus) -> bool {
    matches!(event, Event::BlockJob { domain: d, disk, kind: BlockJobKind::ActiveCommit, status }
        if d.uuid == domain.uuid() && disk == "vda" && *status == wanted)
}

fn live(domain: &Domain) -> DomainXml {
    DomainXml::parse(&domain.xml(XmlFlags::SECURE).unwrap()).unwrap()
}

fn persistent(domain: &Domain) -> DomainXml {
    DomainXml::parse(&domain.xml(XmlFlags::INACTIVE | XmlFlags::SECURE).unwrap()).unwrap()
}

fn source(xml: &DomainXml, target: &str) -> String {
    xml.disk(target).unwrap().source.path.unwrap()
}

/// The files under the first disk, as QEMU has them open.
fn chain(domain: &Domain) -> Vec<String> {
    let graph = domain.block_graph().unwrap();
    graph.disk(&live(domain), "vda").unwrap().files().into_iter().map(str::to_owned).collect()
}

#[test]
fn the_connection_knows_what_it_talks_to() {
    let conn = shared().connect();
    let instance = conn.instance().expect("the daemon is known").clone();
    assert_eq!(instance.name, "libvirtd");
    assert!(instance.process.is_alive());
    assert_ne!(instance.process.pid, std::process::id());
    assert_eq!(conn.driver().unwrap(), "QEMU");
    assert!(conn.is_alive().unwrap());
    assert!(conn.lib_version().unwrap().0 >= 6_000_000);
    assert!(conn.hypervisor_version().unwrap().0 >= 4_000_000);
    assert!(conn.node_info().unwrap().memory_kib > 0);
    assert!(conn.capabilities().unwrap().contains("<capabilities>"));
    assert!(
        conn.domain_capabilities(None, Some("x86_64"), None, Some("qemu"))
            .unwrap()
            .contains("<domainCapabilities>")
    );
}

#[test]
fn nobody_listening_is_said_as_such() {
    let uri = "qemu:///session?socket=/tmp/there-is-no-such-socket";
    let error = Connection::open(uri).unwrap_err();
    assert_eq!((error.code, error.class()), (ErrorCode::NoConnect, Class::ConnectionLost));
}

#[test]
fn an_overlay_is_taken_up_committed_and_left_again_and_qemu_itself_says_so() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "commit");
    let (_sub, events) = listen(&conn);
    let (base, overlay) = (hv.path("commit-a.qcow2"), hv.path("commit-o.qcow2"));
    assert_eq!(chain(&domain), [base.as_str()]);
    hv.qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay, "64M"]);

    let snapshot = SnapshotXml {
        name: Some("s".into()),
        description: None,
        memory: SnapshotMemory::No,
        disks: vec![
            ("vda".into(), SnapshotDisk::External { path: overlay.clone(), format: "qcow2".into() }),
            ("vdb".into(), SnapshotDisk::No),
        ],
    };
    let flags = SnapshotCreateFlags::DISK_ONLY
        | SnapshotCreateFlags::ATOMIC
        | SnapshotCreateFlags::REUSE_EXTERNAL
        | SnapshotCreateFlags::NO_METADATA;
    domain.create_snapshot(&snapshot.to_xml().unwrap(), flags).unwrap();
    assert_eq!(chain(&domain), [overlay.clone(), base.clone()]);
    assert_eq!(
        (source(&live(&domain), "vda"), source(&persistent(&domain), "vda")),
        (overlay.clone(), overlay.clone())
    );
    assert!(domain.snapshots(SnapshotListFlags::NONE).unwrap().is_empty(), "no record was asked for");

    guest_writes(&domain, 0xBB, "1M", "16M");
    let process = domain.qemu_process().unwrap().expect("it runs");
    let held = domain.qemu_open_files().unwrap().expect("it runs");
    assert!(held.iter().any(|f| f.path == hv.file("commit-o.qcow2") && !f.deleted));

    let slowly = CommitFlags::ACTIVE | CommitFlags::BANDWIDTH_BYTES;
    domain.block_commit("vda", Some(&base), None, 64 << 10, slowly).unwrap();
    let early = domain.block_job_abort("vda", BlockJobAbortFlags::PIVOT).unwrap_err();
    assert_eq!((early.code, early.class()), (ErrorCode::BlockCopyActive, Class::Transient), "{early}");
    assert_eq!(live(&domain).disk("vda").unwrap().mirror.unwrap().ready, MirrorReady::No);
    let busy = domain.block_commit("vda", Some(&base), None, 0, CommitFlags::ACTIVE).unwrap_err();
    assert_eq!((busy.code, busy.class()), (ErrorCode::BlockCopyActive, Class::Transient));
    domain.block_job_set_speed("vda", 0, BlockJobRateFlags::BANDWIDTH_BYTES).unwrap();
    wait_for(&events, |e| is_block_job(e, &domain, BlockJobStatus::Ready));
    let mirror = live(&domain).disk("vda").unwrap().mirror.unwrap();
    assert_eq!((mirror.ready, mirror.source.path.as_deref()), (MirrorReady::Yes, Some(base.as_str())));
    let info = domain.block_job_info("vda").unwrap().unwrap();
    assert_eq!((info.kind, info.cur), (BlockJobKind::ActiveCommit, info.end));
    let graph = domain.block_graph().unwrap();
    let job = &graph.jobs[0];
    assert_eq!((job.phase.clone(), job.ready, job.kind.as_str()), (BlockJobPhase::Ready, true, "commit"));
    assert!(job.files.contains(&overlay) && job.files.contains(&base));
    assert_eq!(graph.disk(&live(&domain), "vda").unwrap().filters, ["mirror_top"]);

    domain.suspend().unwrap();
    domain.block_job_abort("vda", BlockJobAbortFlags::PIVOT).unwrap();
    wait_for(&events, |e| is_block_job(e, &domain, BlockJobStatus::Completed));
    domain.resume().unwrap();
    assert_eq!(chain(&domain), [base.as_str()]);
    assert_eq!((source(&live(&domain), "vda"), source(&persistent(&domain), "vda")), (base.clone(), base));
    let graph = domain.block_graph().unwrap();
    assert!(graph.jobs.is_empty() && !graph.uses(&overlay));
    let held = domain.qemu_open_files().unwrap().expect("it runs");
    assert!(held.iter().all(|f| f.path != hv.file("commit-o.qcow2")), "the overlay may be unlinked");
    assert_eq!(domain.qemu_process().unwrap(), Some(process), "it was one process all along");
    assert_eq!(domain.block_job_info("vda").unwrap(), None);
    let none = domain.block_job_abort("vda", BlockJobAbortFlags::NONE).unwrap_err();
    assert_eq!((none.code, none.class()), (ErrorCode::InvalidArg, Class::Permanent), "{none}");
    domain.destroy(DestroyFlags::NONE).unwrap();
    assert_eq!(domain.qemu_process().unwrap(), None);
}

#[test]
fn a_saved_guest_comes_back_on_other_disks_and_its_state_serves_a_copy_under_another_identity() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "saved");
    let base = hv.path("saved-a.qcow2");
    let state = hv.file("saved.state");
    domain.save(state.to_str().unwrap(), None, SaveFlags::NONE).unwrap();
    assert_eq!(domain.state().unwrap().state, DomainState::Shutoff);

    let image = saveimage::read(&state).unwrap();
    assert!(image.was_running && image.format == saveimage::StreamFormat::Raw && image.cookie.is_some());
    let inside = DomainXml::parse(&image.xml).unwrap();
    assert_eq!(inside.uuid().unwrap(), domain.uuid());
    assert_eq!(
        inside.disk("vda").unwrap().backing,
        Backing::End,
        "a plain restore would ignore what is below"
    );
    let told = conn.save_image_xml(state.to_str().unwrap(), SaveImageXmlFlags::SECURE).unwrap();
    assert_eq!(DomainXml::parse(&told).unwrap().disks(), inside.disks());

    // The same guest on an overlay.
    let overlay = hv.path("saved-o.qcow2");
    hv.qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay, "64M"]);
    let mut edited = inside.clone();
    edited.set_disk_file("vda", &overlay, "qcow2").unwrap();
    edited.set_disk_backing("vda", &BackingEdit::Drop).unwrap();
    conn.restore(state.to_str().unwrap(), Some(&edited.to_string()), SaveFlags::PAUSED).unwrap();
    assert_eq!(domain.state().unwrap().state, DomainState::Paused);
    assert_eq!(chain(&domain), [overlay, base]);
    assert!(!domain.run_status().unwrap().running);
    domain.resume().unwrap();
    assert!(domain.run_status().unwrap().running);

    // Another guest from the same memory: libvirt refuses that, the rewritten copy of the file works.
    let (a, b) = (hv.path("copy-a.qcow2"), hv.path("copy-b.raw"));
    hv.qemu_img(&["create", "-q", "-f", "qcow2", &a, "64M"]);
    hv.qemu_img(&["create", "-q", "-f", "raw", &b, "16M"]);
    let mut other = inside;
    let uuid = Uuid::new_v4();
    other.set_name("copy 'of' saved & é").unwrap();
    other.set_uuid(uuid).unwrap();
    other.set_disk_file("vda", &a, "qcow2").unwrap();
    other.set_disk_file("vdb", &b, "raw").unwrap();
    let refused =
        conn.restore(state.to_str().unwrap(), Some(&other.to_string()), SaveFlags::PAUSED).unwrap_err();
    assert_eq!(refused.class(), Class::Permanent);
    let rewritten = hv.file("copy.state");
    saveimage::copy_with_xml(&state, &rewritten, &other.to_string()).unwrap();
    hv.give(&rewritten);
    conn.restore_params(rewritten.to_str().unwrap(), None, SaveFlags::RUNNING).unwrap();
    let copy = conn.domain_by_uuid(uuid).unwrap();
    assert_eq!((copy.name(), copy.state().unwrap().state), ("copy 'of' saved & é", DomainState::Running));
    assert_eq!(domain.state().unwrap().state, DomainState::Running, "both run at once");
    assert_ne!(copy.qemu_process().unwrap(), domain.qemu_process().unwrap());
    assert_eq!(copy.block_graph().unwrap().disks[0].files(), [a.as_str()]);
    copy.destroy(DestroyFlags::NONE).unwrap();
    domain.destroy(DestroyFlags::NONE).unwrap();
}

#[test]
fn the_memory_file_of_a_snapshot_is_a_save_image() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "memory");
    let (base, overlay) = (hv.path("memory-a.qcow2"), hv.path("memory-o.qcow2"));
    hv.qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &overlay, "64M"]);
    let memory = hv.file("memory.state");
    let snapshot = SnapshotXml {
        name: Some("m".into()),
        description: None,
        memory: SnapshotMemory::File(memory.to_str().unwrap().into()),
        disks: vec![
            ("vda".into(), SnapshotDisk::External { path: overlay.clone(), format: "qcow2".into() }),
            ("vdb".into(), SnapshotDisk::No),
        ],
    };
    let flags = SnapshotCreateFlags::LIVE | SnapshotCreateFlags::REUSE_EXTERNAL | SnapshotCreateFlags::ATOMIC;
    let made = domain.create_snapshot(&snapshot.to_xml().unwrap(), flags).unwrap();
    assert_eq!(domain.state().unwrap().state, DomainState::Running);
    let image = saveimage::read(&memory).unwrap();
    let inside = DomainXml::parse(&image.xml).unwrap();
    assert_eq!(source(&inside, "vda"), base, "the memory belongs to the frozen base");
    assert_eq!(chain(&domain), [overlay, base]);
    assert_eq!(domain.migration_status().unwrap().status.as_deref(), Some("completed"));

    assert_eq!(made.name(), "m");
    assert_eq!(domain.snapshots(SnapshotListFlags::EXTERNAL).unwrap().len(), 1);
    assert!(domain.snapshot("m").unwrap().xml().unwrap().contains("<domainsnapshot>"));
    domain.snapshot("m").unwrap().delete(SnapshotDeleteFlags::METADATA_ONLY).unwrap();
    assert_eq!(domain.snapshot("m").unwrap_err().code, ErrorCode::NoDomainSnapshot);
    domain.destroy(DestroyFlags::NONE).unwrap();
}

#[test]
fn a_pull_backup_with_a_checkpoint_runs_until_it_is_ended_and_leaves_the_bitmap() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "backup");
    let (_sub, events) = listen(&conn);
    let socket = hv.path("nbd.sock");
    let checkpoint = CheckpointXml {
        name: "c1".into(),
        description: Some("first".into()),
        disks: vec![("vda".into(), true), ("vdb".into(), false)],
    };
    let part = |file: &str| {
        Some(BackupPart { file: hv.path(file), format: Some("qcow2".into()), ..BackupPart::default() })
    };
    let backup = |incremental: Option<&str>| BackupXml {
        mode: BackupMode::Pull { socket: socket.clone() },
        incremental: incremental.map(str::to_owned),
        disks: vec![
            BackupDisk { target: "vda".into(), part: part("scratch-a") },
            BackupDisk { target: "vdb".into(), part: None },
        ],
    };
    assert_eq!(domain.backup_xml().unwrap(), None);
    assert_eq!(domain.job_phase().unwrap(), JobPhase::None);
    let missing = domain.backup_begin(&backup(Some("nope")).to_xml().unwrap(), None, BackupBeginFlags::NONE);
    assert_eq!(missing.unwrap_err().code, ErrorCode::NoDomainCheckpoint);

    domain
        .backup_begin(
            &backup(None).to_xml().unwrap(),
            Some(&checkpoint.to_xml().unwrap()),
            BackupBeginFlags::NONE,
        )
        .unwrap();
    assert!(domain.job_phase().unwrap().is_active());
    assert_eq!(domain.job_stats(JobStatsFlags::NONE).unwrap().operation, JobOperation::Backup);
    assert!(std::fs::metadata(&socket).is_ok(), "QEMU serves the disk");
    assert!(domain.backup_xml().unwrap().unwrap().contains("scratch-a"));
    let graph = domain.block_graph().unwrap();
    assert_eq!(graph.disk(&live(&domain), "vda").unwrap().filters, ["copy-before-write"]);
    assert!(graph.uses(&hv.path("scratch-a")));

    domain.abort_job().unwrap();
    let ended = wait_for(
        &events,
        |e| matches!(e, Event::JobCompleted { domain: d, stats } if d.uuid == domain.uuid() && stats.operation == JobOperation::Backup),
    );
    let Event::JobCompleted { stats, .. } = ended else { unreachable!() };
    assert_eq!((stats.success, stats.error.as_deref()), (Some(true), Some("Operation canceled")));
    let kept = domain.job_stats(JobStatsFlags::COMPLETED | JobStatsFlags::KEEP_COMPLETED).unwrap();
    assert_eq!((kept.operation, kept.phase), (JobOperation::Backup, JobPhase::Completed));
    assert!(!domain.block_graph().unwrap().uses(&hv.path("scratch-a")));
    assert_eq!(domain.abort_job().unwrap_err().code, ErrorCode::OperationInvalid);

    guest_writes(&domain, 0xCC, "2M", "64k");
    let graph = domain.block_graph().unwrap();
    let bitmap = &graph.disk(&live(&domain), "vda").unwrap().top().unwrap().bitmaps[0];
    assert_eq!((bitmap.name.as_deref(), bitmap.persistent, bitmap.count), (Some("c1"), true, 64 << 10));
    let found = domain.checkpoint("c1").unwrap();
    assert_eq!(found.parent().unwrap().map(|p| p.name().to_owned()), None);
    assert!(
        found.xml(CheckpointXmlFlags::SIZE | CheckpointXmlFlags::NO_DOMAIN).unwrap().contains("size='65536'")
    );
    found.delete(CheckpointDeleteFlags::NONE).unwrap();
    assert!(domain.checkpoints(CheckpointListFlags::NONE).unwrap().is_empty());
    assert!(domain.block_graph().unwrap().disks[0].chain[0].bitmaps.is_empty());
    domain.destroy(DestroyFlags::NONE).unwrap();
}

#[test]
fn disks_tell_their_sizes_and_a_threshold_is_announced_once_it_is_passed() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "sizes");
    let (_sub, events) = listen(&conn);
    domain.set_block_threshold("vda", 4 << 20).unwrap();
    guest_writes(&domain, 1, "0", "8M");
    let event = wait_for(
        &events,
        |e| matches!(e, Event::BlockThreshold { domain: d, .. } if d.uuid == domain.uuid()),
    );
    let Event::BlockThreshold { disk, threshold, excess, .. } = event else { unreachable!() };
    assert!(disk.starts_with("vda") && threshold == 4 << 20 && excess > 0);
    let info = domain.block_info("vda").unwrap();
    assert_eq!(info.capacity, 64 << 20);
    assert!(info.allocation >= 8 << 20 && info.physical >= 8 << 20, "{info:?}");
    assert!(domain.block_stats("vda").unwrap()["wr_bytes"].as_u64().is_some());
    domain.block_resize("vdb", 32 << 20).unwrap();
    assert_eq!(domain.block_info("vdb").unwrap().capacity, 32 << 20);
    assert!(!domain.memory_stats().unwrap().is_empty());
    assert_eq!(domain.block_info("vdz").unwrap_err().code, ErrorCode::InvalidArg);
    domain.destroy(DestroyFlags::NONE).unwrap();
}

#[test]
fn what_an_absent_agent_cannot_do_is_said_without_doubt() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "agentless");
    for error in [
        domain.fs_freeze(&[]).unwrap_err(),
        domain.fs_thaw().unwrap_err(),
        domain.agent_ping(1).unwrap_err(),
        domain.fs_info().unwrap_err(),
    ] {
        assert_ne!(error.class(), Class::InDoubt, "{error}");
        assert!(
            matches!(error.code, ErrorCode::ArgumentUnsupported | ErrorCode::AgentUnresponsive),
            "{error}"
        );
    }
    domain.destroy(DestroyFlags::NONE).unwrap();
}

#[test]
fn a_save_into_a_full_disk_is_recognised_and_the_guest_keeps_running() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "full");
    let error = domain.save("/dev/full", None, SaveFlags::NONE).unwrap_err();
    assert_eq!((error.code, error.class()), (ErrorCode::NoSpace, Class::Transient), "{error}");
    assert_eq!(domain.state().unwrap().state, DomainState::Running);
    domain.destroy(DestroyFlags::NONE).unwrap();
}

#[test]
fn a_managed_save_waits_for_the_next_start() {
    let hv = shared();
    let conn = hv.connect();
    let domain = hv.idle_domain(&conn, "managed");
    domain.managed_save(SaveFlags::NONE).unwrap();
    assert!(domain.has_managed_save().unwrap());
    let of = |filter| conn.domains(filter).unwrap().iter().any(|d| d.uuid() == domain.uuid());
    assert!(of(ListFlags::MANAGED_SAVE) && !of(ListFlags::ACTIVE));
    let xml = domain.managed_save_xml(SaveImageXmlFlags::SECURE).unwrap();
    domain.managed_save_define_xml(&xml, SaveFlags::PAUSED).unwrap();
    domain.start(CreateFlags::NONE).unwrap();
    assert_eq!(domain.state().unwrap().state, DomainState::Paused);
    assert!(!domain.has_managed_save().unwrap());
    domain.managed_save(SaveFlags::NONE).unwrap();
    domain.remove_managed_save().unwrap();
    assert!(!domain.has_managed_save().unwrap());
}

#[test]
fn a_path_with_every_kind_of_character_is_used_and_read_back() {
    let hv = shared();
    let conn = hv.connect();
    let name = "odd 'n\"ame' $(id) & <é> \\ %41;.qcow2";
    let path = hv.path(name);
    hv.qemu_img(&["create", "-q", "-f", "qcow2", &path, "1M"]);
    hv.qemu_img(&["create", "-q", "-f", "raw", &hv.path("odd-b.raw"), "1M"]);
    let mut xml =
        DomainXml::parse(&domain_xml("odd", Uuid::new_v4(), "/placeholder", &hv.path("odd-b.raw"))).unwrap();
    xml.set_name("odd \"name\" 'x' $(id) & <é>").unwrap();
    xml.set_disk_file("vda", &path, "qcow2").unwrap();
    let domain = conn.define(&xml.to_string(), DefineFlags::NONE).unwrap();
    domain.start(CreateFlags::NONE).unwrap();
    assert_eq!(domain.name(), "odd \"name\" 'x' $(id) & <é>");
    assert_eq!(source(&live(&domain), "vda"), path);
    assert_eq!(chain(&domain), [path.as_str()]);
    let process = domain.qemu_process().unwrap().expect("it is found under such a name");
    assert!(
        vmkeep_libvirt::qemu::open_files(&process)
            .unwrap()
            .iter()
            .any(|f| f.path == std::path::Path::new(&path))
    );
    domain.destroy(DestroyFlags::NONE).unwrap();
}
