//! `fetch-tpm`: a TPM's state, which no definition names a place for.
//!
//! libvirt keeps it in a folder of its own, by UUID, and the UUID is new and made for this job: what is there is this job's.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_vault::error::VaultError;
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Code, Fault, Step, StepContext, Verdict};

use super::fetch::{Wanted, lost};
use super::reader::Readers;
use crate::codes;
use crate::hypervisor::DomainRef;
use crate::restore::machine::{remove_tpm, tpm_folder, unwritable};
use crate::snapshot::World;
use crate::tpm;
use crate::vaults::files::Held;

const DOING: &str = "restore the TPM's state";

/// Fetches a TPM's state.
#[derive(Debug)]
pub struct FetchTpm {
    pub(super) world: World,
    pub(super) readers: Readers,
}

/// A file of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TpmFile {
    /// Its content.
    pub wanted: Wanted,
    /// Its folder in the TPM's.
    pub below: String,
    /// Its name there.
    pub name: String,
}

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchTpmInput {
    /// The new domain.
    pub domain: DomainRef,
    /// The files.
    pub files: Vec<TpmFile>,
}

impl FetchTpm {
    async fn read(&self, cx: &StepContext, wanted: &Wanted) -> Result<Vec<u8>, Fault> {
        let size = usize::try_from(wanted.image.size).ok().filter(|size| *size as u64 <= tpm::LARGEST);
        let Some(size) = size else {
            let cause = "it is larger than any such file";
            return Err(Fault::permanent(
                codes::FIRMWARE_STATE_UNSUPPORTED,
                DOING,
                wanted.what.to_string(),
                cause,
            ));
        };
        let reader = self.readers.of(cx, &wanted.source).await?;
        let mut held = Held::new(size);
        wanted.read(&reader, &mut held).await.map_err(|error| match error {
            VaultError::Io(error) => Fault::permanent(Code::UNDEFINED, DOING, wanted.what.to_string(), error),
            error => lost(wanted, &error),
        })?;
        Ok(held.0)
    }
}

#[async_trait]
impl Step for FetchTpm {
    const KIND: StepKind = StepKind::new("fetch-tpm", 1);
    type Input = FetchTpmInput;
    type Output = PathBuf;

    async fn run(&self, cx: &StepContext, input: FetchTpmInput) -> Result<PathBuf, Fault> {
        let folder = tpm_folder(&self.world, &input.domain).await?;
        let mut state = Vec::with_capacity(input.files.len());
        for file in &input.files {
            state.push((file.below.clone(), file.name.clone(), self.read(cx, &file.wanted).await?));
        }
        let write = move || {
            let state: Vec<_> =
                state.iter().map(|(below, name, bytes)| (&**below, &**name, bytes.as_slice())).collect();
            tpm::write(&folder, &state).map_err(|e| unwritable(&folder, &e)).map(|()| folder)
        };
        match crate::blocking::run(write).await {
            Ok(written) => written,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, DOING, &input.domain.name, e)),
        }
    }

    /// Nobody uses it before the domain is defined: it is written anew.
    async fn probe(&self, cx: &StepContext, _: FetchTpmInput) -> Verdict<PathBuf> {
        cx.may_repeat()
    }

    async fn undo(&self, _: &StepContext, input: FetchTpmInput, _: Option<PathBuf>) -> Result<(), Fault> {
        remove_tpm(&self.world, &input.domain).await
    }
}
