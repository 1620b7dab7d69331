//! Answers as text. Everything that a stranger named goes through [`safe`].

mod backups;
mod jobs;
mod journal;
pub(super) mod retention;
pub(super) mod vault;

use jiff::Timestamp;
use vmkeep_workflow::Fault;

use crate::api::types::{DaemonPhase, DomainRow, Finding, Grade, Status, VaultedRow};
use crate::codes;
use crate::text::{ago, safe, table};

pub(super) use self::backups::{backup, backups, protection, rebuilt};
pub(super) use self::jobs::{ending, explanation, history, job, jobs, plan, replayed};
pub(super) use self::journal::{audited, key_change, migrated, pruned, store};

pub(super) fn fault(program: &str, fault: &Fault) -> String {
    let object = if fault.object.is_empty() { String::new() } else { format!(" ({})", safe(&fault.object)) };
    let mut text = format!(
        "{program}: could not {}{object}: {}\n  code   {} {}",
        safe(&fault.doing),
        safe(&fault.cause),
        fault.code,
        codes::name(fault.code)
    );
    let remedy = codes::remedy(fault);
    if !remedy.is_empty() {
        text.push_str(&format!("\n  remedy {}", safe(&remedy)));
    }
    text
}

pub(super) fn status(status: &Status) -> String {
    let now = Timestamp::now();
    let phase = match status.daemon.phase {
        DaemonPhase::WaitingForLibvirt => "waits for libvirt",
        DaemonPhase::Recovering => "takes interrupted jobs over",
        DaemonPhase::Ready => "ready",
        DaemonPhase::Stopping => "is stopping",
    };
    let mut text = format!(
        "vmkeepd {}, {phase}, started {}, state in {}\n",
        safe(&status.daemon.version),
        ago(status.daemon.started, now),
        safe(&status.daemon.state_dir.to_string_lossy())
    );
    let libvirt = &status.libvirt;
    let state = match (&libvirt.fault, &libvirt.versions) {
        (Some(fault), _) => format!("does not answer: {}. {}", safe(&fault.cause), safe(&fault.remedy)),
        (None, Some(versions)) => safe(versions),
        (None, None) => "answers".to_owned(),
    };
    text.push_str(&format!("libvirt {}: {state}\n", safe(&libvirt.uri)));
    for warning in &status.warnings {
        text.push_str(&format!("warning: {}\n", safe(warning)));
    }
    if !status.attention.is_empty() {
        text.push_str("\nNeeds attention\n");
        for job in &status.attention {
            text.push_str(&format!("  job {} on {}: {}\n", job.short, safe(&job.domain), safe(&job.title)));
            for item in &job.needs {
                text.push_str(&format!("    {}: {}\n", safe(&item.step), safe(&item.fault.cause)));
                if !item.fault.remedy.is_empty() {
                    text.push_str(&format!("    -> {}\n", safe(&item.fault.remedy)));
                }
            }
            text.push_str(&format!("    settle it: vmkeep job settle {}\n", job.short));
        }
    }
    if !status.running.is_empty() {
        text.push_str("\nRunning\n");
        text.push_str(&indent(&jobs(&status.running)));
    }
    text.push_str(&super::kept::list(&status.kept));
    text.push('\n');
    if status.domains.is_empty() {
        text.push_str(if libvirt.reachable { "No domains.\n" } else { "Domains are not known.\n" });
    } else {
        let mut rows =
            vec![heads(&["DOMAIN", "STATE", "LAST GOOD BACKUP IN A FOLDER", "LAST PUT INTO VAULTS", ""])];
        for domain in &status.domains {
            let backup = match &domain.last_backup {
                Some(last) => format!("{} ({})", ago(last.at, now), safe(&last.id)),
                None => "none".to_owned(),
            };
            let note = match (&domain.job, &domain.obstacle) {
                (Some(job), _) => format!("job {}", safe(job)),
                (None, Some(obstacle)) => format!("cannot be backed up: {}", safe(&obstacle.cause)),
                (None, None) => String::new(),
            };
            rows.push(vec![safe(&domain.name), safe(&domain.state), backup, in_vaults(domain, now), note]);
        }
        text.push_str(&table(&rows));
        text.push_str(IN_VAULTS);
    }
    text
}

pub(super) fn domains(domains: &[DomainRow]) -> String {
    if domains.is_empty() {
        return "No domains.".to_owned();
    }
    let now = Timestamp::now();
    let mut text = String::new();
    for domain in domains {
        let transient = if domain.persistent { "" } else { ", transient" };
        text.push_str(&format!("{}  {}{transient}\n", safe(&domain.name), safe(&domain.state)));
        text.push_str(&format!("  uuid    {}\n", safe(&domain.uuid)));
        match &domain.last_backup {
            Some(last) => {
                text.push_str(&format!("  backup  {} ({}), in a folder\n", ago(last.at, now), safe(&last.id)))
            }
            None => text.push_str("  backup  none in a folder\n"),
        }
        for last in &domain.in_vaults {
            text.push_str(&format!("  backup  {}, put into the vault {}\n", when(last, now), vault(last)));
        }
        if domain.in_vaults.is_empty() {
            text.push_str("  backup  none was put into a vault by this host\n");
        }
        if let Some(job) = &domain.job {
            text.push_str(&format!("  job     {}\n", safe(job)));
        }
        if let Some(obstacle) = &domain.obstacle {
            text.push_str(&format!("  cannot be backed up: {}\n", safe(&obstacle.cause)));
            text.push_str(&format!("    {}\n", safe(&obstacle.remedy)));
        }
        for disk in &domain.disks {
            let left_out =
                disk.left_out.as_ref().map(|why| format!("  left out: {}", safe(why))).unwrap_or_default();
            text.push_str(&format!(
                "  disk    {}  {}  {}{left_out}\n",
                safe(&disk.target),
                safe(&disk.format),
                safe(&disk.source)
            ));
        }
    }
    text.push_str(IN_VAULTS);
    text
}

/// What is said beside everything that this host knows of vaults by itself.
const IN_VAULTS: &str = "Of vaults this is what jobs of this host have put there; what is there now, others' too, tells: vmkeep vault \
                         list VAULT\n";

/// The last backup in each vault.
fn in_vaults(domain: &DomainRow, now: Timestamp) -> String {
    let each: Vec<String> =
        domain.in_vaults.iter().map(|last| format!("{}: {}", vault(last), when(last, now))).collect();
    if each.is_empty() { "none".to_owned() } else { each.join(", ") }
}

fn when(last: &VaultedRow, now: Timestamp) -> String {
    format!("{} ({})", ago(last.at, now), safe(end(&last.id)))
}

/// A vault's name, and its id where the name may be another's by now.
fn vault(last: &VaultedRow) -> String {
    if last.configured {
        return safe(&last.vault);
    }
    format!("{} (not configured any more; its id is {})", safe(&last.vault), safe(&last.vault_id))
}

/// The digits that lists of a vault show of a backup's id.
fn end(id: &str) -> &str {
    id.get(id.len().saturating_sub(8)..).unwrap_or(id)
}

pub(super) fn findings(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.grade {
            Grade::Good => "ok  ",
            Grade::Note => "note",
            Grade::Warning => "warn",
            Grade::Bad => "BAD ",
        };
        text.push_str(&format!("{mark}  {}: {}\n", safe(&finding.topic), safe(&finding.text)));
        if !finding.remedy.is_empty() {
            text.push_str(&format!("      -> {}\n", safe(&finding.remedy)));
        }
    }
    text
}

fn heads(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn pair(name: &str, value: &str) -> Vec<String> {
    vec![name.to_owned(), safe(value)]
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
