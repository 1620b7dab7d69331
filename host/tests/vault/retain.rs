//! Which backups are verified, and which stay by rules.

use std::io::Write as _;

use serde_json::Value;
use vmkeep_host::codes;

use crate::support::{C, Host, World, backup_of, damage, noise};

/// What becomes of each backup and why, the newest first.
fn fates(plan: &Value) -> Vec<(String, String, String)> {
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    let row = |row: &Value| {
        let because: Vec<String> = row["because"].as_array().unwrap().iter().map(word).collect();
        (word(&row["backup"]["id"]), word(&row["fate"]), because.join(", "))
    };
    plan["backups"].as_array().unwrap().iter().map(row).collect()
}

fn fate(id: &str, fate: &str, because: &str) -> (String, String, String) {
    (id.to_owned(), fate.to_owned(), because.to_owned())
}

fn marks(host: &Host, id: &str) -> Value {
    host.json(&["show", "home", id])["backup"]["marks"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_rule_keeps_is_shown_first_and_goes_only_if_somebody_says_so() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let vault = host.open("home").await;
    let mut ids = Vec::new();
    for at in ["03-01T08:00", "03-01T23:30", "03-02T08:00", "03-09T08:00", "03-09T20:00"] {
        ids.push(backup_of(&vault, &noise(1, 3 * C), &format!("2024-{at}:00Z")).await);
    }
    let careful = ["prune", "home", "--keep-daily", "2", "--time-zone", "UTC"];
    let none = host.run(&[&careful[..], &["--yes"]].concat());
    let said = &none.must(0).out;
    assert!(said.contains("nothing is to go") && said.contains("none is verified"), "{said}");
    assert!(said.contains("vmkeep vault verify"), "{said}");
    let by_days = [&careful[..], &["--unverified"]].concat();
    let planned = [
        fate(&ids[4], "stays", "daily 2024-03-09"),
        fate(&ids[3], "goes", ""),
        fate(&ids[2], "stays", "daily 2024-03-02"),
        fate(&ids[1], "goes", ""),
        fate(&ids[0], "goes", ""),
    ];
    let plan = host.json(&[&by_days[..], &["--dry-run"]].concat());
    assert_eq!((fates(&plan), &plan["ordered"]), (planned.into(), &false.into()));
    // Where nobody can be asked nothing is ordered, and the plan is shown all the same.
    let alone = host.run(&by_days);
    assert!(alone.told(codes::USAGE, "home").err.contains("--yes"), "{}", alone.err);
    assert!(
        alone.out.contains("3 backups are to go") && alone.out.contains("daily 2024-03-02"),
        "{}",
        alone.out
    );
    let mut typist = host.at_a_terminal(&by_days);
    typist.question("Prune 3 of home?");
    typist.type_in("y");
    typist.end().0.told(codes::USAGE, "home");
    for id in &ids {
        assert_eq!(marks(&host, id), serde_json::json!(["checked"]), "something was ordered");
    }

    // One is protected between the plan and the answer.
    let mut typist = host.at_a_terminal(&by_days);
    typist.question("Prune 3 of home?");
    host.run(&["protect", "home", &ids[1]]).must(0);
    typist.type_in("yes");
    let (said, _) = typist.end();
    assert!(said.must(0).out.contains("2 go with the next collection"), "{}", said.out);
    assert_eq!(marks(&host, &ids[1]), serde_json::json!(["checked", "protect"]));

    let again = host.json(&[&by_days[..], &["--yes"]].concat());
    let left = [
        fate(&ids[4], "stays", "daily 2024-03-09"),
        fate(&ids[3], "going", ""),
        fate(&ids[2], "stays", "daily 2024-03-02"),
        fate(&ids[1], "stays", "protected"),
        fate(&ids[0], "going", ""),
    ];
    assert_eq!((fates(&again), &again["ordered"]), (left.into(), &false.into()));
    let mut doomed = [&ids[0], &ids[3]];
    doomed.sort();
    let before = world.objects("home/backups");
    let would = host.json(&["gc", "home", "--dry-run"]);
    assert_eq!((&would["ended"], &would["doomed"]), (&"planned".into(), &serde_json::json!(doomed)));
    assert_eq!(world.objects("home/backups"), before);
    assert!(world.objects("home/condemned").is_empty(), "a dry run condemned something");
    assert_eq!(host.json(&["gc", "home"])["doomed"], serde_json::json!(doomed));

    // The rules of the configuration, and those of the command line in their place.
    let mut config = std::fs::File::options().append(true).open(world.path("a.toml")).unwrap();
    config.write_all(b"[vaults.home.keep]\nlast = 1\n").unwrap();
    assert_eq!(fates(&host.json(&["prune", "home", "--dry-run", "--unverified"]))[1].1, "goes");
    assert_eq!(
        fates(&host.json(&["prune", "home", "--dry-run", "--unverified", "--keep-last", "2"]))[1].1,
        "stays"
    );
    let all = host.json(&["prune", "home", "--domain", "web1", "--yes", "--unverified"]);
    assert_eq!((fates(&all)[1].1.as_str(), &all["ordered"]), ("ordered", &true.into()));
    host.run(&["prune", "home", "--domain", "web9", "--yes"]).told(codes::CANNOT_FIND_MACHINE, "web9");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_a_damaged_chunk_is_verified_no_more_and_the_verified_older_one_stays() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let vault = host.open("home").await;
    // The later, the larger: so that one knows which pack is whose.
    let oldest = backup_of(&vault, &noise(1, 3 * C), "2024-03-01T08:00:00Z").await;
    let older = backup_of(&vault, &noise(2, 9 * C), "2024-03-02T08:00:00Z").await;
    let newest = backup_of(&vault, &noise(3, 27 * C), "2024-03-03T08:00:00Z").await;
    let keep_one = |host: &Host| fates(&host.json(&["prune", "home", "--keep-last", "1", "--dry-run"]));

    assert_eq!(host.json(&["verify", "home", "--quick"])["verified"], serde_json::json!([]));
    let row = host.json(&["verify", "home", &older[24..]]);
    assert_eq!((&row["verified"], &row["whole"]), (&serde_json::json!([older]), &serde_json::json!([older])));
    assert!(row["packs_read"].as_u64() < row["packs_there"].as_u64(), "it read what others need: {row}");
    assert_eq!(marks(&host, &newest), serde_json::json!(["checked"]));
    assert_eq!(
        keep_one(&host),
        [
            fate(&newest, "stays", "last 1"),
            fate(&older, "stays", "newest verified"),
            fate(&oldest, "goes", "")
        ]
    );
    assert_eq!(host.json(&["verify", "home"])["verified"].as_array().unwrap().len(), 3);
    assert_eq!(
        keep_one(&host)[..2],
        [fate(&newest, "stays", "last 1, newest verified"), fate(&older, "goes", "")]
    );
    assert!(host.run(&["show", "home", &newest]).must(0).out.contains("read since"));

    damage(&world.objects("home/data")[0]);
    host.run(&["verify", "home"]).must(codes::VAULT_DAMAGED.0);
    host.run(&["verify", "home", &newest]).must(codes::VAULT_DAMAGED.0);
    assert_eq!(marks(&host, &newest), serde_json::json!(["checked", "hurt"]));
    assert_eq!(
        keep_one(&host),
        [
            fate(&newest, "stays", "damaged"),
            fate(&older, "stays", "last 1, newest verified"),
            fate(&oldest, "goes", "")
        ]
    );
    // What is gone since it was verified takes nobody's place either, though no mark says it yet.
    std::fs::remove_file(&world.objects("home/data")[1]).unwrap();
    assert_eq!(marks(&host, &older), serde_json::json!(["checked", "verified"]));
    let ordered = host.json(&["prune", "home", "--keep-last", "1", "--yes"]);
    assert_eq!(
        fates(&ordered)[1..],
        [fate(&older, "stays", "damaged"), fate(&oldest, "stays", "last 1, newest verified")]
    );
}

/// A full disk or a power cut leaves files that are too short: their names and tables say that all is there.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_pack_was_cut_off_takes_nobodys_place_and_the_last_whole_one_is_not_collected() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let vault = host.open("home").await;
    let older = backup_of(&vault, &noise(1, 3 * C), "2024-03-01T08:00:00Z").await;
    let newest = backup_of(&vault, &noise(2, 9 * C), "2024-03-02T08:00:00Z").await;
    let by_last = ["prune", "home", "--keep-last", "1", "--unverified"];
    let pack = world.objects("home/data").remove(0);
    let bytes = std::fs::read(&pack).unwrap();
    assert!(bytes.len() > 9 * C, "not the newest's pack");

    // Cut off while somebody thinks about the plan.
    let mut typist = host.at_a_terminal(&by_last);
    typist.question("Prune 1 of home?");
    for length in [0, bytes.len() - 1000] {
        std::fs::write(&pack, &bytes[..length]).unwrap();
        let plan = host.json(&[&by_last[..], &["--dry-run"]].concat());
        assert_eq!(fates(&plan), [fate(&newest, "stays", "damaged"), fate(&older, "stays", "last 1")]);
    }
    typist.type_in("yes");
    typist.end().0.must(0);
    assert_eq!(marks(&host, &older), serde_json::json!(["checked"]), "the second judgement was not one");

    // It was ordered when both were whole: then the damage was found.
    std::fs::write(&pack, &bytes).unwrap();
    host.run(&[&by_last[..], &["--yes"]].concat()).must(0);
    assert_eq!(marks(&host, &older), serde_json::json!(["checked", "prune"]));
    std::fs::write(&pack, &bytes[..1000]).unwrap();
    let found = host.run(&["check", "home"]);
    assert!(found.must(codes::VAULT_DAMAGED.0).out.contains("HURT"), "{}", found.out);
    let collected = host.json(&["gc", "home"]);
    assert_eq!(
        (&collected["doomed"], &collected["spared"]),
        (&serde_json::json!([]), &serde_json::json!([older]))
    );
    // Where both go, both go.
    host.run(&["prune", "home", &newest, "--last"]).must(0);
    assert_eq!(host.json(&["gc", "home"])["doomed"].as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vault_is_verified_slice_by_slice_and_this_host_knows_where_it_stopped() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let vault = host.open("home").await;
    let mut ids = Vec::new();
    for seed in 0..3 {
        ids.push(backup_of(&vault, &noise(seed, 3 * C), "2024-03-01T08:00:00Z").await);
    }
    let (mut read, mut verified) = (0, 0);
    for slice in ["1/3", "2/3", "3/3"] {
        let row = host.json(&["verify", "home", "--slice", slice]);
        assert_eq!((&row["slice"], &row["clean"]), (&slice.into(), &true.into()));
        read += row["packs_read"].as_u64().unwrap();
        verified += row["verified"].as_array().unwrap().len();
        assert_eq!(read == row["packs_there"].as_u64().unwrap(), verified == 3, "{row}");
    }
    assert_eq!(verified, 3);
    for id in &ids {
        assert_eq!(marks(&host, id), serde_json::json!(["checked", "verified"]));
    }
    let known = host.state.join("vaults/home.readings.json");
    assert!(known.is_file(), "the next slice will not know of these");
    std::fs::write(&known, "{").unwrap();
    host.run(&["verify", "home", "--slice", "1/3"]).told(codes::VAULT_DAMAGED, "readings.json");
    host.run(&["forget", "home"]).must(0);
    assert!(!known.exists());
}
