//! `vmkeep vault prune` by rules: what is to go is shown first, and ordered only then.
//!
//! Before anything is judged the trees of all backups are walked, as by the quick check: a backup that lacks something must not
//! take the place of one that is whole. Nobody locks the vault meanwhile, and the answer may take somebody a day. So before the
//! first order everything is listed and judged once more (and walked, if somebody was asked), and what goes by only one of the two
//! judgements stays. What another
//! host orders at the same moment cannot take the last one: whoever goes by rules leaves the newest.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use vmkeep_vault::backups::{Backup, Backups};
use vmkeep_vault::check::{self, CheckReport};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::{BackupId, DomainId};
use vmkeep_vault::names::MarkKind;
use vmkeep_vault::retention::{Candidate, Fate, Plan, Rules, Standing};
use vmkeep_workflow::Fault;

use super::{Opened, holder, open, settings, tend};
use crate::cli::args::{Global, KeepBy, VaultPrune};
use crate::cli::show::retention as show;
use crate::cli::terminal::Terminal;
use crate::cli::{Ended, Out, config};
use crate::codes;
use crate::config::{Keep, VaultSettings, periods};
use crate::text::safe;
use crate::vaults::named;
use crate::vaults::types::BackupRow;

const DOING: &str = "prune by rules";

/// What becomes of the backups of a vault.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Retention {
    /// The time zone whose calendar was gone by; nothing if it has no name.
    pub(in crate::cli) time_zone: Option<String>,
    /// The instant after which a backup is of the future.
    pub(in crate::cli) now: Timestamp,
    /// Whether anything was ordered.
    pub(in crate::cli) ordered: bool,
    /// Each backup: by domain, the newest first.
    pub(in crate::cli) backups: Vec<RetentionRow>,
}

/// What becomes of a backup.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct RetentionRow {
    pub(in crate::cli) backup: BackupRow,
    /// `stays`, `goes`, or `going` if it was to be pruned already; once that was carried out, of those that were to go
    /// `ordered`, `asked`, `already`, `protected`, or `stays` if it is judged otherwise by now.
    pub(in crate::cli) fate: &'static str,
    /// Why it stays.
    pub(in crate::cli) because: Vec<String>,
}

pub(super) async fn prune(global: &Global, out: &Out, args: &VaultPrune) -> Ended {
    let keep = keep(args, &settings(&config(global)?, &args.vault.vault, &args.vault.key)?)?;
    let zone = keep.zone.unwrap_or_else(TimeZone::system);
    let opened = open(global, &args.vault).await?;
    let all = opened.backups().await?;
    let wanted = args.domain.as_ref().map(|word| named::domains(&all, word)).transpose()?;
    let looked = look(&opened).await?;
    let mut judge = Judge { opened: &opened, rules: keep.rules, zone: zone.clone(), domains: wanted, looked };
    let now = Timestamp::now();
    let plan = judge.plan(&all, now).await?;
    let goes = plan.goes();
    let zone = zone.iana_name().map(str::to_owned);
    let mut told = Retention { time_zone: zone, now, ordered: false, backups: rows(&all, &plan) };
    let acts = !args.dry_run && !goes.is_empty();
    if !out.json || !acts || (!args.yes && asking(&opened).is_err()) {
        out.show(&told, show::retention)?;
    }
    if !acts {
        return Ok(0);
    }
    if !args.yes && !agreed(&opened, goes.len()).await? {
        return Err(Fault::permanent(codes::USAGE, DOING, opened.settings.label(), "nobody agreed to it")
            .remedy("Nothing was ordered. Say yes, or choose other rules; --dry-run only shows the plan"));
    }
    if !args.yes {
        judge.looked = look(&opened).await?;
    }
    let again = opened.backups().await?;
    let still: BTreeSet<BackupId> = judge.plan(&again, Timestamp::now()).await?.goes().into_iter().collect();
    let mut fates = BTreeMap::new();
    for id in goes {
        let fate = if still.contains(&id) { tend::order(&opened, id, args.ask).await? } else { "stays" };
        fates.insert(id.to_string(), fate);
    }
    told.ordered = true;
    for row in &mut told.backups {
        row.fate = fates.get(&row.backup.id).copied().unwrap_or(row.fate);
    }
    if out.json {
        out.show(&told, show::retention)?;
    } else {
        out.text(&show::retained(&told))?;
    }
    Ok(0)
}

async fn look(opened: &Opened) -> Result<CheckReport, Fault> {
    let looked = Box::pin(check::look(&opened.vault, &holder("prune"), Some(&opened.cache()))).await;
    looked.map_err(|error| opened.fault("look at the backups", &error))
}

