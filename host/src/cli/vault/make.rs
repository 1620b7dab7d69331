//! Making vaults, attaching them, and their keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use vmkeep_vault::backend::{Backend, address};
use vmkeep_vault::error::VaultError;
use vmkeep_vault::ids::KeyId;
use vmkeep_vault::keys::Role;
use vmkeep_vault::keys::wrap::{Cost, Credential};
use vmkeep_vault::names::ObjectName;
use vmkeep_vault::vault::{Confirmed, Draft};
use vmkeep_workflow::Fault;

use super::{Opened, key_source, open, settings};
use crate::cli::args::{Global, NewKey, OpenBy, VaultInit, VaultKey, VaultRef};
use crate::cli::make::whole;
use crate::cli::show::vault as show;
use crate::cli::terminal::Terminal;
use crate::cli::{Out, config};
use crate::codes;
use crate::config::{KeySource, VaultSettings};
use crate::vaults::remembered::Memory;
use crate::vaults::types::{Identity, role};
use crate::vaults::{self, named, secrets};

const MAKE: &str = "make the vault";

/// A vault that was made.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Made {
    #[serde(flatten)]
    pub(in crate::cli) identity: Identity,
    /// The key file that opens it, if there is one.
    pub(in crate::cli) key_file: Option<std::path::PathBuf>,
    /// Whether that file was made.
    pub(in crate::cli) key_file_made: bool,
    /// Where the recovery key was put.
    pub(in crate::cli) recovery_file: Option<std::path::PathBuf>,
}

/// A vault that was attached.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Attached {
    #[serde(flatten)]
    pub(in crate::cli) identity: Identity,
    /// How many backups of which domain.
    pub(in crate::cli) backups: BTreeMap<String, usize>,
    /// Manifests that cannot be read.
    pub(in crate::cli) unreadable: usize,
    /// The key that was made.
    pub(in crate::cli) new_key: Option<String>,
}

/// A key, as it says of itself.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct KeyRow {
    pub(in crate::cli) id: String,
    /// `passphrase` or `key file`.
    pub(in crate::cli) means: Option<&'static str>,
    pub(in crate::cli) role: Option<&'static str>,
    pub(in crate::cli) label: Option<String>,
    /// Why it cannot be read.
    pub(in crate::cli) problem: Option<String>,
}

/// A first or further key: with the file that it is to be, if that is not there yet.
enum New {
    Known(Credential),
    KeyFile(std::path::PathBuf),
}

impl New {
    /// From a file, or from the terminal.
    async fn of(source: Option<&KeySource>, label: &str) -> Result<Self, Fault> {
        match source {
            // Looked at by its name, so that a link to nowhere is not taken for nothing.
            Some(KeySource::KeyFile(path)) if path.symlink_metadata().is_err() => {
                Ok(Self::KeyFile(path.clone()))
            }
            Some(source) => secrets::of(source).map(Self::Known),
            None => {
                let mut terminal = Terminal::open(label, "Name a file: --key-file or --passphrase-file")?;
                Ok(Self::Known(Credential::Passphrase(terminal.new_passphrase(label).await?)))
            }
        }
    }

    /// The key; the file is made now. Whether it was.
    fn take(self) -> Result<(Credential, bool), Fault> {
        match self {
            Self::Known(credential) => Ok((credential, false)),
            Self::KeyFile(path) => {
                secrets::make_key_file(&path)?;
                Ok((secrets::of(&KeySource::KeyFile(path))?, true))
            }
        }
    }
}

