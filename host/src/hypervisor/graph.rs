//! QEMU's own answer, and the few commands that go to its monitor.
//!
//! The monitor is used for changes only where libvirt's own call would do nothing: after a crash of libvirtd its live
//! definition can name the base while QEMU writes to the overlay, and then no block job of libvirt's is possible.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmkeep_libvirt::Domain;
use vmkeep_libvirt::flags::XmlFlags;
use vmkeep_libvirt::qemu::{self as q, BlockGraph, BlockJobPhase};
use vmkeep_libvirt::xml::DomainXml;
use vmkeep_steps::hypervisor::{
    BlockJob, BlockJobKind, Commit, DomainId, HvError, HvResult, Layer, Qemu, QemuDisk, Target, Trouble,
};
use vmkeep_steps::image::device;

use super::{Libvirt, calls, definition};

/// How a commit through the monitor is called.
const OURS: &str = "vmkeep-commit-";
/// How long a job that was told to complete is watched, and how often.
const COMPLETE_WITHIN: Duration = Duration::from_secs(60);
const COMPLETE_EVERY: Duration = Duration::from_millis(20);

impl Libvirt {
    pub(super) async fn ask_qemu(&self, domain: &DomainId) -> HvResult<Option<Qemu>> {
        let seen = self
            .look_at(domain, "ask QEMU", |d| {
                if !d.is_active()? {
                    return Ok(None);
                }
                let Some(process) = d.qemu_process()? else { return Ok(None) };
                let live = d.xml(XmlFlags::NONE)?;
                Ok(Some((calls::instance_name(&process), live, d.block_graph()?)))
            })
            .await;
        match seen {
            Ok(None) => Ok(None),
            Ok(Some((instance, live, graph))) => {
                let live = DomainXml::parse(&live).map_err(|e| definition::broken(&e))?;
                Ok(Some(read(instance, &live, &graph)))
            }
            // It ended while it was asked.
            Err(e) if e.trouble == Trouble::NotRunning => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sends a command to QEMU's monitor and gives its answer.
    pub(super) async fn monitor(&self, domain: &DomainId, what: &str, command: Value) -> HvResult<Value> {
        let text = self.urgent(domain, what, move |d| d.qmp_raw(&command.to_string())).await?;
        answer(&text, what)
    }

    /// Asks QEMU's monitor.
    pub(super) async fn ask_monitor(&self, domain: &DomainId, command: &'static str) -> HvResult<Value> {
        let text = self
            .look_at(domain, command, move |d| d.qmp_raw(&json!({ "execute": command }).to_string()))
            .await?;
        answer(&text, command)
    }

    pub(super) async fn begin_commit_by_monitor(&self, domain: &DomainId, commit: &Commit) -> HvResult<()> {
        let (target, overlay, base) = (commit.target.clone(), commit.overlay.clone(), commit.base.clone());
        let nodes = self.look_at(domain, "nodes", move |d| nodes(d, &target, &overlay, &base)).await?;
        let (top, base) = nodes.ok_or_else(|| {
            HvError::new(
                Trouble::Refused,
                format!(
                    "QEMU does not have {} on top of {}",
                    commit.overlay.display(),
                    commit.base.display()
                ),
            )
        })?;
        let command = json!({ "execute": "block-commit", "arguments": {
            "job-id": format!("{OURS}{}", commit.target), "device": top, "base-node": base,
            "speed": commit.bandwidth, "auto-finalize": true, "auto-dismiss": false,
        }});
        self.monitor(domain, "begin the commit in QEMU", command).await.map(drop)
    }

    pub(super) async fn pivot_by_monitor(&self, domain: &DomainId, commit: &Commit) -> HvResult<()> {
        let id = format!("{OURS}{}", commit.target);
        self.monitor(
            domain,
            "pivot in QEMU",
            json!({ "execute": "job-complete", "arguments": { "id": id } }),
        )
        .await?;
        self.conclude(domain, &id).await?;
        // libvirt's live definition becomes true by this: it names the base and knows no overlay.
        self.close_files(domain, vec![commit.overlay.clone()]).await
    }

    pub(super) async fn abort_by_monitor(&self, domain: &DomainId, commit: &Commit) -> HvResult<()> {
        let id = format!("{OURS}{}", commit.target);
        let jobs = self.ask_monitor(domain, "query-jobs").await?;
        let Some(job) = find_job(&jobs, &id) else { return Ok(()) };
        if job["status"] != "concluded" {
            let cancel =
                json!({ "execute": "block-job-cancel", "arguments": { "device": id, "force": true } });
            self.monitor(domain, "give the commit in QEMU up", cancel).await?;
        }
        match self.conclude(domain, &id).await {
            // A job that was cancelled, or that had failed, ends with an error: that is its end.
            Err(e) if e.trouble == Trouble::Cancelled => Ok(()),
            other => other,
        }
    }

    /// Waits for a job of ours to be over, and dismisses it. [`Trouble::Cancelled`] if it ended with an error.
    async fn conclude(&self, domain: &DomainId, id: &str) -> HvResult<()> {
        let watching = async {
            loop {
                let jobs = self.ask_monitor(domain, "query-jobs").await?;
                let Some(job) = find_job(&jobs, id) else { return Ok(Value::Null) };
                if job["status"] == "concluded" {
                    return Ok::<_, HvError>(job["error"].clone());
                }
                tokio::time::sleep(COMPLETE_EVERY).await;
            }
        };
        let error = tokio::time::timeout(COMPLETE_WITHIN, watching).await.unwrap_or_else(|_| {
            Err(HvError::new(Trouble::TimedOut, format!("QEMU's job {id} does not come to its end"))
                .in_doubt())
        })?;
        let dismiss = json!({ "execute": "job-dismiss", "arguments": { "id": id } });
        match self.monitor(domain, "dismiss the commit in QEMU", dismiss).await {
            Err(e) if e.message.contains("not found") => {}
            other => drop(other?),
        }
        match error {
            Value::String(why) => Err(HvError::new(Trouble::Cancelled, why)),
            _ => Ok(()),
        }
    }

    pub(super) async fn close_files(&self, domain: &DomainId, files: Vec<PathBuf>) -> HvResult<()> {
        let graph = match self.look_at(domain, "ask QEMU", |d| d.block_graph()).await {
            Err(e) if e.trouble == Trouble::NotRunning => return Ok(()),
            other => other?,
        };
        let in_use = |file: &Path| {
            let is = |name: &String| Path::new(name) == file;
            graph.disks.iter().any(|disk| disk.chain.iter().any(|image| image.file.as_ref().is_some_and(is)))
                || graph.jobs.iter().any(|job| job.files.iter().any(is))
        };
        let wanted: Vec<&PathBuf> = files.iter().filter(|file| !in_use(file)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let all = self.ask_monitor(domain, "query-named-block-nodes").await?;
        for file in wanted {
            for node in nodes_of(&all, file) {
                let delete = json!({ "execute": "blockdev-del", "arguments": { "node-name": node } });
                match self.monitor(domain, "close a file in QEMU", delete).await {
                    // Gone already, or QEMU's own and gone with the node above it.
                    Err(e)
                        if e.message.contains("Failed to find node")
                            || e.message.contains("not owned by") => {}
                    other => drop(other?),
                }
            }
        }
        Ok(())
    }
}

/// QEMU's answer without its envelope.
fn answer(text: &str, what: &str) -> HvResult<Value> {
    let mut answer: Value = serde_json::from_str(text).map_err(|e| {
        HvError::new(Trouble::Refused, format!("QEMU's answer to \"{what}\" is unreadable: {e}"))
    })?;
    if let Some(why) = answer["error"]["desc"].as_str() {
        let locked = why.contains("Failed to get \"write\" lock") || why.contains("Is another process using");
        let trouble = if locked { Trouble::Locked } else { Trouble::Refused };
        return Err(HvError::new(trouble, format!("QEMU refused \"{what}\": {why}")));
    }
    Ok(answer["return"].take())
}

fn find_job<'a>(jobs: &'a Value, id: &str) -> Option<&'a Value> {
    jobs.as_array()?.iter().find(|job| job["id"] == id)
}

/// The nodes of an overlay on top of a disk and of the base right below it.
fn nodes(
    d: &Domain,
    target: &Target,
    overlay: &Path,
    base: &Path,
) -> vmkeep_libvirt::Result<Option<(String, String)>> {
    let live = d.xml(XmlFlags::NONE)?;
    let graph = d.block_graph()?;
    let Ok(live) = DomainXml::parse(&live) else { return Ok(None) };
    let Some(disk) = graph.disk(&live, &target.0) else { return Ok(None) };
    let [top, below, ..] = disk.chain.as_slice() else { return Ok(None) };
    let is = |image: &q::ImageNode, path: &Path| {
        image.file.as_deref().is_some_and(|file| device::same(Path::new(file), path))
    };
    if !is(top, overlay) || !is(below, base) {
        return Ok(None);
    }
    Ok(top.node.clone().zip(below.node.clone()))
}

/// The nodes that have a file open, those above first, which is the order in which they can be deleted.
pub(super) fn nodes_of(all: &Value, file: &Path) -> Vec<String> {
    let mut found: Vec<(bool, String)> = all
        .as_array()
        .into_iter()
        .flatten()
        .filter(|node| node["file"].as_str().is_some_and(|name| names_file(name, file)))
        .filter_map(|node| {
            let protocol = matches!(node["drv"].as_str(), Some("file" | "host_device"));
            Some((protocol, node["node-name"].as_str()?.to_owned()))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, name)| name).collect()
}

/// Whether a node's file name means a file. QEMU makes names up (`json:{…}`) as soon as an option was overridden.
fn names_file(name: &str, file: &Path) -> bool {
    if Path::new(name) == file {
        return true;
    }
    let Some(made_up) = name.strip_prefix("json:") else { return false };
    let Ok(made_up) = serde_json::from_str::<Value>(made_up) else { return false };
    // The image's own file, never that of its backing image.
    [&made_up["file"]["filename"], &made_up["filename"], &made_up["file.filename"]]
        .into_iter()
        .any(|name| name.as_str().map(Path::new) == Some(file))
}

fn read(instance: String, live: &DomainXml, graph: &BlockGraph) -> Qemu {
    let mut disks = Vec::new();
    for disk in live.disks() {
        let Some(found) = graph.disk(live, &disk.target) else { continue };
        if found.chain.is_empty() {
            continue;
        }
        disks.push(QemuDisk {
            target: Target(disk.target),
            read_only: found.chain.first().is_some_and(|top| top.read_only),
            chain: found
                .chain
                .iter()
                .map(|image| Layer {
                    path: image.file.clone().unwrap_or_default().into(),
                    format: image.driver.clone(),
                })
                .collect(),
        });
    }
    let jobs = graph.jobs.iter().map(|job| block_job(job, &disks)).collect();
    Qemu { instance, disks, jobs, open: graph.files.iter().map(PathBuf::from).collect() }
}

fn block_job(job: &q::BlockJob, disks: &[QemuDisk]) -> BlockJob {
    let over = job.phase == BlockJobPhase::Concluded;
    BlockJob {
        id: job.id.clone(),
        target: target_of(job, disks),
        kind: if job.kind == "commit" { BlockJobKind::Commit } else { BlockJobKind::Other },
        ready: job.ready && !over,
        done: job.offset,
        total: job.len,
        error: match (&job.error, job.io_status.as_deref()) {
            (Some(error), _) => Some(error.clone()),
            (None, Some("nospace")) => Some("no space left".to_owned()),
            (None, Some("failed")) => Some("an input/output error".to_owned()),
            (None, _) => None,
        },
    }
}

/// The disk that a job works on: by its name if it was given by libvirt or by us, else by its files.
fn target_of(job: &q::BlockJob, disks: &[QemuDisk]) -> Option<Target> {
    let named = job.id.strip_prefix(OURS).map(str::to_owned).or_else(|| {
        // `commit-vda-libvirt-5-format`, newer also `commit-vda[0]-…`.
        let (_, rest) = job.id.split_once('-')?;
        let (target, _) = rest.split_once("-libvirt-")?;
        Some(target.split('[').next().unwrap_or(target).to_owned())
    });
    if let Some(target) = named.filter(|name| disks.iter().any(|disk| disk.target.0 == *name)) {
        return Some(Target(target));
    }
    let mut hits = disks.iter().filter(|disk| {
        disk.chain.iter().any(|layer| job.files.iter().any(|file| Path::new(file) == layer.path))
    });
    match (hits.next(), hits.next()) {
        (Some(disk), None) => Some(disk.target.clone()),
        // Disks that share a base: the files alone do not tell.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str, files: &[&str]) -> q::BlockJob {
        q::BlockJob {
            id: id.to_owned(),
            kind: "commit".to_owned(),
            phase: BlockJobPhase::Running,
            ready: false,
            offset: 0,
            len: 0,
            speed: 0,
            io_status: None,
            error: None,
            files: files.iter().map(|f| (*f).to_owned()).collect(),
        }
    }

    fn disk(target: &str, chain: &[&str]) -> QemuDisk {
        let layer = |path: &&str| Layer { path: path.into(), format: "qcow2".to_owned() };
        QemuDisk { target: target.into(), chain: chain.iter().map(layer).collect(), read_only: false }
    }

    #[test]
    fn a_jobs_disk_is_known_by_name_and_else_only_by_files_that_leave_no_doubt() {
        let disks = [disk("vda", &["/o1", "/template"]), disk("vdb", &["/o2", "/template"])];
        let target = |id: &str, files: &[&str]| target_of(&job(id, files), &disks).map(|t| t.0);
        assert_eq!(target("commit-vdb-libvirt-5-format", &[]).as_deref(), Some("vdb"));
        assert_eq!(target("vmkeep-commit-vda", &[]).as_deref(), Some("vda"));
        assert_eq!(target("drive0", &["/o2"]).as_deref(), Some("vdb"));
        assert_eq!(target("drive0", &["/template"]), None);
        assert_eq!(target("commit-vdz-libvirt-1-format", &["/o1"]).as_deref(), Some("vda"));
    }

    #[test]
    fn a_file_is_found_behind_a_made_up_name_and_its_overlay_is_not_taken_for_it() {
        let made_up = r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/a b"}, "backing": {"driver": "raw", "file": {"driver": "file", "filename": "/base"}}}"#;
        assert!(names_file(made_up, Path::new("/a b")));
        assert!(!names_file(made_up, Path::new("/base")));
        assert!(names_file("/base", Path::new("/base")));
        assert!(!names_file("json:not json", Path::new("/base")));
    }

    #[test]
    fn format_nodes_are_deleted_before_the_protocol_nodes_below_them() {
        let all = json!([
            { "node-name": "libvirt-3-storage", "drv": "file", "file": "/o" },
            { "node-name": "libvirt-3-format", "drv": "qcow2", "file": "/o" },
            { "node-name": "libvirt-1-format", "drv": "qcow2", "file": "/b" },
        ]);
        assert_eq!(nodes_of(&all, Path::new("/o")), ["libvirt-3-format", "libvirt-3-storage"]);
    }

    #[test]
    fn qemus_refusal_of_a_held_image_is_told_apart() {
        let text = r#"{"error":{"class":"GenericError","desc":"Failed to get \"write\" lock"}}"#;
        assert_eq!(answer(text, "x").unwrap_err().trouble, Trouble::Locked);
        assert_eq!(answer(r#"{"return":{}}"#, "x"), Ok(json!({})));
    }
}
