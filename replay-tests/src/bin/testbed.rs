//! The test bed at the command line: a private, unprivileged hypervisor with small guests, for scripts and for
//! trying things out by hand.
//!
//! What `up` starts stays, known by its folder alone, until `down`: any process can go on with it.

use clap::{Args, Parser, Subcommand};
use replay_tests::testbed::{
    DiskSpec, Error, Format, Guest, GuestSpec, Hypervisor, MIB, Options, Result, consistency, image_info,
    images_equal, leftovers, ticks_on,
};
use std::{
    ffi::OsString,
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

/// A private hypervisor with small real guests. Touches no virtual machine of this host.
#[derive(Parser)]
#[command(name = "testbed", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start a hypervisor in DIR (new or empty, path of at most 24 bytes), with guests if any are named
    Up {
        dir: PathBuf,
        #[command(flatten)]
        guests: Guests,
    },
    /// Add a guest to a running hypervisor, and boot it
    Guest {
        dir: PathBuf,
        #[command(flatten)]
        guests: Guests,
    },
    /// End all processes of the hypervisor and remove DIR
    Down { dir: PathBuf },
    /// End the test beds in /tmp whose owner was killed
    Sweep,
    /// What runs in DIR
    Status { dir: PathBuf },
    /// Print the environment of the hypervisor as shell exports
    Env { dir: PathBuf },
    /// Become COMMAND: as the hypervisor's user and in its environment
    Exec {
        dir: PathBuf,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Send a command line to a guest and print its answer (`send DIR GUEST help` lists the commands)
    Send {
        dir: PathBuf,
        guest: String,
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Print the last tick of a guest
    Last { dir: PathBuf, guest: String },
    /// Wait until a guest has printed tick NUMBER, or, with --more, NUMBER more ticks; print the last one
    Wait {
        dir: PathBuf,
        guest: String,
        number: u64,
        #[arg(long)]
        more: bool,
    },
    /// Run COMMAND (as the hypervisor's user) and print the guest's longest tick gap meanwhile to standard error
    Gap {
        dir: PathBuf,
        guest: String,
        /// Also write it to this file, as JSON
        #[arg(long)]
        json: Option<PathBuf>,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Check the ticks on images, and the images against each other: a guest's disks in their order.
    /// Exit status 1: defects
    Ticks {
        #[arg(required = true)]
        images: Vec<PathBuf>,
        #[arg(long)]
        json: bool,
        /// Fail unless each image ends at this tick or later
        #[arg(long, value_name = "TICK")]
        at_least: Option<u64>,
    },
    /// Compare two images byte for byte, sizes included. Exit status 1: they differ
    Compare { a: PathBuf, b: PathBuf },
    /// kill -9: `libvirtd`, `virtlogd`, or the QEMU of a guest
    Kill {
        dir: PathBuf,
        what: String,
        /// With `qemu`: of which guest
        guest: Option<String>,
    },
    /// Start libvirtd again after it was killed
    Libvirtd { dir: PathBuf },
}

#[derive(Args)]
struct Guests {
    /// Name of a guest to boot; may be repeated
    #[arg(long = "guest", value_name = "NAME")]
    names: Vec<String>,
    /// A disk of each guest: words with commas between: qcow2 or raw, a size (64M), data=SIZE, chain=DEPTH,
    /// plain, ext4. Default: one of "qcow2,64M" and one of "raw,64M"
    #[arg(long = "disk", value_name = "SPEC", value_parser = parse_disk)]
    disks: Vec<DiskSpec>,
    /// Memory of each guest in MiB
    #[arg(long, default_value_t = 128)]
    memory: u64,
    /// Ticks a second (0: as many as it can)
    #[arg(long, default_value_t = 20)]
    rate: u64,
    /// With the guest agent
    #[arg(long)]
    agent: bool,
}

impl Guests {
    fn boot(&self, hypervisor: &Hypervisor) -> Result<()> {
        for name in &self.names {
            let mut spec =
                if self.disks.is_empty() { GuestSpec::two_disks(name) } else { GuestSpec::new(name) };
            spec = self.disks.iter().cloned().fold(spec, GuestSpec::disk);
            spec = spec.memory_mib(self.memory).rate(self.rate);
            if self.agent {
                spec = spec.agent();
            }
            let guest = Guest::boot(hypervisor, &spec)?;
            println!("{name}: up, serial file {}", guest.console().path().display());
        }
        Ok(())
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) => (digits, text.chars().last()),
        None => (text, None),
    };
    let unit = match unit {
        Some('K') => 1024,
        Some('M') => MIB,
        Some(_) => 1024 * MIB,
        None => 1,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

fn parse_disk(text: &str) -> std::result::Result<DiskSpec, String> {
    let words: Vec<&str> = text.split(',').collect();
    let size = words.iter().find_map(|word| parse_size(word)).unwrap_or(64 * MIB);
    words.iter().try_fold(DiskSpec::new(size), |disk, word| {
        Ok(match (*word, word.split_once('=')) {
            ("qcow2", _) => disk,
            ("raw", _) => disk.raw(),
            ("plain", _) => disk.plain(),
            ("ext4", _) => disk.ext4(),
            (_, Some(("data", bytes))) => disk.data(parse_size(bytes).ok_or("data=SIZE")?),
            (_, Some(("chain", depth))) => disk.chain(depth.parse().map_err(|_| "chain=DEPTH")?),
            (word, _) if parse_size(word).is_some() => disk,
            (word, _) => return Err(format!("{word:?} is not understood")),
        })
    })
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("testbed: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up { dir, guests } => {
            let hypervisor = Hypervisor::start_with(&dir, &Options { keep: true, ..Options::default() })?;
            if let Err(error) = guests.boot(&hypervisor) {
                hypervisor.stop()?; // half a test bed is of no use, and nobody would end it
                return Err(error);
            }
        }
        Verb::Guest { dir, guests } => guests.boot(&Hypervisor::attach(&dir)?)?,
        Verb::Down { dir } => {
            Hypervisor::attach(&dir)?.stop()?;
            let left = leftovers(&dir);
            left.iter().for_each(|what| eprintln!("left: {what}"));
            return Ok(verdict(left.is_empty()));
        }
        Verb::Sweep => Hypervisor::sweep()?.iter().for_each(|dir| println!("ended {}", dir.display())),
        Verb::Status { dir } => status(&Hypervisor::attach(&dir)?)?,
        Verb::Env { dir } => {
            let hypervisor = Hypervisor::attach(&dir)?;
            let mut env = hypervisor.env();
            // For root "qemu:///session" is the host's own daemon.
            env.insert("LIBVIRT_DEFAULT_URI".to_owned(), hypervisor.socket_uri());
            for (name, value) in env {
                println!("export {name}='{}'", value.replace('\'', "'\\''"));
            }
        }
        Verb::Exec { dir, command } => {
            let [program, args @ ..] = &command[..] else { return Ok(ExitCode::FAILURE) };
            let mut command = Hypervisor::attach(&dir)?.command(program);
            // The same process goes on, so whoever started it may signal it.
            let source = command.args(args).stdin(std::process::Stdio::inherit()).exec();
            return Err(Error::Spawn { program: program.to_string_lossy().into_owned(), source });
        }
        Verb::Send { dir, guest, command } => println!("{}", attach(&dir, &guest)?.send(&command.join(" "))?),
        Verb::Last { dir, guest } => println!("{}", attach(&dir, &guest)?.last_tick()),
        Verb::Wait { dir, guest, number, more } => {
            let guest = attach(&dir, &guest)?;
            if more {
                guest.wait_more(number)?;
            } else {
                guest.wait_tick(number)?;
            }
            println!("{}", guest.last_tick());
        }
        Verb::Gap { dir, guest, json, command } => {
            return gap(&attach(&dir, &guest)?, json.as_deref(), &command);
        }
        Verb::Ticks { images, json, at_least } => return ticks(&images, json, at_least),
        Verb::Compare { a, b } => {
            let answer = images_equal(&a, &b)?;
            println!("{}", answer.as_ref().err().map_or("equal", String::as_str));
            return Ok(verdict(answer.is_ok()));
        }
        Verb::Kill { dir, what, guest } => {
            let hypervisor = Hypervisor::attach(&dir)?;
            match (what.as_str(), guest) {
                ("libvirtd", None) => hypervisor.kill_libvirtd()?,
                ("virtlogd", None) => hypervisor.kill_virtlogd()?,
                ("qemu", Some(guest)) => hypervisor.kill_qemu(&guest)?,
                _ => return Err(Error::Missing { what: format!("process {what:?} to kill") }),
            }
        }
        Verb::Libvirtd { dir } => drop(Hypervisor::attach(&dir)?.start_libvirtd()?),
    }
    Ok(ExitCode::SUCCESS)
}

fn verdict(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn attach(dir: &Path, guest: &str) -> Result<Guest> {
    Guest::attach(&Hypervisor::attach(dir)?, guest)
}

fn status(hypervisor: &Hypervisor) -> Result<()> {
    println!("folder  {}", hypervisor.dir().display());
    println!("user    {}", hypervisor.user().name);
    println!("uri     {}", hypervisor.socket_uri());
    for process in hypervisor.processes() {
        let domain = process.qemu_domain().map(|name| format!(" of {name:?}")).unwrap_or_default();
        println!("process {} {:?}{domain}", process.id.pid, process.role);
    }
    for name in hypervisor.domains()? {
        let state = hypervisor.domain_state(&name)?;
        let tick = Guest::attach(hypervisor, &name).map_or(0, |guest| guest.last_tick());
        println!("domain  {name:?}: {} ({}), tick {tick}", state.state, state.reason);
        for (target, file) in hypervisor.disk_files_in_inactive_xml(&name)? {
            println!("        {target} {}", file.display());
        }
    }
    Ok(())
}

fn gap(guest: &Guest, json: Option<&Path>, command: &[OsString]) -> Result<ExitCode> {
    let [program, args @ ..] = command else { return Ok(ExitCode::FAILURE) };
    // Ticks around the command belong to it: a pause may begin with its first act and end after its last.
    let from = guest.wait_more(2)?;
    let ended = guest.hypervisor().command(program).args(args).status();
    let status =
        ended.map_err(|source| Error::Spawn { program: program.to_string_lossy().into(), source })?;
    let (now, grace) = (guest.last_tick(), Duration::from_secs(10));
    // A guest that is left standing has no next tick: then the gap so far is all there is.
    let next = guest.console().wait(grace, "a tick after the command", |ticks, _| {
        ticks.last().filter(|tick| tick.number > now).map(|tick| tick.number)
    });
    let mut longest = guest.longest_gap(from).unwrap_or_default();
    if next.is_err()
        && let Some(seen) = guest.console().last().and_then(|tick| tick.seen)
    {
        longest.host = longest.host.max(seen.elapsed());
    }
    eprintln!(
        "longest tick gap: {:.1} ms on the host's clock, {:.1} ms on the guest's, before tick {}{}",
        longest.host.as_secs_f64() * 1e3,
        longest.guest.as_secs_f64() * 1e3,
        longest.tick,
        if next.is_ok() { "" } else { "; the guest has not ticked since" }
    );
    if let Some(path) = json {
        let value = serde_json::json!({
            "host_ms": longest.host.as_secs_f64() * 1e3,
            "guest_ms": longest.guest.as_secs_f64() * 1e3,
            "before_tick": longest.tick,
            "first_tick": from,
            "last_tick": guest.last_tick(),
            "ticking": next.is_ok(),
        });
        std::fs::write(path, format!("{value}\n")).map_err(|source| Error::Io {
            doing: "write",
            path: path.to_owned(),
            source,
        })?;
    }
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
}

fn ticks(images: &[PathBuf], json: bool, at_least: Option<u64>) -> Result<ExitCode> {
    let mut good = true;
    let mut reports = Vec::new();
    for image in images {
        let format = if image_info(image)?.format == "qcow2" { Format::Qcow2 } else { Format::Raw };
        let report = ticks_on(image, format)?;
        good &= report.is_whole() && at_least.is_none_or(|tick| report.last >= tick);
        if !json {
            println!("{}: {report}", image.display());
        }
        reports.push(report);
    }
    for (pair, paths) in reports.windows(2).zip(images.windows(2)) {
        if let [first, second] = pair
            && let Err(why) = consistency(first, second)
        {
            good = false;
            eprintln!("{} and {}: {why}", paths[0].display(), paths[1].display());
        }
    }
    if json {
        let text = serde_json::to_string_pretty(&reports)
            .map_err(|e| Error::Unclear { what: "the report".into(), answer: e.to_string() })?;
        println!("{text}");
    }
    std::io::stdout().flush().map_err(|source| Error::Io { doing: "write", path: "-".into(), source })?;
    Ok(verdict(good))
}
