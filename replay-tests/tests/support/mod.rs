//! vmkeepd as a process on a test hypervisor, driven through its own command line, and judged by the test bed's
//! oracle, which shares no code with it.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod bed;
pub mod judge;
pub mod loops;
pub mod mount;
pub mod ram;
pub mod renames;
pub mod shelf;
pub mod strace;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use replay_tests::testbed::{Format, Guest, Hypervisor, TickReport, assert_consistent, ticks_on};
use serde_json::Value;

/// Long enough for a loaded machine; only a fault makes a test wait that long.
pub const LONG: Duration = Duration::from_secs(180);

/// Waits for a condition, up to a deadline.
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    in_time(look).unwrap_or_else(|| panic!("waited too long for {what}"))
}

/// The same; `None` if it is not met in time.
pub fn in_time<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + LONG;
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= end {
            return found;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A host: a hypervisor, and the programs under test where its user can reach them.
pub struct Host {
    pub hypervisor: Hypervisor,
}

impl Host {
    pub fn new() -> Self {
        Self::on(Hypervisor::start_temp().expect("a test hypervisor"))
    }

    pub fn on(hypervisor: Hypervisor) -> Self {
        let bin = hypervisor.dir().join("bin");
        fs::create_dir_all(&bin).unwrap();
        for name in ["vmkeepd", "vmkeep"] {
            let built = built(name);
            place(&built, &bin.join(name))
                .unwrap_or_else(|e| panic!("{}: {e}; build the workspace first", built.display()));
        }
        Self { hypervisor }
    }

    fn program(&self, name: &str) -> PathBuf {
        self.hypervisor.dir().join("bin").join(name)
    }

    /// Starts vmkeepd and waits until it answers.
    pub fn daemon(&self) -> Daemon {
        self.wait_ready(self.daemon_that_dies(None), &[])
    }

    /// Starts vmkeepd with a place at which it is to die.
    pub fn daemon_that_dies(&self, at: Option<&str>) -> Daemon {
        let at = at.map(|at| ("VMKEEP_CRASH_AT", at));
        self.spawn(at.as_slice(), &[])
    }

    /// Starts vmkeepd with these variables in its environment.
    pub fn daemon_with(&self, variables: &[(&str, &str)]) -> Daemon {
        self.spawn(variables, &[])
    }

    /// The same, and waits until it answers.
    pub fn ready_with(&self, variables: &[(&str, &str)]) -> Daemon {
        self.wait_ready(self.daemon_with(variables), &[])
    }

    /// Starts a second vmkeepd, with a store and a socket of its own; commands reach it with [`Self::SECOND`].
    pub fn second_daemon(&self) -> Daemon {
        let options = ["--state-dir", "state/second", "--socket", "run/second/socket"];
        let options = options.map(|option| match option.starts_with("--") {
            true => option.to_owned(),
            false => self.hypervisor.dir().join(option).display().to_string(),
        });
        let daemon = self.spawn(&[], &options);
        self.wait_ready(daemon, &["--socket", &options[3]])
    }

    /// The options with which a command goes to the second vmkeepd. (Programs run in the test bed's folder.)
    pub const SECOND: [&str; 2] = ["--socket", "run/second/socket"];

    fn spawn(&self, variables: &[(&str, &str)], options: &[String]) -> Daemon {
        let mut command = self.hypervisor.command(self.program("vmkeepd"));
        command.envs(variables.iter().copied());
        command.args(options);
        self.logged(command)
    }

    /// Starts vmkeepd with so many file descriptors at most, and waits until it answers.
    pub fn daemon_with_descriptors(&self, most: usize) -> Daemon {
        let mut command = self.hypervisor.command("prlimit");
        command.arg(format!("--nofile={most}:{most}")).arg(self.program("vmkeepd"));
        self.wait_ready(self.logged(command), &[])
    }

    /// Starts vmkeepd under the program `faulty`, with what that takes ahead of it.
    pub fn daemon_under(&self, faulty: &Path, arguments: &[std::ffi::OsString]) -> Daemon {
        let mut command = self.hypervisor.command(faulty);
        command.args(arguments).arg(self.program("vmkeepd"));
        self.logged(command)
    }

    fn logged(&self, mut command: Command) -> Daemon {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        Daemon { child: command.spawn().expect("vmkeepd starts") }
    }

    fn wait_ready(&self, mut daemon: Daemon, to: &[&str]) -> Daemon {
        until("vmkeepd to answer", || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("vmkeepd ended: {status}\n{}", self.log());
            }
            self.is_ready(to).then_some(())
        });
        daemon
    }

    fn log_path(&self) -> PathBuf {
        self.hypervisor.dir().join("vmkeepd.log")
    }

    /// The last words of vmkeepd.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Runs the command line.
    pub fn vmkeep(&self, args: &[&str]) -> Output {
        self.hypervisor.command(self.program("vmkeep")).args(args).output().expect("vmkeep starts")
    }

    /// Runs the command line with a place at which it is to die; whether it did is for the caller to see.
    pub fn vmkeep_that_dies(&self, at: &str, args: &[&str]) -> Output {
        let mut command = self.hypervisor.command(self.program("vmkeep"));
        command.env("VMKEEP_CRASH_AT", at).args(args).output().expect("vmkeep starts")
    }

    /// Where restored images go by default.
    pub fn restored(&self) -> PathBuf {
        self.hypervisor.dir().join("state/vmkeep/restored")
    }

    /// Whether vmkeepd takes orders.
    pub fn ready(&self) -> bool {
        self.is_ready(&[])
    }

    /// Waits until it does.
    pub fn until_ready(&self) {
        in_time(|| self.ready().then_some(())).unwrap_or_else(|| {
            let said = self.vmkeep(&["status"]);
            panic!("vmkeepd does not become ready: {said:?}\n{}", self.log())
        });
    }

    fn is_ready(&self, to: &[&str]) -> bool {
        let output = self.vmkeep(&[to, &["--json", "status"]].concat());
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["daemon"]["phase"] == "ready"
    }

    /// Runs the command line, which must succeed; returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.vmkeep(args);
        assert!(
            output.status.success(),
            "vmkeep {args:?}: {}\n{}{}\n--- vmkeepd\n{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the command line, which must fail with this code and say all of these words; returns all it said.
    pub fn fails(&self, args: &[&str], code: i32, words: &[&str]) -> String {
        let output = self.vmkeep(args);
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(
            output.status.code(),
            Some(code),
            "vmkeep {args:?} said: {said}\n--- vmkeepd\n{}",
            self.log()
        );
        for word in words {
            assert!(said.contains(word), "vmkeep {args:?} does not say {word:?}: {said}");
        }
        said
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.ok(&all)).unwrap()
    }

    /// Asks for a job and returns its id at once.
    pub fn begin(&self, args: &[&str]) -> String {
        let mut all = args.to_vec();
        all.push("--no-wait");
        let answer = self.json(&all);
        answer["id"]
            .as_str()
            .or(answer["job"]["id"].as_str())
            .unwrap_or_else(|| panic!("{answer}"))
            .to_owned()
    }

    /// A job's row.
    pub fn job(&self, job: &str) -> Value {
        self.json(&["job", "show", job])["job"].clone()
    }

    /// The rows of all jobs, newest first.
    pub fn jobs(&self) -> Vec<Value> {
        self.json(&["jobs"]).as_array().unwrap().clone()
    }

    /// Waits until a job has ended or needs attention; returns its row.
    pub fn settled(&self, job: &str) -> Value {
        let row = self.at_rest(job);
        assert_ne!(row["status"], "needs_attention", "{row:#}\n{}", self.story(job));
        row
    }

    /// Waits until a job has ended or needs attention; returns its row.
    pub fn at_rest(&self, job: &str) -> Value {
        let rests = || {
            let row = self.job(job);
            (row["ended"].is_string() || row["status"] == "needs_attention").then_some(row)
        };
        in_time(rests).unwrap_or_else(|| panic!("the job does not come to rest\n{}", self.story(job)))
    }

    /// What a job and vmkeepd have to say for themselves, for whoever reads that a test has failed.
    pub fn story(&self, job: &str) -> String {
        let explained = self.vmkeep(&["job", "explain", job]);
        let [told, complained] =
            [&explained.stdout, &explained.stderr].map(|text| String::from_utf8_lossy(text));
        format!("{told}{complained}\n--- vmkeepd\n{}", self.log())
    }

    /// The stored events of a job.
    pub fn history(&self, job: &str) -> Vec<Value> {
        self.json(&["job", "history", job]).as_array().unwrap().clone()
    }

    /// Waits until a job's history has an event of a type about a step (an empty step: any).
    pub fn reached(&self, job: &str, kind: &str, step: &str) {
        until(&format!("{kind} {step}"), || {
            self.history(job).iter().find(|row| about(row, kind, step)).map(|_| ())
        });
    }

    /// The backups, newest first.
    pub fn backups(&self) -> Vec<Value> {
        self.json(&["list"])["backups"].as_array().unwrap().clone()
    }
}

