//! Whether QEMU, as the user that it runs as, can open what vmkeep makes for it.
//!
//! Files of each kind are made where jobs would make them and with the rights that jobs would give them, handed over as
//! libvirt would hand them over, opened through QEMU's own block layer (`qemu-io`) by a process of that user, and removed
//! again. What stands in the way is then named: the file system that gives nothing away, or the first folder on the
//! way that this user cannot pass.
//!
//! A process with another user's rights is not QEMU in one respect: AppArmor and SELinux do not confine it as they do
//! QEMU. That is judged separately ([`super::confinement`]).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use rustix::fs::OFlags;
use vmkeep_libvirt::Connection;
use vmkeep_libvirt::flags::{ListFlags, XmlFlags};
use vmkeep_libvirt::xml::{DiskDevice, Document, DomainXml, SourceKind};
use vmkeep_steps::image::accounts;
use vmkeep_steps::image::open::{just_made, to_read};
use vmkeep_steps::image::qcow2::Format;
use vmkeep_steps::image::qemu_img::QemuImg;
use vmkeep_steps::image::rights::{Kind, Wish};

use super::{existing, finding};
use crate::api::types::{Finding, Grade};
use crate::config::Config;

const TOPIC: &str = "QEMU's files";
/// What the names of everything that is made here begin with.
const PREFIX: &str = ".vmkeep-doctor-";
/// What an examination that was cut off has left is removed when it is as old as this.
const OLD: Duration = Duration::from_secs(3600);
/// Size of the disks that are tried.
const SIZE: u64 = 1 << 20;

/// Who runs QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
    /// libvirt gives a file to that user for as long as a guest uses it.
    handed_over: bool,
}

impl User {
    fn name(&self) -> String {
        accounts::user_name(self.uid).unwrap_or_else(|| format!("uid {}", self.uid))
    }

    /// A program run by this user, without supplementary groups when that means giving up root.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if self.uid != rustix::process::geteuid().as_raw() {
            command.uid(self.uid).gid(self.gid);
        }
        // Wherever vmkeepd stands, that user may not be allowed to be.
        command.current_dir("/").stdin(std::process::Stdio::null());
        command
    }
}

/// The user that libvirt says it runs QEMU as; without one its own, who is the user of this process.
fn user_of(capabilities: &str, settings: &str) -> User {
    let own = User {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        handed_over: false,
    };
    let Ok(document) = Document::parse(capabilities) else { return own };
    let Some(host) = document.root().child("host") else { return own };
    let model =
        host.children_named("secmodel").find(|model| model.child_text("model").as_deref() == Some("dac"));
    let label = model.and_then(|model| model.child_text("baselabel"));
    let Some((uid, gid)) = label.as_deref().and_then(numbers) else { return own };
    User { uid, gid, handed_over: hands_over(settings) }
}

/// `+64055:+109`
fn numbers(label: &str) -> Option<(u32, u32)> {
    let number = |text: &str| text.trim().trim_start_matches('+').parse().ok();
    let (uid, gid) = label.split_once(':')?;
    Some((number(uid)?, number(gid)?))
}

/// Whether libvirt changes owners, as its configuration says: unless told otherwise it does.
fn hands_over(settings: &str) -> bool {
    let last = settings.lines().rev().find_map(|line| {
        let (key, value) = line.trim().split_once('=')?;
        (key.trim() == "dynamic_ownership").then(|| value.trim() != "0")
    });
    last.unwrap_or(true)
}

/// The folders in which overlays would be made.
fn image_folders(connection: &Connection) -> BTreeSet<PathBuf> {
    let domains = connection.domains(ListFlags::default()).unwrap_or_default();
    let definitions = domains.iter().filter_map(|domain| domain.xml(XmlFlags::default()).ok());
    let parsed = definitions.filter_map(|text| DomainXml::parse(&text).ok());
    let disks = parsed.flat_map(|domain| domain.disks());
    let disks = disks.filter(|disk| disk.device == DiskDevice::Disk && !disk.readonly);
    let files = disks.filter(|disk| disk.source.kind == SourceKind::File).filter_map(|disk| disk.source.path);
    // A folder that is not there is another matter: so is the image.
    files.filter_map(|path| Some(Path::new(&path).parent()?.to_owned())).filter(|dir| dir.is_dir()).collect()
}

