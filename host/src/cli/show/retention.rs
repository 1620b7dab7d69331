//! Which backups of a vault stay, as text.

use std::fmt::Write as _;

use vmkeep_vault::retention::Reason;

use super::heads;
use super::vault::counted;
use crate::cli::vault::retain::{Retention, RetentionRow};
use crate::text::{local, safe, table};

pub(in crate::cli) fn retention(plan: &Retention) -> String {
    if plan.backups.is_empty() {
        return "No backups.\n".to_owned();
    }
    let mut rows = vec![heads(&["BACKUP", "DOMAIN", "POINT IN TIME", "FATE", "BECAUSE"])];
    for RetentionRow { backup, fate, because } in &plan.backups {
        rows.push(vec![
            backup.short.clone(),
            safe(if backup.domain.is_empty() { &backup.domain_uuid } else { &backup.domain }),
            backup.at.map_or_else(|| "?".to_owned(), local),
            (*fate).to_owned(),
            because.join(", "),
        ]);
    }
    let goes = plan.backups.iter().filter(|row| row.fate == "goes").count() as u64;
    let mut text = table(&rows);
    if plan.backups.iter().any(|row| row.because == [Reason::NoneVerified.to_string()]) {
        text.push_str(
            "Where none is verified nothing goes, for what stays may be what nobody can read: vmkeep vault verify; or \
             --unverified\n",
        );
    }
    let _ = match goes {
        0 => writeln!(text, "nothing is to go"),
        _ => writeln!(text, "{} to go", counted(goes, "backup is", "backups are")),
    };
    text
}

/// What was ordered of a plan that has been shown.
pub(in crate::cli) fn retained(done: &Retention) -> String {
    let mut text = String::new();
    for (fate, said) in [
        ("ordered", "go with the next collection: vmkeep vault gc"),
        ("asked", "were asked to go; whoever collects may obey"),
        ("already", "were to be pruned already"),
        ("protected", "stay: they were protected meanwhile"),
    ] {
        let count = done.backups.iter().filter(|row| row.fate == fate).count();
        if count > 0 {
            let _ = writeln!(text, "{count} {said}");
        }
    }
    text
}
