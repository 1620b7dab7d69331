//! `vmkeep vault import`: what lies in files becomes a backup that is the same, byte for byte.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmkeep_host::codes;

use crate::support::{C, Host, Said, World, noise};

const UUID: &str = "d0d0d0d0-d0d0-40d0-90d0-d0d0d0d0d0d0";

fn tool(program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) {
    let mut command = Command::new(program);
    for arg in args {
        command.arg(arg);
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program}: {output:?}");
}

/// An overlay on a base, in a folder: with what both have, and with zeroes over what the base has. The bytes that it shows.
fn chain(folder: &Path) -> Vec<u8> {
    fs::create_dir_all(folder).unwrap();
    let (raw, base, top) = (folder.join("raw"), folder.join("base.qcow2"), folder.join("vda.qcow2"));
    fs::write(&raw, [noise(1, 20 * C), vec![0; 40 * C], noise(2, 4 * C)].concat()).unwrap();
    tool("qemu-img", &[&"convert", &"-f", &"raw", &"-O", &"qcow2", &raw, &base]);
    // Neighbours are named relatively.
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "vda.qcow2"]);
    assert!(create.current_dir(folder).status().unwrap().success());
    tool(
        "qemu-io",
        &[&"-f", &"qcow2", &"-c", &"write -q -P 90 3M 100k", &"-c", &"write -q -z 128k 200k", &top],
    );
    tool("qemu-img", &[&"convert", &"-f", &"qcow2", &"-O", &"raw", &top, &raw]);
    let shown = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    assert_eq!(
        (shown[C], shown[2 * C], shown[3 << 20]),
        (noise(1, C + 1)[C], 0, 90),
        "it is not what was to be"
    );
    shown
}

fn definition(more: &str) -> String {
    format!(
        "<domain type='kvm'><name>web1</name><uuid>{UUID}</uuid><memory>1</memory><os><type>hvm</type></os><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/old/vda'/>\
         <target dev='vda' bus='virtio'/></disk>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/old/vdb'/>\
         <target dev='vdb' bus='virtio'/></disk>{more}</devices></domain>"
    )
}

/// What the vault has of the backup, written as files.
fn written(host: &Host, world: &World, id: &str) -> PathBuf {
    let to = world.path(&format!("files of {id}"));
    host.run(&["export", "home", id, "--to", to.to_str().unwrap()]).must(0);
    to
}

fn scene() -> (World, Host) {
    let world = World::new();
    let host = world.host("a");
    host.init(&world, "home");
    (world, host)
}

/// Somebody who writes to an image, as a guest does.
struct Writer(Child);

