//! The way to the server: OpenSSH's own `ssh`, as a process whose ends are the conversation.
//!
//! So the administrator's keys, agents, jump hosts and `~/.ssh/config` hold here as everywhere, and no second implementation
//! of SSH has to be trusted. It never asks anybody anything (`BatchMode`): there are no passwords, and a host whose key is
//! not known is refused.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

use super::session::{Failure, Session};
use crate::backend::{Address, BackendErrorKind, Options};

/// What is kept of what `ssh` has to say.
const SAYINGS: usize = 4096;

/// A program, and what it is told.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) program: String,
    pub(super) arguments: Vec<String>,
}

/// A process that leads to a server, and the conversation with it. Both end with this.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) session: Session,
    /// Killed when it is dropped.
    _process: Child,
}

impl Program {
    /// `ssh`, with which a folder of an address is reached.
    pub(super) fn ssh(user: Option<&str>, host: &str, port: Option<u16>, options: &Options) -> Self {
        let mut arguments = Vec::new();
        let mut option = |text: String| arguments.extend(["-o".to_owned(), text]);
        for text in [
            "BatchMode=yes",
            "StrictHostKeyChecking=yes",
            "ConnectTimeout=20",
            // A dead line is noticed within 45 seconds.
            "ServerAliveInterval=15",
            "ServerAliveCountMax=3",
            // Nothing but this conversation, and its own: not a part of somebody's shared connection.
            "ControlMaster=no",
            "ControlPath=none",
            "ClearAllForwardings=yes",
            "ForwardAgent=no",
            "ForwardX11=no",
            "PermitLocalCommand=no",
            "RequestTTY=no",
            "LogLevel=ERROR",
        ] {
            option(text.to_owned());
        }
        if let Some(file) = &options.known_hosts {
            option(format!("UserKnownHostsFile={}", quoted(file)));
            option("GlobalKnownHostsFile=/dev/null".to_owned());
        }
        if let Some(file) = &options.identity {
            option(format!("IdentityFile={}", quoted(file)));
            option("IdentitiesOnly=yes".to_owned());
        }
        let mut pair = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
        if let Some(file) = &options.ssh_config {
            pair("-F", file.display().to_string());
        }
        if let Some(port) = port {
            pair("-p", port.to_string());
        }
        if let Some(user) = user {
            pair("-l", user.to_owned());
        }
        arguments.extend(["-s", "--", host, "sftp"].map(str::to_owned));
        Self { program: "ssh".to_owned(), arguments }
    }

    /// Begins a conversation.
    pub(super) async fn connect(&self) -> Result<Connection, (BackendErrorKind, String)> {
        let mut process = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            // What interrupts the program at its terminal is not to cut what it has in flight.
            .process_group(0)
            .spawn()
            .map_err(|error| (BackendErrorKind::Broken, format!("{}: {error}", self.program)))?;
        let (Some(to), Some(from), Some(says)) =
            (process.stdin.take(), process.stdout.take(), process.stderr.take())
        else {
            return Err((BackendErrorKind::Broken, format!("{} has no ends", self.program)));
        };
        let said = Arc::new(Mutex::new(String::new()));
        let listening = tokio::spawn(listen(says, said.clone()));
        match Session::begin(from, to).await {
            Ok(session) => Ok(Connection { session, _process: process }),
            Err(failure) => {
                // It ends by itself, or it does not speak SFTP. Then all that it said is here.
                let _ = process.kill().await;
                let _ = listening.await;
                let said = said.lock().unwrap_or_else(PoisonError::into_inner).trim().to_owned();
                Err((kind(&said, &failure), if said.is_empty() { failure.to_string() } else { said }))
            }
        }
    }
}

/// A file in `ssh`'s configuration, where a space ends a name and `%` begins a word of its own.
fn quoted(file: &std::path::Path) -> String {
    format!("\"{}\"", file.display().to_string().replace('%', "%%"))
}

async fn listen(mut says: impl AsyncRead + Unpin, said: Arc<Mutex<String>>) {
    let mut part = [0; 1024];
    // Read to its end, or the process would wait for a reader.
    while let Ok(read @ 1..) = says.read(&mut part).await {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() < SAYINGS {
            said.push_str(&String::from_utf8_lossy(&part[..read]));
        }
    }
}

/// What can be done about a conversation that did not begin.
fn kind(said: &str, failure: &Failure) -> BackendErrorKind {
    let says = |texts: &[&str]| texts.iter().any(|text| said.contains(text));
    if says(&["Permission denied", "Too many authentication failures", "No supported authentication methods"])
    {
        return BackendErrorKind::Denied;
    }
    let stranger = ["Host key verification failed", "REMOTE HOST IDENTIFICATION HAS CHANGED"];
    let unfit = ["subsystem request failed", "Bad configuration option", "no argument after keyword"];
    if says(&stranger) || says(&unfit) || failure.to_string().contains("does not speak SFTP") {
        return BackendErrorKind::Broken;
    }
    BackendErrorKind::Transient
}

/// The folder of an address, and the way to it.
pub(super) fn way(address: &Address, options: &Options) -> Option<(Program, String)> {
    match address {
        Address::Sftp { user, host, port, path } => {
            Some((Program::ssh(user.as_deref(), host, *port, options), path.clone()))
        }
        _ => None,
    }
}
