//! The host that the daemon runs on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use vmkeep_steps::backup::BackupSettings;
use vmkeep_steps::deletion::OpenJobs;
use vmkeep_steps::hypervisor::{DomainRef, Hypervisor, Trouble};
use vmkeep_steps::image::root::TargetRoot;
use vmkeep_steps::inplace::{InPlaceSettings, KeptMachine};
use vmkeep_steps::reconcile::Leftover;
use vmkeep_steps::reconcile::sweep::Journals;
use vmkeep_steps::restore::RestoreSettings;
use vmkeep_steps::snapshot::{Places, World};
use vmkeep_steps::vaults::Vaults;
use vmkeep_steps::workflows::snapshot::Settings;
use vmkeep_steps::workflows::{self, Parts};
use vmkeep_workflow::engine::Limits;
use vmkeep_workflow::journal::Record;
use vmkeep_workflow::{Actor, Engine, EventStore, Fault, Registry, Subject};

use super::backups::Backup;
use super::{
    OpenRoots, Order, Site, backups, checkpoints, deletions, domains, exchange, from_vault, leftovers,
    orders, patience, vaulted,
};
use crate::api::types::{
    BackupDetail, BackupRequest, BackupRow, Backups, DeleteRequest, DiscardRequest, DomainRow, ErrorBody,
    Finding, ForgetRequest, InPlaceRequest, KeptRow, LibvirtStatus, ProtectRequest, PruneRequest,
    RebuildRequest, RestoreRequest, SnapshotRequest, UndoRequest, VaultedRow,
};
use crate::catalogue::{Catalogue, Report, View};
use crate::codes;
use crate::config::Config;
use crate::environment::Facts;
use crate::genuine::{self, Journal};
use crate::hypervisor::Libvirt;

/// The step kinds and workflows of this release, at work on this world.
#[must_use]
pub fn registry(
    libvirt: &Libvirt,
    world: &World,
    store: &Arc<dyn EventStore>,
    roots: &OpenRoots,
    vaults: Arc<dyn Vaults>,
    config: &Config,
) -> Registry {
    let places = Places { roots: roots.roots.clone() };
    let settings = Settings {
        overlay_dir: config.snapshot.overlay_dir.clone(),
        guests: config.limits.keep_free,
        ..Settings::new(store.id().to_string(), concat!("vmkeep ", env!("CARGO_PKG_VERSION")))
    };
    let registry = Registry::new()
        .workflow(crate::verify::Verify)
        .step(crate::verify::VerifyBackup { roots: roots.roots.clone() });
    let tool = concat!("vmkeep ", env!("CARGO_PKG_VERSION"));
    let backup = BackupSettings {
        scratch_dir: config.backup.scratch_dir.clone(),
        overlay_dir: config.snapshot.overlay_dir.clone(),
        merge_bandwidth: config.limits.merge_bandwidth,
        full_every_days: config.backup.full_every_days,
        checkpoints: config.backup.checkpoints,
        low_water: config.limits.keep_free,
        ..BackupSettings::new(store.id().to_string(), tool)
    };
    let watch_ms = u64::try_from(config.limits.watch.as_millis()).unwrap_or(u64::MAX);
    let restore = RestoreSettings { watch_ms, rights: config.restore, ..RestoreSettings::default() };
    let restored = config.restore_dir.clone();
    let in_place = InPlaceSettings { store: store.id().to_string(), restored, restore };
    let parts = Parts {
        world: world.clone(),
        places,
        snapshot: settings,
        backup,
        vaults,
        restore,
        in_place,
        users: Arc::new(OpenJobs(store.clone())),
        jobs: Arc::new(Journals(store.clone())),
    };
    let registry = workflows::register(registry, parts);
    registry.around_workflows(|workflow| patience::patient(workflow, libvirt))
}

/// How many jobs may run at once: in all, and per root that they write to.
#[must_use]
pub fn limits(config: &Config) -> Limits {
    let named = config.roots.iter().map(|root| (orders::limit_name(root), config.limits.jobs_per_root));
    let vaults =
        config.vaults.keys().map(|vault| (orders::vault_limit(vault.as_str()), config.limits.jobs_per_root));
    let named = named.chain(vaults).collect();
    Limits { running: config.limits.jobs, named }
}

