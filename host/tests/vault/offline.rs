//! `vmkeep --offline`: a machine comes back on a host that has nothing but the vault and its key, whatever ends the restore.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use vmkeep_host::codes;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::ids::BackupId;
use vmkeep_vault::manifest::{Disk, Image, Stream};
use vmkeep_vault::vault::Vault;
use vmkeep_vault::write::{Extent, Options, Outcome, Parts, Readiness, Session};

use crate::support::{C, DOMAIN, Host, Said, World, noise};

const UUID: &str = "d0d0d0d0-d0d0-d0d0-d0d0-d0d0d0d0d0d0";

fn definition(more: &str) -> String {
    let disk = |target: &str, format: &str| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='/old/{target}'/>\
             <target dev='{target}' bus='virtio'/></disk>"
        )
    };
    format!(
        "<domain type='kvm'><name>web1</name><uuid>{UUID}</uuid><memory>1</memory>\
         <os firmware='efi'><type>hvm</type></os><devices>{}{}\
         <interface type='user'><mac address='52:54:00:00:00:01'/></interface>\
         <tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>{more}</devices></domain>",
        disk("vda", "raw"),
        disk("vdb", "qcow2")
    )
}

/// The disks of the machine: with zeroes at the beginning, in the middle and at the end.
fn disks() -> [Vec<u8>; 2] {
    let vda = [noise(1, 9 * C), vec![0; 30 * C], noise(2, 3 * C), vec![0; 5 * C]].concat();
    let vdb = [vec![0; 2 * C], noise(3, 7 * C), vec![0; 100 * C]].concat();
    [vda, vdb]
}

async fn put(session: &mut Session, bytes: &[u8], kind: BlobType) -> Image {
    let part = |chunk: &[u8]| match chunk.iter().all(|byte| *byte == 0) {
        true => Extent::Zero(chunk.len() as u64),
        false => Extent::Data(chunk.to_vec().into()),
    };
    let mut parts = Parts::new(bytes.chunks(C).map(part).collect());
    Box::pin(session.write_image(&mut parts, bytes.len() as u64, kind, None)).await.unwrap().image
}

/// A checked backup of the machine.
async fn back_up(vault: &Vault, definition: &str) -> String {
    let mut session = Box::pin(Session::begin(vault, DOMAIN, Options::default())).await.unwrap();
    let id = BackupId::now();
    let mut manifest = session.manifest(id, jiff::Timestamp::now());
    (manifest.domain_name, manifest.definition) = ("web1".into(), definition.to_owned());
    for ((target, format), bytes) in [("vda", "raw"), ("vdb", "qcow2")].into_iter().zip(disks()) {
        let image = put(&mut session, &bytes, BlobType::Data).await;
        manifest.disks.push(Disk::new(target, image, format));
    }
    for (name, bytes) in [("nvram", noise(99, 1000)), ("tpm/tpm2/tpm2-00.permall", noise(98, 500))] {
        let image = put(&mut session, &bytes, BlobType::Stream).await;
        manifest.streams.push(Stream { name: name.into(), image });
    }
    let Readiness::Ready(prepared) = Box::pin(session.prepare(&manifest)).await.unwrap() else {
        panic!("not ready")
    };
    assert_eq!(session.commit(&prepared).await.unwrap(), Outcome::Checked);
    session.end().await.unwrap();
    id.to_string()
}

/// A vault with a backup, and a host that knows nothing of it but address and key.
struct Scene {
    world: World,
    host: Host,
    backup: String,
}

impl Scene {
    async fn set() -> Self {
        let world = World::new();
        let first = world.host("a");
        first.init(&world, "home");
        let backup = Box::pin(back_up(&first.open("home").await, &definition(""))).await;
        let host = world.host("b");
        fs::write(world.path("b.toml"), format!("state_dir = {:?}\n", world.path("b"))).unwrap();
        Self { world, host, backup }
    }

    /// The words of a restore into this folder.
    fn words(&self, folder: &Path) -> Vec<String> {
        let mut words: Vec<String> = ["--offline", "restore", &self.backup].map(str::to_owned).into();
        words.extend(self.vault());
        words.extend(["--as", "copy", "--folder", folder.to_str().unwrap()].map(str::to_owned));
        words
    }

    fn vault(&self) -> [String; 4] {
        let url = format!("file://{}", self.world.path("home").display());
        let key = self.world.path("home.key").display().to_string();
        ["--vault".into(), url, "--key-file".into(), key]
    }

    fn run(&self, words: &[String], crash: Option<&str>) -> std::process::Output {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut command = self.host.vmkeep(&[], &words);
        command.envs(crash.map(|at| ("VMKEEP_CRASH_AT", at))).stdin(Stdio::null()).output().unwrap()
    }

    #[track_caller]
    fn said(&self, words: &[String]) -> Said {
        Said::of(self.run(words, None))
    }
}

fn with(words: &[String], more: &[&str]) -> Vec<String> {
    words.iter().cloned().chain(more.iter().map(|word| (*word).to_owned())).collect()
}

