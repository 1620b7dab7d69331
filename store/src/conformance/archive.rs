//! Export, import and verification.

use std::io::Cursor;
use std::sync::Arc;

use vmkeep_workflow::event::Body;
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::{EventStore, JobFilter, Record};

use super::sample::{Job, append, assert_whole, of, read};
use super::{Stage, small};
use crate::export::{Item, Part, ReadError, Reader, Selection, export};
use crate::import::{ImportError, Imported, import};
use crate::{MemoryStore, Store};

/// A journal with all that makes an export difficult.
async fn filled(stage: &Stage) -> (Arc<dyn Store>, Vec<Job>) {
    let store = stage.open();
    let mut jobs = vec![Job::new(), Job::new()];
    store.append(jobs[0].request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
    store.append(jobs[1].request(1, "restore", "db 'x'", None)).await.unwrap();
    store.append(jobs[0].next(2, vec![Body::JobRecovered, Body::JobRecovered])).await.unwrap();
    store.append(jobs[1].refuse(3)).await.unwrap();
    let texts = [
        r#"{"z":1,"a":1.0,"e":1e3,"u":"\u00fc","dup":1,"dup":2}"#,
        r#"  {"blanks":"around"} "#,
        "null",
        "not JSON at all",
        "\"\u{2028}\u{1f980}\u{7f}\"",
        "tab\there \\ \" \u{0} \u{1b} \r",
        "12345678901234567890123456789.000",
    ];
    let odd = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    store.append(of("odd\n\"name\" \u{1f980}", 0, odd)).await.unwrap();
    store.append(append("catalogue", 0, 3)).await.unwrap();
    (store, jobs)
}

async fn exported(store: &dyn Store, selection: Selection<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    export(store, selection, &mut bytes).await.unwrap();
    bytes
}

async fn all_records(store: &dyn Store) -> Vec<Record> {
    store.history(0, 10_000).await.unwrap().into_iter().map(|placed| placed.record).collect()
}

pub async fn an_export_taken_in_elsewhere_gives_the_same_journal(stage: &Stage) {
    let (store, jobs) = filled(stage).await;
    let text = exported(&*store, Selection::Whole).await;
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    let imported = import(&*other, &mut Cursor::new(&text)).await.unwrap();
    let records = all_records(&*store).await;
    assert_eq!(imported, Imported { records: records.len() as u64, present: 0, streams: 4 });
    assert_eq!(all_records(&*other).await, records, "byte for byte, and in the same order");
    let all = JobFilter::default();
    assert_eq!(other.jobs(&all).await.unwrap(), store.jobs(&all).await.unwrap());
    assert_eq!(other.key("nightly").await.unwrap(), Some(jobs[0].stream()));
    assert_whole(&*other).await;
}

pub async fn the_same_journal_is_exported_to_the_same_bytes(stage: &Stage) {
    let (store, _) = filled(stage).await;
    let text = exported(&*store, Selection::Whole).await;
    assert_eq!(exported(&*store, Selection::Whole).await, text);
    // With the same id and the same commits even across stores.
    let other = MemoryStore::with_id(store.id());
    import(&other, &mut Cursor::new(&text)).await.unwrap();
    let lines = |text: &[u8]| -> Vec<String> {
        String::from_utf8(text.to_vec()).unwrap().lines().skip(1).map(str::to_owned).collect()
    };
    assert_eq!(lines(&exported(&other, Selection::Whole).await), lines(&text));
}

pub async fn an_interrupted_import_is_repeated(stage: &Stage) {
    let (store, mut jobs) = filled(stage).await;
    let early = exported(&*store, Selection::Whole).await;
    store.append(jobs[0].next(9, vec![Body::JobRecovered])).await.unwrap();
    store.append(append("late", 0, 2)).await.unwrap();
    let text = exported(&*store, Selection::Whole).await;
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    import(&*other, &mut Cursor::new(&early)).await.unwrap();
    let present = all_records(&*other).await.len() as u64;
    let further = import(&*other, &mut Cursor::new(&text)).await.unwrap();
    assert_eq!(further, Imported { records: 3, present, streams: 5 });
    assert_eq!(import(&*other, &mut Cursor::new(&text)).await.unwrap().records, 0);
    // The older export is contained in what is there.
    assert_eq!(import(&*other, &mut Cursor::new(&early)).await.unwrap().records, 0);
    assert_eq!(other.job(jobs[0].id).await.unwrap(), jobs[0].summary);
    assert_whole(&*other).await;
}

pub async fn a_damaged_export_changes_nothing(stage: &Stage) {
    let (store, _) = filled(stage).await;
    let text = String::from_utf8(exported(&*store, Selection::Whole).await).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    let mut damaged: Vec<(String, String)> = Vec::new();
    for n in 0..lines.len() {
        let without: Vec<&str> =
            lines.iter().enumerate().filter(|(k, _)| *k != n).map(|(_, line)| *line).collect();
        damaged.push((format!("line {n} is gone"), without.join("\n") + "\n"));
        damaged.push((format!("cut off before line {n}"), lines[..n].join("\n") + "\n"));
        if n > 0 {
            let mut swapped = lines.clone();
            swapped.swap(n - 1, n);
            damaged.push((format!("line {n} is swapped"), swapped.join("\n") + "\n"));
        }
    }
    damaged.push(("cut off within the last line".to_owned(), text[..text.len() - 2].to_owned()));
    damaged.push(("the last line is not ended".to_owned(), text[..text.len() - 1].to_owned()));
    damaged.push(("something follows".to_owned(), format!("{text}{}\n", lines[1])));
    damaged.push(("a record is edited".to_owned(), text.replacen("web1", "web2", 1)));
    damaged.push(("a number is written anew".to_owned(), text.replacen("\"a\":1.0", "\"a\":1", 1)));
    damaged.push(("an unknown field".to_owned(), text.replacen("\"commit\":2", "\"new\":1,\"commit\":2", 1)));
    damaged.push(("nothing".to_owned(), String::new()));
    damaged.push(("something else".to_owned(), "{\"hello\":1}\n".to_owned()));
    for (what, text) in damaged {
        let outcome = import(&*other, &mut Cursor::new(&text)).await;
        assert!(matches!(outcome, Err(ImportError::Read(_))), "{what}: {outcome:?}");
        assert_eq!(other.streams().await.unwrap(), [], "{what}");
    }
    let newer = text.replacen("\"version\":1", "\"version\":2,\"unheard\":true", 1);
    let outcome = import(&*other, &mut Cursor::new(&newer)).await;
    assert!(
        matches!(outcome, Err(ImportError::Read(ReadError::TooNew { found: 2, known: 1 }))),
        "{outcome:?}"
    );
    import(&*other, &mut Cursor::new(&text)).await.unwrap();
}

pub async fn an_export_that_went_another_way_changes_nothing(stage: &Stage) {
    let (store, _) = filled(stage).await;
    let text = exported(&*store, Selection::Whole).await;
    let other = stage.engine().open(&stage.elsewhere(), small()).unwrap();
    other.append(of("catalogue", 0, vec![b"{}".to_vec()])).await.unwrap();
    let outcome = import(&*other, &mut Cursor::new(&text)).await;
    assert!(
        matches!(&outcome, Err(ImportError::Conflict { stream, seq: Seq(1) }) if stream.as_str() == "catalogue"),
        "{outcome:?}"
    );
    assert_eq!(all_records(&*other).await.len(), 1);

    let third = MemoryStore::new();
    let mut rival = Job::new();
    third.append(rival.request(0, "snapshot", "web1", Some("nightly"))).await.unwrap();
    let outcome = import(&third, &mut Cursor::new(&text)).await;
    assert!(
        matches!(&outcome, Err(ImportError::KeyTaken { holder, .. }) if *holder == rival.stream()),
        "{outcome:?}"
    );
    assert_eq!(third.streams().await.unwrap(), [rival.stream()]);
}

pub async fn one_stream_can_be_exported(stage: &Stage) {
    let (store, jobs) = filled(stage).await;
    let stream = jobs[0].stream();
    let text = exported(&*store, Selection::Parts(&[Part::whole(stream.clone())])).await;
    let mut reader = Reader::new(Cursor::new(&text)).unwrap();
    assert_eq!((reader.header().store, reader.header().whole), (store.id(), false));
    let mut records = Vec::new();
    while let Some(item) = reader.next_item().unwrap() {
        let Item::Record(record, None) = item else { panic!("{item:?}") };
        records.push(record);
    }
    assert_eq!(records, read(&*store, stream.as_str()).await);
    let other = MemoryStore::new();
    import(&other, &mut Cursor::new(&text)).await.unwrap();
    assert_eq!(other.job(jobs[0].id).await.unwrap(), jobs[0].summary);
    let none = [Part::whole(StreamId::from("none"))];
    assert!(export(&*store, Selection::Parts(&none), &mut Vec::new()).await.is_err());
}

pub async fn a_sound_journal_verifies_while_it_is_written(stage: &Stage) {
    let (store, mut jobs) = filled(stage).await;
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..200 {
                store.append(jobs[0].next(10 + n, vec![Body::JobRecovered])).await.unwrap();
                let mut further = Job::new();
                store.append(further.request(10 + n, "snapshot", "web1", None)).await.unwrap();
            }
        })
    };
    let mut checks = 0;
    while !writer.is_finished() || checks == 0 {
        assert_whole(&*store).await;
        checks += 1;
    }
    writer.await.unwrap();
    let report = crate::verify::verify(&*store).await.unwrap();
    assert_eq!((report.streams, report.jobs, report.found), (204, 202, 0));
    assert_eq!(report.records, all_records(&*store).await.len() as u64);
}
