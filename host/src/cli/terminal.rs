//! Asking at the terminal: what is typed is no word of a command line, and what is shown goes to nobody's log.
//!
//! The terminal itself is opened, not standard input and output, which may be files. While a passphrase is typed nothing is
//! shown; the terminal is as it was again whatever ends the asking, an interruption too. Reading has a thread of its own,
//! which nobody waits for: an interrupted one sits in a read that ends with the process.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use vmkeep_workflow::Fault;
use zeroize::Zeroizing;

use crate::codes;

/// Tries at typing the recovery key in again.
const TRIES: usize = 3;
/// Takes what is on the screen away, and what has left it by the top.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J\u{1b}[3J";

/// The terminal of whoever called.
pub(super) struct Terminal(File);

impl Terminal {
    /// Opens it.
    ///
    /// # Errors
    /// If there is none, as in a script.
    pub(super) fn open(wanted: &str, instead: &str) -> Result<Self, Fault> {
        let opened = File::options().read(true).write(true).open("/dev/tty");
        opened.map(Self).map_err(|_| {
            Fault::permanent(codes::USAGE, "ask at the terminal", wanted, "there is no terminal")
                .remedy(instead)
        })
    }

    /// Shows text.
    pub(super) fn say(&mut self, text: &str) -> Result<(), Fault> {
        self.0.write_all(text.as_bytes()).and_then(|()| self.0.flush()).map_err(|error| broken(&error))
    }

    /// A line that is typed, without its end. With `hidden`, it is not shown.
    pub(super) async fn line(&mut self, question: &str, hidden: bool) -> Result<Zeroizing<String>, Fault> {
        // Before the question: who has read it may type.
        let quiet = if hidden { Some(Quiet::begin(&self.0)?) } else { None };
        self.say(question)?;
        let input = self.0.try_clone().map_err(|error| broken(&error))?;
        let (tell, told) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            // Of its whole size from the beginning: what grows leaves copies behind that nobody wipes.
            let mut line = Zeroizing::new(String::with_capacity(4096));
            let read = BufReader::with_capacity(1, input).read_line(&mut line);
            let _ = tell.send(read.map(|count| (count > 0).then_some(line)));
        });
        let read = tokio::select! {
            read = told => read,
            _ = tokio::signal::ctrl_c() => {
                drop(quiet);
                self.say("\n")?;
                return Err(interrupted());
            }
        };
        drop(quiet);
        if hidden {
            self.say("\n")?;
        }
        match read {
            Ok(Ok(Some(line))) => Ok(Zeroizing::new(line.trim_end_matches(['\n', '\r']).to_owned())),
            Ok(Ok(None)) => Err(interrupted()),
            Ok(Err(error)) => Err(broken(&error)),
            Err(error) => Err(broken(&std::io::Error::other(error))),
        }
    }

    /// 24 words, on as many lines as it takes.
    pub(super) async fn words(&mut self, question: &str) -> Result<Zeroizing<String>, Fault> {
        let mut words = Zeroizing::new(String::with_capacity(4096));
        let mut question = question;
        while words.split_whitespace().count() < 24 {
            let line = self.line(question, false).await?;
            if line.trim().is_empty() && !words.is_empty() {
                break;
            }
            words.push_str(&line);
            words.push(' ');
            question = "";
        }
        Ok(words)
    }

    /// A new passphrase, typed twice.
    pub(super) async fn new_passphrase(&mut self, of: &str) -> Result<Zeroizing<String>, Fault> {
        for _ in 0..TRIES {
            let first = self.line(&format!("New passphrase for {of}: "), true).await?;
            if first.is_empty() {
                self.say("A passphrase has at least one character.\n")?;
                continue;
            }
            if *self.line("Once more: ", true).await? == *first {
                return Ok(first);
            }
            self.say("They differ.\n")?;
        }
        Err(Fault::permanent(
            codes::VAULT_KEY_REFUSED,
            "ask for a new passphrase",
            of,
            "it was not typed twice",
        ))
    }

    /// Shows the recovery key, takes it away again, and has it typed in. `accept` says whether it is right.
    pub(super) async fn confirm<T>(
        &mut self,
        vault: &str,
        words: &str,
        accept: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, Fault> {
        let numbered: Vec<String> =
            words.split(' ').enumerate().map(|(at, word)| format!("{:>2} {word:<9}", at + 1)).collect();
        let rows: Vec<String> = numbered.chunks(6).map(|row| format!("  {}\n", row.join(" "))).collect();
        for _ in 0..TRIES {
            self.say(&format!(
                "The recovery key of {vault}. It opens the vault when every other key is lost, and is shown only now.\n\
                 Write it down, and keep it where the vault is not:\n\n{}\n",
                rows.concat()
            ))?;
            self.line("Press Enter when it is written down; the screen is cleared then. ", false).await?;
            self.say(CLEAR)?;
            let typed = self.words("Type the 24 words in, from what you have written:\n").await?;
            self.say(CLEAR)?;
            match accept(&typed) {
                Ok(confirmed) => return Ok(confirmed),
                Err(why) => self.say(&format!("That is not it: {why}.\n\n"))?,
            }
        }
        let cause = "the recovery key was not typed in as it was shown";
        Err(Fault::permanent(codes::VAULT_KEY_REFUSED, "make the vault", vault, cause)
            .remedy("Nothing was made. Begin anew: another recovery key is shown then"))
    }
}

/// A terminal that shows nothing of what is typed, until this is dropped.
struct Quiet(File, Termios);

impl Quiet {
    fn begin(terminal: &File) -> Result<Self, Fault> {
        let broken = |error: rustix::io::Errno| broken(&error.into());
        let before = tcgetattr(terminal).map_err(broken)?;
        let mut now = before.clone();
        now.local_modes.remove(LocalModes::ECHO | LocalModes::ECHOE | LocalModes::ECHOK);
        tcsetattr(terminal, OptionalActions::Flush, &now).map_err(broken)?;
        let terminal = terminal.try_clone().map_err(|error| self::broken(&error))?;
        Ok(Self(terminal, before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.0, OptionalActions::Now, &self.1);
    }
}

fn broken(error: &std::io::Error) -> Fault {
    Fault::permanent(codes::USAGE, "ask at the terminal", "/dev/tty", error)
}

fn interrupted() -> Fault {
    Fault::permanent(codes::CANCELLED, "ask at the terminal", "", "it was interrupted")
}
