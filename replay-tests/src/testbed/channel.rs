//! Commands to the guest, over the virtio port `org.vmkeep.testbed.0`.
//!
//! Each command has a connection and an id of its own. What an earlier, broken connection left in the pipe is
//! recognised by its id and dropped.

use super::error::{Error, IoContext, Result};
use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Sends one command line and returns the text of its answer.
pub(crate) fn ask(socket: &Path, command: &str, within: Duration) -> Result<String> {
    let began = Instant::now();
    let id = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let mut stream = UnixStream::connect(socket).doing("connect to", socket)?;
    stream.write_all(format!("{id} {command}\n").as_bytes()).doing("write to", socket)?;
    stream.set_read_timeout(Some(Duration::from_millis(200))).doing("read from", socket)?;
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return Err(std::io::Error::from(ErrorKind::UnexpectedEof)).doing("read from", socket),
            Ok(_) if line.ends_with(b"\n") => {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                let mut words = text.splitn(3, ' ');
                if words.next() != Some(&id) {
                    continue;
                }
                let (status, answer) = (words.next(), words.next().unwrap_or_default().to_owned());
                return match status {
                    Some("ok") => Ok(answer),
                    _ => Err(Error::Refused { command: command.to_owned(), answer }),
                };
            }
            Ok(_) => {}
            // A part of a line stays in `line` over a timeout.
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(e) => return Err(e).doing("read from", socket),
        }
        if began.elapsed() > within {
            let seen = String::from_utf8_lossy(&line).into_owned();
            return Err(Error::Timeout {
                what: format!("the guest's answer to {command:?}"),
                after: within,
                seen,
            });
        }
    }
}
