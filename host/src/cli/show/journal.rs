//! The journal and its files, as text.

use vmkeep_store::migrate::Migrated;

use crate::api::types::{Audited, KeyChange, Pruned, StoreInfo, Vouching};
use crate::text::{bytes, local, safe};

pub(in crate::cli) fn audited(audited: &Audited) -> String {
    let mut text =
        format!("{} records in {} streams are whole and in order\n", audited.records, audited.streams);
    for grave in &audited.pruned {
        text.push_str(&format!(
            "{} pruned {} events of {} to {}, final hash {}\n",
            safe(grave.stream.as_str()),
            grave.events,
            local(grave.first),
            local(grave.last),
            safe(&grave.hash)
        ));
    }
    for cut in &audited.cut {
        text.push_str(&format!("cut: {}\n", safe(cut)));
    }
    if let Some(head) = &audited.head {
        text.push_str(&format!("head {}\n", safe(head)));
    }
    match &audited.vouched {
        Some(vouching) => text.push_str(&vouched(vouching)),
        None if audited.head.is_some() => text.push_str(
            "A rewrite of everything, or an end that was cut off, leaves a chain that fits: only signed heads that were kept\nelsewhere tell (`vmkeep audit heads`, `vmkeep audit key`; --heads FILE --public-key KEY).\n",
        ),
        None => {}
    }
    text
}

fn vouched(vouching: &Vouching) -> String {
    let Vouching { file, local: beside, heads, commit, at, after, cut_off } = vouching;
    let mut text = format!(
        "{heads} signed heads agree with it; the newest is of commit {commit}, {}; {after} commits came after that\n",
        local(*at)
    );
    if *cut_off {
        text.push_str("The last line of the heads was cut off in the middle, and left out.\n");
    }
    if *beside {
        text.push_str(&format!(
            "They lie beside the journal ({}): whoever could change both is found only with heads that were kept\nelsewhere (`vmkeep audit verify --heads FILE --public-key KEY`).\n",
            safe(&file.display().to_string())
        ));
    }
    text
}

pub(in crate::cli) fn key_change(change: &KeyChange) -> String {
    format!(
        "Heads are signed with a new key from now on; the old one vouches for it.\nnew {}\nold {}\n",
        safe(&change.new),
        safe(&change.old)
    )
}

pub(in crate::cli) fn pruned(pruned: &Pruned) -> String {
    let mut text = String::new();
    for job in &pruned.jobs {
        let ended = job.ended.map(local).unwrap_or_default();
        text.push_str(&format!(
            "{} {} {} {} {ended}: {} events{}\n",
            safe(&job.job),
            safe(&job.workflow),
            safe(&job.subject),
            job.status.as_str(),
            job.events,
            job.hash.as_ref().map(|hash| format!(", final hash {}", safe(hash))).unwrap_or_default()
        ));
    }
    for failed in &pruned.failed {
        text.push_str(&format!("not pruned: {}\n", safe(failed)));
    }
    let would = if pruned.dry_run { "would be" } else { "were" };
    text.push_str(&format!(
        "{} events of {} jobs {would} pruned; {} jobs stay for the backups that they made\n",
        pruned.events,
        pruned.jobs.len(),
        pruned.kept_for_backups
    ));
    text
}

pub(in crate::cli) fn store(store: &StoreInfo) -> String {
    let link = store.head.as_ref().map(|head| format!("head     {}\n", safe(head))).unwrap_or_default();
    format!(
        "store    {}\nengine   {}\nid       {}\nsince    {}\nsize     {}\nrecords  {} in {} streams, {} commits\njobs     {}, and {} whose history was pruned\n{link}{}",
        safe(&store.path.display().to_string()),
        store.engine,
        store.id,
        local(store.created),
        bytes(store.size),
        store.records,
        store.streams,
        store.commits,
        store.jobs,
        store.pruned,
        if store.found == 0 {
            "It is whole.\n".to_owned()
        } else {
            format!("{} findings: `vmkeep audit verify` names them\n", store.found)
        }
    )
}

pub(in crate::cli) fn migrated(migrated: &Migrated) -> String {
    let Migrated { from, to, records, streams, commits, link, kept, .. } = migrated;
    let what = format!("{records} records in {streams} streams, {commits} commits\nhead {link}\n");
    match kept {
        None => format!(
            "The journal can be moved from {from} to {to}: it was, beside the store, and compared.\n{what}"
        ),
        Some(kept) => format!(
            "The journal was moved from {from} to {to}, and is the same record by record.\n{what}The old store is kept in {}; remove it when you like.\nBefore vmkeepd starts: set store.engine = \"{to}\" in its configuration.\n",
            safe(&kept.display().to_string())
        ),
    }
}
