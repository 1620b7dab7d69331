//! Where an interrupted copy goes on.
//!
//! A token is made only after an `fdatasync` of the copy that began after the last byte it speaks of was written, so
//! whatever happens to the process or to the host, those bytes are there. It names both files by identity. On a
//! resume any doubt (another inode, a size or a time of change that moved, a copy shorter than the token says, a
//! token that is torn or was edited) means: from the beginning. Only time is lost by that.

use super::tree::{Tree, Trees};
use super::{CopyError, Identity};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;

/// Where an interrupted copy goes on. Stored as JSON; about 1 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeToken {
    version: u32,
    /// The file that is copied.
    pub source: Identity,
    target_dev: u64,
    target_ino: u64,
    /// So many bytes are durable in the copy.
    pub offset: u64,
    /// Whether the copy shares its blocks with the source, so that only hashing is left.
    cloned: bool,
    /// BLAKE3 of the bytes that replace the beginning; of nothing if none do.
    header: String,
    source_tree: Vec<String>,
    target_tree: Option<Vec<String>>,
    /// BLAKE3 of all the above: finds a torn or edited token, guards against nothing worse.
    check: String,
}

/// The state that a valid token gives back.
pub(crate) struct Resumed {
    pub(crate) offset: u64,
    pub(crate) cloned: bool,
    pub(crate) trees: Trees,
}

fn hex_stack(tree: &Tree) -> Vec<String> {
    tree.stack().iter().map(|v| blake3::Hash::from_bytes(*v).to_hex().to_string()).collect()
}

fn unhex_stack(stack: &[String]) -> Option<Vec<[u8; 32]>> {
    stack.iter().map(|s| blake3::Hash::from_hex(s).ok().map(|h| *h.as_bytes())).collect()
}

impl ResumeToken {
    pub(crate) fn new(
        source: Identity,
        target: (u64, u64),
        offset: u64,
        cloned: bool,
        header: &[u8],
        trees: &Trees,
    ) -> Self {
        let mut token = Self {
            version: VERSION,
            source,
            target_dev: target.0,
            target_ino: target.1,
            offset,
            cloned,
            header: blake3::hash(header).to_hex().to_string(),
            source_tree: hex_stack(&trees.source),
            target_tree: trees.target.as_ref().map(hex_stack),
            check: String::new(),
        };
        token.check = token.digest();
        token
    }

    fn digest(&self) -> String {
        let Self {
            version,
            source,
            target_dev,
            target_ino,
            offset,
            cloned,
            header,
            source_tree,
            target_tree,
            check: _,
        } = self;
        let text = format!(
            "{version} {source:?} {target_dev} {target_ino} {offset} {cloned} {header} {source_tree:?} {target_tree:?}"
        );
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    /// Reads a stored token; `None` if it is torn, was edited, or is of a version that this program does not know.
    pub fn parse(json: &serde_json::Value) -> Option<Self> {
        let token = Self::deserialize(json).ok()?;
        (token.version == VERSION && token.check == token.digest()).then_some(token)
    }

    /// Whether `target` is the copy that this token speaks of, and holds as much as it says.
    pub fn fits_target(&self, target: &rustix::fs::Stat) -> bool {
        self.target_dev == target.st_dev
            && self.target_ino == target.st_ino
            && u64::try_from(target.st_size).is_ok_and(|size| size >= self.offset)
    }

    pub(crate) fn resume(
        &self,
        source: Identity,
        target: &rustix::fs::Stat,
        header: &[u8],
    ) -> Result<Resumed, CopyError> {
        let stale = |why| CopyError::StaleToken { why };
        if self.check != self.digest() {
            return Err(stale("it is torn"));
        }
        if self.source != source {
            return Err(stale("the source is another file or was written meanwhile"));
        }
        if !self.fits_target(target) {
            return Err(stale("the copy is another file or shorter than it was"));
        }
        if self.header != blake3::hash(header).to_hex().as_str() {
            return Err(stale("the copy is to begin with another header"));
        }
        let tree = |stack: &[String]| {
            unhex_stack(stack).and_then(|stack| Tree::resume(source.size, self.offset, stack))
        };
        let source_tree = tree(&self.source_tree).ok_or(stale("its hash state does not fit"))?;
        let target_tree = match (&self.target_tree, header.is_empty()) {
            (Some(stack), false) => Some(tree(stack).ok_or(stale("its hash state does not fit"))?),
            (None, true) => None,
            _ => return Err(stale("its hash state does not fit")),
        };
        let trees = Trees { source: source_tree, target: target_tree };
        Ok(Resumed { offset: self.offset, cloned: self.cloned, trees })
    }
}
