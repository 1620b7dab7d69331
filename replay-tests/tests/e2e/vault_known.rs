//! What a host knows by its own journal of the vaults that it writes to: the last backup of each domain, while no vault answers.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::support::bed::{Bed, small};
use crate::vault::{backed_up, bed};

/// The vault's folder, and where it is while it is gone.
fn places(bed: &Bed) -> (PathBuf, PathBuf) {
    let state = bed.host.hypervisor.dir().join("state");
    (state.join("vault"), state.join("away"))
}

#[test]
fn the_last_backup_in_a_vault_is_told_while_the_vault_is_gone_and_by_a_new_vmkeepd() {
    let bed = bed(&small("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    assert_eq!(host.json(&["status"])["domains"][0]["in_vaults"], json!([]));
    backed_up(&bed, "first", &[]);
    let (last, _) = backed_up(&bed, "last", &[]);
    let id = last["id"].as_str().unwrap().replace('-', "");
    let listed = host.json(&["vault", "list", "main"]);
    let row = listed["backups"].as_array().unwrap().iter().find(|row| row["id"] == *id).unwrap().clone();

    let (place, away) = places(&bed);
    fs::rename(&place, &away).unwrap();
    let tells = || {
        let status = host.json(&["status"]);
        let told = status["domains"][0]["in_vaults"].as_array().unwrap().clone();
        assert_eq!(told.len(), 1, "{status:#}");
        assert_eq!((&told[0]["id"], &told[0]["at"]), (&row["id"], &row["at"]), "{told:#?} {row:#}");
        assert_eq!((&told[0]["vault"], &told[0]["configured"]), (&json!("main"), &json!(true)));
        assert_eq!(host.json(&["list"])["in_vaults"], json!(told));
        let text = host.ok(&["status"]);
        assert!(text.contains("main: ") && text.contains(&id[id.len() - 8..]), "{text}");
    };
    tells();
    daemon.end();
    let _daemon = host.daemon();
    tells();
}
