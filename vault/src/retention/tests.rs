use proptest::prelude::*;

use super::*;

const DOMAIN: DomainId = DomainId::new([1; 16]);

fn id(number: u8) -> BackupId {
    format!("{number:032x}").parse().unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn whole(number: u8, when: &str) -> Candidate {
    Candidate {
        id: id(number),
        domain: DOMAIN,
        at: Some(at(when)),
        standing: Standing::Whole,
        protected: false,
        verified: false,
    }
}

fn rules(last: u32, periods: &[(Period, u32)]) -> Rules {
    Rules { last, periods: periods.iter().copied().collect(), within: None, unverified: true }
}

/// Berlin's, by its rule: a host need not have a data base of time zones.
fn berlin() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

const NOW: &str = "2027-01-01T00:00:00Z";

/// Which stay and why, the newest first; the others go.
fn stays(rules: &Rules, all: &[Candidate], zone: &TimeZone) -> Vec<(u8, String)> {
    let plan = rules.plan(all, at(NOW), zone);
    assert_eq!(plan.fates.len(), all.len());
    let said = |(one, fate): &(Candidate, Fate)| match fate {
        Fate::Stays(reasons) => {
            let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            Some((u8::from_str_radix(&one.id.to_string()[30..], 16).unwrap(), reasons.join(", ")))
        }
        Fate::Goes | Fate::Going => None,
    };
    plan.fates.iter().filter_map(said).collect()
}

fn said(number: u8, why: &str) -> (u8, String) {
    (number, why.to_owned())
}

#[test]
fn the_newest_of_each_period_stays_and_periods_without_a_backup_do_not_count() {
    let all = [
        whole(1, "2024-03-05T12:00:00Z"),
        whole(2, "2026-11-01T12:00:00Z"),
        whole(3, "2026-11-18T12:00:00Z"),
        whole(4, "2026-11-20T01:00:00Z"),
        whole(5, "2026-11-20T21:00:00Z"),
    ];
    let keep = rules(1, &[(Period::Day, 2), (Period::Month, 2), (Period::Year, 9)]);
    assert_eq!(
        stays(&keep, &all, &TimeZone::UTC),
        [
            said(5, "last 1, daily 2026-11-20, monthly 2026-11, yearly 2026"),
            said(3, "daily 2026-11-18"),
            said(1, "monthly 2024-03, yearly 2024"),
        ]
    );
    assert_eq!(
        rules(1, &[]).plan(&all, at(NOW), &TimeZone::UTC).goes(),
        [1, 2, 3, 4].map(id),
        "oldest first"
    );
}

#[test]
fn days_and_weeks_are_those_of_the_time_zone() {
    // In Berlin both are of Monday the 23rd, and of two ISO weeks at the turn of the year one.
    let all = [whole(1, "2026-11-22T23:30:00Z"), whole(2, "2026-11-23T22:30:00Z")];
    let daily = rules(0, &[(Period::Day, 2)]);
    assert_eq!(stays(&daily, &all, &berlin()), [said(2, "daily 2026-11-23")]);
    assert_eq!(stays(&daily, &all, &TimeZone::UTC).len(), 2);
    let weekly = rules(0, &[(Period::Week, 2)]);
    assert_eq!(stays(&weekly, &all, &TimeZone::UTC)[1], said(1, "weekly 2026-W47"));
    let turn = [whole(1, "2025-12-29T12:00:00Z"), whole(2, "2026-01-04T12:00:00Z")];
    assert_eq!(stays(&weekly, &turn, &berlin()), [said(2, "weekly 2026-W01")]);
}

#[test]
fn the_hour_that_comes_twice_is_two_hours_and_the_day_of_25_hours_is_one_day() {
    let all = [
        whole(1, "2026-10-25T00:10:00Z"),
        whole(2, "2026-10-25T00:50:00Z"),
        whole(3, "2026-10-25T01:20:00Z"),
        whole(4, "2026-10-25T22:50:00Z"),
        whole(5, "2026-10-25T23:10:00Z"),
    ];
    let hourly = rules(0, &[(Period::Hour, 9)]);
    let hours: Vec<_> = stays(&hourly, &all, &berlin()).into_iter().skip(2).collect();
    assert_eq!(hours, [said(3, "hourly 2026-10-25 02h+01"), said(2, "hourly 2026-10-25 02h+02")]);
    let daily = stays(&rules(0, &[(Period::Day, 9)]), &all, &berlin());
    assert_eq!(daily, [said(5, "daily 2026-10-26"), said(4, "daily 2026-10-25")]);
}

#[test]
fn a_span_counts_from_the_newest_backup_and_not_from_now() {
    let all = [
        whole(1, "2026-01-01T11:59:59Z"),
        whole(2, "2026-01-01T12:00:00Z"),
        whole(3, "2026-01-02T12:00:00Z"),
    ];
    let keep = Rules { within: Some(Duration::from_secs(86_400)), ..rules(0, &[]) };
    assert_eq!(stays(&keep, &all, &TimeZone::UTC), [said(3, "within"), said(2, "within")]);
}

#[test]
fn the_newest_verified_backup_stays_though_no_rule_keeps_it_and_a_damaged_one_is_none() {
    let mut all = [
        whole(1, "2026-01-01T12:00:00Z"),
        whole(2, "2026-02-01T12:00:00Z"),
        whole(3, "2026-03-01T12:00:00Z"),
        whole(4, "2026-04-01T12:00:00Z"),
    ];
    (all[0].verified, all[1].verified, all[2].verified) = (true, true, true);
    all[2].standing = Standing::Damaged;
    let keep = rules(1, &[]);
    let found = stays(&keep, &all, &TimeZone::UTC);
    assert_eq!(found, [said(4, "last 1"), said(3, "damaged"), said(2, "newest verified")]);
    // What is damaged takes nobody's place.
    all[3].standing = Standing::Damaged;
    let found = stays(&keep, &all, &TimeZone::UTC);
    assert_eq!(found, [said(4, "damaged"), said(3, "damaged"), said(2, "last 1, newest verified")]);
}

#[test]
fn where_nothing_was_ever_verified_nothing_goes_unless_it_is_asked_for() {
    let mut all = [
        whole(1, "2026-01-01T12:00:00Z"),
        whole(2, "2026-02-01T12:00:00Z"),
        whole(3, "2036-01-01T12:00:00Z"),
    ];
    let careful = Rules { unverified: false, ..rules(1, &[]) };
    let none = [said(3, "of the future"), said(2, "last 1"), said(1, "none is verified")];
    assert_eq!(stays(&careful, &all, &TimeZone::UTC), none);
    // What does not count does not make another dispensable.
    all[2].verified = true;
    assert_eq!(stays(&careful, &all, &TimeZone::UTC), none);
    all[1].verified = true;
    let sure = [said(3, "of the future"), said(2, "last 1, newest verified")];
    assert_eq!(stays(&careful, &all, &TimeZone::UTC), sure);
    all[1].standing = Standing::Damaged;
    assert_eq!(stays(&careful, &all, &TimeZone::UTC)[2], said(1, "last 1"));
}

#[test]
fn what_is_protected_unchecked_going_or_of_the_future_takes_no_place() {
    let mut all = [
        whole(1, "2026-01-01T12:00:00Z"),
        whole(2, "2026-01-02T12:00:00Z"),
        whole(3, "2026-01-03T12:00:00Z"),
        whole(4, "2026-01-04T12:00:00Z"),
        whole(5, "2026-01-05T12:00:00Z"),
        whole(6, "2036-01-06T12:00:00Z"),
        whole(7, "2026-01-07T12:00:00Z"),
    ];
    all[2].protected = true;
    all[3].standing = Standing::Unchecked;
    all[4].standing = Standing::Going;
    all[5].verified = true;
    all[6].at = None;
    let found = stays(&rules(1, &[]), &all, &TimeZone::UTC);
    assert_eq!(
        found,
        [
            said(6, "of the future"),
            said(4, "unchecked"),
            said(3, "protected"),
            said(2, "last 1"),
            said(7, "damaged")
        ]
    );
}

#[test]
fn each_domain_is_judged_for_itself_and_without_a_rule_nothing_goes() {
    let mut all = [whole(1, "2026-01-01T12:00:00Z"), whole(2, "2026-01-02T12:00:00Z")];
    all[0].domain = DomainId::new([2; 16]);
    assert_eq!(rules(1, &[]).plan(&all, at(NOW), &TimeZone::UTC).goes(), []);
    all[0].domain = DOMAIN;
    assert_eq!(rules(1, &[]).plan(&all, at(NOW), &TimeZone::UTC).goes(), [id(1)]);
    let nothing = rules(0, &[(Period::Day, 0)]);
    assert!(nothing.is_empty() && nothing.plan(&all, at(NOW), &TimeZone::UTC).goes().is_empty());
}

fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
    // Three years around a change of the clock, often on the hour.
    let one = (0..26_000_i64, 0..2_u8, 0..9_u8, prop::bool::weighted(0.1), prop::bool::weighted(0.2));
    prop::collection::vec(one, 0..40).prop_map(|all| {
        let one =
            |(number, (hours, domain, standing, protected, verified)): (u8, (i64, u8, u8, bool, bool))| {
                Candidate {
                    id: id(number),
                    domain: DomainId::new([domain; 16]),
                    at: Some(at("2024-10-27T00:00:00Z") + Duration::from_secs(hours.unsigned_abs() * 3600)),
                    standing: match standing {
                        0 => Standing::Damaged,
                        1 => Standing::Unchecked,
                        2 => Standing::Going,
                        _ => Standing::Whole,
                    },
                    protected,
                    verified,
                }
            };
        (0..).zip(all).map(one).collect()
    })
}

