//! Requests translated into what the workflows are told.
//!
//! All defaults are filled in here, so that the journal of a job says what was in force when it was asked for, and not
//! what a configuration says today.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;
use vmkeep_steps::backup::{self, BackupOptions};
use vmkeep_steps::hypervisor::DomainRef;
use vmkeep_steps::image::name::encode;
use vmkeep_steps::restore::{self, RestoreOptions};
use vmkeep_steps::save::{self, ram_disk::UseRamDisk};
use vmkeep_steps::snapshot::freeze::FreezePolicy;
use vmkeep_steps::snapshot::memory::IfSlow;
use vmkeep_steps::workflows::snapshot::{self, MemoryOptions, Phase, SaveOptions, SnapshotOptions, Waits};
use vmkeep_workflow::{Fault, Subject, WorkflowName};

use super::Order;
use crate::api::types::{
    BackupRequest, OnBusyMemory, RamDisk, RestoreRequest, SnapshotRequest, WaitBefore, WithoutState,
};
use crate::codes;
use crate::config::Config;

/// The name of the limit that jobs count against that write below a root.
pub(super) fn limit_name(root: &Path) -> String {
    format!("root {}", root.display())
}

/// Refuses what makes no sense whatever the domain is, before anything is looked up.
pub(super) fn makes_sense(request: &SnapshotRequest) -> Result<(), Fault> {
    if request.memory && request.quiesce == Some(true) {
        return Err(usage(
            "--quiesce and memory exclude each other: a guest restored from frozen memory would be frozen",
            "Use --disk-only with --quiesce, or memory without",
        ));
    }
    if request.save && (request.memory || request.quiesce == Some(true)) {
        return Err(usage(
            "a guest that is saved is saved whole: --save excludes memory taken live, and freezing",
            "Use --save alone",
        ));
    }
    Ok(())
}

/// The order for a backup.
pub(super) fn snapshot(
    config: &Config,
    request: &SnapshotRequest,
    domain: &DomainRef,
) -> Result<Order, Fault> {
    let target = target(config, request.to.as_deref())?;
    let memory_time = request.memory_time_ms.map_or(config.limits.memory_time, Duration::from_millis);
    let options = SnapshotOptions {
        target: target.clone(),
        memory: request.memory.then(|| MemoryOptions {
            bytes: request.memory_limit.or(config.limits.memory),
            seconds: Some(whole_seconds(memory_time)),
            if_slow: match request.on_busy_memory {
                OnBusyMemory::Pause => IfSlow::Pause,
                OnBusyMemory::DiskOnly => IfSlow::DiskOnly,
                OnBusyMemory::Fail => IfSlow::Fail,
            },
        }),
        freeze: match request.quiesce {
            Some(true) => FreezePolicy::Required,
            Some(false) => FreezePolicy::Never,
            None => FreezePolicy::IfPossible,
        },
        disks: request.disks.clone(),
        bandwidth: request.bandwidth.unwrap_or(config.limits.bandwidth),
        merge_bandwidth: request.merge_bandwidth.unwrap_or(config.limits.merge_bandwidth),
        save: request.save.then(|| SaveOptions {
            ram_disk: config.snapshot.ram_disk.clone(),
            use_ram_disk: match request.ram_disk {
                RamDisk::Prefer => UseRamDisk::Prefer,
                RamDisk::Require => UseRamDisk::Require,
                RamDisk::Never => UseRamDisk::Never,
            },
            without_state: match request.without_state {
                WithoutState::Fail => save::WithoutState::Fail,
                WithoutState::DiskOnly => save::WithoutState::DiskOnly,
            },
        }),
        after_reboot: config.snapshot.after_reboot,
        waits: (!request.wait_before.is_empty()).then(|| Waits {
            before: request
                .wait_before
                .iter()
                .map(|phase| match phase {
                    WaitBefore::Retain => Phase::Retain,
                    WaitBefore::Merge => Phase::Merge,
                })
                .collect(),
            limit_ms: request.wait_limit_ms.unwrap_or(30 * 60_000),
        }),
        keep: request.keep.or(config.snapshot.keep).filter(|keep| *keep > 0),
    };
    Ok(Order {
        workflow: WorkflowName::from(snapshot::NAME),
        subject: Subject { id: domain.id.to_string(), label: domain.name.clone() },
        options: json(&options)?,
        limits: limits(config, &target),
    })
}

