//! Users and groups by name and by number, as this host's databases have them.
//!
//! The local files are read first: they are there when a directory service is not. What they do not know, `getent` is
//! asked for, which asks every source that the host is set up with. Blocks.

use std::process::Command;

/// The name and the number in a line of a database.
fn entry(line: &str) -> Option<(&str, u32)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    Some((name, fields.nth(1)?.parse().ok()?))
}

fn find(database: &str, key: &str, wanted: &dyn Fn(&str, u32) -> bool) -> Option<(String, u32)> {
    let of = |text: &str| {
        let found = text.lines().filter_map(entry).find(|(name, number)| wanted(name, *number));
        found.map(|(name, number)| (name.to_owned(), number))
    };
    let local = std::fs::read(format!("/etc/{database}")).unwrap_or_default();
    // A name from elsewhere must not reach a program as anything else than a name.
    let plain = !key.is_empty() && !key.contains([':', '\0', '\n']);
    of(&String::from_utf8_lossy(&local)).or_else(|| {
        let output = plain.then(|| Command::new("getent").args([database, "--", key]).output().ok())??;
        of(&String::from_utf8_lossy(&output.stdout))
    })
}

/// The name of a user, if it has one here.
#[must_use]
pub fn user_name(uid: u32) -> Option<String> {
    find("passwd", &uid.to_string(), &|_, number| number == uid).map(|(name, _)| name)
}

/// The name of a group, if it has one here.
#[must_use]
pub fn group_name(gid: u32) -> Option<String> {
    find("group", &gid.to_string(), &|_, number| number == gid).map(|(name, _)| name)
}

/// The number of a user.
#[must_use]
pub fn user_id(name: &str) -> Option<u32> {
    find("passwd", name, &|found, _| found == name).map(|(_, number)| number)
}

/// The number of a group.
#[must_use]
pub fn group_id(name: &str) -> Option<u32> {
    find("group", name, &|found, _| found == name).map(|(_, number)| number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_found_both_ways_and_strangers_are_not() {
        assert_eq!(user_id("root"), Some(0));
        assert_eq!(user_name(0).as_deref(), Some("root"));
        assert_eq!(group_name(0).as_deref(), Some("root"));
        assert_eq!(group_id(&group_name(0).unwrap()), Some(0));
        for stranger in ["", "--help", "0", "no such user", "a:b", "a\nb"] {
            assert_eq!((user_id(stranger), group_id(stranger)), (None, None), "{stranger:?}");
        }
        assert_eq!(user_name(4_294_967_000), None);
    }
}
