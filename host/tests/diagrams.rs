//! The stored diagrams are those that the code draws.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

/// Set `VMKEEP_WRITE_DIAGRAMS=1` to write them anew (with `dot` installed also as SVG).
#[tokio::test]
async fn the_stored_diagrams_are_what_the_code_draws() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../diagrams");
    let write = std::env::var_os("VMKEEP_WRITE_DIAGRAMS").is_some();
    let drawn = vmkeep_host::diagram::all().await.unwrap();
    for (name, dot) in &drawn {
        let path = folder.join(format!("{name}.dot"));
        if write {
            std::fs::write(&path, dot).unwrap();
            let svg = folder.join(format!("{name}.svg"));
            let done = Command::new("dot").arg("-Tsvg").arg(&path).arg("-o").arg(&svg).status().unwrap();
            assert!(done.success());
        }
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(stored == *dot, "{name}.dot is stale: run this test with VMKEEP_WRITE_DIAGRAMS=1");
        assert!(folder.join(format!("{name}.svg")).is_file(), "{name}.svg is missing");
    }
    let mut stored: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .filter_map(|entry| {
            entry.unwrap().file_name().into_string().ok()?.strip_suffix(".dot").map(str::to_owned)
        })
        .collect();
    stored.sort();
    let mut names: Vec<String> = drawn.into_iter().map(|(name, _)| name).collect();
    names.sort();
    assert_eq!(stored, names, "a diagram of no workflow is left over");
}
