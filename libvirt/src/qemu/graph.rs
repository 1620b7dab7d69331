//! QEMU's block graph, as chains of images.
//!
//! Invariants:
//! - a chain is what QEMU reads and writes now, top first; nodes that QEMU inserts for its jobs
//!   (filters) are not images and are listed apart;
//! - an answer is one moment's: QEMU has no single command for it, so the graph is read before and
//!   after the rest, and if it changed meanwhile all is read again.
//!
//! The file of an image is that of its protocol node, where QEMU really has it open. The names QEMU
//! gives to format nodes are made up as soon as an option was overridden (`json:{…}`), and what an
//! image's header says about its backing file may be ignored: neither is proof.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::wire::{Drive, Graph, Image, Job, MigrationStatus, NamedNode, RunStatus};
use crate::domain::Domain;
use crate::error::{Error, ErrorCode, Result};
use crate::monitor::QmpQuery;
use crate::xml::DomainXml;

/// A dirty bitmap, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyBitmap {
    /// Its name; jobs use nameless ones.
    pub name: Option<String>,
    /// Whether it records now.
    #[serde(default)]
    pub recording: bool,
    /// Whether it is stored in the image when QEMU ends.
    #[serde(default)]
    pub persistent: bool,
    /// Whether it was not closed properly, and can only be deleted.
    #[serde(default)]
    pub inconsistent: bool,
    /// Whether a job uses it.
    #[serde(default)]
    pub busy: bool,
    /// Bytes per bit.
    #[serde(default)]
    pub granularity: u64,
    /// Dirty bytes.
    #[serde(default)]
    pub count: u64,
}

/// An image that QEMU has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageNode {
    /// QEMU's name of the node; unknown only where an old QEMU does not tell.
    pub node: Option<String>,
    /// The file, device or URL behind it.
    pub file: Option<String>,
    /// A second file with the data, beside the first with the metadata.
    pub data_file: Option<String>,
    /// Its format: `qcow2`, `raw`, …
    pub driver: String,
    /// Whether QEMU has it open for reading only.
    pub read_only: bool,
    /// What the guest (or the layer above) sees of it, bytes.
    pub virtual_size: u64,
    /// Its dirty bitmaps.
    pub bitmaps: Vec<DirtyBitmap>,
}

/// A drive of the guest and its chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDisk {
    /// QEMU's path or name of the device.
    pub qdev: String,
    /// Whether its medium can be taken out.
    pub removable: bool,
    /// `ok`, `failed`, `nospace`.
    pub io_status: Option<String>,
    /// The images, top first; empty for an empty drive.
    pub chain: Vec<ImageNode>,
    /// The kinds of the filters between the drive and its top image: `mirror_top` during an active
    /// commit, `copy-before-write` during a backup, `throttle`, …
    pub filters: Vec<String>,
}

/// How far a job of QEMU's is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockJobPhase {
    /// Made, not begun.
    Created,
    /// At work.
    Running,
    /// Stopped for a while.
    Paused,
    /// In step; waits for a pivot.
    Ready,
    /// Ready and stopped for a while.
    Standby,
    /// Waits for other jobs of its transaction.
    Waiting,
    /// Waits to be finished.
    Pending,
    /// Being undone.
    Aborting,
    /// Over; waits to be dismissed.
    Concluded,
    /// A state this crate does not know.
    Other(String),
}

/// A block job of QEMU's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockJob {
    /// libvirt's name of it, such as `commit-vda-libvirt-5-format`.
    pub id: String,
    /// `commit` (an active one too), `stream`, `backup`, `mirror`.
    pub kind: String,
    /// How far it is.
    pub phase: BlockJobPhase,
    /// Whether it may be pivoted.
    pub ready: bool,
    /// Bytes done.
    pub offset: u64,
    /// Bytes in all; may grow while it runs.
    pub len: u64,
    /// The limit, bytes/s; 0 for none.
    pub speed: u64,
    /// `ok`, `failed`, `nospace`.
    pub io_status: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// The files of the images it works on.
    pub files: Vec<String>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockGraph {
    /// The guest's drives.
    pub disks: Vec<BlockDisk>,
    /// The block jobs.
    pub jobs: Vec<BlockJob>,
    /// Every file that a node of the graph has open, of whatever disk or job.
    pub files: Vec<String>,
}

