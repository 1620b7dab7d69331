//! A vault in memory. The place outlives every process; what a process has sent there may arrive after its end, or after it was
//! told that it failed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::OnceCell;
use vmkeep_steps::hypervisor::fake::Fake;
use vmkeep_steps::hypervisor::{HvError, Trouble};
use vmkeep_steps::simulation::{Hands, Order, Side};
use vmkeep_steps::vaults::files::Held;
use vmkeep_steps::vaults::{Opened, Vaults, fault};
use vmkeep_vault::backend::memory::Memory;
use vmkeep_vault::backend::{Backend, BackendError, BackendErrorKind, Listed};
use vmkeep_vault::backups::Backups;
use vmkeep_vault::blob::BlobType;
use vmkeep_vault::error::VaultError;
use vmkeep_vault::fetch::Fetcher;
use vmkeep_vault::index::Index;
use vmkeep_vault::keys::wrap::Credential;
pub use vmkeep_vault::manifest::Manifest;
use vmkeep_vault::names::MarkKind;
use vmkeep_vault::read::read_image;
use vmkeep_vault::vault::{Draft, Vault};
use vmkeep_workflow::Fault;

use super::director::Director;

/// The name that the host knows it by.
pub const NAME: &str = "away";

/// How long anything takes there.
const MOMENT: Duration = Duration::from_millis(1);

/// A change that is on its way: an object's name, and its bytes unless it goes.
type Change = (String, Option<Bytes>);

/// Where it is, and how it is opened.
pub struct Place {
    memory: Arc<Memory>,
    late: Mutex<Vec<(Duration, Change)>>,
    key: Credential,
}

/// A backup that is there.
pub struct Kept {
    pub checked: bool,
    pub manifest: Manifest,
    /// The content of each disk.
    pub disks: Result<Vec<Vec<u8>>, String>,
}

impl Place {
    /// An encrypted vault without backups.
    pub async fn new() -> Arc<Self> {
        let draft = Draft::encrypted(false).unwrap();
        let words = draft.recovery_words().unwrap();
        let memory = Arc::new(Memory::default());
        draft.confirm(&words).unwrap().put(memory.clone(), None).await.unwrap();
        Arc::new(Self { memory, late: Mutex::default(), key: Credential::Recovery(words) })
    }

    async fn change(&self, (name, bytes): Change) -> Result<(), BackendError> {
        match bytes {
            Some(bytes) => self.memory.put(&name, bytes).await,
            None => self.memory.delete(&name).await,
        }
    }

    /// What was on its way until then is there.
    async fn arrive(&self, until: Duration) {
        let due: Vec<Change> = {
            let mut late = self.late.lock().unwrap();
            let (due, waits) = std::mem::take(&mut *late).into_iter().partition(|(at, _)| *at <= until);
            *late = waits;
            let due: Vec<(Duration, Change)> = due;
            due.into_iter().map(|(_, change)| change).collect()
        };
        for change in due {
            self.change(change).await.unwrap();
        }
    }

    /// What is there when nothing is on its way any more.
    async fn opened(&self) -> (Vault, Backups) {
        self.arrive(Duration::MAX).await;
        let vault = Vault::attach(self.memory.clone(), Some(self.key.clone()), None).await.unwrap();
        let all = Backups::load(&vault, None).await.unwrap();
        (vault, all)
    }

    /// The manifests of all backups, oldest first.
    pub async fn manifests(&self) -> Vec<Manifest> {
        let (_, all) = self.opened().await;
        let mut manifests: Vec<_> =
            all.iter().map(|(_, backup)| backup.manifest.as_ref().unwrap().clone()).collect();
        manifests.sort_by_key(|manifest| manifest.taken);
        manifests
    }

    /// All backups, with what is in them, oldest first.
    pub async fn backups(&self) -> Vec<Kept> {
        let (vault, all) = self.opened().await;
        let mut kept = Vec::new();
        for (id, backup) in all.iter() {
            let manifest = backup.manifest.as_ref().unwrap().clone();
            let disks = disks(&vault, &manifest).await.map_err(|e| e.to_string());
            kept.push(Kept { checked: all.has(id, MarkKind::Checked), manifest, disks });
        }
        kept.sort_by_key(|kept| kept.manifest.taken);
        kept
    }
}

