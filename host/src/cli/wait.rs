//! Following a job until it ends.
//!
//! On a terminal: a bar per step that can count, with rate and remaining time. Elsewhere: one line per thing that
//! happened, and one per ten percent of a long copy, so that a log stays a log. Ctrl-C ends the following and never
//! the job, and says how to do either.

use std::collections::{HashMap, VecDeque};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmkeep_workflow::engine::StepState;
use vmkeep_workflow::{Fault, JobStatus};

use super::{Ended, INTERRUPTED, Out, show};
use crate::api::types::{JobDetail, Live, StepRow};
use crate::client::Client;
use crate::codes;
use crate::text::{bytes, safe, span};

/// How often the daemon is looked for again when the connection broke in the middle.
const RECONNECTS: u32 = 60;
const RECONNECT_EVERY: Duration = Duration::from_secs(1);

/// `vmkeep job watch`.
pub(super) async fn watch(client: &Client, out: &Out, job: &str) -> Ended {
    let detail: JobDetail = client.get(&super::job::path(job, "")).await?;
    follow(client, out, &detail.job.id.to_string(), &detail.job.short).await
}

/// Follows a job to its end and says how it was; the exit status is the job's.
pub(super) async fn follow(client: &Client, out: &Out, job: &str, short: &str) -> Ended {
    let Some(detail) = to_its_end(client, out, job, short).await? else { return Ok(INTERRUPTED) };
    out.show(&detail, show::ending)?;
    Ok(ending_status(&detail))
}

/// Follows a job to its end; nothing if the waiting was interrupted.
pub(super) async fn to_its_end(
    client: &Client,
    out: &Out,
    job: &str,
    short: &str,
) -> Result<Option<JobDetail>, Fault> {
    let mut view: Box<dyn View> = if out.json {
        Box::new(Silent)
    } else if std::io::stderr().is_terminal() {
        Box::new(Bars::new())
    } else {
        Box::new(Lines::default())
    };
    let detail = tokio::select! {
        detail = to_the_end(client, job, view.as_mut()) => detail,
        _ = tokio::signal::ctrl_c() => {
            view.finish();
            eprintln!("Job {short} goes on without you.");
            eprintln!("  follow it:  vmkeep job watch {short}");
            eprintln!("  cancel it:  vmkeep job cancel {short}");
            return Ok(None);
        }
    };
    view.finish();
    detail.map(Some)
}

/// The exit status of a job that ended, or that needs somebody.
pub(super) fn ending_status(detail: &JobDetail) -> u8 {
    let code = |fallback: u16| {
        let code = detail.job.fault.as_ref().or(detail.parked.as_ref()).map_or(fallback, |fault| fault.code);
        u8::try_from(code).ok().filter(|code| *code != 0).unwrap_or(1)
    };
    match detail.job.status {
        JobStatus::Succeeded => 0,
        JobStatus::Cancelled | JobStatus::Abandoned => u8::try_from(codes::CANCELLED.0).unwrap_or(1),
        JobStatus::NeedsAttention => code(codes::NEEDS_ATTENTION.0),
        _ => code(1),
    }
}

async fn to_the_end(client: &Client, job: &str, view: &mut dyn View) -> Result<JobDetail, Fault> {
    let path = super::job::path(job, "/watch");
    let mut missed = 0;
    loop {
        let broke = match client.stream(&path).await {
            Err(fault) => fault,
            Ok(mut pieces) => loop {
                match pieces.event::<Live>().await {
                    Ok(Some(Live::Job(detail))) => {
                        missed = 0;
                        view.update(&detail);
                    }
                    Ok(Some(Live::End(detail))) => {
                        view.update(&detail);
                        return Ok(*detail);
                    }
                    Ok(None) => {
                        break Fault::permanent(
                            codes::DAEMON_UNREACHABLE,
                            "follow the job",
                            job,
                            "vmkeepd stopped",
                        )
                        .remedy("The job goes on when vmkeepd starts again");
                    }
                    Err(fault) => break fault,
                }
            },
        };
        // A daemon that was restarted goes on with the job, and so do we.
        if broke.code != codes::DAEMON_UNREACHABLE || missed >= RECONNECTS {
            return Err(broke);
        }
        if missed == 0 {
            view.note("vmkeepd went away; waiting for it to come back");
        }
        missed += 1;
        tokio::time::sleep(RECONNECT_EVERY).await;
    }
}

/// A way to show a job that goes on.
trait View: Send {
    fn update(&mut self, detail: &JobDetail);
    fn note(&mut self, text: &str);
    fn finish(&mut self) {}
}

struct Silent;

impl View for Silent {
    fn update(&mut self, _: &JobDetail) {}
    fn note(&mut self, _: &str) {}
}

/// What changed of a step since it was looked at last, in one line each.
#[derive(Default)]
struct Changes {
    states: HashMap<String, (StepState, Option<StepState>, u32)>,
    status: Option<JobStatus>,
    named: bool,
}

