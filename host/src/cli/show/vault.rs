//! What is in vaults, as text.

use std::fmt::Write as _;
use std::path::Path;

use vmkeep_vault::backups::Hurt;
use vmkeep_vault::repair::{IndexRepair, Indexed};

use super::{heads, pair};
use crate::cli::vault::export::Exported;
use crate::cli::vault::look::{LeaseRow, Place};
use crate::cli::vault::make::{Attached, KeyRow, Made};
use crate::cli::vault::tend::{Collected, Healed, PrunedRow};
use crate::text::{bytes, local, safe, table};
use crate::vaults::types::{BackupDetail, BackupList, CheckRow, FateRow, HurtRow, Identity, StatsRow};

/// Ranges of a hurt image that are shown; the rest is counted.
const RANGES: usize = 4;

fn identity(identity: &Identity) -> Vec<Vec<String>> {
    let cipher = identity.cipher.unwrap_or("none: whoever reads the storage reads the backups");
    let domains = if identity.separate_domains { "share nothing" } else { "share what they have in common" };
    let mut rows = vec![
        pair("vault", &identity.vault),
        pair("address", &identity.url),
        pair("id", &identity.id),
        pair("encryption", cipher),
        pair("domains", domains),
    ];
    if identity.cipher.is_some() {
        rows.push(pair("this key", identity.role));
    }
    rows
}

pub(in crate::cli) fn made(made: &Made) -> String {
    let mut text = table(&identity(&made.identity));
    if let Some(file) = &made.key_file {
        let what = if made.key_file_made { "was made for it" } else { "opens it" };
        let _ = writeln!(text, "the key file {} {what}; keep a copy where the vault is not", shown(file));
    }
    match (&made.recovery_file, made.identity.cipher) {
        (Some(file), _) => {
            let _ = writeln!(text, "the recovery key is in {}: take it away from here", shown(file));
        }
        (None, Some(_)) => text.push_str("the recovery key was confirmed\n"),
        (None, None) => text.push_str(
            "It has no encryption, and nothing in it is signed: the credentials of its storage decide who reads, writes and \
             deletes.\n",
        ),
    }
    text
}

pub(in crate::cli) fn attached(attached: &Attached) -> String {
    let mut text = table(&identity(&attached.identity));
    if attached.backups.is_empty() {
        text.push_str("no backups\n");
    }
    for (domain, count) in &attached.backups {
        let _ = writeln!(text, "{} of {}", counted(*count as u64, "backup", "backups"), safe(domain));
    }
    if attached.unreadable > 0 {
        let _ = writeln!(text, "WRONG: {} manifests cannot be read", attached.unreadable);
    }
    if let Some(key) = &attached.new_key {
        let _ = writeln!(text, "the key {key} was made");
    }
    text
}

pub(in crate::cli) fn forgotten(vault: &str, known: bool) -> String {
    match known {
        true => format!("{} is forgotten on this host; the vault itself is as it was\n", safe(vault)),
        false => format!("this host knew nothing of {}\n", safe(vault)),
    }
}

pub(in crate::cli) fn keys(rows: &[KeyRow]) -> String {
    if rows.is_empty() {
        return "No keys: only the recovery key opens it, if it is encrypted.\n".to_owned();
    }
    let mut shown = vec![heads(&["KEY", "MEANS", "ROLE", "LABEL"])];
    for row in rows {
        shown.push(vec![
            row.id.clone(),
            row.means.unwrap_or("?").to_owned(),
            row.role.unwrap_or("?").to_owned(),
            match &row.problem {
                Some(problem) => format!("WRONG: {}", safe(problem)),
                None => safe(row.label.as_deref().unwrap_or_default()),
            },
        ]);
    }
    table(&shown)
}

pub(in crate::cli) fn key_added(id: &str, file: Option<&Path>) -> String {
    let file = file.map(|file| format!("; the key file {} was made", shown(file))).unwrap_or_default();
    format!("the key {id} opens the vault{file}\n")
}

