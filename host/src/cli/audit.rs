//! The journal as evidence, and the doctor.
//!
//! A replay or a verification of an exported file needs no daemon: evidence must be checkable elsewhere. Nor does the
//! verification of the store itself: a damaged one may not let any daemon start.

use std::io::Write;
use std::path::Path;

use vmkeep_store::heads::{PublicKey, log_path};
use vmkeep_workflow::Fault;

use super::args::{Export, Global, PruneHistory};
use super::{Ended, Out, client, config, show};
use crate::api::types::{Audited, Finding, Grade, HistoryPruneRequest, KeyChange, Pruned, Replayed};
use crate::client::Client;
use crate::{codes, heads};

pub(super) async fn replay(global: &Global, out: &Out, what: &str) -> Ended {
    let path = Path::new(what);
    let replayed: Vec<Replayed> = if path.is_dir() {
        crate::audit::replay_folder(path)?
    } else if what.contains('/') || path.is_file() {
        crate::audit::replay_file(path)?
    } else {
        vec![client(global)?.get(&super::job::path(what, "/replay")).await?]
    };
    out.show(&replayed, |replayed| show::replayed(replayed))?;
    Ok(0)
}

pub(super) async fn verify(
    global: &Global,
    out: &Out,
    file: Option<&Path>,
    kept: Option<&Path>,
    keys: &[PublicKey],
) -> Ended {
    // Before the journal is: what is signed meanwhile would be missing in it.
    let kept = kept.map(|kept| heads::kept(kept, keys)).transpose()?;
    let audited: Audited = match (file, &kept) {
        (Some(file), kept) => crate::audit::verify_file(file, kept.as_ref())?,
        (None, Some(kept)) => crate::store::audit(&config(global)?, Some(kept)).await?,
        (None, None) => match client(global)?.get("/v1/audit/verify").await {
            Err(fault) if fault.code == codes::DAEMON_UNREACHABLE => {
                let config = config(global)?;
                let beside = heads::beside(&config.state_dir)?;
                crate::store::audit(&config, beside.as_ref()).await?
            }
            answer => answer?,
        },
    };
    out.show(&audited, show::audited)?;
    Ok(0)
}

/// Prints the file of heads as it is: its lines are signed, and their form is part of that.
pub(super) fn heads(global: &Global, out: &Out) -> Result<(), Fault> {
    let path = log_path(&heads::folder(&config(global)?.state_dir));
    match std::fs::read(&path) {
        Ok(lines) => out.text(&String::from_utf8_lossy(&lines)),
        Err(error) => Err(unsigned(&path, &error)),
    }
}

pub(super) fn key(global: &Global, out: &Out) -> Result<(), Fault> {
    let config = config(global)?;
    let folder = heads::folder(&config.state_dir);
    let absent = || unsigned(&folder, &"there is no key yet");
    let key = heads::key(&config.state_dir)?.ok_or_else(absent)?.to_string();
    out.show(&serde_json::json!({ "public_key": key }), |_| format!("{key}\n"))
}

fn unsigned(path: &Path, cause: &dyn std::fmt::Display) -> Fault {
    Fault::permanent(codes::USAGE, "read what the daemon signed", path.display().to_string(), cause)
        .remedy("Start vmkeepd, and ask as its user: it makes a key at its first start, and signs a head once anything has happened")
}

pub(super) async fn rotate(client: &Client, out: &Out) -> Result<(), Fault> {
    let change: KeyChange = client.post("/v1/audit/key/rotate", &serde_json::json!({}), None).await?;
    out.show(&change, show::key_change)
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

pub(super) async fn prune(client: &Client, out: &Out, args: PruneHistory) -> Ended {
    let PruneHistory { keep_days, keep_jobs, reason, dry_run } = args;
    let request = HistoryPruneRequest { keep_days, keep_jobs, reason, dry_run };
    let pruned: Pruned = client.post("/v1/audit/prune", &request, None).await?;
    out.show(&pruned, show::pruned)?;
    Ok(u8::from(!pruned.failed.is_empty()))
}

pub(super) async fn export(client: &Client, args: &Export) -> Result<(), Fault> {
    let (query, output) = (part(args), args.output.as_deref());
    let mut pieces = client.stream(&format!("/v1/audit/export{query}")).await?;
    let object = output.map_or_else(|| "standard output".to_owned(), |path| path.display().to_string());
    let fault = |e: &std::io::Error| super::unwritten(&object, e);
    let uncreated = |e: &std::io::Error| {
        let fault = fault(e);
        let code = if fault.code == codes::USAGE { codes::CANNOT_CREATE_TARBALL } else { fault.code };
        Fault { code, doing: "create the archive of the history".to_owned(), ..fault }
    };
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
            let mut file = std::fs::File::create_new(path).map_err(|e| uncreated(&e))?;
            while let Some(piece) = pieces.next().await? {
                file.write_all(&piece).map_err(|e| uncreated(&e))?;
            }
            file.sync_all().map_err(|e| uncreated(&e))
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
