//! What a behaviour is shown on: a hypervisor, and hands that do beside it what operators, guests and accidents do.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use vmkeep_steps::hypervisor::{
    Commit, Definition, DomainId, DomainRef, HvResult, Hypervisor, Layer, Marker, Observation, OverlaySpec,
    Qemu, RunState, Storage, Take, Target, Through, Trouble,
};

/// Only a fault makes a behaviour wait that long.
const LONG: Duration = Duration::from_secs(180);
/// How often somebody looks who waits.
const OFTEN: Duration = Duration::from_millis(20);

/// Something that keeps an image open, until it is dropped.
pub type Held = Box<dyn std::any::Any + Send>;

/// The hands.
#[async_trait]
pub trait Bench: Send + Sync {
    fn hypervisor(&self) -> &dyn Hypervisor;
    fn storage(&self) -> &dyn Storage;

    /// A folder for whatever files are needed, on the file system of the images.
    fn folder(&self) -> PathBuf;

    /// A new domain, which is off: a qcow2 disk `vda`, a raw one `vdb`, a network card, no agent, and nothing on the disks
    /// that could be booted. Its guest does nothing by itself but stand there.
    async fn domain(&self) -> DomainRef;

    /// A new domain whose guest boots, writes ticks to both of its disks, and remembers them. With the agent if that is asked
    /// for; then it has a file system that can be frozen.
    async fn guest(&self, agent: bool) -> DomainRef;

    /// Waits until such a guest has written more than it had, and tells which of its boots it is.
    async fn ticks(&self, domain: &DomainRef) -> u64;

    /// The guest fills a place on a disk with this byte, and flushes it.
    async fn write(&self, domain: &DomainRef, target: &str, byte: u8);

    /// The same with so much that a commit of it that is slowed down is not over soon. Whatever is in the place is of it.
    async fn write_much(&self, domain: &DomainRef, target: &str, byte: u8);

    /// Somebody reads or writes an image himself for a while.
    async fn hold(&self, image: &Layer) -> Held;

    /// Somebody reads an image, and lets nobody write to it meanwhile.
    async fn hold_to_read(&self, image: &Layer) -> Held;

    /// A definition that differs in what the machine is.
    fn altered(&self, xml: &str) -> String;

    /// `kill -9`.
    async fn kill_qemu(&self, domain: &DomainRef);

    /// `kill -9` of libvirtd, which then is there again.
    async fn restart_libvirtd(&self);

    /// `virsh managedsave`.
    async fn managed_save(&self, domain: &DomainRef);

    /// `virsh undefine`, also of a domain that runs.
    async fn undefine(&self, domain: &DomainRef);
}

/// Where [`Bench::write`] writes to.
pub const PLACE: u64 = 32 << 10;

/// Waits for a condition.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let waiting = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(OFTEN).await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.unwrap_or_else(|_| panic!("waited too long for {what}"))
}

/// The kind of trouble that a call has run into.
pub fn trouble<T: std::fmt::Debug>(outcome: HvResult<T>) -> Trouble {
    let error = outcome.expect_err("it was to be refused");
    println!("refused: {error}");
    error.trouble
}

/// The first byte of the place, as whoever opens the image with its chain reads it. Asked of QEMU's own program, beside
/// whoever writes to it.
pub fn byte_in(image: &Layer) -> u8 {
    let read = format!("read -v {PLACE} 512");
    let mut command = std::process::Command::new("qemu-io");
    let said =
        command.args(["-r", "-U", "-f", &image.format, "-c", &read]).arg(&image.path).output().unwrap();
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let line = text.lines().find(|line| line.starts_with(&format!("{PLACE:08x}:")));
    let byte = line.and_then(|line| line.split_whitespace().nth(1));
    let byte = byte.unwrap_or_else(|| panic!("{image:?}: {said:?}"));
    u8::from_str_radix(byte, 16).unwrap()
}