/// The rules of the command line, or else those of the configuration.
fn keep(args: &VaultPrune, settings: &VaultSettings) -> Result<Keep, Fault> {
    let KeepBy { keep_last, keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly, .. } = args.keep;
    let counts = [keep_hourly, keep_daily, keep_weekly, keep_monthly, keep_yearly];
    let said = counts.iter().chain([&keep_last]).any(Option::is_some) || args.keep.keep_within.is_some();
    let rules = match said {
        true => Rules {
            last: keep_last.unwrap_or(0),
            periods: periods(counts),
            within: args.keep.keep_within,
            unverified: args.unverified,
        },
        false => Rules { unverified: args.unverified, ..settings.keep.rules.clone() },
    };
    if rules.is_empty() {
        let label = settings.label();
        let cause = match said {
            true => "by these rules nothing would stay",
            false => "neither a backup nor a rule is given, and the configuration has none",
        };
        return Err(Fault::permanent(codes::USAGE, DOING, label, cause).remedy(
            "Name backups, or say what stays: --keep-last 3 --keep-daily 7; or in [vaults.NAME.keep]",
        ));
    }
    Ok(Keep { rules, zone: args.keep.time_zone.clone().or_else(|| settings.keep.zone.clone()) })
}

/// What judges the backups of a vault.
struct Judge<'a> {
    opened: &'a Opened,
    rules: Rules,
    zone: TimeZone,
    /// Only these.
    domains: Option<BTreeSet<DomainId>>,
    looked: CheckReport,
}

impl Judge<'_> {
    async fn plan(&self, all: &Backups, now: Timestamp) -> Result<Plan, Fault> {
        let mut candidates = Vec::new();
        for (id, backup) in all.iter() {
            if self.domains.as_ref().is_some_and(|domains| !domains.contains(&backup.domain)) {
                continue;
            }
            let one = self.candidate(all, id, backup).await;
            candidates.push(one.map_err(|error| self.opened.fault(DOING, &error))?);
        }
        Ok(self.rules.plan(&candidates, now, &self.zone))
    }

    async fn candidate(&self, all: &Backups, id: BackupId, backup: &Backup) -> Result<Candidate, VaultError> {
        let (vault, marks) = (&self.opened.vault, all.all_marks());
        let standing = if !marks.prunes(vault, id).await?.is_empty() {
            Standing::Going
        } else if !all.has(id, MarkKind::Checked) {
            Standing::Unchecked
        } else if self.looked.whole.contains(&id) && !all.has(id, MarkKind::Hurt) {
            Standing::Whole
        } else {
            // One that came after the look as well: it stays.
            Standing::Damaged
        };
        Ok(Candidate {
            id,
            domain: backup.domain,
            at: backup.manifest.as_ref().ok().map(|manifest| manifest.taken),
            standing,
            protected: !marks.protections(vault, id).await?.is_empty(),
            verified: all.is_verified(id),
        })
    }
}

fn rows(all: &Backups, plan: &Plan) -> Vec<RetentionRow> {
    let row = |(one, fate): &(Candidate, Fate)| {
        let (fate, because) = match fate {
            Fate::Stays(reasons) => ("stays", reasons.iter().map(ToString::to_string).collect()),
            Fate::Goes => ("goes", Vec::new()),
            Fate::Going => ("going", Vec::new()),
        };
        Some(RetentionRow { backup: BackupRow::of(all, one.id, all.get(one.id)?), fate, because })
    };
    let mut rows: Vec<RetentionRow> = plan.fates.iter().filter_map(row).collect();
    let mut short: Vec<BackupRow> = rows.iter().map(|row| row.backup.clone()).collect();
    BackupRow::shorten(&mut short);
    for (row, short) in rows.iter_mut().zip(short) {
        row.backup = short;
    }
    rows
}

fn asking(opened: &Opened) -> Result<Terminal, Fault> {
    let instead = "Nothing was ordered. With --yes nobody is asked; --dry-run only shows the plan";
    Terminal::open(&opened.settings.label(), instead)
}

/// Whether somebody at the terminal says yes.
async fn agreed(opened: &Opened, count: usize) -> Result<bool, Fault> {
    let mut terminal = asking(opened)?;
    let label = safe(&opened.settings.label());
    let question = format!("Prune {count} of {label}? Nobody can take that back. Type yes: ");
    Ok(terminal.line(&question, false).await?.trim() == "yes")
}
