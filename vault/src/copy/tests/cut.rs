//! Copies that are cut off, and go on.

use super::*;

/// Two backups, the second of them incremental, with a stream's worth of other bytes.
async fn source() -> (Bench, Vec<(BackupId, Vec<u8>)>) {
    let from = vault(false, false).await;
    let image = noise(1, 4 * C + 9);
    let (first, _) = from.full(&image).await;
    let mut next = image.clone();
    next[C..2 * C].copy_from_slice(&noise(2, C));
    let (second, _) = Box::pin(from.backup(next.len(), difference(&image, &next), Some(first))).await;
    (from, vec![(first, image), (second, next)])
}

#[tokio::test]
async fn a_copy_that_is_cut_off_at_any_call_goes_on_and_no_blob_counts_twice() {
    let (from, backups) = source().await;
    // Where it is cut off; and whether a put that was not answered has come through.
    for (there, late) in [(true, false), (true, true), (false, false)] {
        let mut calls = 0;
        loop {
            let to = vault(true, false).await;
            let cut = if there { &to } else { &from };
            let way = Arc::new(Way::breaking(cut.backend.clone(), calls, late));
            let through = cut.vault.by(way.clone());
            let (here, other) = if there { (&from.vault, &through) } else { (&through, &to.vault) };
            let ended = Box::pin(copy(here, other, &Choice::All, Options::default())).await;
            assert!(way.broke() || ended.is_ok(), "{ended:?}");

            let report = copied(&from.vault, &to.vault, &Choice::All).await;
            assert_eq!((report.fates.len(), report.refused().count()), (2, 0), "{report:?}");
            for (id, image) in &backups {
                assert!(restored(&to.vault, *id).await == *image, "{there} {late} {calls}");
            }
            let all = Backups::load(&to.vault, None).await.unwrap();
            assert!(backups.iter().all(|(id, _)| all.has(*id, MarkKind::Checked)));
            let index = Index::load(&to.vault, None).await.unwrap();
            let mut seen = HashSet::new();
            for state in index.states().iter().filter(|state| state.usable) {
                for (id, place) in index.places_of(state.id).await.unwrap() {
                    assert!(seen.insert(id), "{place:?} of {id} is one too many: {there} {late} {calls}");
                }
            }
            // One of each backup, and one that the first copy had put and no run named.
            assert!(to.names("data/").await.len() <= 3, "{there} {late} {calls}");
            if !way.broke() {
                break;
            }
            calls += 1;
        }
        assert!(calls > if there { 40 } else { 10 }, "{calls}");
    }
}

#[tokio::test]
async fn a_process_that_died_is_gone_on_for_with_the_packs_that_no_run_names() {
    let (from, backups) = source().await;
    let to = vault(true, false).await;
    let way = Arc::new(Way::new(to.backend.clone()));
    way.hang_at("index/");
    let hook = Arc::new(Hook::new(&to.vault, Deed::Nothing));
    let options = Options { progress: hook.clone(), log: hook.clone(), ..Options::default() };
    let (here, there, with) = (from.vault.clone(), to.vault.by(way.clone()), options.clone());
    let copying = tokio::spawn(async move { Box::pin(copy(&here, &there, &Choice::All, with)).await });
    way.hung.notified().await;
    copying.abort();
    assert!(copying.await.unwrap_err().is_cancelled());
    let packs = to.names("data/").await.len();
    let in_flight = hook.in_flight.lock().unwrap().clone();
    assert_eq!((packs, in_flight.len(), to.names("index/").await.len()), (1, 1, 0));

    let lease = hook.begun()[0];
    let options = Options { resume: Some(Resume { lease, in_flight }), ..options };
    let report = Box::pin(copy(&from.vault, &to.vault, &Choice::All, options)).await.unwrap();
    assert_eq!(amount(&report, backups[0].0).new, 0, "what was put is durable progress");
    assert_eq!((hook.begun()[1], to.names("data/").await.len()), (lease, packs + 1));
    assert_eq!(*hook.fates.lock().unwrap(), report.fates);
    for (id, image) in &backups {
        assert!(restored(&to.vault, *id).await == *image);
    }
    assert!(is_clean(&to.vault).await);
}

#[tokio::test]
async fn a_lease_of_a_process_that_died_is_revoked_where_nothing_is_left_to_do() {
    let (from, _) = source().await;
    let to = vault(true, false).await;
    copied(&from.vault, &to.vault, &Choice::All).await;
    let dead = Lease::begin(&to.vault, &Holder::default()).await.unwrap().id();
    let resume = || Some(Resume { lease: dead, in_flight: Vec::new() });
    let options = Options { resume: resume(), ..Options::default() };
    Box::pin(copy(&from.vault, &to.vault, &Choice::All, options)).await.unwrap();
    assert!(crate::lease::all(&to.vault).await.unwrap()[&dead].is_over());
    // And one that somebody has revoked is no reason to fail.
    let other = vault(true, false).await;
    let dead = Lease::begin(&other.vault, &Holder::default()).await.unwrap().id();
    lease::revoke(&other.vault, dead, &Holder::default()).await.unwrap();
    let resume = Some(Resume { lease: dead, in_flight: Vec::new() });
    let options = Options { resume, ..Options::default() };
    let report = Box::pin(copy(&from.vault, &other.vault, &Choice::All, options)).await.unwrap();
    assert_eq!(report.refused().count(), 0);
}

#[tokio::test]
async fn a_vault_that_nobody_may_put_into_is_copied_from_without_a_lease() {
    #[derive(Debug)]
    struct ReadOnly(Arc<dyn Backend>);

    #[async_trait]
    impl Backend for ReadOnly {
        async fn put(&self, name: &str, _: bytes::Bytes) -> Result<(), crate::backend::BackendError> {
            let kind = BackendErrorKind::Denied;
            Err(crate::backend::BackendError::new("read-only", name, kind, "no"))
        }

        async fn get(
            &self,
            name: &str,
            range: Option<std::ops::Range<u64>>,
        ) -> Result<Option<bytes::Bytes>, crate::backend::BackendError> {
            self.0.get(name, range).await
        }

        async fn list(
            &self,
            prefix: &str,
        ) -> Result<Vec<crate::backend::Listed>, crate::backend::BackendError> {
            self.0.list(prefix).await
        }

        async fn delete(&self, name: &str) -> Result<(), crate::backend::BackendError> {
            self.put(name, bytes::Bytes::new()).await
        }

        fn place(&self) -> &str {
            "read-only"
        }
    }

    let (from, backups) = source().await;
    let to = vault(true, false).await;
    let medium = from.vault.by(Arc::new(ReadOnly(from.backend.clone())));
    // Damage cannot be told either, and is no reason to end.
    let packs = from.names("data/").await;
    for pack in packs {
        let pack_of_second = from.size(&pack).await < 3 * C as u64;
        if pack_of_second {
            from.flip(&pack, C / 2).await;
        }
    }
    let report = copied(&medium, &to.vault, &Choice::All).await;
    let [(id, Refusal::Damaged(_))] = report.refused().collect::<Vec<_>>()[..] else { panic!("{report:?}") };
    assert_eq!(id, backups[1].0);
    assert!(restored(&to.vault, backups[0].0).await == backups[0].1);
}
