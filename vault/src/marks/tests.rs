use super::*;
use crate::keys::wrap::{Cost, Credential, FEWEST_PASSES, LEAST_MEMORY};
use crate::keys::{KeyError, Role};
use crate::testing::{Bench, C, noise};

#[tokio::test]
async fn a_protection_keeps_from_pruning_until_it_is_ended_and_comes_too_late_after_a_prune() {
    let bench = Bench::new(true).await;
    let (one, _) = bench.full(&noise(1, C)).await;
    let (vault, by) = (&bench.vault, &Holder::default());
    let Protection::Stands(first) = protect(vault, one, by).await.unwrap() else { panic!() };
    let Protection::Stands(second) = protect(vault, one, by).await.unwrap() else { panic!() };
    let both = BTreeSet::from([first, second]);
    assert_eq!(prune(vault, one, "x").await.unwrap(), Pruned::Protected(both.clone()));
    assert_eq!(ask(vault, one, "x").await.unwrap(), Pruned::Protected(both));
    assert_eq!(ending(vault, one, first).await.unwrap(), Ending::Others([second].into()));
    unprotect(vault, one, first, "x").await.unwrap();
    assert_eq!(prune(vault, one, "x").await.unwrap(), Pruned::Protected([second].into()));
    assert_eq!(ending(vault, one, second).await.unwrap(), Ending::Harmless);
    unprotect(vault, one, second, "x").await.unwrap();
    let Pruned::Marked(mark) = prune(vault, one, "x").await.unwrap() else { panic!() };
    assert_eq!(prune(vault, one, "x").await.unwrap(), Pruned::Already(mark));
    let Protection::TooLate(late) = protect(vault, one, by).await.unwrap() else { panic!() };
    assert_eq!(ending(vault, one, late).await.unwrap(), Ending::LetsGo);
    assert!(matches!(protect(vault, BackupId::now(), by).await.unwrap(), Protection::Absent(_)));
}

#[tokio::test]
async fn a_writers_key_protects_and_asks_but_neither_prunes_nor_unprotects_and_a_forged_prune_is_none() {
    let bench = Bench::new(true).await;
    let (one, _) = bench.full(&noise(1, C)).await;
    let cost = Cost { memory: LEAST_MEMORY, passes: FEWEST_PASSES, lanes: 1 };
    let by = Credential::key_file(&[1; 32]);
    bench.vault.add_key(by.clone(), Role::Writer, cost, "host".into()).await.unwrap();
    let writer = Vault::attach(bench.backend.clone(), Some(by), None).await.unwrap();
    let refused = |error| matches!(error, VaultError::Key(KeyError::MayNotSign));
    assert!(refused(prune(&writer, one, "x").await.unwrap_err()));
    assert!(matches!(ask(&writer, one, "x").await.unwrap(), Pruned::Marked(_)));
    let Protection::Stands(mark) = protect(&writer, one, &Holder::default()).await.unwrap() else { panic!() };
    assert!(refused(unprotect(&writer, one, mark, "x").await.unwrap_err()));
    // A box as a writer can make one, without the signature.
    let asked = Marks::list(&writer).await.unwrap().of_kind(one, MarkKind::Ask).next().unwrap();
    let name = ObjectName::Mark(one, MarkKind::Ask, asked).to_string();
    let object = crate::backend::Backend::get(&*bench.backend, &name, None).await.unwrap().unwrap();
    let forged = ObjectName::Mark(one, MarkKind::Prune, asked);
    bench.vault.put(&forged, object).await.unwrap();
    let marks = Marks::list(&bench.vault).await.unwrap();
    assert!(marks.prunes(&bench.vault, one).await.unwrap().is_empty());
    assert_eq!(marks.protections(&bench.vault, one).await.unwrap(), [mark].into());
}
