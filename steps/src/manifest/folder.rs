//! Where backups lie.
//!
//! ```text
//! TARGET/                                  a configured root, or a folder below one
//!   web-01/                                the domain's name, encoded (image::name)
//!     20260131T235959Z-0123456789ab/       the instant (UTC) and the last twelve digits of the job's id
//!       manifest.json                      appears last, by one rename: from then on it is a backup
//!       protection.json                    there while the backup must not be deleted
//!       manifest.withdrawn.json            instead of manifest.json while the backup is being deleted
//!       domain.xml  domain-live.xml        what the domain starts from; what it ran with
//!       memory.save                        libvirt's memory image, if there is one
//!       nvram  tpm.tpm2.tpm2-00.permall    firmware variables and TPM state, if there are any
//!       vda.qcow2  vda.base1.qcow2  …      images (image::chain)
//! ```
//!
//! A folder has its final name from the start, and is no backup as long as it has no manifest. What renaming the folder
//! at the end would add is a look for people; what it would cost is a second act that must be durable, and paths
//! that change under the steps. Whose a folder without a manifest is, its name tells: if that job is over, it is left
//! behind and may be removed.
//!
//! Names are for people and for sorting. Nothing is concluded from them about a *backup*.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use vmkeep_workflow::JobId;

use crate::image::root::Component;

/// The file that makes a folder a backup.
pub const MANIFEST: &str = "manifest.json";
/// What the manifest is called while its backup is being deleted: the folder is no backup any more.
pub const WITHDRAWN: &str = "manifest.withdrawn.json";
/// There while the backup must not be deleted.
pub const PROTECTION: &str = "protection.json";
/// What the domain starts from.
pub const DEFINITION: &str = "domain.xml";
/// What it ran with.
pub const LIVE_DEFINITION: &str = "domain-live.xml";
/// The memory image.
pub const MEMORY: &str = "memory.save";
/// Firmware variables.
pub const NVRAM: &str = "nvram";
/// How the names of a TPM's files begin.
pub const TPM_PREFIX: &str = "tpm.";
/// The suffix of a file that is still being written.
pub(crate) const NEW: &str = ".new";

/// One of the names above as a component.
#[must_use]
pub fn fixed(name: &'static str) -> Component {
    Component::literal(name.to_owned())
}

/// The folder of a domain's backups.
#[must_use]
pub fn of_domain(name: &str) -> Component {
    Component::encoded(name)
}

/// The folder of the backup that a job makes.
#[must_use]
pub fn of_backup(at: Timestamp, job: JobId) -> Component {
    let instant = at.to_zoned(TimeZone::UTC).strftime("%Y%m%dT%H%M%SZ");
    Component::literal(format!("{instant}-{}", job.short()))
}

/// The job (its short id) that a folder's name speaks of.
#[must_use]
pub fn job_of(name: &Component) -> Option<&str> {
    let (instant, job) = name.as_str().split_once('-')?;
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let instant = instant.len() == 16
        && digits(instant.get(..8)?)
        && instant.get(8..9)? == "T"
        && digits(instant.get(9..15)?)
        && instant.ends_with('Z');
    let hexadecimal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (instant && job.len() == 12 && job.bytes().all(hexadecimal)).then_some(job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backups_folder_tells_its_instant_and_its_job() {
        let job = JobId::new();
        let name = of_backup("2026-01-31T23:59:59.9Z".parse().unwrap(), job);
        assert_eq!(name.as_str(), format!("20260131T235959Z-{}", job.short()));
        assert_eq!(job_of(&name), Some(job.short().as_str()));
    }

    #[test]
    fn other_folders_are_nobodys() {
        for name in [
            "web-01",
            "20260131T235959Z",
            "20260131T235959Z-",
            "20260131T235959Z-0123456789AB",
            "2026013xT235959Z-0123456789ab",
            "20260131T235959Z-0123456789ab.partial",
            "ääääääää-0123456789ab",
        ] {
            assert_eq!(job_of(&Component::new(name).unwrap()), None, "{name}");
        }
    }
}
