//! The note that a backup must not be deleted.
//!
//! It lies beside the manifest, so that whoever finds the folder (another host, a rebuilt catalogue) knows it too. Its
//! presence is what counts: a note that cannot be understood protects as well. One that has an end protects until then
//! and is ignored afterwards.

use std::io::{Read as _, Write as _};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::folder::{NEW, PROTECTION, fixed};
use super::model::Unknown;
use crate::image::root::{Component, Folder, RelPath, RootError};

/// What stands in [`Protection::format`].
pub const FORMAT: &str = "vmkeep-protection";
/// The version that this program writes.
pub const VERSION: u32 = 1;
/// No note is longer.
const LONGEST: u64 = 64 << 10;

/// The note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    /// Always [`FORMAT`].
    pub format: String,
    /// The version of this form.
    pub version: u32,
    /// Who asked for it.
    pub by: String,
    /// When.
    pub at: Timestamp,
    /// When it ends by itself; absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Fields of newer versions.
    #[serde(flatten)]
    pub unknown: Unknown,
}

impl Protection {
    /// A note.
    #[must_use]
    pub fn new(by: String, at: Timestamp, until: Option<Timestamp>, why: Option<String>) -> Self {
        Self { format: FORMAT.to_owned(), version: VERSION, by, at, until, why, unknown: Unknown::new() }
    }

    /// Whether it protects at that instant.
    #[must_use]
    pub fn in_force(&self, now: Timestamp) -> bool {
        self.until.is_none_or(|until| now < until)
    }

    /// Who, why and until when, in words.
    #[must_use]
    pub fn words(&self) -> String {
        let why = self.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let until = self.until.map(|until| format!(" until {until}")).unwrap_or_default();
        format!("{} protected it{until}{why}", self.by)
    }
}

/// The note in a folder, in force or not; nothing if there is none. A note that cannot be understood protects for ever.
pub fn read(folder: &Folder) -> Result<Option<Protection>, RootError> {
    let file = match folder.open_file(&RelPath::from(fixed(PROTECTION))) {
        Ok(file) => file,
        Err(RootError::Missing { .. }) => return Ok(None),
        Err(e @ (RootError::WrongKind { .. } | RootError::Escapes { .. })) => return Ok(Some(strange(&e))),
        Err(other) => return Err(other),
    };
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(|source| RootError::Io {
        act: "read",
        path: folder.path_of(&fixed(PROTECTION)),
        source,
    })?;
    let note = serde_json::from_slice::<Protection>(&bytes).map_err(|e| e.to_string()).and_then(|note| {
        if note.format == FORMAT { Ok(note) } else { Err("it is of another program".to_owned()) }
    });
    Ok(Some(note.unwrap_or_else(|why| strange(&why))))
}

fn strange(why: &dyn std::fmt::Display) -> Protection {
    let why = format!("its {PROTECTION} cannot be understood ({why})");
    Protection::new("somebody".to_owned(), Timestamp::UNIX_EPOCH, None, Some(why))
}

/// Puts a note into a folder, in place of one that is there. Durable on return.
pub fn write(folder: &Folder, note: &Protection) -> Result<(), RootError> {
    let aside = Component::literal(format!("{PROTECTION}{NEW}"));
    let path = folder.path_of(&aside);
    let fail = |act| {
        let path = path.clone();
        move |source: std::io::Error| match rustix::io::Errno::from_io_error(&source) {
            Some(errno) => RootError::from_errno(act, path, errno),
            None => RootError::Io { act, path, source },
        }
    };
    let mut bytes = serde_json::to_vec_pretty(note).map_err(|e| fail("write")(e.into()))?;
    bytes.push(b'\n');
    folder.remove_file(&aside)?;
    let mut file = folder.create_file(&aside)?;
    let written = file.write_all(&bytes).and_then(|()| crate::blocking::sync(&file)).map_err(fail("write"));
    if let Err(error) = written.and_then(|()| folder.replace(&aside, &fixed(PROTECTION))) {
        let _ = folder.remove_file(&aside);
        return Err(error);
    }
    folder.sync()
}

/// Takes the note away. Whether there was one. Durable on return.
pub fn remove(folder: &Folder) -> Result<bool, RootError> {
    let was = folder.remove_file(&fixed(PROTECTION))?;
    folder.sync()?;
    Ok(was)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::samples::folder;

    fn note(until: Option<&str>) -> Protection {
        let until = until.map(|until| until.parse().unwrap());
        Protection::new(
            "ann".to_owned(),
            "2026-01-01T00:00:00Z".parse().unwrap(),
            until,
            Some("x".to_owned()),
        )
    }

    #[test]
    fn a_note_is_read_as_it_was_written_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path());
        assert_eq!(read(&folder).unwrap(), None);
        assert!(!remove(&folder).unwrap());
        for note in [note(None), note(Some("2026-02-01T00:00:00Z"))] {
            write(&folder, &note).unwrap();
            assert_eq!(read(&folder).unwrap(), Some(note));
        }
        assert!(remove(&folder).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_note_with_an_end_protects_until_then() {
        let note = note(Some("2026-02-01T00:00:00Z"));
        assert!(note.in_force("2026-01-31T23:59:59.999Z".parse().unwrap()));
        assert!(!note.in_force("2026-02-01T00:00:00Z".parse().unwrap()));
    }

    #[test]
    fn a_note_that_cannot_be_understood_protects() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder(dir.path());
        for text in ["", "{", "{}", r#"{"format":"other","version":1,"by":"x","at":"2026-01-01T00:00:00Z"}"#]
        {
            std::fs::write(dir.path().join(PROTECTION), text).unwrap();
            assert!(read(&folder).unwrap().unwrap().in_force(Timestamp::now()), "{text:?}");
        }
        std::fs::remove_file(dir.path().join(PROTECTION)).unwrap();
        std::os::unix::fs::symlink("/nowhere", dir.path().join(PROTECTION)).unwrap();
        assert!(read(&folder).unwrap().unwrap().in_force(Timestamp::now()));
    }
}
