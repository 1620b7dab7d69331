//! What the documents promise, they promise with the name of a test. Each of these tests exists.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use replay_tests::testbed::files_in;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The names of all functions below a folder that follow a test's attribute.
fn tests_below(folder: &Path, found: &mut BTreeSet<String>) {
    let files = files_in(folder).unwrap().into_iter();
    for file in files.filter(|file| file.extension().is_some_and(|e| e == "rs")) {
        let text = fs::read_to_string(folder.join(file)).unwrap();
        // Further attributes, or `async`, may stand between.
        for after in text.split("test]").chain(text.split("test(")).skip(1) {
            let name = after.split_once("fn ").and_then(|(_, rest)| rest.split_once('('));
            found.extend(name.map(|(name, _)| name.to_owned()));
        }
    }
}

/// Words in backticks that read like the name of a test.
fn named(text: &str) -> BTreeSet<&str> {
    let is_test = |word: &&str| {
        word.matches('_').count() >= 3
            && word.chars().all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    text.split('`').skip(1).step_by(2).filter(is_test).collect()
}

#[test]
fn every_test_that_a_document_names_exists() {
    let mut tests = BTreeSet::new();
    for part in ["host", "libvirt", "replay-tests", "steps", "store", "workflow"] {
        for folder in ["src", "tests"].map(|folder| workspace().join(part).join(folder)) {
            if folder.is_dir() {
                tests_below(&folder, &mut tests);
            }
        }
    }
    for (document, least) in [("ARCHITECTURE.md", 20), ("ROADMAP.md", 0), ("steps/STEPS.md", 0)] {
        let text = fs::read_to_string(workspace().join(document)).unwrap();
        let named = named(&text);
        assert!(named.len() >= least, "{document} names {} tests", named.len());
        let missing: Vec<_> = named.iter().filter(|name| !tests.contains(**name)).collect();
        assert!(missing.is_empty(), "{document} names tests that do not exist: {missing:?}");
    }
}
