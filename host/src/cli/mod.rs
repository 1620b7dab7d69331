//! The command line: words in, text or JSON out, and an exit status that is the error's code.
//!
//! Exit status: 0 when it went well; the code of the error otherwise, 64 for words that make no sense (the parser's own
//! 2 would be taken for [`codes::MISSING_PARAMETER_IN_CONFIG_FILE`]); 130 when the waiting was interrupted, in which
//! case the job goes on.

pub mod args;
mod audit;
mod backups;
mod into_vault;
mod job;
mod kept;
mod make;
mod offline;
mod show;
mod store;
mod terminal;
mod vault;
mod wait;

use std::ffi::OsString;
use std::io::{ErrorKind, Write};

use clap::{CommandFactory, Parser};
use serde::Serialize;
use vmkeep_workflow::Fault;

use crate::api::types::{Backups, DomainRow, ErrorBody, HistoryRow, JobRow, Status};
use crate::client::{Client, segment};
use crate::codes;
use crate::config::{Config, Overrides, Surroundings};
use crate::text::safe;
use args::{Audit, Cli, Command, Global, Job};

/// The exit status after an interrupted wait, as shells have it for SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// Where output goes.
pub(crate) struct Out {
    /// Whether it is JSON.
    pub(crate) json: bool,
}

impl Out {
    /// Prints text. A reader that went away is no error; a place that does not take it is.
    pub(crate) fn text(&self, text: &str) -> Result<(), Fault> {
        let mut out = std::io::stdout().lock();
        let end: &[u8] = if text.is_empty() || text.ends_with('\n') { b"" } else { b"\n" };
        let written =
            out.write_all(text.as_bytes()).and_then(|()| out.write_all(end)).and_then(|()| out.flush());
        match written {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(unwritten("standard output", &error)),
            _ => Ok(()),
        }
    }

    /// Prints a value as JSON, or as the text that is made of it.
    pub(crate) fn show<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), Fault> {
        if self.json {
            let json = serde_json::to_string_pretty(value)
                .map_err(|e| Fault::permanent(codes::UNDEFINED_ERROR, "print the answer", "", e))?;
            self.text(&json)
        } else {
            self.text(&text(value))
        }
    }

    /// Prints an error where errors go.
    pub(crate) fn fault(&self, fault: &Fault) {
        let text = if self.json {
            serde_json::to_string_pretty(&ErrorBody::from(fault)).unwrap_or_default()
        } else {
            show::fault("vmkeep", fault)
        };
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// How a command ended when it did not fail.
pub(crate) type Ended = Result<u8, Fault>;

/// Runs a command line and returns its exit status.
pub async fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args: Vec<OsString> = args.into_iter().collect();
    let json = args.iter().any(|arg| arg == "--json");
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) if json && error.use_stderr() => {
            let fault = usage(&error);
            Out { json }.fault(&fault);
            return status_of(&fault);
        }
        Err(error) => return misspelt(&error),
    };
    let out = Out { json: cli.global.json };
    match carry_out(cli.command, &cli.global, &out).await {
        Ok(status) => status,
        Err(fault) => {
            out.fault(&fault);
            status_of(&fault)
        }
    }
}

/// The exit status of an error: its code, and never 0.
pub(crate) fn status_of(fault: &Fault) -> u8 {
    u8::try_from(fault.code.0).ok().filter(|code| *code != 0).unwrap_or(1)
}

/// The parser's error for programs: its message alone.
fn usage(error: &clap::Error) -> Fault {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let message = text.split("\n\n").next().unwrap_or(text).trim_end();
    Fault::permanent(codes::USAGE, "understand the command line", "", message).remedy("`vmkeep help`")
}

/// The failure of writing output.
pub(crate) fn unwritten(object: &str, error: &std::io::Error) -> Fault {
    let full = matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let (code, remedy) = if full {
        (codes::NOT_ENOUGH_DISK_SPACE, "Make room there, or write elsewhere")
    } else {
        (codes::USAGE, "Name a place that can be written; a file that is there is never written over")
    };
    Fault::permanent(code, "write the output", object, error).remedy(remedy)
}