/// How long a look at the host waits for libvirt to say its version.
const VERSIONS: Duration = Duration::from_secs(2);

/// This host.
#[derive(Clone)]
pub struct Host {
    /// Its configuration.
    pub config: Config,
    /// The hypervisor.
    pub libvirt: Libvirt,
    /// Where backups may lie, and restored images.
    pub roots: OpenRoots,
    /// Its vaults.
    pub vaults: Arc<dyn Vaults>,
    /// What journals tell of the world.
    pub facts: Facts,
    /// The engine.
    pub engine: Engine,
    /// Which backups there are and were.
    pub catalogue: Arc<Catalogue>,
}

impl Host {
    /// The backup that somebody means, and whatever else there is.
    async fn find_backup(&self, wanted: &str) -> Result<(Backup, View), Fault> {
        let view = self.catalogue.view().await?;
        let wanted = wanted.to_owned();
        self.blocking(move |roots| Ok((backups::find(&wanted, roots, &view)?, view))).await
    }

    /// The same, if it is a backup that can be used.
    async fn whole_backup(&self, wanted: &str) -> Result<(Backup, View), Fault> {
        let (one, view) = self.find_backup(wanted).await?;
        Ok((backups::whole(one)?, view))
    }

    /// Looks at backups where looking may block.
    async fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce(&[PathBuf]) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let roots = self.config.roots.clone();
        tokio::task::spawn_blocking(move || f(&roots))
            .await
            .unwrap_or_else(|e| Err(Fault::permanent(codes::UNDEFINED_ERROR, "look for backups", "", e)))
    }

    /// The domain that somebody means.
    async fn find(&self, name: &str) -> Result<DomainRef, Fault> {
        patience::patiently(&self.libvirt, || self.look_for(name)).await
    }

    async fn look_for(&self, name: &str) -> Result<DomainRef, Fault> {
        self.libvirt.find(name).await.map_err(|error| match error.trouble {
            Trouble::NoSuchDomain => Fault::permanent(
                codes::CANNOT_FIND_MACHINE,
                "find the domain",
                name,
                "there is no domain of that name or UUID",
            )
            .remedy("`vmkeep domains` lists them"),
            Trouble::Refused => Fault::permanent(codes::AMBIGUOUS_NAME, "find the domain", name, error)
                .remedy("Type more of it"),
            _ => self.unreachable(error),
        })
    }

    /// The backup that somebody means, whose root is there.
    async fn wanted(&self, backup: &str, from: Option<&Path>) -> Result<Backup, Fault> {
        let one = match (backup.is_empty(), from.map(crate::location::path).transpose()?) {
            (true, Some(from)) => {
                self.blocking(move |roots| backups::whole(backups::from_folder(&from, roots)?)).await?
            }
            (false, None) => self.whole_backup(backup).await?.0,
            _ => {
                return Err(orders::usage(
                    "name either a backup or its folder",
                    "Give an id, or `--from DIR`",
                ));
            }
        };
        self.roots.usable(&one.path)?;
        Ok(one)
    }

    async fn leftovers(&self) -> Result<Vec<Leftover>, Fault> {
        let store = self.engine.store();
        leftovers::around(&self.libvirt, store, &self.config).await
    }

    async fn kept_machine(&self, job: &str) -> Result<KeptMachine, Fault> {
        self.roots.usable(&self.config.restore_dir)?;
        let (config, places) = (self.config.clone(), Places { roots: self.roots.roots.clone() });
        let job = job.to_owned();
        self.blocking(move |_| exchange::find(&config, &places, &job)).await
    }

    fn unreachable(&self, error: vmkeep_steps::hypervisor::HvError) -> Fault {
        error
            .fault(codes::HYPERVISOR_UNREACHABLE, "ask libvirt", &self.config.connect)
            .remedy("See whether libvirt runs and lets this user in: vmkeep doctor")
    }
}

