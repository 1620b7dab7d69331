//! A guest: defined, booted, spoken to.

use super::{
    channel::ask,
    console::{Console, Gap},
    error::{Error, IoContext, Result},
    hypervisor::Hypervisor,
    observe::{DomainState, parse_xml},
    process::until,
    spec::GuestSpec,
};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Boots take 3 s on an idle machine; tests share theirs with builds and with other guests under emulation.
const BOOT: Duration = Duration::from_secs(120);
const ANSWER: Duration = Duration::from_secs(120);

/// A domain of a test hypervisor. Dropping it does not end the domain; the hypervisor's end does.
#[derive(Debug)]
pub struct Guest {
    hypervisor: Hypervisor,
    name: String,
    uuid: String,
    console: Console,
}

/// Whether a line says that a guest has booted. A QEMU that is killed leaves the line that was being written unfinished, and
/// the next boot goes on in it.
fn is_up(line: &str) -> bool {
    line.contains("up boot ")
}

impl Guest {
    /// Makes the disks and defines the domain, but does not start it.
    pub fn define(hypervisor: &Hypervisor, spec: &GuestSpec) -> Result<Self> {
        let xml = spec.build(hypervisor)?;
        let file = hypervisor.dir().join("state").join(format!("{}.xml", spec.slug()));
        fs::write(&file, xml).doing("write", &file)?;
        hypervisor.give_to_user(&file, 0)?;
        hypervisor.virsh(["define", "--file", &file.to_string_lossy()])?;
        Self::attach(hypervisor, spec.name())
    }

    /// [`Guest::define`], start, and wait until it is up.
    pub fn boot(hypervisor: &Hypervisor, spec: &GuestSpec) -> Result<Self> {
        let guest = Self::define(hypervisor, spec)?;
        guest.start()?;
        Ok(guest)
    }

    /// A domain that exists already, by name, for example a restored one. Its serial file is the one that its
    /// definition names.
    pub fn attach(hypervisor: &Hypervisor, name: &str) -> Result<Self> {
        let uuid = hypervisor.virsh(["domuuid", "--domain", name])?;
        let xml = hypervisor.virsh(["dumpxml", "--domain", &uuid])?;
        let document = parse_xml(&xml)?;
        let serial = document
            .descendants()
            .filter(|node| node.has_tag_name("serial"))
            .filter_map(|node| node.children().find(|c| c.has_tag_name("source"))?.attribute("path"))
            .next()
            .ok_or_else(|| Error::Missing { what: format!("serial file of {name:?}") })?;
        let console = Console::open(Path::new(serial))?;
        Ok(Self { hypervisor: hypervisor.clone(), name: name.to_owned(), uuid, console })
    }

    /// Name of the domain.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// UUID of the domain.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Its hypervisor.
    pub fn hypervisor(&self) -> &Hypervisor {
        &self.hypervisor
    }

    /// Its serial file.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Runs `virsh COMMAND --domain UUID ARGUMENT…`.
    pub fn virsh(&self, command: &str, args: &[&str]) -> Result<String> {
        let args = [command, "--domain", &self.uuid].into_iter().chain(args.iter().copied());
        self.hypervisor.virsh(args)
    }

    /// State of the domain.
    pub fn state(&self) -> Result<DomainState> {
        self.hypervisor.domain_state(&self.uuid)
    }

    /// Starts it and waits until it is up.
    pub fn start(&self) -> Result<()> {
        let boots = self.boots();
        self.virsh("start", &[])?;
        self.wait_up(boots)
    }

    /// How many times it has said that it is up.
    pub fn boots(&self) -> usize {
        self.console.other_lines().iter().filter(|line| is_up(line)).count()
    }

    /// Waits for one more boot than `boots`. A guest that refuses its disks is an error at once.
    pub fn wait_up(&self, boots: usize) -> Result<()> {
        let verdict = self.console.wait(BOOT, "the guest to be up", |_, other| {
            let ups: Vec<usize> =
                other.iter().enumerate().filter(|(_, l)| is_up(l)).map(|(at, _)| at).collect();
            let last = ups.get(boots..)?.last()?;
            // It refuses before it is up, and whatever the kernel says comes in between.
            let before = ups.len().checked_sub(2).map_or(0, |at| ups[at]);
            let refused = other[before..*last].iter().find(|line| line.starts_with("refused"));
            let panicked = other[*last..].iter().find(|line| line.contains("Kernel panic"));
            Some(refused.or(panicked).map_or(Ok(()), |line| Err(line.clone())))
        })?;
        verdict.map_err(|answer| Error::Refused { command: "boot".into(), answer })
    }

