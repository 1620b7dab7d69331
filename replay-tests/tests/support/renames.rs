//! libvirtd seen, and held up, whenever it puts a file of its own in its place.
//!
//! libvirt writes its status and configuration files aside and renames them. Between what QEMU has done and the rename
//! that notes it lie the moments at which its death does the most harm. strace delays each of these renames, so that a
//! test can act while one of them is about to happen. Most only note that a call begins or ends; those that note
//! something else, a disk's file, a state, a marker, are told apart by what they say and are counted, over all threads.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use super::bed::Bed;
use super::strace::{held_up, read_some};

/// So long each rename is held up: time enough to act in between. There are more than a hundred in one backup.
const DELAY: Duration = Duration::from_millis(40);

/// A rename that was about to happen, and would have changed what libvirt has noted.
#[derive(Clone, Debug)]
pub struct Rename {
    /// The file that is replaced.
    pub to: PathBuf,
    /// The first lines that differ: as it is, and as it would be.
    pub change: (String, String),
}

/// Chooses a change by its number and what it is.
pub type When = Box<dyn Fn(usize, &Rename) -> bool + Send>;

/// What is to be done, once, while a certain rename is about to happen: which one (it is told its number, from 1), what.
pub struct Act {
    pub when: When,
    pub act: Box<dyn FnOnce() + Send>,
}

/// A running strace of libvirtd. It lets go when dropped.
pub struct Renames {
    strace: Child,
    seen: Arc<Mutex<Vec<Rename>>>,
    acted: Arc<Mutex<bool>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Renames {
    /// Watches libvirt's notes about the guest; returns when libvirtd is being watched.
    pub fn watch(bed: &Bed, act: Option<Act>) -> Self {
        let libvirtd = bed.host.hypervisor.libvirtd().expect("libvirtd runs").pid;
        // strace goes by the first of the two names.
        let files = bed.files_of_libvirt().into_iter().map(|file| format!("{}.new", file.display()));
        let (strace, mut said, mut text) = held_up("rename", "delay_enter", DELAY, files, libvirtd);
        let (seen, acted) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(false)));
        let reader = {
            let (seen, acted) = (Arc::clone(&seen), Arc::clone(&acted));
            std::thread::spawn(move || {
                let mut act = act;
                loop {
                    while let Some(to) = next_rename(&mut text) {
                        let Some(change) = change(&to) else { continue };
                        let mut seen = seen.lock().unwrap();
                        seen.push(Rename { to, change });
                        let (number, last) = (seen.len(), seen.last().unwrap());
                        if let Some(act) = act.take_if(|act| (act.when)(number, last)) {
                            (act.act)();
                            *acted.lock().unwrap() = true;
                        }
                    }
                    if !read_some(&mut said, &mut text) {
                        return;
                    }
                }
            })
        };
        Self { strace, seen, acted, reader: Some(reader) }
    }

    /// The changes that a backup or restore brings about when nobody disturbs it, and its row.
    pub fn undisturbed(bed: &Bed, args: &[&str]) -> (Vec<Rename>, Value) {
        let watch = Self::watch(bed, None);
        let job = bed.host.begin(args);
        let row = bed.host.settled(&job);
        assert_eq!(row["status"], "succeeded", "{row:#}");
        (watch.seen(), row)
    }

    /// Begins a job, and kills libvirtd when a certain one of the changes is about to happen. Returns the job and that
    /// change, libvirtd being gone; or no change if the job ended without it.
    pub fn killed_before(bed: &Bed, when: When, args: &[&str]) -> (String, Option<Rename>) {
        let libvirtd = bed.host.hypervisor.libvirtd().expect("libvirtd runs");
        let kill = Act { when, act: Box::new(move || libvirtd.signal(rustix::process::Signal::KILL)) };
        let watch = Self::watch(bed, Some(kill));
        let job = bed.host.begin(args);
        let reached = super::until("libvirtd to be killed, or the job to end", || {
            if watch.acted() {
                return Some(true);
            }
            // Nothing answers for a moment when libvirtd is killed.
            let row = bed.host.vmkeep(&["--json", "job", "show", &job]);
            let row: Value = serde_json::from_slice(&row.stdout).unwrap_or_default();
            row["job"]["ended"].is_string().then_some(false)
        });
        let change = reached.then(|| watch.seen().pop()).flatten();
        drop(watch);
        if reached {
            libvirtd.wait_gone(Duration::from_secs(20)).expect("libvirtd is gone");
        }
        (job, change)
    }

    /// Those so far.
    pub fn seen(&self) -> Vec<Rename> {
        self.seen.lock().unwrap().clone()
    }

    /// Whether the act was done.
    pub fn acted(&self) -> bool {
        *self.acted.lock().unwrap()
    }
}

impl Drop for Renames {
    fn drop(&mut self) {
        let _ = self.strace.kill();
        let _ = self.strace.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// What the file that is about to take a place says differently, apart from the calls that are going on.
fn change(to: &Path) -> Option<(String, String)> {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
    let (old, new) = (read(to), read(&PathBuf::from(format!("{}.new", to.display()))));
    let told = |text: &str| -> Vec<String> {
        text.lines().map(str::trim).filter(|line| !line.starts_with("<job ")).map(str::to_owned).collect()
    };
    let (old, new) = (told(&old), told(&new));
    let at = (0..old.len().max(new.len())).find(|at| old.get(*at) != new.get(*at))?;
    let line = |of: &[String]| of.get(at).cloned().unwrap_or_default();
    Some((line(&old), line(&new)))
}

/// Takes the next call off the text, as soon as its names are there: strace prints them when the call begins.
fn next_rename(text: &mut String) -> Option<PathBuf> {
    let at = text.find("rename(\"")?;
    let mut names = text[at + 8..].splitn(3, "\", \"");
    let (_, rest) = (names.next()?, names.next()?);
    let to = Path::new(rest.split_once('"')?.0).to_owned();
    let end = text.len() - rest.len() + to.as_os_str().len();
    text.drain(..end);
    Some(to)
}
