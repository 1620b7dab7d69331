//! What is refused, by its name and with the way on.

use vmkeep_host::codes;
use vmkeep_vault::lease::{Holder, Lease};

use crate::support::{World, backup, noise};

#[test]
fn what_does_not_make_sense_is_refused_by_name() {
    let world = World::new();
    let host = world.host("a");
    host.run(&["list", "nowhere"]).told(codes::CANNOT_FIND_CONFIGURATION_ENTRY, "nowhere");
    assert!(host.run(&["list", "nowhere"]).err.contains("home, other"), "it does not say which there are");
    host.run(&["list", "../etc"]).told(codes::CANNOT_FIND_CONFIGURATION_ENTRY, "../etc");
    for url in [
        "ftp://h/v",
        "file://relative/v",
        "file:backup",
        "file:/backup",
        "sftp://me:hush-hush@h/v",
        "file:///a/../b",
    ] {
        let said = host.run(&["list", url]);
        said.told(codes::USAGE, "address");
        assert!(!said.err.contains("hush"), "a secret was repeated: {}", said.err);
    }
    for words in [
        &["init", "home", "--plain", "--key-file", "k"][..],
        &["check", "home", "--read", "--quick"],
        &["repair", "home", "--header", "--index"],
        &["gc", "home", "--worth", "101"],
        &["export", "home", "x"],
        &["prune", "home"],
        &["prune", "home", "--keep-last", "0"],
        &["prune", "home", "0123abcd", "--keep-last", "1"],
        &["prune", "home", "--keep-last", "1", "--last"],
        &["prune", "home", "--keep-last", "1", "--time-zone", "Europe/Atlantis"],
        &["verify", "home", "--slice", "8/7"],
        &["verify", "home", "--quick", "--slice", "1/7"],
        &["verify", "home", "0123abcd", "--slice", "1/7"],
        &["key", "add", "home", "--role", "king"],
        &["repair", "home", "--header", "--id", "x"],
    ] {
        host.run(words).must(codes::USAGE.0);
    }
    host.run(&["init", "home", "--plain"]).told(codes::USAGE, "home");
    host.run(&["attach", "home", "--new-key-file", "k"]).told(codes::USAGE, "home");
    assert!(!world.path("home").exists(), "a folder was made for something that was refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_without_a_vault_and_a_place_with_one_are_told_apart() {
    let world = World::new();
    let host = world.host("a");
    let plain = format!("file://{}", world.path("plain").display());
    // What is not mounted is not there; what is empty holds none.
    let said = host.run(&["list", &plain]);
    assert!(!said.told(codes::VAULT_UNREACHABLE, &plain).err.contains(": :"), "{}", said.err);
    std::fs::create_dir(world.path("plain")).unwrap();
    host.run(&["attach", &plain]).told(codes::NO_VAULT, &plain);
    assert!(!host.state.join("vaults").exists(), "something was remembered of nothing");
    let made = host.json(&["init", &plain, "--plain"]);
    assert!(made["cipher"].is_null());
    let again = world.host("b");
    again.run(&["init", &plain, "--plain"]).told(codes::VAULT_EXISTS, &plain);
    let known = host.run(&["init", &plain, "--plain"]);
    assert!(known.told(codes::VAULT_EXISTS, &plain).err.contains("vault forget"), "{}", known.err);
    assert!(host.run(&["forget", &plain]).must(0).out.contains("forgotten"));
    assert!(host.run(&["forget", &plain]).must(0).out.contains("knew nothing"));
    host.run(&["init", &plain, "--plain"]).told(codes::VAULT_EXISTS, &plain);
    host.run(&["show", &plain, "0123abcd"]).told(codes::NO_SUCH_BACKUP, "0123abcd");
    host.run(&["list", &plain, "web9"]).told(codes::CANNOT_FIND_MACHINE, "web9");

    let text = std::fs::read_to_string(world.path("a.toml")).unwrap();
    std::fs::write(world.path("a.toml"), format!("{text}[vaults.open]\nurl = {plain:?}\n")).unwrap();
    let vault = host.open("open").await;
    let ids = [
        backup(&vault, &noise(1, 100_000), None).await.to_string(),
        backup(&vault, &noise(2, 100_000), None).await.to_string(),
    ];
    // Both were made in one second.
    host.run(&["show", "open", &ids[0][..6]]).told(codes::AMBIGUOUS_NAME, &ids[0][..6]);
    host.run(&["show", "open", &ids[0][..3]]).told(codes::NO_SUCH_BACKUP, &ids[0][..3]);
    let files = world.path("files");
    let export = ["export", "open", &ids[0], "--disks", "vdz", "--to", files.to_str().unwrap()];
    host.run(&export).told(codes::NO_SUCH_DISK, "vdz");
    let file = world.file("file", "", 0o600);
    host.run(&["export", "open", &ids[0], "--to", &format!("{file}/x")]).told(codes::UNSAFE_PATH, &file);
}

#[test]
fn a_vault_that_was_exchanged_is_refused_until_its_header_is_back_or_it_is_forgotten() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let header = |world: &World| {
        let mut found = world.objects("home");
        found.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("vault."));
        found.remove(0)
    };
    let path = header(&world);
    let text = std::fs::read_to_string(&path).unwrap();
    // Encryption is not turned off by replacing a file, and no key is asked for before that is known.
    let forged = text.replace("xchacha20-poly1305", "none");
    std::fs::write(&path, &forged).unwrap();
    host.run(&["list", "home"]).told(codes::VAULT_EXCHANGED, "home");
    // A host that never knew it is not told lies either.
    world.host("b").run(&["list", "home"]).told(codes::VAULT_EXCHANGED, "home");
    let repaired = host.json(&["repair", "home", "--header"]);
    assert_eq!(repaired["header"], "replaced");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    host.run(&["list", "home"]).must(0);
    std::fs::remove_file(&path).unwrap();
    host.run(&["list", "home"]).told(codes::NO_VAULT, "home");
    assert_eq!(host.json(&["repair", "home", "--header"])["header"], "put");

    // Another vault in its place, as when another disk is mounted there.
    std::fs::rename(world.path("home"), world.path("away")).unwrap();
    let new = world.host("c");
    let words = world.path("c.words");
    new.run(&["init", "home", "--recovery-file", words.to_str().unwrap()]).must(0);
    host.run(&["stats", "home"]).told(codes::VAULT_EXCHANGED, "home");
    // Before a key is tried on it: somebody else's vault is no place for one.
    let other = world.file("other-key", &"o".repeat(64), 0o600);
    host.run(&["stats", "home", "--key-file", &other]).told(codes::VAULT_EXCHANGED, "home");
    host.run(&["forget", "home"]).must(0);
    host.run(&["stats", "home"]).must(0);

    let path = header(&world);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"min_reader\":1", "\"min_reader\":99")).unwrap();
    world.host("d").run(&["list", "home"]).told(codes::VAULT_TOO_NEW, "home");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collection_goes_away_while_another_is_at_work_and_comes_again_when_that_is_given_up() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let vault = host.open("home").await;
    backup(&vault, &noise(1, 100_000), None).await;
    let other = Holder { host: "elsewhere".into(), purpose: "gc".into(), collects: true };
    // It dies: its lease is never ended.
    let lease = Lease::begin(&vault, &other).await.unwrap().id().to_string();
    let said = host.run(&["gc", "home"]);
    assert!(said.must(codes::VAULT_BUSY.0).out.contains(&lease), "{}", said.out);
    host.run(&["repair", "home", "--index"]).must(codes::VAULT_BUSY.0);
    let leases = host.json(&["leases", "home"]);
    assert_eq!((&leases[0]["host"], &leases[0]["collects"]), (&"elsewhere".into(), &true.into()));
    host.run(&["revoke", "home", "ffffffff"]).told(codes::INVALID_STATE, "ffffffff");
    host.run(&["revoke", "home", &lease[..8]]).must(0);
    host.run(&["gc", "home"]).must(0);
    assert_eq!(host.json(&["leases", "home"]), serde_json::json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_copied_onto_itself_or_into_the_open_by_mistake() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let vault = host.open("home").await;
    let id = backup(&vault, &noise(1, 100_000), None).await.to_string();
    host.run(&["copy", "home", "home"]).told(codes::VAULT_COPY_REFUSED, "home");
    let plain = format!("file://{}", world.path("plain").display());
    host.run(&["init", &plain, "--plain"]).must(0);
    host.run(&["copy", "home", &plain]).told(codes::VAULT_COPY_REFUSED, &plain);
    let copied = host.json(&["copy", "home", &plain, "--allow-plain", "--domain", "web1"]);
    assert_eq!((&copied[0]["backup"], &copied[0]["fate"]), (&id.as_str().into(), &"copied".into()));
    // One that is pruned there stays away for good.
    host.run(&["prune", &plain, &id, "--last"]).must(0);
    let said = host.run(&["copy", "home", &plain, "--allow-plain"]);
    assert!(said.must(codes::VAULT_COPY_REFUSED.0).out.contains("pruned in the other vault"), "{}", said.out);
}
