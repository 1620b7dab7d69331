//! The key and the file of heads, on disk.
//!
//! | file in the folder | what it is |
//! |---|---|
//! | `key` | the private key, as text; mode 0600 |
//! | `key.new` | a key that is being made |
//! | `heads.jsonl` | heads and successions, a line each; only ever appended to |
//!
//! **The first key** is written to `key.new`, fsynced, renamed to `key`, the folder fsynced. So there is a `key` only if it is
//! whole. Without a `key` nothing was signed with `key.new`, and it is made anew.
//!
//! **A new key**: `key.new` is made durable; then the succession, signed by both, is appended and durable; then `key.new` takes
//! the place of `key`. A crash before the succession leaves the old key (the next start removes `key.new`); after it, the next
//! start finds in the file that `key.new` succeeds `key`, and puts it in its place. The old private key is gone then.
//!
//! **A head** is one line, written and fsynced before anybody hears of it. A crash may leave the last line torn; nobody was
//! told of that one, and the next start cuts it off. A torn line of which the end is whole (its sectors came late) is cut off
//! as well: it does not fit its signature, and it is the last. Damage before that is left alone for a check to find.
//!
//! **A write that failed** leaves unknown what is on disk. The next head is written over the place, from the end of what was
//! durable, so no fsync is ever relied on for pages that an earlier one lost.

use std::fs::{File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::SigningKey;
use jiff::Timestamp;
use rustix::fs::OFlags;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmkeep_workflow::journal::StoreError;

use super::{Head, Line, LineError, PublicKey, SignedHead, Succession, VERSION};
use crate::chain::{Commit, hex, unhex};
use crate::files::{self, FILE_MODE, failed};

/// The longest file of a key.
const MAX_KEY: u64 = 1024;

/// The private key as it is stored. The public one shows that it was read right.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    vmkeep: String,
    version: u32,
    secret: String,
    public: String,
}

/// Where the key came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyOrigin {
    /// It was there.
    Found,
    /// It was made, for there was none and nothing had been signed.
    Made,
    /// It was made, for there was none although heads had been signed: the old one is lost, and nobody vouches for this one.
    Lost,
}

/// The file of heads in a folder.
#[must_use]
pub fn log_path(folder: &Path) -> PathBuf {
    folder.join("heads.jsonl")
}

fn key_path(folder: &Path) -> PathBuf {
    folder.join("key")
}

fn young_path(folder: &Path) -> PathBuf {
    folder.join("key.new")
}

/// The public key of the one in a folder; nothing if there is none yet. Blocks, and changes nothing.
///
/// # Errors
/// When it cannot be read, or is damaged.
pub fn public_key(folder: &Path) -> Result<Option<PublicKey>, StoreError> {
    Ok(read_key(&key_path(folder))?.map(|key| PublicKey::of(&key)))
}

/// Signs heads, and keeps them. One at a time: the caller holds the store's lock.
pub struct Notary {
    folder: PathBuf,
    store: Uuid,
    key: SigningKey,
    log: File,
    /// The bytes of the log that are durable.
    durable: u64,
    last: Option<Head>,
}

impl Notary {
    /// Opens the folder, and makes it, the key and the file when they are not there. Settles what a crash left. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when the key is none: it is left as it is, for only its owner knows whether a copy exists.
    /// [`StoreError::Io`] with the reason.
    pub fn open(folder: &Path, store: Uuid) -> Result<(Self, KeyOrigin), StoreError> {
        files::make_folder(folder)?;
        let log = open_log(folder)?;
        let kept = recover(folder, &log)?;
        let (key, origin) = match read_key(&key_path(folder))? {
            Some(key) => (settle(folder, key, &kept.successions)?, KeyOrigin::Found),
            None => {
                let key = make_key(folder)?;
                take_place(folder)?;
                (key, if kept.lines == 0 { KeyOrigin::Made } else { KeyOrigin::Lost })
            }
        };
        let last = kept.last.filter(|head| head.store == store);
        Ok((Self { folder: folder.to_owned(), store, key, log, durable: kept.length, last }, origin))
    }

    /// The public key.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        PublicKey::of(&self.key)
    }

    /// The last head of this store that was signed, be it by a notary before this one.
    #[must_use]
    pub fn last(&self) -> Option<Head> {
        self.last
    }

    /// Signs the head, and keeps it durably. Nothing if it is the one that was signed last. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it could not be kept; nothing was signed then, and it may be tried again.
    pub fn sign(&mut self, commit: &Commit, at: Timestamp) -> Result<Option<SignedHead>, StoreError> {
        if self.last.is_some_and(|last| (last.commit, last.link) == (commit.number, commit.link)) {
            return Ok(None);
        }
        let head = Head { store: self.store, commit: commit.number, link: commit.link, at };
        let signed = SignedHead::new(head, &self.key);
        self.append(&Line::Head(signed.clone()))?;
        self.last = Some(head);
        Ok(Some(signed))
    }

    /// Makes a new key, has the old one vouch for it, and lets the old one go. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Io`]. Whether the old key or the new one holds is then decided by what is durable, at the next start; until
    /// then the old one goes on signing.
    pub fn rotate(&mut self, at: Timestamp) -> Result<Succession, StoreError> {
        let new = make_key(&self.folder)?;
        let succession = Succession::new(self.store, at, &self.key, &new);
        self.append(&Line::Key(Box::new(succession.clone())))?;
        take_place(&self.folder)?;
        self.key = new;
        Ok(succession)
    }

    fn append(&mut self, line: &Line) -> Result<(), StoreError> {
        let text = line.render() + "\n";
        let written = self
            .log
            .set_len(self.durable)
            .and_then(|()| self.log.write_all_at(text.as_bytes(), self.durable))
            .and_then(|()| self.log.sync_all());
        written.map_err(|e| failed("write to", &log_path(&self.folder), &e))?;
        self.durable += text.len() as u64;
        Ok(())
    }
}

