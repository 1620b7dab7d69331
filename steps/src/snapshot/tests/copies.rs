//! Copies that fail by themselves, and go on.

use std::path::Path;

use vmkeep_workflow::Step;

use super::context;
use super::fake::{Fake, domain};
use crate::image::copy::Identity;
use crate::image::qcow2::Format;
use crate::image::root::{Component, Roots};
use crate::image::space::LowWater;
use crate::snapshot::Places;
use crate::snapshot::copy::{CopyImage, CopyInput};

const SIZE: usize = 12 << 20;

pub(super) fn input(fake: &Fake, folder: &Path, bandwidth: u64) -> CopyInput {
    let source = folder.join("source.raw");
    if !source.exists() {
        std::fs::write(&source, vec![7; SIZE]).unwrap();
    }
    CopyInput {
        domain: domain(),
        disks: fake.disks(),
        low_water: LowWater { bytes: 0, percent: 0 },
        file: crate::image::chain::FileToCopy {
            identity: Identity::at(&source).unwrap(),
            source,
            format: Format::Raw,
            name: Component::literal("vda.raw".to_owned()),
            backing: None,
            virtual_size: SIZE as u64,
            data_bytes: SIZE as u64,
            rights: None,
        },
        folder: folder.to_owned(),
        bandwidth,
        taken: "take".into(),
    }
}

/// Another file may get the inode of one that is gone; what was noted of that one is forgotten before.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_begins_anew_forgets_how_far_an_earlier_one_came() {
    let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
    let places = Places { roots: std::sync::Arc::new(Roots::open([folder.path()]).unwrap()) };
    let step = CopyImage { world: fake.world(), places };
    let cx = context(2);
    cx.progress.save(&"how far an earlier one came").await.unwrap();
    cx.stop.cancel();
    step.run(&cx, input(&fake, folder.path(), 0)).await.unwrap_err();
    assert_ne!(cx.progress.saved().unwrap(), "how far an earlier one came");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_after_one_that_failed_by_itself_goes_on_where_that_was_durable() {
    for known in [true, false] {
        let (fake, folder) = (Fake::new(), tempfile::tempdir().unwrap());
        let places = Places { roots: std::sync::Arc::new(Roots::open([folder.path()]).unwrap()) };
        let step = CopyImage { world: fake.world(), places };
        let first = context(1);
        let (progress, stop) = (first.progress.clone(), first.stop.clone());
        let slow = input(&fake, folder.path(), 2 << 20);
        let watch = tokio::spawn(async move {
            while progress.amount().done < 2 << 20 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            stop.cancel();
        });
        let progress = first.progress.clone();
        step.run(&first, slow).await.unwrap_err();
        watch.await.unwrap();
        assert!(progress.saved().is_some());
        if !known {
            // A failed fsync: nothing is known to be durable.
            progress.save(&serde_json::Value::Null).await.unwrap();
        }
        // Without a probe in between there is nothing to resume but what the attempt itself has saved.
        let mut second = context(2);
        second.progress = progress;
        let output = step.run(&second, input(&fake, folder.path(), 0)).await.unwrap();
        assert_eq!(output.moved < SIZE as u64, known, "{} bytes were copied anew", output.moved);
        assert_eq!(output.hash, blake3::hash(&vec![7; SIZE]).to_hex().as_str());
    }
}