async fn disks(vault: &Vault, manifest: &Manifest) -> Result<Vec<Vec<u8>>, VaultError> {
    let ids = vault.ids(manifest.domain);
    let index = Arc::new(Index::load(vault, None).await?);
    let fetcher = Fetcher::new(vault, ids.clone(), index, None, false);
    let mut disks = Vec::new();
    for disk in &manifest.disks {
        let mut held = Held::new(usize::try_from(disk.image.size).unwrap());
        read_image(vault, &ids, &fetcher, BlobType::Data, &disk.image, &mut held, false).await?;
        disks.push(held.0);
    }
    Ok(disks)
}

/// The place, as a process that may die reaches it.
struct Reached {
    place: Arc<Place>,
    director: Arc<Director>,
    world: Fake,
}

impl std::fmt::Debug for Reached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(NAME)
    }
}

fn error(name: &str, why: HvError) -> BackendError {
    let kind = match why.trouble {
        Trouble::NoSpace => BackendErrorKind::Full,
        Trouble::Refused => BackendErrorKind::Denied,
        _ => BackendErrorKind::Transient,
    };
    BackendError { place: NAME.to_owned(), name: name.to_owned(), kind, cause: why.to_string() }
}

impl Reached {
    /// Something is asked for. It is not, by one who is dead.
    async fn ask(&self, what: &'static str, name: &str) -> Result<(), BackendError> {
        tokio::time::sleep(MOMENT).await;
        self.place.arrive(self.world.elapsed()).await;
        match self.director.step(what, Side::Before, Hands::Vault) {
            Order::Go | Order::Linger(_) => Ok(()),
            Order::Die | Order::DieAndLeave(_) => std::future::pending().await,
            Order::Fail(e) | Order::Lose(e) | Order::LoseAndLeave(_, e) => Err(error(name, e)),
        }
    }

    async fn send(&self, what: &'static str, change: Change) -> Result<(), BackendError> {
        tokio::time::sleep(MOMENT).await;
        self.place.arrive(self.world.elapsed()).await;
        let name = change.0.clone();
        let late =
            |after| self.place.late.lock().unwrap().push((self.world.elapsed() + after, change.clone()));
        match self.director.step(what, Side::Before, Hands::Vault) {
            Order::Go | Order::Linger(_) => {}
            Order::Die => std::future::pending().await,
            Order::DieAndLeave(after) => {
                late(after);
                std::future::pending().await
            }
            Order::Fail(e) => return Err(error(&name, e)),
            Order::Lose(e) => {
                self.place.change(change).await?;
                return Err(error(&name, e));
            }
            Order::LoseAndLeave(after, e) => {
                late(after);
                return Err(error(&name, e));
            }
        }
        self.place.change(change).await?;
        match self.director.step(what, Side::After, Hands::Vault) {
            Order::Go | Order::Linger(_) => Ok(()),
            Order::Die | Order::DieAndLeave(_) => std::future::pending().await,
            Order::Fail(e) | Order::Lose(e) | Order::LoseAndLeave(_, e) => Err(error(&name, e)),
        }
    }
}

#[async_trait]
impl Backend for Reached {
    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), BackendError> {
        self.send("vault put", (name.to_owned(), Some(bytes))).await
    }

    async fn get(
        &self,
        name: &str,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<Option<Bytes>, BackendError> {
        self.ask("vault get", name).await?;
        self.place.memory.get(name, range).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, BackendError> {
        self.ask("vault list", prefix).await?;
        self.place.memory.list(prefix).await
    }

    async fn delete(&self, name: &str) -> Result<(), BackendError> {
        self.send("vault delete", (name.to_owned(), None)).await
    }

    fn place(&self) -> &str {
        NAME
    }
}

/// The vaults of a process: one, which it opens once.
pub struct One {
    reached: Arc<Reached>,
    opened: OnceCell<Vault>,
}

impl One {
    pub fn new(place: Arc<Place>, director: Arc<Director>, world: Fake) -> Self {
        Self { reached: Arc::new(Reached { place, director, world }), opened: OnceCell::new() }
    }
}

#[async_trait]
impl Vaults for One {
    async fn open(&self, name: &str) -> Result<Opened, Fault> {
        let by = Some(self.reached.place.key.clone());
        let attach = || Vault::attach(self.reached.clone(), by, None);
        let vault = self.opened.get_or_try_init(attach).await;
        let vault = vault.map_err(|e| fault("open the vault", &name, &e))?.clone();
        Ok(Opened { vault, cache: None, host: "simulated".to_owned() })
    }
}