/// The order for a backup into a vault.
pub(super) fn back_up(config: &Config, request: &BackupRequest, domain: &DomainRef) -> Result<Order, Fault> {
    let vault = match (&request.vault, &config.backup.vault) {
        (Some(named), _) => named.clone(),
        (None, Some(usual)) => usual.to_string(),
        (None, None) => {
            return Err(usage(
                "no vault was named, and the configuration says of none that it is meant",
                "Name one: `--vault NAME`; or configure which is meant: `backup.vault`, or a single table [vaults.NAME]",
            ));
        }
    };
    let options = BackupOptions {
        vault: vault.clone(),
        kind: request.kind,
        freeze: match request.quiesce {
            Some(true) => FreezePolicy::Required,
            Some(false) => FreezePolicy::Never,
            None => FreezePolicy::IfPossible,
        },
        disks: request.disks.clone(),
        bandwidth: request.bandwidth.unwrap_or(config.limits.bandwidth),
        allow_plaintext: request.allow_plaintext,
    };
    Ok(Order {
        workflow: WorkflowName::from(backup::NAME),
        subject: Subject { id: domain.id.to_string(), label: domain.name.clone() },
        options: json(&options)?,
        limits: vec![vault_limit(&vault)],
    })
}

/// The name of the limit that jobs count against that write into a vault.
pub(super) fn vault_limit(vault: &str) -> String {
    format!("vault {vault}")
}

/// A limit in whole seconds: a part of one counts as one, and none stays none.
fn whole_seconds(span: Duration) -> u64 {
    span.as_secs() + u64::from(span.subsec_nanos() > 0)
}

/// The order for a restore. Its subject is the new domain.
pub(super) fn restore(
    config: &Config,
    request: &RestoreRequest,
    (backup, outside): (&Path, bool),
    key: Option<&str>,
) -> Result<Order, Fault> {
    let (folder, disks) = places(config, request)?;
    let options = RestoreOptions {
        backup: backup.to_owned(),
        outside,
        trusted: request.trust_definition,
        name: request.name.clone(),
        folder: Some(folder.clone()),
        disks,
        cold: request.cold,
        then: super::exchange::then(request.start),
        connect: request.connect,
        autostart: request.autostart,
        bandwidth: request.bandwidth.unwrap_or(config.limits.bandwidth),
    };
    Ok(Order {
        workflow: WorkflowName::from(restore::workflow::NAME),
        subject: Subject { id: new_uuid(key).to_string(), label: request.name.clone() },
        options: json(&options)?,
        limits: limits(config, &folder),
    })
}

/// Where the disks of a new domain go: all of them, and single ones.
pub(super) fn places(
    config: &Config,
    request: &RestoreRequest,
) -> Result<(PathBuf, BTreeMap<String, PathBuf>), Fault> {
    if request.name.is_empty() {
        return Err(usage("the new domain needs a name", "Give one with --as"));
    }
    // A folder of its own for each restored domain: two restores never meet.
    let folder = match &request.folder {
        Some(folder) => clean(folder)?,
        None => config.restore_dir.join(encode(&request.name)),
    };
    let disks = request.disks.iter().map(|(target, path)| Ok((target.clone(), clean(path)?)));
    Ok((folder, disks.collect::<Result<_, Fault>>()?))
}

/// The folders that a restore writes to, of whatever kind it is.
pub(super) fn restore_targets(order: &Order) -> Result<Vec<PathBuf>, Fault> {
    #[derive(Deserialize)]
    struct Targets {
        folder: Option<PathBuf>,
        #[serde(default)]
        disks: BTreeMap<String, PathBuf>,
    }
    let options = Targets::deserialize(&order.options)
        .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "read the options back", "", e))?;
    Ok(options.folder.into_iter().chain(options.disks.into_values()).collect())
}

/// A UUID for a new domain: at random, or, for a request with a key, always the same.
pub(super) fn new_uuid(key: Option<&str>) -> Uuid {
    let Some(key) = key else { return Uuid::new_v4() };
    let digest =
        blake3::derive_key("vmkeep restore: UUID of the new domain from the request's key", key.as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// The limits that a job counts against that writes there.
pub(super) fn limits(config: &Config, target: &Path) -> Vec<String> {
    // The deepest root is the one that the target belongs to.
    let root =
        config.roots.iter().filter(|root| target.starts_with(root)).max_by_key(|root| root.as_os_str().len());
    root.map(|root| limit_name(root)).into_iter().collect()
}

/// A place that somebody has named, without the slashes at its end that a completion leaves.
pub(super) fn clean(place: &Path) -> Result<PathBuf, Fault> {
    Ok(crate::location::path(place)?.components().collect())
}

/// The folder below which a backup goes.
pub(super) fn target(config: &Config, wanted: Option<&Path>) -> Result<PathBuf, Fault> {
    match (wanted, config.roots.first()) {
        (Some(path), _) => clean(path),
        (None, Some(root)) => Ok(root.clone()),
        (None, None) => Err(usage("no root is configured", "Name one in the configuration: targets.roots")),
    }
}

pub(super) fn json<T: serde::Serialize>(options: &T) -> Result<Value, Fault> {
    serde_json::to_value(options)
        .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "write the options down", "", e))
}

