//! What a host knows by its own journal of the vaults that it writes to: the last backup of each domain, while no vault answers; and
//! leases that its jobs could not end, which it ends as soon as the vault is back.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::bed::{Bed, large, small};
use crate::support::until;
use crate::vault::{backed_up, bed};

/// The vault's folder, and where it is while it is gone.
fn places(bed: &Bed) -> (PathBuf, PathBuf) {
    let state = bed.host.hypervisor.dir().join("state");
    (state.join("vault"), state.join("away"))
}

fn leases(bed: &Bed) -> Vec<Value> {
    bed.host.json(&["vault", "leases", "main"]).as_array().unwrap().clone()
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

#[test]
fn a_lease_that_a_job_could_not_end_is_ended_by_the_next_backup_or_the_next_vmkeepd() {
    let bed = bed(&large("web1"));
    let host = &bed.host;
    let daemon = host.daemon();
    let (place, away) = places(&bed);
    // Cancelled while its vault is gone.
    let leave = || {
        let job = host.begin(&["backup", "web1", "--bandwidth", "4M"]);
        host.reached(&job, "step_started", "read");
        fs::rename(&place, &away).unwrap();
        host.ok(&["job", "cancel", &job]);
        let row = host.settled(&job);
        fs::rename(&away, &place).unwrap();
        assert!(row["ended"].is_string() && row["status"] != "succeeded", "{}", host.story(&job));
        let told = host.story(&job);
        assert!(told.contains("lease in the vault could not be ended"), "{told}");
        assert_eq!(leases(&bed).len(), 1, "{told}");
        job
    };
    leave();
    let (after, then) = backed_up(&bed, "after", &[]);
    assert_eq!(leases(&bed), [] as [Value; 0]);
    let told = host.story(after["id"].as_str().unwrap());
    assert!(told.contains("Leases in the vault that these jobs had left were ended"), "{told}");
    crate::vault::holds(&bed, &after, "after", &then);

    leave();
    daemon.end();
    let _daemon = host.daemon();
    until("the lease to be ended", || leases(&bed).is_empty().then_some(()));
    bed.assert_back_home();
    host.ok(&["vault", "check", "main"]);
}
