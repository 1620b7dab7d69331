//! The memory of a guest: taken at the instant of the disks, or left out or given up as the caller chose.

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};

use crate::support::bed::*;

#[test]
fn memory_that_takes_too_long_ends_as_the_caller_chose_and_the_guest_runs_on() {
    let disk = || DiskSpec::new(32 * MIB);
    let bed = Bed::boot(&GuestSpec::new("web1").disk(disk()).disk(disk().raw()).memory_mib(384));
    let host = &bed.host;
    let _daemon = host.daemon();
    // Faster than any disk: the save would never end by itself.
    bed.guest.send("mem 256 0").unwrap();
    for (choice, status, consistency) in [
        ("pause", "succeeded", Some("memory-and-disks")),
        ("disk-only", "succeeded", Some("crash")),
        ("fail", "rolled_back", None),
    ] {
        println!("{choice}");
        let job = host.begin(&["snapshot", "web1", "--memory-time", "1s", "--on-busy-memory", choice]);
        let code = if consistency.is_some() { 0 } else { 97 };
        assert_eq!(ended(host, &job), (status.to_owned(), code), "{}", host.ok(&["job", "explain", &job]));
        bed.assert_back_home();
        match consistency {
            Some(consistency) => {
                let backup = backup_of(host, &job);
                assert_eq!(manifest_of(&backup)["consistency"], consistency);
                judge_backup(host, &backup);
            }
            None => assert!(host.backups().iter().all(|backup| backup["job"] != *job)),
        }
    }
    bed.guest.send("mem 0").unwrap();
    bed.judge_disks();
}