impl Changes {
    fn of(&mut self, detail: &JobDetail) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.named && detail.job.steps > 0 {
            self.named = true;
            lines.push(format!("job {}: {}", detail.job.short, safe(&detail.job.title)));
        }
        if self.status != Some(detail.job.status) {
            match detail.job.status {
                JobStatus::Queued => {
                    lines.push(format!("job {} is being planned, or waits for its turn", detail.job.short))
                }
                JobStatus::Paused => lines.push(match crate::explain::pause_waits(&detail.safe_after) {
                    None => "the job is paused".to_owned(),
                    Some(why) => safe(&format!("the job is to pause: {why}")),
                }),
                JobStatus::Unwinding => lines.push("the job takes back what it did".to_owned()),
                _ => {}
            }
            self.status = Some(detail.job.status);
        }
        for step in &detail.steps {
            let now = (step.state, step.undo, step.attempts);
            let before = self.states.insert(step.name.clone(), now);
            if before == Some(now) {
                continue;
            }
            if before.map(|b| b.0) != Some(step.state) || before.map(|b| b.2) != Some(step.attempts) {
                lines.extend(forward_line(step));
            }
            if before.and_then(|b| b.1) != step.undo && step.undo == Some(StepState::Done) {
                lines.push(format!("  undone  {}", safe(&step.title)));
            }
        }
        lines
    }
}

fn forward_line(step: &StepRow) -> Option<String> {
    let title = safe(&step.title);
    Some(match step.state {
        StepState::Running if step.attempts > 1 => format!("  again   {title} (attempt {})", step.attempts),
        StepState::Running => format!("  begins  {title}"),
        StepState::Done => format!("  done    {title}"),
        StepState::Probing => format!("  checks  {title}"),
        StepState::Failed | StepState::Stuck => {
            let cause =
                step.fault.as_ref().map(|fault| format!(": {}", safe(&fault.cause))).unwrap_or_default();
            format!("  failed  {title}{cause}")
        }
        StepState::Waiting if step.awaits.is_some() => {
            let signal = safe(step.awaits.as_deref().unwrap_or_default());
            let until =
                step.awaits_until.map(|at| format!(" until {}", crate::text::local(at))).unwrap_or_default();
            format!("  waits   for the signal {signal}{until}: vmkeep job signal JOB {signal}")
        }
        StepState::Waiting => match &step.fault {
            Some(fault) => format!("  waits   {title}: {}", safe(&fault.cause)),
            None => format!("  waits   {title}"),
        },
        StepState::Pending | StepState::Stopped => return None,
    })
}

/// How far back the pace of a step is looked at: long enough to be steady, short enough to notice a change.
const WINDOW: Duration = Duration::from_secs(8);

/// How fast a step is, from what it said over the last while.
#[derive(Default)]
struct Pace {
    seen: VecDeque<(Instant, u64)>,
}

impl Pace {
    /// Units per second, once there is something to tell it from.
    fn rate(&mut self, done: u64) -> Option<f64> {
        self.rate_at(Instant::now(), done)
    }

    fn rate_at(&mut self, now: Instant, done: u64) -> Option<f64> {
        // It began anew: what was before says nothing.
        if self.seen.back().is_some_and(|(_, before)| *before > done) {
            self.seen.clear();
        }
        self.seen.push_back((now, done));
        while self.seen.len() > 2 && self.seen.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW)
        {
            self.seen.pop_front();
        }
        let (since, first) = *self.seen.front()?;
        let secs = now.duration_since(since).as_secs_f64();
        #[allow(clippy::cast_precision_loss)]
        (secs > 0.5 && done > first).then(|| (done - first) as f64 / secs)
    }
}

/// How much of what is done, how fast, and how long it will take.
fn amount(done: u64, total: u64, unit: &str, rate: Option<f64>) -> String {
    let mut text = if total > 0 {
        format!("{} of {} ({} %)", count(done, unit), count(total, unit), percent(done, total))
    } else {
        count(done, unit)
    };
    if let Some(rate) = rate {
        text.push_str(&format!(", {}", speed(rate, unit)));
        if let Some(left) = time_left(done, total, rate) {
            text.push_str(&format!(", {left} left"));
        }
    }
    text
}

/// The same beside a bar, which says the rest.
fn brief(done: u64, total: u64, unit: &str, rate: Option<f64>) -> String {
    let mut text = format!("{:>3} % of {}", percent(done, total), count(total, unit));
    if let Some(rate) = rate {
        text.push_str(&format!("  {}", speed(rate, unit)));
        if let Some(left) = time_left(done, total, rate) {
            text.push_str(&format!("  {left}"));
        }
    }
    text
}

fn count(n: u64, unit: &str) -> String {
    if unit == "bytes" { bytes(n) } else { format!("{n} {unit}") }
}

