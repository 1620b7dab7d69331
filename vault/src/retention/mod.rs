//! Which backups stay by rules: a pure function of what was found, as restic has it.
//!
//! Each domain is judged for itself. The rules ask only for *candidates*: backups that are checked and whole, not yet to be
//! pruned, not protected, and not of the future. Of these
//!
//! - `last N` keeps the newest N;
//! - `hourly N` … `yearly N` go from the newest backwards and keep the newest of each hour, day, week (Monday first, ISO 8601),
//!   month or year of the time zone's calendar, until N are kept: *periods without a backup do not count*, so a machine that is
//!   switched off for a month loses nothing by it;
//! - `within SPAN` keeps what is not older than the newest candidate by more than that. It counts from that and not from now:
//!   when backups fail for a month, the older ones do not run out meanwhile.
//!
//! The rules know nothing of each other: a backup stays if any of them keeps it, and one may count for several. (Borg and
//! Proxmox Backup Server count a backup for the first rule only that keeps it; with the same numbers they keep more.) So more
//! rules and larger numbers never remove anything that less would have kept, and what stays is kept by the same rules again.
//! An hour that the clock goes through twice is two: they differ in their offset.
//!
//! Beside the rules, always:
//!
//! - *Without any rule nothing goes.* With one the newest candidate stays, whatever the numbers: a domain that has a whole
//!   backup never loses its last one.
//! - *The newest verified backup stays*, though no rule keeps it: all newer ones may yet turn out to be unreadable. *Where
//!   none is verified nothing goes*, unless that is asked for ([`Rules::unverified`]): what stays may be what nobody can read.
//! - *Protected ones stay besides and are not counted*: protecting a backup never removes another.
//! - *Damaged and unchecked ones are neither counted nor removed*: a rule must not decide whether something can still be got
//!   out of them, or whether their writer comes back. They are pruned by name.
//! - *Those of the future stay and are not counted*: one of the two clocks is wrong, and nobody knows which. With the backup's
//!   wrong it would be the newest for years, in the place of true ones; with this host's wrong nothing that is counted goes
//!   that would otherwise stay, for fewer are counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

use crate::ids::{BackupId, DomainId};

/// A stretch of the calendar of which one backup stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Period {
    /// An hour.
    Hour,
    /// A day.
    Day,
    /// A week, from Monday on.
    Week,
    /// A month.
    Month,
    /// A year.
    Year,
}

impl Period {
    /// All of them, the shortest first.
    pub const ALL: [Self; 5] = [Self::Hour, Self::Day, Self::Week, Self::Month, Self::Year];

    /// What the rule is called.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Hour => "hourly",
            Self::Day => "daily",
            Self::Week => "weekly",
            Self::Month => "monthly",
            Self::Year => "yearly",
        }
    }

    /// The one that an instant falls into. Two instants have the same if and only if the text is the same.
    #[must_use]
    pub fn of(self, at: &Zoned) -> String {
        match self {
            Self::Hour => format!("{} {:02}h{}", at.date(), at.hour(), at.offset()),
            Self::Day => at.date().to_string(),
            Self::Week => {
                let week = at.date().iso_week_date();
                format!("{:04}-W{:02}", week.year(), week.week())
            }
            Self::Month => format!("{:04}-{:02}", at.year(), at.month()),
            Self::Year => format!("{:04}", at.year()),
        }
    }
}

/// How much is to stay. Nothing of anything is no rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// The newest so many.
    pub last: u32,
    /// The newest of so many periods.
    pub periods: BTreeMap<Period, u32>,
    /// All that are not older than the newest by more than this.
    pub within: Option<Duration>,
    /// Whether backups go also where none of their domain's that counts was ever verified. No rule by itself.
    pub unverified: bool,
}

/// How a backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is checked, and all that it needs is there as far as that is known.
    Whole,
    /// Something that it needs, or its manifest, is bad or missing.
    Damaged,
    /// Its writer has not finished.
    Unchecked,
    /// It is to be pruned already.
    Going,
}

/// A backup that is judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: BackupId,
    /// Its domain.
    pub domain: DomainId,
    /// Its point in time; nothing if its manifest cannot be read, and then it counts as damaged.
    pub at: Option<Timestamp>,
    /// How it stands.
    pub standing: Standing,
    /// Whether a protection stands.
    pub protected: bool,
    /// Whether all of it was read and found good since it was put.
    pub verified: bool,
}

impl Candidate {
    /// Its point in time, if it is whole and not of the future.
    fn counts(&self, now: Timestamp) -> Option<Timestamp> {
        self.at.filter(|at| self.standing == Standing::Whole && *at <= now)
    }
}