pub(in crate::cli) fn key_removed(id: &str) -> String {
    format!("the key {id} is gone; whoever has kept a copy of it is not locked out by that\n")
}

pub(in crate::cli) fn list(found: &BackupList) -> String {
    let mut text = String::new();
    if found.backups.is_empty() {
        text.push_str("No backups.\n");
    } else {
        let mut rows =
            vec![heads(&["BACKUP", "DOMAIN", "POINT IN TIME", "KIND", "DISKS", "SIZE", "STORED", "MARKS"])];
        for backup in &found.backups {
            let unknown = || "?".to_owned();
            rows.push(vec![
                backup.short.clone(),
                safe(if backup.domain.is_empty() { &backup.domain_uuid } else { &backup.domain }),
                backup.at.map_or_else(unknown, local),
                backup.kind.map_or_else(unknown, str::to_owned),
                safe(&backup.disks.join(",")),
                bytes(backup.size),
                bytes(backup.stored),
                marks(&backup.marks),
            ]);
        }
        text.push_str(&table(&rows));
    }
    for backup in &found.backups {
        if let Some(problem) = &backup.problem {
            let _ = writeln!(text, "WRONG: {}: {}", backup.short, safe(problem));
        }
    }
    for missing in &found.missing {
        let _ = writeln!(
            text,
            "missing: {missing}: it was checked once, its manifest is gone, and nobody pruned it"
        );
    }
    text
}

