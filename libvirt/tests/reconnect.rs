//! Against a real libvirtd that dies and comes back, in a private hypervisor.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod hypervisor;

use hypervisor::{Hypervisor, LONG, signal};
use vmkeep_libvirt::event::Lifecycle;
use vmkeep_libvirt::flags::{DestroyFlags, ListFlags, SaveFlags};
use vmkeep_libvirt::{Class, Client, ClientOptions, ConnectOptions, ErrorCode, Event, Status};

fn client(hv: &Hypervisor) -> Client {
    Client::start(&hv.uri(), ClientOptions::default()).unwrap()
}

async fn next(
    events: &mut tokio::sync::broadcast::Receiver<Event>,
    wanted: impl Fn(&Event) -> bool,
) -> Event {
    let wait = async {
        loop {
            let event = events.recv().await.expect("no event was missed");
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(LONG, wait).await.expect("the event came in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_libvirtd_is_noticed_and_its_successor_taken_up_with_all_events() {
    let hv = Hypervisor::prepare();
    let client = client(&hv);
    let mut events = client.events();
    let absent = client.call("list", |c| c.domains(ListFlags::NONE)).await.unwrap_err();
    assert_eq!((absent.code, absent.class()), (ErrorCode::Disconnected, Class::ConnectionLost));

    hv.start_daemon();
    let Status::Connected { generation: 1, instance: Some(first) } = client.connected(LONG).await.unwrap()
    else {
        panic!("{:?}", client.status());
    };
    let domain = hv.idle_domain(&hv.connect(), "survivor");
    let handle = client.domain(domain.uuid());
    let process = handle.call("look", |d| d.qemu_process()).await.unwrap().expect("it runs");

    hv.kill_daemon();
    next(&mut events, |e| *e == Event::Disconnected { generation: 1 }).await;
    assert!(matches!(client.status(), Status::Disconnected { .. }));
    assert!(!first.process.is_alive());
    hv.start_daemon();
    let back = next(&mut events, |e| matches!(e, Event::Connected { generation: 2, .. })).await;
    let Event::Connected { instance: Some(second), .. } = back else { panic!("{back:?}") };
    assert_ne!(first, second);
    assert!(second.process.is_alive());

    assert_eq!(handle.call("look", |d| d.qemu_process()).await.unwrap(), Some(process), "QEMU lived on");
    handle.urgent("suspend", |d| d.suspend()).await.unwrap();
    next(&mut events, |e| {
        matches!(e, Event::Lifecycle { domain: d, what: Lifecycle::Suspended, .. } if d.uuid == domain.uuid())
    })
    .await;
    handle.call("destroy", |d| d.destroy(DestroyFlags::NONE)).await.unwrap();
    next(&mut events, |e| matches!(e, Event::Lifecycle { what: Lifecycle::Stopped, .. })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_hangs_stays_in_flight_without_its_caller_until_its_daemon_is_gone() {
    let hv = Hypervisor::start();
    let client = client(&hv);
    client.connected(LONG).await.unwrap();
    let mut events = client.events();
    let domain = hv.idle_domain(&hv.connect(), "hung");
    let uuid = domain.uuid();
    let process = domain.qemu_process().unwrap().expect("it runs");

    signal(&process, "STOP");
    // Its caller gives up; the call does not.
    let path = hv.path("hung.state");
    let handle = client.domain(uuid);
    let save = handle.call("save", move |d| d.save(&path, None, SaveFlags::NONE));
    assert!(tokio::time::timeout(std::time::Duration::from_millis(300), save).await.is_err());
    let calls = client.in_flight().of_domain(uuid);
    assert_eq!((calls.len(), calls[0].what.as_str(), calls[0].abandoned), (1, "save", true));
    // Another call whose caller stays, to see what it is told.
    let handle = client.domain(uuid);
    let (entered_tx, entered) = tokio::sync::oneshot::channel();
    let waiting = tokio::spawn(async move {
        let call = handle.call("suspend", |d| {
            let _ = entered_tx.send(());
            d.suspend()
        });
        call.await
    });
    entered.await.unwrap();
    assert_eq!(client.in_flight().count(uuid), 2);
    hv.kill_daemon();
    let told = waiting.await.unwrap().unwrap_err();
    assert_eq!((told.call, told.class()), ("virDomainSuspend", Class::InDoubt), "{told}");
    next(&mut events, |e| matches!(e, Event::Disconnected { .. })).await;
    assert!(client.in_flight().idle(uuid, LONG).await, "with the daemon its calls are gone");
    signal(&process, "CONT");
    hv.start_daemon();
    next(&mut events, |e| matches!(e, Event::Connected { .. })).await;
    // A daemon that has just started takes its domains up again in the background. This waits for the
    // domain's lock, and so for that; a destroy would not, and be told that nothing runs after it won.
    client.domain(uuid).call("suspend", |d| d.suspend()).await.unwrap();
    client.domain(uuid).call("destroy", |d| d.destroy(DestroyFlags::NONE)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_libvirtd_that_stands_still_is_given_up_and_may_yet_execute_the_call() {
    let hv = Hypervisor::start();
    let connect = ConnectOptions { keepalive_interval: 1, keepalive_count: 1, ..ConnectOptions::default() };
    let client = Client::start(&hv.uri(), ClientOptions { connect, ..ClientOptions::default() }).unwrap();
    let Status::Connected { instance: Some(daemon), .. } = client.connected(LONG).await.unwrap() else {
        panic!("{:?}", client.status());
    };
    let uuid = hv.idle_domain(&hv.connect(), "late").uuid();
    let mut events = client.events();

    let handle = client.domain(uuid);
    let stopped = daemon.clone();
    let call = handle.call("suspend", move |d| {
        signal(&stopped.process, "STOP");
        d.suspend()
    });
    let told = call.await.unwrap_err();
    assert_eq!((told.call, told.class()), ("virDomainSuspend", Class::InDoubt), "{told}");
    next(&mut events, |e| matches!(e, Event::Disconnected { .. })).await;
    let calls = client.in_flight().of_domain(uuid);
    assert_eq!((calls.len(), calls[0].answer_lost, calls[0].instance.as_ref()), (1, true, Some(&daemon)));
    assert!(!client.in_flight().idle(uuid, std::time::Duration::from_millis(50)).await);

    signal(&daemon.process, "CONT");
    let back = next(&mut events, |e| matches!(e, Event::Connected { generation: 2, .. })).await;
    assert_eq!(
        back,
        Event::Connected { generation: 2, instance: Some(daemon.clone()) },
        "it is the same daemon"
    );
    assert_eq!(client.in_flight().count(uuid), 1, "the same daemon may still execute it");
    // Whatever it did by now: once the caller has its proof, the call is taken off the list.
    client.in_flight().forget(calls[0].id);
    assert!(client.in_flight().idle(uuid, LONG).await);
    client.domain(uuid).call("destroy", |d| d.destroy(DestroyFlags::NONE)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_hang_on_one_domain_keep_nobody_from_another() {
    let hv = Hypervisor::start();
    let client = client(&hv);
    client.connected(LONG).await.unwrap();
    let conn = hv.connect();
    let (hung, well) = (hv.idle_domain(&conn, "hung"), hv.idle_domain(&conn, "well"));
    let process = hung.qemu_process().unwrap().expect("it runs");

    signal(&process, "STOP");
    // As many as libvirtd serves on one connection.
    let (entered, mut entering) = tokio::sync::mpsc::unbounded_channel();
    let calls: Vec<_> = (0..5)
        .map(|_| {
            let (handle, entered) = (client.domain(hung.uuid()), entered.clone());
            tokio::spawn(async move {
                let call = handle.urgent("ask QEMU", move |d| {
                    let _ = entered.send(());
                    d.block_graph()
                });
                call.await.map(drop)
            })
        })
        .collect();
    for _ in 0..calls.len() {
        entering.recv().await.unwrap();
    }

    let other = client.domain(well.uuid());
    let answer = tokio::time::timeout(LONG, other.call("ask QEMU", |d| d.block_graph())).await;
    answer.expect("it does not wait behind them").unwrap();
    assert_eq!(client.in_flight().count(hung.uuid()), calls.len(), "they hang all the while");
    assert!(matches!(client.status(), Status::Connected { generation: 1, .. }));

    signal(&process, "CONT");
    for call in calls {
        call.await.unwrap().unwrap();
    }
    for domain in [hung, well] {
        client.domain(domain.uuid()).call("destroy", |d| d.destroy(DestroyFlags::NONE)).await.unwrap();
    }
}
