//! How long a merge takes, against the bytes that the guest wrote and against the size of its image.
//!
//! A backup is begun and held up in its copying (one byte-rate for all would hide what is measured); the guest writes
//! so many bytes; the backup is cancelled, and then has nothing to do but to commit and to pivot. From the journal: the
//! time from the start of the first commit to the end of the pivot.

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB, data_offset};
use serde_json::Value;

use crate::support::{Host, about};
use crate::table::{Row, Samples, Target};

const ROUNDS: usize = 5;
/// What the guest writes: once, and eight times as much.
const WRITTEN: u64 = 96 * MIB;
/// What its image holds: once, and eight times as much.
const HELD: u64 = 768 * MIB;
const FEW: u64 = 8;

struct Subject {
    guest: Guest,
    offset: u64,
}

impl Subject {
    fn boot(host: &Host, name: &str, held: u64) -> Self {
        let size = held + 64 * MIB;
        // A slow tick: what the guest writes beside what it is told to would be counted too.
        let spec = GuestSpec::new(name).rate(2).disk(DiskSpec::new(size).raw().data(held));
        Self { guest: Guest::boot(&host.hypervisor, &spec).expect("a guest"), offset: data_offset(size) }
    }

    /// Seconds for merging so many bytes.
    fn merge(&self, host: &Host, bytes: u64, seed: usize) -> f64 {
        let job = host.begin(&["snapshot", self.guest.name(), "--disk-only", "--bandwidth", "1M"]);
        host.reached(&job, "step_succeeded", "take");
        self.guest.send(&format!("fill vda {} {bytes} {seed}", self.offset)).expect("written");
        rustix::fs::sync();
        host.ok(&["job", "cancel", &job, "--reason", "only the merge is measured"]);
        host.settled(&job);
        let history = host.history(&job);
        let find = |kind: &str, step: &str| {
            let row = history.iter().find(|row| about(row, kind, step));
            row.and_then(at).unwrap_or_else(|| panic!("no {kind} of {step}: {history:#?}"))
        };
        (find("step_succeeded", "pivot") - find("step_started", "commit/vda"))
            .total(jiff::Unit::Second)
            .expect("a time")
    }
}

fn at(row: &Value) -> Option<jiff::Timestamp> {
    row["event"]["at"].as_str()?.parse().ok()
}

pub fn run() -> Vec<Row> {
    let host = Host::new();
    let small = Subject::boot(&host, "small", HELD);
    let large = Subject::boot(&host, "large", FEW * HELD);
    let _daemon = host.daemon();
    let (mut least, mut more_written, mut more_held) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let took = [
            small.merge(&host, WRITTEN, round),
            small.merge(&host, FEW * WRITTEN, round),
            large.merge(&host, WRITTEN, round),
        ];
        eprintln!("bench: merge round {round}: {took:.3?} s");
        // The first round warms up.
        if round > 0 {
            least.push(took[0]);
            more_written.push(took[1]);
            more_held.push(took[2]);
        }
    }
    let (least, written, held) = (Samples(least), Samples(more_written), Samples(more_held));
    let peer = "96 MiB into 768 MiB";
    vec![
        Row::against("merge: 768 MiB into 768 MiB", "s", &written, peer, &least, Target::AtLeast(2.0)),
        Row::against("merge: 96 MiB into 6 GiB", "s", &held, peer, &least, Target::AtMost(1.25)),
    ]
}
