//! The hypervisor at which a domain is defined that was restored without a daemon.
//!
//! Its UUID was made for this restore and stands in the folder's note: a domain that bears it is this one, whoever defined it.
//! An existing definition is never replaced.

use std::time::Duration;

use vmkeep_steps::hypervisor::{DomainId, DomainRef, HvError, Hypervisor as _, Trouble};
use vmkeep_steps::restore::from_vault::apart::write_tpm;
use vmkeep_workflow::Fault;

use crate::codes;
use crate::config::check_uri;
use crate::hypervisor::Libvirt;

const DOING: &str = "define the domain";
/// As long as commands wait for a libvirtd that is being restarted.
const PATIENCE: Duration = Duration::from_secs(20);

/// A hypervisor that answers.
pub(super) struct Hypervisor {
    libvirt: Libvirt,
    uri: String,
}

impl Hypervisor {
    pub(super) async fn connect(uri: &str) -> Result<Self, Fault> {
        check_uri(uri)?;
        let unusable = |error: HvError| error.fault(codes::UNSUPPORTED_CONFIGURATION_PARAMETER, DOING, uri);
        let libvirt = Libvirt::start(uri).map_err(unusable)?;
        // Why there is none is said by what is asked next.
        drop(libvirt.client().connected(PATIENCE).await);
        libvirt.reachable().map_err(unusable)?;
        Ok(Self { libvirt, uri: uri.to_owned() })
    }

    fn fault(&self, error: HvError) -> Fault {
        let object = self.uri.as_str();
        error.fault(codes::CANNOT_DEFINE_MACHINE, DOING, object)
    }

    /// Whether another domain has this name.
    pub(super) async fn refuse_taken(&self, domain: &DomainRef) -> Result<(), Fault> {
        let all = self.libvirt.domains().await.map_err(|error| self.fault(error))?;
        match all.iter().find(|other| other.name == domain.name && other.id != domain.id) {
            None => Ok(()),
            Some(other) => {
                let cause = format!("there is a domain {} ({})", other.name, other.id);
                Err(Fault::permanent(codes::DOMAIN_EXISTS, DOING, &domain.name, cause)
                    .remedy("Choose another name: a restore never replaces a domain"))
            }
        }
    }

    /// Whether a domain of this UUID is there.
    pub(super) async fn has(&self, id: &DomainId) -> Result<bool, Fault> {
        match self.libvirt.find(&id.to_string()).await {
            Ok(found) => Ok(found.id == *id),
            Err(error) if error.trouble == Trouble::NoSuchDomain => Ok(false),
            Err(error) => Err(self.fault(error)),
        }
    }

    /// Puts a TPM's state where libvirt looks for it, if the domain is not yet defined: then it may have been used.
    pub(super) async fn put_tpm(
        &self,
        domain: &DomainRef,
        state: Vec<(String, String, Vec<u8>)>,
    ) -> Result<(), Fault> {
        if self.has(&domain.id).await? {
            return Ok(());
        }
        let own = self.libvirt.own_folders().await.map_err(|error| self.fault(error))?;
        let folder = own.tpm(&domain.id);
        let write = move || {
            let state: Vec<_> =
                state.iter().map(|(below, name, bytes)| (&**below, &**name, bytes.as_slice())).collect();
            write_tpm(&folder, &state)
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(written) => written,
            Err(error) => Err(Fault::permanent(codes::UNDEFINED_ERROR, DOING, &domain.name, error)),
        }
    }

    /// Defines it, unless it is. Durable on return.
    pub(super) async fn define(&self, domain: &DomainRef, xml: &str) -> Result<(), Fault> {
        if !self.has(&domain.id).await? {
            self.refuse_taken(domain).await?;
            self.libvirt.define_new(xml).await.map_err(|error| self.fault(error))?;
        }
        // Whoever wrote it, libvirt has not made its name durable.
        self.libvirt.sync_definitions().await.map_err(|error| self.fault(error))
    }
}
