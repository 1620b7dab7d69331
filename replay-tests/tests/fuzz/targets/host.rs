//! Requests, configuration, and what people type.

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmkeep_host::api::types::{
    Act, DeleteRequest, DiscardRequest, ForgetRequest, HistoryPruneRequest, InPlaceRequest, ProtectRequest,
    PruneRequest, RebuildRequest, RestoreRequest, SnapshotRequest, UndoRequest,
};
use vmkeep_host::config::{Config, File, Overrides, Surroundings};
use vmkeep_host::text::{parse_rate, parse_size, parse_span, safe, safe_lines};

use super::{ACCEPTED, NO_TEXT, kept, refused, text};

pub(crate) fn api_seeds() -> Vec<Vec<u8>> {
    fn body<T: Default + Serialize>() -> Vec<u8> {
        serde_json::to_vec(&T::default()).unwrap()
    }
    let bodies = [
        body::<SnapshotRequest>(),
        body::<RestoreRequest>(),
        body::<DeleteRequest>(),
        body::<PruneRequest>(),
    ];
    let more = [body::<ProtectRequest>(), body::<InPlaceRequest>(), body::<UndoRequest>(), body::<Act>()];
    kept("api").into_iter().chain(bodies).chain(more).collect()
}

fn request<T: DeserializeOwned + Serialize + PartialEq + Debug>(input: &[u8]) -> u64 {
    let request: T = match serde_json::from_slice(input) {
        Ok(request) => request,
        Err(e) => return refused(&e),
    };
    let written = serde_json::to_vec(&request).unwrap();
    let again: T = serde_json::from_slice(&written).expect("what was written is read");
    assert_eq!(again, request);
    ACCEPTED
}

/// A body that is accepted as a request of some kind comes back.
pub(crate) fn api(input: &[u8]) -> u64 {
    let kinds: [fn(&[u8]) -> u64; 12] = [
        request::<SnapshotRequest>,
        request::<RestoreRequest>,
        request::<InPlaceRequest>,
        request::<UndoRequest>,
        request::<DiscardRequest>,
        request::<DeleteRequest>,
        request::<PruneRequest>,
        request::<ProtectRequest>,
        request::<RebuildRequest>,
        request::<ForgetRequest>,
        request::<Act>,
        request::<HistoryPruneRequest>,
    ];
    // Accepted by one is accepted; else what the first says.
    let outcomes = kinds.map(|kind| kind(input));
    if outcomes.contains(&ACCEPTED) { ACCEPTED } else { outcomes[0] }
}

/// The example in the documentation is a configuration.
pub(crate) fn config_seeds() -> Vec<Vec<u8>> {
    let page = include_str!("../../../../docs/configuration.md");
    let examples = page.split("```").skip(1).step_by(2).filter_map(|block| block.strip_prefix("toml\n"));
    kept("config").into_iter().chain(examples.map(|example| example.as_bytes().to_vec())).collect()
}

/// What is read is read the same twice; a mistake names a line of the file.
pub(crate) fn config(input: &[u8]) -> u64 {
    let Some(text) = text(input) else { return NO_TEXT };
    let path = Path::new("vmkeep.toml");
    match (File::parse(text, path), File::parse(text, path)) {
        (Ok(one), Ok(other)) => assert_eq!(one, other),
        (Err(one), Err(other)) => {
            assert_eq!(one, other);
            let lines = text.bytes().filter(|byte| *byte == b'\n').count() + 1;
            if let vmkeep_host::config::ConfigError::Wrong { line, .. } = &one {
                assert!((1..=lines).contains(line), "line {line} of {lines}");
            }
            return refused(&one);
        }
        _ => panic!("read once and refused once"),
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vmkeep.toml");
    std::fs::write(&file, input).unwrap();
    let overrides = Overrides { config: Some(file), ..Overrides::default() };
    let around = Surroundings { env: HashMap::from([("HOME".to_owned(), "/home/ada".into())]), uid: 1000 };
    let load = || Config::load(&overrides, &around);
    match (load(), load()) {
        (Ok(one), other) => {
            assert_eq!(Ok(&one), other.as_ref());
            assert!(one.state_dir.is_absolute() && one.socket.is_absolute(), "{one:?}");
            assert!(!one.roots.is_empty() && one.roots.iter().all(|root| root.is_absolute()), "{one:?}");
            assert!(one.limits.jobs > 0 && one.limits.jobs_per_root > 0);
            ACCEPTED
        }
        (Err(one), other) => {
            assert_eq!(Err(&one), other.as_ref());
            // The folder has another name each time.
            refused(&one.to_string().replace(&*folder.path().to_string_lossy(), ""))
        }
    }
}

/// What is printed can do nothing to a terminal; sizes and spans are understood or refused.
pub(crate) fn words(input: &[u8]) -> u64 {
    let Some(text) = text(input) else { return NO_TEXT };
    let shown = safe(text);
    assert!(!shown.chars().any(char::is_control), "{shown:?}");
    assert!(!safe_lines(text).chars().any(|c| c.is_control() && c != '\n'));
    let _ = vmkeep_host::location::path(Path::new(text));
    match (parse_size(text), parse_rate(text), parse_span(text)) {
        (Err(size), Err(rate), Err(span)) => refused(&format!("{size} {rate} {span}")),
        _ => ACCEPTED,
    }
}
