//! What a word means in a vault: a backup by its id or an end of it, a domain by its name or UUID.
//!
//! Ids begin with a time, so those of backups that were made in one night have their beginnings in common; it is their ends
//! that tell them apart, and both are understood.

use std::collections::BTreeSet;
use std::str::FromStr;

use vmkeep_vault::backups::Backups;
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_workflow::Fault;

use crate::codes;

/// The shortest part of an id that is looked for.
const SHORTEST: usize = 4;

/// The backup that a word names: one that is there, or, with `gone`, of which there are only marks.
///
/// # Errors
/// If there is none, or several.
pub fn backup(all: &Backups, word: &str, gone: bool) -> Result<BackupId, Fault> {
    let mut ids: BTreeSet<BackupId> = all.iter().map(|(id, _)| id).collect();
    if gone {
        ids.extend(all.all_marks().backups());
    }
    one(ids, word, "backup").map_err(|(code, cause)| {
        let fault = Fault::permanent(code, "find the backup", word, cause);
        if code == codes::NO_SUCH_BACKUP { fault.remedy("`vmkeep vault list VAULT`") } else { fault }
    })
}

/// The one of some ids that a word names: a whole one, its beginning or its end.
///
/// # Errors
/// A code and the cause, if it names none of them or several.
pub fn one<T: Copy + ToString>(
    ids: impl IntoIterator<Item = T>,
    word: &str,
    what: &str,
) -> Result<T, (vmkeep_workflow::Code, String)> {
    let wanted = word.replace('-', "").to_ascii_lowercase();
    let fits = |id: &T| {
        let id = id.to_string();
        id == wanted || (wanted.len() >= SHORTEST && (id.starts_with(&wanted) || id.ends_with(&wanted)))
    };
    let found: Vec<T> = ids.into_iter().filter(fits).collect();
    match found.as_slice() {
        [one] => Ok(*one),
        [] if wanted.len() < SHORTEST => {
            Err((codes::NO_SUCH_BACKUP, format!("give at least {SHORTEST} digits of its id")))
        }
        [] => Err((codes::NO_SUCH_BACKUP, format!("there is no {what} of that id"))),
        many => Err((codes::AMBIGUOUS_NAME, format!("{} ids begin or end so", many.len()))),
    }
}

/// The domains that a word names: by UUID, or by the name that their backups give.
///
/// # Errors
/// If there is none.
pub fn domains(all: &Backups, word: &str) -> Result<BTreeSet<DomainId>, Fault> {
    let wanted = DomainId::from_str(&word.replace('-', "").to_ascii_lowercase()).ok();
    let named = |domain: DomainId, name: Option<&str>| Some(domain) == wanted || name == Some(word);
    let found: BTreeSet<DomainId> = all
        .iter()
        .filter(|(_, one)| named(one.domain, one.manifest.as_ref().ok().map(|one| one.domain_name.as_str())))
        .map(|(_, one)| one.domain)
        .collect();
    if found.is_empty() {
        let cause = "no backup in the vault is of a domain of that name or UUID";
        return Err(Fault::permanent(codes::CANNOT_FIND_MACHINE, "find the domain", word, cause)
            .remedy("`vmkeep vault list VAULT` shows the domains"));
    }
    Ok(found)
}
