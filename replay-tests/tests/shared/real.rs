//! The bench on a libvirt and QEMU of its own.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, Hypervisor as Testbed, MIB};
use tokio::task::block_in_place;
use vmkeep_host::hypervisor::Libvirt;
use vmkeep_steps::hypervisor::{DomainId, DomainRef, Hypervisor, Layer, LocalStorage, Storage};

use super::bench::{Bench, Held, PLACE, until};

/// For one behaviour: its domains are its own, the hypervisor is that of all.
pub struct OnLibvirt {
    testbed: Testbed,
    libvirt: Libvirt,
    storage: LocalStorage,
    made: Mutex<Vec<String>>,
}

/// How many domains there have been.
static NUMBER: AtomicU32 = AtomicU32::new(0);

impl OnLibvirt {
    pub fn on(testbed: Testbed) -> Self {
        let libvirt = Libvirt::start(testbed.uri()).unwrap();
        Self { testbed, libvirt, storage: LocalStorage::default(), made: Mutex::default() }
    }

    /// For the next one, by the same connection.
    pub fn anew(&self) -> Self {
        Self {
            testbed: self.testbed.clone(),
            libvirt: self.libvirt.clone(),
            storage: LocalStorage::default(),
            made: Mutex::default(),
        }
    }

    fn name(&self) -> String {
        let name = format!("machine{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.made.lock().unwrap().push(name.clone());
        name
    }

    /// Ends what a behaviour has left running: others need the processors.
    pub fn tidy(&self) {
        for name in self.made.lock().unwrap().drain(..) {
            let _ = block_in_place(|| self.testbed.virsh(["destroy", "--domain", &name]));
        }
    }

    fn virsh(&self, args: &[&str]) -> String {
        block_in_place(|| self.testbed.virsh(args)).unwrap()
    }

    /// A program that has an image open.
    fn open(&self, image: &Layer, options: &[&str]) -> Held {
        let mut command = self.testbed.command("qemu-io");
        command
            .args(options)
            .args(["-f", &image.format])
            .arg(&image.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut holder = command.spawn().unwrap();
        // Its prompt tells that the image is open.
        let mut prompt = [0; 1];
        let prompted =
            block_in_place(|| std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut prompt));
        prompted.unwrap();
        Box::new(Open(holder))
    }

    /// A write of the guest's device, whatever the guest itself does.
    fn fill(&self, domain: &DomainRef, target: &str, byte: u8, length: &str) {
        let number = target.bytes().last().unwrap() - b'a';
        let device = format!("/machine/peripheral/virtio-disk{number}/virtio-backend");
        for command in [format!("write -P {byte} {PLACE} {length}"), "flush".to_owned()] {
            let hmp = format!("qemu-io -d {device} \"{command}\"");
            self.virsh(&["qemu-monitor-command", "--hmp", "--domain", &domain.id.to_string(), &hmp]);
        }
    }

    pub async fn connected(&self) {
        until("the connection", || async { self.libvirt.domains().await.ok() }).await;
    }
}

/// A process that has an image open, until it is dropped.
struct Open(Child);

impl Drop for Open {
    fn drop(&mut self) {
        // Its input ends, and with that it closes the image and ends.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[async_trait]
impl Bench for OnLibvirt {
    fn hypervisor(&self) -> &dyn Hypervisor {
        &self.libvirt
    }

    fn storage(&self) -> &dyn Storage {
        &self.storage
    }

    fn folder(&self) -> PathBuf {
        self.testbed.images()
    }

    async fn domain(&self) -> DomainRef {
        let (name, id) = (self.name(), uuid::Uuid::new_v4());
        let mut disks = String::new();
        for (target, format) in [("vda", "qcow2"), ("vdb", "raw")] {
            let path = self.folder().join(format!("{name}-{target}.{format}"));
            let path = path.to_str().unwrap();
            let create = ["create", "-q", "-f", format, path, "64M"];
            block_in_place(|| self.testbed.run("qemu-img", create)).unwrap();
            disks.push_str(&format!(
                "<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>\
                 <target dev='{target}' bus='virtio'/></disk>"
            ));
        }
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid><memory unit='MiB'>32</memory>\
             <vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
             <devices>{disks}<controller type='usb' model='none'/><interface type='user'>\
             <model type='virtio'/><rom enabled='no'/></interface><memballoon model='none'/></devices></domain>"
        );
        self.libvirt.define_new(&xml).await.unwrap();
        DomainRef { id: DomainId(id), name }
    }

    async fn guest(&self, agent: bool) -> DomainRef {
        let name = self.name();
        let spec = GuestSpec::new(&name).disk(DiskSpec::new(16 * MIB));
        let spec = match agent {
            true => spec.disk(DiskSpec::new(32 * MIB).raw().ext4()).agent(),
            false => spec.disk(DiskSpec::new(16 * MIB).raw()),
        };
        let guest = block_in_place(|| Guest::define(&self.testbed, &spec)).unwrap();
        DomainRef { id: DomainId(guest.uuid().parse().unwrap()), name }
    }

    async fn ticks(&self, domain: &DomainRef) -> u64 {
        block_in_place(|| {
            let guest = Guest::attach(&self.testbed, &domain.name).unwrap();
            guest.wait_more(3).unwrap();
            guest.boot_id().unwrap()
        })
    }

    async fn write(&self, domain: &DomainRef, target: &str, byte: u8) {
        self.fill(domain, target, byte, "64k");
    }

    async fn write_much(&self, domain: &DomainRef, target: &str, byte: u8) {
        self.fill(domain, target, byte, "40M");
    }

    async fn hold(&self, image: &Layer) -> Held {
        self.open(image, &[])
    }

    async fn hold_to_read(&self, image: &Layer) -> Held {
        self.open(image, &["-r"])
    }

    fn altered(&self, xml: &str) -> String {
        assert!(xml.contains("<vcpu placement='static'>1</vcpu>"));
        xml.replace("<vcpu placement='static'>1</vcpu>", "<vcpu placement='static'>2</vcpu>")
    }

    async fn kill_qemu(&self, domain: &DomainRef) {
        block_in_place(|| self.testbed.kill_qemu(&domain.name)).unwrap();
        // libvirt hears of it a little later.
        until("libvirt to see that QEMU is gone", || async {
            (!self.libvirt.state(&domain.id).await.unwrap().is_active()).then_some(())
        })
        .await;
    }

    async fn restart_libvirtd(&self) {
        block_in_place(|| self.testbed.restart_libvirtd()).unwrap();
        self.connected().await;
    }

    async fn managed_save(&self, domain: &DomainRef) {
        self.virsh(&["managedsave", "--domain", &domain.id.to_string()]);
    }

    async fn undefine(&self, domain: &DomainRef) {
        self.virsh(&["undefine", "--domain", &domain.id.to_string()]);
    }
}