pub(super) async fn init(global: &Global, out: &Out, args: VaultInit) -> Result<(), Fault> {
    let config = config(global)?;
    let by = OpenBy {
        key_file: args.key_file.clone(),
        passphrase_file: args.passphrase_file.clone(),
        allow_volatile: args.allow_volatile,
        ..OpenBy::default()
    };
    let settings = settings(&config, &args.vault, &by)?;
    let memory = Memory::of(&settings, &config.state_dir);
    if let Some(known) = memory.load()? {
        // Also where it is not mounted now: a folder that is made in its place would hide behind it.
        let cause = format!("this host knows the vault {} there", known.id);
        return Err(Fault::permanent(codes::VAULT_EXISTS, MAKE, settings.label(), cause).remedy(
            "Mount it, and use it: `vmkeep vault attach VAULT`; or, if it is given up: `vmkeep vault forget VAULT`",
        ));
    }
    if args.plain && settings.key.is_some() {
        let cause = "the configuration names a key for it, and a vault without encryption has none";
        return Err(Fault::permanent(codes::USAGE, MAKE, settings.label(), cause)
            .remedy("Take the key out of its table, or leave --plain out"));
    }
    let backend = empty(&settings).await?;
    let failed = |error: VaultError| vaults::fault(MAKE, &settings, &error);
    let (confirmed, first) = if args.plain {
        (Confirmed::plain(args.separate_domains).map_err(failed)?, None)
    } else {
        // Before the recovery key: nobody is to write that down for nothing.
        let first = New::of(settings.key.as_ref(), &settings.label()).await?;
        let draft = Draft::encrypted(args.separate_domains).map_err(failed)?;
        (confirm(&settings, &draft, args.recovery_file.as_deref()).await?, Some(first.take()?))
    };
    let key_file_made = first.as_ref().is_some_and(|(_, made)| *made);
    let first = first.map(|(credential, _)| (credential, Cost::default(), args.label));
    let vault = Box::pin(confirmed.put(backend, first)).await.map_err(failed)?;
    vaults::learn(&settings, &config.state_dir, &vault).await?;
    let made = Made {
        identity: Identity::of(&settings, &vault),
        key_file: match &settings.key {
            Some(KeySource::KeyFile(path)) => Some(path.clone()),
            _ => None,
        },
        key_file_made,
        recovery_file: args.recovery_file,
    };
    out.show(&made, show::made)
}

/// The place, in which there must be no vault.
async fn empty(settings: &VaultSettings) -> Result<Arc<dyn Backend>, Fault> {
    let failed = |error| vaults::backend_fault(MAKE, settings, &error);
    let backend = address::open(&settings.url, &settings.options(true)).await.map_err(failed)?;
    let names = backend.list("vault.").await.map_err(failed)?;
    let header = |name: &str| match name.parse() {
        Ok(ObjectName::Header(id)) => Some(id),
        _ => None,
    };
    let found: Vec<_> = names.iter().filter_map(|one| header(&one.name)).collect();
    if found.is_empty() {
        return Ok(backend);
    }
    let error = VaultError::Occupied { place: backend.place().to_owned(), found };
    Err(vaults::fault(MAKE, settings, &error))
}

/// Has the recovery key confirmed: typed in from paper, or read again from the file that it was put into. Either proves
/// that it is somewhere else than in this process, and neither happens unless somebody asked for it.
async fn confirm(
    settings: &VaultSettings,
    draft: &Draft,
    file: Option<&std::path::Path>,
) -> Result<Confirmed, Fault> {
    let failed = |error: VaultError| vaults::fault(MAKE, settings, &error);
    let words = draft.recovery_words().map_err(failed)?;
    if let Some(file) = file {
        let path = whole(file)?;
        secrets::make(&path, zeroize::Zeroizing::new(format!("{}\n", *words)).as_bytes())?;
        return draft.confirm(&secrets::text(&path)?).map_err(failed);
    }
    let label = settings.label();
    let instead = "Run it at a terminal; or have the recovery key put into a file: --recovery-file";
    let mut terminal = Terminal::open(&label, instead)?;
    let accept = |typed: &str| draft.confirm(typed).map_err(|error| error.to_string());
    terminal.confirm(&label, &words, accept).await
}

pub(super) async fn attach(global: &Global, out: &Out, vault: &VaultRef, new: &NewKey) -> Result<(), Fault> {
    let by_words = vault.key.recovery || vault.key.recovery_file.is_some();
    if !by_words && (new.new_key_file.is_some() || new.new_passphrase_file.is_some()) {
        let cause = "a key is made only with --recovery or --recovery-file";
        return Err(Fault::permanent(codes::USAGE, "attach the vault", &vault.vault, cause)
            .remedy("`vmkeep vault key add` makes another key with one that is there"));
    }
    let opened = open(global, vault).await?;
    let new_key = if by_words {
        let configured = opened.settings.key.clone();
        Some(add(&opened, new, configured.as_ref(), Role::Full).await?.0.to_string())
    } else {
        None
    };
    vaults::refresh(&opened.settings, &config(global)?.state_dir, &opened.vault).await?;
    let all = opened.backups().await?;
    let mut backups = BTreeMap::new();
    let mut unreadable = 0;
    for (_, backup) in all.iter() {
        match &backup.manifest {
            Ok(manifest) => *backups.entry(manifest.domain_name.clone()).or_default() += 1,
            Err(_) => unreadable += 1,
        }
    }
    let identity = Identity::of(&opened.settings, &opened.vault);
    out.show(&Attached { identity, backups, unreadable, new_key }, show::attached)
}

