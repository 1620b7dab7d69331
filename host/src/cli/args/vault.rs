//! Words about vaults. They need no daemon: a vault is made for many who use it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use jiff::tz::TimeZone;
use vmkeep_steps::image::qcow2::Format;
use vmkeep_vault::check::Share;
use vmkeep_vault::ids::VaultId;
use vmkeep_vault::keys::Role;

use crate::config::time_zone;
use crate::text::parse_span;

/// A vault, and what opens it.
#[derive(Clone, Debug, Args)]
pub struct VaultRef {
    /// Its name in the configuration, or its address: file:///srv/vault
    pub vault: String,
    /// What opens it.
    #[command(flatten)]
    pub key: OpenBy,
}

/// What opens a vault.
#[derive(Clone, Debug, Default, Args)]
pub struct OpenBy {
    /// Open it with this key file (default: as configured, else a passphrase is asked for)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["passphrase_file", "recovery", "recovery_file"])]
    pub key_file: Option<PathBuf>,
    /// Open it with the passphrase in this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["recovery", "recovery_file"])]
    pub passphrase_file: Option<PathBuf>,
    /// Open it with the 24 words, which are asked for
    #[arg(long)]
    pub recovery: bool,
    /// Open it with the 24 words in this file
    #[arg(long, value_name = "FILE", conflicts_with = "recovery")]
    pub recovery_file: Option<PathBuf>,
    /// Take an SFTP server that cannot sync: its power cut may take back what was acknowledged
    #[arg(long)]
    pub allow_volatile: bool,
}

/// What opens the second vault of a command.
#[derive(Clone, Debug, Default, Args)]
pub struct OpenOtherBy {
    /// Open the other vault with this key file (default: as configured, else a passphrase is asked for)
    #[arg(long, value_name = "FILE", conflicts_with = "other_passphrase_file")]
    pub other_key_file: Option<PathBuf>,
    /// Open the other vault with the passphrase in this file
    #[arg(long, value_name = "FILE")]
    pub other_passphrase_file: Option<PathBuf>,
}

/// A key that is to be made.
#[derive(Clone, Debug, Default, Args)]
pub struct NewKey {
    /// The new key is this file; one that is not there is made
    #[arg(long, value_name = "FILE", conflicts_with = "new_passphrase_file")]
    pub new_key_file: Option<PathBuf>,
    /// The new key is the passphrase in this file (default: it is asked for)
    #[arg(long, value_name = "FILE")]
    pub new_passphrase_file: Option<PathBuf>,
    /// Who the new key is for; anybody who holds the storage can read it
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
}

/// What a key may be used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum KeyRole {
    /// Everything
    #[default]
    Full,
    /// Backups and reading; neither prunes nor collects
    Writer,
}

impl From<KeyRole> for Role {
    fn from(role: KeyRole) -> Self {
        match role {
            KeyRole::Full => Self::Full,
            KeyRole::Writer => Self::Writer,
        }
    }
}

