//! The host that the daemon runs on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;
use vmkeep_steps::hypervisor::{DomainRef, Hypervisor, Trouble};
use vmkeep_steps::inplace::{InPlaceSettings, KeptMachine, RestoreInPlace};
use vmkeep_steps::restore::{Restore, RestoreSettings};
use vmkeep_steps::snapshot::{Places, World};
use vmkeep_steps::workflows::snapshot::{Settings, Snapshot};
use vmkeep_workflow::engine::Limits;
use vmkeep_workflow::{Engine, Fault, Registry, Subject};

use super::backups::Backup;
use super::{OpenRoots, Order, Site, backups, domains, exchange, orders};
use crate::api::types::{
    BackupDetail, BackupRow, DiscardRequest, DomainRow, ErrorBody, Finding, InPlaceRequest, KeptRow,
    LibvirtStatus, RestoreRequest, SnapshotRequest, UndoRequest,
};
use crate::codes;
use crate::config::Config;
use crate::environment::Facts;
use crate::genuine::{self, Journal};
use crate::hypervisor::Libvirt;

/// The step kinds and workflows of this release, at work on this world.
#[must_use]
pub fn registry(world: &World, store: Uuid, roots: &OpenRoots, restored: &Path) -> Registry {
    let places = Places { roots: roots.roots.clone() };
    let settings = Settings::new(store.to_string(), concat!("vmkeep ", env!("CARGO_PKG_VERSION")));
    let registry = Registry::new()
        .workflow(crate::verify::Verify)
        .step(crate::verify::VerifyBackup { roots: roots.roots.clone() });
    let registry = Snapshot::new(world.clone(), places.clone(), settings).register(registry);
    let restore = RestoreSettings::default();
    let registry = Restore::new(world.clone(), places.clone(), restore).register(registry);
    let settings = InPlaceSettings { store: store.to_string(), restored: restored.to_owned(), restore };
    RestoreInPlace::new(world.clone(), places, settings).register(registry)
}

/// How many jobs may run at once: in all, and per root that they write to.
#[must_use]
pub fn limits(config: &Config) -> Limits {
    let named: BTreeMap<String, usize> =
        config.roots.iter().map(|root| (orders::limit_name(root), config.limits.jobs_per_root)).collect();
    Limits { running: config.limits.jobs, named }
}

/// How long a look at the host waits for libvirt to say its version.
const VERSIONS: Duration = Duration::from_secs(2);

/// This host.
#[derive(Clone, Debug)]
pub struct Host {
    config: Config,
    libvirt: Libvirt,
    roots: OpenRoots,
    facts: Facts,
    engine: Engine,
}

impl Host {
    /// A host with that configuration, hypervisor, roots and engine.
    #[must_use]
    pub fn new(config: Config, libvirt: Libvirt, roots: OpenRoots, facts: Facts, engine: Engine) -> Self {
        Self { config, libvirt, roots, facts, engine }
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
        let (backup, from) = (backup.to_owned(), from.map(Path::to_owned));
        let one = self.blocking(move |roots| backups::wanted(&backup, from.as_deref(), roots)).await?;
        self.roots.usable(&one.path)?;
        Ok(one)
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
        Ok(seen.iter().map(domains::row).collect())
    }

    async fn snapshot(&self, request: &SnapshotRequest) -> Result<Order, Fault> {
        orders::makes_sense(request)?;
        let domain = self.find(&request.domain).await?;
        let order = orders::snapshot(&self.config, request, &domain)?;
        if let Some(target) = request.to.as_ref().or(self.config.roots.first()) {
            self.roots.usable(target)?;
        }
        Ok(order)
    }

    async fn restore(&self, request: &RestoreRequest, key: Option<&str>) -> Result<Order, Fault> {
        let one = self.wanted(&request.backup, request.from.as_deref()).await?;
        let order = orders::restore(&self.config, request, (&one.path, one.outside), key)?;
        for target in orders::restore_targets(&order)? {
            self.roots.usable(&target)?;
        }
        Ok(order)
    }

    async fn in_place(&self, request: &InPlaceRequest) -> Result<Order, Fault> {
        let one = self.wanted(&request.backup, request.from.as_deref()).await?;
        self.roots.usable(&self.config.restore_dir)?;
        if let Some(folder) = &request.folder {
            self.roots.usable(folder)?;
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
        let wanted = backup.to_owned();
        let one = self.blocking(move |roots| backups::find(&wanted, roots)).await?;
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

    async fn backups(&self) -> Result<(Vec<BackupRow>, Vec<String>), Fault> {
        self.blocking(|roots| {
            let (found, warnings) = backups::all(roots)?;
            Ok((backups::rows(&found), warnings))
        })
        .await
    }

    async fn backup(&self, backup: &str) -> Result<BackupDetail, Fault> {
        let wanted = backup.to_owned();
        let (one, mut detail) = self
            .blocking(move |roots| {
                let one = backups::find(&wanted, roots)?;
                let (all, _) = backups::all(roots)?;
                let ids: Vec<_> = all.iter().map(|one| one.stored.manifest.backup).collect();
                let mut detail = backups::detail(&one, &ids)?;
                let folder = backups::open(&one.path, roots)?;
                detail.problems = genuine::against_definitions(&folder, &one.stored);
                Ok((one, detail))
            })
            .await?;
        let journal = Journal::of(&self.engine, &one.stored.manifest).await;
        detail.problems.extend(journal.objects(&one.stored));
        detail.notes.extend(journal.note());
        Ok(detail)
    }

    async fn doctor(&self) -> Vec<Finding> {
        crate::doctor::examine(&self.config).await
    }

    async fn before_job(&self, engine: &Engine) {
        self.facts.refresh(&self.libvirt, engine).await;
    }
}
