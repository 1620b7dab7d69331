//! The loop, in a process of its own, and the process that watches it.
//!
//! Before an input is tried it is written to a file that both know. So whatever ends the child (a stack that overflows, memory
//! that is refused, a signal), the parent has the input; and when the file no longer changes the child hangs.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, setrlimit};

use super::mutate::{mutated, words};
use super::targets::{ACCEPTED, ALL, Target};

/// What a target may take in memory, in all: its inputs have a quarter of a MiB at most.
const MEMORY: u64 = 1 << 30;
/// What it may really have touched of it, when it ends.
const TOUCHED: u64 = 384 << 20;
/// The stack of a worker thread of the daemon's.
const STACK: usize = 2 << 20;
/// One input may not take longer. Not a measurement: it tells a loop without end from one that is slow on a busy machine.
const HANGS: Duration = Duration::from_secs(60);
/// So many inputs are changed further.
const POOL: usize = 1024;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn find(name: &str) -> &'static Target {
    ALL.iter().find(|target| target.name == name).expect("there is such a target")
}

/// Tries a target out for its time, and fails with the input that broke it.
pub(crate) fn fuzz(name: &str) {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let tried = folder.path().join("tried");
    std::fs::write(&tried, []).unwrap();
    let (seed, seconds) = (setting("VMKEEP_FUZZ_SEED", 1), setting("VMKEEP_FUZZ_SECONDS", 4));
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture", "--test-threads=1"])
        .env("VMKEEP_FUZZ_TARGET", name)
        .env("VMKEEP_FUZZ_SEED", seed.to_string())
        .env("VMKEEP_FUZZ_SECONDS", seconds.to_string())
        .env("VMKEEP_FUZZ_TRIED", &tried)
        .env("TMPDIR", folder.path())
        .stdout(Stdio::inherit())
        .stderr(File::create(folder.path().join("said")).unwrap())
        .spawn()
        .unwrap();
    let ended = watch(&mut child, &tried);
    let said = std::fs::read(folder.path().join("said")).unwrap_or_default();
    let said = String::from_utf8_lossy(&said).into_owned();
    if ended.as_deref() == Some("exit status: 0") {
        print!("{said}");
        return;
    }
    let input = std::fs::read(&tried).unwrap();
    let input = input.get(8..).unwrap_or_default();
    let kept = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("fuzz-{name}-{}", &blake3::hash(input).to_hex()[..12]));
    std::fs::write(&kept, input).unwrap();
    let shown = String::from_utf8_lossy(&input[..input.len().min(2000)]).into_owned();
    let end = &said[said.len().saturating_sub(3000).min(said.len())..];
    panic!(
        "target {name}, seed {seed}: {}\n{end}\nthe input ({} bytes) is kept in {}; it belongs into replay-tests/corpus/{name}\n{shown:?}",
        ended.as_deref().unwrap_or("it hangs"),
        input.len(),
        kept.display()
    );
}

/// Waits for the child's end; nothing if one input took too long, and then it was ended.
fn watch(child: &mut Child, tried: &Path) -> Option<String> {
    let number = || {
        let mut number = [0; 8];
        let read = File::open(tried).and_then(|file| file.read_exact_at(&mut number, 0));
        read.map_or(0, |()| u64::from_le_bytes(number))
    };
    let (mut last, mut since) = (number(), Instant::now());
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status.to_string());
        }
        std::thread::sleep(Duration::from_millis(20));
        let now = number();
        if now != last {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > HANGS {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
    }
}

/// What the child does, if this process is one.
pub(crate) fn child() {
    let Ok(name) = std::env::var("VMKEEP_FUZZ_TARGET") else { return };
    setrlimit(Resource::As, Rlimit { current: Some(MEMORY), maximum: Some(MEMORY) }).unwrap();
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || explore(find(&name)));
    let failed = thread.unwrap().join().is_err();
    std::process::exit(i32::from(failed));
}

/// Writes down what is tried next.
struct Tried(File, u64);

impl Tried {
    fn note(&mut self, input: &[u8]) {
        self.1 += 1;
        self.0.set_len(8 + input.len() as u64).unwrap();
        self.0.write_all_at(input, 8).unwrap();
        self.0.write_all_at(&self.1.to_le_bytes(), 0).unwrap();
    }
}

fn explore(target: &Target) {
    let tried = File::options().write(true).open(std::env::var_os("VMKEEP_FUZZ_TRIED").unwrap()).unwrap();
    let mut tried = Tried(tried, 0);
    let (seed, seconds) = (setting("VMKEEP_FUZZ_SEED", 1), setting("VMKEEP_FUZZ_SECONDS", 4));
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut pool = (target.seeds)();
    let words = words(&pool);
    let mut seen = HashSet::new();
    for seed in &pool {
        tried.note(seed);
        seen.insert((target.run)(seed));
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut accepted = 0_u64;
    while Instant::now() < end {
        let input = mutated(&mut rng, &pool, &words);
        tried.note(&input);
        let outcome = match catch_unwind(AssertUnwindSafe(|| (target.run)(&input))) {
            Ok(outcome) => outcome,
            Err(panic) => {
                let (small, tries) = shrunk(target, input);
                tried.note(&small);
                eprintln!("(made smaller in {tries} tries)");
                std::panic::resume_unwind(panic);
            }
        };
        accepted += u64::from(outcome == ACCEPTED);
        if seen.insert(outcome) || (outcome == ACCEPTED && rng.u8(..64) == 0) {
            if pool.len() < POOL {
                pool.push(input);
            } else {
                let at = rng.usize(..POOL);
                pool[at] = input;
            }
        }
    }
    let touched = touched();
    eprintln!(
        "{}: seed {seed}, {} inputs, {accepted} accepted, {} outcomes, {} MiB at most",
        target.name,
        tried.1,
        seen.len(),
        touched >> 20
    );
    assert!(touched < TOUCHED, "it took {touched} bytes of memory");
}

/// Leaves out what can be left out without the panic going away.
fn shrunk(target: &Target, mut input: Vec<u8>) -> (Vec<u8>, u32) {
    std::panic::set_hook(Box::new(|_| {}));
    let (mut tries, mut piece) = (0, input.len() / 2);
    while piece > 0 && tries < 2000 {
        let mut at = 0;
        while at < input.len() && tries < 2000 {
            let mut less = input.clone();
            less.drain(at..(at + piece).min(input.len()));
            tries += 1;
            if catch_unwind(AssertUnwindSafe(|| (target.run)(&less))).is_err() {
                input = less;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    (input, tries)
}

/// The most memory that this process ever had, in bytes.
fn touched() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
