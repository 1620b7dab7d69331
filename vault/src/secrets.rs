//! What must not lie in a vault without encryption (`FORMAT.md`, §3: passwords only in an encrypted one).

use crate::manifest::Manifest;

/// Streams that hold no keys of the guest's. Memory and the state of a TPM do, and of any other nobody knows.
const HARMLESS: [&str; 1] = ["nvram"];

/// Why a backup may not lie in the open; nothing if it may. A word too many costs a copy, one too few a secret: what looks
/// like one counts as one.
#[must_use]
pub fn secret(manifest: &Manifest) -> Option<&'static str> {
    if manifest.streams.iter().any(|stream| !HARMLESS.contains(&stream.name.as_str())) {
        return Some("memory and devices of the guest hold its keys");
    }
    // However it is spelled: blanks may stand before an equals sign.
    let definition: String = manifest.definition.split_whitespace().collect();
    if manifest.disks.iter().any(|disk| disk.source_format == "luks") || definition.contains("<encryption") {
        return Some("a disk is encrypted where it is, and would lie there in the open");
    }
    let passwords = ["passwd=", "<cookie", "<password"];
    if passwords.iter().any(|one| definition.contains(one)) {
        return Some("there are passwords in the definition");
    }
    None
}
