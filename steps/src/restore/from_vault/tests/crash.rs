//! The process ends before or after every event, and what the next one makes of it.

use super::*;
use crate::mortal::{Life, finish, live};

fn at_every_event(prepare: impl Fn(&Host), more: &Value, check: impl Fn(&str, &Host, &JobView, DomainId)) {
    for after in [false, true] {
        for event in 1.. {
            assert!(event < 200, "the job never ends");
            let runtime = tokio::runtime::Runtime::new().unwrap();
            let host = runtime.block_on(Host::new());
            prepare(&host);
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
fn a_restore_from_a_vault_that_dies_at_any_event_ends_whole() {
    for format in [Format::Raw, Format::Qcow2] {
        let more = json!({ "then": "running", "format": format.as_str() });
        at_every_event(
            |_| {},
            &more,
            |case, host, view, id| {
                assert_eq!(view.summary.status, JobStatus::Succeeded, "{case}: {:?}", view.summary.fault);
                // The invented guest has written behind the end of its image, which only a raw one survives.
                if format == Format::Raw {
                    host.assert_restored(case, id, format);
                }
                assert!(!host.hypervisor.inner().running[&id].paused, "{case}");
                let left = host.everything().into_iter().filter(|path| path.contains("/.vmkeep-"));
                assert_eq!(left.collect::<Vec<_>>(), Vec::<String>::new(), "{case}");
            },
        );
    }
}

#[test]
fn a_restore_from_a_vault_that_fails_and_dies_at_any_event_of_its_way_back_leaves_nothing() {
    at_every_event(
        |host| host.hypervisor.inner().fail = vec!["start"; 10],
        &json!({ "then": "running" }),
        |case, host, view, _| {
            let fault = &view.summary.fault;
            assert_eq!(view.summary.status, JobStatus::RolledBack, "{case}: {fault:?}");
            let left: Vec<_> = host.everything().into_iter().filter(|p| p.contains("images/")).collect();
            assert_eq!(left, Vec::<String>::new(), "{case}");
            assert!(host.hypervisor.inner().defined.is_empty(), "{case}");
        },
    );
}
