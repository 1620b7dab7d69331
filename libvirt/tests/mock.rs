//! Against libvirt's mock driver, which lives inside this process: each test has a host of its own.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::mpsc;
use std::time::Duration;

use uuid::Uuid;
use vmkeep_libvirt::event::Lifecycle;
use vmkeep_libvirt::flags::*;
use vmkeep_libvirt::xml::{CheckpointXml, DomainXml};
use vmkeep_libvirt::{
    Class, Client, ClientOptions, Connection, Domain, DomainState, ErrorCode, Event, PausedReason, Status,
};

const LONG: Duration = Duration::from_secs(30);
const NAMESPACE: &str = "urn:vmkeep:test";

/// A host without domains. Its file must outlive the connection only until it is open.
struct Host {
    _file: tempfile::NamedTempFile,
    uri: String,
}

impl Host {
    fn new() -> Self {
        let file = tempfile::Builder::new().suffix(".xml").tempfile().unwrap();
        std::fs::write(file.path(), "<node><cpu><mhz>1</mhz></cpu></node>").unwrap();
        let uri = format!("test://{}", file.path().display());
        Self { _file: file, uri }
    }

    fn connect(&self) -> Connection {
        Connection::open(&self.uri).unwrap()
    }
}

fn define(conn: &Connection, name: &str) -> Domain {
    let mut xml = DomainXml::parse(
        "<domain type='test'><name/><memory unit='MiB'>8</memory><os><type>hvm</type></os><devices>\
         <disk type='file' device='disk'><source file='/a.qcow2'/><target dev='vda' bus='virtio'/></disk>\
         </devices></domain>",
    )
    .unwrap();
    xml.set_name(name).unwrap();
    conn.define(&xml.to_string(), DefineFlags::NONE).unwrap()
}

fn running(conn: &Connection, name: &str) -> Domain {
    let domain = define(conn, name);
    domain.start(CreateFlags::NONE).unwrap();
    domain
}

#[test]
fn the_mock_is_executed_by_this_process() {
    let conn = Host::new().connect();
    assert_eq!(conn.instance().unwrap().process.pid, std::process::id());
    assert_eq!(conn.driver().unwrap(), "TEST");
    assert!(conn.domains(ListFlags::NONE).unwrap().is_empty());
    assert!(Connection::client_version().unwrap().to_string().contains('.'));
}

#[test]
fn a_domain_is_found_by_name_and_uuid_and_its_absence_has_a_code() {
    let conn = Host::new().connect();
    let name = "we \"q\" $(x) & 'é'";
    let domain = define(&conn, name);
    assert_eq!(conn.domain_by_name(name).unwrap().uuid(), domain.uuid());
    assert_eq!(conn.domain_by_uuid(domain.uuid()).unwrap().name(), name);
    assert_eq!(DomainXml::parse(&domain.xml(XmlFlags::INACTIVE).unwrap()).unwrap().name().unwrap(), name);
    let none = conn.domain_by_uuid(Uuid::nil()).unwrap_err();
    assert_eq!((none.code, none.class()), (ErrorCode::NoDomain, Class::Permanent));
    let none = conn.domain_by_name("nobody").unwrap_err();
    assert!(none.to_string().contains("virDomainLookupByName on domain 'nobody'"), "{none}");
    domain.undefine(UndefineFlags::NONE).unwrap();
    assert_eq!(domain.state().unwrap_err().code, ErrorCode::NoDomain);
}

#[test]
fn a_nul_byte_is_refused_before_it_can_cut_an_argument_short() {
    let conn = Host::new().connect();
    let domain = running(&conn, "d");
    let nul = "a\0b";
    let errors = [
        conn.domain_by_name(nul).unwrap_err(),
        conn.define(nul, DefineFlags::NONE).unwrap_err(),
        conn.domain_capabilities(None, None, Some(nul), None).unwrap_err(),
        conn.restore(nul, None, SaveFlags::NONE).unwrap_err(),
        domain.save("/x", Some(nul), SaveFlags::NONE).unwrap_err(),
        domain.block_commit("vda", None, Some(nul), 0, CommitFlags::NONE).unwrap_err(),
        domain.set_metadata(NAMESPACE, nul, None, ImpactFlags::CONFIG).unwrap_err(),
        domain.fs_freeze(&[nul]).unwrap_err(),
        domain.snapshot(nul).unwrap_err(),
        domain.checkpoint(nul).unwrap_err(),
        domain.hmp(nul).unwrap_err(),
    ];
    assert!(errors.iter().all(|e| e.code == ErrorCode::NulByte), "{errors:?}");
    assert!(domain.is_active().unwrap());
}

