//! Short forms of ids.
//!
//! Job ids begin with the time, so that jobs of one minute share their first eight digits; their last twelve are
//! random. A short form is therefore the beginning of those ([`JobId::short`]), as long as it must be to be unique and
//! at least [`SHORTEST`]. What a person types may be the beginning of either the whole id or its random part.

use vmkeep_workflow::{Code, Fault, JobId};

use crate::codes;

/// The shortest short form that is shown. Fewer digits are understood when they are unique.
pub const SHORTEST: usize = 4;

/// An id that people shorten.
pub trait Shortened {
    /// The texts that a typed prefix may be the beginning of; the first is the one that is shown.
    fn forms(&self) -> Vec<String>;
}

impl Shortened for JobId {
    fn forms(&self) -> Vec<String> {
        vec![self.short(), self.to_string(), self.uuid().simple().to_string()]
    }
}

impl Shortened for String {
    fn forms(&self) -> Vec<String> {
        vec![self.clone()]
    }
}

/// What a prefix stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// Exactly this.
    One(T),
    /// Nothing.
    None,
    /// Several; these are their shown forms, sorted.
    Many(Vec<String>),
}

/// Finds what a prefix stands for. A whole id wins over longer ones that begin with it.
pub fn find<T: Shortened + Clone>(prefix: &str, all: &[T]) -> Found<T> {
    let prefix = prefix.to_ascii_lowercase();
    if prefix.is_empty() {
        return Found::None;
    }
    let mut hits = Vec::new();
    for id in all {
        let forms = id.forms();
        if forms.iter().any(|form| form.eq_ignore_ascii_case(&prefix)) {
            return Found::One(id.clone());
        }
        if forms.iter().any(|form| form.to_ascii_lowercase().starts_with(&prefix)) {
            hits.push(id);
        }
    }
    match hits.as_slice() {
        [] => Found::None,
        [one] => Found::One((*one).clone()),
        many => {
            let mut shown: Vec<String> = many.iter().filter_map(|id| id.forms().into_iter().next()).collect();
            shown.sort();
            Found::Many(shown)
        }
    }
}

/// The shortest unique beginnings of ids' shown forms.
#[derive(Clone, Debug, Default)]
pub struct Shorts {
    /// Every form that a prefix may hit, sorted, with the number of the id it belongs to.
    forms: Vec<(String, usize)>,
}

impl Shorts {
    /// Of all these ids.
    pub fn of<T: Shortened>(all: &[T]) -> Self {
        let mut forms: Vec<(String, usize)> = all
            .iter()
            .enumerate()
            .flat_map(|(owner, id)| id.forms().into_iter().map(move |form| (form, owner)))
            .collect();
        forms.sort();
        Self { forms }
    }

    /// The shortest unique beginning of an id's shown form, no shorter than [`SHORTEST`].
    pub fn short<T: Shortened>(&self, id: &T) -> String {
        let Some(shown) = id.forms().into_iter().next() else { return String::new() };
        let at = self.forms.partition_point(|(form, _)| *form < shown);
        let owner = self.forms.get(at).filter(|(form, _)| *form == shown).map(|(_, owner)| *owner);
        // Sorted neighbours share the longest beginnings: nobody further away can share more.
        let before = self.forms[..at].iter().rev().find(|(_, other)| Some(*other) != owner);
        let after = self.forms[at..].iter().find(|(_, other)| Some(*other) != owner);
        let shared = [before, after]
            .into_iter()
            .flatten()
            .map(|(form, _)| form.bytes().zip(shown.bytes()).take_while(|(a, b)| a == b).count())
            .max()
            .unwrap_or(0);
        let wanted = (shared + 1).max(SHORTEST).min(shown.len());
        // Cut where a character ends.
        let end = (wanted..=shown.len()).find(|end| shown.is_char_boundary(*end)).unwrap_or(shown.len());
        shown[..end].to_owned()
    }
}

