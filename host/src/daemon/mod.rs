//! The daemon: the order in which it starts, and the order in which it ends.
//!
//! **Starting.** Configuration, logs, store, hypervisor, socket; then, as soon as libvirt answers: guests that a job of
//! ours holds are set free (`safety`), interrupted jobs are taken over, requests are let in. A guest that does not
//! answer is tried on in the background, and only its own domain stays closed to jobs. The socket is there before libvirt is, because "vmkeepd waits for libvirt" must be visible somewhere; what would change anything is
//! refused until all of that is done ([`crate::api`]).
//!
//! **A store that cannot be written** must not leave a guest frozen or paused: it is opened for reading only, the
//! guests are set free, and then the daemon ends with the store's error. Setting a guest free needs the store's
//! identity only.
//!
//! **Ending.** A signal takes the jobs to a safe place, at which they stay until the next start. A second signal ends
//! the process at once; that is as safe as a crash, which is what everything here is built for.
//!
//! **A journal that failed** ends the process on the spot: what a failed fsync left on the drive is unknown, and only a
//! new process that reads it anew can know.

pub mod args;
mod full;
mod going_down;
pub mod logs;
pub mod notify;
mod orphans;
mod reboot;
mod safety;
mod waits;
mod watch;
mod watchdog;

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch as channel;
use vmkeep_steps::backup::left::LeftLeases;
use vmkeep_steps::hypervisor::LocalStorage;
use vmkeep_steps::reconcile::sweep::Journals;
use vmkeep_steps::snapshot::World;
use vmkeep_steps::vaults::Vaults;
use vmkeep_store::Store;
use vmkeep_workflow::engine::{self, SystemClock};
use vmkeep_workflow::journal::StoreError;
use vmkeep_workflow::{Engine, EventStore, Fault};

use crate::api::listener::{Socket, user_name};
use crate::api::serve::{Manners, raise_descriptors, serve};
use crate::api::types::DaemonPhase;
use crate::api::{App, router};
use crate::catalogue::Catalogue;
use crate::codes;
use crate::config::Config;
use crate::environment::Facts;
use crate::heads::Sealer;
use crate::hypervisor::Libvirt;
use crate::site::{Host, OpenRoots, Site};
use crate::vaults::HostVaults;

