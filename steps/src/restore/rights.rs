//! Whose the restored files become: as configured, else as the original's were, else vmkeepd's own alone.
//!
//! What the manifest records is taken over by *name* where the user or group had one: numbers of another host mean other
//! people here. A user without root's rights cannot give files away, so what is recorded binds only as far as it can;
//! what is *configured* always binds, and a restore that cannot give it fails. A manifest that a stranger may have
//! written (`--from DIR`, without having been trusted) chooses nobody's files.

use vmkeep_workflow::{Code, Fault};

use super::image::ImageInput;
use super::machine::VariablesInput;
use crate::image::accounts;
use crate::image::rights::{FileMode, Rights, Wish};
use crate::image::root::Component;
use crate::manifest::Manifest;

/// What is configured for restored files and the folders that are made for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RightsSettings {
    /// The owner of both.
    pub owner: Option<u32>,
    /// The group of both.
    pub group: Option<u32>,
    /// The mode of files.
    pub mode: Option<FileMode>,
    /// The mode of folders.
    pub directory_mode: Option<FileMode>,
}

impl RightsSettings {
    /// For folders. The hypervisor runs guests as another user, who must get through to the images.
    #[must_use]
    pub fn folder(&self) -> Wish {
        let mode = self.directory_mode.unwrap_or(FileMode(0o711));
        Wish { uid: self.owner, gid: self.group, mode: Some(mode) }
    }

    /// For a file of which nothing is recorded.
    #[must_use]
    pub fn file_of_nobody(&self) -> Wish {
        Wish { uid: self.owner, gid: self.group, mode: self.mode }
    }

    /// For a file. What everybody might do with the original counts only in the folder of the original (`beside` it): it
    /// may have been the folder that kept them out.
    fn file(&self, recorded: Option<&Rights>, beside: bool, me: &Caller, notes: &mut Vec<String>) -> Wish {
        let mut wish = self.file_of_nobody();
        let Some(recorded) = recorded else { return wish };
        let mode = recorded.mode.plain();
        wish.mode = wish.mode.or(Some(if beside { mode } else { FileMode(mode.0 & 0o770) }));
        if wish.uid.is_none() {
            match here(recorded.user.as_deref(), recorded.uid, accounts::user_id) {
                Ok(uid) => wish.uid = me.may_own(uid).then_some(uid),
                Err(name) => notes.push(stranger("user", name)),
            }
        }
        if wish.gid.is_none() {
            match here(recorded.group.as_deref(), recorded.gid, accounts::group_id) {
                Ok(gid) => wish.gid = me.may_group(gid).then_some(gid),
                Err(name) => notes.push(stranger("group", name)),
            }
        }
        wish
    }
}

fn stranger(what: &str, name: &str) -> String {
    format!(
        "The original's files belonged to the {what} {name}, which is not known here: the restored ones do not."
    )
}

/// The number here of whoever has this name, or had this number and no name.
fn here(name: Option<&str>, number: u32, find: impl Fn(&str) -> Option<u32>) -> Result<u32, &str> {
    name.map_or(Ok(number), |name| find(name).ok_or(name))
}

/// Who restores.
struct Caller {
    uid: u32,
    groups: Vec<u32>,
}

impl Caller {
    fn this() -> Self {
        let mut groups: Vec<u32> =
            rustix::process::getgroups().unwrap_or_default().into_iter().map(|gid| gid.as_raw()).collect();
        groups.push(rustix::process::getegid().as_raw());
        Self { uid: rustix::process::geteuid().as_raw(), groups }
    }

    fn may_own(&self, uid: u32) -> bool {
        // The highest number means nobody.
        uid != u32::MAX && (self.uid == 0 || self.uid == uid)
    }

    fn may_group(&self, gid: u32) -> bool {
        gid != u32::MAX && (self.uid == 0 || self.groups.contains(&gid))
    }
}

