//! `keep-aside`: the folder in which a machine is kept, with its definition; and `forget-kept`: the folder is removed
//! once the machine has come back.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_workflow::ids::StepKind;
use vmkeep_workflow::{Class, Fault, Step, StepContext, Verdict};

use super::kept::{self, DEFINITION, RECORD, blocking, fixed};
use crate::codes;
use crate::image::root::RootError;
use crate::snapshot::Places;

/// Makes the folder.
#[derive(Debug)]
pub struct KeepAside(pub Places);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepInput {
    /// The folder.
    pub kept: PathBuf,
    /// The persistent definition.
    pub definition: String,
}

#[async_trait]
impl Step for KeepAside {
    const KIND: StepKind = StepKind::new("keep-aside", 1);
    type Input = KeepInput;
    type Output = ();

    async fn run(&self, _: &StepContext, input: KeepInput) -> Result<(), Fault> {
        let KeepInput { kept, definition } = input;
        let (doing, code) = ("keep the definition", codes::CANNOT_SAVE_XML);
        blocking(&self.0, code, doing, &kept.clone(), move |places| {
            let folder = places.roots.make_folder(&kept)?;
            kept::write(&folder, &fixed(DEFINITION), definition.as_bytes())
        })
        .await
    }

    /// Writing the same again does no harm.
    async fn probe(&self, cx: &StepContext, _: KeepInput) -> Verdict<()> {
        cx.may_repeat()
    }

    async fn undo(&self, _: &StepContext, input: KeepInput, _: Option<()>) -> Result<(), Fault> {
        clear(&self.0, input.kept).await
    }
}

async fn clear(places: &Places, kept: PathBuf) -> Result<(), Fault> {
    let doing = "remove what was kept aside";
    let code = codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION;
    let gone = blocking(places, code, doing, &kept.clone(), move |places| kept::remove(places, &kept)).await;
    gone.map_err(|fault| fault.class(Class::Transient))
}

/// Removes the folder.
#[derive(Debug)]
pub struct ForgetKept(pub Places);

/// What it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForgetInput {
    /// The folder.
    pub kept: PathBuf,
}

#[async_trait]
impl Step for ForgetKept {
    const KIND: StepKind = StepKind::new("forget-kept", 1);
    type Input = ForgetInput;
    type Output = ();

    async fn run(&self, _: &StepContext, input: ForgetInput) -> Result<(), Fault> {
        // The record first: from here on the machine is not kept aside, it is there.
        let (doing, code) =
            ("forget the machine that has come back", codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION);
        let kept = input.kept.clone();
        blocking(&self.0, code, doing, &input.kept, move |places| {
            let folder = match places.roots.open_folder(&kept) {
                Err(RootError::Missing { .. }) => return Ok(()),
                folder => folder?,
            };
            folder.remove_file(&fixed(RECORD))?;
            folder.sync()
        })
        .await?;
        clear(&self.0, input.kept).await
    }

    async fn probe(&self, cx: &StepContext, input: ForgetInput) -> Verdict<()> {
        if let Some(verdict) = cx.not_returned() {
            return verdict;
        }
        match self.0.roots.open_folder(&input.kept) {
            Err(RootError::Missing { .. }) => Verdict::Done(()),
            Ok(folder) => match folder.stat(&fixed(RECORD)) {
                Ok(Some(_)) => Verdict::NotDone,
                Ok(None) => Verdict::Partial(serde_json::json!({ "record": "gone" })),
                Err(e) => Verdict::Unknown(e.to_string()),
            },
            Err(e) => Verdict::Unknown(e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmkeep_workflow::Code;

    use super::*;
    use crate::codes::assert_told;
    use crate::image::root::Roots;
    use crate::snapshot::tests::context;

    struct Scene {
        _dir: tempfile::TempDir,
        places: Places,
        kept: PathBuf,
    }

    fn scene() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("kept/job");
        let places = Places { roots: Arc::new(Roots::open([dir.path()]).unwrap()) };
        Scene { _dir: dir, places, kept }
    }

    impl Scene {
        async fn keep(&self) -> Result<(), Fault> {
            let input = KeepInput { kept: self.kept.clone(), definition: "<domain/>".to_owned() };
            KeepAside(self.places.clone()).run(&context(1), input).await
        }

        async fn found(&self, code: Code) -> Fault {
            let fault = kept::find(&self.places, &self.kept).await.unwrap_err();
            assert_told(&fault, code, self.kept.to_str().unwrap());
            fault
        }
    }

    #[tokio::test]
    async fn a_definition_that_cannot_be_kept_is_named_before_anything_is_exchanged() {
        let scene = scene();
        std::fs::create_dir_all(scene.kept.join(DEFINITION).join("in the way")).unwrap();
        let fault = scene.keep().await.unwrap_err();
        assert_told(&fault, codes::CANNOT_SAVE_XML, scene.kept.to_str().unwrap());
        assert!(scene.kept.join(DEFINITION).is_dir());
    }

    #[tokio::test]
    async fn what_cannot_be_removed_of_what_was_kept_is_told_and_the_record_goes_last() {
        let scene = scene();
        scene.keep().await.unwrap();
        std::fs::write(scene.kept.join(RECORD), "{}").unwrap();
        std::fs::create_dir(scene.kept.join("stranger")).unwrap();
        let fault = clear(&scene.places, scene.kept.clone()).await.unwrap_err();
        assert_told(&fault, codes::NOT_ALL_FILES_DELETED_FROM_RETAIN_LOCATION, scene.kept.to_str().unwrap());
        assert!(fault.cause.contains("stranger"), "{fault}");
        assert!(scene.kept.join(RECORD).exists(), "it can be repeated");
        std::fs::remove_dir(scene.kept.join("stranger")).unwrap();
        clear(&scene.places, scene.kept.clone()).await.unwrap();
        assert!(!scene.kept.exists());
    }

    #[tokio::test]
    async fn a_machine_that_is_not_kept_and_one_whose_record_is_damaged_are_told_apart() {
        let scene = scene();
        let fault = scene.found(codes::CANNOT_WORK_ON_UNDEFINED_OBJECT).await;
        assert!(fault.remedy.contains("vmkeep status"), "{fault}");
        scene.keep().await.unwrap();
        std::fs::write(scene.kept.join(RECORD), "{ \"version\": 1, tor").unwrap();
        let fault = scene.found(codes::CANNOT_READ_XML_FILE).await;
        assert!(fault.cause.contains(RECORD), "{fault}");
        assert!(scene.kept.join(RECORD).exists() && scene.kept.join(DEFINITION).exists(), "nothing is lost");
    }
}