/// How long calls that are under way at the end are waited for. They are looks, which are done in milliseconds, or hang.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long libvirt is waited for when the only thing left to do is to set guests free.
const LAST_WAIT: Duration = Duration::from_secs(60);
/// How long the guests are waited for then.
const LAST_TRIES: Duration = Duration::from_secs(60);

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// When it cannot start; the fault's code is the exit status.
pub async fn run(config: Config) -> Result<(), Fault> {
    logs::start(&config.log)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), state = %config.state_dir.display(), connect = %config.connect, "vmkeepd starts");
    let manners = Manners::with(raise_descriptors());
    prepare_folders(&config)?;
    let libvirt = Libvirt::start(&config.connect).map_err(|e| {
        e.fault(codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "use the hypervisor", &config.connect)
    })?;
    let world = World { hypervisor: Arc::new(libvirt.clone()), storage: Arc::new(LocalStorage::default()) };
    let store = match open_store(&config).await {
        Ok(store) => store,
        Err(fault) => return Err(set_free_and_give_up(&config, &libvirt, &world, fault).await),
    };
    let socket = Socket::bind(&config.socket).await?;
    let roots = OpenRoots::open(&config.roots, &config.restore_dir)?;

    let facts = Facts::new();
    let vaults: Arc<dyn Vaults> = Arc::new(HostVaults::new(&config));
    let known_vaults = vaults.clone();
    let events: Arc<dyn EventStore> = store.clone();
    let engine = Engine::new(engine::Config {
        registry: crate::site::registry(&libvirt, &world, &events, &roots, vaults.clone(), &config),
        store: events.clone(),
        clock: Arc::new(SystemClock),
        environment: Arc::new(full::Surroundings {
            facts: facts.clone(),
            world: world.clone(),
            store: store.id().to_string(),
            asked: Arc::default(),
        }),
        limits: crate::site::limits(&config),
        on_fatal: Arc::new(die),
    });
    let catalogue = Arc::new(Catalogue::new(events, config.roots.clone(), Arc::new(die)));
    let (phase, phases) = channel::channel(DaemonPhase::WaitingForLibvirt);
    let phase = Arc::new(phase);
    let owner = rustix::process::geteuid().as_raw();
    let site: Arc<dyn Site> = Arc::new(Host {
        config: config.clone(),
        libvirt: libvirt.clone(),
        roots,
        vaults,
        facts: facts.clone(),
        engine: engine.clone(),
        catalogue,
    });
    let freeze = config.limits.freeze;
    let sealer = Arc::new(Sealer::new(store.clone(), &config.state_dir));
    let sealing = tokio::spawn(sealer.clone().regularly());
    let settings = config.clone();
    let left = LeftLeases::new(Arc::new(Journals(store.clone())));
    let tidying = tokio::spawn(async move { left.end_everywhere(&*known_vaults).await });
    let pruning = tokio::spawn(crate::history::daily(store.clone(), site.clone(), config.history));
    let app = Arc::new(App {
        site,
        config,
        engine: engine.clone(),
        store: store.clone(),
        sealer: sealer.clone(),
        phase: phases.clone(),
        started: Timestamp::now(),
        owner,
        owner_name: tokio::task::spawn_blocking(move || user_name(owner)).await.unwrap_or_default(),
    });

    let stopping = async move {
        let mut phases = phases;
        let _ = phases.wait_for(|phase| *phase == DaemonPhase::Stopping).await;
    };
    let serving = tokio::spawn(serve(socket, router(app), manners, stopping));
    let low = settings.limits.keep_free;
    let waiting = tokio::spawn(waits::watch(engine.clone(), world.clone(), low));
    let guarding = tokio::spawn(watchdog::watch(watchdog::Watchdog {
        libvirt: libvirt.clone(),
        world: world.clone(),
        store: store.id().to_string(),
        engine: engine.clone(),
        freeze,
    }));
    let orphans = orphans::Orphans::new(world.clone(), store.clone(), low);
    let client = libvirt.client().clone();
    let ending_world = world.clone();
    let watching = tokio::spawn(watch::watch(watch::Watched {
        libvirt,
        world,
        store: store.id().to_string(),
        engine: engine.clone(),
        facts,
        phase: phase.clone(),
        config: settings,
        orphans,
    }));
    let signal = ending().await;
    tracing::info!(signal, "vmkeepd ends: jobs are taken to a safe place; a second signal ends it at once");
    phase.send_replace(DaemonPhase::Stopping);
    notify::tell(notify::STOPPING);
    watching.abort();
    waiting.abort();
    pruning.abort();
    tidying.abort();
    let in_order = async {
        let for_good = going_down::is_it().await;
        if for_good {
            // Before the jobs, so that their journals can tell.
            going_down::end_pulls(&ending_world, &engine).await;
        }
        engine.shutdown().await;
        if for_good {
            // One that was being begun.
            going_down::end_pulls(&ending_world, &engine).await;
        }
    };
    tokio::select! {
        () = in_order => tracing::info!("every job is at a safe place"),
        signal = ending() => tracing::warn!(signal, "vmkeepd ends at once; the next start takes the jobs over"),
    }
    // Jobs on their way to a safe place still need it.
    guarding.abort();
    sealing.abort();
    sealer.sign().await;
    // Answers under way may still be read; streams end by themselves when the phase says so.
    if tokio::time::timeout(Duration::from_secs(2), serving).await.is_err() {
        tracing::debug!("a connection did not end in time");
    }
    if !client.close(FAREWELL).await {
        tracing::debug!("calls to libvirt did not come back in time");
    }
    Ok(())
}

