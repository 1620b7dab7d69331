//! The shapes of QMP's answers, as far as they are used. Unknown members are ignored, missing ones that
//! versions differ in have defaults.

use serde::{Deserialize, Serialize};

use super::graph::DirtyBitmap;

/// `query-block`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Drive {
    #[serde(default)]
    pub(super) device: String,
    pub(super) qdev: Option<String>,
    #[serde(default)]
    pub(super) removable: bool,
    pub(super) io_status: Option<String>,
    pub(super) inserted: Option<Inserted>,
}

/// The medium in a drive.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Inserted {
    pub(super) node_name: Option<String>,
    #[serde(default)]
    pub(super) ro: bool,
    pub(super) drv: String,
    pub(super) image: Image,
    #[serde(default)]
    pub(super) dirty_bitmaps: Vec<DirtyBitmap>,
}

/// An image and, in `query-block`, what lies below.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Image {
    pub(super) filename: String,
    #[serde(default)]
    pub(super) format: String,
    #[serde(default)]
    pub(super) virtual_size: u64,
    pub(super) backing_image: Option<Box<Self>>,
}

/// `query-named-block-nodes`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct NamedNode {
    pub(super) node_name: String,
    pub(super) drv: String,
    #[serde(default)]
    pub(super) ro: bool,
    pub(super) file: String,
    pub(super) image: Image,
    #[serde(default)]
    pub(super) dirty_bitmaps: Vec<DirtyBitmap>,
}

/// `x-debug-query-block-graph`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Graph {
    pub(super) nodes: Vec<GraphNode>,
    pub(super) edges: Vec<GraphEdge>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct GraphNode {
    pub(super) id: u64,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct GraphEdge {
    pub(super) parent: u64,
    pub(super) child: u64,
    pub(super) name: String,
}

/// `query-block-jobs`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Job {
    pub(super) device: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) status: String,
    #[serde(default)]
    pub(super) ready: bool,
    #[serde(default)]
    pub(super) paused: bool,
    pub(super) offset: u64,
    pub(super) len: u64,
    #[serde(default)]
    pub(super) speed: u64,
    pub(super) io_status: Option<String>,
    pub(super) error: Option<String>,
}

/// Whether the guest runs, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunStatus {
    /// Whether its CPUs run.
    pub running: bool,
    /// `running`, `paused`, `io-error`, `postmigrate`, `inmigrate`, …
    pub status: String,
}

/// A migration, which a save and a memory snapshot are too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// `setup`, `active`, `completed`, `failed`, …; none if there never was one.
    pub status: Option<String>,
    /// QEMU's word on a failure.
    #[serde(rename = "error-desc")]
    pub error: Option<String>,
    /// Guest memory.
    pub ram: Option<MigrationRam>,
}

/// Guest memory in a migration, bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationRam {
    /// In all.
    pub total: u64,
    /// Left.
    pub remaining: u64,
    /// Sent.
    pub transferred: u64,
    /// Pages per second that the guest dirties.
    #[serde(rename = "dirty-pages-rate", default)]
    pub dirty_pages_rate: u64,
}