fn percent(done: u64, total: u64) -> u64 {
    done.min(total).saturating_mul(100).checked_div(total).unwrap_or(0)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn speed(rate: f64, unit: &str) -> String {
    format!("{}/s", count(rate as u64, unit))
}

#[allow(clippy::cast_precision_loss)]
fn time_left(done: u64, total: u64, rate: f64) -> Option<String> {
    let rest = total.checked_sub(done).filter(|rest| *rest > 0)?;
    Some(left_over(Duration::from_secs_f64((rest as f64 / rate).min(1e9))))
}

/// A time to come, which nobody knows to the hundredth.
fn left_over(left: Duration) -> String {
    let secs = left.as_secs().max(1);
    if secs < 60 { format!("{secs} s") } else { span(Duration::from_secs(secs)) }
}

/// For logs and pipes.
#[derive(Default)]
struct Lines {
    changes: Changes,
    pace: HashMap<String, (Pace, u64)>,
}

impl View for Lines {
    fn update(&mut self, detail: &JobDetail) {
        for line in self.changes.of(detail) {
            eprintln!("{line}");
        }
        for step in &detail.steps {
            let (StepState::Running, Some(progress)) = (step.state, &step.progress) else { continue };
            let (pace, told) = self.pace.entry(step.name.clone()).or_default();
            let rate = pace.rate(progress.done);
            let tenth = progress.done.saturating_mul(10).checked_div(progress.total).unwrap_or(0);
            if tenth > *told && tenth < 10 {
                *told = tenth;
                let text = amount(progress.done, progress.total, &progress.unit, rate);
                eprintln!("          {}: {text}", safe(&step.title));
            }
        }
    }

    fn note(&mut self, text: &str) {
        eprintln!("{text}");
    }
}

/// For terminals.
struct Bars {
    all: MultiProgress,
    changes: Changes,
    bars: HashMap<String, (ProgressBar, Pace)>,
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self { all, changes: Changes::default(), bars: HashMap::new() }
    }
}

impl View for Bars {
    fn update(&mut self, detail: &JobDetail) {
        for line in self.changes.of(detail) {
            // That a step has begun is what its bar says.
            if !line.starts_with("  begins") {
                let _ = self.all.println(line);
            }
        }
        for step in &detail.steps {
            let active = matches!(step.state, StepState::Running | StepState::Probing);
            if !active {
                if let Some((bar, _)) = self.bars.remove(&step.name) {
                    bar.finish_and_clear();
                }
                continue;
            }
            let (bar, pace) = self.bars.entry(step.name.clone()).or_insert_with(|| {
                let bar = self.all.add(ProgressBar::new(0));
                bar.enable_steady_tick(Duration::from_millis(200));
                (bar, Pace::default())
            });
            match &step.progress {
                Some(p) if p.total > 0 => {
                    // The step's name: its title, with the paths in it, leaves no room for a bar.
                    if let Ok(style) = ProgressStyle::with_template("  {prefix:24!} {wide_bar} {msg}") {
                        bar.set_style(style);
                    }
                    bar.set_length(p.total);
                    bar.set_position(p.done);
                    bar.set_prefix(safe(&step.name));
                    bar.set_message(brief(p.done, p.total, &p.unit, pace.rate(p.done)));
                }
                _ => {
                    if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg} {elapsed}") {
                        bar.set_style(style);
                    }
                    bar.set_message(safe(&step.title));
                }
            }
        }
    }

    fn note(&mut self, text: &str) {
        let _ = self.all.println(text);
    }

    fn finish(&mut self) {
        for (_, (bar, _)) in self.bars.drain() {
            bar.finish_and_clear();
        }
        let _ = self.all.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_tells_rate_and_remaining_time_once_both_are_known() {
        assert_eq!(amount(1 << 30, 2 << 30, "bytes", None), "1.0 GiB of 2.0 GiB (50 %)");
        let text = amount(1 << 30, 2 << 30, "bytes", Some(f64::from(1 << 20) * 128.0));
        assert_eq!(text, "1.0 GiB of 2.0 GiB (50 %), 128.0 MiB/s, 8 s left");
        assert_eq!(amount(5, 0, "files", None), "5 files");
        let text = brief(1 << 30, 2 << 30, "bytes", Some(f64::from(1 << 20) * 128.0));
        assert_eq!(text, " 50 % of 2.0 GiB  128.0 MiB/s  8 s");
    }

    #[test]
    fn a_pace_forgets_a_pause_and_an_attempt_that_began_anew() {
        let start = Instant::now();
        let at = |secs: u64| start + Duration::from_secs(secs);
        let mut pace = Pace::default();
        assert_eq!(pace.rate_at(at(0), 0), None);
        assert_eq!(pace.rate_at(at(1), 100), Some(100.0));
        // A long pause, then the old speed again.
        assert!(pace.rate_at(at(60), 200).unwrap() < 10.0);
        for n in 1..=20 {
            pace.rate_at(at(60 + n), 200 + n * 100);
        }
        assert!((pace.rate_at(at(81), 2300).unwrap() - 100.0).abs() < 1.0);
        assert_eq!(pace.rate_at(at(82), 0), None);
        assert_eq!(pace.rate_at(at(83), 50), Some(50.0));
    }
}