/// Help and version are no errors; everything else that the parser says is a usage error.
pub fn misspelt(error: &clap::Error) -> u8 {
    let _ = error.print();
    if error.use_stderr() { 64 } else { 0 }
}

/// An error as it is printed.
pub(crate) fn fault_text(program: &str, fault: &Fault) -> String {
    show::fault(program, fault)
}

fn client(global: &Global) -> Result<Client, Fault> {
    if let Some(socket) = &global.socket {
        return Ok(Client::new(socket));
    }
    Ok(Client::new(config(global)?.socket))
}

fn config(global: &Global) -> Result<Config, Fault> {
    let overrides =
        Overrides { config: global.config.clone(), socket: global.socket.clone(), ..Overrides::default() };
    Ok(Config::load(&overrides, &Surroundings::here())?)
}

async fn carry_out(command: Command, global: &Global, out: &Out) -> Ended {
    match command {
        Command::Status => {
            let status: Status = client(global)?.get("/v1/status").await?;
            out.show(&status, show::status)?;
        }
        Command::Domains => {
            let domains: Vec<DomainRow> = client(global)?.get("/v1/domains").await?;
            out.show(&domains, |domains| show::domains(domains))?;
        }
        Command::List { domain } => {
            let query = domain.map(|d| format!("?domain={}", segment(&d))).unwrap_or_default();
            let backups: Backups = client(global)?.get(&format!("/v1/backups{query}")).await?;
            out.show(&backups, show::backups)?;
        }
        Command::Show { backup } => make::show_backup(&client(global)?, out, &backup).await?,
        Command::Verify { backup, waiting } => {
            return make::verify(&client(global)?, out, &backup, &waiting).await;
        }
        Command::Backup(args) => return into_vault::back_up(&client(global)?, out, args).await,
        Command::Snapshot(args) => return make::snapshot(&client(global)?, out, args).await,
        Command::Restore(args) => return make::restore(&client(global)?, out, *args).await,
        Command::Delete(args) => return backups::delete(&client(global)?, out, args).await,
        Command::Prune(args) => return backups::prune(&client(global)?, out, args).await,
        Command::Protect(args) => backups::protect(&client(global)?, out, args, true).await?,
        Command::Unprotect { backup, reason, dry_run } => {
            let args = args::Protect { backup, until: None, reason, dry_run };
            backups::protect(&client(global)?, out, args, false).await?;
        }
        Command::Catalogue(command) => backups::catalogue(&client(global)?, out, command).await?,
        Command::Jobs(args) => {
            let jobs: Vec<JobRow> = client(global)?.get(&job::query(&args)?).await?;
            out.show(&jobs, |jobs| show::jobs(jobs))?;
        }
        Command::Job(command) => return on_job(&client(global)?, out, command).await,
        Command::Replay { what } => return audit::replay(global, out, &what).await,
        Command::Audit(Audit::Verify { file, heads, public_key }) => {
            return audit::verify(global, out, file.as_deref(), heads.as_deref(), &public_key).await;
        }
        Command::Audit(Audit::Heads) => audit::heads(global, out)?,
        Command::Audit(Audit::Key) => audit::key(global, out)?,
        Command::Audit(Audit::RotateKey) => audit::rotate(&client(global)?, out).await?,
        Command::Audit(Audit::Export(args)) => audit::export(&client(global)?, &args).await?,
        Command::Audit(Audit::Guests) => {
            let rows: Vec<HistoryRow> = client(global)?.get("/v1/guests/history").await?;
            out.show(&rows, |rows| show::history(rows))?;
        }
        Command::Audit(Audit::Prune(args)) => return audit::prune(&client(global)?, out, args).await,
        Command::Vault(command) => return Box::pin(vault::carry_out(*command, global, out)).await,
        Command::Offline(command) => return Box::pin(offline::carry_out(*command, global, out)).await,
        Command::Store(args::Store::Info) => store::info(global, out).await?,
        Command::Store(args::Store::Migrate { to, dry_run }) => {
            store::migrate(global, out, to.into(), dry_run).await?;
        }
        Command::Doctor(args) if args.repair => return backups::repair(&client(global)?, out, args).await,
        Command::Doctor(_) => return audit::doctor(global, out).await,
        Command::Diagram { workflow } => diagram(out, workflow.as_deref()).await?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "vmkeep", &mut script);
            out.text(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(0)
}

async fn on_job(client: &Client, out: &Out, command: Job) -> Ended {
    match command {
        Job::Show { job } => job::show(client, out, &job).await?,
        Job::Watch { job } => return wait::watch(client, out, &job).await,
        Job::History { job } => job::history(client, out, &job).await?,
        Job::Explain { job } => job::explain(client, out, &job).await?,
        Job::Cancel(act) => job::act(client, out, "cancel", act, job::More::default()).await?,
        Job::Resume(act) => job::act(client, out, "resume", act, job::More::default()).await?,
        Job::Abandon(act) => job::act(client, out, "abandon", act, job::More::default()).await?,
        Job::Pause { act, span } => {
            let pause_ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
            let more = job::More { pause_ms: Some(pause_ms), ..job::More::default() };
            job::act(client, out, "pause", act, more).await?;
        }
        Job::Signal { act, name } => {
            let more = job::More { signal: Some(name), ..job::More::default() };
            job::act(client, out, "signal", act, more).await?;
        }
        Job::Settle { act, how } => {
            let more = job::More { settle: Some(how.into()), ..job::More::default() };
            job::act(client, out, "settle", act, more).await?;
        }
    }
    Ok(0)
}

async fn diagram(out: &Out, workflow: Option<&str>) -> Result<(), Fault> {
    let all = Box::pin(crate::diagram::all()).await?;
    match workflow {
        None => {
            let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
            out.show(&names, |names| names.join("\n"))
        }
        Some(wanted) => match all.iter().find(|(name, _)| name == wanted) {
            Some((_, dot)) => out.text(dot),
            None => Err(Fault::permanent(
                codes::USAGE,
                "draw the workflow",
                safe(wanted),
                "there is none of that name",
            )
            .remedy("`vmkeep diagram` prints the names")),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(command: &clap::Command, found: &mut Vec<String>) {
        found.extend(command.get_arguments().filter_map(|arg| Some(format!("--{}", arg.get_long()?))));
        command.get_subcommands().for_each(|sub| flags(sub, found));
    }

    /// The pieces of a text that stand between backticks.
    fn quoted(text: &str) -> impl Iterator<Item = &str> {
        text.split('`').skip(1).step_by(2)
    }

    #[test]
    fn every_command_and_option_that_a_remedy_names_exists() {
        let command = Cli::command();
        let mut known = Vec::new();
        flags(&command, &mut known);
        flags(&crate::daemon::args::Args::command(), &mut known);
        let mut checked = 0;
        for entry in codes::all() {
            for piece in quoted(entry.remedy).chain(quoted(entry.cause)) {
                let mut words = piece.split_whitespace();
                match words.next() {
                    Some(flag) if flag.starts_with("--") => {
                        assert!(known.iter().any(|k| k == flag), "{}: there is no {flag}", entry.name);
                        checked += 1;
                    }
                    Some("vmkeep") => {
                        let mut at = &command;
                        for word in words.take_while(|w| w.chars().all(|c| c.is_ascii_lowercase())) {
                            if word == "help" {
                                break;
                            }
                            at = at
                                .find_subcommand(word)
                                .unwrap_or_else(|| panic!("{}: there is no `{piece}`", entry.name));
                        }
                        checked += 1;
                    }
                    _ => {}
                }
            }
        }
        assert!(checked > 20, "only {checked}");
    }

    #[test]
    fn the_parser_itself_is_sound() {
        Cli::command().debug_assert();
        crate::daemon::args::Args::command().debug_assert();
    }
}
