//! `snapshot --live` of a guest with 2 GiB of data, against the same acts by hand.
//!
//! By hand means a shell script: overlays made beforehand, `virsh` for the snapshot with memory, `cp` for both images at
//! once, `sync` of every file and folder, `virsh blockcommit --active --pivot` of each disk. It hashes nothing, writes no
//! manifest and keeps no journal, pivots the running guest, and would lose writes if the host died at the wrong moment:
//! what it leaves out is the price of being safe, and that is what is measured.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use replay_tests::testbed::{DiskSpec, Guest, GuestSpec, MIB};
use serde_json::Value;

use crate::support::Host;
use crate::table::{Row, Samples, Target};

const ROUNDS: usize = 5;
const NAME: &str = "web1";

/// Arguments: the backup's folder (new), the qcow2 image of vda, the raw image of vdb, libvirt's configuration folder.
const BY_HAND: &str = r#"
set -eu
folder=$1 a=$2 b=$3 definitions=$4
begin=${EPOCHREALTIME/./}
reached() { printf ' %s %d.%02d' "$1" $(((${EPOCHREALTIME/./} - begin) / 1000000)) $(((${EPOCHREALTIME/./} - begin) / 10000 % 100)); }
images=$(dirname "$a")
mkdir "$folder"
sync "$(dirname "$folder")"
qemu-img create -q -f qcow2 -F qcow2 -b "$a" "$images/hand-a.qcow2"
qemu-img create -q -f qcow2 -F raw -b "$b" "$images/hand-b.qcow2"
sync "$images/hand-a.qcow2" "$images/hand-b.qcow2" "$images"
virsh -q dumpxml --inactive web1 >"$folder/definition.xml"
virsh -q snapshot-create-as web1 --live --atomic --no-metadata --reuse-external \
    --memspec "file=$folder/memory,snapshot=external" \
    --diskspec "vda,snapshot=external,file=$images/hand-a.qcow2" \
    --diskspec "vdb,snapshot=external,file=$images/hand-b.qcow2" >/dev/null
sync "$folder/memory" "$definitions"
reached take
cp --sparse=auto "$a" "$folder/vda.qcow2" & first=$!
cp --sparse=auto "$b" "$folder/vdb.raw" & second=$!
wait "$first"
wait "$second"
reached cp
sync "$folder/vda.qcow2" "$folder/vdb.raw" "$folder/definition.xml" "$folder"
reached sync
virsh -q blockcommit web1 vda --active --pivot >/dev/null
virsh -q blockcommit web1 vdb --active --pivot >/dev/null
reached commit
sync "$a" "$b" "$definitions"
rm "$images/hand-a.qcow2" "$images/hand-b.qcow2"
sync "$images"
reached end
"#;

/// What a round took.
struct Round {
    /// Seconds.
    total: f64,
    /// The longest time between two ticks of the guest, in milliseconds of the host's clock.
    gap: f64,
}

fn measured(guest: &Guest, act: impl FnOnce()) -> Round {
    // What was written before must not be flushed at this side's expense.
    rustix::fs::sync();
    let from = guest.wait_more(5).expect("the guest ticks");
    let begin = Instant::now();
    act();
    let total = begin.elapsed();
    guest.wait_more(5).expect("the guest ticks on");
    let gap = guest.longest_gap(from).expect("ticks").host;
    Round { total: total.as_secs_f64(), gap: gap.as_secs_f64() * 1e3 }
}

fn by_hand(host: &Host, guest: &Guest) -> Round {
    let folder = host.hypervisor.dir().join("state/by-hand");
    let [a, b] = ["vda", "vdb"].map(|disk| guest.disk(disk).expect("a disk"));
    let definitions = host.hypervisor.dir().join("config/libvirt/qemu");
    let round = measured(guest, || {
        let mut shell = host.hypervisor.command("bash");
        shell.args(["-c", BY_HAND, "by-hand"]).args([&folder, &a, &b, &definitions]);
        let output = shell.output().expect("bash");
        assert!(output.status.success(), "by hand: {}", String::from_utf8_lossy(&output.stderr));
        eprintln!("bench: by hand:{}", String::from_utf8_lossy(&output.stdout));
    });
    fs::remove_dir_all(&folder).expect("removed");
    round
}

