//! Places as people name them: a path, or `file://` with a path behind it.
//!
//! stoney conductor's directory and its tools name folders as `file:///var/backup/virtualization`. What stands behind
//! `file://` is the path as it is, without escapes, as that daemon took it. Every other protocol is refused by its name:
//! a path that happens to begin with `ssh://` would otherwise become a folder of that name somewhere.

use std::path::{Path, PathBuf};

use vmkeep_workflow::Fault;

use crate::codes;

/// What `file://` may be followed by, besides the path.
const HERE: &str = "localhost";

/// The protocol that a place is named with, and what follows.
fn protocol(place: &str) -> Option<(&str, &str)> {
    let (protocol, rest) = place.split_once("://")?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    let is_one = protocol.starts_with(|c: char| c.is_ascii_alphabetic()) && protocol.chars().all(plain);
    is_one.then_some((protocol, rest))
}

/// The path of a place, relative ones included.
///
/// # Errors
/// 35 when it is named with another protocol than `file://`, or lies on another host.
pub fn path(place: &Path) -> Result<PathBuf, Fault> {
    // What is not UTF-8 is no such name.
    let Some((protocol, rest)) = place.to_str().and_then(protocol) else { return Ok(place.to_owned()) };
    let unsupported = |cause: String| {
        let object = place.display().to_string();
        Fault::permanent(codes::UNSUPPORTED_FILE_TRANSFER_PROTOCOL, "use the place", object, cause)
            .remedy("Give a path, or `file://` and a path; mount here what is on another host")
    };
    if !protocol.eq_ignore_ascii_case("file") {
        return Err(unsupported(format!("{protocol}:// is not supported, only file:// is")));
    }
    let path = rest.strip_prefix(HERE).unwrap_or(rest);
    if path.starts_with('/') {
        return Ok(path.into());
    }
    Err(unsupported(format!(
        "it names something on the host {:?}",
        path.split('/').next().unwrap_or_default()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_path_or_a_file_url_of_this_host_and_nothing_else() {
        for (place, expected) in [
            ("/srv/backups", "/srv/backups"),
            ("backups", "backups"),
            ("file:///srv/back ups/100%41", "/srv/back ups/100%41"),
            ("FILE://localhost/srv", "/srv"),
            // No protocols, however odd.
            ("a/b://c", "a/b://c"),
            ("://c", "://c"),
            ("1x://c", "1x://c"),
        ] {
            assert_eq!(path(Path::new(place)).unwrap(), Path::new(expected), "{place}");
        }
        for (place, word) in [
            ("ssh://backup/srv", "ssh://"),
            ("nfs://backup/srv", "nfs://"),
            ("s3://bucket", "s3://"),
            ("file://backup/srv", "\"backup\""),
            ("file://", "\"\""),
        ] {
            let fault = path(Path::new(place)).unwrap_err();
            assert_eq!(
                (fault.code, fault.object.as_str()),
                (codes::UNSUPPORTED_FILE_TRANSFER_PROTOCOL, place)
            );
            assert!(fault.cause.contains(word) && fault.remedy.contains("file://"), "{fault}");
        }
    }
}
