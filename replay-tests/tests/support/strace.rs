//! The system calls of a process that runs, held up by strace.

use std::io::Read;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Holds up a call of a process on its way in or out (`delay_enter`, `delay_exit`), on these paths alone if there are any.
/// Returns when it is being watched: strace, what it says, and what it has said so far.
pub(super) fn held_up(
    call: &str,
    way: &str,
    delay: Duration,
    paths: impl IntoIterator<Item = String>,
    process: u32,
) -> (Child, ChildStderr, String) {
    // As whoever runs the test, who may trace a process of the hypervisor's user where that user itself may not.
    let mut command = Command::new("strace");
    command.args(["-f", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:{way}={}", delay.as_micros())]);
    for path in paths {
        command.args(["-P", &path]);
    }
    command.args(["-p", &process.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut strace = command.spawn().expect("strace starts");
    let mut said = strace.stderr.take().unwrap();
    let mut text = String::new();
    while !text.contains(" attached") {
        assert!(read_some(&mut said, &mut text), "strace cannot watch {process}: {text}");
    }
    (strace, said, text)
}

/// `false` at the end.
pub(super) fn read_some(from: &mut impl Read, text: &mut String) -> bool {
    let mut buffer = [0; 4096];
    match from.read(&mut buffer) {
        Ok(0) | Err(_) => false,
        Ok(read) => {
            text.push_str(&String::from_utf8_lossy(&buffer[..read]));
            true
        }
    }
}

/// The connections of a process, each held up when it is made: the other side has it, and hears nothing. Until it is dropped.
pub struct Connections {
    strace: Child,
    said: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Connections {
    pub fn held_up(process: u32, delay: Duration) -> Self {
        let (strace, mut from, text) = held_up("connect", "delay_exit", delay, [], process);
        let said = Arc::new(Mutex::new(text));
        let reader = {
            let said = Arc::clone(&said);
            std::thread::spawn(move || {
                let mut text = String::new();
                while read_some(&mut from, &mut text) {
                    said.lock().unwrap().push_str(&std::mem::take(&mut text));
                }
            })
        };
        Self { strace, said, reader: Some(reader) }
    }

    /// Whether one to an address that ends so has begun.
    pub fn has_begun(&self, address: &str) -> bool {
        self.said.lock().unwrap().contains(&format!("{address}\""))
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}