/// Tries everything.
pub(super) fn look(connection: &Connection, config: &Config) -> Vec<Finding> {
    let Ok(capabilities) = connection.capabilities() else { return Vec::new() };
    let settings = std::fs::read_to_string("/etc/libvirt/qemu.conf").unwrap_or_default();
    let user = user_of(&capabilities, &settings);
    let me = rustix::process::geteuid();
    if user.uid != me.as_raw() && !me.is_root() {
        let text = format!("QEMU runs as {}: only root can try what that user may open", user.name());
        return vec![finding(TOPIC, Grade::Note, text, "Run vmkeepd, or `vmkeep doctor`, as root")];
    }
    let mut found = Vec::new();
    let mut fine = Vec::new();
    let overlays = image_folders(connection).into_iter().chain(config.snapshot.overlay_dir.clone());
    for folder in overlays {
        match overlay(&folder, &user) {
            Ok(()) => fine.push(shown(&folder)),
            barred => found.push(tell("overlays", &shown(&folder), &user, barred)),
        }
    }
    if !fine.is_empty() {
        found.push(tell("overlays", &fine.join(", "), &user, Ok(())));
    }
    let restored = existing(&config.restore_dir);
    found.push(tell("restored images", &shown(&config.restore_dir), &user, image(&restored, config, &user)));
    let states = config.snapshot.ram_disk.iter().chain(config.roots.first());
    for place in states {
        found.push(tell("states of guests", &shown(place), &user, state(&existing(place), &user)));
    }
    found
}

/// Why something cannot be opened, and the mend.
struct Trouble {
    cause: String,
    remedy: String,
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn tell(what: &str, place: &str, user: &User, tried: Result<(), Trouble>) -> Finding {
    let who = user.name();
    match tried {
        Ok(()) => finding(TOPIC, Grade::Good, format!("QEMU ({who}) can use {what} in {place}"), ""),
        Err(Trouble { cause, remedy }) => {
            finding(TOPIC, Grade::Bad, format!("QEMU ({who}) cannot use {what} in {place}: {cause}"), remedy)
        }
    }
}

/// Files that are removed however this ends, the last first.
#[derive(Default)]
struct Made(Vec<PathBuf>);

impl Made {
    /// A name in a folder for something that will be removed.
    fn name(&mut self, folder: &Path, what: &str) -> PathBuf {
        sweep(folder);
        let path = folder.join(format!("{PREFIX}{}-{what}", uuid::Uuid::new_v4().simple()));
        self.0.push(path.clone());
        path
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = match path.symlink_metadata() {
                Ok(meta) if meta.is_dir() => std::fs::remove_dir(path),
                Ok(_) => std::fs::remove_file(path),
                Err(_) => Ok(()),
            };
        }
    }
}

/// Removes what an examination that was cut off has left.
fn sweep(folder: &Path) {
    let old = |meta: &std::fs::Metadata| {
        let age = meta.modified().ok().and_then(|then| SystemTime::now().duration_since(then).ok());
        meta.is_file() && age.is_some_and(|age| age > OLD)
    };
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX)
            && entry.metadata().is_ok_and(|meta| old(&meta))
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn make(path: &Path) -> Result<File, Trouble> {
    let made = File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
    made.and_then(|file| file.set_len(SIZE).map(|()| file)).map_err(|e| Trouble {
        cause: format!("nothing can be made there: {e}"),
        remedy: "Let the user of vmkeepd write there, or mount it writable".to_owned(),
    })
}

/// As libvirt does at the start of a guest; it too leaves QEMU to try where a file system refuses. The open file, not its name:
/// whoever owns the folder may have put another there.
fn hand_over(file: &File, user: &User) {
    if user.handed_over
        && let Err(error) = std::os::unix::fs::fchown(file, Some(user.uid), Some(user.gid))
    {
        tracing::debug!(%error, "a file is not handed over");
    }
}