/// What every behaviour needs.
impl dyn Bench + '_ {
    pub async fn observe(&self, domain: &DomainRef) -> Observation {
        self.hypervisor().observe(&domain.id).await.unwrap()
    }

    pub async fn state(&self, domain: &DomainRef) -> RunState {
        self.hypervisor().state(&domain.id).await.unwrap()
    }

    pub async fn qemu(&self, domain: &DomainRef) -> Qemu {
        self.hypervisor().qemu(&domain.id).await.unwrap().expect("it has a QEMU")
    }

    pub async fn start(&self, domain: &DomainRef) {
        self.hypervisor().start(&domain.id, false).await.unwrap();
    }

    pub async fn destroy(&self, domain: &DomainRef) {
        self.hypervisor().destroy(&domain.id).await.unwrap();
    }

    /// A new domain that runs.
    pub async fn running(&self) -> DomainRef {
        let domain = self.domain().await;
        self.start(&domain).await;
        domain
    }

    /// The persistent definition.
    pub async fn definition(&self, domain: &DomainRef) -> Definition {
        self.observe(domain).await.persistent.expect("it is persistent")
    }

    /// The file of a disk, by the persistent definition.
    pub async fn own(&self, domain: &DomainRef, target: &str) -> Layer {
        layer_in(&self.definition(domain).await, target)
    }

    /// An empty overlay for a disk.
    pub async fn overlay(&self, domain: &DomainRef, target: &str) -> Layer {
        let base = self.own(domain, target).await;
        self.overlay_on(base, &format!("{}-{target}", domain.name)).await
    }

    /// An empty overlay on an image.
    pub async fn overlay_on(&self, base: Layer, name: &str) -> Layer {
        let size = self.storage().inspect(&base).await.unwrap().unwrap().virtual_size;
        let path = self.folder().join(format!("vmkeep-0123456789ab-{name}.qcow2"));
        let spec = OverlaySpec { path: path.clone(), base, virtual_size: size };
        self.storage().create_overlay(&spec).await.unwrap();
        Layer { path, format: "qcow2".to_owned() }
    }

    /// A file that is not there yet.
    pub fn file(&self, domain: &DomainRef, name: &str) -> PathBuf {
        self.folder().join(format!("{}-{name}", domain.name))
    }

    /// Moves a running domain's `vda` onto an overlay, which it returns as the commit back.
    pub async fn moved(&self, domain: &DomainRef) -> Commit {
        let base = self.own(domain, "vda").await;
        let overlay = self.overlay(domain, "vda").await;
        self.hypervisor().take(&domain.id, &disks_only(&[("vda", &overlay)])).await.unwrap();
        Commit {
            target: "vda".into(),
            overlay: overlay.path,
            base: base.path,
            through: Through::Libvirt,
            bandwidth: 0,
        }
    }

    /// Begins a commit and waits until it has caught up.
    pub async fn ready(&self, domain: &DomainRef, commit: &Commit) {
        self.hypervisor().commit_begin(&domain.id, commit).await.unwrap();
        until("the commit to be ready", || async {
            self.qemu(domain).await.job(&commit.target).is_some_and(|job| job.ready).then_some(())
        })
        .await;
    }

    /// The file that everybody says a disk is on, while it runs.
    pub async fn agreed(&self, domain: &DomainRef, target: &str) -> PathBuf {
        let seen = self.observe(domain).await;
        let target = Target::from(target);
        let live = seen.live.as_ref().and_then(|live| live.file(&target)).expect("a live definition").clone();
        let persistent = seen.persistent.as_ref().and_then(|own| own.file(&target));
        assert_eq!(Some(&live), persistent, "the persistent definition");
        assert_eq!(Some(live.as_path()), seen.qemu.as_ref().and_then(|qemu| qemu.top(&target)), "QEMU");
        live
    }
}

/// The file of a disk.
pub fn layer_in(definition: &Definition, target: &str) -> Layer {
    let disk = definition.disk(&target.into()).unwrap_or_else(|| panic!("no disk {target}"));
    let path = disk.source.image().expect("it is on a file").clone();
    Layer { path, format: disk.format.clone().expect("of a format") }
}

/// A snapshot of these disks alone.
pub fn disks_only(disks: &[(&str, &Layer)]) -> Take {
    let disks = disks.iter().map(|(target, overlay)| ((*target).into(), overlay.path.clone())).collect();
    Take { disks, memory: None }
}

/// Our note.
pub fn marker() -> Marker {
    Marker { store: "the store".to_owned(), job: "the job".to_owned(), hold: None }
}

/// A name that no domain has.
pub fn nobody() -> DomainId {
    DomainId(uuid::Uuid::from_u128(0xdead_0000_0000_4000_8000_0000_0000_0001))
}

/// Everybody says the same as before. (Of a live definition's text libvirt changes the order.)
pub fn assert_same(before: &Observation, after: &Observation) {
    let told = |seen: &Observation| seen.live.as_ref().map(|live| (live.disks.clone(), live.devices.clone()));
    assert_eq!(told(before), told(after), "the live definition");
    assert_eq!(before.persistent, after.persistent, "the persistent definition");
    assert_eq!(before.qemu, after.qemu, "QEMU");
    assert_eq!((&before.marker, &before.persistent_marker), (&after.marker, &after.persistent_marker));
    assert_eq!((before.state, before.autostart), (after.state, after.autostart));
}
