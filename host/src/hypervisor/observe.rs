//! Looking at a domain.

use std::time::Duration;

use vmkeep_libvirt::flags::{CheckpointListFlags, ListFlags, SnapshotListFlags, XmlFlags};
use vmkeep_libvirt::job::{JobOperation, JobStats};
use vmkeep_libvirt::xml::{Document, DomainXml};
use vmkeep_libvirt::{Domain, DomainState, PausedReason, ProcessId, Result as LibvirtResult, StateReason};
use vmkeep_steps::hypervisor::{
    Definition, DomainId, DomainJob, DomainRef, FreezeState, HvError, HvResult, Observation, PauseReason,
    Qemu, RunState, Trouble,
};

use super::{Libvirt, calls, definition, marker};

/// What libvirt says of a domain, as text.
struct Seen {
    name: String,
    state: StateReason,
    persistent: Option<String>,
    live: Option<String>,
    managed_save: bool,
    autostart: bool,
    snapshots: Vec<(String, String)>,
    checkpoints: Vec<String>,
    /// A QEMU that is there although libvirt says that the domain is off.
    forgotten: Option<ProcessId>,
}

/// How often, and how far apart, a QEMU must be found beside a domain that is off. One that is being ended, or started,
/// is there for a moment too.
const FORGOTTEN_LOOKS: u32 = 16;
const FORGOTTEN_APART: Duration = Duration::from_millis(250);

fn see(d: &Domain) -> LibvirtResult<Seen> {
    let state = d.state()?;
    let checkpoints = match d.checkpoints(CheckpointListFlags::NONE) {
        Ok(found) => found.iter().map(|c| c.name().to_owned()).collect(),
        // A driver without checkpoints has none.
        Err(e) if e.code == vmkeep_libvirt::ErrorCode::NoSupport => Vec::new(),
        Err(e) => return Err(e),
    };
    Ok(Seen {
        name: d.name().to_owned(),
        state,
        persistent: if d.is_persistent()? {
            Some(d.xml(XmlFlags::SECURE | XmlFlags::INACTIVE)?)
        } else {
            None
        },
        live: if d.is_active()? { Some(d.xml(XmlFlags::SECURE)?) } else { None },
        managed_save: d.has_managed_save()?,
        // Only what is persistent can start with the host.
        autostart: d.is_persistent()? && d.autostart()?,
        snapshots: d
            .snapshots(SnapshotListFlags::NONE)?
            .iter()
            .map(|s| Ok((s.name().to_owned(), s.xml()?)))
            .collect::<LibvirtResult<_>>()?,
        checkpoints,
        forgotten: d.forgotten_process()?,
    })
}

/// A domain in brief: what libvirt knows without asking QEMU.
#[derive(Clone, Debug)]
pub struct Overview {
    /// Which.
    pub domain: DomainRef,
    /// Whether it runs.
    pub state: RunState,
    /// Whether its definition outlives it.
    pub persistent: bool,
    /// Its definition: the persistent one where there is one. Without secrets.
    pub definition: HvResult<Definition>,
}

impl Libvirt {
    pub(super) async fn look_over(&self) -> HvResult<Vec<Overview>> {
        let all = self
            .look("look over the domains", |c| {
                let mut all = Vec::new();
                for d in c.domains(ListFlags::NONE)? {
                    let seen = || {
                        let persistent = d.is_persistent()?;
                        let flags = XmlFlags::NONE.with(XmlFlags::INACTIVE, persistent);
                        Ok::<_, vmkeep_libvirt::Error>((d.state()?, persistent, d.xml(flags)?))
                    };
                    match seen() {
                        Ok(seen) => all.push((d.uuid(), d.name().to_owned(), seen)),
                        // It went away while it was looked at.
                        Err(e) if e.code == vmkeep_libvirt::ErrorCode::NoDomain => {}
                        Err(e) => return Err(e),
                    }
                }
                Ok(all)
            })
            .await?;
        let mut all: Vec<Overview> = all
            .into_iter()
            .map(|(uuid, name, (state, persistent, xml))| Overview {
                domain: DomainRef { id: DomainId(uuid), name },
                state: run_state(state),
                persistent,
                definition: definition::read(&xml),
            })
            .collect();
        all.sort_by(|a, b| a.domain.name.cmp(&b.domain.name));
        Ok(all)
    }

