//! Signed heads of this host's journal: when they are signed, where they go, and what is compared with them.
//!
//! **When.** At the start, at the end of every job, after [`MANY`] records, every [`EVERY`] while anything was written, and when
//! the daemon ends. All of that happens beside the jobs: who appends waits for nothing. So the end of a journal can be cut
//! off unnoticed for a minute at most (and what a daemon that was killed had written since its last head, until the next
//! start signs it).
//!
//! **Where to.** Into `audit/heads.jsonl` of the state folder, and into the log, the bare line, at level info. The log is what
//! leaves the host: only heads that did can prove anything against somebody who is root here ([`vmkeep_store::heads`]).
//!
//! **Failures** of signing stop nothing: no backup is worth less because its history could not be vouched for. They are
//! logged, and tried again with the next head.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::MissedTickBehavior;
use uuid::Uuid;
use vmkeep_store::heads::{
    Contradiction, Heads, HeadsError, KeyOrigin, Line, LineError, Notary, PublicKey, Trust, Vouched,
    log_path, public_key,
};
use vmkeep_store::{Hash, Store};
use vmkeep_workflow::Fault;
use vmkeep_workflow::event::{Body, Event};
use vmkeep_workflow::journal::{Record, StoreError};

use crate::api::types::{KeyChange, Vouching};
use crate::codes;

/// The longest time between something being written and its head.
pub const EVERY: Duration = Duration::from_secs(60);
/// So many records are not left without a head, however fast they come.
pub const MANY: u32 = 1000;

/// Contradictions that are put into a message; the rest is counted.
const SHOWN: usize = 3;

/// The folder of the key and the heads.
#[must_use]
pub fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join("audit")
}

/// Signs the heads of a store that this process has open for writing.
pub struct Sealer {
    store: Arc<dyn Store>,
    folder: PathBuf,
    /// Opened when it is first needed; after a failure, tried again.
    notary: Arc<Mutex<Option<Notary>>>,
}

impl Sealer {
    /// Signs with the key in the state folder; it is made when there is none.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, state_dir: &Path) -> Self {
        Self { store, folder: folder(state_dir), notary: Arc::default() }
    }

    async fn with<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Notary) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (notary, folder, store) = (self.notary.clone(), self.folder.clone(), self.store.id());
        let acting = tokio::task::spawn_blocking(move || {
            let mut notary = notary.lock().unwrap_or_else(PoisonError::into_inner);
            if notary.is_none() {
                let (opened, origin) = Notary::open(&folder, store)?;
                tell(&opened, origin);
                *notary = Some(opened);
            }
            match notary.as_mut() {
                Some(notary) => act(notary),
                None => Err(StoreError::Io("there is no key".to_owned())),
            }
        });
        acting.await.unwrap_or_else(|e| Err(StoreError::Io(format!("signing was cut off: {e}"))))
    }

    /// Signs the head, if it is not the one that was signed last. What is signed is told to the log also if nobody waits for
    /// it any more.
    pub async fn sign(&self) {
        let signing = async {
            let Some(head) = self.store.head().await? else { return Ok(()) };
            self.with(move |notary| {
                if let Some(signed) = notary.sign(&head, Timestamp::now())? {
                    tracing::info!("{}", Line::Head(signed).render());
                }
                Ok(())
            })
            .await
        };
        if let Err(error) = signing.await {
            tracing::warn!(%error, "the journal's head could not be signed; it is tried again");
        }
    }

    /// Makes a new key that the old one vouches for.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub async fn rotate(&self) -> Result<KeyChange, Fault> {
        let rotated = self.with(|notary| {
            let succession = notary.rotate(Timestamp::now())?;
            let change = KeyChange { old: succession.old.to_string(), new: succession.new.to_string() };
            tracing::info!("{}", Line::Key(Box::new(succession)).render());
            Ok(change)
        });
        rotated.await.map_err(|error| key_fault("make a new key", &self.folder, &error))
    }

    /// Says so if the store is not the one whose heads were signed here before.
    async fn compare_with_last(&self) {
        let Ok(Some(last)) = self.with(|notary| Ok(notary.last())).await else { return };
        match self.store.commits(last.commit - 1, 1).await {
            Ok(found) if found.first().is_some_and(|commit| commit.link == last.link) => {}
            Ok(_) => tracing::error!(
                commit = last.commit,
                at = %last.at,
                "the journal does not have what it had when its head was last signed: an older copy was put in its place, or its end was cut off. `vmkeep audit verify` tells more"
            ),
            Err(error) => {
                tracing::warn!(%error, "the journal could not be compared with its last signed head")
            }
        }
    }

    /// Signs until it is dropped.
    pub async fn regularly(self: Arc<Self>) {
        let mut heard = self.store.subscribe();
        self.compare_with_last().await;
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut records = 0;
        loop {
            let due = tokio::select! {
                _ = tick.tick() => true,
                record = heard.recv() => match record {
                    Ok(record) => {
                        records += 1;
                        records >= MANY || ends_a_job(&record)
                    }
                    Err(RecvError::Lagged(_)) => true,
                    Err(RecvError::Closed) => return,
                },
            };
            if due {
                records = 0;
                self.sign().await;
            }
        }
    }
}

fn tell(notary: &Notary, origin: KeyOrigin) {
    let key = notary.public_key();
    match origin {
        KeyOrigin::Found => tracing::info!(%key, "heads of the journal are signed with this key"),
        KeyOrigin::Made => {
            tracing::info!(%key, "a key was made; heads of the journal are signed with it. Keep its public half elsewhere");
        }
        KeyOrigin::Lost => tracing::warn!(
            %key,
            "the key that signed the journal's heads is gone, and a new one was made, for which nobody vouches. Keep its public half elsewhere, beside the old one"
        ),
    }
}

