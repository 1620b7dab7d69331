//! Backups as text.

use jiff::Timestamp;

use super::{IN_VAULTS, end, heads, pair, vault};
use crate::api::types::{BackupDetail, BackupRow, Backups, ProtectionRow, Rebuilt, VaultedRow, VerifiedRow};
use crate::text::{ago, bytes, local, safe, table};

pub(in crate::cli) fn backups(found: &Backups) -> String {
    let mut text = String::new();
    if found.backups.is_empty() {
        text.push_str("No backups in folders.\n");
    } else {
        let mut rows = vec![heads(&[
            "BACKUP",
            "DOMAIN",
            "POINT IN TIME",
            "DISKS",
            "MEMORY",
            "SIZE",
            "VERIFIED",
            "FOLDER",
        ])];
        let now = Timestamp::now();
        for backup in &found.backups {
            rows.push(vec![
                safe(&backup.short),
                safe(&backup.domain),
                local(backup.at),
                safe(&backup.disks.join(",")),
                if backup.memory { "yes" } else { "no" }.to_owned(),
                bytes(backup.size),
                match &backup.verified {
                    None => "never".to_owned(),
                    Some(VerifiedRow { at, problem: None, .. }) => ago(*at, now),
                    Some(VerifiedRow { problem: Some(_), .. }) => "FAILED".to_owned(),
                },
                safe(&backup.folder.to_string_lossy()),
            ]);
        }
        text.push_str(&table(&rows));
    }
    for backup in &found.backups {
        if let Some(words) = failed_verification(backup) {
            text.push_str(&format!("WRONG: {} of {}: {words}\n", safe(&backup.short), safe(&backup.domain)));
        }
        // Each folder has its row; the first of them by name tells.
        if backup.copies.iter().all(|copy| *copy > backup.folder) && !backup.copies.is_empty() {
            let folders = std::iter::once(&backup.folder).chain(&backup.copies);
            let folders: Vec<_> = folders.map(|folder| safe(&folder.to_string_lossy())).collect();
            text.push_str(&format!(
                "copied: {} is one backup in {} folders: {}. Name the folder that is meant\n",
                safe(&backup.short),
                folders.len(),
                folders.join(", ")
            ));
        }
    }
    let protected = found.backups.iter().filter_map(|one| Some((one, one.protection.as_ref()?)));
    for (backup, note) in protected {
        text.push_str(&format!("protected: {} {}\n", safe(&backup.short), protection(note)));
    }
    for missing in &found.missing {
        let backup = &missing.backup;
        text.push_str(&format!(
            "missing: {} of {}, {}, in {}: {}\n",
            safe(&backup.short),
            safe(&backup.domain),
            local(backup.at),
            safe(&backup.folder.to_string_lossy()),
            safe(&missing.why)
        ));
    }
    for warning in &found.warnings {
        text.push_str(&format!("warning: {}\n", safe(warning)));
    }
    text.push_str(&in_vaults(&found.in_vaults));
    text
}

/// The last backups in vaults.
fn in_vaults(last: &[VaultedRow]) -> String {
    if last.is_empty() {
        return String::new();
    }
    let mut rows = vec![heads(&["DOMAIN", "LAST IN VAULT", "BACKUP", "POINT IN TIME"])];
    for one in last {
        rows.push(vec![safe(&one.domain), vault(one), safe(end(&one.id)), local(one.at)]);
    }
    format!("\n{}{IN_VAULTS}", table(&rows))
}

/// What the last verification of a backup found, if it found something.
fn failed_verification(backup: &BackupRow) -> Option<String> {
    let VerifiedRow { at, job, problem } = backup.verified.as_ref()?;
    let problem = problem.as_ref()?;
    Some(format!("verification failed at {} (job {}): {}", local(*at), safe(job), safe(problem)))
}

/// Who protects a backup, until when and why.
pub(in crate::cli) fn protection(note: &ProtectionRow) -> String {
    let until = note.until.map(|until| format!(", until {}", local(until))).unwrap_or_default();
    let why = note.why.as_ref().map(|why| format!(": {}", safe(why))).unwrap_or_default();
    format!("by {} since {}{until}{why}", safe(&note.by), local(note.at))
}

/// What reading everything anew found.
pub(in crate::cli) fn rebuilt(report: &Rebuilt) -> String {
    let shown: Vec<_> = report.roots.iter().map(|root| safe(&root.to_string_lossy())).collect();
    let mut text = format!("{} backups below {}\n", report.found, shown.join(", "));
    for folder in &report.added {
        text.push_str(&format!("new: {}\n", safe(&folder.to_string_lossy())));
    }
    for (what, lines) in [
        ("missing", &report.missing),
        ("cannot be read", &report.unreadable),
        ("not whole", &report.damaged),
        ("warning", &report.warnings),
    ] {
        lines.iter().for_each(|line| text.push_str(&format!("{what}: {}\n", safe(line))));
    }
    text
}

pub(in crate::cli) fn backup(detail: &BackupDetail) -> String {
    let backup = &detail.backup;
    let mut rows = vec![
        pair("backup", &backup.id),
        pair("domain", &format!("{} ({})", backup.domain, backup.domain_uuid)),
        pair("point in time", &local(backup.at)),
        pair("memory", if backup.memory { "yes" } else { "no" }),
        pair("disks", &backup.disks.join(", ")),
        pair("size", &bytes(backup.size)),
        pair("folder", &backup.folder.to_string_lossy()),
    ];
    if let Some(job) = &backup.job {
        rows.push(pair("made by job", job));
    }
    if let Some(note) = &backup.protection {
        rows.push(pair("protected", &protection(note)));
    }
    rows.push(match &backup.verified {
        None => pair("verified", "never"),
        Some(VerifiedRow { at, job, problem: None }) => {
            pair("verified", &format!("{}, by job {job}", local(*at)))
        }
        Some(VerifiedRow { problem: Some(_), .. }) => pair("verified", "it is WRONG"),
    });
    for copy in &backup.copies {
        rows.push(pair("also in", &copy.to_string_lossy()));
    }
    let mut text = table(&rows);
    if let Some(words) = failed_verification(backup) {
        text.push_str(&format!("WRONG: {words}\n"));
    }
    for problem in &detail.problems {
        text.push_str(&format!("WRONG: {}\n", safe(problem)));
    }
    for note in &detail.notes {
        text.push_str(&format!("note: {}\n", safe(note)));
    }
    text.push_str(&format!("\nbring it back:  vmkeep restore {} --as NAME\n", safe(&backup.short)));
    text
}