    /// Looks until it is sure that a domain that is off has no QEMU. libvirt 9.0 forgets a domain when it is killed in the
    /// middle of a pivot: it writes a note then that it cannot read at its next start. QEMU runs on, and whoever took the
    /// domain for one that is off would work on images that are in use.
    async fn see_surely(&self, domain: &DomainId) -> HvResult<Seen> {
        for _ in 0..FORGOTTEN_LOOKS {
            let seen = self.look_at(domain, "observe", see).await?;
            if seen.forgotten.is_none() {
                return Ok(seen);
            }
            tokio::time::sleep(FORGOTTEN_APART).await;
        }
        let seen = self.look_at(domain, "observe", see).await?;
        match seen.forgotten {
            None => Ok(seen),
            Some(process) => Err(HvError::new(
                Trouble::Forgotten,
                format!("libvirt says that it is off, and its QEMU (process {}) runs", process.pid),
            )),
        }
    }

    /// The process of a domain's QEMU and what it has open, as the kernel tells; QEMU is asked only if that may not be
    /// looked at. (Whatever goes through its monitor libvirt notes on the domain, as tampering.)
    async fn open_files(&self, domain: &DomainId) -> HvResult<Option<Qemu>> {
        let look = |d: &Domain| match (d.qemu_process()?, d.qemu_open_files()?) {
            (Some(process), Some(files)) => Ok(Some((calls::instance_name(&process), files))),
            _ => Ok(None),
        };
        match self.look_at(domain, "open files", look).await {
            Ok(None) => Ok(None),
            Ok(Some((instance, files))) => {
                let open = files.into_iter().filter(|file| !file.deleted).map(|file| file.path).collect();
                Ok(Some(Qemu { instance, disks: Vec::new(), jobs: Vec::new(), open }))
            }
            Err(_) => self.ask_qemu(domain).await,
        }
    }

    pub(super) async fn observe_all(&self, domain: &DomainId, ask: bool) -> HvResult<Observation> {
        let seen = self.see_surely(domain).await?;
        let parse = |text: &Option<String>| {
            text.as_deref()
                .map(|text| {
                    let xml = DomainXml::parse(text).map_err(|e| definition::broken(&e))?;
                    Ok::<_, HvError>((definition::of(&xml, text)?, marker::read(&xml)))
                })
                .transpose()
        };
        let persistent = parse(&seen.persistent)?;
        let live = parse(&seen.live)?;
        let persistent_marker = persistent.as_ref().and_then(|(_, marker)| marker.clone());
        let marker = match &live {
            Some((_, marker)) => marker.clone(),
            None => persistent_marker.clone(),
        };
        // Last: whatever it says is newer than all of the above.
        let qemu = match live {
            None => None,
            Some(_) if ask => self.ask_qemu(domain).await?,
            Some(_) => self.open_files(domain).await?,
        };
        // libvirt counts the images that it has made, or found when it began; but a start loads whatever lies there, also one
        // that was given back.
        let lies_there = || self.managed_save_path(&seen.name).is_ok_and(|image| image.exists());
        let managed_save = seen.managed_save || (qemu.is_none() && lies_there());
        Ok(Observation {
            domain: DomainRef { id: *domain, name: seen.name.clone() },
            state: run_state(seen.state),
            persistent: persistent.map(|(definition, _)| definition),
            live: live.map(|(definition, _)| definition),
            qemu,
            marker,
            persistent_marker,
            managed_save,
            autostart: seen.autostart,
            saved: seen.state.saved(),
            crashed: seen.state.crashed(),
            snapshots: seen.snapshots.into_iter().map(|(name, xml)| (name, is_external(&xml))).collect(),
            checkpoints: seen.checkpoints,
        })
    }
}

/// Whether any part of a snapshot is in a file outside the disks. What cannot be read counts as such.
fn is_external(xml: &str) -> bool {
    let Ok(document) = Document::parse(xml) else { return true };
    let root = document.root();
    let external = |e: &vmkeep_libvirt::xml::Element| e.attr("snapshot") == Some("external");
    root.child("memory").is_some_and(external)
        || root.child("disks").is_some_and(|disks| disks.elements().any(external))
}

/// A domain's state in the terms of the steps.
pub(super) fn run_state(found: StateReason) -> RunState {
    match found.state {
        DomainState::Running | DomainState::Blocked => RunState::Running,
        DomainState::Shutoff => RunState::Off,
        DomainState::Paused => RunState::Paused(match found.paused() {
            Some(PausedReason::User) => PauseReason::Asked,
            Some(PausedReason::IoError) => PauseReason::IoError,
            Some(
                PausedReason::Migration
                | PausedReason::Save
                | PausedReason::Dump
                | PausedReason::FromSnapshot
                | PausedReason::Snapshot
                | PausedReason::StartingUp,
            ) => PauseReason::Job,
            _ => PauseReason::Other,
        }),
        // "Crashed" of a domain that is kept has a QEMU; libvirt says so by giving it a number.
        _ => RunState::Other,
    }
}

