//! Which processes and programs execute our calls.
//!
//! libvirt asks QEMU for its version and abilities when they are first needed after its own start, which takes seconds on
//! some hosts, and on a host with a broken KVM it does so at every call. So they are asked for in the background as soon
//! as there is a connection, and remembered for that connection.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmkeep_libvirt::{Status, Version};
use vmkeep_steps::hypervisor::HvResult;

use super::{Libvirt, calls};

/// How long an answer is believed: QEMU may be upgraded under a libvirtd that goes on.
const BELIEVED: Duration = Duration::from_secs(600);

/// What was answered last.
#[derive(Clone, Debug, Default)]
pub(super) struct Versions {
    known: Arc<Mutex<Option<Known>>>,
    /// One question at a time: whoever comes second hears the same answer.
    asking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Debug)]
struct Known {
    generation: u64,
    at: Instant,
    libvirt: Version,
    qemu: Version,
}

impl Libvirt {
    fn generation(&self) -> Option<u64> {
        match self.client.status() {
            Status::Connected { generation, .. } => Some(generation),
            Status::Disconnected { .. } => None,
        }
    }

    fn known_versions(&self) -> Option<Known> {
        let generation = self.generation();
        let known = self.versions.known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        known.filter(|known| Some(known.generation) == generation)
    }

    /// Sees to it that the versions are known.
    pub(super) async fn ask_versions(&self) -> HvResult<()> {
        let fresh = || self.known_versions().is_some_and(|known| known.at.elapsed() < BELIEVED);
        if fresh() {
            return Ok(());
        }
        let _one = self.versions.asking.lock().await;
        let Some(generation) = self.generation().filter(|_| !fresh()) else { return Ok(()) };
        let (libvirt, qemu) =
            self.look("versions", |c| Ok((c.lib_version()?, c.hypervisor_version()?))).await?;
        let known = Known { generation, at: Instant::now(), libvirt, qemu };
        *self.versions.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
        Ok(())
    }

    /// The boot, the libvirtd behind the connection and, as soon as they are known, the versions. Asks nobody.
    #[must_use]
    pub fn instances(&self) -> BTreeMap<String, String> {
        let mut facts = BTreeMap::new();
        if let Some(boot) = super::this_boot() {
            facts.insert("boot".to_owned(), boot);
        }
        if let Status::Connected { instance: Some(daemon), .. } = self.client.status() {
            facts.insert("libvirtd".to_owned(), calls::instance_name(&daemon.process));
        }
        if let Some(known) = self.known_versions() {
            facts.insert("libvirt".to_owned(), known.libvirt.to_string());
            facts.insert("qemu".to_owned(), known.qemu.to_string());
        }
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn versions_are_asked_for_once_and_then_known_without_asking() {
        let libvirt = Libvirt::start("test:///default").unwrap();
        libvirt.client.connected(Duration::from_secs(60)).await.unwrap();
        assert!(libvirt.instances().contains_key("libvirtd"));
        assert!(!libvirt.instances().contains_key("qemu"), "nobody has asked yet");
        libvirt.ask_versions().await.unwrap();
        let known = libvirt.instances();
        assert!(known.contains_key("libvirt") && known.contains_key("qemu"), "{known:?}");
        let at = libvirt.known_versions().unwrap().at;
        libvirt.ask_versions().await.unwrap();
        assert_eq!(libvirt.known_versions().unwrap().at, at, "nobody was asked again");
    }
}
