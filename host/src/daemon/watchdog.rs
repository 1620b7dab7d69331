//! The guest-safety watchdog: no guest stays stopped or frozen because of a job, as long as vmkeepd lives.
//!
//! The steps set their guests free by themselves. This is for when they cannot, or not in time:
//! - **Stopped by an I/O error on our overlay.** The copy that may have taken the room is given up by the step itself,
//!   which looks five times a second; as soon as there is room again the guest is resumed here ([`rescue`]), whatever
//!   phase the job is in, also when it waits for its next attempt or for an operator.
//! - **Stopped by an I/O error while a pull of ours goes on.** Whose error it was cannot be told, and a pull can be repeated: it
//!   is ended, and the guest resumed ([`end::rescue`]).
//! - **Frozen for too long.** From the note of the freeze on the limit runs (`limits.freeze`). Whatever holds the
//!   snapshot up then, the guest is thawed, and thawed again as long as the note is there: an agent that did not answer
//!   in time may freeze late. The note stays, since the job's own thaw goes by it; the snapshot asks the agent after its
//!   instant, so that a backup which came too late does not pass for one of a frozen guest.
//! - **Held by a job that needs attention.** Nobody acts for such a job until an operator has spoken, so its guest is set
//!   free as after a start.
//!
//! The act comes first, and its event after it, in its own time: a store that cannot be written keeps no guest waiting. Each domain is
//! looked after by a task of its own, so that one that does not answer costs the others nothing. Domains on which no
//! job is under way are not looked at: what an earlier process held there, the pass at the start sets free.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use uuid::Uuid;
use vmkeep_libvirt::Event;
use vmkeep_libvirt::event::Lifecycle;
use vmkeep_steps::backup::end;
use vmkeep_steps::hypervisor::{DomainId, Hold, HvError, Marker, PauseReason, RunState, Trouble};
use vmkeep_steps::snapshot::World;
use vmkeep_steps::snapshot::rescue::{Rescue, rescue};
use vmkeep_steps::snapshot::safety::{Release, release};
use vmkeep_workflow::{Engine, JobId, JobStatus};

use crate::hypervisor::Libvirt;
use crate::text::bytes;

/// How often a domain is looked at while a job is under way on it.
const LOOK: Duration = Duration::from_millis(200);
/// How often it is looked which domains have a job.
const HOLDERS: Duration = Duration::from_secs(1);
/// How often a guest is thawed whose freeze has outlived its limit, until the job has taken note.
const THAW: Duration = Duration::from_secs(1);
/// A guest that stops again right after it was resumed is resumed later from time to time, up to this.
const LATEST: Duration = Duration::from_secs(60);
/// One that ran for so long did not stop again right after.
const CALM: Duration = Duration::from_secs(10);

/// What it works with.
#[derive(Clone)]
pub(super) struct Watchdog {
    pub(super) libvirt: Libvirt,
    pub(super) world: World,
    pub(super) store: String,
    pub(super) engine: Engine,
    /// The longest time for which a guest stays frozen.
    pub(super) freeze: Duration,
}

/// What is remembered of a domain from look to look.
#[derive(Default)]
struct Seen {
    /// Since when the guest has been noted as frozen.
    frozen: Option<Instant>,
    /// When it was last thawed for that.
    thawed: Option<Instant>,
    /// When it was last resumed after an I/O error, and how often in a row.
    resumed: Option<(Instant, u32)>,
    /// That there is no room was recorded.
    told: bool,
}

