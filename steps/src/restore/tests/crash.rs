//! The process ends before or after every event, and what the next one makes of it.

use vmkeep_workflow::ids::Phase;
use vmkeep_workflow::progress::Progress;
use vmkeep_workflow::{Step, StepContext};

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

/// The name comes before the output: whoever undoes a step that ended in between has the step's note alone.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_got_its_name_and_never_became_an_output_is_taken_back() {
    let host = Host::new();
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
    let step = RestoreImage(Places { roots: Arc::new(roots) });
    let cx = context(1);
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