/// Whether a row of a history is an event of that type about that step.
pub fn about(row: &Value, kind: &str, step: &str) -> bool {
    let body = &row["event"]["body"];
    body["type"] == kind && (step.is_empty() || body["data"]["step"] == step)
}

/// A running vmkeepd. Ends with kill -9 when dropped.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to end and waits; returns its exit status.
    pub fn end(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = until("vmkeepd to end", || self.child.try_wait().unwrap());
        status.code()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until it has died by its crash point; says whether it did before the condition held.
    pub fn dies_or(&mut self, mut otherwise: impl FnMut() -> bool) -> bool {
        until("vmkeepd to die at its crash point, or the job to end", || {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(status.signal(), Some(9), "it was to die by a crash point: {status}");
                return Some(true);
            }
            otherwise().then_some(false)
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Puts a program where the hypervisor's user can run it. Copies for each host would be 100 MB to write, at the expense of
/// what the tests wait to be flushed; so it is the same file if that will do.
fn place(built: &Path, at: &Path) -> std::io::Result<()> {
    if fs::metadata(built)?.permissions().mode() & 0o005 == 0o005 && fs::hard_link(built, at).is_ok() {
        return Ok(());
    }
    fs::copy(built, at)?;
    fs::set_permissions(at, fs::Permissions::from_mode(0o755))
}

/// A program that was built with the tests.
pub fn built(name: &str) -> PathBuf {
    // target/debug/deps/test-hash → target/debug/name
    let here = std::env::current_exe().unwrap();
    here.parent().and_then(Path::parent).unwrap().join(name)
}

/// The files of a guest's disks, as all three who have an opinion name them.
pub fn disks(guest: &Guest) -> BTreeMap<String, PathBuf> {
    guest.hypervisor().disk_files_in_inactive_xml(guest.uuid()).unwrap()
}

/// After a job: the guest runs on its own files, by everybody's account; nothing of the job is left beside them.
pub fn assert_untouched(guest: &Guest, own: &BTreeMap<String, PathBuf>) {
    let state = guest.state().unwrap();
    assert_eq!(state.state, "running", "{state:?}");
    guest.wait_more(3).expect("the guest goes on ticking");
    assert_home(guest, own);
}

/// After a job: the domain, running or not, is on its own files, by everybody's account, and nothing of the job is left.
pub fn assert_home(guest: &Guest, own: &BTreeMap<String, PathBuf>) {
    let hypervisor = guest.hypervisor();
    if guest.state().unwrap().state != "shut off" {
        let qemu: BTreeMap<String, PathBuf> = hypervisor
            .disk_files_in_qemu(guest.uuid())
            .unwrap()
            .into_iter()
            .map(|(disk, at)| (disk, at.file))
            .collect();
        assert_eq!(&qemu, own, "the files that QEMU writes to");
        assert_eq!(&hypervisor.disk_files_in_live_xml(guest.uuid()).unwrap(), own, "the live definition");
        let held: Vec<_> = hypervisor
            .files_held_by_qemu(guest.name())
            .unwrap()
            .into_iter()
            .filter(|path| path.to_string_lossy().contains("vmkeep-"))
            .collect();
        assert!(held.is_empty(), "held open by QEMU: {held:?}");
    }
    assert_eq!(
        &hypervisor.disk_files_in_inactive_xml(guest.uuid()).unwrap(),
        own,
        "the persistent definition"
    );
    assert!(guest.console().lost().is_empty(), "flushed writes were lost: {:?}", guest.console().lost());
    for which in [&[][..], &["--inactive"]] {
        let xml = guest.virsh("dumpxml", which).unwrap();
        assert!(!xml.contains("<vmkeep:"), "a marker is left in the definition");
    }
    let left: Vec<_> = files_below(&hypervisor.images())
        .into_iter()
        .filter(|path| path.to_string_lossy().contains("vmkeep-"))
        .collect();
    assert!(left.is_empty(), "left beside the images: {left:?}");
}

/// All files below a folder.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    files
}

/// The ticks on two images that must belong together.
pub fn assert_ticks(first: &Path, second: &Path) -> [TickReport; 2] {
    let reports = [first, second].map(|image| ticks_on(image, Format::probe(image).unwrap()).unwrap());
    assert_consistent(&reports[0], &reports[1]);
    reports
}

/// Runs a program, which must succeed; returns what it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
