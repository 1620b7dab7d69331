//! How many checkpoints of ours each domain keeps, for which vaults, and which gives way next: as findings of the doctor.

use std::sync::Arc;

use vmkeep_steps::backup::bound::{by_vault, gave_way, order};
use vmkeep_steps::hypervisor::Hypervisor;
use vmkeep_steps::vaults::Vaults;

use crate::api::types::{Finding, Grade};
use crate::hypervisor::Libvirt;

const TOPIC: &str = "checkpoints";

/// For each domain that has any. What cannot be looked at is told by whoever looks for leftovers.
pub(super) async fn findings(libvirt: &Libvirt, vaults: &Arc<dyn Vaults>, keep: u32) -> Vec<Finding> {
    let mut findings = Vec::new();
    for domain in libvirt.domains().await.unwrap_or_default() {
        let Ok(seen) = libvirt.observe_from_outside(&domain.id).await else { continue };
        findings.extend(finding(&domain.name, &seen.checkpoints, keep as usize, vaults).await);
    }
    findings
}

async fn finding(domain: &str, listed: &[String], keep: usize, vaults: &Arc<dyn Vaults>) -> Option<Finding> {
    let (mut total, mut counts) = (0, Vec::new());
    for (vault, names) in by_vault(listed) {
        total += names.len();
        counts.push(format!("{} for {}", names.len(), named(vaults, vault).await));
    }
    let next = order(listed, None).into_iter().next()?;
    let mut text =
        format!("{domain} has {total} checkpoints of at most {keep} that it keeps: {}", counts.join(", "));
    if total >= keep {
        let rest: Vec<String> = listed.iter().filter(|name| **name != next).cloned().collect();
        for vault in gave_way(&[next], &rest) {
            let name = named(vaults, &vault.vault).await;
            text.push_str(&format!("; the next that another vault needs takes the place of one for {name}"));
            text.push_str(if vault.in_full { ", whose next backup reads all disks in full" } else { "" });
        }
    }
    let full = total > keep;
    Some(Finding {
        topic: TOPIC.to_owned(),
        grade: if full { Grade::Warning } else { Grade::Note },
        text,
        remedy: if full {
            "None: the next backup of the domain deletes those that are too many (backup.checkpoints)"
                .to_owned()
        } else {
            "None; backup.checkpoints is how many are kept".to_owned()
        },
    })
}

/// A vault in words, by the digits that its id begins with.
async fn named(vaults: &Arc<dyn Vaults>, digits: &str) -> String {
    let known = vaults.known_as(digits).await;
    known.map_or_else(|| format!("a vault whose id begins with {digits}"), |name| format!("the vault {name}"))
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use vmkeep_steps::vaults::Opened;
    use vmkeep_workflow::Fault;

    use super::*;

    struct Known;

    #[async_trait]
    impl Vaults for Known {
        async fn open(&self, _: &str) -> Result<Opened, Fault> {
            unreachable!("nothing is opened for this")
        }

        async fn known_as(&self, beginning: &str) -> Option<String> {
            (beginning == "0000000a").then(|| "main".to_owned())
        }
    }

    #[tokio::test]
    async fn whose_checkpoint_gives_way_next_is_told_before_it_does() {
        let vaults: Arc<dyn Vaults> = Arc::new(Known);
        let made = |vault: u32, time: u64| format!("vmkeep-{vault:08x}-{time:012x}70008000000000000000");
        let listed = [made(0xa, 1), made(0xb, 2), "nightly".to_owned()];
        let told = async |keep| finding("web", &listed, keep, &vaults).await.unwrap();
        let one = told(3).await;
        assert_eq!(one.grade, Grade::Note);
        assert_eq!(
            one.text,
            "web has 2 checkpoints of at most 3 that it keeps: 1 for the vault main, 1 for a vault whose id begins with \
             0000000b"
        );
        let two = told(2).await.text;
        assert!(two.ends_with("one for the vault main, whose next backup reads all disks in full"), "{two}");
        assert_eq!(told(1).await.grade, Grade::Warning);
        assert!(finding("web", &listed[2..], 2, &vaults).await.is_none(), "others' are not counted");
    }
}