#[async_trait]
impl Site for Host {
    async fn libvirt(&self) -> LibvirtStatus {
        let found = match self.libvirt.reachable() {
            // What takes libvirt longer is asked for in the background anyway.
            Ok(()) => match tokio::time::timeout(VERSIONS, self.libvirt.environment()).await {
                Ok(found) => found,
                Err(_) => Ok(self.libvirt.instances()),
            },
            Err(error) => Err(error),
        };
        let (versions, fault) = match found {
            Ok(facts) => {
                let of = |name: &str| facts.get(name).cloned().unwrap_or_else(|| "?".to_owned());
                (Some(format!("libvirt {}, QEMU {}", of("libvirt"), of("qemu"))), None)
            }
            Err(error) => (None, Some(ErrorBody::from(&self.unreachable(error)))),
        };
        LibvirtStatus { uri: self.config.connect.clone(), reachable: fault.is_none(), versions, fault }
    }

    async fn domains(&self) -> Result<Vec<DomainRow>, Fault> {
        let seen = self.libvirt.overview().await.map_err(|e| self.unreachable(e))?;
        let overlays = self.config.snapshot.overlay_dir.as_deref();
        Ok(seen.iter().map(|seen| domains::row(seen, overlays)).collect())
    }

    async fn snapshot(&self, request: &SnapshotRequest) -> Result<Order, Fault> {
        orders::makes_sense(request)?;
        let domain = self.find(&request.domain).await?;
        let order = orders::snapshot(&self.config, request, &domain)?;
        self.roots.usable(&orders::target(&self.config, request.to.as_deref())?)?;
        Ok(order)
    }

    async fn back_up(&self, request: &BackupRequest) -> Result<Order, Fault> {
        let domain = self.find(&request.domain).await?;
        orders::back_up(&self.config, request, &domain)
    }

    async fn restore(&self, request: &RestoreRequest, key: Option<&str>) -> Result<Order, Fault> {
        let order = match &request.vault {
            Some(vault) => from_vault::restore(&self.config, &*self.vaults, vault, request, key).await?,
            None => {
                from_vault::none_of(request)?;
                let one = self.wanted(&request.backup, request.from.as_deref()).await?;
                orders::restore(&self.config, request, (&one.path, one.outside), key)?
            }
        };
        for target in orders::restore_targets(&order)? {
            self.roots.usable(&target)?;
        }
        Ok(order)
    }

    async fn in_place(&self, request: &InPlaceRequest) -> Result<Order, Fault> {
        let one = self.wanted(&request.backup, request.from.as_deref()).await?;
        self.roots.usable(&self.config.restore_dir)?;
        if let Some(folder) = &request.folder {
            self.roots.usable(&orders::clean(folder)?)?;
        }
        exchange::in_place(&self.config, request, &one)
    }

    async fn undo(&self, request: &UndoRequest) -> Result<Order, Fault> {
        exchange::undo(request, &self.kept_machine(&request.job).await?)
    }

    async fn discard(&self, request: &DiscardRequest) -> Result<Order, Fault> {
        exchange::discard(&self.kept_machine(&request.job).await?)
    }

    async fn kept(&self) -> Result<(Vec<KeptRow>, Vec<String>), Fault> {
        let (config, places) = (self.config.clone(), Places { roots: self.roots.roots.clone() });
        self.blocking(move |_| Ok(exchange::all(&config, &places))).await
    }

    async fn verify(&self, backup: &str) -> Result<Order, Fault> {
        let (one, _) = self.whole_backup(backup).await?;
        self.roots.usable(&one.path)?;
        let manifest = &one.stored.manifest;
        let options = crate::verify::Options {
            backup: manifest.backup.to_string(),
            folder: one.path.clone(),
            published: Journal::of(&self.engine, manifest).await.0,
            depth: vmkeep_steps::manifest::Depth::Full,
            bandwidth: self.config.limits.bandwidth,
        };
        Ok(Order {
            workflow: crate::verify::NAME.into(),
            subject: Subject { id: manifest.domain.uuid.to_string(), label: manifest.domain.name.clone() },
            options: orders::json(&options)?,
            limits: Vec::new(),
        })
    }