/// Lets QEMU's block layer write to an image.
fn open(path: &Path, format: Format, user: &User) -> Result<(), Trouble> {
    let mut command = user.command("qemu-io");
    command.args(["-f", format.as_str(), "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k"]).arg(path);
    let output = command.output().map_err(|e| Trouble {
        cause: format!("qemu-io cannot be started: {e}"),
        remedy: "Install it: apt-get install qemu-utils, or dnf install qemu-img".to_owned(),
    })?;
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() && !said.contains("failed") {
        return Ok(());
    }
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let who = user.name();
    Err(match path.parent().and_then(|folder| barred(folder, user)) {
        Some(folder) => Trouble {
            cause: format!("that user cannot pass {}", folder.display()),
            remedy: format!("setfacl -m u:{who}:x '{0}', or chmod o+x '{0}'", folder.display()),
        },
        None => Trouble {
            cause: last.trim().to_owned(),
            remedy: if user.handed_over {
                "See what keeps that user out: mount options, access control lists".to_owned()
            } else {
                format!(
                    "libvirt leaves owners alone (dynamic_ownership = 0): let {who} read and write there, and set \
                     restore.owner, restore.group and restore.mode"
                )
            },
        },
    })
}

/// The first folder on the way that the user cannot pass.
fn barred(folder: &Path, user: &User) -> Option<PathBuf> {
    let mut way: Vec<&Path> = folder.ancestors().collect();
    way.reverse();
    let passes =
        |folder: &Path| user.command("test").arg("-x").arg(folder).status().is_ok_and(|s| s.success());
    way.into_iter().find(|folder| !passes(folder)).map(Path::to_owned)
}

fn overlay(folder: &Path, user: &User) -> Result<(), Trouble> {
    let mut made = Made::default();
    let (base, overlay) = (made.name(folder, "base"), made.name(folder, "overlay"));
    let base_file = make(&base)?;
    QemuImg::default().create_overlay(&overlay, &base, Format::Raw, SIZE).map_err(|e| Trouble {
        cause: e.to_string(),
        remedy: "Let the user of vmkeepd write there".to_owned(),
    })?;
    let private = |file: File| file.set_permissions(std::fs::Permissions::from_mode(0o600)).map(|()| file);
    let overlay_file = just_made(&overlay).and_then(private).map_err(|e| Trouble {
        cause: format!("its mode cannot be changed: {e}"),
        remedy: "Put images on a file system that knows modes".to_owned(),
    })?;
    hand_over(&base_file, user);
    hand_over(&overlay_file, user);
    open(&overlay, Format::Qcow2, user)
}

/// In a folder of its own, as each restored domain has one.
fn image(place: &Path, config: &Config, user: &User) -> Result<(), Trouble> {
    let mut made = Made::default();
    let folder = made.name(place, "folder");
    std::fs::DirBuilder::new().mode(0o700).create(&folder).map_err(|e| Trouble {
        cause: format!("nothing can be made there: {e}"),
        remedy: "Let the user of vmkeepd write there, or mount it writable".to_owned(),
    })?;
    let give = |file: &File, wish: Wish, kind: Kind| {
        let given = wish.give(file).map_err(|e| e.fault(kind, "", "").cause);
        given.map_err(|cause| Trouble {
            cause: format!("it cannot be given the owner and the mode that it is to have: {cause}"),
            remedy: "Correct [restore] in the configuration, or name another place (targets.restore)"
                .to_owned(),
        })
    };
    let opened = to_read(&folder, OFlags::NOFOLLOW | OFlags::DIRECTORY).map_err(|e| Trouble {
        cause: format!("what was made there cannot be opened: {e}"),
        remedy: "Let nobody else write there".to_owned(),
    })?;
    give(&opened, config.restore.folder(), Kind::Folder)?;
    let path = made.name(&folder, "image");
    let file = make(&path)?;
    give(&file, config.restore.file_of_nobody(), Kind::File)?;
    hand_over(&file, user);
    open(&path, Format::Raw, user)
}

