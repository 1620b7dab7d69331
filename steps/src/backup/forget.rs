//! `forget-checkpoints`: which checkpoints stay.
//!
//! A checkpoint becomes somebody's parent only by the manifest of the backup that it was made with. So the new one goes unless
//! that backup is checked; then it stays, and of the older ones of this vault only that of the newest full backup, for a
//! differential one. All others of this vault go. Those of other vaults, and of other people, are never touched.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_vault::manifest::BackupKind;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Fault, Step, StepContext, StepName, Verdict};

use super::commit::CommitBackup;
use super::lease::TakeLease;
use crate::codes;
use crate::hypervisor::{DomainRef, Trouble};
use crate::snapshot::{World, on_the_way_back};

/// Deletes the checkpoints that nobody needs.
#[derive(Debug)]
pub struct ForgetCheckpoints(pub World);

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
        match self.0.hypervisor.state(&input.domain.id).await {
            Ok(state) => !state.is_active(),
            Err(e) => matches!(e.trouble, Trouble::NoSuchDomain | Trouble::NotRunning),
        }
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
        let seen = match self.0.hypervisor.observe(&input.domain.id).await {
            Err(e) if e.trouble == Trouble::NoSuchDomain => return Ok(ForgetOutput::default()),
            seen => {
                seen.map_err(|e| on_the_way_back(e, codes::CANNOT_END_PULL, DOING, &input.domain.name))?
            }
        };
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
        let goes: Vec<String> = seen.checkpoints.iter().filter(goes).cloned().collect();
        if !seen.state.is_active() {
            return Ok(ForgetOutput { deleted: Vec::new(), left: goes });
        }
        for name in &goes {
            match self.0.hypervisor.delete_checkpoint(&input.domain.id, name).await {
                Ok(()) => {}
                // It went off meanwhile: libvirt then refuses in words of its own.
                Err(_) if self.is_off(&input).await => {
                    return Ok(ForgetOutput { deleted: Vec::new(), left: goes });
                }
                Err(e) => return Err(on_the_way_back(e, codes::CANNOT_END_PULL, DOING, &input.domain.name)),
            }
        }
        Ok(ForgetOutput { deleted: goes, left: Vec::new() })
    }

    /// Deleting what is gone is harmless.
    async fn probe(&self, cx: &StepContext, _: ForgetInput) -> Verdict<ForgetOutput> {
        cx.may_repeat()
    }
}
