//! `read-again`: the backup that older ones make room for is read from the medium and compared with its manifest.
//!
//! When it was written its hashes were taken from memory, and so would they be now: the page cache is told to forget its
//! files first. What the drive's own cache holds nobody can tell; publishing has flushed it.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, Verdict};

use super::options::Doomed;
use crate::codes;
use crate::image::copy::{CopyError, Throttle};
use crate::image::qemu_img::QemuImg;
use crate::image::root::Roots;
use crate::manifest::verify::forget_cached;
use crate::manifest::{self, BackupId, Depth, Finding, Problem};
use crate::snapshot::Places;

/// Reads a backup.
#[derive(Debug)]
pub struct ReadAgain(pub Places);

/// What is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RereadInput {
    /// The backup, as it was when the plan was made.
    pub backup: Doomed,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// What was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reread {
    /// The backup.
    pub backup: BackupId,
    /// Bytes, holes included.
    pub bytes: u64,
}

const DOING: &str = "read the newest backup again";

#[async_trait]
impl Step for ReadAgain {
    const KIND: StepKind = StepKind::new("read-again", 1);
    type Input = RereadInput;
    type Output = Reread;

    async fn run(&self, cx: &StepContext, input: RereadInput) -> Result<Reread, Fault> {
        let (roots, cx) = (self.0.roots.clone(), cx.clone());
        crate::blocking::run(move || read(&roots, &cx, &input))
            .await
            .unwrap_or_else(|e| Err(Fault::permanent(Code::UNDEFINED, DOING, "", e)))
    }

    /// Reading changes nothing, so it is simply done again.
    async fn probe(&self, cx: &StepContext, _: RereadInput) -> Verdict<Reread> {
        if cx.still_running { Verdict::InFlight("it is still read".to_owned()) } else { Verdict::NotDone }
    }
}

fn read(roots: &Arc<Roots>, cx: &StepContext, input: &RereadInput) -> Result<Reread, Fault> {
    let wanted = &input.backup;
    let object = wanted.folder.display().to_string();
    let fail = |code, error: &dyn std::fmt::Display| {
        Fault::permanent(code, DOING, &object, error)
            .remedy("Nothing older was deleted. Make another backup, and check that storage")
    };
    let folder = roots.open_folder(&wanted.folder).map_err(|e| fail(codes::MISSING_NECESSARY_FILES, &e))?;
    let stored = manifest::read(&folder).map_err(|e| fail(codes::MISSING_NECESSARY_FILES, &e))?;
    if stored.hash != wanted.manifest {
        return Err(fail(codes::MANIFEST_MISMATCH, &"its manifest was changed meanwhile"));
    }
    forget_cached(&folder, &stored.manifest);
    let throttle = Throttle::new(input.bandwidth);
    let found = manifest::verify(&folder, &stored, Depth::Full, &QemuImg::default(), throttle.as_ref(), cx)
        .map_err(|error| match error {
        CopyError::Stopped { .. } => Fault::stopped(DOING, object.clone()),
        other => fail(codes::MISSING_NECESSARY_FILES, &other),
    })?;
    let serious: Vec<Finding> = found.into_iter().filter(|finding| finding.problem.serious()).collect();
    if serious.is_empty() {
        return Ok(Reread { backup: wanted.backup, bytes: stored.manifest.size() });
    }
    let gone = serious.iter().any(|one| matches!(one.problem, Problem::Missing | Problem::NotAFile));
    let code = if gone { codes::MISSING_NECESSARY_FILES } else { codes::CORRUPT_DISK_IMAGE_FOUND };
    let said: Vec<String> = serious.iter().map(ToString::to_string).collect();
    Err(fail(code, &said.join("; ")))
}