/// Marks in words; that a backup was never checked is said, not that it was.
fn marks(marks: &[&'static str]) -> String {
    let mut words: Vec<&str> = Vec::new();
    if !marks.contains(&"checked") {
        words.push("unchecked");
    }
    for (mark, word) in [
        ("hurt", "HURT"),
        ("verified", "verified"),
        ("protect", "protected"),
        ("prune", "to be pruned"),
        ("ask", "asked to go"),
    ] {
        // What was read before it was hurt is no proof of anything.
        let counts = mark != "verified" || !marks.contains(&"hurt");
        if marks.contains(&mark) && counts {
            words.push(word);
        }
    }
    words.join(", ")
}

pub(in crate::cli) fn backup(detail: &BackupDetail) -> String {
    let backup = &detail.backup;
    let mut rows = vec![pair("backup", &backup.id)];
    let domain = match backup.domain.as_str() {
        "" => backup.domain_uuid.clone(),
        name => format!("{name} ({})", backup.domain_uuid),
    };
    rows.push(pair("domain", &domain));
    if let Some(at) = backup.at {
        rows.push(pair("point in time", &local(at)));
    }
    if let Some(kind) = backup.kind {
        rows.push(pair("kind", kind));
    }
    let field = |of: &serde_json::Value, name: &str| of[name].as_str().map(str::to_owned);
    if let Some(manifest) = &detail.manifest {
        for (name, label) in
            [("full_because", "full because"), ("parent", "based on"), ("consistency", "consistency")]
        {
            if let Some(value) = field(manifest, name).filter(|value| !value.is_empty()) {
                rows.push(pair(label, &value));
            }
        }
        for disk in manifest["disks"].as_array().into_iter().flatten() {
            rows.push(image("disk", disk, "target"));
        }
        for stream in manifest["streams"].as_array().into_iter().flatten() {
            rows.push(image("stream", stream, "name"));
        }
        if let Some(host) = field(&manifest["host"], "name").filter(|host| !host.is_empty()) {
            rows.push(pair("made on", &host));
        }
        if let Some(job) = field(&manifest["origin"], "job").filter(|job| !job.is_empty()) {
            rows.push(pair("made by job", &job));
        }
    }
    for mark in &detail.marks {
        let at = mark.at.map(|at| format!(", {}", local(at))).unwrap_or_default();
        let by = mark.by.as_ref().filter(|by| !by.is_empty());
        let by = by.map(|by| format!(" by {by}")).unwrap_or_default();
        let since = mark.since.map(|since| format!(", read since {}", local(since))).unwrap_or_default();
        rows.push(pair("mark", &format!("{}{by}{at}{since}", mark.kind)));
    }
    let mut text = table(&rows);
    if let Some(problem) = &backup.problem {
        let _ = writeln!(text, "WRONG: {}", safe(problem));
    }
    for mark in &detail.marks {
        if let Some(problem) = &mark.problem {
            let _ = writeln!(text, "WRONG: the mark {} {}: {}", mark.kind, mark.id, safe(problem));
        }
        mark.hurt.iter().for_each(|hurt| lacks(&mut text, hurt));
    }
    let _ = writeln!(text, "\nwrite it as files:  vmkeep vault export VAULT {} --to DIR", backup.short);
    text
}

fn image(what: &str, of: &serde_json::Value, name: &str) -> Vec<String> {
    let size = of["image"]["size"].as_u64().unwrap_or_default();
    let root = of["image"]["root"].as_str().unwrap_or_default();
    let root = root.get(..16).unwrap_or(root);
    pair(what, &format!("{}  {}  root {root}", of[name].as_str().unwrap_or_default(), bytes(size)))
}

fn lacks(text: &mut String, hurt: &Hurt) {
    let ranges: Vec<String> =
        hurt.ranges.iter().take(RANGES).map(|(from, to)| format!("{from}..{to}")).collect();
    let more = hurt.ranges.len().saturating_sub(RANGES);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let open = if hurt.open_ended { ", and what cannot be named" } else { "" };
    let _ = writeln!(text, "  {}: bytes {}{more}{open}", safe(&hurt.image), ranges.join(", "));
}

pub(in crate::cli) fn stats(stats: &StatsRow) -> String {
    let mut text = String::new();
    if !stats.domains.is_empty() {
        let names = ["DOMAIN", "BACKUP", "POINT IN TIME", "KIND", "SIZE", "USED", "PUT", "NEEDS", "ALONE"];
        let mut rows = vec![heads(&names)];
        for domain in &stats.domains {
            for one in &domain.backups {
                let end = one.id.len().saturating_sub(8);
                rows.push(vec![
                    safe(if domain.domain.is_empty() { &domain.domain_uuid } else { &domain.domain }),
                    one.id[end..].to_owned(),
                    local(one.at),
                    one.kind.to_owned(),
                    bytes(one.logical),
                    bytes(one.used),
                    bytes(one.put),
                    format!("{}{}", bytes(one.needs), if one.incomplete { "+" } else { "" }),
                    bytes(one.unique),
                ]);
            }
        }
        text.push_str(&table(&rows));
        text.push_str("ALONE is what pruning that one backup gives back in the end.\n\n");
    }
    let amount =
        |amount: crate::vaults::types::Amount| format!("{} in {}", bytes(amount.bytes), amount.count);
    let mut rows = vec![
        pair("packs of data", &amount(stats.data)),
        pair("packs of nodes", &amount(stats.tree)),
        pair("index", &format!("{}, {} in use", amount(stats.index), stats.usable_runs)),
        pair("needed", &bytes(stats.needed)),
        pair("needed by nobody", &bytes(stats.garbage)),
        pair("in use by", &stats.leases.to_string()),
    ];
    if stats.condemned_packs > 0 {
        rows.push(pair("condemned packs", &stats.condemned_packs.to_string()));
    }
    text.push_str(&table(&rows));
    if stats.sampled > 1 {
        let _ = writeln!(text, "Estimated from one in {} blobs.", stats.sampled);
    }
    for (count, what) in [
        (stats.bad_places, "places are known to be bad"),
        (stats.unreadable, "manifests cannot be read"),
        (stats.missing, "manifests are gone although nobody pruned their backups"),
        (stats.unreadable_runs, "runs of the index cannot be read"),
    ] {
        if count > 0 {
            let _ = writeln!(text, "WRONG: {count} {what}");
        }
    }
    text
}

pub(in crate::cli) fn check(check: &CheckRow) -> String {
    let mut text = String::new();
    let count = counted(check.whole.len() as u64, "backup is", "backups are");
    let _ = write!(text, "{count} whole");
    if check.packs_read > 0 {
        let (verified, read) = (check.verified.len(), bytes(check.read));
        let _ = write!(text, ", {verified} of them verified; {read} were read, ");
        let _ = write!(text, "{} of {} packs", check.packs_read, check.packs_there);
    }
    text.push('\n');
    if check.slice.is_some() && check.verified.len() < check.whole.len() {
        text.push_str("the others wait for the slices that were not read since they were put\n");
    }
    findings(&mut text, check);
    text
}

fn findings(text: &mut String, check: &CheckRow) {
    for HurtRow { backup, hurt } in &check.hurt {
        let _ = writeln!(text, "HURT: {backup}");
        hurt.iter().for_each(|hurt| lacks(text, hurt));
    }
    if !check.hurt.is_empty() {
        text.push_str("what is hurt is healed, also where the bytes are there again: vmkeep vault repair\n");
    }
    for (id, why) in &check.unreadable {
        let _ = writeln!(text, "WRONG: the manifest of {id} cannot be read: {}", safe(why));
    }
    for id in &check.missing {
        let _ = writeln!(text, "WRONG: the manifest of {id} is gone, and nobody pruned it");
    }
    for (run, why) in &check.runs {
        let _ = writeln!(text, "WRONG: the index's run {run} cannot be read: {}", safe(why));
    }
    for pack in &check.packs {
        let _ = writeln!(text, "WRONG: the pack {pack} is damaged");
    }
    if check.damage > 0 {
        let _ = writeln!(text, "{} found", counted(check.damage as u64, "bad place was", "bad places were"));
    }
}

pub(in crate::cli) fn place(place: &Place) -> String {
    let mut text = String::new();
    for (promise, kept, how) in &place.promises {
        let word = match kept {
            Some(true) => "ok      ",
            Some(false) => "BROKEN  ",
            None => "untried ",
        };
        let how = how.as_ref().map(|how| format!(": {}", safe(how))).unwrap_or_default();
        let _ = writeln!(text, "{word}{promise}{how}");
    }
    for (power, what) in [(place.deletes, "delete"), (place.overwrites, "overwrite")] {
        let can = match power {
            Some(true) => "can",
            Some(false) => "cannot",
            None => "may or may not be able to",
        };
        let _ = writeln!(text, "these credentials {can} {what}");
    }
    text
}

pub(in crate::cli) fn leases(rows: &[LeaseRow]) -> String {
    if rows.is_empty() {
        return "Nobody uses the vault.\n".to_owned();
    }
    let mut shown = vec![heads(&["LEASE", "HOST", "FOR", "COLLECTS", "ALIVE FOR"])];
    for row in rows {
        shown.push(vec![
            row.id.clone(),
            safe(row.host.as_deref().unwrap_or("?")),
            safe(row.purpose.as_deref().unwrap_or("?")),
            if row.collects { "yes" } else { "no" }.to_owned(),
            format!("{} min at least", row.beats * 5),
        ]);
    }
    table(&shown)
}

pub(in crate::cli) fn collected(done: &Collected) -> String {
    let mut text = String::new();
    for id in &done.doomed {
        let _ = writeln!(text, "goes: {id}");
    }
    for id in &done.spared {
        let _ = writeln!(text, "to be pruned, and stays for now: {id}");
    }
    if done.alarming {
        text.push_str("WARNING: more backups go than were expected\n");
    }
    text.push_str(match done.ended {
        "done" => "collected\n",
        "planned" => "",
        "nothing" => "there is nothing to collect\n",
        "others" => "another collection is at work; come again later\n",
        "blocked" => {
            "nothing was deleted: what these need is not known. Heal them (`vmkeep vault repair`), or prune them by name\n"
        }
        "waiting" => "these have begun before and are not over; the next collection goes on (`vmkeep vault leases`)\n",
        _ => "this collection was given up for dead; the next one goes on\n",
    });
    for because in &done.because {
        let _ = writeln!(text, "  {}", safe(because));
    }
    if let Some((given_up, moved)) = done.would {
        let _ = writeln!(
            text,
            "{} with {} would be given up, {} of it moved, {} freed",
            counted(done.given_up as u64, "pack", "packs"),
            bytes(given_up),
            bytes(moved),
            bytes(given_up.saturating_sub(moved))
        );
    } else if done.given_up > 0 || done.deleted > 0 {
        let _ = writeln!(
            text,
            "{} given up, {} with {} moved, {} deleted",
            counted(done.given_up as u64, "pack", "packs"),
            counted(done.moved, "blob", "blobs"),
            bytes(done.moved_bytes),
            counted(done.deleted, "object", "objects")
        );
    }
    for pack in &done.kept {
        let _ = writeln!(text, "WRONG: the pack {pack} stays: something in it is needed and cannot be read");
    }
    text
}

pub(in crate::cli) fn pruned(rows: &[PrunedRow]) -> String {
    let line = |row: &PrunedRow| {
        let said = match row.fate {
            "ordered" => "goes with the next collection: vmkeep vault gc",
            "asked" => "was asked to go; whoever collects may obey",
            "already" => "was to be pruned already",
            "would" => "would be ordered to go",
            _ => "stays: it was protected meanwhile",
        };
        format!("{} {said}\n", row.backup)
    };
    rows.iter().map(line).collect()
}

pub(in crate::cli) fn unprotected(id: &str, goes: bool, dry_run: bool) -> String {
    let would = if dry_run { "would no longer be" } else { "is no longer" };
    let goes = if goes { ": it was to be pruned, and goes with the next collection" } else { "" };
    format!("backup {id} {would} protected{goes}\n")
}

pub(in crate::cli) fn indexed(done: &IndexRepair) -> String {
    let mut text = match &done.ended {
        Indexed::Nothing => "every pack has a run that can be read\n".to_owned(),
        Indexed::Put => format!("{} packs with {} blobs have a run again\n", done.packs, done.blobs),
        Indexed::Others(_) => "a collection is at work; do it again when it has ended\n".to_owned(),
        Indexed::Revoked => "this was given up for dead meanwhile; do it again\n".to_owned(),
    };
    for run in &done.set_aside {
        let _ = writeln!(text, "set aside: {run}");
    }
    for pack in &done.missing {
        let _ = writeln!(text, "WRONG: the pack {pack} is gone; `vmkeep vault check` tells whom that hurts");
    }
    text
}

pub(in crate::cli) fn healed(healed: &Healed) -> String {
    let mut text = format!(
        "{} blobs from other places of the vault, {} from elsewhere, {} put\n",
        healed.moved,
        healed.given,
        bytes(healed.stored)
    );
    for (who, why) in &healed.failures {
        let _ = writeln!(text, "WRONG: {} could not be asked for everything: {}", safe(who), safe(why));
    }
    if healed.revoked {
        text.push_str("it was given up for dead meanwhile; do it again\n");
        return text;
    }
    text.push_str(&check(&healed.now));
    text
}

pub(in crate::cli) fn copied(rows: &[FateRow]) -> String {
    if rows.is_empty() {
        return "No backups.\n".to_owned();
    }
    let mut text = String::new();
    for row in rows {
        let said = match (&row.why, row.fate) {
            (Some(why), _) => format!("not copied: {}", safe(why)),
            (None, "copied") => format!("copied: {} read, {} put", bytes(row.read), bytes(row.stored)),
            (None, _) => "is there already".to_owned(),
        };
        let _ = writeln!(text, "{}  {said}", row.backup);
    }
    text
}

pub(in crate::cli) fn exported(files: &[Exported]) -> String {
    let mut rows = vec![heads(&["FILE", "SIZE", "DATA", "ROOT"])];
    for file in files {
        let root = file.root.as_deref().map_or("", |root| root.get(..16).unwrap_or(root));
        rows.push(vec![shown(&file.file), bytes(file.size), bytes(file.written), root.to_owned()]);
    }
    table(&rows)
}

pub(super) fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn shown(path: &Path) -> String {
    safe(&path.to_string_lossy())
}