/// libvirt's asynchronous job, if one is active.
pub(super) fn domain_job(stats: &JobStats) -> Option<DomainJob> {
    if !stats.phase.is_active() {
        return None;
    }
    let number = |key: &str| stats.raw.get(key).and_then(vmkeep_libvirt::ParamValue::as_u64).unwrap_or(0);
    let (total, done, remaining) = stats.memory.or(stats.data).or(stats.disk).unwrap_or_default();
    let page = match number("memory_page_size") {
        0 => 4096,
        size => size,
    };
    Some(DomainJob {
        operation: match stats.operation {
            JobOperation::Snapshot => "snapshot".to_owned(),
            JobOperation::Save => "save".to_owned(),
            JobOperation::Backup => "backup".to_owned(),
            JobOperation::MigrationIn | JobOperation::MigrationOut => "migration".to_owned(),
            JobOperation::Dump => "dump".to_owned(),
            JobOperation::Start | JobOperation::Restore => "start".to_owned(),
            other => format!("{other:?}").to_lowercase(),
        },
        elapsed_ms: stats.elapsed_ms.unwrap_or(0),
        done,
        remaining,
        total,
        dirty_rate: number("memory_dirty_rate").saturating_mul(page),
        iteration: number("memory_iteration"),
    })
}

/// The agent's answer to `guest-fsfreeze-status`.
pub(super) fn freeze_state(answer: &str) -> HvResult<FreezeState> {
    #[derive(serde::Deserialize)]
    struct Answer {
        #[serde(rename = "return")]
        state: String,
    }
    match serde_json::from_str::<Answer>(answer).map(|answer| answer.state).as_deref() {
        Ok("thawed") => Ok(FreezeState::Thawed),
        Ok("frozen") => Ok(FreezeState::Frozen),
        _ => Err(HvError::new(Trouble::Refused, format!("the guest's agent answered {answer:?}"))),
    }
}

/// The domain that somebody means: by name, by UUID, or by a beginning of a UUID that fits one domain only.
pub(super) fn pick(wanted: &str, all: &[DomainRef]) -> HvResult<DomainRef> {
    if let Some(domain) = all.iter().find(|d| d.name == wanted) {
        return Ok(domain.clone());
    }
    let lower = wanted.to_ascii_lowercase();
    let mut hits = all.iter().filter(|d| !lower.is_empty() && d.id.to_string().starts_with(&lower));
    match (hits.next(), hits.next()) {
        (Some(domain), None) => Ok(domain.clone()),
        (Some(_), Some(_)) => Err(HvError::new(
            Trouble::Refused,
            format!("several domains have a UUID that begins with {wanted:?}"),
        )),
        (None, _) => Err(HvError::new(Trouble::NoSuchDomain, format!("there is no domain {wanted:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str, id: &str) -> DomainRef {
        DomainRef { id: DomainId(id.parse().unwrap()), name: name.to_owned() }
    }

    #[test]
    fn a_domain_is_found_by_name_before_uuid_and_by_a_beginning_only_if_it_fits_one() {
        let a = domain("web", "aaaa0000-0000-4000-8000-000000000001");
        let b = domain("aaaa", "bbbb0000-0000-4000-8000-000000000002");
        let c = domain("x y$(z)\n", "aaab0000-0000-4000-8000-000000000003");
        let all = [a.clone(), b.clone(), c.clone()];
        assert_eq!(pick("web", &all), Ok(a));
        assert_eq!(pick("aaaa", &all), Ok(b));
        assert_eq!(pick("x y$(z)\n", &all), Ok(c.clone()));
        assert_eq!(pick("AAAB", &all), Ok(c));
        assert_eq!(pick("aaa", &all).unwrap_err().trouble, Trouble::Refused);
        assert_eq!(pick("web2", &all).unwrap_err().trouble, Trouble::NoSuchDomain);
        assert_eq!(pick("", &all).unwrap_err().trouble, Trouble::NoSuchDomain);
    }

    #[test]
    fn a_snapshot_is_external_if_any_part_of_it_is_and_the_domain_inside_does_not_count() {
        let xml = |memory: &str, disk: &str| {
            format!(
                "<domainsnapshot><memory snapshot='{memory}'/><disks><disk name='vda' snapshot='{disk}'/></disks>\
                 <domain><devices><disk snapshot='external'/></devices></domain></domainsnapshot>"
            )
        };
        assert!(!is_external(&xml("internal", "internal")));
        assert!(is_external(&xml("no", "external")));
        assert!(is_external(&xml("external", "no")));
        assert!(is_external("not XML"));
    }

    #[test]
    fn the_agents_answer_is_read_and_anything_else_is_no_answer() {
        assert_eq!(freeze_state(r#"{"return":"frozen"}"#), Ok(FreezeState::Frozen));
        assert_eq!(freeze_state(r#"{"return":"thawed"}"#), Ok(FreezeState::Thawed));
        assert!(freeze_state(r#"{"error":{"desc":"no"}}"#).is_err());
    }
}
