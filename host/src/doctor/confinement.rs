//! Whether something confines QEMU to the files that libvirt lists for it, and whether the rules for that are there.

use std::path::Path;

use vmkeep_libvirt::Connection;
use vmkeep_libvirt::xml::Document;

use super::finding;
use crate::api::types::{Finding, Grade};
use crate::config::Config;

const TOPIC: &str = "confinement";
/// Where the rules for libvirt's helper belong, which lists the files of a domain.
const HELPER: &str = "etc/apparmor.d/local/usr.lib.libvirt.virt-aa-helper";
/// Where the rules for QEMU itself belong.
const QEMU: &str = "etc/apparmor.d/local/abstractions/libvirt-qemu";

/// What confines guests of this libvirt, besides their users.
fn models(capabilities: &str) -> Vec<String> {
    let Ok(document) = Document::parse(capabilities) else { return Vec::new() };
    let Some(host) = document.root().child("host") else { return Vec::new() };
    let models = host.children_named("secmodel").filter_map(|model| model.child_text("model"));
    models.filter(|model| model != "dac" && model != "none").collect()
}

pub(super) fn look(connection: &Connection, config: &Config) -> Vec<Finding> {
    let models = models(&connection.capabilities().unwrap_or_default());
    models.iter().map(|model| judge(model, Path::new("/"), config)).collect()
}

fn judge(model: &str, root: &Path, config: &Config) -> Finding {
    match model {
        "apparmor" => apparmor(root),
        "selinux" => finding(
            TOPIC,
            Grade::Note,
            "SELinux confines each QEMU to the files that libvirt labels for it",
            format!(
                "Overlays and restored files get their labels from libvirt. If a restored image is denied: semanage \
                 fcontext -a -t virt_image_t '{0}(/.*)?' and restorecon -R '{0}'",
                config.restore_dir.display()
            ),
        ),
        other => finding(
            TOPIC,
            Grade::Note,
            format!("{other} confines each QEMU; vmkeep was not tried with it"),
            "If a file is denied, allow it there",
        ),
    }
}

fn apparmor(root: &Path) -> Finding {
    let has =
        |path: &str| std::fs::read_to_string(root.join(path)).is_ok_and(|text| text.contains("vmkeep-"));
    let what = "AppArmor confines each QEMU to the files that libvirt's helper lists for it";
    if !has(HELPER) {
        return finding(
            TOPIC,
            Grade::Warning,
            format!("{what}; the rules that let it see vmkeep's files are not installed"),
            format!(
                "Append packaging/apparmor/usr.lib.libvirt.virt-aa-helper to /{HELPER}, and load that profile anew"
            ),
        );
    }
    let qemu = if has(QEMU) { "; so are those for QEMU itself" } else { "" };
    let remedy = if has(QEMU) {
        String::new()
    } else {
        format!(
            "Only if the kernel's log shows that QEMU was denied one of vmkeep's files: \
             packaging/apparmor/libvirt-qemu, appended to /{QEMU}"
        )
    };
    let grade = if has(QEMU) { Grade::Good } else { Grade::Note };
    finding(TOPIC, grade, format!("{what}; the rules for it are installed{qemu}"), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_confines_is_read_from_libvirt_and_missing_rules_are_told_of() {
        let xml = "<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model>\
                   </secmodel></host></capabilities>";
        assert_eq!(models(xml), ["apparmor"]);
        assert_eq!(models("<capabilities><host/></capabilities>"), Vec::<String>::new());

        let root = tempfile::tempdir().unwrap();
        let shipped = |name: &str| {
            let path = format!("{}/../packaging/apparmor/{name}", env!("CARGO_MANIFEST_DIR"));
            std::fs::read_to_string(path).unwrap()
        };
        let install = |at: &str, text: String| {
            let path = root.path().join(at);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let missing = apparmor(root.path());
        assert_eq!(missing.grade, Grade::Warning);
        assert!(missing.remedy.contains("virt-aa-helper"), "{missing:?}");
        install(HELPER, "# Site-specific additions\n".to_owned());
        assert_eq!(apparmor(root.path()).grade, Grade::Warning);
        install(HELPER, shipped("usr.lib.libvirt.virt-aa-helper"));
        assert_eq!(apparmor(root.path()).grade, Grade::Note);
        install(QEMU, shipped("libvirt-qemu"));
        assert_eq!(apparmor(root.path()).grade, Grade::Good);
    }
}
