//! Connections to other hosts are secured as libvirt and QEMU do it: a certificate authority of one's own in a file, and a
//! certificate for the client where the server asks for one.
//!
//! The name or address that was connected to must be in the server's certificate, as a *subject alternative name*: a
//! common name alone does not count, as nowhere any more. The server's plain bytes end with its answer to STARTTLS, and what
//! somebody slips in after that is taken for TLS, and fails.
//!
//! Keys may be RSA, as libvirt's documents have them made, or any that ring can read. (An ECDSA key that GnuTLS' `certtool` has
//! written has a byte too many half of the time, and is refused, by its file's name.)

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::address::Stream;

/// Whom to believe, and as whom to come. The files are read at each connection.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Certificates of authorities, PEM.
    pub authority: PathBuf,
    /// The client's certificate (with those between it and the authority) and its key, PEM.
    pub client: Option<(PathBuf, PathBuf)>,
    /// The name that the server's certificate must have, if not the host that is connected to.
    pub name: Option<String>,
}

impl Tls {
    /// A folder in QEMU's manner: `ca-cert.pem`, and, if they are there, `client-cert.pem` and `client-key.pem`.
    #[must_use]
    pub fn folder(folder: &Path) -> Self {
        let client = (folder.join("client-cert.pem"), folder.join("client-key.pem"));
        Self {
            authority: folder.join("ca-cert.pem"),
            client: Some(client).filter(|(certificate, _)| certificate.exists()),
            name: None,
        }
    }

    /// Secures a connection.
    pub(super) async fn secure(&self, host: &str, stream: Stream) -> Result<Stream, String> {
        let tls = self.clone();
        let config = tokio::task::spawn_blocking(move || tls.config()).await.map_err(|e| e.to_string())??;
        let name = self.name.as_deref().unwrap_or(host);
        let server = ServerName::try_from(name.to_owned()).map_err(|e| format!("{name}: {e}"))?;
        let secured = TlsConnector::from(Arc::new(config)).connect(server, stream).await;
        Ok(Box::new(secured.map_err(|e| e.to_string())?))
    }

    fn config(&self) -> Result<ClientConfig, String> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&self.authority)? {
            roots.add(certificate).map_err(|e| format!("{}: {e}", self.authority.display()))?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_root_certificates(roots);
        match &self.client {
            None => Ok(config.with_no_client_auth()),
            Some((certificate, key)) => {
                let chain = certificates(certificate)?;
                let wrong = |e: &dyn std::fmt::Display| format!("{}: {e}", key.display());
                let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| wrong(&e))?;
                config.with_client_auth_cert(chain, secret).map_err(|e| wrong(&e))
            }
        }
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file).map_err(|e| wrong(&e))?.collect();
    match all.map_err(|e| wrong(&e))? {
        none if none.is_empty() => Err(wrong(&"holds no certificate")),
        some => Ok(some),
    }
}