    async fn backups(&self) -> Result<Backups, Fault> {
        Ok(backups::rows(&self.catalogue.view().await?, Timestamp::now()))
    }

    async fn in_vaults(&self) -> (Vec<VaultedRow>, Vec<String>) {
        let (found, warnings) = self.catalogue.vaulted().await;
        (vaulted::rows(found, &*self.vaults).await, warnings)
    }

    async fn backup(&self, backup: &str) -> Result<BackupDetail, Fault> {
        let (one, view) = self.whole_backup(backup).await?;
        let mut detail = backups::detail(&one, &view, Timestamp::now())?;
        let journal = Journal::of(&self.engine, &one.stored.manifest).await;
        self.blocking(move |_| {
            // Its folder was found below a root, or named by hand once; it is only read.
            let folder =
                TargetRoot::open(&one.path).map_err(|e| backups::unreadable(&one.path, &e.into()))?;
            let mut problems = genuine::against_definitions(folder.folder(), &one.stored);
            problems.extend(journal.objects(&one.stored));
            detail.notes.extend(journal.note());
            detail.problems = problems;
            Ok(detail)
        })
        .await
    }

    async fn delete(&self, request: &DeleteRequest) -> Result<Vec<Order>, Fault> {
        let mut found = Vec::new();
        for wanted in &request.backups {
            let (one, view) = self.find_backup(wanted).await?;
            backups::only(wanted, &one, &view)?;
            self.roots.usable(&one.path)?;
            found.push(one);
        }
        deletions::delete(found, request.last_copy)
    }

    async fn prune(&self, request: &PruneRequest) -> Result<Vec<Order>, Fault> {
        let view = self.catalogue.view().await?;
        deletions::prune(&view, request.domain.as_deref(), request.keep, self.config.limits.bandwidth)
    }

    async fn protect(&self, request: &ProtectRequest, on: bool, by: Actor) -> Result<BackupRow, Fault> {
        let (one, _) = self.whole_backup(&request.backup).await?;
        self.roots.usable(&one.path)?;
        let id = one.stored.manifest.backup;
        if on && request.until.is_some_and(|until| until <= Timestamp::now()) {
            return Err(orders::usage("the protection would have ended already", "Give an instant to come"));
        }
        match (request.dry_run, on) {
            (true, _) => {}
            (false, true) => self.catalogue.protect(&one.path, id, by, request.until).await?,
            (false, false) => drop(self.catalogue.unprotect(&one.path, id, by).await?),
        }
        Ok(self.backup(&id.to_string()).await?.backup)
    }

    async fn rebuild(&self, request: &RebuildRequest, by: Actor) -> Result<Report, Fault> {
        let from = request.from.as_deref().map(crate::location::path).transpose()?;
        self.catalogue.rebuild(from, request.dry_run, by).await
    }

    async fn forget(&self, request: &ForgetRequest, by: Actor) -> Result<(), Fault> {
        let id = backups::lost(&request.backup, &self.catalogue.view().await?)?;
        self.catalogue.forget(id, request.dry_run, by).await
    }

    async fn catalogue(&self) -> Result<Vec<Record>, Fault> {
        self.catalogue.history().await
    }

    async fn doctor(&self) -> Vec<Finding> {
        let mut findings = crate::doctor::examine(&self.config).await;
        findings.extend(match self.leftovers().await {
            Ok(found) => leftovers::findings(&found),
            Err(fault) => vec![leftovers::unknown(&fault)],
        });
        let keep = self.config.backup.checkpoints;
        findings.extend(checkpoints::findings(&self.libvirt, &self.vaults, keep).await);
        findings
    }

    async fn repair(&self) -> Result<Vec<Order>, Fault> {
        leftovers::orders(&self.leftovers().await?)
    }

    async fn before_job(&self, engine: &Engine) {
        self.facts.refresh(&self.libvirt, engine).await;
    }
}
