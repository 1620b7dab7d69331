//! How vaults are made and opened, and by whom they are not.

use std::os::unix::fs::MetadataExt as _;

use vmkeep_host::codes;

use crate::support::{World, backup, noise, words};

#[tokio::test(flavor = "multi_thread")]
async fn a_vault_is_attached_from_another_host_by_its_key_and_by_no_other() {
    let world = World::new();
    let host = world.host("a");
    let recovery = world.path("words");
    let made = host.json(&["init", "home", "--recovery-file", recovery.to_str().unwrap()]);
    assert_eq!((&made["cipher"], &made["key_file_made"]), (&"xchacha20-poly1305".into(), &true.into()));
    for file in [&recovery, &world.path("home.key"), &host.state.join("vaults/home.json")] {
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o600, "{file:?}");
    }
    assert!(!made.to_string().contains(&std::fs::read_to_string(&recovery).unwrap()[..20]));
    backup(&host.open("home").await, &noise(1, 100_000), None).await;

    let away = world.host("b");
    let attached = away.json(&["attach", "home"]);
    assert_eq!((&attached["id"], &attached["backups"]["web1"]), (&made["id"], &1.into()));
    assert!(away.state.join("vaults/home.json").is_file(), "nothing is remembered");

    let wrong = world.file("wrong.key", &"w".repeat(64), 0o600);
    away.run(&["list", "home", "--key-file", &wrong]).told(codes::VAULT_KEY_WRONG, "home");
    // Its address alone names no key, and there is nobody to ask.
    let url = format!("file://{}", world.path("home").display());
    let bare = world.host("c");
    std::fs::write(world.path("c.toml"), format!("state_dir = {:?}\n", bare.state)).unwrap();
    bare.run(&["list", &url]).told(codes::VAULT_KEY_WRONG, &url);
    let short = world.file("short.key", "short", 0o600);
    let open = world.file("open.key", &"o".repeat(64), 0o640);
    for refused in [&short, &open, &"/nonexistent/key".to_owned(), &"/dev/zero".to_owned()] {
        bare.run(&["list", &url, "--key-file", refused]).told(codes::VAULT_KEY_REFUSED, refused);
    }
    let key = world.path("home.key");
    bare.run(&["list", &url, "--key-file", key.to_str().unwrap()]).must(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_added_and_removed_and_the_words_open_what_no_key_opens() {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    let id = backup(&host.open("home").await, &noise(1, 100_000), None).await.to_string();
    let writer = world.path("writer.key");
    let writer = writer.to_str().unwrap();
    let added = host.json(&[
        "key",
        "add",
        "home",
        "--new-key-file",
        writer,
        "--role",
        "writer",
        "--label",
        "web host",
    ]);
    let keys = host.json(&["key", "list", "home"]);
    let row = |role: &str| keys.as_array().unwrap().iter().find(|key| key["role"] == role).unwrap().clone();
    assert_eq!((&row("writer")["id"], &row("writer")["label"]), (&added["key"], &"web host".into()));

    // A writer's key reads and asks; it orders nothing and collects nothing.
    host.run(&["check", "home", "--key-file", writer]).must(0);
    let prune = ["prune", "home", &id, "--last", "--key-file", writer];
    assert!(host.run(&prune).told(codes::VAULT_MAY_NOT, "home").err.contains("--ask"));
    host.run(&["gc", "home", "--key-file", writer]).told(codes::VAULT_MAY_NOT, "home");
    assert_eq!(host.json(&[&prune[..], &["--ask"]].concat())[0]["fate"], "asked");

    // The last full key is not taken away by mistake.
    let full = row("full")["id"].as_str().unwrap().to_owned();
    host.run(&["key", "remove", "home", &full]).told(codes::INVALID_STATE, &full);
    host.run(&["key", "remove", "home", "ffffffff"]).told(codes::VAULT_KEY_WRONG, "ffffffff");
    host.run(&["key", "remove", "home", &full[..8], "--last"]).must(0);
    host.run(&["list", "home"]).told(codes::VAULT_KEY_WRONG, "home");
    let words = world.path("home.words");
    let passphrase = world.file("passphrase", "correct horse battery\n", 0o600);
    let again =
        ["attach", "home", "--recovery-file", words.to_str().unwrap(), "--new-passphrase-file", &passphrase];
    assert!(host.json(&again)["new_key"].is_string());
    let away = world.host("b");
    away.run(&["list", "home", "--passphrase-file", &passphrase]).must(0);
    let wrong = world.file("wrong", "correct horse\n", 0o600);
    away.run(&["list", "home", "--passphrase-file", &wrong]).told(codes::VAULT_KEY_WRONG, "home");
    let two = world.file("two", "correct\nhorse\n", 0o600);
    away.run(&["list", "home", "--passphrase-file", &two]).told(codes::VAULT_KEY_REFUSED, &two);
    // Words with a mistake in them are told from words of another vault.
    let text = std::fs::read_to_string(&words).unwrap();
    let typo = world.file("typo", &text.replacen(' ', " vmkeep ", 1), 0o600);
    let said = away.run(&["list", "home", "--recovery-file", &typo]);
    assert!(said.told(codes::VAULT_KEY_WRONG, "home").err.contains("24 words"), "{}", said.err);
}

#[test]
fn the_recovery_key_is_typed_in_again_at_the_terminal_or_nothing_is_made() {
    let world = World::new();
    let host = world.host("a");
    let url = format!("file://{}", world.path("typed").display());
    // Where nobody can type, nothing is made, and nobody waits.
    let alone = host.run(&["init", &url, "--key-file", world.path("k").to_str().unwrap()]);
    assert!(alone.told(codes::USAGE, &url).err.contains("--recovery-file"), "{}", alone.err);
    assert!(!world.path("k").exists(), "a key was made for no vault");

    let mut typist = host.at_a_terminal(&["init", &url]);
    typist.question("New passphrase for");
    typist.type_in("open sesame");
    typist.question("Once more");
    typist.type_in("open sesame!");
    typist.question("New passphrase for");
    typist.type_in("open sesame");
    typist.question("Once more");
    typist.type_in("open sesame");
    let shown = words(&typist.question("Press Enter"));
    typist.type_in("");
    typist.question("from what you have written");
    // Two words exchanged.
    let mut wrong: Vec<&str> = shown.split(' ').collect();
    wrong.swap(3, 4);
    typist.type_in(&wrong.join(" "));
    let shown_again = words(&typist.question("Press Enter"));
    assert_eq!(shown_again, shown, "it is another key now");
    assert!(world.objects("typed").is_empty(), "something was put before the key was confirmed");
    typist.type_in("");
    typist.question("from what you have written");
    // On two lines, however it is spelt.
    let all: Vec<&str> = shown.split(' ').collect();
    typist.type_in(&all[..10].join("  ").to_uppercase());
    typist.type_in(&all[10..].join(" "));
    let (said, terminal) = typist.end();
    said.must(0);
    assert!(!terminal.contains("sesame"), "the passphrase was shown: {terminal}");
    assert!(
        !said.out.contains(&shown[..20]) && !said.err.contains(&shown[..20]),
        "the key left the terminal"
    );

    let mut typist = host.at_a_terminal(&["list", &url]);
    typist.question("Passphrase of");
    typist.type_in("open sesame");
    let (said, terminal) = typist.end();
    assert!(said.must(0).out.contains("No backups") && !terminal.contains("sesame"), "{terminal}");
    let mut typist = host.at_a_terminal(&["list", &url, "--recovery"]);
    typist.question("The 24 words of");
    typist.type_in(&shown);
    typist.end().0.must(0);
    let mut typist = host.at_a_terminal(&["list", &url]);
    typist.question("Passphrase of");
    typist.type_in("open barley");
    typist.end().0.told(codes::VAULT_KEY_WRONG, &url);
}

#[test]
fn a_recovery_key_that_is_never_confirmed_leaves_nothing() {
    let world = World::new();
    let host = world.host("a");
    let url = format!("file://{}", world.path("given-up").display());
    let key = world.file("k", &"k".repeat(64), 0o600);
    let mut typist = host.at_a_terminal(&["init", &url, "--key-file", &key]);
    for _ in 0..3 {
        typist.question("Press Enter");
        typist.type_in("");
        typist.question("from what you have written");
        typist.type_in(&"abandon ".repeat(24));
    }
    typist.end().0.told(codes::VAULT_KEY_REFUSED, &url);
    assert!(world.objects("given-up").is_empty());
    assert!(!host.state.join("vaults").exists(), "a vault is remembered that was never made");
}