fn raw_of(qcow2: &Path) -> Vec<u8> {
    let raw = qcow2.with_extension("as-raw");
    let mut convert = std::process::Command::new("qemu-img");
    convert.args(["convert", "-f", "qcow2", "-O", "raw"]).args([qcow2, &raw]);
    assert!(convert.status().unwrap().success());
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(raw).unwrap();
    bytes
}

/// Whether the folder holds the machine, and nothing else. Its definition.
fn is_whole(folder: &Path) -> String {
    let [vda, vdb] = disks();
    assert!(fs::read(folder.join("copy-vda.raw")).unwrap() == vda, "vda is not what it was");
    assert!(raw_of(&folder.join("copy-vdb.qcow2")) == vdb, "vdb is not what it was");
    assert_eq!(fs::read(folder.join("copy_VARS.fd")).unwrap(), noise(99, 1000));
    assert_eq!(fs::read(folder.join("copy-tpm/tpm2/tpm2-00.permall")).unwrap(), noise(98, 500));
    for file in ["copy-vda.raw", "copy-vdb.qcow2", "copy_VARS.fd", "copy.xml"] {
        let meta = folder.join(file).metadata().unwrap();
        assert_eq!(meta.mode() & 0o077, 0, "others may read {file}");
    }
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let all =
        ["copy-tpm", "copy-vda.raw", "copy-vdb.qcow2", "copy.xml", "copy_VARS.fd", "vmkeep-restore.json"];
    assert_eq!(names, all);
    fs::read_to_string(folder.join("copy.xml")).unwrap()
}

