//! Where a vault is, in one line, and how it is opened.
//!
//! | address | place |
//! |---|---|
//! | `file:///srv/vault` | a folder of this host |
//! | `s3://BUCKET/PREFIX?endpoint=https://…&region=…` | a bucket; without an endpoint Amazon's of that region |
//! | `sftp://USER@HOST:PORT/srv/vault` | a folder of another host; `/~/vault` counts from the user's home |
//!
//! An address is written to logs, to the journal and into messages. **It never holds a secret**: one with a password is
//! refused, and nothing of it is repeated. Secrets come from files or from the environment ([`Options`]).

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use url::Url;

use super::local::Local;
use super::s3::S3;
use super::sftp::Sftp;
use super::{Backend, BackendError};

/// Where a vault is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A folder of this host.
    File(PathBuf),
    /// A bucket.
    S3 {
        /// Its name.
        bucket: String,
        /// What all names begin with, without slashes at its ends; may be empty.
        prefix: String,
        /// The server, if it is not Amazon.
        endpoint: Option<String>,
        /// The region; servers other than Amazon mostly want `us-east-1`, which it then is.
        region: Option<String>,
    },
    /// A folder of another host.
    Sftp {
        /// Who logs in, if it is not what `ssh` would take.
        user: Option<String>,
        /// The host, also one that only `ssh`'s configuration knows.
        host: String,
        /// The port, if it is not what `ssh` would take.
        port: Option<u16>,
        /// Absolute, or relative to the user's home.
        path: String,
    },
}

/// What the address does not say.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// S3: a file in the form of `~/.aws/credentials`. Without one: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and
    /// `AWS_SESSION_TOKEN`.
    pub credentials: Option<PathBuf>,
    /// SFTP: the private key to log in with. Without one: what `ssh` finds by itself.
    pub identity: Option<PathBuf>,
    /// SFTP: the file of known host keys. Without one: `ssh`'s own.
    pub known_hosts: Option<PathBuf>,
    /// SFTP: `ssh`'s configuration. Without one: its own.
    pub ssh_config: Option<PathBuf>,
    /// SFTP: takes a server that cannot sync what was put. A power cut there may take back what was acknowledged.
    pub allow_volatile: bool,
    /// More than one host uses the vault: places that answer from a cache are refused.
    pub several_hosts: bool,
    /// Makes the folder, for a new vault. Otherwise it must be there: one that is not mounted is not made.
    pub create: bool,
}

/// What is wrong with an address. It does not repeat the address, for there may be a secret in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}")]
pub struct AddressError {
    /// What is wrong.
    pub cause: String,
    /// What to write instead.
    pub remedy: &'static str,
}

const FORMS: &str = "write file:///FOLDER, s3://BUCKET/PREFIX?endpoint=https://HOST&region=REGION or \
                     sftp://USER@HOST:PORT/FOLDER";
const SECRETS: &str = "take it out and change it, for it may have been logged; give S3's keys in a file or in \
                       AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and SSH's as a key file or through an agent";

fn wrong(cause: impl Into<String>, remedy: &'static str) -> AddressError {
    AddressError { cause: cause.into(), remedy }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (authority, path) = raw(text);
        // Before it is parsed: what is left out of some kinds of address was still written down.
        let user = authority.rsplit_once('@').map_or("", |(user, _)| user);
        if user.contains(':') || (text.starts_with("file:") && !user.is_empty()) {
            return Err(wrong("there is a password in the address", SECRETS));
        }
        // A parser would go up by itself, to somewhere that nobody sees written.
        if path.split('/').any(|part| matches!(&percent(part)[..], b"." | b"..")) {
            return Err(wrong("a path has no . and no ..", FORMS));
        }
        let url = Url::parse(text).map_err(|error| wrong(format!("not an address: {error}"), FORMS))?;
        if url.fragment().is_some() {
            return Err(wrong("an address has no part after #", FORMS));
        }
        match url.scheme() {
            // A parser takes `file:backup` for `/backup`.
            "file" if !is_whole(text) => Err(wrong("a file: address has three slashes and no host", FORMS)),
            "file" => file(&url),
            "s3" => s3(&url),
            "sftp" => sftp(&url),
            other => Err(wrong(format!("vaults are not reached by {other}://"), FORMS)),
        }
    }
}

/// Whether it is `file:///…`, as it was written.
fn is_whole(text: &str) -> bool {
    const BEGINS: &str = "file:///";
    text.get(..BEGINS.len()).is_some_and(|begins| begins.eq_ignore_ascii_case(BEGINS))
}

/// What stands between the slashes, and the path, as they were written.
fn raw(text: &str) -> (&str, &str) {
    let rest = text.split_once("://").map_or("", |(_, rest)| rest);
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    rest.split_once('/').unwrap_or((rest, ""))
}

/// The path as it is on disk.
fn path(url: &Url) -> Result<String, AddressError> {
    let bytes = percent(url.path());
    let path = String::from_utf8(bytes).map_err(|_| wrong("the path is not UTF-8", FORMS))?;
    if path.contains('\0') {
        return Err(wrong("the path has a zero byte", FORMS));
    }
    Ok(path)
}

