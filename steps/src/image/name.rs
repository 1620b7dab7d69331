//! File names made from names that a stranger chose: domain names, disk targets.
//!
//! libvirt lets a domain be called almost anything: blanks, quotes, `$()`, newlines, `..`, any Unicode. Such a name
//! becomes one path component by percent encoding. Bytes that stay as they are: ASCII letters, digits, `-`, `_`, and
//! `.` unless it comes first (so no result is `.`, `..` or hidden). Every other byte of the UTF-8 form is `%XX`, upper
//! case. Non-ASCII letters are encoded too: some file systems normalise Unicode, so that a name read back would differ
//! from the name written.
//!
//! The encoding is reversible ([`decode`]) up to [`LONGEST`] bytes. Longer results are cut and end in `~` and 16 hex
//! digits of the name's BLAKE3: `~` is never produced otherwise, so a cut name collides with no whole one, and two cut
//! names collide only if 64 bits of hash do. The empty name becomes `%`, which no other name encodes to.
//!
//! On a file system that ignores case `VM` and `vm` share a folder. That is harmless: folders of single backups carry
//! a unique id, and which domain a backup belongs to is read from its manifest, never from a path.

use std::fmt::Write as _;

/// The longest encoded name in bytes. A file name may have 255; the rest is room for suffixes.
pub const LONGEST: usize = 180;

/// Bytes kept of a name that is too long, before `~` and the digits.
const KEPT: usize = LONGEST - 17;

/// Encodes any string as one harmless path component.
///
/// ```
/// use vmkeep_steps::image::name::encode;
/// assert_eq!(encode("web-01.example"), "web-01.example");
/// assert_eq!(encode("../$(id) \n"), "%2E.%2F%24%28id%29%20%0A");
/// ```
pub fn encode(name: &str) -> String {
    if name.is_empty() {
        return "%".to_owned();
    }
    let mut out = String::with_capacity(name.len() + 16);
    for (i, byte) in name.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => out.push(char::from(byte)),
            b'.' if i > 0 => out.push('.'),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    if out.len() <= LONGEST {
        return out;
    }
    // Not in the middle of an escape: the result is for people to read as well.
    let cut = match out.as_bytes()[KEPT - 2..KEPT].iter().position(|b| *b == b'%') {
        Some(at) => KEPT - 2 + at,
        None => KEPT,
    };
    out.truncate(cut);
    let digest = blake3::hash(name.as_bytes()).to_hex();
    let _ = write!(out, "~{}", &digest.as_str()[..16]);
    out
}

/// The name that [`encode`] was given, or `None` if `encoded` was cut or is nothing that `encode` makes.
pub fn decode(encoded: &str) -> Option<String> {
    if encoded == "%" {
        return Some(String::new());
    }
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let pair = [rest.next()?, rest.next()?];
                let text = std::str::from_utf8(&pair).ok()?;
                bytes.push(u8::from_str_radix(text, 16).ok()?);
            }
            _ => bytes.push(byte),
        }
    }
    let name = String::from_utf8(bytes).ok()?;
    // One name, one encoding: `%41` for `A` is not ours.
    (encode(&name) == encoded).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NASTY: &[&str] = &[
        "",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a b",
        "a\"b'c",
        "$(touch /tmp/pwned)",
        "`id`",
        "new\nline\r",
        "Büro-Server 東京",
        "-rf",
        "json:{}",
        "nbd:localhost:1",
        "%",
        "%41",
        "~0123456789abcdef",
        "a\u{0}b",
        "con:",
    ];

    #[test]
    fn nasty_names_become_one_harmless_component_and_come_back() {
        for name in NASTY {
            let encoded = encode(name);
            assert!(!encoded.is_empty() && !encoded.starts_with('.') && encoded.len() <= LONGEST, "{name:?}");
            assert!(encoded.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.%".contains(&b)), "{encoded}");
            assert_eq!(decode(&encoded).as_deref(), Some(*name), "{encoded}");
        }
    }

    #[test]
    fn names_too_long_are_cut_without_colliding() {
        let long = "ü".repeat(400);
        let other = format!("{}x", "ü".repeat(399));
        assert!(encode(&long).len() <= LONGEST);
        assert_ne!(encode(&long), encode(&other));
        assert_eq!(decode(&encode(&long)), None);
        // Exactly at the limit nothing is cut.
        let fits = "a".repeat(LONGEST);
        assert_eq!(encode(&fits), fits);
    }

    #[test]
    fn what_encode_never_makes_is_not_decoded() {
        for foreign in ["%41", "%2e", "a/b", ".", "..", "%", "%G0", "%4", "a b"] {
            let back = decode(foreign);
            assert!(back.is_none() || foreign == "%", "{foreign} -> {back:?}");
        }
    }

    proptest! {
        #[test]
        fn different_names_never_share_a_file_name(a in any::<String>(), b in any::<String>()) {
            prop_assert_eq!(a == b, encode(&a) == encode(&b));
            if !encode(&a).contains('~') {
                prop_assert_eq!(decode(&encode(&a)), Some(a));
            }
        }
    }
}