/// libvirt makes it, hands it over, and gives QEMU the open file; vmkeepd reads it afterwards.
fn state(place: &Path, user: &User) -> Result<(), Trouble> {
    let mut made = Made::default();
    let path = made.name(place, "state");
    let file = make(&path)?;
    hand_over(&file, user);
    let trouble = |cause: String| Trouble { cause, remedy: "Name another place for it".to_owned() };
    let written = user.command("echo").arg("state").stdout(file).status();
    if !written.map_err(|e| trouble(e.to_string()))?.success() {
        return Err(trouble("a process of that user cannot write to the open file".to_owned()));
    }
    let mut bytes = [0; 6];
    let read = File::open(&path).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|e| trouble(format!("vmkeepd cannot read what it wrote: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPABILITIES: &str = "<capabilities><host><secmodel><model>apparmor</model><doi>0</doi></secmodel>\
        <secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+64055:+109</baselabel>\
        <baselabel type='qemu'>+64055:+109</baselabel></secmodel></host></capabilities>";

    #[test]
    fn the_user_is_the_one_that_libvirt_names_and_without_one_ones_own() {
        let user = user_of(CAPABILITIES, "");
        assert_eq!((user.uid, user.gid, user.handed_over), (64055, 109, true));
        assert!(!user_of(CAPABILITIES, "#dynamic_ownership = 1\n dynamic_ownership = 0\n").handed_over);
        assert!(user_of(CAPABILITIES, "# dynamic_ownership = 0\n").handed_over);
        let own = user_of("<capabilities><host/></capabilities>", "");
        assert_eq!(own.uid, rustix::process::geteuid().as_raw());
        assert_eq!(own, user_of("nonsense", ""));
    }

    fn own() -> User {
        user_of("", "")
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn what_is_tried_is_removed_again_and_so_is_what_an_earlier_look_left() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new, others] = ["old", "new", "others"].map(|name| match name {
            "others" => dir.path().join("disk.raw"),
            name => dir.path().join(format!("{PREFIX}{name}")),
        });
        for path in [&old, &new, &others] {
            File::create(path).unwrap();
        }
        let long_ago = SystemTime::now() - 2 * OLD;
        for path in [&old, &others] {
            File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
        }
        assert!(overlay(dir.path(), &own()).is_ok_and(|()| state(dir.path(), &own()).is_ok()));
        let mut left = names(dir.path());
        left.sort();
        assert_eq!(left, [format!("{PREFIX}new"), "disk.raw".to_owned()]);
    }

    #[test]
    fn another_user_is_told_which_folder_bars_the_way() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: only root can try what another user may open");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        let inner = dir.path().join("closed/images");
        std::fs::create_dir_all(&inner).unwrap();
        let closed = dir.path().join("closed");
        for path in [&inner, &closed] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711)).unwrap();
        }
        let user = User { uid: 64055, gid: 64055, handed_over: true };
        assert!(overlay(&inner, &user).map_err(|trouble| trouble.cause).is_ok());
        assert!(state(&inner, &user).is_ok());
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700)).unwrap();
        let trouble = overlay(&inner, &user).err().unwrap();
        assert!(trouble.cause.ends_with(closed.to_str().unwrap()), "{}", trouble.cause);
        assert!(trouble.remedy.contains("setfacl"), "{}", trouble.remedy);
        assert!(state(&inner, &user).is_ok(), "libvirt gives QEMU the open file");
        assert_eq!(names(&inner), Vec::<String>::new());
        // A libvirt that leaves owners alone: what is root's alone stays closed.
        std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o711)).unwrap();
        let trouble = overlay(&inner, &User { handed_over: false, ..user }).err().unwrap();
        assert!(trouble.cause.contains("Permission denied"), "{}", trouble.cause);
        assert!(trouble.remedy.contains("restore.owner"), "{}", trouble.remedy);
    }
}