    /// Ends QEMU at once, as a power cut would.
    pub fn destroy(&self) -> Result<()> {
        self.virsh("destroy", &[]).map(drop)
    }

    /// Presses the power button and waits until the domain is off. libvirt refuses as long as somebody has the guest stopped:
    /// it is pressed again then.
    pub fn shutdown(&self) -> Result<()> {
        let what = || format!("{:?} to take the power button", self.name);
        until(Duration::from_secs(60), what, || {
            self.virsh("shutdown", &["--mode", "acpi"]).map(drop).map_err(|e| e.to_string())
        })?;
        self.wait_state("shut off")
    }

    /// Waits until the domain is in a state, as `virsh domstate` spells it.
    pub fn wait_state(&self, state: &str) -> Result<()> {
        let what = || format!("{:?} to be {state}", self.name);
        until(Duration::from_secs(60), what, || match self.state() {
            Ok(seen) if seen.state == state => Ok(()),
            other => Err(format!("{other:?}")),
        })
    }

    /// Sends a command line to the guest and returns its answer. Commands: `ping`, `info`,
    /// `stop-ticks`, `start-ticks RATE`, `fill|check DISK OFFSET LENGTH SEED`, `checksum|zero|discard DISK OFFSET
    /// LENGTH`, `mem MIB RATE` (goes on dirtying memory; `mem 0` ends it), `hold MIB SEED` and `held` (keeps and
    /// proves a pattern in memory), `load DISK OFFSET LENGTH MIB_PER_S` (goes on writing; `load stop`), `fs` (count
    /// of writes to the mounted disk), `sh COMMAND`, `reboot`, `poweroff`, `panic`.
    /// Sizes may end in K, M or G.
    pub fn send(&self, command: &str) -> Result<String> {
        ask(&self.channel()?, command, ANSWER)
    }

    /// The socket of the command channel; libvirt chooses another path at each start.
    fn channel(&self) -> Result<PathBuf> {
        let xml = self.virsh("dumpxml", &[])?;
        let document = parse_xml(&xml)?;
        let path = document.descendants().filter(|n| n.has_tag_name("channel")).find_map(|channel| {
            let child = |name: &str| channel.children().find(|c| c.has_tag_name(name));
            (child("target")?.attribute("name") == Some("org.vmkeep.testbed.0"))
                .then(|| child("source")?.attribute("path").map(PathBuf::from))?
        });
        path.ok_or_else(|| Error::Missing {
            what: format!("command channel of {:?}: is it running?", self.name),
        })
    }

    /// Number of the last tick printed, 0 before the first.
    pub fn last_tick(&self) -> u64 {
        self.console.last().map_or(0, |tick| tick.number)
    }

    /// Waits until tick `number` has been printed.
    pub fn wait_tick(&self, number: u64) -> Result<()> {
        self.console.wait(BOOT, &format!("tick {number}"), |ticks, _| {
            ticks.iter().rev().take(64).any(|t| t.number >= number).then_some(())
        })
    }

    /// Waits for `more` ticks beyond the last one; returns the number of the last one then.
    pub fn wait_more(&self, more: u64) -> Result<u64> {
        let goal = self.console.ticks().len() as u64 + more;
        self.console.wait(BOOT, &format!("{more} more ticks"), |ticks, _| {
            (ticks.len() as u64 >= goal).then(|| ticks.last().map_or(0, |t| t.number))
        })
    }

    /// Identity of the running boot: it survives a restore with memory, and nothing else.
    pub fn boot_id(&self) -> Option<u64> {
        self.console.last().map(|tick| tick.boot)
    }

    /// The longest time between two ticks from tick `from` on.
    pub fn longest_gap(&self, from: u64) -> Option<Gap> {
        self.console.longest_gap(from, u64::MAX)
    }

    /// Path of a disk's image by its target (`vda`), as the persistent definition names it.
    pub fn disk(&self, target: &str) -> Result<PathBuf> {
        let disks = self.hypervisor.disk_files_in_inactive_xml(&self.uuid)?;
        disks
            .get(target)
            .cloned()
            .ok_or_else(|| Error::Missing { what: format!("disk {target} of {:?}", self.name) })
    }
}