impl BlockDisk {
    /// Whether the drive belongs to the device of that alias in the XML.
    pub fn is_device(&self, alias: &str) -> bool {
        self.qdev == alias
            || self.qdev.split('/').any(|part| part == alias)
            || self.qdev.strip_prefix("drive-") == Some(alias)
    }

    /// The files of its chain, top first.
    pub fn files(&self) -> Vec<&str> {
        self.chain.iter().filter_map(|i| i.file.as_deref()).collect()
    }

    /// The image the guest writes to.
    pub fn top(&self) -> Option<&ImageNode> {
        self.chain.first()
    }
}

impl BlockGraph {
    /// The drive behind a target (`vda`) of the *live* definition, found by the device's alias.
    pub fn disk(&self, live: &DomainXml, target: &str) -> Option<&BlockDisk> {
        let alias = live.disk(target)?.alias?;
        self.disks.iter().find(|d| d.is_device(&alias))
    }

    /// Whether QEMU has the file open. Compares names: where links or several names of one file may
    /// be in play, compare what [`super::open_files`] says about device and inode.
    pub fn uses(&self, file: &str) -> bool {
        self.files.iter().any(|f| f == file)
    }
}

impl Domain {
    /// QEMU's own answer about its disks and block jobs.
    ///
    /// # Errors
    /// [`ErrorCode::OperationInvalid`] when it does not run; [`ErrorCode::Unreadable`] when QEMU's
    /// answer has another shape, or changes faster than it can be read.
    pub fn block_graph(&self) -> Result<BlockGraph> {
        const TRIES: usize = 8;
        for _ in 0..TRIES {
            let before = self.graph()?;
            let drives: Vec<Drive> = self.qmp_query(&QmpQuery::BLOCK)?;
            let nodes: Vec<NamedNode> = self.qmp_query(&QmpQuery::NAMED_BLOCK_NODES)?;
            let jobs: Vec<Job> = self.qmp_query(&QmpQuery::BLOCK_JOBS)?;
            if self.graph()? == before {
                return Ok(build(before.as_ref(), &drives, &nodes, jobs));
            }
        }
        let message = "the block graph keeps changing";
        Err(Error::own("qmp:query-block", self.label(), ErrorCode::Unreadable, message))
    }