/// A backup by vmkeep; also for how long the guest stood still at the pivot, in milliseconds.
fn by_vmkeep(host: &Host, guest: &Guest) -> (Round, f64) {
    let round = measured(guest, || drop(host.ok(&["snapshot", NAME, "--live"])));
    let job = host.jobs()[0]["id"].as_str().expect("a job").to_owned();
    let shown = host.json(&["job", "show", &job]);
    assert_eq!(shown["job"]["status"], "succeeded", "{shown:#}");
    let pause = step(&shown, "pivot")["output"]["paused_us"].as_f64().expect("a pause at the pivot");
    report(host, &job);
    let backups = host.backups();
    assert_eq!(backups[0]["memory"], true, "the memory is in the backup");
    fs::remove_dir_all(Path::new(backups[0]["folder"].as_str().expect("a folder"))).expect("removed");
    (round, pause / 1e3)
}

fn step<'a>(shown: &'a Value, name: &str) -> &'a Value {
    let steps = shown["steps"].as_array().expect("steps");
    steps.iter().find(|step| step["name"] == name).unwrap_or_else(|| panic!("no step {name}: {shown:#}"))
}

/// Where the time went, for whoever reads along.
fn report(host: &Host, job: &str) {
    let history = host.history(job);
    let at = |row: &Value| row["event"]["at"].as_str().and_then(|at| at.parse::<jiff::Timestamp>().ok());
    let Some(begin) = history.first().and_then(at) else { return };
    let mut line = String::new();
    for row in &history {
        let body = &row["event"]["body"];
        if body["type"] == "step_succeeded"
            && let (Some(name), Some(at)) = (body["data"]["step"].as_str(), at(row))
        {
            let since = Duration::try_from(at.duration_since(begin)).unwrap_or_default();
            line.push_str(&format!(" {name} {:.2}", since.as_secs_f64()));
        }
    }
    eprintln!("bench: seconds after the request:{line}");
}

pub fn run() -> Vec<Row> {
    let host = Host::new();
    let spec = GuestSpec::new(NAME)
        .disk(DiskSpec::new(1792 * MIB).data(1536 * MIB))
        .disk(DiskSpec::new(640 * MIB).raw().data(512 * MIB));
    let guest = Guest::boot(&host.hypervisor, &spec).expect("a guest");
    let _daemon = host.daemon();
    let (mut total, mut gap, mut pause) = (Vec::new(), Vec::new(), Vec::new());
    let (mut total_by_hand, mut gap_by_hand) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        // Whoever comes second finds the machine as the first has left it: they take turns at that too.
        let first = (round % 2 == 1).then(|| by_hand(&host, &guest));
        let (ours, stood) = by_vmkeep(&host, &guest);
        let theirs = first.unwrap_or_else(|| by_hand(&host, &guest));
        eprintln!(
            "bench: snapshot round {round}: {:.2} s, gap {:.0} ms, pivot {stood:.0} ms; by hand {:.2} s, gap {:.0} ms",
            ours.total, ours.gap, theirs.total, theirs.gap
        );
        // The first round warms up.
        if round > 0 {
            total.push(ours.total);
            gap.push(ours.gap);
            pause.push(stood);
            total_by_hand.push(theirs.total);
            gap_by_hand.push(theirs.gap);
        }
    }
    let peer = "virsh, cp, sync";
    vec![
        Row::against(
            "snapshot: 2 GiB live",
            "s",
            &Samples(total),
            peer,
            &Samples(total_by_hand),
            Target::AtMost(1.2),
        ),
        Row::against(
            "snapshot: longest tick gap",
            "ms",
            &Samples(gap),
            peer,
            &Samples(gap_by_hand),
            Target::AtMost(1.2),
        ),
        Row::limit("snapshot: pause at the pivot of two disks", "ms", &Samples(pause), 250.0),
    ]
}