fn ends_a_job(record: &Record) -> bool {
    let last = |body: &Body| {
        matches!(
            body,
            Body::JobRefused(_) | Body::JobAbandoned { .. } | Body::JobSucceeded | Body::JobRolledBack(_)
        )
    };
    record.stream.as_job().is_some()
        && serde_json::from_slice::<Event>(&record.bytes).is_ok_and(|event| last(&event.body))
}

/// The public key of the state folder; nothing before the daemon's first start.
///
/// # Errors
/// When the key cannot be read.
pub fn key(state_dir: &Path) -> Result<Option<PublicKey>, Fault> {
    let folder = folder(state_dir);
    public_key(&folder).map_err(|error| key_fault("read the key", &folder, &error))
}

/// Heads to compare a journal with.
#[derive(Clone, Debug)]
pub struct Witness {
    heads: Heads,
    path: PathBuf,
    /// Whether they lie beside the journal.
    local: bool,
}

const DOING: &str = "check the signed heads";

/// The heads that lie beside the journal; nothing if none was signed yet.
///
/// # Errors
/// When they cannot be read or do not fit their signatures.
pub fn beside(state_dir: &Path) -> Result<Option<Witness>, Fault> {
    let path = log_path(&folder(state_dir));
    match read(&path, Trust::Named) {
        Ok(heads) => Ok(Some(Witness { heads, path, local: true })),
        Err(HeadsError::Empty) => Ok(None),
        Err(HeadsError::Read(e)) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unread(&path, &error)),
    }
}

/// Heads that were kept somewhere, under keys that are trusted.
///
/// # Errors
/// When they cannot be read, or are not signed under one of those keys.
pub fn kept(path: &Path, keys: &[PublicKey]) -> Result<Witness, Fault> {
    let heads = read(path, Trust::Keys(keys)).map_err(|error| unread(path, &error))?;
    Ok(Witness { heads, path: path.to_owned(), local: false })
}

fn read(path: &Path, trust: Trust<'_>) -> Result<Heads, HeadsError> {
    Heads::read(BufReader::new(File::open(path)?), trust)
}

impl Witness {
    /// The numbers of the commits that heads were signed for.
    #[must_use]
    pub fn wanted(&self) -> BTreeSet<u64> {
        self.heads.commits()
    }

    /// Compares a store. The heads must have been read before.
    ///
    /// # Errors
    /// What they contradict.
    pub async fn vouch_for(&self, store: &dyn Store) -> Result<Vouching, Fault> {
        let compared = self.heads.compare_store(store).await.map_err(|e| e.fault("read the journal", ""))?;
        self.vouching(compared)
    }

    /// Compares a journal: its store, its last commit, and the links of the commits that are [`Self::wanted`].
    ///
    /// # Errors
    /// What they contradict.
    pub fn vouch(&self, store: Uuid, last: u64, links: &HashMap<u64, Hash>) -> Result<Vouching, Fault> {
        self.vouching(self.heads.compare(store, last, links))
    }

    fn vouching(&self, compared: Result<Vouched, Vec<Contradiction>>) -> Result<Vouching, Fault> {
        let vouched = compared.map_err(|found| self.contradicted(&found))?;
        Ok(Vouching {
            file: self.path.clone(),
            local: self.local,
            heads: vouched.heads,
            commit: vouched.newest.commit,
            at: vouched.newest.at,
            after: vouched.after,
            cut_off: self.heads.cut_off(),
        })
    }

    fn contradicted(&self, found: &[Contradiction]) -> Fault {
        let shown: Vec<String> = found.iter().take(SHOWN).map(ToString::to_string).collect();
        let more = found.len() - shown.len();
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        let cause = format!("{}{more}", shown.join("; "));
        let remedy = if self.local {
            "If nobody did that on purpose, keep the state folder as it is and compare it with heads that were kept elsewhere. If somebody restored a copy on purpose, put that file away under another name and start vmkeepd again: new heads are signed"
        } else {
            "If nobody restored a copy on purpose, somebody changed history: keep the journal and these heads as they are"
        };
        Fault::permanent(
            codes::STORE_DAMAGED,
            "compare the journal with its signed heads",
            self.path.display().to_string(),
            cause,
        )
        .remedy(remedy)
    }
}

fn unread(path: &Path, error: &HeadsError) -> Fault {
    let object = path.display().to_string();
    match error {
        HeadsError::Line { error: LineError::TooNew { .. }, .. } => {
            Fault::permanent(codes::STORE_TOO_NEW, DOING, object, error).remedy("Use the newer release")
        }
        HeadsError::Line { .. } => Fault::permanent(codes::STORE_DAMAGED, DOING, object, error).remedy(
            "Somebody changed that line, or it is none: a file of heads holds only the lines that `vmkeep audit heads` prints",
        ),
        HeadsError::Untrusted { .. } => Fault::permanent(codes::STORE_DAMAGED, DOING, object, error).remedy(
            "If that key is the host's (it was lost once, say), name it as well: --public-key may be given more than once. Otherwise somebody else signed these heads",
        ),
        _ => Fault::permanent(codes::USAGE, DOING, object, error)
            .remedy("Name a file with the lines that `vmkeep audit heads` prints"),
    }
}

fn key_fault(doing: &str, folder: &Path, error: &StoreError) -> Fault {
    let fault = error.fault(doing, folder.display().to_string());
    match error {
        StoreError::Damaged(_) => fault.remedy(
            "Put a copy of the key back; or remove it: the next start makes another, for which nobody vouches",
        ),
        _ => fault,
    }
}
