//! `verify`: reading a backup again and comparing it with its manifest, as a job like any other.
//!
//! It is a job because it takes as long as the backup is large, is worth stopping and watching, and because "when was
//! this backup last read, and was it whole?" is a question about history. It changes nothing, so it needs no lock and
//! has nothing to undo; cut off, it simply begins again. The manifest itself is looked at too ([`genuine`]): what the files
//! are compared with must be what was published. Whatever is found on the way, all is looked at: the owner wants to know
//! what is left, not what broke first.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_steps::image::copy::{CopyError, Throttle};
use vmkeep_steps::image::qemu_img::QemuImg;
use vmkeep_steps::image::root::Roots;
use vmkeep_steps::manifest::{self, Depth, FileEntry, Finding, Problem, Role};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::plan::Retry;
use vmkeep_workflow::{
    Code, Fault, Millis, Plan, PlanContext, Step, StepContext, StepSpec, Verdict, Workflow, WorkflowName,
};

use crate::codes;
use crate::genuine::{self, Journal};
use crate::text::bytes;

/// The workflow's name.
pub const NAME: &str = "verify";
/// Findings that are put into a message; all are in the output.
const SHOWN: usize = 5;

/// What is to be verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The backup's id.
    pub backup: String,
    /// Its folder.
    pub folder: PathBuf,
    /// The hash of its manifest by this host's journal, if that knows the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<String>,
    /// How thoroughly.
    pub depth: Depth,
    /// Bytes per second; 0 for no limit.
    #[serde(default)]
    pub bandwidth: u64,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Files that were read.
    pub files: u64,
    /// Bytes that were read, holes included.
    pub bytes: u64,
    /// What is no fault but worth knowing: files that do not belong to the backup, what could not be compared.
    pub notes: Vec<String>,
}

/// The recipe.
#[derive(Debug)]
pub struct Verify;

#[async_trait]
impl Workflow for Verify {
    fn name(&self) -> WorkflowName {
        NAME.into()
    }

    fn exclusive(&self) -> bool {
        false
    }

    async fn plan(&self, cx: &PlanContext) -> Result<Plan, Fault> {
        let options: Options = Options::deserialize(&cx.request.options)
            .map_err(|e| Fault::permanent(codes::USAGE, "understand the options", "", e))?;
        let title = format!("verify backup {} of {}", options.backup, cx.request.subject.label);
        let input = cx.request.options.clone();
        let read = StepSpec::new("read", VerifyBackup::KIND, "read every file and compare it", input)
            .retry(Retry { attempts: 3, ..Retry::default() })
            .stall(Millis::secs(600));
        Plan::new(NAME, 1, title, vec![read], None, serde_json::Value::Null)
            .map_err(|e| Fault::permanent(Code::UNDEFINED, "plan the verification", options.backup, e))
    }
}

/// Reads a backup.
#[derive(Debug)]
pub struct VerifyBackup {
    /// Where backups may lie.
    pub roots: Arc<Roots>,
}

#[async_trait]
impl Step for VerifyBackup {
    const KIND: StepKind = StepKind::new("verify-backup", 1);
    type Input = Options;
    type Output = Verified;

    async fn run(&self, cx: &StepContext, input: Options) -> Result<Verified, Fault> {
        let (roots, cx) = (self.roots.clone(), cx.clone());
        tokio::task::spawn_blocking(move || read(&roots, &cx, &input))
            .await
            .unwrap_or_else(|e| Err(Fault::permanent(Code::UNDEFINED, "verify the backup", "", e)))
    }

    /// It leaves nothing in the world that could be looked at.
    async fn probe(&self, cx: &StepContext, _: Options) -> Verdict<Verified> {
        if cx.still_running { Verdict::InFlight("it is still read".to_owned()) } else { Verdict::NotDone }
    }
}

fn read(roots: &Roots, cx: &StepContext, input: &Options) -> Result<Verified, Fault> {
    let doing = "verify the backup";
    let object = input.folder.display().to_string();
    let fail = |code, error: &dyn std::fmt::Display| {
        Fault::permanent(code, doing, object.clone(), error).remedy("Use another backup: vmkeep list")
    };
    let folder = roots.open_folder(&input.folder).map_err(|e| fail(codes::MISSING_NECESSARY_FILES, &e))?;
    let stored = manifest::read(&folder).map_err(|e| fail(codes::MANIFEST_MISMATCH, &e))?;
    if stored.manifest.backup.to_string() != input.backup {
        return Err(fail(codes::MANIFEST_MISMATCH, &"another backup lies in its folder"));
    }
    let throttle = Throttle::new(input.bandwidth);
    // What is wanted to be known is what the medium holds, not the memory that it was written from.
    manifest::verify::forget_cached(&folder, &stored.manifest);
    let found = manifest::verify(&folder, &stored, input.depth, &QemuImg::default(), throttle.as_ref(), cx)
        .map_err(|error| match error {
        CopyError::Stopped { .. } => Fault::stopped(doing, object.clone()),
        other => fail(codes::MISSING_NECESSARY_FILES, &other),
    })?;
    let (serious, notes): (Vec<_>, Vec<_>) = found.into_iter().partition(|finding| finding.problem.serious());
    let journal = Journal(input.published.clone());
    let mut objections: Vec<String> = journal.objects(&stored).into_iter().collect();
    let broken = |file: &FileEntry| serious.iter().any(|finding| finding.file == file.name);
    if !stored.manifest.files.iter().any(|file| file.role == Role::Definition && broken(file)) {
        objections.extend(genuine::against_definitions(&folder, &stored));
    }
    if !objections.is_empty() {
        let code = if serious.is_empty() { codes::MANIFEST_MISMATCH } else { code_of(&serious) };
        objections.extend((!serious.is_empty()).then(|| describe(&serious)));
        return Err(fail(code, &objections.join("; ")));
    }
    if serious.is_empty() {
        return Ok(Verified {
            files: stored.manifest.files.len() as u64,
            bytes: stored.manifest.size(),
            notes: notes.iter().map(ToString::to_string).chain(journal.note()).collect(),
        });
    }
    Err(fail(code_of(&serious), &describe(&serious)))
}

/// The code of what is worst.
fn code_of(found: &[Finding]) -> Code {
    let any = |which: fn(&Problem) -> bool| found.iter().any(|finding| which(&finding.problem));
    if any(|p| matches!(p, Problem::Missing | Problem::NotAFile)) {
        codes::MISSING_NECESSARY_FILES
    } else if any(|p| matches!(p, Problem::Hash { .. } | Problem::Damaged { .. })) {
        codes::CORRUPT_DISK_IMAGE_FOUND
    } else {
        codes::MANIFEST_MISMATCH
    }
}

fn describe(found: &[Finding]) -> String {
    let shown: Vec<String> = found.iter().take(SHOWN).map(ToString::to_string).collect();
    let more = found.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{}{more}", shown.join("; "))
}

/// What a verification came to, in words.
#[must_use]
pub fn words(verified: &Verified) -> String {
    format!("{} files with {} are what the manifest says", verified.files, bytes(verified.bytes))
}
