//! What went wrong with a vault, as everything else that goes wrong is told: the one place where its errors get their codes.

use std::fmt::Display;
use std::io::ErrorKind;

use vmkeep_vault::backend::{BackendError, BackendErrorKind};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::keys::KeyError;
use vmkeep_workflow::{Class, Code, Fault};

use crate::codes;

/// An error of a vault, with what was being done and the vault's name.
#[must_use]
pub fn fault(doing: &str, vault: &dyn Display, error: &VaultError) -> Fault {
    if let VaultError::Backend(error) = error {
        return backend_fault(doing, vault, error);
    }
    let class = match error {
        VaultError::Revoked { .. } => Class::Transient,
        _ => Class::Permanent,
    };
    Fault::permanent(code(error), doing, vault.to_string(), error).class(class).remedy(remedy(error))
}

/// An error of the place that a vault is at.
#[must_use]
pub fn backend_fault(doing: &str, vault: &dyn Display, error: &BackendError) -> Fault {
    let (code, class) = match error.kind {
        BackendErrorKind::Transient => (codes::VAULT_UNREACHABLE, Class::Transient),
        BackendErrorKind::Full => (codes::NOT_ENOUGH_DISK_SPACE, Class::Permanent),
        BackendErrorKind::Denied => (codes::VAULT_DENIED, Class::Permanent),
        BackendErrorKind::Broken => (codes::VAULT_UNFIT, Class::Permanent),
    };
    let fault = Fault::permanent(code, doing, vault.to_string(), error).class(class);
    match error.kind {
        BackendErrorKind::Full => fault.remedy(
            "Make room there; or prune backups and collect: `vmkeep vault prune`, `vmkeep vault gc`. What was put stays, \
             and is reused",
        ),
        _ => fault,
    }
}

fn code(error: &VaultError) -> Code {
    match error {
        VaultError::Backend(_) => codes::VAULT_UNREACHABLE,
        VaultError::Damaged { .. } | VaultError::Missing { .. } | VaultError::Lost { .. } => {
            codes::VAULT_DAMAGED
        }
        VaultError::NoVault { .. } => codes::NO_VAULT,
        VaultError::Occupied { .. } => codes::VAULT_EXISTS,
        VaultError::HeaderChanged { .. } | VaultError::NotEncrypted { .. } => codes::VAULT_EXCHANGED,
        VaultError::KeyNeeded { .. } | VaultError::WrongKey { .. } => codes::VAULT_KEY_WRONG,
        VaultError::Key(error) => match error {
            KeyError::MayNotSign => codes::VAULT_MAY_NOT,
            KeyError::Wrong | KeyError::Words(_) => codes::VAULT_KEY_WRONG,
            KeyError::Refused(_) => codes::VAULT_KEY_REFUSED,
            KeyError::NotGenuine | KeyError::NotSigned => codes::VAULT_DAMAGED,
            KeyError::System(_) => codes::UNDEFINED_ERROR,
        },
        VaultError::Newer { .. } | VaultError::ReadOnly { .. } => codes::VAULT_TOO_NEW,
        VaultError::CopyRefused { .. } => codes::VAULT_COPY_REFUSED,
        VaultError::Revoked { .. } => codes::VAULT_BUSY,
        VaultError::Io(error) => match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => codes::NOT_ENOUGH_DISK_SPACE,
            _ => codes::CANNOT_COPY_IMAGE_TO_BACKUP_LOCATION,
        },
        VaultError::Contract(_) | VaultError::Task(_) => codes::UNDEFINED_ERROR,
    }
}

/// The way on, where the registry does not know a better one for the code.
fn remedy(error: &VaultError) -> &'static str {
    match error {
        // Given by mistake, or the header was exchanged: both are to be thought of.
        VaultError::NotEncrypted { .. } => {
            "If the vault was made without encryption, give no key. If not, somebody has exchanged it: look at the place; \
             `vmkeep vault repair VAULT --header` puts the known header back"
        }
        VaultError::Missing { .. } => "`vmkeep vault check VAULT` names the backups that are hurt",
        VaultError::Key(KeyError::NotGenuine) => {
            "A wrapped key is damaged: open the vault with another key, or with the 24 words"
        }
        VaultError::CopyRefused { .. } => {
            "Copy into another vault; into one without encryption only with --allow-plain"
        }
        VaultError::Io(_) => "See to the disk that was read or written",
        _ => "",
    }
}