#[test]
fn definitions_that_are_not_acceptable_are_refused_and_what_is_not_supported_is_said() {
    let conn = Host::new().connect();
    let error = conn.define("<domain", DefineFlags::NONE).unwrap_err();
    assert_eq!((error.code, error.class()), (ErrorCode::XmlDetail, Class::Permanent));
    let error = running(&conn, "d").block_commit("vda", None, None, 0, CommitFlags::NONE).unwrap_err();
    assert_eq!(error.code, ErrorCode::NoSupport);
}

#[test]
fn a_path_with_a_newline_is_read_as_it_was_meant() {
    let conn = Host::new().connect();
    let domain = define(&conn, "d");
    let mut xml = DomainXml::parse(&domain.xml(XmlFlags::INACTIVE).unwrap()).unwrap();
    let path = "/tmp/a\nb\tc 'd' \"e\" <f>&.qcow2";
    xml.set_disk_file("vda", path, "qcow2").unwrap();
    conn.define(&xml.to_string(), DefineFlags::NONE).unwrap();
    let text = domain.xml(XmlFlags::INACTIVE).unwrap();
    assert!(text.contains("a\nb\tc"), "libvirt writes them literally");
    let read = DomainXml::parse(&text).unwrap();
    assert_eq!(read.disk("vda").unwrap().source.path.as_deref(), Some(path));
    // Given back to libvirt untouched it still means the same.
    conn.define(&read.to_string(), DefineFlags::NONE).unwrap();
    let again = DomainXml::parse(&domain.xml(XmlFlags::INACTIVE).unwrap()).unwrap();
    assert_eq!(again.disk("vda").unwrap().source.path.as_deref(), Some(path));
}

#[test]
fn a_life_is_told_by_states_and_events() {
    let conn = Host::new().connect();
    let (tx, events) = mpsc::channel();
    let subscription = conn.subscribe(move |e| drop(tx.send(e)), || {}).unwrap();
    let domain = running(&conn, "d");
    let state = || domain.state().unwrap();
    assert_eq!(state().state, DomainState::Running);
    domain.suspend().unwrap();
    assert_eq!((state().state, state().paused()), (DomainState::Paused, Some(PausedReason::User)));
    domain.resume().unwrap();
    assert_eq!(state().paused(), None);
    assert_eq!((domain.id().is_some(), domain.info().unwrap().max_memory_kib), (true, 8192));
    domain.destroy(DestroyFlags::NONE).unwrap();
    assert_eq!((state().state, domain.id()), (DomainState::Shutoff, None));
    domain.undefine(UndefineFlags::NONE).unwrap();

    let wanted = [
        Lifecycle::Defined,
        Lifecycle::Started,
        Lifecycle::Suspended,
        Lifecycle::Resumed,
        Lifecycle::Stopped,
        Lifecycle::Undefined,
    ];
    for expected in wanted {
        match events.recv_timeout(LONG).unwrap() {
            Event::Lifecycle { domain: d, what, .. } => {
                assert_eq!((d.uuid, d.name.as_str(), what), (domain.uuid(), "d", expected));
            }
            other => panic!("{other:?}"),
        }
    }
    drop(subscription);
    // The callbacks are gone, and with them the sending end.
    assert_eq!(events.recv_timeout(LONG), Err(mpsc::RecvTimeoutError::Disconnected));
}

#[test]
fn flags_of_the_definition_are_read_and_set() {
    let conn = Host::new().connect();
    let domain = define(&conn, "d");
    assert!(domain.is_persistent().unwrap() && !domain.is_active().unwrap() && !domain.autostart().unwrap());
    domain.set_autostart(true).unwrap();
    assert!(domain.autostart().unwrap());
    let count = |f| conn.domains(f).unwrap().len();
    assert_eq!(
        (count(ListFlags::AUTOSTART), count(ListFlags::ACTIVE), count(ListFlags::INACTIVE)),
        (1, 0, 1)
    );
}

#[test]
fn our_metadata_is_kept_apart_by_its_namespace() {
    let conn = Host::new().connect();
    let domain = define(&conn, "d");
    let get = || domain.metadata(NAMESPACE, ImpactFlags::CONFIG).unwrap();
    assert_eq!(get(), None);
    domain.set_metadata(NAMESPACE, "v", Some("<job id='1'/>"), ImpactFlags::CONFIG).unwrap();
    domain.set_metadata("urn:other", "o", Some("<x/>"), ImpactFlags::CONFIG).unwrap();
    assert!(get().unwrap().contains("id='1'") || get().unwrap().contains("id=\"1\""));
    let xml = DomainXml::parse(&domain.xml(XmlFlags::INACTIVE).unwrap()).unwrap();
    assert_eq!(xml.metadata(NAMESPACE).unwrap().attr("id"), Some("1"));
    domain.set_metadata(NAMESPACE, "v", None, ImpactFlags::CONFIG).unwrap();
    assert_eq!(get(), None);
    assert!(domain.metadata("urn:other", ImpactFlags::CONFIG).unwrap().is_some());
}

