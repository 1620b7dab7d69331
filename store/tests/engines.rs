//! Which engine a folder belongs to.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use vmkeep_store::conformance::sample::{append, assert_holds};
use vmkeep_store::{EngineName, StoreConfig, engine_of, open, open_read_only};
use vmkeep_workflow::journal::StoreError;

const ENGINES: [EngineName; 2] = [EngineName::Sqlite, EngineName::Sled];

fn config(engine: EngineName, path: &Path) -> StoreConfig {
    StoreConfig { engine, reserve: 0, ..StoreConfig::new(path) }
}

#[tokio::test]
async fn a_store_of_the_other_engine_is_refused_and_nothing_is_made_beside_it() {
    for engine in ENGINES {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("store");
        assert_eq!(engine_of(&path), Ok(None));
        open(&config(engine, &path)).unwrap().append(append("a", 0, 3)).await.unwrap();
        assert_eq!(engine_of(&path), Ok(Some(engine)));
        for other in ENGINES.into_iter().filter(|other| *other != engine) {
            let expected = StoreError::OtherEngine {
                path: path.display().to_string(),
                found: engine.to_string(),
                wanted: other.to_string(),
            };
            assert_eq!(open(&config(other, &path)).err(), Some(expected.clone()));
            assert_eq!(open_read_only(&config(other, &path)).err(), Some(expected));
        }
        assert_eq!(engine_of(&path), Ok(Some(engine)), "nothing was made");
        assert_holds(&*open(&config(engine, &path)).unwrap(), "a", 3).await;
    }
}

#[test]
fn a_folder_that_two_engines_claim_is_damaged() {
    let place = tempfile::tempdir().unwrap();
    for engine in ENGINES {
        let path = place.path().join(engine.to_string());
        drop(open(&config(engine, &path)).unwrap());
    }
    let path = place.path().join("sqlite");
    std::fs::rename(place.path().join("sled/journal.sled"), path.join("journal.sled")).unwrap();
    for engine in ENGINES {
        let refused = open(&config(engine, &path)).err();
        assert!(matches!(refused, Some(StoreError::Damaged(_))), "{refused:?}");
    }
}