/// Vaults: repositories of backups that several hosts may write to.
#[derive(Clone, Debug, Subcommand)]
pub enum Vault {
    /// Make a vault: encrypted, with a recovery key that is shown once
    Init(VaultInit),
    /// Open a vault that is there, say what it is, and keep what this host must know of it
    Attach {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// With --recovery, the key that is made.
        #[command(flatten)]
        new: NewKey,
    },
    /// Forget what this host knows of a vault; the vault stays as it is
    Forget {
        /// Its name in the configuration, or its address
        vault: String,
    },
    /// The keys that open a vault
    #[command(subcommand)]
    Key(VaultKey),
    /// The backups in a vault
    List {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// Only those of this domain: its name or UUID
        domain: Option<String>,
    },
    /// What a backup in a vault holds, and what its marks say
    Show {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// Its id, or the beginning or the end of it
        backup: String,
    },
    /// What a vault holds, what its backups share, and what pruning them would give back
    Stats {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
    },
    /// Find out whether the backups in a vault are whole
    Check(VaultCheck),
    /// Delete what no backup needs, beside whoever works with the vault
    Gc(VaultGc),
    /// Read backups again, each chunk once whoever needs it, and mark those that are good
    Verify(VaultVerify),
    /// Order that backups go, by name or by rules; the next collection deletes them. Nobody can take this back
    Prune(VaultPrune),
    /// Protect a backup in a vault from being pruned
    Protect {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// Its id, or the beginning or the end of it
        backup: String,
    },
    /// End all protections of a backup in a vault
    Unprotect {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// Its id, or the beginning or the end of it
        backup: String,
        /// Say what would come of it and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Heal what is known to be bad, from wherever its bytes still are
    Repair(VaultRepair),
    /// Copy backups into another vault
    Copy(VaultCopy),
    /// Write the disks of a backup as files, with the domain's definition
    Export(VaultExport),
    /// Bring plain images, or a backup in a folder, into a vault
    Import(VaultImport),
    /// Who uses a vault: collections wait for these
    Leases {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
    },
    /// Give a user of a vault up, as one that has died; it is always safe, and costs one that lives a second look
    Revoke {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// The lease: its id or the beginning of it
        lease: String,
    },
}

/// Make a vault.
#[derive(Clone, Debug, Args)]
pub struct VaultInit {
    /// Its name in the configuration, or its address: file:///srv/vault
    pub vault: String,
    /// Without encryption: whoever reads the storage reads the backups
    #[arg(long, conflicts_with_all = ["key_file", "passphrase_file", "recovery_file"])]
    pub plain: bool,
    /// Domains share nothing, so that no guest learns what another stores; takes more room
    #[arg(long)]
    pub separate_domains: bool,
    /// Its first key is this file; one that is not there is made (default: as configured, else a passphrase is asked for)
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    pub key_file: Option<PathBuf>,
    /// Its first key is the passphrase in this file
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// Who the first key is for; anybody who holds the storage can read it
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub label: String,
    /// Put the recovery key into this new file, and read it again from there, instead of showing it at the terminal
    #[arg(long, value_name = "FILE")]
    pub recovery_file: Option<PathBuf>,
    /// Take an SFTP server that cannot sync: its power cut may take back what was acknowledged
    #[arg(long)]
    pub allow_volatile: bool,
}

/// The keys that open a vault.
#[derive(Clone, Debug, Subcommand)]
pub enum VaultKey {
    /// What each key says of itself
    List {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
    },
    /// Make another key
    Add {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// The new key.
        #[command(flatten)]
        new: NewKey,
        /// What it may be used for
        #[arg(long, value_enum, default_value_t)]
        role: KeyRole,
    },
    /// Take a key away; whoever has kept a copy of it is not locked out by that
    Remove {
        /// Which, and what opens it.
        #[command(flatten)]
        vault: VaultRef,
        /// The key: its id or the beginning of it
        key: String,
        /// Also the last one: then only the 24 words open the vault
        #[arg(long)]
        last: bool,
    },
}

/// Check a vault.
#[derive(Clone, Debug, Args)]
pub struct VaultCheck {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// Look whether all that backups need is there (the default)
    #[arg(long, conflicts_with_all = ["read", "backend"])]
    pub quick: bool,
    /// Read every byte of it as well, and compute it again
    #[arg(long, conflicts_with = "backend")]
    pub read: bool,
    /// Try what the vault's place must be able to do, and what these credentials can do there
    #[arg(long)]
    pub backend: bool,
}

/// Read backups again.
#[derive(Clone, Debug, Args)]
pub struct VaultVerify {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// Only this one: its id, or the beginning or the end of it (default: all)
    pub backup: Option<String>,
    /// Only look whether all that they need is there: nobody is verified by that
    #[arg(long, conflicts_with = "slice")]
    pub quick: bool,
    /// Read one share of the vault: 3/7 on the third of seven days. A backup is verified when all shares were read since
    /// it was put
    #[arg(long, value_name = "N/M", conflicts_with = "backup")]
    pub slice: Option<Share>,
}

/// Order that backups go.
#[derive(Clone, Debug, Args)]
pub struct VaultPrune {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// Their ids, or beginnings or ends of those (default: what no rule keeps)
    #[arg(value_name = "BACKUP", conflicts_with_all = ["keep", "domain", "yes"])]
    pub backups: Vec<String>,
    /// Which stay.
    #[command(flatten)]
    pub keep: KeepBy,
    /// Only those of this domain: its name or UUID
    #[arg(long, value_name = "DOMAIN")]
    pub domain: Option<String>,
    /// Only ask for it: for a host whose key may not prune
    #[arg(long)]
    pub ask: bool,
    /// Even if no other checked backup of the domain is left in the vault then
    #[arg(long, requires = "backups", conflicts_with_all = ["keep", "domain", "yes"])]
    pub last: bool,
    /// Say what would be ordered and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// By rules: order it without asking
    #[arg(long, conflicts_with = "dry_run")]
    pub yes: bool,
    /// By rules: also where no backup of the domain was ever verified
    #[arg(long, conflicts_with_all = ["backups", "last"])]
    pub unverified: bool,
}

/// Which backups of each domain stay: what any of these keeps. With one of them those of the configuration do not count.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "keep", multiple = true)]
pub struct KeepBy {
    /// The newest N
    #[arg(long, value_name = "N")]
    pub keep_last: Option<u32>,
    /// The newest of each of the last N hours that have one
    #[arg(long, value_name = "N")]
    pub keep_hourly: Option<u32>,
    /// The newest of each of the last N days that have one
    #[arg(long, value_name = "N")]
    pub keep_daily: Option<u32>,
    /// The newest of each of the last N weeks that have one
    #[arg(long, value_name = "N")]
    pub keep_weekly: Option<u32>,
    /// The newest of each of the last N months that have one
    #[arg(long, value_name = "N")]
    pub keep_monthly: Option<u32>,
    /// The newest of each of the last N years that have one
    #[arg(long, value_name = "N")]
    pub keep_yearly: Option<u32>,
    /// All that are not older than the newest by more than this: 14d
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    pub keep_within: Option<Duration>,
    /// Whose calendar days and weeks are of: Europe/Berlin (default: as configured, else this host's)
    #[arg(long, value_name = "ZONE", value_parser = time_zone)]
    pub time_zone: Option<TimeZone>,
}

/// Delete what no backup needs.
#[derive(Clone, Debug, Args)]
pub struct VaultGc {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// Give a pack up of which less than so many hundredths are needed, and move the rest
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub worth: u64,
    /// The longest time to wait for who began before; then the next collection goes on (default: as long as it takes)
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    pub wait: Option<Duration>,
    /// Obey only prunes that this host has known for so long, and never that of a domain's newest verified backup
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    pub prune_delay: Option<Duration>,
    /// Say so if more backups than this are to go
    #[arg(long, value_name = "N")]
    pub expect: Option<usize>,
    /// Say what would go and what would be freed, and delete nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Heal a vault.
#[derive(Clone, Debug, Args)]
pub struct VaultRepair {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// Another vault that may have what is lost: with copies of its backups, or others of the same domains
    #[arg(long, value_name = "VAULT", conflicts_with_all = ["index", "header", "manifest"])]
    pub from: Option<String>,
    /// What opens that.
    #[command(flatten)]
    pub other: OpenOtherBy,
    /// Make the index anew from packs, where it cannot be read
    #[arg(long, conflicts_with_all = ["header", "manifest"])]
    pub index: bool,
    /// Put the header back: as this host knows it, or else out of a backup
    #[arg(long, conflicts_with = "manifest")]
    pub header: bool,
    /// With --header, where this host knows nothing of the vault and its header is gone: the vault's id
    #[arg(long, value_name = "ID", requires = "header", value_parser = vault_id)]
    pub id: Option<VaultId>,
    /// Put a manifest back from a copy of the file backups/DOMAIN/BACKUP.LEASE
    #[arg(long, value_name = "FILE")]
    pub manifest: Option<PathBuf>,
}

/// Copy backups into another vault.
#[derive(Clone, Debug, Args)]
pub struct VaultCopy {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// The other vault, that is written to: its name in the configuration, or its address
    pub to: String,
    /// What opens that.
    #[command(flatten)]
    pub other: OpenOtherBy,
    /// Only these: their ids, or beginnings or ends of those (default: all)
    #[arg(long, value_name = "BACKUP", value_delimiter = ',')]
    pub backups: Vec<String>,
    /// Only those of this domain: its name or UUID
    #[arg(long, value_name = "DOMAIN", conflicts_with = "backups")]
    pub domain: Option<String>,
    /// Into a vault without encryption as well
    #[arg(long)]
    pub allow_plain: bool,
}

/// Write a backup as files.
#[derive(Clone, Debug, Args)]
pub struct VaultExport {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// Its id, or the beginning or the end of it
    pub backup: String,
    /// The folder that they go to; it is made if it is not there. With --disk, the file or the block device; with --format tar, the file
    #[arg(long, value_name = "PATH")]
    pub to: PathBuf,
    /// One disk, by target, to a file or onto a block device; what is written is read back
    #[arg(long, value_name = "DISK", conflicts_with = "disks")]
    pub disk: Option<String>,
    /// With --disk, also onto what holds data, of which nobody keeps a copy
    #[arg(long, requires = "disk")]
    pub overwrite_without_copy: bool,
    /// Of the disks
    #[arg(long, value_enum, default_value_t)]
    pub format: ExportFormat,
    /// Only these disks, by target: vda,vdb
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    pub disks: Vec<String>,
}

/// Bring what lies in files into a vault.
#[derive(Clone, Debug, Args)]
#[command(group = clap::ArgGroup::new("source").required(true).args(["from", "images"]))]
pub struct VaultImport {
    /// Which, and what opens it.
    #[command(flatten)]
    pub vault: VaultRef,
    /// The folder of a backup that `vmkeep snapshot` made; its memory is left out
    #[arg(long, value_name = "DIR", conflicts_with_all = ["images", "definition", "name", "uuid", "at"])]
    pub from: Option<PathBuf>,
    /// A plain image, with its format and all that it stands on: vda=qcow2:/path/to/file (may be repeated)
    #[arg(long = "disk", value_name = "DISK=FORMAT:PATH", value_parser = image)]
    pub images: Vec<ImportedImage>,
    /// With --disk, the domain's definition, as `virsh dumpxml --inactive` prints it
    #[arg(long, value_name = "FILE")]
    pub definition: Option<PathBuf>,
    /// With --disk, the domain's name (default: as its definition says)
    #[arg(long, value_name = "NAME", required_unless_present_any = ["from", "definition"])]
    pub name: Option<String>,
    /// With --disk, the domain's UUID (default: as its definition says, else a new one)
    #[arg(long, value_name = "UUID")]
    pub uuid: Option<uuid::Uuid>,
    /// With --disk, the instant of which the images are: 2027-01-31T12:00:00Z (default: of their last change)
    #[arg(long, value_name = "TIME")]
    pub at: Option<jiff::Timestamp>,
    /// Also secrets into a vault without encryption: a TPM's state, passwords in the definition
    #[arg(long)]
    pub allow_plain: bool,
}

/// A plain image that is to be imported. Its format is never guessed: a guest can write into a raw disk what looks like
/// another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportedImage {
    /// The disk that it becomes.
    pub target: String,
    /// What it is.
    pub format: Format,
    /// Where it is.
    pub path: PathBuf,
}

fn image(text: &str) -> Result<ImportedImage, String> {
    let parts = text.split_once('=').and_then(|(disk, rest)| Some((disk, rest.split_once(':')?)));
    let format = |word| match word {
        "raw" => Some(Format::Raw),
        "qcow2" => Some(Format::Qcow2),
        _ => None,
    };
    match parts {
        Some((target, (word, path))) if !target.is_empty() && !path.is_empty() => {
            let format = format(word).ok_or("the format is raw or qcow2")?;
            Ok(ImportedImage { target: target.to_owned(), format, path: path.into() })
        }
        _ => Err("it must be of the form vda=qcow2:/path/to/file".to_owned()),
    }
}

/// The format of a disk that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// Its bytes, with holes where it is zero
    #[default]
    Raw,
    /// QEMU's own
    Qcow2,
    /// All of it as one new file: a tarball with the raw disks
    Tar,
}

fn vault_id(text: &str) -> Result<VaultId, String> {
    text.parse().map_err(|_| "a vault's id has 32 digits".to_owned())
}
