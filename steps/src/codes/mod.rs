//! The registry of error codes.
//!
//! A code is stable for ever: it is the exit status of the command line, it appears in the API, in the journal and in
//! the directory. 0 to 48 keep the numbers and the names (spelling included) of stoney conductor's backup daemon, where
//! 14 was never assigned; those of vmkeep are 63 to 124, and those of vaults 193 and up, of backups into them 220 and up. Numbers in between stay free: shells
//! use some of 1 to 62 in their own ways, and 125 to 192 are those of `timeout`, of programs that could not be started, and of
//! signals.
//!
//! Every code has a cause and a remedy. The page for people, `docs/errors.md`, is made from this table ([`page`]) and a
//! test fails when it drifts.

mod original;
mod ours;
#[cfg(test)]
mod provoked;
mod pulls;
mod vaults;

use std::fmt::Write as _;

pub use original::*;
pub use ours::*;
pub use pulls::*;
pub use vaults::*;
use vmkeep_workflow::Code;

/// What is known about a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The number.
    pub code: Code,
    /// The stable name.
    pub name: &'static str,
    /// One line: what it means.
    pub meaning: &'static str,
    /// What usually causes it.
    pub cause: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

/// Declares codes as constants and as a table.
macro_rules! codes {
    ($table:ident: $($number:literal $name:ident $meaning:literal $cause:literal $remedy:literal)*) => {
        $(
            #[doc = $meaning]
            pub const $name: vmkeep_workflow::Code = vmkeep_workflow::Code($number);
        )*
        pub(super) const $table: &[super::Entry] = &[
            $(super::Entry {
                code: $name, name: stringify!($name), meaning: $meaning, cause: $cause, remedy: $remedy,
            }),*
        ];
    };
}
use codes;

/// All codes in the order of their numbers.
pub fn all() -> impl Iterator<Item = &'static Entry> {
    original::ORIGINAL.iter().chain(ours::OURS).chain(vaults::VAULTS).chain(pulls::PULLS)
}

/// What is known about a code.
#[must_use]
pub fn entry(code: Code) -> Option<&'static Entry> {
    all().find(|entry| entry.code == code)
}

/// The stable name of a code.
#[must_use]
pub fn name(code: Code) -> &'static str {
    entry(code).map_or("UNASSIGNED", |entry| entry.name)
}

/// The page about all codes, as Markdown.
#[must_use]
pub fn page() -> String {
    let mut page = String::from(
        "# Error codes\n\n\
         Every failure has one of these codes. It is printed with the message, is the exit status of `vmkeep`, and \
         never changes its meaning.\nThis page is made from `steps/src/codes`; `vmkeep explain` tells what happened \
         in one job.\n",
    );
    let parts = [
        ("From 0 to 48", original::ORIGINAL),
        ("From 63 to 124", ours::OURS),
        ("From 193 on: vaults", vaults::VAULTS),
        ("From 220 on: backups into vaults", pulls::PULLS),
    ];
    for (title, table) in parts {
        let _ = write!(page, "\n## {title}\n");
        for entry in table {
            let _ = write!(
                page,
                "\n### {} {}\n{}\n\n- Cause: {}\n- Remedy: {}\n",
                entry.code, entry.name, entry.meaning, entry.cause, entry.remedy
            );
        }
    }
    page
}

/// For tests: a failure says its code, what it was about, why, and (by itself or by the registry) the way on.
#[cfg(test)]
pub(crate) fn assert_told(fault: &vmkeep_workflow::Fault, code: Code, object: &str) {
    assert_eq!(fault.code, code, "{fault}");
    assert!(fault.object.contains(object), "it does not name {object:?}: {fault}");
    assert!(!fault.doing.is_empty() && !fault.cause.is_empty(), "{fault}");
    assert!(!fault.remedy.is_empty() || entry(code).is_some_and(|entry| !entry.remedy.is_empty()), "{fault}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_range_ascending_and_unique() {
        let numbers: Vec<u16> = all().map(|entry| entry.code.0).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] < pair[1]), "{numbers:?}");
        let free = |n: &u16| !(0..=48).contains(n) && !(63..=124).contains(n) && !(193..=255).contains(n);
        assert!(!numbers.iter().any(free), "{numbers:?}");
        assert!(!numbers.contains(&14), "14 was never assigned");
        assert_eq!(original::ORIGINAL.len(), 48);
    }

    #[test]
    fn every_code_says_what_it_means_why_and_what_to_do() {
        for entry in all() {
            for text in [entry.meaning, entry.cause, entry.remedy] {
                assert!(text.len() > 3, "{}", entry.name);
                assert!(text.ends_with(['.', '`', ')']), "{}: {text:?}", entry.name);
            }
        }
    }

    #[test]
    fn the_engines_own_codes_are_in_the_registry() {
        for code in [
            Code::UNDEFINED,
            Code::NO_SUCH_JOB,
            Code::SUBJECT_BUSY,
            Code::NEEDS_ATTENTION,
            Code::FACTS_CHANGED,
            Code::STEP_DEADLINE,
            Code::STEP_STALLED,
            Code::UNKNOWN_STEP_KIND,
            Code::EFFECT_DIVERGED,
            Code::EFFECT_UNKNOWN,
            Code::CANCELLED,
            Code::STORE_DAMAGED,
            Code::STORE_RESERVE_SPENT,
            Code::INVALID_STATE,
            Code::DUPLICATE_KEY,
            Code::STORE_IN_USE,
            Code::STORE_TOO_NEW,
            Code::STORE_UNAVAILABLE,
        ] {
            assert!(entry(code).is_some(), "{code} is not in the registry");
        }
    }

    /// Set `VMKEEP_WRITE_DOCS=1` to write the page anew.
    #[test]
    fn the_page_about_errors_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors.md");
        if std::env::var_os("VMKEEP_WRITE_DOCS").is_some() {
            std::fs::create_dir_all(std::path::Path::new(path).parent().unwrap()).unwrap();
            std::fs::write(path, page()).unwrap();
        }
        let stored = std::fs::read_to_string(path).unwrap_or_default();
        assert!(stored == page(), "docs/errors.md is stale: run the test with VMKEEP_WRITE_DOCS=1");
    }
}
