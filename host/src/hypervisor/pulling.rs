//! Pull-mode backup jobs: libvirt's calls, and QEMU's own answer to what is left of one.
//!
//! libvirt's job and QEMU's are told apart by looking at both. libvirtd that dies in the middle of beginning a job leaves
//! block jobs in QEMU that no call of libvirt's ends any more; those are ended through the monitor, after libvirt was asked.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use vmkeep_libvirt::ErrorCode;
use vmkeep_libvirt::flags::{BackupBeginFlags, CheckpointDeleteFlags, XmlFlags};
use vmkeep_libvirt::uri::Scope;
use vmkeep_libvirt::xml::{BackupDisk, BackupMode, BackupPart, BackupXml, CheckpointXml, DomainXml};
use vmkeep_steps::hypervisor::{DomainId, EXPORT_BITMAP, HvError, HvResult, Pull, Pulling, Trouble};

use super::definition::{broken, path_text};
use super::{Libvirt, folders};

/// How long a block job that was told to end is watched, and how often.
const GONE_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(50);

impl Libvirt {
    /// libvirt makes a folder for each running domain, named after its number, which QEMU may write to.
    pub(super) async fn folder_of_sockets(&self, domain: &DomainId) -> HvResult<PathBuf> {
        let number = self.glance(domain, "number", |d| Ok(d.id())).await?;
        let Some(number) = number else {
            return Err(HvError::new(Trouble::NotRunning, "the domain does not run"));
        };
        let system = match self.client.uri().scope() {
            Scope::Session => rustix::process::geteuid().is_root(),
            _ => true,
        };
        let base = if system {
            PathBuf::from("/var/lib/libvirt/qemu")
        } else {
            // The session's lies where its definitions do.
            let daemon = match self.client.status() {
                vmkeep_libvirt::Status::Connected { instance, .. } => instance.map(|d| d.process.pid),
                vmkeep_libvirt::Status::Disconnected { .. } => None,
            };
            folders::definitions(self.client.uri(), daemon)?.join("lib")
        };
        let prefix = format!("domain-{number}-");
        let found = std::fs::read_dir(&base).map(|entries| {
            let named = |entry: &std::fs::DirEntry| {
                entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix))
            };
            entries.flatten().find(named).map(|entry| entry.path())
        });
        match found {
            Ok(Some(folder)) => Ok(folder),
            Ok(None) => {
                let what = format!("{} has no folder {prefix}…", base.display());
                Err(HvError::new(Trouble::Missing, what))
            }
            Err(e) => {
                Err(HvError::new(Trouble::Missing, format!("{} cannot be listed: {e}", base.display())))
            }
        }
    }

    pub(super) async fn begin_pull(&self, domain: &DomainId, pull: Pull) -> HvResult<()> {
        let socket = path_text(&pull.socket)?.to_owned();
        let mut parts = Vec::with_capacity(pull.disks.len());
        for disk in &pull.disks {
            let part = BackupPart {
                file: path_text(&disk.scratch)?.to_owned(),
                format: Some("qcow2".to_owned()),
                incremental: Some(disk.since.clone()),
                export: Some(disk.target.0.clone()),
                export_bitmap: disk.since.is_some().then(|| EXPORT_BITMAP.to_owned()),
            };
            parts.push((disk.target.0.clone(), part, disk.bitmap));
        }
        let begun = self
            .change(domain, "begin a backup", move |d| {
                let Ok(live) = DomainXml::parse(&d.xml(XmlFlags::NONE)?) else {
                    return Ok(Err("the live definition is unreadable"));
                };
                // Every disk is named: libvirt takes those that are not along.
                let targets: Vec<String> = live.disks().into_iter().map(|disk| disk.target).collect();
                if parts.iter().any(|(target, ..)| !targets.contains(target)) {
                    return Ok(Err("a disk is gone"));
                }
                let find = |target: &String| parts.iter().find(|(name, ..)| name == target);
                let disks = targets.iter().map(|target| BackupDisk {
                    target: target.clone(),
                    part: find(target).map(|(_, part, _)| part.clone()),
                });
                let mode = BackupMode::Pull { socket: socket.clone() };
                let job = BackupXml { mode, incremental: None, disks: disks.collect() };
                let takes_part = |target: &String| find(target).is_some_and(|(.., bitmap)| *bitmap);
                let checkpoint = pull.checkpoint.as_ref().map(|name| CheckpointXml {
                    name: name.clone(),
                    description: None,
                    disks: targets.iter().map(|target| (target.clone(), takes_part(target))).collect(),
                });
                let (Ok(job), Ok(checkpoint)) = (job.to_xml(), checkpoint.map(|c| c.to_xml()).transpose())
                else {
                    return Ok(Err("a name cannot stand in XML"));
                };
                d.backup_begin(&job, checkpoint.as_deref(), BackupBeginFlags::NONE).map(Ok)
            })
            .await;
        match begun {
            Ok(begun) => begun.map_err(|why| HvError::new(Trouble::Refused, why)),
            // What QEMU has begun by then goes on; only of a bitmap that will not do libvirt says so beforehand.
            Err(e) if e.trouble == Trouble::BitmapUnusable || e.trouble == Trouble::Busy => Err(e),
            Err(e) => Err(e.in_doubt()),
        }
    }

    pub(super) async fn look_at_pulls(&self, domain: &DomainId) -> HvResult<Pulling> {
        let seen = self
            .look_at(domain, "backup job", |d| {
                if !d.is_active()? {
                    return Ok(None);
                }
                Ok(Some((d.backup_xml()?, d.block_graph()?)))
            })
            .await;
        let (job, graph) = match seen {
            Ok(Some(seen)) => seen,
            Ok(None) => return Ok(Pulling::default()),
            Err(e) if e.trouble == Trouble::NotRunning => return Ok(Pulling::default()),
            Err(e) => return Err(e),
        };
        let scratch = job.map(|job| BackupXml::scratch_files(&job)).transpose().map_err(|e| broken(&e))?;
        let exports = match self.ask_monitor(domain, "query-block-exports").await {
            Err(e) if e.trouble == Trouble::NotRunning => return Ok(Pulling::default()),
            exports => exports?,
        };
        let jobs = graph.jobs.into_iter().filter(|job| job.kind == "backup").map(|job| job.id);
        Ok(Pulling {
            scratch: scratch.map(|files| files.into_iter().map(PathBuf::from).collect()),
            exports: ids(&exports),
            jobs: jobs.collect(),
        })
    }

    pub(super) async fn clean_after_pull(&self, domain: &DomainId, scratch: &[PathBuf]) -> HvResult<()> {
        let before = self.look_at_pulls(domain).await?;
        // Somebody else's is left alone, whatever of ours may be open beside it.
        if before.scratch.is_some() && !before.is_of(scratch.iter()) {
            return self.close_files(domain, scratch.to_vec()).await;
        }
        for job in &before.jobs {
            let cancel =
                json!({ "execute": "block-job-cancel", "arguments": { "device": job, "force": true } });
            forgiving(self.monitor(domain, "end a backup's block job", cancel).await)?;
        }
        let gone = async {
            loop {
                if self.look_at_pulls(domain).await?.jobs.is_empty() {
                    return Ok::<_, HvError>(());
                }
                // Those that have ended wait to be dismissed.
                for job in &before.jobs {
                    let dismiss = json!({ "execute": "job-dismiss", "arguments": { "id": job } });
                    let _ = self.monitor(domain, "dismiss a backup's block job", dismiss).await;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        match tokio::time::timeout(GONE_WITHIN, gone).await {
            Ok(gone) => gone?,
            Err(_) => {
                let what = "QEMU's block jobs of a backup do not come to their end";
                return Err(HvError::new(Trouble::TimedOut, what).in_doubt());
            }
        }
        for export in &before.exports {
            let delete =
                json!({ "execute": "block-export-del", "arguments": { "id": export, "mode": "hard" } });
            forgiving(self.monitor(domain, "end an export", delete).await)?;
        }
        if !before.exports.is_empty() || !before.jobs.is_empty() {
            forgiving(
                self.monitor(domain, "end the NBD server", json!({ "execute": "nbd-server-stop" })).await,
            )?;
        }
        self.close_files(domain, scratch.to_vec()).await
    }

    pub(super) async fn remove_checkpoint(&self, domain: &DomainId, name: &str) -> HvResult<()> {
        let name = name.to_owned();
        self.change(domain, "delete a checkpoint", move |d| {
            let checkpoint = match d.checkpoint(&name) {
                Ok(checkpoint) => checkpoint,
                Err(e) if e.code == ErrorCode::NoDomainCheckpoint => return Ok(()),
                Err(e) => return Err(e),
            };
            // libvirt refuses when one disk lacks the bitmap: it was never written, or is gone with its image.
            let deleted = checkpoint.delete(CheckpointDeleteFlags::NONE);
            match deleted {
                Err(e) if e.message.contains("bitmap") || e.message.contains("not found") => {
                    checkpoint.delete(CheckpointDeleteFlags::METADATA_ONLY)
                }
                other => other,
            }
        })
        .await
    }
}

/// What is not there (any more) need not be ended.
fn forgiving(answer: HvResult<Value>) -> HvResult<()> {
    match answer {
        Err(e) if ["not found", "not exist", "not running"].iter().any(|text| e.message.contains(text)) => {
            Ok(())
        }
        Err(e) if e.trouble == Trouble::NotRunning => Ok(()),
        other => other.map(drop),
    }
}

fn ids(exports: &Value) -> Vec<String> {
    let id = |export: &Value| export["id"].as_str().map(str::to_owned);
    exports.as_array().into_iter().flatten().filter_map(id).collect()
}
