use std::path::Path;

use super::*;

fn user() -> Surroundings {
    Surroundings { env: [("HOME".to_owned(), "/home/ada".into())].into(), uid: 1000 }
}

fn root() -> Surroundings {
    Surroundings { env: [("HOME".to_owned(), "/root".into())].into(), uid: 0 }
}

fn with(mut around: Surroundings, key: &str, value: &str) -> Surroundings {
    around.env.insert(key.to_owned(), value.into());
    around
}

fn resolve(text: &str, around: &Surroundings) -> Result<Config, ConfigError> {
    Config::resolve(File::parse(text, Path::new("vmkeep.toml"))?, None, &Overrides::default(), around)
}

#[test]
fn an_ordinary_user_needs_no_configuration() {
    let config = resolve("", &with(user(), "XDG_RUNTIME_DIR", "/run/user/1000")).unwrap();
    assert_eq!(config.state_dir, Path::new("/home/ada/.local/state/vmkeep"));
    assert_eq!(config.socket, Path::new("/run/user/1000/vmkeep/vmkeepd.sock"));
    assert_eq!(config.connect, "qemu:///session");
    assert_eq!(config.roots[0], Path::new("/home/ada/.local/state/vmkeep/backups"));
    let config = resolve("", &with(user(), "XDG_STATE_HOME", "/s")).unwrap();
    assert_eq!(config.state_dir, Path::new("/s/vmkeep"));
    assert_eq!(config.socket, Path::new("/s/vmkeep/run/vmkeepd.sock"));
}

#[test]
fn root_needs_no_configuration() {
    // Whatever the environment of the shell that root came from says.
    let around = with(with(root(), "XDG_STATE_HOME", "/s"), "XDG_RUNTIME_DIR", "/run/user/1000");
    let config = resolve("", &around).unwrap();
    assert_eq!(config.state_dir, Path::new("/var/lib/vmkeep"));
    assert_eq!(config.socket, Path::new("/run/vmkeep/vmkeepd.sock"));
    assert_eq!(config.connect, "qemu:///system");
}

#[test]
fn a_homeless_user_is_told_what_is_missing() {
    let error = resolve("", &Surroundings { uid: 1000, ..Surroundings::default() }).unwrap_err();
    assert_eq!(error.code(), codes::MISSING_PARAMETER_IN_CONFIG_FILE);
    assert!(error.to_string().contains("HOME"), "{error}");
}

#[test]
fn an_unknown_key_is_named_with_its_line() {
    let error = resolve("connect = \"qemu:///session\"\n\n[limits]\njobs = 2\nbandwith = \"5M\"\n", &user())
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("bandwith") && text.contains("line 5"), "{text}");
    assert_eq!(error.code(), codes::UNSUPPORTED_CONFIGURATION_PARAMETER);
    let text = resolve("[limit]\njobs = 2\n", &user()).unwrap_err().to_string();
    assert!(text.contains("`limit`") && text.contains("line 1"), "{text}");
}

#[test]
fn a_wrong_value_is_named() {
    for (text, word) in [
        ("[limits]\njobs = 0", "limits.jobs"),
        ("[limits]\nmemory = \"lots\"", "limits.memory"),
        ("[limits]\nwatch = \"a while\"", "limits.watch"),
        ("[limits]\nkeep_free = \"some\"", "limits.keep_free"),
        ("[limits]\nkeep_free_percent = 101", "limits.keep_free_percent"),
        ("[log]\nformat = \"xml\"", "xml"),
        ("[targets]\nroots = []", "targets.roots"),
        ("[targets]\nroots = [\"backups\"]", "absolute"),
        ("[targets]\nroots = [\"/srv/../etc\"]", "absolute"),
        ("state_dir = \"here\"", "state_dir"),
        ("state_dir = 7", "line 1"),
        ("this is not TOML", "line 1"),
    ] {
        let error = resolve(text, &user()).unwrap_err();
        assert_eq!(error.code(), codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "{text}");
        assert!(error.to_string().contains(word), "{text}: {error}");
    }
}

