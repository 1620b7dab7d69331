//! The memory of a guest: taken at the instant of the disks, or left out or given up as the caller chose.

use replay_tests::testbed::{DiskSpec, GuestSpec, MIB};

use crate::support::bed::*;

#[test]
fn memory_that_takes_too_long_ends_as_the_caller_chose_and_the_guest_runs_on() {
    for (choice, status, consistency) in [
        ("pause", "succeeded", Some("memory-and-disks")),
        ("disk-only", "succeeded", Some("crash")),
        ("fail", "rolled_back", None),
    ] {
        println!("{choice}");
        // Each a guest of its own: a save slows down whoever dirties memory for a while after it.
        let disk = || DiskSpec::new(32 * MIB);
        let bed = Bed::boot(&GuestSpec::new("web1").disk(disk()).disk(disk().raw()).memory_mib(2600));
        let host = &bed.host;
        // So much memory needs room enough; what else must stay free of a large disk is left out.
        configure(host, "[limits]\nkeep_free = \"256M\"\nkeep_free_percent = 0\n");
        let _daemon = host.daemon();
        // More than can be written before vmkeepd looks for the first time, and some of it changes all the time.
        bed.guest.send("hold 2000 7").unwrap();
        bed.guest.send("mem 100 0").unwrap();
        let job = host.begin(&["snapshot", "web1", "--memory-time", "0s", "--on-busy-memory", choice]);
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
        bed.guest.send("mem 0").unwrap();
        bed.judge_disks();
    }
}
