//! `[restore]`: whose restored files become, and what others may do with them.
//!
//! Names are looked up when the configuration is read: a name that nobody has must not be found out about on the day of
//! a restore.

use serde::Deserialize;
use vmkeep_steps::image::accounts::{group_id, user_id};
use vmkeep_steps::image::rights::FileMode;
use vmkeep_steps::restore::RightsSettings;

use super::ConfigError;
use super::file::impossible;

/// What restored files and the folders made for them are given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRestore {
    /// The owner of files and folders.
    pub owner: Option<Account>,
    /// The group of files and folders.
    pub group: Option<Account>,
    /// The mode of files: `"0640"`.
    pub mode: Option<String>,
    /// The mode of folders: `"0711"`.
    pub directory_mode: Option<String>,
}

/// A user or a group.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a name or a number is needed")]
pub enum Account {
    /// By number.
    Number(u32),
    /// By name, or by a number that is written like one.
    Name(String),
}

impl Account {
    fn resolve(&self, key: &str, what: &str, find: fn(&str) -> Option<u32>) -> Result<u32, ConfigError> {
        // The highest number means "nobody in particular" to the kernel.
        let number = match self {
            Self::Number(number) => Some(*number),
            Self::Name(name) => find(name).or_else(|| name.parse().ok()),
        };
        number.filter(|number| *number != u32::MAX).ok_or_else(|| {
            let shown = match self {
                Self::Number(number) => number.to_string(),
                Self::Name(name) => format!("{name:?}"),
            };
            impossible(key, &format!("there is no {what} {shown} on this host"))
        })
    }
}

/// A mode. What it must not take from the owner, and the most that it may give.
fn mode(key: &str, text: Option<&str>, least: u32, most: u32) -> Result<Option<FileMode>, ConfigError> {
    let Some(text) = text else { return Ok(None) };
    let mode = FileMode::try_from(text.to_owned()).map_err(|why| impossible(key, &why))?;
    if mode.0 & least != least {
        let why = format!("{mode} would lock the owner out: at least {:04o} is needed", least);
        return Err(impossible(key, &why));
    }
    if mode.0 & !most != 0 {
        return Err(impossible(key, &format!("{mode} has bits beyond {most:04o}")));
    }
    Ok(Some(mode))
}

pub(super) fn resolve(file: &FileRestore) -> Result<RightsSettings, ConfigError> {
    let account = |account: &Option<Account>, key, what, find| {
        account.as_ref().map(|account| account.resolve(key, what, find)).transpose()
    };
    Ok(RightsSettings {
        owner: account(&file.owner, "restore.owner", "user", user_id)?,
        group: account(&file.group, "restore.group", "group", group_id)?,
        mode: mode("restore.mode", file.mode.as_deref(), 0o600, 0o777)?,
        directory_mode: mode("restore.directory_mode", file.directory_mode.as_deref(), 0o700, 0o2777)?,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::File;
    use super::*;
    use crate::codes;

    fn read(text: &str) -> Result<RightsSettings, ConfigError> {
        resolve(&File::parse(&format!("[restore]\n{text}"), Path::new("vmkeep.toml"))?.restore)
    }

    #[test]
    fn owners_are_names_or_numbers_and_modes_are_octal() {
        let all = "owner = \"root\"\ngroup = 36\nmode = \"0660\"\ndirectory_mode = \"2770\"\n";
        let found = read(all).unwrap();
        assert_eq!((found.owner, found.group), (Some(0), Some(36)));
        assert_eq!((found.mode, found.directory_mode), (Some(FileMode(0o660)), Some(FileMode(0o2770))));
        assert_eq!(read("owner = \"4242\"\n").unwrap().owner, Some(4242), "a number in quotes");
        assert_eq!(read("").unwrap(), RightsSettings::default());
    }

    #[test]
    fn what_nobody_is_called_and_what_is_no_mode_is_refused_with_the_key() {
        for (text, key) in [
            ("owner = \"no such user\"\n", "restore.owner"),
            ("group = \"no such group\"\n", "restore.group"),
            ("owner = 4294967295\n", "restore.owner"),
            ("mode = \"rw-r-----\"\n", "restore.mode"),
            ("mode = \"0440\"\n", "restore.mode"),
            ("mode = \"4755\"\n", "restore.mode"),
            ("directory_mode = \"0600\"\n", "restore.directory_mode"),
            ("directory_mode = \"1777\"\n", "restore.directory_mode"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
            assert_eq!(error.code(), codes::UNSUPPORTED_CONFIGURATION_PARAMETER, "{error}");
        }
        for text in ["owner = -1\n", "owner = true\n", "mode = 0o640\n", "modes = \"0640\"\n"] {
            assert!(matches!(read(text).unwrap_err(), ConfigError::Wrong { line: 2, .. }), "{text}");
        }
    }
}