fn open_log(folder: &Path) -> Result<File, StoreError> {
    let path = log_path(folder);
    let open = || {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&path)?;
        files::sync_folder(folder)?;
        Ok(file)
    };
    open().map_err(|e: io::Error| failed("open", &path, &e))
}

/// What a log holds.
#[derive(Default)]
struct Kept {
    lines: u64,
    length: u64,
    last: Option<Head>,
    successions: Vec<(PublicKey, PublicKey)>,
}

/// Reads the log, and cuts off the last line if it is torn.
fn recover(folder: &Path, log: &File) -> Result<Kept, StoreError> {
    let path = log_path(folder);
    let mut text = Vec::new();
    (&*log).read_to_end(&mut text).map_err(|e| failed("read", &path, &e))?;
    let (mut kept, mut torn) = (Kept::default(), false);
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let ended = line.ends_with(b"\n");
        let at_end = kept.length + line.len() as u64 == text.len() as u64;
        // Only the last one can be torn; the signatures of all others are for a check to look at.
        let read = if at_end { Line::parse } else { Line::understand };
        let parsed = std::str::from_utf8(line).ok().and_then(|line| match read(line.trim_end()) {
            // Of a newer release: it is whole.
            Err(LineError::TooNew { .. }) => Some(None),
            parsed => parsed.ok().map(Some),
        });
        match parsed {
            _ if !ended => torn = true,
            None if at_end => torn = true,
            // Damage in the middle is for a check to find.
            None | Some(None) => {}
            Some(Some(Line::Head(signed))) => kept.last = Some(signed.head),
            Some(Some(Line::Key(succession))) => kept.successions.push((succession.old, succession.new)),
        }
        if !torn {
            kept.lines += 1;
            kept.length += line.len() as u64;
        }
    }
    if torn {
        tracing::warn!(path = %path.display(), "the last line was torn by a crash, and is cut off");
        log.set_len(kept.length)
            .and_then(|()| log.sync_all())
            .map_err(|e| failed("cut the torn end off", &path, &e))?;
    }
    Ok(kept)
}

/// Decides between the key and one that was being made when the power went.
fn settle(
    folder: &Path,
    key: SigningKey,
    successions: &[(PublicKey, PublicKey)],
) -> Result<SigningKey, StoreError> {
    let young = young_path(folder);
    if !young.exists() {
        return Ok(key);
    }
    // One that cannot be read was not durable yet, so nothing was signed with it.
    if let Ok(Some(new)) = read_key(&young)
        && successions.contains(&(PublicKey::of(&key), PublicKey::of(&new)))
    {
        take_place(folder)?;
        return Ok(new);
    }
    files::remove(&young).map_err(|e| failed("remove", &young, &e))?;
    Ok(key)
}

/// Makes a key under its young name, durably.
fn make_key(folder: &Path) -> Result<SigningKey, StoreError> {
    let young = young_path(folder);
    let make = || -> io::Result<SigningKey> {
        let mut secret = [0_u8; 32];
        let mut filled = 0;
        while filled < secret.len() {
            filled += getrandom(&mut secret[filled..], GetRandomFlags::empty())?;
        }
        let key = SigningKey::from_bytes(&secret);
        let text = serde_json::to_string(&KeyFile {
            vmkeep: "audit key".to_owned(),
            version: VERSION,
            secret: hex(&secret),
            public: PublicKey::of(&key).to_string(),
        })?;
        files::remove(&young)?;
        let file = files::make_file(&young)?;
        file.write_all_at((text + "\n").as_bytes(), 0)?;
        file.sync_all()?;
        files::sync_folder(folder)?;
        Ok(key)
    };
    make().map_err(|e| failed("make the key", &young, &e))
}

/// Puts the young key in the place of the key.
fn take_place(folder: &Path) -> Result<(), StoreError> {
    let key = key_path(folder);
    std::fs::rename(young_path(folder), &key)
        .and_then(|()| files::sync_folder(folder))
        .map_err(|e| failed("put the new key in the place of", &key, &e))
}

fn read_key(path: &Path) -> Result<Option<SigningKey>, StoreError> {
    let opened = File::options().read(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("open the key", path, &e)),
    };
    let mut text = String::new();
    let meta = file.metadata().map_err(|e| failed("look at the key", path, &e))?;
    let damaged = |why: &str| StoreError::Damaged(format!("the key {}: {why}", path.display()));
    match (&file).take(MAX_KEY).read_to_string(&mut text) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::InvalidData => return Err(damaged("it is no text")),
        Err(e) => return Err(failed("read the key", path, &e)),
    }
    let found: KeyFile = serde_json::from_str(&text).map_err(|e| damaged(&e.to_string()))?;
    if found.version > VERSION {
        return Err(damaged("a newer release wrote it"));
    }
    let secret = unhex(&found.secret).ok_or_else(|| damaged("it holds no key"))?;
    let key = SigningKey::from_bytes(&secret);
    if PublicKey::of(&key).to_string() != found.public {
        return Err(damaged("its two halves do not belong together"));
    }
    if meta.mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "others could read the key of the audit; make a new one");
        let tightened = file.set_permissions(Permissions::from_mode(FILE_MODE));
        tightened.map_err(|e| failed("take the key away from others", path, &e))?;
    }
    Ok(Some(key))
}