#[test]
fn what_stays_free_is_the_larger_of_two_marks_that_may_each_be_set() {
    let low = |text: &str| resolve(text, &user()).unwrap().limits.keep_free;
    assert_eq!(low(""), LowWater::default());
    let set = low("[limits]\nkeep_free = \"256M\"\n");
    assert_eq!((set.bytes, set.percent), (256 << 20, LowWater::default().percent));
    let none = low("[limits]\nkeep_free = \"0\"\nkeep_free_percent = 0\n");
    assert_eq!(none.mark(1 << 40), 0);
}

#[test]
fn folders_may_be_named_as_file_urls_and_by_no_other_protocol() {
    let text = "[targets]\nroots = [\"file:///srv/backups\"]\n[snapshot]\nram_disk = \"file:///mnt/ram\"\n";
    let config = resolve(text, &user()).unwrap();
    assert_eq!(config.roots[0], Path::new("/srv/backups"));
    assert_eq!(config.snapshot.ram_disk.as_deref(), Some(Path::new("/mnt/ram")));
    let error = resolve("[targets]\nroots = [\"ssh://backup/srv\"]\n", &user()).unwrap_err();
    assert_eq!(error.code(), codes::UNSUPPORTED_FILE_TRANSFER_PROTOCOL);
    assert!(error.to_string().contains("targets.roots") && error.to_string().contains("ssh"), "{error}");
    assert!(Fault::from(error).remedy.contains("file://"));
}

#[test]
fn the_command_line_wins_over_the_environment_and_that_over_the_file() {
    let file = File::parse("connect = \"test:///default\"\nstate_dir = \"/file\"\n", Path::new("f")).unwrap();
    let around = with(user(), "VMKEEP_STATE_DIR", "/env");
    let config = Config::resolve(file.clone(), None, &Overrides::default(), &around).unwrap();
    assert_eq!((config.state_dir.to_str(), config.connect.as_str()), (Some("/env"), "test:///default"));
    let overrides = Overrides {
        state_dir: Some("/flag".into()),
        connect: Some("qemu:///session".into()),
        ..Overrides::default()
    };
    let config = Config::resolve(file, None, &overrides, &around).unwrap();
    assert_eq!((config.state_dir.to_str(), config.connect.as_str()), (Some("/flag"), "qemu:///session"));
}

#[test]
fn a_remote_hypervisor_is_refused_with_a_code() {
    for uri in [
        "qemu+ssh://host/system",
        "qemu+ssh:///system",
        "qemu://host/system",
        "qemu+tls://host/system",
        "qemu+tcp:///system",
        "qemu+libssh2://host/system",
        "qemu+ext://host/system",
    ] {
        let error = check_uri(uri).unwrap_err();
        assert_eq!(error.code(), codes::REMOTE_HYPERVISOR, "{uri}");
        assert!(!Fault::from(error).remedy.is_empty());
    }
    for uri in [
        "qemu:///system",
        "qemu:///session",
        "qemu:///embed?root=/x",
        "qemu+unix:///session?socket=/x/y",
        "test:///default",
    ] {
        check_uri(uri).unwrap();
    }
    for uri in ["", "system", "xen:///system", "lxc:///"] {
        assert_eq!(check_uri(uri).unwrap_err().code(), codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "{uri}");
    }
}

#[test]
fn a_socket_path_too_long_for_a_socket_is_refused_before_anything_starts() {
    let text = format!("socket = \"/{}\"", "s".repeat(107));
    assert!(resolve(&text, &user()).unwrap_err().to_string().contains("107 bytes"));
    assert!(resolve(&format!("socket = \"/{}\"", "s".repeat(106)), &user()).is_ok());
}

