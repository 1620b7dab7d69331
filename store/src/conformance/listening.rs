//! Subscribers: what they hear, in which order, and when.

use std::sync::Arc;

use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use vmkeep_workflow::ids::{Seq, StreamId};
use vmkeep_workflow::journal::Record;

use super::Stage;
use super::sample::{append, of};
use crate::SUBSCRIBER_LAG;

pub async fn subscribers_hear_all_records_in_the_order_of_their_commits(stage: &Stage) {
    let store = stage.open();
    store.append(append("before", 0, 1)).await.unwrap();
    let mut ears = [store.subscribe(), store.subscribe()];
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let name = format!("writer {writer}");
                for n in 0..10 {
                    store.append(append(&name, 2 * n, 2)).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let history = store.history(0, 1000).await.unwrap();
    let expected: Vec<Record> = history.into_iter().skip(1).map(|placed| placed.record).collect();
    assert_eq!(expected.len(), 320);
    for ear in &mut ears {
        let mut heard = Vec::new();
        while let Ok(record) = ear.try_recv() {
            heard.push(record);
        }
        assert_eq!(heard, expected, "all that was acknowledged has been heard, in order");
    }
}

pub async fn what_is_heard_can_be_read(stage: &Stage) {
    let store = stage.open();
    let mut ear = store.subscribe();
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..50 {
                store.append(append("a", n, 1)).await.unwrap();
            }
        })
    };
    for n in 1..=50 {
        let heard = ear.recv().await.unwrap();
        assert_eq!(heard.seq, Seq(n));
        let found = store.read(&heard.stream, heard.seq, 1).await.unwrap();
        assert_eq!(found, [heard], "nobody hears of a record before it is there");
    }
    writer.await.unwrap();
}

pub async fn what_was_refused_is_not_heard(stage: &Stage) {
    let store = stage.open();
    let mut holder = append("holder", 0, 1);
    holder.key = Some("key".to_owned());
    store.append(holder).await.unwrap();
    let mut ear = store.subscribe();
    store.append(append("a", 1, 1)).await.unwrap_err();
    store.append(of("a", 0, vec![b"\n".to_vec()])).await.unwrap_err();
    let mut taken = append("a", 0, 1);
    taken.key = Some("key".to_owned());
    store.append(taken).await.unwrap_err();
    assert_eq!(ear.try_recv(), Err(TryRecvError::Empty));
    store.append(append("a", 0, 1)).await.unwrap();
    assert_eq!(ear.try_recv().unwrap().stream, StreamId::from("a"));
}

pub async fn a_subscriber_that_lags_is_told(stage: &Stage) {
    let store = stage.open();
    let mut ear = store.subscribe();
    let many = SUBSCRIBER_LAG as u64 + 10;
    store.append(append("a", 0, many)).await.unwrap();
    let Err(RecvError::Lagged(missed)) = ear.recv().await else { panic!("it was not told") };
    assert!(missed >= 10);
    // After that it hears on from the oldest that is kept.
    assert_eq!(ear.recv().await.unwrap().seq, Seq(missed + 1));
}