/// The folders that everything below relies on.
fn prepare_folders(config: &Config) -> Result<(), Fault> {
    let root = rustix::process::geteuid().is_root();
    // QEMU of the system's libvirt runs as another user and must be able to reach images below this folder.
    make_folder(&config.state_dir, if root { 0o711 } else { 0o700 })?;
    for dir in &config.roots {
        // A root that somebody configured and that is missing may be an unmounted file system: filling up the folder
        // under the mount point would be worse than failing.
        if dir.starts_with(&config.state_dir) {
            let readable = root && *dir == config.restore_dir;
            make_folder(dir, if readable { 0o711 } else { 0o700 })?;
        }
    }
    Ok(())
}

fn make_folder(dir: &Path, mode: u32) -> Result<(), Fault> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(dir).and_then(|()| {
        // The mode of a folder that was there is its owner's business, except that it must not be wide open.
        let meta = std::fs::metadata(dir)?;
        if meta.permissions().mode() & 0o022 != 0 {
            std::fs::set_permissions(dir, PermissionsExt::from_mode(mode))?;
        }
        Ok(())
    });
    made.map_err(|e| {
        Fault::permanent(codes::CANNOT_CREATE_DIRECTORY, "make the folder", dir.display().to_string(), e)
            .remedy("Let the user of vmkeepd write there, or name another folder with --state-dir")
    })
}

async fn open_store(config: &Config) -> Result<Arc<dyn Store>, Fault> {
    let (path, wanted) = (config.store_dir(), config.store());
    let opened = tokio::task::spawn_blocking(move || vmkeep_store::open(&wanted)).await;
    let opened = opened.unwrap_or_else(|e| Err(StoreError::Io(e.to_string())));
    opened.map_err(|error| crate::store::fault("open the store", &path, &error))
}

/// What is left to do when there is no store to write to.
async fn set_free_and_give_up(config: &Config, libvirt: &Libvirt, world: &World, fault: Fault) -> Fault {
    // In use: the other daemon sees to the guests. Too new: it is not known what its marks mean.
    // Of another engine: the configuration is wrong, not the disk, and the store can be read all the same.
    if fault.code == codes::STORE_IN_USE || fault.code == codes::STORE_TOO_NEW || !config.store_dir().exists()
    {
        return fault;
    }
    let mut wanted = config.store();
    if let Ok(Some(engine)) = vmkeep_store::engine_of(&wanted.path) {
        wanted.engine = engine;
    }
    let Ok(Ok(store)) = tokio::task::spawn_blocking(move || vmkeep_store::open_read_only(&wanted)).await
    else {
        tracing::error!("the store cannot even be read: which guests are held by its jobs is not known");
        return fault;
    };
    tracing::error!(%fault, "the store cannot be written; guests are set free before vmkeepd ends");
    if let Err(error) = libvirt.client().connected(LAST_WAIT).await {
        tracing::error!(%error, "libvirt does not answer; guests that are held stay so until vmkeepd starts again");
        return fault;
    }
    let pass = safety::pass(world, &store.id().to_string(), LAST_TRIES, &|_| true).await;
    for (domain, _) in pass.waiting {
        tracing::error!(domain = %domain.name, "not seen to: it does not answer; start vmkeepd again once it does");
    }
    fault
}

/// Waits for a signal that asks the daemon to end, and names it.
async fn ending() -> &'static str {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = terminate => "SIGTERM",
        _ = tokio::signal::ctrl_c() => "SIGINT",
    }
}

/// The store can no longer be trusted.
fn die(why: &str) {
    tracing::error!(why, "the journal failed; vmkeepd ends at once and must be started again");
    eprintln!(
        "vmkeepd: the journal failed: {why}. Ending at once; start vmkeepd again once the storage is well"
    );
    std::process::abort();
}