impl Writer {
    fn of(image: &Path, socket: &Path, more: &[&str]) -> Self {
        let mut command = Command::new("qemu-nbd");
        command.args(more).args(["--persistent", "--socket"]).arg(socket).arg(image);
        let mut this = Self(command.stdin(Stdio::null()).spawn().unwrap());
        let end = Instant::now() + Duration::from_secs(180);
        while !socket.exists() {
            assert!(
                this.0.try_wait().unwrap().is_none() && Instant::now() < end,
                "it does not show the image"
            );
            std::thread::yield_now();
        }
        this
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn plain_images_with_all_that_they_stand_on_come_into_a_vault_byte_for_byte() {
    let (world, host) = scene();
    let folder = world.path("images");
    let (vda, vdb) = (chain(&folder), noise(5, 7 * C));
    fs::write(folder.join("vdb.raw"), &vdb).unwrap();
    let xml = world.file("web1.xml", &definition(""), 0o600);
    let image =
        |target: &str, format: &str, file: &str| format!("{target}={format}:{}", folder.join(file).display());
    let (first, second) = (image("vda", "qcow2", "vda.qcow2"), image("vdb", "raw", "vdb.raw"));
    let words = ["import", "home", "--disk", &first, "--disk", &second, "--definition", &xml];
    let imported = host.json(&[&words[..], &["--at", "2024-02-29T12:00:00Z"]].concat());
    assert_eq!((&imported["domain"], &imported["at"]), (&json!("web1"), &json!("2024-02-29T12:00:00Z")));
    let id = imported["backup"].as_str().unwrap().to_owned();
    let shown = host.json(&["show", "home", &id]);
    assert_eq!(shown["backup"]["marks"], json!(["checked"]));
    assert_eq!(shown["backup"]["domain_uuid"], UUID);
    let files = written(&host, &world, &id);
    assert!(fs::read(files.join("vda.raw")).unwrap() == vda, "vda is not what it was");
    assert!(fs::read(files.join("vdb.raw")).unwrap() == vdb, "vdb is not what it was");
    assert_eq!(fs::read_to_string(files.join("domain.xml")).unwrap(), definition(""));
    // Without a time it is that of the last change; what is there is not stored again.
    let changed = jiff::Timestamp::try_from(folder.join("vdb.raw").metadata().unwrap().modified().unwrap());
    let again = host.json(&words);
    assert_eq!(again["at"], json!(changed.unwrap()));
    assert!(again["backup"] != imported["backup"] && again["disks"][0]["stored"] == 0, "{again}");

    // A base that is missing, one disk twice, one that the definition lacks, a guess.
    let said = host.run(&["import", "home", "--disk", &first, "--disk", &first, "--name", "web1"]);
    said.must(codes::USAGE.0);
    let other = image("vdz", "raw", "vdb.raw");
    host.run(&["import", "home", "--disk", &other, "--definition", &xml]).told(codes::NO_SUCH_DISK, "vdz");
    let guess = format!("vda={}", folder.join("vda.qcow2").display());
    for words in [&["--disk", &guess, "--name", "x"][..], &["--disk", &first], &["--name", "x"]] {
        host.run(&[&["import", "home"], words].concat()).must(codes::USAGE.0);
    }
    // What somebody writes to is no backup.
    let writer = Writer::of(&folder.join("vda.qcow2"), &world.path("s"), &["--format", "qcow2"]);
    host.run(&words).told(codes::IMAGE_LOCKED, "vda.qcow2");
    drop(writer);
    fs::rename(folder.join("base.qcow2"), folder.join("elsewhere")).unwrap();
    host.run(&words).told(codes::CHAIN_UNREADABLE, "qcow2");
    assert_eq!(host.json(&["list", "home"])["backups"].as_array().unwrap().len(), 2);
    assert_eq!(host.json(&["leases", "home"]), json!([]), "a lease was left");
}

#[test]
fn an_image_that_somebody_may_write_to_is_refused_and_one_that_is_only_read_is_not() {
    let (world, host) = scene();
    let folder = world.path("images");
    chain(&folder);
    let raw = folder.join("vdb.raw");
    fs::write(&raw, noise(5, 7 * C)).unwrap();
    let (vda, vdb) =
        (format!("vda=qcow2:{}", folder.join("vda.qcow2").display()), format!("vdb=raw:{}", raw.display()));
    let words = ["import", "home", "--disk", &vda, "--disk", &vdb, "--name", "web1"];
    // QEMU lets others read a raw image that it writes to.
    let writer = Writer::of(&raw, &world.path("s"), &["--format", "raw"]);
    let said = host.run(&words);
    assert!(said.told(codes::IMAGE_LOCKED, "vdb.raw").err.contains("qemu-nbd"), "{}", said.err);
    drop(writer);
    // A base as well as what stands on it; and a file that is mounted, by way of a loop device.
    let holder = fs::File::options().write(true).open(folder.join("base.qcow2")).unwrap();
    let mut sleeper = Command::new("sleep").arg("1000").stdin(Stdio::from(holder)).spawn().unwrap();
    let said = host.run(&words);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    assert!(said.told(codes::IMAGE_LOCKED, "base.qcow2").err.contains("sleep"), "{}", said.err);
    if let Some(device) = crate::one::Loop::new(&raw) {
        let name = device.0.file_name().unwrap().to_str().unwrap().to_owned();
        let said = host.run(&words);
        assert!(said.told(codes::IMAGE_LOCKED, "vdb.raw").err.contains(&name), "{}", said.err);
        // The device itself is read while nobody claims it.
        let disk = format!("vdb=raw:{}", device.0.display());
        let words = ["import", "home", "--disk", &disk, "--name", "web1"];
        let exclusively = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let claim = fs::File::options().read(true).custom_flags(exclusively).open(&device.0).unwrap();
        host.run(&words).told(codes::IMAGE_LOCKED, &name);
        drop(claim);
        host.run(&words).must(0);
    }
    // A base is shared by many, who only read it.
    let reader =
        Writer::of(&folder.join("base.qcow2"), &world.path("r"), &["--format", "qcow2", "--read-only"]);
    let imported = host.json(&words);
    drop(reader);
    let files: Vec<PathBuf> = ["vda.qcow2", "base.qcow2"].map(|name| folder.join(name)).into();
    assert_eq!(imported["disks"][0]["files"], json!(files), "what was read is not named");
    assert_eq!(imported["disks"][1]["files"], json!([raw]));
    let said = host.run(&words);
    assert!(said.must(0).out.contains(files[1].to_str().unwrap()), "{}", said.out);
}

#[test]
fn a_backup_without_a_definition_is_not_restored_and_the_way_to_its_files_is_named() {
    let (world, host) = scene();
    fs::write(world.path("vdb.raw"), noise(5, C)).unwrap();
    let disk = format!("vdb=raw:{}", world.path("vdb.raw").display());
    let imported = host.json(&["import", "home", "--disk", &disk, "--name", "web1"]);
    let id = imported["backup"].as_str().unwrap();
    let to = world.path("restored");
    let words =
        ["--offline", "restore", id, "--vault", "home", "--as", "copy", "--folder", to.to_str().unwrap()];
    let said = Said::of(host.vmkeep(&[], &words).stdin(Stdio::null()).output().unwrap());
    let way = format!("vmkeep vault export home {id}");
    assert!(said.told(codes::CANNOT_READ_XML_FILE, id).err.contains(&way), "{}", said.err);
    assert!(!to.exists(), "a folder was made for nothing");

    let xml = world.file("web1.xml", "no definition at all", 0o600);
    let said = host.run(&["import", "home", "--disk", &disk, "--definition", &xml]);
    assert!(
        said.told(codes::CANNOT_READ_XML_FILE, "definition").err.contains("virsh dumpxml"),
        "{}",
        said.err
    );
}

#[test]
fn secrets_come_into_a_vault_without_encryption_only_if_that_is_said() {
    let (world, host) = scene();
    fs::write(world.path("vdb.raw"), noise(5, C)).unwrap();
    let xml = world.file("web1.xml", &definition("<graphics type='vnc' passwd='hush-hush'/>"), 0o600);
    let plain = format!("file://{}", world.path("plain").display());
    host.run(&["init", &plain, "--plain"]).must(0);
    let disk = format!("vdb=raw:{}", world.path("vdb.raw").display());
    let words = ["import", &plain, "--disk", &disk, "--definition", &xml];
    host.run(&words).told(codes::PLAINTEXT_REFUSED, "web1");
    assert_eq!(world.objects("plain/data").len(), 0, "it was put before it was refused");
    host.run(&[&words[..], &["--allow-plain"]].concat()).must(0);
}

/// A backup in a folder, as a snapshot makes it: two images, a definition, firmware variables, a TPM's state, and memory.
fn classic(world: &World) -> (PathBuf, Vec<u8>, Value) {
    let folder = world.path("classic");
    let vda = chain(&folder);
    let xml = definition("<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>");
    fs::write(folder.join("domain.xml"), xml).unwrap();
    fs::write(folder.join("vars.fd"), noise(99, 1000)).unwrap();
    fs::write(folder.join("tpm.state"), noise(98, 500)).unwrap();
    fs::write(folder.join("memory"), noise(97, 5000)).unwrap();
    let file = |name: &str, role: &str, more: Value| {
        let bytes = fs::read(folder.join(name)).unwrap();
        let mut entry = json!({
            "name": name, "role": role, "size": bytes.len(), "blake3": blake3::hash(&bytes).to_hex().to_string(),
        });
        entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        entry
    };
    let manifest = json!({
        "format": "vmkeep-backup", "version": 2, "min_reader": 2,
        "backup": "018f0000-0000-7000-8000-000000000001", "job": "018f0000-0000-7000-8000-000000000002",
        "tool": "vmkeep 0.1.0",
        "point_in_time": "2024-05-01T02:03:04Z", "finished": "2024-05-01T02:10:00Z",
        "domain": { "uuid": UUID, "name": "web1" },
        "definition": { "inactive": "domain.xml" },
        "consistency": "memory-and-disks",
        "disks": [{ "target": "vda", "virtual_size": vda.len(), "chain": ["vda.qcow2", "base.qcow2"] }],
        "memory": { "saved": { "file": "memory", "version": 2, "compression": "raw" } },
        "nvram": {
            "file": "vars.fd", "format": "raw", "written": "2024-05-01T00:00:00Z", "at_instant": true,
        },
        "tpm": {
            "files": [{ "file": "tpm.state", "path": "tpm2/tpm2-00.permall" }],
            "written": "2024-05-01T00:00:00Z", "at_instant": true,
        },
        "autostart": true,
        "left_out": [{ "target": "vdb", "reason": "it was not asked for" }],
        "files": [
            file("vda.qcow2", "disk", json!({ "format": "qcow2", "virtual_size": vda.len(), "backing": "base.qcow2" })),
            file("base.qcow2", "base", json!({ "format": "qcow2", "virtual_size": vda.len() })),
            file("domain.xml", "definition", json!({})),
            file("memory", "memory", json!({})),
            file("vars.fd", "nvram", json!({})),
            file("tpm.state", "tpm", json!({})),
        ],
    });
    fs::write(folder.join("manifest.json"), serde_json::to_vec_pretty(&manifest).unwrap()).unwrap();
    (folder, vda, manifest)
}

#[test]
fn a_backup_in_a_folder_keeps_its_id_and_its_instant_and_is_in_the_vault_once() {
    let (world, host) = scene();
    let (folder, vda, manifest) = classic(&world);
    let words = ["import", "home", "--from", folder.to_str().unwrap()];
    let imported = host.json(&words);
    let id = manifest["backup"].as_str().unwrap().replace('-', "");
    assert_eq!((&imported["backup"], &imported["at"]), (&json!(id), &manifest["point_in_time"]));
    assert_eq!(imported["already"], false);
    let notes = imported["notes"].to_string();
    assert!(notes.contains("memory was left out") && notes.contains("vdb"), "{notes}");
    let shown = host.json(&["show", "home", &id]);
    assert_eq!(shown["manifest"]["consistency"], "crash", "without memory it is no more than that");
    assert_eq!(
        (&shown["manifest"]["autostart"], &shown["backup"]["marks"]),
        (&json!(true), &json!(["checked"]))
    );
    let files = written(&host, &world, &id);
    assert!(fs::read(files.join("vda.raw")).unwrap() == vda, "vda is not what it was");
    assert_eq!(fs::read(files.join("nvram")).unwrap(), noise(99, 1000));
    let again = host.json(&words);
    assert_eq!((&again["backup"], &again["already"]), (&json!(id), &json!(true)));
    assert_eq!(host.json(&["list", "home"])["backups"].as_array().unwrap().len(), 1);

    // A machine is made of it.
    let to = world.path("restored");
    let words =
        ["--offline", "restore", &id, "--vault", "home", "--as", "copy", "--folder", to.to_str().unwrap()];
    let restored = host.vmkeep(&[], &words).stdin(Stdio::null()).output().unwrap();
    assert!(restored.status.success(), "{restored:?}");
    assert_eq!(fs::read(to.join("copy-tpm/tpm2/tpm2-00.permall")).unwrap(), noise(98, 500));

    // One byte that is another, and nothing of it is believed.
    let other = world.host("b");
    let words = ["import", "home", "--from", folder.to_str().unwrap()];
    let mut bytes = fs::read(folder.join("vars.fd")).unwrap();
    bytes[500] ^= 1;
    fs::write(folder.join("vars.fd"), bytes).unwrap();
    other.run(&words).told(codes::MANIFEST_MISMATCH, "vars.fd");
    // What was pruned does not come back.
    fs::write(folder.join("vars.fd"), noise(99, 1000)).unwrap();
    host.run(&["prune", "home", &id, "--last"]).must(0);
    other.run(&words).told(codes::VAULT_COPY_REFUSED, &id);
    other
        .run(&["import", "home", "--from", world.path("nowhere").to_str().unwrap()])
        .must(codes::NO_SUCH_BACKUP.0);
}

#[cfg(feature = "crash-points")]
#[test]
fn an_import_that_was_killed_is_repeated_and_is_there_once() {
    let (world, host) = scene();
    let (folder, vda, manifest) = classic(&world);
    let words = ["vault", "import", "home", "--from", folder.to_str().unwrap()];
    for place in ["import/written", "import/prepared"] {
        let ended =
            host.vmkeep(&[], &words).env("VMKEEP_CRASH_AT", place).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(
            said.contains(&format!("crash point {place}")) && !ended.status.success(),
            "{place}: {ended:?}"
        );
        assert_eq!(host.json(&["list", "home"])["backups"], json!([]), "{place}: half a backup is listed");
    }
    let imported = host.json(&words[1..]);
    assert_eq!(imported["already"], false);
    let id = manifest["backup"].as_str().unwrap().replace('-', "");
    assert!(fs::read(written(&host, &world, &id).join("vda.raw")).unwrap() == vda);
    host.run(&["check", "home", "--read"]).must(0);
}
