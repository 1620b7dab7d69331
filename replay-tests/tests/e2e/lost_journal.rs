//! A journal that was lost, or put back from an older copy, while a backup job goes on in QEMU: what it costs is told, the guest
//! is looked after, and the job is ended on demand where nobody can miss it.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use replay_tests::testbed::MIB;

use crate::leftovers::{about_it, note, told};
use crate::support::bed::{Bed, give, large};
use crate::support::{Host, assert_untouched, files_below, until};
use crate::vault::{bed, checkpoints, cramped};

fn store(host: &Host) -> PathBuf {
    host.hypervisor.dir().join("state/vmkeep/store")
}

/// The journal as it is now, to be put back later. vmkeepd does not run.
struct Older(BTreeMap<PathBuf, Vec<u8>>);

impl Older {
    fn of(host: &Host) -> Self {
        let read = |path: PathBuf| (path.clone(), fs::read(path).unwrap());
        Self(files_below(&store(host)).into_iter().map(read).collect())
    }

    fn put_back(&self, host: &Host) {
        for path in files_below(&store(host)) {
            fs::remove_file(path).unwrap();
        }
        for (path, bytes) in &self.0 {
            fs::write(path, bytes).unwrap();
            give(host, path);
        }
    }
}

pub(crate) fn scratch(host: &Host) -> Vec<PathBuf> {
    let mut files = files_below(host.hypervisor.dir());
    files.retain(|path| path.extension().is_some_and(|ending| ending == "scratch"));
    files
}

pub(crate) fn is_pulled(bed: &Bed) -> bool {
    !bed.guest.virsh("domjobinfo", &[]).unwrap().contains("None")
}

/// What the doctor says is to be done about a note that nobody takes away any more.
fn unmark(bed: &Bed) {
    for which in ["--live", "--config"] {
        bed.guest.virsh("metadata", &["--uri", "urn:vmkeep:job:1", "--remove", which]).unwrap();
    }
}

/// A backup that is being read when vmkeepd dies, and a vmkeepd that knows nothing of it; the job's short id.
fn forgotten(bed: &Bed, older: &Older) -> String {
    let host = &bed.host;
    let daemon = host.daemon();
    let job = host.begin(&["backup", "web1", "--bandwidth", "2M"]);
    host.reached(&job, "step_started", "read");
    daemon.kill();
    older.put_back(host);
    assert!(is_pulled(bed));
    job.rsplit('-').next().unwrap().to_owned()
}

#[test]
fn a_backup_job_that_an_older_journal_does_not_know_is_told_and_ended_unless_it_may_be_anothers() {
    let bed = bed(&large("web1"));
    let host = &bed.host;
    assert_eq!(host.daemon().end(), Some(0));
    let older = Older::of(host);

    let short = forgotten(&bed, &older);
    let daemon = host.daemon();
    let (grade, text, remedy) =
        about_it(&told(host), &["a backup job on web1", &short, "does not know"]).clone();
    assert_eq!((grade.as_str(), remedy.as_str()), ("bad", "vmkeep doctor --repair"));
    assert!(text.contains("grows") && text.contains("nobody can save, migrate or back up"), "{text}");
    assert!(is_pulled(&bed), "nobody has asked for its end");
    host.ok(&["doctor", "--repair"]);
    assert!(!is_pulled(&bed));
    assert_eq!(scratch(host), Vec::<PathBuf>::new());
    daemon.kill();

    // As another vmkeep's looks, whose note is in the domain.
    let short = forgotten(&bed, &older);
    let daemon = host.daemon();
    note(&bed, &format!("<job store='01234567-89ab-cdef-0123-456789abcdef' job='another-{short}'/>"));
    let (grade, text, remedy) = about_it(&told(host), &["a backup job on web1", &short]).clone();
    assert_eq!(grade, "warning");
    assert!(text.contains("another vmkeep (store 01234567") && remedy.contains("virsh metadata"), "{remedy}");
    assert!(host.ok(&["doctor", "--repair"]).contains("nothing that can safely be taken away"));
    assert!(is_pulled(&bed));
    unmark(&bed);
    host.ok(&["doctor", "--repair"]);
    assert!(!is_pulled(&bed));
    assert_eq!(scratch(host), Vec::<PathBuf>::new());

    // Neither has left anything in the way of the next backup, which takes their checkpoints along.
    assert_eq!(checkpoints(&bed).len(), 2);
    host.ok(&["backup", "web1"]);
    assert_eq!(checkpoints(&bed).len(), 1);
    bed.guest.wait_more(3).unwrap();
    assert_untouched(&bed.guest, &bed.own);
    daemon.kill();
}

#[test]
fn a_guest_whose_backup_job_nobody_knows_is_looked_after_while_room_runs_low() {
    let Some(bed) = cramped() else { return };
    let (host, mount) = (&bed.host, bed.mount());
    assert_eq!(host.daemon().end(), Some(0));
    let older = Older::of(host);
    let before = files_below(&mount.0);
    forgotten(&bed, &older);
    let _daemon = host.daemon();
    mount.fill(200 * MIB);
    until("the backup job to be ended", || (!is_pulled(&bed)).then_some(()));
    mount.clear();
    until("its scratch files to be gone", || (files_below(&mount.0) == before).then_some(()));
    until("it to be in the log", || host.log().contains("no job here goes on with").then_some(()));
    bed.guest.wait_more(3).unwrap();
    unmark(&bed);
    assert_untouched(&bed.guest, &bed.own);
}

#[test]
fn a_guest_that_stands_still_because_of_a_lost_backup_job_runs_again_when_a_vmkeepd_without_any_journal_starts()
 {
    let Some(bed) = cramped() else { return };
    let (host, mount) = (&bed.host, bed.mount());
    // Another store: its note in the domain is a stranger's now.
    forgotten(&bed, &Older(BTreeMap::new()));
    mount.fill(0);
    bed.guest.wait_state("paused").unwrap();
    let _daemon = host.daemon();
    bed.guest.wait_state("running").unwrap();
    assert!(!is_pulled(&bed));
    mount.clear();
    bed.guest.wait_more(5).unwrap();
    unmark(&bed);
    assert_untouched(&bed.guest, &bed.own);
}
