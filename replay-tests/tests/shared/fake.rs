//! The bench on the hypervisor that exists only here.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use vmkeep_steps::hypervisor::fake::{Client, Fake};
use vmkeep_steps::hypervisor::{DomainRef, Hypervisor, Layer, Storage};
use vmkeep_steps::simulation::{Order, Place, Witness};

use super::bench::{Bench, Held, until};

/// Lets everything happen.
struct Nobody;

impl Witness for Nobody {
    fn at(&self, _: &Place) -> Order {
        Order::Go
    }
}

pub struct OnFake {
    pub world: Fake,
    client: Client,
    folder: PathBuf,
    number: AtomicU32,
}

impl OnFake {
    /// A world in this folder. Within a runtime.
    pub fn new(folder: &std::path::Path) -> Self {
        let world = Fake::new(folder).unwrap();
        let client = world.client(Arc::new(Nobody));
        Self { client, folder: folder.join("images"), world, number: AtomicU32::new(0) }
    }

    fn add(&self) -> DomainRef {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let name = format!("machine{number}");
        let id = 0x1111_0000_0000_4000_8000_0000_0000_0000 + u128::from(number);
        self.world.add_domain(&name, id, &["qcow2", "raw"]).unwrap()
    }
}

/// A helper's image, until it is dropped.
struct Open(Fake, PathBuf);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.helper_closes(&self.1);
    }
}

#[async_trait]
impl Bench for OnFake {
    fn hypervisor(&self) -> &dyn Hypervisor {
        &self.client
    }

    fn storage(&self) -> &dyn Storage {
        &self.client
    }

    fn folder(&self) -> PathBuf {
        self.folder.clone()
    }

    async fn domain(&self) -> DomainRef {
        self.add()
    }

    async fn guest(&self, agent: bool) -> DomainRef {
        let domain = self.add();
        if agent {
            self.world.gets_agent(&domain.id);
        }
        domain
    }

    async fn ticks(&self, domain: &DomainRef) -> u64 {
        let (began, boot) = self.world.guest_ticks(&domain.id).expect("it runs");
        until("the guest to write", || async {
            self.world.pass();
            self.world.guest_ticks(&domain.id).filter(|(now, _)| *now > began).map(|_| boot)
        })
        .await
    }

    async fn write(&self, domain: &DomainRef, target: &str, byte: u8) {
        self.world.guest_writes(&domain.id, &target.into(), super::bench::PLACE, byte).unwrap();
    }

    async fn write_much(&self, domain: &DomainRef, target: &str, byte: u8) {
        self.write(domain, target, byte).await;
    }

    async fn hold(&self, image: &Layer) -> Held {
        self.world.helper_opens(&image.path);
        Box::new(Open(self.world.clone(), image.path.clone()))
    }

    async fn hold_to_read(&self, image: &Layer) -> Held {
        self.hold(image).await
    }

    fn altered(&self, xml: &str) -> String {
        assert!(xml.contains("\"agent\":false"));
        xml.replace("\"agent\":false", "\"agent\":true")
    }

    async fn kill_qemu(&self, domain: &DomainRef) {
        self.world.qemu_dies(&domain.id);
    }

    async fn restart_libvirtd(&self) {
        self.world.libvirtd_dies();
    }

    async fn managed_save(&self, domain: &DomainRef) {
        self.world.operator_saves(&domain.id).unwrap();
    }

    async fn undefine(&self, domain: &DomainRef) {
        self.world.operator_undefines(&domain.id);
    }
}
