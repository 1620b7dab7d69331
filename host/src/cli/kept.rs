//! What restores in place have set aside, as text.

use jiff::Timestamp;

use crate::api::types::KeptRow;
use crate::text::{ago, bytes, local, safe};

/// The part of the first screen; nothing if nothing is kept.
pub(super) fn list(all: &[KeptRow]) -> String {
    let now = Timestamp::now();
    let mut text = String::new();
    for kept in all {
        let memory = if kept.memory { ", with its memory" } else { "" };
        text.push_str(&format!(
            "  {}  {}  {}{memory}, since {}: {}\n",
            safe(&kept.short),
            safe(&kept.domain),
            bytes(kept.bytes),
            ago(kept.at, now),
            safe(&kept.because)
        ));
        text.push_str(&format!(
            "    bring it back: vmkeep restore --undo {0}; or give it up: vmkeep restore --discard {0}\n",
            safe(&kept.short)
        ));
    }
    if text.is_empty() { text } else { format!("\nKept aside by restores in place\n{text}") }
}

/// One machine that is kept.
pub(super) fn one(kept: &KeptRow) -> String {
    let mut text = format!(
        "What {} was before job {}, kept aside since {}: {}\n",
        safe(&kept.domain),
        safe(&kept.short),
        local(kept.at),
        safe(&kept.because)
    );
    text.push_str(&format!("  size    {}\n", bytes(kept.bytes)));
    text.push_str(&format!("  memory  {}\n", if kept.memory { "saved" } else { "none" }));
    for image in &kept.images {
        text.push_str(&format!("  image   {}\n", safe(&image.to_string_lossy())));
    }
    text.push_str(&format!("  folder  {}\n", safe(&kept.folder.to_string_lossy())));
    text
}