#[test]
fn checkpoints_form_a_line_and_any_of_them_can_go() {
    let conn = Host::new().connect();
    let domain = running(&conn, "d");
    for name in ["c1", "c2", "c3"] {
        let xml = CheckpointXml { name: name.into(), description: None, disks: vec![("vda".into(), true)] };
        let made = domain.create_checkpoint(&xml.to_xml().unwrap(), CheckpointCreateFlags::NONE).unwrap();
        assert_eq!(made.name(), name);
    }
    let names = |list: Vec<vmkeep_libvirt::checkpoint::Checkpoint>| {
        list.iter().map(|c| c.name().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(domain.checkpoints(CheckpointListFlags::TOPOLOGICAL).unwrap()), ["c1", "c2", "c3"]);
    assert_eq!(names(domain.checkpoints(CheckpointListFlags::ROOTS).unwrap()), ["c1"]);
    let c2 = domain.checkpoint("c2").unwrap();
    assert_eq!(c2.parent().unwrap().unwrap().name(), "c1");
    assert_eq!(names(c2.children(CheckpointListFlags::NONE).unwrap()), ["c3"]);
    assert!(c2.xml(CheckpointXmlFlags::NO_DOMAIN).unwrap().contains("<domaincheckpoint>"));
    c2.delete(CheckpointDeleteFlags::NONE).unwrap();
    let c3 = domain.checkpoint("c3").unwrap();
    assert_eq!(c3.parent().unwrap().unwrap().name(), "c1");
    assert!(domain.checkpoint("c1").unwrap().parent().unwrap().is_none());
    assert_eq!(domain.checkpoint("c2").unwrap_err().code, ErrorCode::NoDomainCheckpoint);
    assert_eq!(conn.domains(ListFlags::HAS_CHECKPOINT).unwrap().len(), 1);
    assert!(conn.domains(ListFlags::NO_CHECKPOINT).unwrap().is_empty());
}

#[test]
fn file_systems_are_listed_frozen_and_thawed() {
    let conn = Host::new().connect();
    let domain = running(&conn, "d");
    let mounted = domain.fs_info().unwrap();
    assert!(mounted.iter().any(|f| f.mountpoint == "/" && !f.fstype.is_empty()), "{mounted:?}");
    assert_eq!(domain.fs_freeze(&["/"]).unwrap(), 1);
    assert!(domain.fs_freeze(&[]).unwrap() >= 1);
    assert!(domain.fs_thaw().unwrap() >= 1);
    assert_eq!(domain.fs_thaw().unwrap(), 0, "nothing is left to thaw");
}

#[test]
fn a_managed_save_is_seen_and_removed() {
    let conn = Host::new().connect();
    let domain = running(&conn, "d");
    assert!(!domain.has_managed_save().unwrap());
    domain.managed_save(SaveFlags::NONE).unwrap();
    assert!(domain.has_managed_save().unwrap() && !domain.is_active().unwrap());
    domain.remove_managed_save().unwrap();
    assert!(!domain.has_managed_save().unwrap());
}

#[test]
fn a_state_is_saved_and_restored() {
    let conn = Host::new().connect();
    let domain = running(&conn, "d");
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let state = state.to_str().unwrap();
    domain.save(state, None, SaveFlags::NONE).unwrap();
    assert!(!domain.is_active().unwrap());
    assert!(conn.save_image_xml(state, SaveImageXmlFlags::NONE).unwrap().contains("<name>d</name>"));
    conn.restore(state, None, SaveFlags::NONE).unwrap();
    assert_eq!(domain.state().unwrap().state, DomainState::Running);
    assert_eq!(domain.snapshots(SnapshotListFlags::NONE).unwrap().len(), 0);
}

// ---- the async face --------------------------------------------------------------------------------

async fn client(options: ClientOptions) -> (Host, Client, Uuid) {
    let host = Host::new();
    let client = Client::start(&host.uri, options).unwrap();
    client.connected(LONG).await.unwrap();
    let uuid = client.call("make", |c| Ok(running(c, "d").uuid())).await.unwrap();
    (host, client, uuid)
}

#[tokio::test]
async fn calls_run_off_the_async_thread_and_events_reach_every_listener() {
    let (_host, client, uuid) = client(ClientOptions::default()).await;
    let (mut one, mut two) = (client.events(), client.events());
    let here = std::thread::current().id();
    let there =
        client.domain(uuid).call("suspend", |d| d.suspend().map(|()| std::thread::current().id())).await;
    assert_ne!(there.unwrap(), here);
    for events in [&mut one, &mut two] {
        // Events of the domain's making may still be on their way.
        while !matches!(
            tokio::time::timeout(LONG, events.recv()).await.unwrap().unwrap(),
            Event::Lifecycle { what: Lifecycle::Suspended, .. }
        ) {}
    }
    assert!(matches!(client.status(), Status::Connected { generation: 1, .. }));
    let none = client.domain(Uuid::nil()).call("look", |d| d.state()).await.unwrap_err();
    assert_eq!(none.code, ErrorCode::NoDomain);
}

#[tokio::test]
async fn a_remote_daemon_is_refused_at_once() {
    let error = Client::start("qemu+ssh://host/system", ClientOptions::default()).unwrap_err();
    assert_eq!(error.code, ErrorCode::RemoteUri);
}

#[tokio::test]
async fn an_abandoned_call_goes_on_and_is_known_until_it_returns() {
    let (_host, client, uuid) = client(ClientOptions::default()).await;
    let (go_on, wait) = mpsc::channel::<()>();
    let handle = client.domain(uuid);
    let (entered_tx, entered) = tokio::sync::oneshot::channel();
    let call = handle.call("suspend late", move |d| {
        let _ = entered_tx.send(());
        wait.recv().unwrap();
        d.suspend()
    });
    // The caller waits until the call is on its way, then loses interest.
    tokio::select! {
        _ = call => panic!("it returned"),
        _ = entered => {}
    }
    let calls = client.in_flight().of_domain(uuid);
    assert_eq!((calls.len(), calls[0].abandoned, calls[0].answer_lost), (1, true, false));
    assert!(!client.in_flight().idle(uuid, Duration::from_millis(10)).await);
    go_on.send(()).unwrap();
    assert!(client.in_flight().idle(uuid, LONG).await);
    let state = client.domain(uuid).call("look", |d| d.state()).await.unwrap();
    assert_eq!(state.state, DomainState::Paused, "the effect came without its caller");
}

#[tokio::test]
async fn an_urgent_call_needs_no_place() {
    let options = ClientOptions { parallel_calls: 1, ..ClientOptions::default() };
    let (_host, client, uuid) = client(options).await;
    let (go_on, wait) = mpsc::channel::<()>();
    let hung = tokio::spawn({
        let handle = client.domain(uuid);
        async move {
            handle
                .call("hang", move |_| {
                    let _ = wait.recv();
                    Ok(())
                })
                .await
        }
    });
    while client.in_flight().count(uuid) == 0 {
        tokio::task::yield_now().await;
    }
    let handle = client.domain(uuid);
    let ordinary = tokio::time::timeout(Duration::from_millis(50), handle.call("look", |d| d.state())).await;
    assert!(ordinary.is_err(), "the only place is taken");
    client.domain(uuid).urgent("resume", |d| d.state().map(drop)).await.unwrap();
    drop(go_on);
    hung.await.unwrap().unwrap();
    client.domain(uuid).call("look", |d| d.state()).await.unwrap();
}

#[tokio::test]
async fn a_call_that_panics_is_an_error_and_leaves_nothing_behind() {
    let options = ClientOptions { parallel_calls: 1, ..ClientOptions::default() };
    let (_host, client, uuid) = client(options).await;
    let result: vmkeep_libvirt::Result<()> = client.domain(uuid).call("fall", |_| panic!("on purpose")).await;
    assert_eq!(result.unwrap_err().code, ErrorCode::OperationFailed);
    assert!(client.in_flight().idle(uuid, LONG).await);
    client.domain(uuid).call("look", |d| d.state()).await.unwrap();
}

#[tokio::test]
async fn whoever_closes_waits_for_calls_under_way_and_nobody_calls_after() {
    let (_host, client, uuid) = client(ClientOptions::default()).await;
    let (go_on, wait) = mpsc::channel::<()>();
    let call = tokio::spawn({
        let handle = client.domain(uuid);
        async move {
            handle.call("look late", move |d| wait.recv().map_or_else(|_| d.state(), |()| d.state())).await
        }
    });
    while client.in_flight().count(uuid) == 0 {
        tokio::task::yield_now().await;
    }
    assert!(!client.close(Duration::from_millis(10)).await, "a call is under way");
    go_on.send(()).unwrap();
    assert!(client.close(LONG).await);
    call.await.unwrap().unwrap();
    let error = client.domain(uuid).call("look", |d| d.state()).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Disconnected);
}