/// Looks after the guests of jobs for as long as the daemon lives.
pub(super) async fn watch(dog: Watchdog) {
    let mut events = dog.libvirt.client().events();
    let mut records = dog.engine.store().subscribe();
    let (acts, done) = mpsc::unbounded_channel();
    tokio::spawn(record(dog.engine.clone(), done));
    let mut guards: HashMap<String, (Arc<Notify>, tokio::task::JoinHandle<()>)> = HashMap::new();
    loop {
        guards.retain(|_, (_, task)| !task.is_finished());
        for (subject, _) in dog.engine.held() {
            let Ok(domain) = subject.parse::<Uuid>() else { continue };
            guards.entry(subject.clone()).or_insert_with(|| {
                let woken = Arc::new(Notify::new());
                let guard = Guard { dog: dog.clone(), domain: DomainId(domain), acts: acts.clone() };
                let guard = guard.keep(subject, Arc::clone(&woken));
                (woken, tokio::spawn(guard))
            });
        }
        // A job holds its domain from its plan on, and every plan is a record; those that are taken over need not be.
        tokio::select! {
            () = tokio::time::sleep(HOLDERS) => {}
            event = events.recv() => match event {
                Ok(Event::IoError { domain, .. } | Event::Lifecycle { domain, what: Lifecycle::Suspended, .. }) => {
                    if let Some((woken, _)) = guards.get(&domain.uuid.to_string()) {
                        woken.notify_one();
                    }
                }
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            record = records.recv() => if matches!(record, Err(RecvError::Closed)) { return },
        }
    }
}

/// What was done for a job's guest, and what came of it.
struct Act {
    job: JobId,
    act: String,
    outcome: String,
}

/// Writes down what was done.
async fn record(engine: Engine, mut done: mpsc::UnboundedReceiver<Act>) {
    while let Some(Act { job, act, outcome }) = done.recv().await {
        if let Err(fault) = engine.intervened(job, act, outcome).await {
            tracing::warn!(%job, %fault, "what was done for the guest could not be written into its job's journal");
        }
    }
}

/// Looks after one domain.
struct Guard {
    dog: Watchdog,
    domain: DomainId,
    acts: mpsc::UnboundedSender<Act>,
}

impl Guard {
    /// Until no job holds the domain any more.
    async fn keep(self, subject: String, woken: Arc<Notify>) {
        let mut seen = Seen::default();
        while let Some(job) = self.dog.engine.holder(&subject) {
            match self.look(job, &mut seen).await {
                Ok(()) => {}
                Err(e) if matches!(e.trouble, Trouble::NoSuchDomain | Trouble::NotRunning) => {}
                Err(error) => {
                    tracing::debug!(domain = %self.domain, %error, "the watchdog could not look, or not act; it goes on")
                }
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = woken.notified() => {}
            }
        }
    }

    async fn look(&self, job: JobId, seen: &mut Seen) -> Result<(), HvError> {
        let (hypervisor, domain) = (&self.dog.world.hypervisor, &self.domain);
        match hypervisor.state(domain).await? {
            RunState::Paused(PauseReason::IoError) => return self.let_run(job, seen).await,
            RunState::Off => {
                *seen = Seen::default();
                return Ok(());
            }
            _ => seen.told = false,
        }
        let marker = hypervisor.marker(domain).await?;
        let hold =
            marker.filter(|marker: &Marker| marker.store == self.dog.store).and_then(|marker| marker.hold);
        if hold != Some(Hold::Frozen) {
            (seen.frozen, seen.thawed) = (None, None);
        }
        match hold {
            None | Some(Hold::Begun | Hold::Resumed) => Ok(()),
            Some(_) if self.unattended(job).await => self.set_free(job).await,
            Some(Hold::Frozen) => self.thaw(job, seen).await,
            Some(Hold::Suspended | Hold::Reloaded) => Ok(()),
        }
    }

    /// Whether nobody acts for a job any more.
    async fn unattended(&self, job: JobId) -> bool {
        let summary = self.dog.engine.summary(job).await;
        summary.is_ok_and(|summary| summary.status == JobStatus::NeedsAttention)
    }

    async fn set_free(&self, job: JobId) -> Result<(), HvError> {
        let act = match release(&self.dog.world, &self.dog.store, &self.domain).await? {
            Release::NotHeld | Release::Waiting => return Ok(()),
            Release::Thawed => "thawed the guest: its job needs attention".to_owned(),
            Release::Resumed { .. } => "resumed the guest: its job needs attention".to_owned(),
        };
        self.did(job, act, "done".to_owned());
        Ok(())
    }

    async fn thaw(&self, job: JobId, seen: &mut Seen) -> Result<(), HvError> {
        let since = *seen.frozen.get_or_insert_with(Instant::now);
        // It may have been noted right after the last look, and the next one would come too late.
        if since.elapsed() + 2 * LOOK < self.dog.freeze || seen.thawed.is_some_and(|at| at.elapsed() < THAW) {
            return Ok(());
        }
        let thawed = self.dog.world.hypervisor.thaw(&self.domain).await?;
        seen.thawed = Some(Instant::now());
        if thawed > 0 {
            let limit = self.dog.freeze.as_secs_f64();
            let act = format!("thawed the guest: its file systems were to be frozen for {limit} s at most");
            self.did(job, act, format!("done: {thawed} file systems"));
        }
        Ok(())
    }

    async fn let_run(&self, job: JobId, seen: &mut Seen) -> Result<(), HvError> {
        let row = match seen.resumed {
            Some((at, row)) => {
                let wait = LOOK.saturating_mul(1_u32 << row.min(10)).min(LATEST);
                if at.elapsed() < wait {
                    return Ok(());
                }
                if at.elapsed() < wait + CALM { row.saturating_add(1) } else { 0 }
            }
            None => 0,
        };
        if end::rescue(&self.dog.world, &self.domain).await? {
            seen.resumed = Some((Instant::now(), row));
            let act = "ended the backup job and resumed the guest, which QEMU had stopped".to_owned();
            self.did(job, act, "done".to_owned());
            return Ok(());
        }
        match rescue(&self.dog.world, &self.dog.store, &self.domain).await? {
            Rescue::NotOurs => {}
            Rescue::Resumed { files } => {
                (seen.resumed, seen.told) = (Some((Instant::now(), row)), false);
                let act = format!(
                    "resumed the guest, which QEMU had stopped because {} could not grow",
                    names(&files)
                );
                self.did(job, act, "done: there is room again".to_owned());
            }
            Rescue::NoRoom { file, free } if !seen.told => {
                seen.told = true;
                let act = format!("found the guest stopped by QEMU because {} cannot grow", file.display());
                let outcome = format!(
                    "{} are free there. What the job itself can give up it gives up; else make room, and the guest goes on by itself",
                    bytes(free)
                );
                self.did(job, act, outcome);
            }
            Rescue::NoRoom { .. } => {}
        }
        Ok(())
    }

    fn did(&self, job: JobId, act: String, outcome: String) {
        tracing::warn!(%job, act, outcome, "to keep a guest safe");
        // Nobody receives it any more only when vmkeepd ends.
        let _ = self.acts.send(Act { job, act, outcome });
    }
}

fn names(overlays: &[std::path::PathBuf]) -> String {
    overlays.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" or ")
}