fn some_rules() -> impl Strategy<Value = Rules> {
    let counts = prop::collection::vec(0..5_u32, 5);
    let within = prop::option::of(0..90_u64);
    (0..4_u32, counts, within, any::<bool>()).prop_map(|(last, counts, within, unverified)| Rules {
        last,
        periods: Period::ALL.into_iter().zip(counts).collect(),
        within: within.map(|days| Duration::from_secs(days * 86_400)),
        unverified,
    })
}

fn going(rules: &Rules, all: &[Candidate], now: Timestamp) -> BTreeSet<BackupId> {
    rules.plan(all, now, &berlin()).goes().into_iter().collect()
}

proptest! {
    #[test]
    fn more_rules_more_protection_and_an_earlier_clock_never_remove_more(
        all in candidates(),
        less in some_rules(),
        more in some_rules(),
        protect in 0..40_usize,
        earlier in 0..26_000_i64,
    ) {
        prop_assume!(!less.is_empty());
        let now = at("2027-06-01T00:00:00Z");
        let goes = going(&less, &all, now);
        let both = Rules {
            last: less.last.max(more.last),
            periods: less.periods.iter().map(|(period, count)| (*period, (*count).max(more.periods[period]))).collect(),
            within: less.within.max(more.within),
            unverified: less.unverified && more.unverified,
        };
        prop_assert!(going(&both, &all, now).is_subset(&goes));
        let before = now - Duration::from_secs(earlier.unsigned_abs() * 3600);
        prop_assert!(going(&less, &all, before).is_subset(&goes));
        let mut safer = all.clone();
        if let Some(one) = safer.get_mut(protect) {
            one.protected = true;
            prop_assert!(going(&less, &safer, now).is_subset(&goes));
        }
    }

    #[test]
    fn what_was_pruned_once_is_pruned_no_further_in_whatever_order_it_is_listed(
        all in candidates(),
        rules in some_rules(),
        seed in any::<u64>(),
    ) {
        let now = at("2026-06-01T00:00:00Z");
        let goes = going(&rules, &all, now);
        let mut shuffled = all.clone();
        fastrand::Rng::with_seed(seed).shuffle(&mut shuffled);
        prop_assert_eq!(rules.plan(&shuffled, now, &berlin()), rules.plan(&all, now, &berlin()));
        let left: Vec<Candidate> = all.iter().filter(|one| !goes.contains(&one.id)).cloned().collect();
        prop_assert_eq!(going(&rules, &left, now), BTreeSet::new());
        // Also while the marks stand and the backups are still there.
        let marked: Vec<Candidate> = all.into_iter().map(|mut one| {
            if goes.contains(&one.id) {
                one.standing = Standing::Going;
            }
            one
        }).collect();
        prop_assert_eq!(going(&rules, &marked, now), BTreeSet::new());
    }

    #[test]
    fn a_domain_keeps_its_newest_whole_and_its_newest_verified_backup_and_loses_nothing_that_no_rule_may_judge(
        all in candidates(),
        rules in some_rules(),
    ) {
        let now = at("2026-06-01T00:00:00Z");
        let goes = going(&rules, &all, now);
        for domain in [0, 1].map(|byte| DomainId::new([byte; 16])) {
            let counted = || all.iter().filter(|one| {
                one.domain == domain && one.standing == Standing::Whole && one.at.unwrap() <= now
            });
            let newest = |verified: bool| {
                counted().filter(|one| one.verified || !verified).max_by_key(|one| (one.at, one.id))
            };
            for kept in [newest(false), newest(true)].into_iter().flatten() {
                prop_assert!(!goes.contains(&kept.id));
            }
            let unprotected = counted().filter(|one| !one.protected).max_by_key(|one| (one.at, one.id));
            prop_assert!(unprotected.is_none_or(|one| !goes.contains(&one.id)));
        }
        for one in all.iter().filter(|one| goes.contains(&one.id)) {
            prop_assert!(one.standing == Standing::Whole && !one.protected && one.at.unwrap() <= now);
        }
    }
}