/// Why a backup stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is among the newest; the newest of all is 1.
    Last(u32),
    /// It is the newest of a period.
    Newest(Period, String),
    /// It is not much older than the newest.
    Within,
    /// No newer one was read as a whole.
    NewestVerified,
    /// None of its domain's was read as a whole: nobody knows whether another can be.
    NoneVerified,
    /// Somebody protects it.
    Protected,
    /// What it needs is bad or missing, or it cannot be read: no rule decides about it.
    Damaged,
    /// Its writer has not finished: no rule decides about it.
    Unchecked,
    /// Its point in time is to come: no rule decides about it.
    Future,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Last(place) => write!(f, "last {place}"),
            Self::Newest(period, which) => write!(f, "{} {which}", period.word()),
            Self::Within => f.write_str("within"),
            Self::NewestVerified => f.write_str("newest verified"),
            Self::NoneVerified => f.write_str("none is verified"),
            Self::Protected => f.write_str("protected"),
            Self::Damaged => f.write_str("damaged"),
            Self::Unchecked => f.write_str("unchecked"),
            Self::Future => f.write_str("of the future"),
        }
    }
}

/// What becomes of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It stays, and why; without any rule perhaps for no reason.
    Stays(Vec<Reason>),
    /// It is to be pruned.
    Goes,
    /// It was to be pruned already.
    Going,
}

/// What becomes of each backup: by domain, then the newest first, those without a point in time last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Each backup that was judged.
    pub fates: Vec<(Candidate, Fate)>,
}

impl Plan {
    /// Those that are to be pruned, the oldest of each domain first.
    #[must_use]
    pub fn goes(&self) -> Vec<BackupId> {
        self.fates.iter().rev().filter(|(_, fate)| *fate == Fate::Goes).map(|(one, _)| one.id).collect()
    }
}

impl Rules {
    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.last == 0 && self.periods.values().all(|count| *count == 0) && self.within.is_none()
    }

    /// Judges backups, in any order, at a time, by the calendar of a time zone.
    #[must_use]
    pub fn plan(&self, all: &[Candidate], now: Timestamp, zone: &TimeZone) -> Plan {
        let mut all = all.to_vec();
        // Of two that hold the same instant the order of their ids decides, so that the same question has one answer.
        all.sort_by(|a, b| a.domain.cmp(&b.domain).then_with(|| (b.at, b.id).cmp(&(a.at, a.id))));
        let mut plan = Plan::default();
        for domain in all.chunk_by(|a, b| a.domain == b.domain) {
            self.domain(domain, now, zone, &mut plan);
        }
        plan
    }

    /// Judges those of a domain, the newest first.
    fn domain(&self, all: &[Candidate], now: Timestamp, zone: &TimeZone, plan: &mut Plan) {
        let mut kept: BTreeMap<BackupId, Vec<Reason>> = BTreeMap::new();
        let counted: Vec<(BackupId, Timestamp)> = all
            .iter()
            .filter(|one| !one.protected)
            .filter_map(|one| Some((one.id, one.counts(now)?)))
            .collect();
        for (place, (id, _)) in (1..=self.last).zip(&counted) {
            kept.entry(*id).or_default().push(Reason::Last(place));
        }
        if let (Some(within), Some((_, newest))) = (self.within, counted.first()) {
            let age = |at: &Timestamp| Duration::try_from(newest.duration_since(*at)).unwrap_or_default();
            for (id, _) in counted.iter().take_while(|(_, at)| age(at) <= within) {
                kept.entry(*id).or_default().push(Reason::Within);
            }
        }
        for (period, count) in &self.periods {
            // By all that were seen, not by the last: where a clock was set back over midnight, a day comes twice.
            let mut seen = BTreeSet::new();
            for (id, at) in &counted {
                if seen.len() >= usize::try_from(*count).unwrap_or(usize::MAX) {
                    break;
                }
                let which = period.of(&at.to_zoned(zone.clone()));
                if seen.insert(which.clone()) {
                    kept.entry(*id).or_default().push(Reason::Newest(*period, which));
                }
            }
        }
        let verified = all.iter().find(|one| one.verified && one.counts(now).is_some());
        if let Some(newest) = verified {
            kept.entry(newest.id).or_default().push(Reason::NewestVerified);
        }
        let sure = verified.is_some() || self.unverified;
        for one in all {
            let reasons = kept.remove(&one.id).unwrap_or_default();
            let besides = match one.standing {
                Standing::Going => None,
                _ if one.protected => Some(Reason::Protected),
                Standing::Unchecked => Some(Reason::Unchecked),
                Standing::Whole if one.at.is_some_and(|at| at > now) => Some(Reason::Future),
                Standing::Whole if one.at.is_some() => None,
                _ => Some(Reason::Damaged),
            };
            let fate = match besides {
                _ if one.standing == Standing::Going => Fate::Going,
                None if reasons.is_empty() && !self.is_empty() && sure => Fate::Goes,
                None if reasons.is_empty() && !self.is_empty() => Fate::Stays(vec![Reason::NoneVerified]),
                besides => Fate::Stays(reasons.into_iter().chain(besides).collect()),
            };
            plan.fates.push((one.clone(), fate));
        }
    }
}

#[cfg(test)]
mod tests;
