//! The process ends before or after every event, and what the next one makes of it.

use super::*;
use crate::mortal::{Life, finish, live};

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
