//! `forget-checkpoints`: which checkpoints stay.
//!
//! A checkpoint becomes somebody's parent only by the manifest of the backup that it was made with. So the new one goes unless
//! that backup is checked; then it stays, and of the older ones of this vault only that of the newest full backup, for a
//! differential one. All others of this vault go. Those of other vaults go only when there are more of ours than a domain may
//! keep ([`super::bound`]), which a backup that was not made never sees to; those of other people are never touched.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_vault::manifest::BackupKind;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, StepName, Verdict};

use super::bound::{GaveWay, beyond, gave_way};
use super::commit::CommitBackup;
use super::held::Sessions;
use super::lease::TakeLease;
use crate::codes;
use crate::hypervisor::{DomainRef, Trouble};
use crate::snapshot::{World, on_the_way_back};

/// Deletes the checkpoints that nobody needs.
#[derive(Debug)]
pub struct ForgetCheckpoints {
    pub(super) world: World,
    pub(super) sessions: Sessions,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetInput {
    /// The domain.
    pub domain: DomainRef,
    /// How the names of this vault's checkpoints begin.
    pub prefix: String,
    /// The one that this job makes.
    pub checkpoint: String,
    /// The step that says which others are needed.
    pub lease: StepName,
    /// The step that commits.
    pub commit: StepName,
    /// No more of ours stay of this domain, over all vaults; nothing: as many as there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<u32>,
}

/// What it leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetOutput {
    /// Those that were deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deleted: Vec<String>,
    /// Those that could not be, because the domain is off; the next backup sees to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<String>,
    /// Which of them were needed, and had to go because there were too many, by vault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gave_way: Vec<GaveWay>,
}

/// What is noted before the first of them goes: afterwards nothing tells that it was there.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    gave_way: Vec<String>,
}

/// How the names of the checkpoints of a vault begin.
#[must_use]
pub fn prefix(vault: &str) -> String {
    format!("vmkeep-{}-", vault.get(..8).unwrap_or(vault))
}

/// The job that made a checkpoint, if it is one of ours.
#[must_use]
pub fn checkpoint_job(name: &str) -> Option<String> {
    let (vault, job) = name.strip_prefix("vmkeep-")?.split_once('-')?;
    let hexadecimal = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let ours = vault.len() == 8 && hexadecimal(vault) && hexadecimal(job);
    let job: uuid::Uuid = job.parse().ok().filter(|_| ours)?;
    Some(job.to_string())
}

const DOING: &str = "delete checkpoints that nobody needs";

impl ForgetCheckpoints {
    async fn is_off(&self, input: &ForgetInput) -> bool {
        match self.world.hypervisor.state(&input.domain.id).await {
            Ok(state) => !state.is_active(),
            Err(e) => matches!(e.trouble, Trouble::NoSuchDomain | Trouble::NotRunning),
        }
    }

    /// Those that have to go although they were needed: with what an attempt that was cut off has noted.
    async fn too_many(
        &self,
        cx: &StepContext,
        input: &ForgetInput,
        listed: &[String],
    ) -> Result<Vec<String>, Fault> {
        let noted = cx.progress.saved().and_then(|note| Note::deserialize(&note).ok());
        let mut all = noted.map(|note| note.gave_way).unwrap_or_default();
        let Some(keep) = input.keep else { return Ok(all) };
        let mut more = beyond(listed, Some(&input.checkpoint), keep as usize);
        more.retain(|name| !all.contains(name));
        if !more.is_empty() {
            all.append(&mut more);
            cx.progress.save(&Note { gave_way: all.clone() }).await?;
        }
        Ok(all)
    }

    /// What that means for their vaults, by the names that this host knows them by.
    async fn told(&self, gone: &[String], listed: &[String]) -> Vec<GaveWay> {
        let left: Vec<String> = listed.iter().filter(|name| !gone.contains(name)).cloned().collect();
        let mut vaults = gave_way(gone, &left);
        for vault in &mut vaults {
            vault.name = self.sessions.vaults.known_as(&vault.vault).await;
            let (name, checkpoints) = (vault.name.as_ref(), &vault.checkpoints);
            tracing::warn!(
                vault = vault.vault,
                ?name,
                ?checkpoints,
                in_full = vault.in_full,
                "checkpoints gave way"
            );
        }
        vaults
    }
}

#[async_trait]
impl Step for ForgetCheckpoints {
    const KIND: StepKind = StepKind::new("forget-checkpoints", 1);
    type Input = ForgetInput;
    type Output = ForgetOutput;

    async fn run(&self, cx: &StepContext, input: ForgetInput) -> Result<ForgetOutput, Fault> {
        // What is needed is not known without it, and nothing was begun.
        let Some(leased) = cx.outputs.of::<TakeLease>(&input.lease)? else {
            return Ok(ForgetOutput::default());
        };
        let committed = cx.outputs.of::<CommitBackup>(&input.commit)?.filter(|commit| commit.checked);
        let seen = match self.world.hypervisor.observe(&input.domain.id).await {
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(ForgetOutput::default()),
            seen => {
                seen.map_err(|e| on_the_way_back(e, codes::CANNOT_END_PULL, DOING, &input.domain.name))?
            }
        };
        let is_made = committed.is_some();
        let mut stay = leased.others;
        match committed {
            Some(commit) => {
                stay.push(input.checkpoint.clone());
                stay.extend(leased.full.filter(|_| commit.kind != BackupKind::Full));
            }
            None => {
                stay.extend(leased.full);
                stay.extend(leased.disks.into_iter().filter_map(|disk| disk.since));
            }
        }
        let goes = |name: &&String| name.starts_with(&input.prefix) && !stay.contains(*name);
        let mut goes: Vec<String> = seen.checkpoints.iter().filter(goes).cloned().collect();
        if !seen.state.is_active() {
            return Ok(ForgetOutput { left: goes, ..ForgetOutput::default() });
        }
        let stays: Vec<String> =
            seen.checkpoints.iter().filter(|name| !goes.contains(name)).cloned().collect();
        let mut given = Vec::new();
        // A backup that was not made costs no vault anything.
        if is_made {
            given = self.too_many(cx, &input, &stays).await?;
            goes.extend(given.iter().filter(|name| stays.contains(name)).cloned());
        }
        for name in &goes {
            match self.world.hypervisor.delete_checkpoint(&input.domain.id, name).await {
                Ok(()) => {}
                // It went off meanwhile: libvirt then refuses in words of its own.
                Err(_) if self.is_off(&input).await => {
                    return Ok(ForgetOutput { left: goes, ..ForgetOutput::default() });
                }
                Err(e) => return Err(on_the_way_back(e, codes::CANNOT_END_PULL, DOING, &input.domain.name)),
            }
        }
        let gave_way = self.told(&given, &stays).await;
        Ok(ForgetOutput { deleted: goes, left: Vec::new(), gave_way })
    }

    /// Deleting what is gone is harmless.
    async fn probe(&self, cx: &StepContext, _: ForgetInput) -> Verdict<ForgetOutput> {
        cx.may_repeat()
    }
}
