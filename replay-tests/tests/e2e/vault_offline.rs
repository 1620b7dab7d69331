//! Restores without vmkeepd: on a host that has never had one, the domain boots on what a vault and its key give back.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;

use replay_tests::testbed::Guest;

use crate::support::bed::small;
use crate::support::{assert_ticks, disks, files_below};
use crate::vault_restore::{back_up, bed, move_out};

#[test]
fn a_host_without_vmkeepd_brings_the_domain_back_and_it_boots_although_the_restore_was_killed() {
    let (bed, sealed) = bed(&small("web1"));
    let daemon = bed.host.daemon();
    let (id, tick) = back_up(&bed);
    daemon.end();
    let (other, here, _consoles) = move_out(bed, &sealed);

    let (url, key) = (format!("file://{}", here.vault.display()), here.key.display().to_string());
    let vault = ["--vault", &url, "--key-file", &key];
    let listed = other.json(&[&["--offline", "list"], &vault[..]].concat()).to_string();
    assert!(listed.contains(&id.replace('-', "")) && listed.contains("web1"), "{listed}");
    other.ok(&[&["--offline", "verify"], &vault[..]].concat());

    let uri = other.hypervisor.uri();
    let words = [&["--offline", "restore", &id], &vault[..], &["--as", "web1", "--define", uri, "--connect"]]
        .concat();
    for place in ["offline/placed/vda", "offline/definition", "offline/defined"] {
        let ended = other.vmkeep_that_dies(place, &words);
        assert_eq!(ended.status.signal(), Some(9), "{place}: {ended:?}");
        let there = other.hypervisor.domains().unwrap();
        assert_eq!(there.len(), usize::from(place == "offline/defined"), "{place}: {there:?}");
    }
    let told = other.json(&words);
    let files = told["files"].as_array().unwrap();
    assert!(files.iter().all(|file| file["before"] == true), "they were written again: {told:#}");

    let copy = Guest::attach(&other.hypervisor, "web1").unwrap();
    copy.virsh("start", &[]).unwrap();
    copy.wait_tick(tick + 5).unwrap();
    assert_eq!(copy.state().unwrap().state, "running");
    copy.destroy().unwrap();
    let of_copy = disks(&copy);
    let place = other.restored().join("web1");
    assert!(of_copy.values().all(|path| path.starts_with(&place)), "{of_copy:?}");
    let reports = assert_ticks(&of_copy["vda"], &of_copy["vdb"]);
    assert!(reports.iter().all(|report| report.last >= tick + 5), "{reports:?}");
    assert_eq!(reports[0].boots.len(), 2, "the original's boot, and its own: {reports:?}");
    let parts = files_below(&place).into_iter().filter(|path| path.to_string_lossy().contains(".part"));
    assert_eq!(parts.count(), 0, "half a file is left");

    // It is a machine now: the same words find it done and touch nothing, and it is no place for another.
    let again = other.ok(&words);
    assert!(again.contains("is restored already"), "{again}");
    assert!(disks(&copy) == of_copy && assert_ticks(&of_copy["vda"], &of_copy["vdb"])[0].boots.len() == 2);
    let one_disk = [&words[..], &["--disks", "vda"]].concat();
    other.fails(&one_disk, 110, &["BACKUP_EXISTS", "finished"]);
    let renamed = [&words[..7], &["--as", "web1", "--define", uri, "--folder"]].concat();
    let elsewhere = other.restored().join("elsewhere");
    let renamed = [&renamed[..], &[elsewhere.to_str().unwrap()]].concat();
    other.fails(&renamed, 111, &["DOMAIN_EXISTS", "web1"]);
    assert!(!elsewhere.exists(), "a folder was made for a name that is taken");
    assert_eq!(fs::read_dir(&place).unwrap().count(), 4, "two disks, the definition, and what the folder is");
}