    fn graph(&self) -> Result<Option<Graph>> {
        match self.qmp_query(&QmpQuery::BLOCK_GRAPH) {
            Ok(graph) => Ok(Some(graph)),
            // QEMU does not have the command (any more).
            Err(e) if e.code == ErrorCode::OperationFailed && e.message.contains("has not been found") => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Whether the guest runs, in QEMU's words.
    ///
    /// # Errors
    /// As [`Self::block_graph`].
    pub fn run_status(&self) -> Result<RunStatus> {
        self.qmp_query(&QmpQuery::STATUS)
    }

    /// The migration (save, memory snapshot) in progress, or the last one.
    ///
    /// # Errors
    /// As [`Self::block_graph`].
    pub fn migration_status(&self) -> Result<MigrationStatus> {
        self.qmp_query(&QmpQuery::MIGRATE)
    }
}

/// Nodes that QEMU puts between, which are no images.
fn is_filter(driver: &str) -> bool {
    const FILTERS: &[&str] = &[
        "mirror_top",
        "commit_top",
        "backup-top",
        "copy-before-write",
        "copy-on-read",
        "throttle",
        "preallocate",
        "compress",
        "snapshot-access",
    ];
    FILTERS.contains(&driver)
}

pub(super) fn build(
    graph: Option<&Graph>,
    drives: &[Drive],
    nodes: &[NamedNode],
    jobs: Vec<Job>,
) -> BlockGraph {
    let walker = graph.map(|g| Walker::new(g, nodes));
    let disks = drives
        .iter()
        .map(|drive| {
            let qdev = drive.qdev.clone().unwrap_or_else(|| drive.device.clone());
            let (chain, filters) = match (&drive.inserted, &walker) {
                (None, _) => (Vec::new(), Vec::new()),
                (Some(inserted), Some(w)) => match w.root_of(&qdev, inserted.node_name.as_deref()) {
                    Some(root) => w.chain(root),
                    None => by_file_name(drive, nodes),
                },
                (Some(_), None) => by_file_name(drive, nodes),
            };
            BlockDisk { qdev, removable: drive.removable, io_status: drive.io_status.clone(), chain, filters }
        })
        .collect();
    let jobs = jobs.into_iter().map(|job| job_of(job, walker.as_ref())).collect();
    let mut files: Vec<String> = match &walker {
        Some(w) => w.protocol_files(),
        None => nodes.iter().map(|n| n.file.clone()).collect(),
    };
    files.sort();
    files.dedup();
    BlockGraph { disks, jobs, files }
}

fn job_of(job: Job, walker: Option<&Walker<'_>>) -> BlockJob {
    let files = walker.map_or_else(Vec::new, |w| w.job_files(&job.device));
    BlockJob {
        phase: match job.status.as_str() {
            "created" => BlockJobPhase::Created,
            "running" => BlockJobPhase::Running,
            "paused" => BlockJobPhase::Paused,
            "ready" => BlockJobPhase::Ready,
            "standby" => BlockJobPhase::Standby,
            "waiting" => BlockJobPhase::Waiting,
            "pending" => BlockJobPhase::Pending,
            "aborting" => BlockJobPhase::Aborting,
            "concluded" => BlockJobPhase::Concluded,
            _ if job.paused => BlockJobPhase::Paused,
            other => BlockJobPhase::Other(other.to_owned()),
        },
        id: job.device,
        kind: job.kind,
        ready: job.ready,
        offset: job.offset,
        len: job.len,
        speed: job.speed,
        io_status: job.io_status,
        error: job.error,
        files,
    }
}

/// The graph by id, and the nodes' descriptions by name.
struct Walker<'a> {
    graph: &'a Graph,
    by_id: HashMap<u64, (&'a str, Option<&'a NamedNode>)>,
    /// Children in QEMU's order: (parent, role, child).
    children: HashMap<u64, Vec<(&'a str, u64)>>,
}

impl<'a> Walker<'a> {
    fn new(graph: &'a Graph, nodes: &'a [NamedNode]) -> Self {
        let named: HashMap<&str, &NamedNode> = nodes.iter().map(|n| (n.node_name.as_str(), n)).collect();
        let by_id = graph
            .nodes
            .iter()
            .map(|n| {
                let described = if n.kind == "block-driver" { named.get(n.name.as_str()) } else { None };
                (n.id, (n.name.as_str(), described.copied()))
            })
            .collect();
        let mut children: HashMap<u64, Vec<(&str, u64)>> = HashMap::new();
        for edge in &graph.edges {
            children.entry(edge.parent).or_default().push((edge.name.as_str(), edge.child));
        }
        Self { graph, by_id, children }
    }

    fn child(&self, id: u64, role: &str) -> Option<u64> {
        self.children.get(&id)?.iter().find(|(r, _)| *r == role).map(|(_, child)| *child)
    }

    fn described(&self, id: u64) -> Option<&'a NamedNode> {
        self.by_id.get(&id).and_then(|(_, node)| *node)
    }

    /// The topmost node of a drive: the root of its backend, or the node that `query-block` names.
    fn root_of(&self, qdev: &str, node: Option<&str>) -> Option<u64> {
        let of_kind = |kind: &str, name: &str| {
            self.graph.nodes.iter().find(|n| n.kind == kind && n.name == name).map(|n| n.id)
        };
        let backend = if qdev.is_empty() { None } else { of_kind("block-backend", qdev) };
        backend
            .and_then(|b| self.child(b, "root"))
            .or_else(|| node.and_then(|name| of_kind("block-driver", name)))
    }

    fn chain(&self, root: u64) -> (Vec<ImageNode>, Vec<String>) {
        let (mut images, mut filters) = (Vec::new(), Vec::new());
        let mut at = Some(root);
        // A graph has no cycles, but an answer might.
        for _ in 0..self.graph.nodes.len() {
            let Some(id) = at else { break };
            let Some(node) = self.described(id) else { break };
            if is_filter(&node.drv) {
                filters.push(node.drv.clone());
                at = self.child(id, "file").or_else(|| self.child(id, "backing"));
                continue;
            }
            images.push(ImageNode {
                node: Some(node.node_name.clone()),
                file: self.file_below(id),
                data_file: self.child(id, "data-file").and_then(|d| self.file_below(d)),
                driver: node.drv.clone(),
                read_only: node.ro,
                virtual_size: node.image.virtual_size,
                bitmaps: node.dirty_bitmaps.clone(),
            });
            at = self.child(id, "backing");
        }
        (images, filters)
    }

    /// The file of the protocol node at the bottom of an image's own nodes.
    fn file_below(&self, id: u64) -> Option<String> {
        let mut at = id;
        for _ in 0..self.graph.nodes.len() {
            match self.child(at, "file") {
                Some(below) => at = below,
                None => break,
            }
        }
        self.described(at).map(|n| n.file.clone())
    }

    fn protocol_files(&self) -> Vec<String> {
        let is_protocol = |id: u64| self.child(id, "file").is_none() && self.child(id, "backing").is_none();
        self.graph
            .nodes
            .iter()
            .filter(|n| is_protocol(n.id))
            .filter_map(|n| self.described(n.id))
            .filter(|n| !is_filter(&n.drv))
            .map(|n| n.file.clone())
            .collect()
    }

    fn job_files(&self, job: &str) -> Vec<String> {
        let Some(node) = self.graph.nodes.iter().find(|n| n.kind == "block-job" && n.name == job) else {
            return Vec::new();
        };
        let mut files: Vec<String> = Vec::new();
        for (_, child) in self.children.get(&node.id).into_iter().flatten() {
            let image = self.chain(*child).0.into_iter().next();
            if let Some(file) = image.and_then(|i| i.file)
                && !files.contains(&file)
            {
                files.push(file);
            }
        }
        files
    }
}

/// Without the graph: the chain as `query-block` nests it, with node names where they are unique.
fn by_file_name(drive: &Drive, nodes: &[NamedNode]) -> (Vec<ImageNode>, Vec<String>) {
    let (mut out, mut filters) = (Vec::new(), Vec::new());
    let Some(inserted) = &drive.inserted else { return (out, filters) };
    let mut at: Option<&Image> = Some(&inserted.image);
    while let Some(image) = at {
        at = image.backing_image.as_deref();
        if is_filter(&image.format) {
            filters.push(image.format.clone());
            continue;
        }
        let top = out.is_empty();
        let mut same = nodes.iter().filter(|n| {
            n.image.filename == image.filename && n.image.format == image.format && !is_filter(&n.drv)
        });
        let node = match (same.next(), same.next()) {
            (Some(only), None) => Some(only),
            _ => None,
        };
        out.push(ImageNode {
            node: node
                .map(|n| n.node_name.clone())
                .or_else(|| (top && filters.is_empty()).then(|| inserted.node_name.clone()).flatten()),
            file: (!image.filename.starts_with("json:")).then(|| image.filename.clone()),
            data_file: None,
            driver: if image.format.is_empty() && top { inserted.drv.clone() } else { image.format.clone() },
            read_only: node.map_or(if top { inserted.ro } else { true }, |n| n.ro),
            virtual_size: image.virtual_size,
            bitmaps: node.map_or_else(
                || if top { inserted.dirty_bitmaps.clone() } else { Vec::new() },
                |n| n.dirty_bitmaps.clone(),
            ),
        });
    }
    (out, filters)
}
