//! What the fake hypervisor of the simulation does is what libvirt and QEMU do: each behaviour is one function, and is
//! shown on both. Where they differ the fake is wrong.
//!
//! `VMKEEP_BEHAVIOUR=commit` shows those that have the word in their names.

#![allow(unreachable_pub, missing_docs)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod behaviours;
mod bench;
mod fake;
mod real;

use std::future::Future;
use std::os::unix::fs::PermissionsExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bench::Bench;
use replay_tests::testbed::Hypervisor as Testbed;

/// A behaviour on its way.
type Showing<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// A behaviour.
pub struct Behaviour {
    pub name: &'static str,
    /// What it does to libvirtd others would feel.
    pub alone: bool,
    pub show: for<'a> fn(&'a dyn Bench) -> Showing<'a>,
}

fn chosen() -> Vec<Behaviour> {
    let word = std::env::var("VMKEEP_BEHAVIOUR").unwrap_or_default();
    let chosen: Vec<Behaviour> =
        behaviours::all().into_iter().filter(|behaviour| behaviour.name.contains(&word)).collect();
    assert!(!chosen.is_empty(), "no behaviour is called like {word:?}");
    chosen
}

fn judge(on: &str, failed: &[&str]) {
    assert!(failed.is_empty(), "on {on}, these are otherwise: {failed:#?}");
}

#[test]
fn every_behaviour_is_that_of_the_fake() {
    let mut failed = Vec::new();
    for behaviour in chosen() {
        let shown = std::panic::catch_unwind(|| {
            let folder = tempfile::tempdir().unwrap();
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
            runtime.unwrap().block_on(async {
                let bench = fake::OnFake::new(folder.path());
                (behaviour.show)(&bench).await;
                assert_eq!(bench.world.wrong(), Vec::<String>::new());
            });
        });
        if shown.is_err() {
            println!("{} is otherwise on the fake", behaviour.name);
            failed.push(behaviour.name);
        }
    }
    judge("the fake", &failed);
}

/// libvirt's session is that of the user who asks, and root's is the system's. So the behaviours are shown by this very
/// program as the test bed's user.
#[test]
fn every_behaviour_is_that_of_libvirt_and_qemu() {
    let testbed = Testbed::start_temp().unwrap();
    let program = testbed.dir().join("shared");
    let own = std::env::current_exe().unwrap();
    if std::fs::hard_link(&own, &program).is_err() {
        std::fs::copy(&own, &program).unwrap();
    }
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    // So that it can start libvirtd again.
    if rustix::process::geteuid().is_root() {
        let user = testbed.user();
        std::os::unix::fs::chown(testbed.dir().join("log/libvirtd.log"), Some(user.uid), Some(user.gid))
            .unwrap();
    }
    let mut command = testbed.command(&program);
    command.args(["--exact", "as_the_user", "--ignored", "--nocapture"]).env("VMKEEP_TESTBED", testbed.dir());
    let status = command.status().unwrap();
    assert!(status.success(), "see above");
}

/// How many are shown at once.
const ABREAST: usize = 3;

#[test]
#[ignore = "run by every_behaviour_is_that_of_libvirt_and_qemu"]
fn as_the_user() {
    let testbed = std::env::var("VMKEEP_TESTBED").expect("a test bed");
    let testbed = Testbed::attach(testbed.as_ref()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let failed = runtime.block_on(async {
        let bench = Arc::new(real::OnLibvirt::on(testbed));
        bench.connected().await;
        let (alone, together): (Vec<_>, Vec<_>) = chosen().into_iter().partition(|behaviour| behaviour.alone);
        let mut failed = Vec::new();
        let turns = Arc::new(tokio::sync::Semaphore::new(ABREAST));
        let mut shown = tokio::task::JoinSet::new();
        for behaviour in together {
            let (bench, turns) = (bench.clone(), turns.clone());
            shown.spawn(async move {
                let _turn = turns.acquire_owned().await.unwrap();
                show(bench, behaviour).await
            });
        }
        while let Some(outcome) = shown.join_next().await {
            failed.extend(outcome.unwrap());
        }
        for behaviour in alone {
            failed.extend(show(bench.clone(), behaviour).await);
        }
        failed
    });
    judge("libvirt and QEMU", &failed);
}

/// Shows one; its name if it is otherwise.
async fn show(bench: Arc<real::OnLibvirt>, behaviour: Behaviour) -> Option<&'static str> {
    let began = Instant::now();
    let bench = Arc::new(bench.anew());
    let own = bench.clone();
    let shown = tokio::spawn(async move { (behaviour.show)(&*own).await }).await;
    bench.tidy();
    let verdict = if shown.is_ok() { "ok" } else { "OTHERWISE" };
    println!("{verdict:9} {:5.1} s  {}", began.elapsed().as_secs_f64(), behaviour.name);
    shown.is_err().then_some(behaviour.name)
}
