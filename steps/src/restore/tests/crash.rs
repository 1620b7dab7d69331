//! The process ends before or after every event, and what the next one makes of it.

use tokio_util::sync::CancellationToken;
use vmkeep_workflow::ids::Phase;
use vmkeep_workflow::progress::Progress;
use vmkeep_workflow::{Step, StepContext, Verdict};

use super::*;
use crate::image::rights::Wish;
use crate::image::root::Component;
use crate::manifest::Role;
use crate::mortal::{Life, finish, live};
use crate::restore::fetch::Wanted;
use crate::restore::image::{ImageInput, RestoreImage};
use crate::snapshot::tests::context;

fn at_every_event(prepare: impl Fn() -> Host, more: &Value, check: impl Fn(&str, &Host, &JobView, DomainId)) {
    for after in [false, true] {
        for event in 1.. {
            assert!(event < 200, "the job never ends");
            let host = prepare();
            let inner = Arc::new(MemoryStore::new());
            let (mut request, id) = request(host.options(more));
            request.key = Some("the same request".to_owned());
            let engine = |store| host.engine(store);
            let life = live(&engine, &inner, &request, event, after);
            let view = finish(&engine, &inner, &request);
            let side = if after { "after" } else { "before" };
            check(&format!("{side} event {event}"), &host, &view, id);
            if matches!(life, Life::Ended) {
                break;
            }
        }
    }
}

#[test]
fn a_restore_that_dies_at_any_event_ends_whole_and_memory_never_meets_disks_that_moved_on() {
    at_every_event(
        || Host::new().with_original(),
        &json!({ "then": "running" }),
        |case, host, view, id| {
            assert_eq!(view.summary.status, JobStatus::Succeeded, "{case}: {:?}", view.summary.fault);
            host.assert_restored(id);
            let running = host.hypervisor.inner().running[&id].clone();
            assert!(!running.paused, "{case}");
            assert!(running.pulled || !running.memory, "{case}: its cables are in");
        },
    );
}

#[test]
fn a_cold_restore_that_dies_at_any_event_ends_whole() {
    at_every_event(Host::new, &json!({ "cold": true }), |case, host, view, id| {
        assert_eq!(view.summary.status, JobStatus::Succeeded, "{case}: {:?}", view.summary.fault);
        host.assert_restored(id);
        assert!(host.hypervisor.inner().running.is_empty(), "{case}");
    });
}

#[test]
fn a_restore_that_fails_and_dies_at_any_event_of_its_way_back_leaves_nothing() {
    at_every_event(
        || {
            let host = Host::new().with_original();
            host.hypervisor.inner().fail = vec!["start_from_memory"; 10];
            host
        },
        &json!({ "then": "running" }),
        |case, host, view, _| {
            let fault = &view.summary.fault;
            assert_eq!(view.summary.status, JobStatus::RolledBack, "{case}: {fault:?}");
            let left: Vec<_> = host.everything().into_iter().filter(|p| p.contains("images/")).collect();
            assert_eq!(left, Vec::<String>::new(), "{case}");
            assert_eq!(host.hypervisor.inner().defined.len(), 1, "{case}: only the original");
        },
    );
}

/// One image of the backup, restored by its step alone.
fn one_image(host: &Host) -> (RestoreImage, ImageInput) {
    let entry = samples::entry(&samples::folder(&host.backup()), "vdb.raw", Role::Disk);
    let input = ImageInput {
        wanted: Wanted {
            backup: host.backup(),
            outside: false,
            name: entry.name.clone(),
            size: entry.size,
            blake3: entry.blake3,
        },
        format: Format::Raw,
        virtual_size: entry.size,
        folder: host.at("images"),
        own: false,
        name: Component::literal("vdb.raw".to_owned()),
        backing: None,
        bandwidth: 0,
        rights: Wish::default(),
    };
    let roots = Roots::open([host.at("backups"), host.at("images")]).unwrap();
    (RestoreImage(Places { roots: Arc::new(roots) }), input)
}

/// A power cut may take the name of a whole file, and the next one get its inode.
#[tokio::test(flavor = "multi_thread")]
async fn a_note_never_speaks_for_another_file_than_the_one_that_was_whole() {
    let host = Host::new();
    let ((step, input), cx) = (one_image(&host), context(1));
    let whole = step.run(&cx, input.clone()).await.unwrap();
    let content = std::fs::read(&whole.path).unwrap();
    // The inode is the same, and half of it was never written.
    std::fs::File::options().write(true).open(&whole.path).unwrap().set_len(512).unwrap();
    assert!(matches!(step.probe(&cx, input.clone()).await, Verdict::NotDone));
    let aside = crate::restore::place::aside(cx.job, input.name.as_str());
    std::fs::rename(&whole.path, host.at("images").join(aside.as_str())).unwrap();
    // Before anything is made anew.
    cx.stop.cancel();
    step.run(&cx, input.clone()).await.unwrap_err();
    assert!(!whole.path.exists(), "it was taken for whole");
    assert_ne!(cx.progress.saved().unwrap()["stage"], "placing");
    let cx = StepContext { stop: CancellationToken::new(), ..cx };
    step.run(&cx, input).await.unwrap();
    assert!(std::fs::read(&whole.path).unwrap() == content);
}

/// The name comes before the output: whoever undoes a step that ended in between has the step's note alone.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_got_its_name_and_never_became_an_output_is_taken_back() {
    let host = Host::new();
    let ((step, input), cx) = (one_image(&host), context(1));
    let before = host.everything();
    step.run(&cx, input.clone()).await.unwrap();
    assert!(host.at("images/vdb.raw").exists());
    let undo = StepContext {
        phase: Phase::Undo,
        left: cx.progress.saved(),
        progress: Progress::detached(),
        ..cx.clone()
    };
    step.undo(&undo, input, None).await.unwrap();
    assert_eq!(host.everything(), before);
}