pub(super) fn forget(global: &Global, out: &Out, vault: &str) -> Result<(), Fault> {
    let config = config(global)?;
    let settings = vaults::find(&config, vault)?;
    let known = Memory::of(&settings, &config.state_dir).forget()?;
    out.show(&serde_json::json!({ "vault": settings.label(), "known": known }), |_| {
        show::forgotten(&settings.label(), known)
    })
}

/// Makes a key: the one that is given, or else the other, or else a passphrase that is asked for. Which, and the file that
/// was made for it.
async fn add(
    opened: &Opened,
    new: &NewKey,
    other: Option<&KeySource>,
    role: Role,
) -> Result<(KeyId, Option<std::path::PathBuf>), Fault> {
    let given = key_source(new.new_key_file.as_deref(), new.new_passphrase_file.as_deref())?;
    let given = given.or_else(|| other.cloned());
    let (credential, made) = New::of(given.as_ref(), &opened.settings.label()).await?.take()?;
    let added = opened.vault.add_key(credential, role, Cost::default(), new.label.clone()).await;
    let id = added.map_err(|error| opened.fault("make a key", &error))?;
    let file = given.filter(|_| made).map(|source| source.path().to_owned());
    Ok((id, file))
}

pub(super) async fn key(global: &Global, out: &Out, command: VaultKey) -> Result<(), Fault> {
    let state_dir = config(global)?.state_dir;
    match command {
        VaultKey::List { vault } => {
            let opened = open(global, &vault).await?;
            out.show(&rows(&opened).await?, |rows| show::keys(rows))
        }
        VaultKey::Add { vault, new, role } => {
            let opened = open(global, &vault).await?;
            let (id, file) = add(&opened, &new, None, role.into()).await?;
            vaults::refresh(&opened.settings, &state_dir, &opened.vault).await?;
            out.show(&serde_json::json!({ "key": id.to_string(), "key_file_made": file }), |_| {
                show::key_added(&id.to_string(), file.as_deref())
            })
        }
        VaultKey::Remove { vault, key, last } => {
            let opened = open(global, &vault).await?;
            let id = remove(&opened, &key, last).await?;
            vaults::refresh(&opened.settings, &state_dir, &opened.vault).await?;
            out.show(&serde_json::json!({ "key": id.to_string() }), |_| show::key_removed(&id.to_string()))
        }
    }
}

async fn wrapped(
    opened: &Opened,
) -> Result<Vec<(KeyId, Result<vmkeep_vault::keys::wrap::Label, VaultError>)>, Fault> {
    opened.vault.wrapped_keys().await.map_err(|error| opened.fault("read the vault's keys", &error))
}

async fn rows(opened: &Opened) -> Result<Vec<KeyRow>, Fault> {
    let row = |(id, said): (KeyId, Result<vmkeep_vault::keys::wrap::Label, VaultError>)| {
        let problem = said.as_ref().err().map(ToString::to_string);
        let said = said.ok();
        KeyRow {
            id: id.to_string(),
            means: said.as_ref().map(|said| if said.passphrase { "passphrase" } else { "key file" }),
            role: said.as_ref().map(|said| role(said.role)),
            label: said.map(|said| said.label),
            problem,
        }
    };
    Ok(wrapped(opened).await?.into_iter().map(row).collect())
}

async fn remove(opened: &Opened, word: &str, last: bool) -> Result<KeyId, Fault> {
    const DOING: &str = "take the key away";
    let keys = wrapped(opened).await?;
    let id = named::one(keys.iter().map(|(id, _)| *id), word, "key").map_err(|(code, cause)| {
        let code = if code == codes::NO_SUCH_BACKUP { codes::VAULT_KEY_WRONG } else { code };
        Fault::permanent(code, "find the key", word, cause).remedy("`vmkeep vault key list VAULT`")
    })?;
    // One that is damaged opens nothing, and one of a writer makes no other.
    let left = keys
        .iter()
        .filter(|(other, said)| *other != id && said.as_ref().is_ok_and(|said| said.role == Role::Full));
    if left.count() == 0 && !last {
        let cause = "no other full key would be left, and only the 24 words would open the vault";
        return Err(Fault::permanent(codes::INVALID_STATE, DOING, id.to_string(), cause)
            .remedy("Make another one first: `vmkeep vault key add VAULT`; or say --last"));
    }
    opened.vault.remove_key(id).await.map_err(|error| opened.fault(DOING, &error))?;
    Ok(id)
}