fn uuid_in(xml: &str) -> &str {
    let (_, rest) = xml.split_once("<uuid>").unwrap();
    rest.split_once("</uuid>").unwrap().0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_comes_back_into_a_folder_from_an_address_and_a_key_byte_for_byte() {
    let scene = Box::pin(Scene::set()).await;
    let listed =
        scene.said(&with(&["--offline".into(), "list".into()], &scene.vault().each_ref().map(|w| &**w)));
    assert!(listed.must(0).out.contains(&scene.backup[24..]), "{}", listed.out);
    scene
        .said(&with(&["--offline".into(), "verify".into()], &scene.vault().each_ref().map(|w| &**w)))
        .must(0);

    let folder = scene.world.path("restored/deep");
    let said = scene.said(&scene.words(&folder));
    assert!(said.must(0).out.contains("virsh define"), "{}", said.out);
    assert!(said.out.contains("/var/lib/libvirt/swtpm/"), "nobody is told of the TPM: {}", said.out);
    let xml = is_whole(&folder);
    assert!(xml.contains("<name>copy</name>") && !xml.contains(UUID), "{xml}");
    assert!(
        !xml.contains("/old/") && !xml.contains("52:54:00:00:00:01"),
        "it is still the original's: {xml}"
    );
    for file in ["copy-vda.raw", "copy-vdb.qcow2", "copy_VARS.fd"] {
        assert!(xml.contains(folder.join(file).to_str().unwrap()), "{file}: {xml}");
    }
    assert!(xml.contains("<link state='down'/>") || xml.contains("<link state=\"down\"/>"), "{xml}");
    let blocks = folder.join("copy-vda.raw").metadata().unwrap().blocks();
    assert!(blocks * 512 < 14 * C as u64, "{blocks} blocks: what is zero takes room");
    assert_eq!(folder.metadata().unwrap().mode() & 0o777, 0o711, "QEMU's user cannot pass");

    // Some disks, in another format, into the folder of the configuration.
    let words =
        with(&scene.words(&folder)[..7], &["--as", "other", "--disks", "vda", "--format", "qcow2", "--json"]);
    let said = scene.said(&words);
    let answer: serde_json::Value = serde_json::from_str(&said.must(0).out).unwrap();
    let image = PathBuf::from(answer["files"][0]["file"].as_str().unwrap());
    assert!(raw_of(&image) == disks()[0], "it is not what it was");
    let xml = fs::read_to_string(answer["definition"].as_str().unwrap()).unwrap();
    assert!(!xml.contains("vdb"), "the original's disk is in the copy: {xml}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_finished_or_somebody_elses_is_left_alone() {
    let scene = Box::pin(Scene::set()).await;
    let folder = scene.world.path("restored");
    scene.said(&scene.words(&folder)).must(0);
    let before = is_whole(&folder);
    // The same words find it done, and others are refused.
    let again = scene.said(&scene.words(&folder));
    assert!(again.must(0).out.contains("restored already"), "{}", again.out);
    let others = scene.said(&with(&scene.words(&folder), &["--disks", "vda"]));
    assert!(others.told(codes::BACKUP_EXISTS, "restored").err.contains("finished"), "{}", others.err);
    assert_eq!(is_whole(&folder), before);
    // One that has lost a file since is neither.
    fs::rename(folder.join("copy-vda.raw"), folder.join("away")).unwrap();
    let said = scene.said(&scene.words(&folder));
    assert!(
        said.told(codes::BACKUP_EXISTS, "restored").err.contains("copy-vda.raw is missing"),
        "{}",
        said.err
    );
    assert!(!folder.join("copy-vda.raw").exists());

    let other = scene.world.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("letter"), "mine").unwrap();
    scene.said(&scene.words(&other)).told(codes::BACKUP_EXISTS, "letter");
    assert_eq!(fs::read_dir(&other).unwrap().count(), 1, "something was written beside it");

    let mut words = scene.words(&scene.world.path("new"));
    for name in ["", "a/b"] {
        words[8] = name.to_owned();
        scene.said(&words).told(codes::USAGE, "name");
    }
    words[8] = "copy".to_owned();
    scene.said(&with(&words, &["--disks", "vdz"])).told(codes::NO_SUCH_DISK, "vdz");
    scene.said(&with(&words, &["--define", "qemu+ssh://host/system"])).told(codes::REMOTE_HYPERVISOR, "host");
    words[2] = "ffffffff".to_owned();
    scene.said(&words).told(codes::NO_SUCH_BACKUP, "ffffffff");
    assert!(!scene.world.path("new").exists(), "a folder was made for something that was refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_definition_of_a_vault_without_encryption_that_reaches_into_the_host_is_not_used() {
    let world = World::new();
    let host = world.host("a");
    let url = format!("file://{}", world.path("plain").display());
    host.run(&["init", &url, "--plain"]).must(0);
    let reaching =
        "<disk type='file' device='cdrom'><source file='/etc/shadow'/><target dev='sda'/><readonly/></disk>";
    let backup = Box::pin(back_up(&host.open(&url).await, &definition(reaching))).await;
    let folder = world.path("restored");
    let words = ["--offline", "restore", &backup, "--vault", &url, "--as", "copy"];
    let words = [&words[..], &["--folder", folder.to_str().unwrap()]].concat();
    let said = Said::of(host.vmkeep(&[], &words).stdin(Stdio::null()).output().unwrap());
    said.told(codes::DEFINITION_NOT_TRUSTED, "/etc/shadow");
    assert!(!folder.exists(), "something was made of it");
    let words = [&words[..], &["--trust-definition"]].concat();
    Said::of(host.vmkeep(&[], &words).stdin(Stdio::null()).output().unwrap()).must(0);
    assert!(is_whole(&folder).contains("/etc/shadow"));
}

/// Every place at which a restore can be killed, in its order.
#[cfg(feature = "crash-points")]
const PLACES: &[&str] = &[
    "note",
    "read/vda",
    "proven/vda",
    "placed/vda",
    "read/vdb",
    "converted/vdb",
    "proven/vdb",
    "placed/vdb",
    "read/nvram",
    "placed/nvram",
    "definition",
    "tpm",
    "defined",
    "finished",
];

#[cfg(feature = "crash-points")]
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_killed_anywhere_is_finished_by_the_same_words_and_by_no_others() {
    let scene = Box::pin(Scene::set()).await;
    for place in PLACES {
        let folder = scene.world.path(&place.replace('/', "-"));
        let at = format!("offline/{place}");
        let ended = scene.run(&scene.words(&folder), Some(&at));
        // The program that gave it a session of its own only says that it did not end by itself.
        let reached = String::from_utf8_lossy(&ended.stderr).contains(&format!("crash point {at}"));
        assert!(reached && !ended.status.success(), "{place}: {ended:?}");
        let note = fs::read_to_string(folder.join("vmkeep-restore.unfinished"));
        if *place == "finished" {
            assert!(note.is_err());
            let said = scene.said(&scene.words(&folder));
            assert!(said.must(0).out.contains("restored already"), "{}", said.out);
            is_whole(&folder);
            continue;
        }
        let note: serde_json::Value = serde_json::from_str(&note.unwrap()).unwrap();
        // What is half done is nobody else's business.
        let other = with(&scene.words(&folder), &["--disks", "vda"]);
        scene.said(&other).told(codes::BACKUP_EXISTS, "unfinished");
        let said = scene.said(&scene.words(&folder));
        assert!(said.must(0).err.contains("going on"), "{place}: {}", said.err);
        let xml = is_whole(&folder);
        assert_eq!(uuid_in(&xml), note["uuid"], "{place}: it has become another domain");
    }
    // Somebody has used a disk of an unfinished restore: it is not what it was to be, and stays as it is.
    let folder = scene.world.path("used");
    scene.run(&scene.words(&folder), Some("offline/placed/vda"));
    let mut used = fs::read(folder.join("copy-vda.raw")).unwrap();
    used[10 * C] ^= 1;
    fs::write(folder.join("copy-vda.raw"), &used).unwrap();
    scene.said(&scene.words(&folder)).told(codes::WRITTEN_DIFFERS, "copy-vda.raw");
    assert!(fs::read(folder.join("copy-vda.raw")).unwrap() == used, "what somebody has written is gone");
    let leases = scene.world.objects("home/leases");
    assert!(leases.iter().any(|path| path.ends_with("begun")), "{leases:?}");
}
