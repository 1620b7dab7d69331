//! What does not exist is refused by name, and words that make no sense are a usage error; nothing changes.

use crate::support::Host;
use crate::support::bed::{Bed, small};

#[test]
fn what_does_not_exist_is_refused_by_name() {
    let bed = Bed::boot(&small("web1"));
    let _daemon = bed.host.daemon();
    let none = "00000000-0000-4000-8000-000000000000";
    for domain in ["web2", "WEB1", "web1 ", "", "*", "../web1", none, "$(id)", "wéb"] {
        bed.refused(
            &["snapshot", domain],
            23,
            &["CANNOT_FIND_MACHINE", "find the domain", domain, "vmkeep domains"],
        );
    }
    let words = &["NO_SUCH_DISK", "vdz", "web1", "virsh domblklist"];
    bed.refused(&["snapshot", "web1", "--disks", "vda,vdz"], 92, words);
    bed.refused(&["snapshot", "web1", "--disks", "../vda"], 92, &["NO_SUCH_DISK", "../vda"]);
    bed.refused(&["snapshot", "web1", "--disks", "vdz", "--dry-run"], 92, &["NO_SUCH_DISK"]);
    for verb in ["show", "verify"] {
        bed.refused(&[verb, "ffffffff"], 109, &["NO_SUCH_BACKUP", "ffffffff", "vmkeep list"]);
    }
    for verb in ["show", "watch", "explain", "history", "cancel", "pause", "resume", "settle", "abandon"] {
        bed.refused(&["job", verb, "ffffffff"], 66, &["NO_SUCH_JOB", "ffffffff"]);
    }
}

#[test]
fn words_that_make_no_sense_exit_64() {
    let host = Host::new();
    let _daemon = host.daemon();
    for args in [
        &[][..],
        &["bakcup", "web1"],
        &["snapshot"],
        &["snapshot", "web1", "--nosuch"],
        &["snapshot", "web1", "--live", "--disk-only"],
        &["snapshot", "web1", "--quiesce", "--no-quiesce"],
        &["snapshot", "web1", "--bandwidth", "fast"],
        &["snapshot", "web1", "--bandwidth", "-1"],
        &["snapshot", "web1", "--bandwidth", "99999999999G"],
        &["snapshot", "web1", "--memory-time", "soon"],
        &["snapshot", "web1", "--on-busy-memory", "panic"],
        &["snapshot", "web1", "--quiesce"],
        &["restore", "x"],
        &["restore", "x", "--as", "y", "--start", "--paused"],
        &["restore", "x", "--as", "y", "--disk", "vda"],
        &["restore", "x", "--as", "y", "--disk", "vda=/a", "--disk", "vda=/b"],
        &["jobs", "--state", "happy"],
        &["job"],
        &["diagram", "nosuch"],
    ] {
        host.fails(args, 64, &[]);
    }
    assert!(host.jobs().is_empty(), "{:#?}", host.jobs());
}