/// Finds a job by what a person typed.
///
/// # Errors
/// [`Code::NO_SUCH_JOB`], or [`codes::AMBIGUOUS_NAME`] with what it could be.
pub fn job(prefix: &str, all: &[JobId]) -> Result<JobId, Fault> {
    match find(prefix, all) {
        Found::One(job) => Ok(job),
        Found::None => Err(Fault::permanent(
            Code::NO_SUCH_JOB,
            "find the job",
            prefix,
            "no job has an id that begins so",
        )
        .remedy("List the jobs: vmkeep jobs")),
        Found::Many(shown) => Err(ambiguous("find the job", prefix, &shown)),
    }
}

/// The error for a prefix that several ids begin with.
#[must_use]
pub fn ambiguous(doing: &str, prefix: &str, shown: &[String]) -> Fault {
    let some = shown.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
    let more = if shown.len() > 8 { ", …" } else { "" };
    Fault::permanent(codes::AMBIGUOUS_NAME, doing, prefix, format!("several ids begin so: {some}{more}"))
        .remedy("Type more of it")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> JobId {
        text.parse().unwrap()
    }

    fn three() -> Vec<JobId> {
        vec![
            id("019e0000-0000-7000-8000-abcdef000001"),
            id("019e0000-0001-7000-8000-abcdff000002"),
            id("019f0000-0000-7000-8000-123456789abc"),
        ]
    }

    #[test]
    fn a_job_is_found_by_the_beginning_of_its_random_part_and_of_its_whole_id() {
        let all = three();
        assert_eq!(find("1", &all), Found::One(all[2]));
        assert_eq!(find("abcdef", &all), Found::One(all[0]));
        assert_eq!(find("ABCDEF", &all), Found::One(all[0]));
        assert_eq!(find("019f", &all), Found::One(all[2]));
        assert_eq!(find("019e0000-0001", &all), Found::One(all[1]));
        assert_eq!(find("019e00000001", &all), Found::One(all[1]));
        assert_eq!(find(&all[1].to_string(), &all), Found::One(all[1]));
    }

    #[test]
    fn an_ambiguous_beginning_is_refused_and_tells_the_choices() {
        let error = job("abcd", &three()).unwrap_err();
        assert_eq!(error.code, codes::AMBIGUOUS_NAME);
        assert!(error.cause.contains("abcdef000001") && error.cause.contains("abcdff000002"), "{error}");
    }

    #[test]
    fn a_beginning_of_nothing_is_refused() {
        assert_eq!(job("dead", &three()).unwrap_err().code, Code::NO_SUCH_JOB);
        assert_eq!(job("", &three()).unwrap_err().code, Code::NO_SUCH_JOB);
    }

    #[test]
    fn a_shown_short_form_is_unique_and_finds_its_job() {
        let all = three();
        let shorts = Shorts::of(&all);
        assert_eq!(shorts.short(&all[0]), "abcde");
        assert_eq!(shorts.short(&all[2]), "1234");
        for id in &all {
            assert_eq!(find(&shorts.short(id), &all), Found::One(*id));
        }
        let many: Vec<JobId> = (0..2000).map(|_| JobId::new()).collect();
        let shorts = Shorts::of(&many);
        for id in &many {
            assert_eq!(find(&shorts.short(id), &many), Found::One(*id));
        }
    }

    #[test]
    fn a_random_part_that_looks_like_the_time_is_still_told_apart() {
        let all =
            vec![id("019e0000-0000-7000-8000-019e00000000"), id("019e0000-0001-7000-8000-ffffffffffff")];
        let shorts = Shorts::of(&all);
        for id in &all {
            assert_eq!(find(&shorts.short(id), &all), Found::One(*id));
        }
    }

    #[test]
    fn short_forms_of_a_shared_text_id_are_cut_between_characters() {
        let all = vec!["bücher-1".to_owned(), "bücher-2".to_owned(), "bü".to_owned()];
        let shorts = Shorts::of(&all);
        for id in &all {
            assert_eq!(find(&shorts.short(id), &all), Found::One(id.clone()));
        }
    }
}
