//! vmkeepd that is restarted, and vmkeepd that ends with its host, while a backup job goes on: the one leaves it to the next, the
//! other ends it, so that whoever saves the guests for the host's shutdown can.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use crate::lost_journal::{is_pulled, scratch};
use crate::support::bed::{folder, give, large};
use crate::support::{Daemon, Host, assert_untouched};
use crate::vault::{bed, checkpoints};

/// What systemd says of the host.
struct Systemd {
    says: PathBuf,
    path: String,
}

impl Systemd {
    fn of(host: &Host) -> Self {
        let bin = folder(host, &host.hypervisor.dir().join("state/systemd"));
        let (says, program) = (bin.join("says"), bin.join("systemctl"));
        let script = format!("#!/bin/sh\n[ \"$1\" = is-system-running ] && cat {}\nexit 1\n", says.display());
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        give(host, &program);
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        Self { says, path }
    }

    fn says(&self, host: &Host, what: &str) {
        fs::write(&self.says, format!("{what}\n")).unwrap();
        give(host, &self.says);
    }

    fn daemon(&self, host: &Host) -> Daemon {
        host.ready_with(&[("PATH", &self.path)])
    }
}

#[test]
fn a_backup_job_outlives_a_restart_of_vmkeepd_and_is_ended_before_the_hosts_guests_are_saved() {
    let bed = bed(&large("web1"));
    let (host, guest) = (&bed.host, &bed.guest);
    let systemd = Systemd::of(host);
    systemd.says(host, "running");
    let daemon = systemd.daemon(host);
    let job = host.begin(&["backup", "web1", "--bandwidth", "2M"]);
    host.reached(&job, "step_started", "read");
    assert_eq!(daemon.end(), Some(0));
    assert!(is_pulled(&bed), "the next vmkeepd goes on within the same point in time");

    let daemon = systemd.daemon(host);
    host.reached(&job, "job_recovered", "");
    assert!(is_pulled(&bed));
    systemd.says(host, "stopping");
    assert_eq!(daemon.end(), Some(0));
    assert!(!is_pulled(&bed), "{}", host.log());
    assert_eq!(scratch(host), Vec::<PathBuf>::new());
    // As libvirt-guests does next.
    guest.virsh("managedsave", &[]).unwrap();
    guest.virsh("start", &[]).unwrap();

    systemd.says(host, "running");
    let _daemon = systemd.daemon(host);
    let row = host.settled(&job);
    assert_eq!(row["status"], "rolled_back", "{}", host.story(&job));
    assert_eq!(row["fault"]["name"], "POINT_IN_TIME_LOST", "{}", host.story(&job));
    let history = host.history(&job);
    let told = history.iter().find(|row| row["event"]["body"]["type"] == "intervened");
    assert!(told.is_some_and(|row| row.to_string().contains("the host goes down")), "{history:#?}");
    assert_eq!(checkpoints(&bed), Vec::<String>::new());
    guest.wait_more(3).unwrap();
    assert_untouched(guest, &bed.own);
}
