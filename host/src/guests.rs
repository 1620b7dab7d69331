//! What was done to keep a guest safe where no journal of a job can tell of it: the job is over, or is not known here.
//!
//! The stream `guests` of the store, in its hash chain, appended to only. The stored form is that of a job's events:
//! `{"v":1,"at":…,"body":{"type":"intervened","data":{"domain":…,"name":…,"job":…,"act":…,"outcome":…}}}`. Nothing is
//! decided by it.

use jiff::Timestamp;
use serde_json::json;
use vmkeep_steps::hypervisor::DomainRef;
use vmkeep_workflow::journal::{Append, AppendError, Record};
use vmkeep_workflow::{EventStore, Fault, Seq, StreamId};

/// The name of the stream.
pub const STREAM: &str = "guests";
/// How often an append is tried whose stream ended elsewhere than expected.
const TRIES: usize = 5;

/// Writes down what was done. The act itself never waits for this.
///
/// # Errors
/// When the store does not take it.
pub async fn intervened(
    store: &dyn EventStore,
    domain: &DomainRef,
    job: Option<&str>,
    act: &str,
    outcome: &str,
) -> Result<(), AppendError> {
    let stream = StreamId::from(STREAM);
    let data =
        json!({ "domain": domain.id, "name": domain.name, "job": job, "act": act, "outcome": outcome });
    let event = json!({ "v": 1, "at": Timestamp::now(), "body": { "type": "intervened", "data": data } });
    let mut tried = 0;
    loop {
        let last = store.last(&stream).await.map_err(|e| AppendError::Rejected(e.to_string()))?;
        let records = vec![event.to_string().into_bytes()];
        let append = Append { stream: stream.clone(), expected: last, records, summary: None, key: None };
        match store.append(append).await {
            Ok(_) => return Ok(()),
            Err(AppendError::Conflict { .. }) if tried < TRIES => tried += 1,
            Err(error) => return Err(error),
        }
    }
}

/// The records of the stream.
///
/// # Errors
/// When the store cannot be read.
pub async fn history(store: &dyn EventStore) -> Result<Vec<Record>, Fault> {
    let read = store.read(&StreamId::from(STREAM), Seq(1), 0).await;
    read.map_err(|e| e.fault("read what was done for guests", STREAM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmkeep_steps::hypervisor::DomainId;

    #[tokio::test]
    async fn what_was_done_is_there_in_its_order() {
        let store = vmkeep_store::MemoryStore::new();
        let domain = DomainRef { id: DomainId(uuid::Uuid::from_u128(7)), name: "web".to_owned() };
        for act in ["thawed the guest", "resumed the guest"] {
            intervened(&store, &domain, None, act, "done").await.unwrap();
        }
        let records = history(&store).await.unwrap();
        let acts: Vec<serde_json::Value> =
            records.iter().map(|record| serde_json::from_slice(&record.bytes).unwrap()).collect();
        assert_eq!(acts[0]["body"]["data"]["act"], "thawed the guest");
        assert_eq!(acts[1]["body"]["data"]["name"], "web");
        assert_eq!(acts.len(), 2);
    }
}