pub(super) fn usage(cause: &str, remedy: &str) -> Fault {
    Fault::permanent(codes::USAGE, "understand the request", "", cause).remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Limits, Log, SnapshotDefaults};

    fn config() -> Config {
        Config {
            state_dir: "/s".into(),
            socket: "/s/x".into(),
            connect: "test:///default".into(),
            roots: vec!["/b".into(), "/b/deep".into(), "/s/restored".into()],
            restore_dir: "/s/restored".into(),
            engine: vmkeep_store::EngineName::default(),
            history: vmkeep_store::burial::Policy::default(),
            limits: Limits { bandwidth: 77, ..Limits::default() },
            snapshot: SnapshotDefaults { keep: Some(5), ..SnapshotDefaults::default() },
            restore: vmkeep_steps::restore::RightsSettings::default(),
            backup: Default::default(),
            vaults: Default::default(),
            log: Log::default(),
            file: None,
        }
    }

    fn domain() -> DomainRef {
        DomainRef { id: vmkeep_steps::hypervisor::DomainId(Uuid::from_u128(5)), name: "web".to_owned() }
    }

    #[test]
    fn a_backups_order_says_what_is_in_force_now() {
        let request =
            SnapshotRequest { domain: "web".to_owned(), memory: true, ..SnapshotRequest::default() };
        let order = snapshot(&config(), &request, &domain()).unwrap();
        let options = SnapshotOptions::deserialize(&order.options).unwrap();
        assert_eq!((options.target.to_str(), options.bandwidth), (Some("/b"), 77));
        assert_eq!(options.memory.unwrap().seconds, Some(600));
        assert_eq!(options.keep, Some(5));
        for (asked, seconds) in [(0, 0), (1, 1), (1500, 2), (60_000, 60)] {
            let limited = SnapshotRequest { memory_time_ms: Some(asked), ..request.clone() };
            let order = snapshot(&config(), &limited, &domain()).unwrap();
            let options = SnapshotOptions::deserialize(&order.options).unwrap();
            assert_eq!(options.memory.unwrap().seconds, Some(seconds), "{asked} ms");
        }
        let all = SnapshotRequest { keep: Some(0), ..request.clone() };
        let all = snapshot(&config(), &all, &domain()).unwrap();
        assert_eq!(SnapshotOptions::deserialize(&all.options).unwrap().keep, None, "0 keeps all");
        assert_eq!(order.subject.id, Uuid::from_u128(5).to_string());
        assert_eq!(order.limits, ["root /b"]);
        let deep = SnapshotRequest { to: Some("/b/deep/er/".into()), ..request };
        assert_eq!(snapshot(&config(), &deep, &domain()).unwrap().limits, ["root /b/deep"]);
    }

    #[test]
    fn memory_and_a_freeze_are_never_combined() {
        let request = SnapshotRequest { memory: true, quiesce: Some(true), ..SnapshotRequest::default() };
        assert_eq!(makes_sense(&request).unwrap_err().code, codes::USAGE);
        let request = SnapshotRequest { memory: false, ..request };
        makes_sense(&request).unwrap();
        let order = snapshot(&config(), &request, &domain()).unwrap();
        assert_eq!(SnapshotOptions::deserialize(&order.options).unwrap().freeze, FreezePolicy::Required);
    }

    #[test]
    fn restored_domains_get_folders_of_their_own_whatever_they_are_called() {
        let of = |name: &str| {
            let request = RestoreRequest { name: name.to_owned(), ..RestoreRequest::default() };
            let order = restore(&config(), &request, (Path::new("/b/x"), false), None).unwrap();
            restore_targets(&order).unwrap().remove(0)
        };
        assert_eq!(of("web"), Path::new("/s/restored/web"));
        assert_eq!(of("../../etc").parent(), Some(Path::new("/s/restored")));
        assert_ne!(of("a/b"), of("a b"));
        let nameless = RestoreRequest::default();
        assert_eq!(
            restore(&config(), &nameless, (Path::new("/b/x"), false), None).unwrap_err().code,
            codes::USAGE
        );
    }

    #[test]
    fn a_repeated_restore_with_its_key_means_the_same_domain_and_without_one_another() {
        let request = RestoreRequest { name: "new".to_owned(), ..RestoreRequest::default() };
        let id = |key| restore(&config(), &request, (Path::new("/b/x"), false), key).unwrap().subject.id;
        assert_eq!(id(Some("k")), id(Some("k")));
        assert_ne!(id(Some("k")), id(Some("l")));
        assert_ne!(id(None), id(None));
    }
}