#[test]
fn a_file_that_was_named_must_exist_and_the_usual_one_need_not() {
    let dir = tempfile::tempdir().unwrap();
    let around = with(user(), "XDG_CONFIG_HOME", dir.path().to_str().unwrap());
    assert_eq!(Config::load(&Overrides::default(), &around).unwrap().file, None);
    let named = Overrides { config: Some(dir.path().join("none.toml")), ..Overrides::default() };
    let error = Config::load(&named, &around).unwrap_err();
    assert_eq!(error.code(), codes::CANNOT_FIND_CONFIGURATION_ENTRY);
    std::fs::create_dir(dir.path().join("vmkeep")).unwrap();
    std::fs::write(dir.path().join("vmkeep/vmkeep.toml"), "[limits]\njobs = 9\n").unwrap();
    assert_eq!(Config::load(&Overrides::default(), &around).unwrap().limits.jobs, 9);
}

#[test]
fn restored_images_go_below_an_allowed_root() {
    let config = resolve("[targets]\nroots = [\"/srv/b\"]\nrestore = \"/srv/b/images\"", &user()).unwrap();
    assert_eq!(config.roots, [Path::new("/srv/b")]);
    let config = resolve("[targets]\nroots = [\"/srv/b\"]", &user()).unwrap();
    assert_eq!(config.roots.len(), 2);
    assert!(config.roots.contains(&config.restore_dir));
}

#[test]
fn the_documented_configuration_is_understood_and_names_every_key() {
    let page = include_str!("../../../docs/configuration.md");
    let text = page.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let config = resolve(text, &root()).unwrap();
    let bare = resolve("", &root()).unwrap();
    // The example is the default, but for what has none.
    let limits = Limits { memory: None, ..config.limits.clone() };
    let snapshot = SnapshotDefaults { ram_disk: None, overlay_dir: None, ..config.snapshot.clone() };
    let backup = BackupDefaults { vault: None, scratch_dir: None, ..config.backup.clone() };
    let restore = RightsSettings::default();
    assert_ne!(config.restore, restore);
    let named: Vec<&str> = config.vaults.keys().map(VaultName::as_str).collect();
    assert_eq!(named, ["bucket", "offsite"]);
    assert_eq!(Config { limits, snapshot, backup, restore, vaults: BTreeMap::new(), ..config }, bare);
    for key in [
        "state_dir",
        "socket",
        "connect",
        "roots",
        "restore",
        "jobs",
        "jobs_per_root",
        "memory",
        "memory_time",
        "bandwidth",
        "freeze",
        "ram_disk",
        "overlay_dir",
        "after_reboot",
        "vault",
        "scratch_dir",
        "full_every_days",
        "checkpoints",
        "owner",
        "group",
        "mode",
        "directory_mode",
        "url",
        "key_file",
        "passphrase_file",
        "credentials",
        "identity",
        "known_hosts",
        "ssh_config",
        "allow_volatile",
        "several_hosts",
        "format",
        "level",
    ] {
        assert!(text.lines().any(|line| line.starts_with(&format!("{key} = "))), "{key} is not documented");
    }
}

#[test]
fn the_engine_of_the_store_is_chosen_by_name() {
    assert_eq!(resolve("", &user()).unwrap().engine, EngineName::Sqlite);
    assert_eq!(resolve("[store]\nengine = \"sled\"\n", &user()).unwrap().engine, EngineName::Sled);
    // One that keeps nothing is none to choose.
    for wrong in ["memory", "Sled", ""] {
        let error = resolve(&format!("[store]\nengine = \"{wrong}\"\n"), &user()).unwrap_err();
        assert_eq!(error.code(), codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "{wrong}");
    }
}

