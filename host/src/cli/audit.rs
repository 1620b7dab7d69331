//! The journal as evidence, and the doctor.
//!
//! A replay or a verification of an exported file needs no daemon: evidence must be checkable elsewhere. Nor does the
//! verification of the store itself: a damaged one may not let any daemon start.

use std::io::Write;
use std::path::Path;

use vmkeep_workflow::Fault;

use super::args::{Export, Global, Prune};
use super::{Ended, Out, client, config, show};
use crate::api::types::{Audited, Finding, Grade, PruneRequest, Pruned, Replayed};
use crate::client::Client;
use crate::codes;

pub(super) async fn replay(global: &Global, out: &Out, what: &str) -> Ended {
    let path = Path::new(what);
    let replayed: Vec<Replayed> = if what.contains('/') || path.is_file() {
        crate::audit::replay_file(path)?
    } else {
        vec![client(global)?.get(&super::job::path(what, "/replay")).await?]
    };
    out.show(&replayed, |replayed| show::replayed(replayed))?;
    Ok(0)
}

pub(super) async fn verify(global: &Global, out: &Out, file: Option<&Path>) -> Ended {
    let audited: Audited = match file {
        Some(file) => crate::audit::verify_file(file)?,
        None => match client(global)?.get("/v1/audit/verify").await {
            Err(fault) if fault.code == codes::DAEMON_UNREACHABLE => {
                crate::store::audit(&config(global)?).await?
            }
            answer => answer?,
        },
    };
    out.show(&audited, show::audited)?;
    Ok(0)
}

/// The query for the part that is wanted.
fn part(args: &Export) -> String {
    let states: Vec<&str> = args.state.iter().map(|state| state.as_str()).collect();
    let asked = [
        ("job", args.job.clone()),
        ("domain", args.domain.clone()),
        ("state", Some(states.join(",")).filter(|states| !states.is_empty())),
        ("since", args.since.map(|at| at.to_string())),
        ("until", args.until.map(|at| at.to_string())),
    ];
    let asked = asked.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let query: Vec<String> =
        asked.map(|(name, value)| format!("{name}={}", crate::client::segment(&value))).collect();
    if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) }
}

pub(super) async fn prune(client: &Client, out: &Out, args: Prune) -> Ended {
    let Prune { keep_days, keep_jobs, reason, dry_run } = args;
    let request = PruneRequest { keep_days, keep_jobs, reason, dry_run };
    let pruned: Pruned = client.post("/v1/audit/prune", &request, None).await?;
    out.show(&pruned, show::pruned)?;
    Ok(u8::from(!pruned.failed.is_empty()))
}

pub(super) async fn export(client: &Client, args: &Export) -> Result<(), Fault> {
    let (query, output) = (part(args), args.output.as_deref());
    let mut pieces = client.stream(&format!("/v1/audit/export{query}")).await?;
    let object = output.map_or_else(|| "standard output".to_owned(), |path| path.display().to_string());
    let fault = |e: &std::io::Error| super::unwritten(&object, e);
    match output {
        None => {
            let mut out = std::io::stdout().lock();
            while let Some(piece) = pieces.next().await? {
                out.write_all(&piece).map_err(|e| fault(&e))?;
            }
            out.flush().map_err(|e| fault(&e))
        }
        Some(path) => {
            // Evidence is never written over.
            let mut file = std::fs::File::create_new(path).map_err(|e| fault(&e))?;
            while let Some(piece) = pieces.next().await? {
                file.write_all(&piece).map_err(|e| fault(&e))?;
            }
            file.sync_all().map_err(|e| fault(&e))
        }
    }
}

pub(super) async fn doctor(global: &Global, out: &Out) -> Ended {
    let findings: Vec<Finding> = match client(global)?.get("/v1/doctor").await {
        Ok(findings) => findings,
        // Most of what the doctor looks at can be seen without the daemon, and that is when it is needed most.
        Err(fault) if fault.code == codes::DAEMON_UNREACHABLE => {
            let mut findings = vec![Finding {
                topic: "vmkeepd".to_owned(),
                grade: Grade::Bad,
                text: format!("{}: {}", fault.object, fault.cause),
                remedy: fault.remedy,
            }];
            findings.extend(crate::doctor::examine(&config(global)?).await);
            findings
        }
        Err(fault) => return Err(fault),
    };
    out.show(&findings, |findings| show::findings(findings))?;
    let worst = findings.iter().map(|finding| finding.grade).max();
    Ok(u8::from(worst == Some(Grade::Bad)))
}
