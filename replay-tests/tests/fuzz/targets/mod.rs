//! What is fed, and what must hold of it.
//!
//! A target takes any bytes, panics if a property is broken, and says what became of them: [`ACCEPTED`], or a number that
//! stands for the reason of a refusal.

mod files;
mod host;
mod journal;
mod xml;

use std::fmt::Display;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

/// The input was accepted.
pub(crate) const ACCEPTED: u64 = 0;

/// Something that parses.
pub(crate) struct Target {
    /// Its name, and the folder of its corpus.
    pub(crate) name: &'static str,
    /// The inputs to begin with.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Tries one out.
    pub(crate) run: fn(&[u8]) -> u64,
}

/// All of them.
pub(crate) const ALL: &[Target] = &[
    Target { name: "event", seeds: journal::event_seeds, run: journal::event },
    Target { name: "journal", seeds: journal::journal_seeds, run: journal::journal },
    Target { name: "export", seeds: journal::export_seeds, run: journal::export },
    Target { name: "heads", seeds: || kept("heads"), run: journal::heads },
    Target { name: "plan", seeds: journal::plan_seeds, run: journal::plan },
    Target { name: "store-config", seeds: || kept("store-config"), run: journal::store_config },
    Target { name: "sqlite-file", seeds: journal::database_seeds, run: journal::database },
    Target { name: "xml", seeds: xml::document_seeds, run: xml::document },
    Target { name: "domain-xml", seeds: || kept("domain-xml"), run: xml::domain },
    Target { name: "save-image", seeds: files::save_image_seeds, run: files::save_image },
    Target { name: "qcow2", seeds: || kept("qcow2"), run: files::qcow2 },
    Target { name: "manifest", seeds: || kept("manifest"), run: files::manifest },
    Target { name: "api", seeds: host::api_seeds, run: host::api },
    Target { name: "config", seeds: host::config_seeds, run: host::config },
    Target { name: "text", seeds: || kept("text"), run: host::words },
];

/// A refusal, by its message: without what stands in quotes, and without numbers.
fn refused(why: &dyn Display) -> u64 {
    let text = why.to_string();
    let mut shape: String = text.split(['"', '\'', '`']).step_by(2).collect();
    shape.retain(|c| c.is_ascii_alphabetic() || c == ' ');
    shape.truncate(120);
    let mut hasher = DefaultHasher::new();
    shape.hash(&mut hasher);
    hasher.finish().max(1)
}

/// The inputs that are kept for a target.
fn kept(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// The text of an input; nothing if it is none.
fn text(input: &[u8]) -> Option<&str> {
    std::str::from_utf8(input).ok()
}

/// What stands for bytes that are no text.
const NO_TEXT: u64 = 1;