#[test]
fn a_vault_is_known_by_its_name_with_all_that_opens_it() {
    let text = "[vaults.home]\nurl = \"file:///srv/vault\"\nkey_file = \"/k\"\nseveral_hosts = true\n\
                [vaults.a-1]\nurl = \"sftp://b@h:2222/v\"\nidentity = \"/i\"\nallow_volatile = true\n";
    let config = resolve(text, &user()).unwrap();
    let names: Vec<&str> = config.vaults.keys().map(VaultName::as_str).collect();
    assert_eq!(names, ["a-1", "home"]);
    let home = &config.vaults[&"home".parse().unwrap()];
    assert_eq!(home.key, Some(KeySource::KeyFile("/k".into())));
    let (away, options) = (&config.vaults[&"a-1".parse().unwrap()], home.options(false));
    assert!(options.several_hosts && !options.allow_volatile && !options.create);
    assert_eq!((away.key.as_ref(), away.identity.as_deref()), (None, Some(Path::new("/i"))));
    assert!(away.options(true).allow_volatile && away.options(true).create);
    assert_eq!((home.label(), away.url.to_string()), ("home".into(), "sftp://b@h:2222/v".into()));
}

#[test]
fn what_stays_in_a_vault_is_said_for_each_and_nothing_is_by_default() {
    let vault = "[vaults.home]\nurl = \"file:///v\"\n";
    let home = |text: &str| {
        let config = resolve(&format!("{vault}{text}"), &user())?;
        Ok::<_, ConfigError>(config.vaults[&"home".parse().unwrap()].keep.clone())
    };
    assert!(home("").unwrap().rules.is_empty());
    let keep =
        "[vaults.home.keep]\nlast = 3\nweekly = 0\nyearly = 2\nwithin = \"14d\"\ntime_zone = \"UTC\"\n";
    let keep = home(keep).unwrap();
    assert_eq!((keep.rules.last, keep.zone), (3, Some(jiff::tz::TimeZone::UTC)));
    assert_eq!(keep.rules.within, Some(Duration::from_secs(14 * 86_400)));
    assert_eq!(keep.rules.periods, [(vmkeep_vault::retention::Period::Year, 2)].into());
    for (key, word) in [
        ("within = \"a while\"", "vaults.home.keep.within"),
        ("time_zone = \"Europe/Atlantis\"", "vaults.home.keep.time_zone"),
        ("dayly = 7", "dayly"),
        ("daily = -1", "u32"),
    ] {
        let error = home(&format!("[vaults.home.keep]\n{key}\n")).unwrap_err();
        assert_eq!(error.code(), codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "{key}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn what_is_wrong_about_a_vault_is_named_and_a_secret_in_its_address_is_not_repeated() {
    let url = "url = \"file:///v\"";
    for (text, word) in [
        (format!("[vaults.Home]\n{url}"), "vaults.Home"),
        (format!("[vaults.\"../x\"]\n{url}"), "small letters"),
        (format!("[vaults.{}]\n{url}", "x".repeat(41)), "small letters"),
        (format!("[vaults.v]\n{url}\nkey_files = \"/k\""), "key_files"),
        (format!("[vaults.v]\n{url}\nkey_file = \"k\""), "vaults.v.key_file"),
        (format!("[vaults.v]\n{url}\nkey_file = \"/k\"\npassphrase_file = \"/p\""), "not both"),
        ("[vaults.v]\nurl = \"/srv/vault\"".to_owned(), "vaults.v.url"),
        ("[vaults.v]\nurl = \"ftp://h/v\"".to_owned(), "ftp://"),
        ("[vaults.v]\nurl = \"sftp://b:hush-hush@h/v\"".to_owned(), "password"),
        ("[vaults.v]\nurl = \"s3://b/v?secret=hush-hush\"".to_owned(), "vaults.v.url"),
    ] {
        let error = resolve(&text, &user()).unwrap_err();
        assert_eq!(error.code(), codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "{text}");
        let said = error.to_string();
        assert!(said.contains(word) && !said.contains("hush"), "{text}: {said}");
    }
    let error = resolve("[vaults.v]\nkey_file = \"/k\"\n", &user()).unwrap_err();
    assert_eq!(error.code(), codes::MISSING_PARAMETER_IN_CONFIG_FILE);
    assert!(error.to_string().contains("vaults.v.url"), "{error}");
}
