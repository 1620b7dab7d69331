//! `[vaults.NAME.keep]`: which backups of a domain stay in a vault when it is pruned by rules.

use std::collections::BTreeMap;

use jiff::tz::TimeZone;
use serde::Deserialize;
use vmkeep_vault::retention::{Period, Rules};

use super::ConfigError;
use super::file::impossible;
use crate::text::parse_span;

/// The rules as the file has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileKeep {
    /// The newest so many.
    pub last: Option<u32>,
    /// The newest of so many hours.
    pub hourly: Option<u32>,
    /// The newest of so many days.
    pub daily: Option<u32>,
    /// The newest of so many weeks.
    pub weekly: Option<u32>,
    /// The newest of so many months.
    pub monthly: Option<u32>,
    /// The newest of so many years.
    pub yearly: Option<u32>,
    /// All that are not older than the newest by more than this: `14d`.
    pub within: Option<String>,
    /// Whose calendar it goes by: `Europe/Berlin`; that of the host by default.
    pub time_zone: Option<String>,
}

/// Which backups stay in a vault.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// The rules; empty if none are given.
    pub rules: Rules,
    /// Whose calendar they go by; nothing: the host's.
    pub zone: Option<TimeZone>,
}

/// A time zone by its name.
///
/// # Errors
/// What to say, if this host knows none of that name.
pub fn time_zone(name: &str) -> Result<TimeZone, String> {
    TimeZone::get(name)
        .map_err(|_| format!("{name:?} is no time zone that this host knows, as Europe/Berlin"))
}

/// Rules by period, without those of which nothing is kept.
#[must_use]
pub fn periods(counts: [Option<u32>; 5]) -> BTreeMap<Period, u32> {
    let counted = Period::ALL.into_iter().zip(counts);
    counted.filter_map(|(period, count)| Some((period, count.filter(|count| *count > 0)?))).collect()
}

pub(super) fn resolve(table: &str, file: &FileKeep) -> Result<Keep, ConfigError> {
    let wrong = |key: &str, why: String| impossible(&format!("{table}.{key}"), &why);
    let within = file.within.as_deref().map(parse_span).transpose();
    let zone = file.time_zone.as_deref().map(time_zone).transpose();
    Ok(Keep {
        rules: Rules {
            last: file.last.unwrap_or(0),
            periods: periods([file.hourly, file.daily, file.weekly, file.monthly, file.yearly]),
            within: within.map_err(|why| wrong("within", why))?,
            unverified: false,
        },
        zone: zone.map_err(|why| wrong("time_zone", why))?,
    })
}