/// Says of each file what it is to be given; returns what the owner should know.
pub(crate) async fn choose(
    settings: RightsSettings,
    manifest: &Manifest,
    trusted: bool,
    images: &mut [ImageInput],
    variables: Option<&mut VariablesInput>,
) -> Result<Vec<String>, Fault> {
    let files = images.iter_mut().map(|image| ((image.wanted.name.clone(), image.own), &mut image.rights));
    let variables = variables.map(|it| ((it.wanted.name.clone(), it.own), &mut it.rights));
    let (names, wishes): (Vec<(Component, bool)>, Vec<&mut Wish>) = files.chain(variables).unzip();
    let recorded = |name| manifest.file(name).filter(|_| trusted).and_then(|file| file.rights.clone());
    let recorded: Vec<(Option<Rights>, bool)> =
        names.iter().map(|(name, beside)| (recorded(name), *beside)).collect();
    let chosen = crate::blocking::run(move || {
        let (me, mut notes) = (Caller::this(), Vec::new());
        let chosen: Vec<Wish> = recorded
            .iter()
            .map(|(recorded, beside)| settings.file(recorded.as_ref(), *beside, &me, &mut notes))
            .collect();
        (chosen, notes)
    });
    let (chosen, mut notes) = chosen
        .await
        .map_err(|e| Fault::permanent(Code::UNDEFINED, "find out whose the files were", String::new(), e))?;
    for (wish, chosen) in wishes.into_iter().zip(chosen) {
        *wish = chosen;
    }
    notes.sort();
    notes.dedup();
    Ok(notes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(user: Option<&str>, uid: u32, group: Option<&str>, gid: u32) -> Rights {
        let mode = FileMode(0o640);
        Rights { uid, user: user.map(str::to_owned), gid, group: group.map(str::to_owned), mode }
    }

    fn root() -> Caller {
        Caller { uid: 0, groups: vec![0] }
    }

    #[test]
    fn what_is_configured_wins_over_what_is_recorded_and_both_over_nothing() {
        let mut notes = Vec::new();
        let was = recorded(Some("root"), 77, None, 4242);
        let none = RightsSettings::default();
        let mode = Some(FileMode(0o640));
        assert_eq!(none.file(None, true, &root(), &mut notes), Wish::default(), "it stays vmkeepd's alone");
        let as_it_was = none.file(Some(&was), true, &root(), &mut notes);
        assert_eq!(as_it_was, Wish { uid: Some(0), gid: Some(4242), mode }, "by name before by number");
        let half = RightsSettings { owner: Some(5), ..none };
        assert_eq!(half.file(Some(&was), true, &root(), &mut notes), Wish { uid: Some(5), ..as_it_was });
        let all = RightsSettings { owner: Some(5), group: Some(6), mode: Some(FileMode(0o600)), ..none };
        let configured = Wish { uid: Some(5), gid: Some(6), mode: Some(FileMode(0o600)) };
        assert_eq!(all.file(Some(&was), true, &root(), &mut notes), configured);
        assert_eq!(notes, Vec::<String>::new());
    }

    #[test]
    fn what_everybody_might_do_counts_in_the_originals_own_folder_only() {
        let was = Rights { mode: FileMode(0o4754), ..recorded(None, 1, None, 1) };
        let of = |settings: RightsSettings, beside| {
            settings.file(Some(&was), beside, &root(), &mut Vec::new()).mode
        };
        let none = RightsSettings::default();
        assert_eq!(of(none, true), Some(FileMode(0o754)), "and never its owner's rights");
        assert_eq!(of(none, false), Some(FileMode(0o750)));
        let open = RightsSettings { mode: Some(FileMode(0o644)), ..none };
        assert_eq!(of(open, false), Some(FileMode(0o644)), "unless it is configured");
    }

    #[test]
    fn who_is_not_known_here_is_told_of_and_gets_nothing() {
        let mut notes = Vec::new();
        let was = recorded(Some("nobody you know"), 0, Some("nobody you know"), 0);
        let wish = RightsSettings::default().file(Some(&was), true, &root(), &mut notes);
        assert_eq!((wish.uid, wish.gid), (None, None), "and certainly not root's rights");
        assert_eq!(notes.len(), 2, "{notes:?}");
    }

    #[test]
    fn without_roots_rights_what_is_recorded_binds_as_far_as_it_can() {
        let mut notes = Vec::new();
        let me = Caller { uid: 1000, groups: vec![1000, 36] };
        let of = |uid, gid, notes: &mut Vec<String>| {
            let wish =
                RightsSettings::default().file(Some(&recorded(None, uid, None, gid)), true, &me, notes);
            (wish.uid, wish.gid)
        };
        assert_eq!(of(1000, 36, &mut notes), (Some(1000), Some(36)));
        assert_eq!(of(0, 0, &mut notes), (None, None));
        let forced = RightsSettings { owner: Some(0), ..RightsSettings::default() };
        assert_eq!(
            forced.file(None, true, &me, &mut notes).uid,
            Some(0),
            "what is configured is tried, and fails"
        );
    }
}