fn percent(text: &str) -> Vec<u8> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        match (byte, digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.extend(u8::try_from(high * 16 + low));
                at += 3;
            }
            _ => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    out
}

fn no_query(url: &Url) -> Result<(), AddressError> {
    match url.query() {
        None => Ok(()),
        Some(_) => Err(wrong("this kind of address has no part after ?", FORMS)),
    }
}

fn file(url: &Url) -> Result<Address, AddressError> {
    no_query(url)?;
    if url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(wrong("a file: address has three slashes and no host", FORMS));
    }
    let path = path(url)?;
    if path == "/" {
        return Err(wrong("the root of the file system is no place for a vault", FORMS));
    }
    Ok(Address::File(Path::new(&path).to_owned()))
}

fn s3(url: &Url) -> Result<Address, AddressError> {
    if !url.username().is_empty() || url.port().is_some() {
        return Err(wrong("an s3: address names a bucket: no user and no port", SECRETS));
    }
    let bucket = url.host_str().filter(|bucket| !bucket.is_empty());
    let bucket = bucket.ok_or_else(|| wrong("there is no bucket in the address", FORMS))?.to_owned();
    let prefix = path(url)?.trim_matches('/').to_owned();
    if prefix.contains("//") {
        return Err(wrong("a prefix has no empty parts", FORMS));
    }
    let (mut endpoint, mut region) = (None, None);
    for (key, value) in url.query_pairs() {
        match &*key {
            "endpoint" if endpoint.is_none() => endpoint = Some(server(&value)?),
            "region" if region.is_none() && is_word(&value) => region = Some(value.into_owned()),
            // What it was is not said: people write keys there.
            _ => return Err(wrong("after ? there is only endpoint=…, region=…, each once", SECRETS)),
        }
    }
    Ok(Address::S3 { bucket, prefix, endpoint, region })
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

fn server(text: &str) -> Result<String, AddressError> {
    let url = Url::parse(text).map_err(|error| wrong(format!("endpoint: {error}"), FORMS))?;
    if url.password().is_some() || !url.username().is_empty() {
        return Err(wrong("there is a user or a password in the endpoint", SECRETS));
    }
    if !matches!(url.scheme(), "http" | "https") || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("an endpoint is http://HOST or https://HOST, with a port", FORMS));
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

fn sftp(url: &Url) -> Result<Address, AddressError> {
    no_query(url)?;
    let named = |text: &str, what: &str| {
        let text = String::from_utf8(percent(text)).unwrap_or_default();
        // Nothing that `ssh` might take for an option, or for two words.
        let fits =
            |c: char| !c.is_whitespace() && !c.is_control() && !matches!(c, '@' | '/' | '\'' | '"' | '\\');
        if text.is_empty() || text.starts_with('-') || !text.chars().all(fits) {
            return Err(wrong(format!("this cannot be the name of a {what}"), FORMS));
        }
        Ok(text)
    };
    let host = url.host_str().unwrap_or_default();
    let host = named(host.trim_start_matches('[').trim_end_matches(']'), "host")?;
    let user = match url.username() {
        "" => None,
        user => Some(named(user, "user")?),
    };
    let path = path(url)?;
    let path = match path.strip_prefix("/~/") {
        Some(below) => below.trim_matches('/').to_owned(),
        None => format!("/{}", path.trim_matches('/')),
    };
    if matches!(path.as_str(), "" | "/") {
        return Err(wrong("there is no folder in the address", FORMS));
    }
    Ok(Address::Sftp { user, host, port: url.port(), path })
}

/// As it was written, but for escapes.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file://{}", path.display()),
            Self::S3 { bucket, prefix, endpoint, region } => {
                write!(f, "s3://{bucket}/{prefix}")?;
                let parts = [("endpoint", endpoint), ("region", region)];
                let given = parts.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
                for (number, (key, value)) in given.enumerate() {
                    write!(f, "{}{key}={value}", if number == 0 { '?' } else { '&' })?;
                }
                Ok(())
            }
            Self::Sftp { user, host, port, path } => {
                f.write_str("sftp://")?;
                if let Some(user) = user {
                    write!(f, "{user}@")?;
                }
                if host.contains(':') {
                    write!(f, "[{host}]")?
                } else {
                    f.write_str(host)?
                }
                if let Some(port) = port {
                    write!(f, ":{port}")?;
                }
                f.write_str(if path.starts_with('/') { "" } else { "/~/" })?;
                f.write_str(path)
            }
        }
    }
}

/// Opens the place.
///
/// # Errors
/// If it can't be reached, or is not fit to hold a vault. That there is no vault in it is found by whoever lists it.
pub async fn open(address: &Address, options: &Options) -> Result<Arc<dyn Backend>, BackendError> {
    Ok(match address {
        Address::File(path) => Arc::new(Local::open(path, options).await?),
        Address::S3 { .. } => Arc::new(S3::open(address, options).await?),
        Address::Sftp { .. } => Arc::new(Sftp::open(address, options).await?),
    })
}
