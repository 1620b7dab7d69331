//! `vmkeep --offline`: a vault and its key are enough. There is no daemon, no journal and no catalogue; what must be known
//! lies in the vault, and in the folder that is written to ([`mod@place`]).
//!
//! A restore may be repeated whatever ended it: the same words go on in the same folder, and the new domain has the same
//! UUID. The order of its acts is the order in which they must be durable:
//!
//! 1. the note: what the folder is for;
//! 2. each file, proven by what is read back ([`mod@files`]);
//! 3. the definition, beside them;
//! 4. the domain, at a hypervisor, if one is named: its UUID tells whether that was done already;
//! 5. the note's other name: all is done, and the same words once more find it so.

mod define;
mod files;
mod place;
mod restore;

pub(in crate::cli) use files::differs;
pub(in crate::cli) use restore::Restored;

use vmkeep_workflow::Fault;

use super::args::{Global, Offline, VaultCheck};
use super::vault::look;
use super::{Ended, INTERRUPTED, Out};

/// Carries a command out, unless it is interrupted.
pub(super) async fn carry_out(command: Offline, global: &Global, out: &Out) -> Ended {
    let restores = matches!(command, Offline::Restore(_));
    tokio::select! {
        ended = Box::pin(act(command, global, out)) => ended,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("Interrupted.");
            if restores {
                eprintln!("  the same command goes on in the same folder");
            }
            eprintln!("  collections wait a day for this process; to give it up at once:  vmkeep vault leases VAULT");
            Ok(INTERRUPTED)
        }
    }
}

async fn act(command: Offline, global: &Global, out: &Out) -> Ended {
    match command {
        Offline::List { vault, domain } => {
            look::list(global, out, &vault.into(), domain.as_deref()).await?;
            Ok(0)
        }
        Offline::Verify { vault, quick } => {
            let args = VaultCheck { vault: vault.into(), quick, read: !quick, backend: false };
            look::check(global, out, &args).await
        }
        Offline::Restore(args) => {
            let restored: Result<Restored, Fault> = Box::pin(restore::restore(global, out, args)).await;
            out.show(&restored?, restore::text)?;
            Ok(0)
        }
    }
}
