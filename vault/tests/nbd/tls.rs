//! TCP, with TLS only: certificates as libvirt's documents have them made, against `qemu-nbd` and nbdkit.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use vmkeep_vault::nbd::{Address, Client, NbdError, Options, Tls};

use crate::support::{Server, image, run, text};

/// A folder in QEMU's manner, for server and client, of an authority of its own.
fn certificates(folder: &Path) -> PathBuf {
    std::fs::create_dir(folder).unwrap();
    let path = |name: &str| text(&folder.join(name)).to_owned();
    let key = |name: &str| {
        run("certtool", &["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile", &path(name)]);
    };
    let template = |name: &str, lines: &str| std::fs::write(folder.join(name), lines).unwrap();
    key("ca-key.pem");
    template("ca.info", "cn = test authority\nca\ncert_signing_key\nexpiration_days = 30\n");
    let (ca, ca_key) = (path("ca-cert.pem"), path("ca-key.pem"));
    let info = path("ca.info");
    run(
        "certtool",
        &["--generate-self-signed", "--load-privkey", &ca_key, "--template", &info, "--outfile", &ca],
    );
    let names = "dns_name = localhost\ndns_name = vault.example\nip_address = 127.0.0.1\n";
    for (who, lines) in [("server", &format!("tls_www_server\n{names}")[..]), ("client", "tls_www_client\n")]
    {
        let (own, certificate) = (path(&format!("{who}-key.pem")), path(&format!("{who}-cert.pem")));
        key(&format!("{who}-key.pem"));
        let file = format!("{who}.info");
        template(&file, &format!("cn = {who}\nsigning_key\nencryption_key\nexpiration_days = 30\n{lines}"));
        let signing = ["--generate-certificate", "--load-ca-certificate", &ca, "--load-ca-privkey", &ca_key];
        let this = ["--load-privkey", &own, "--template", &path(&file), "--outfile", &certificate];
        run("certtool", &[&signing[..], &this].concat());
    }
    folder.to_owned()
}

async fn read(port: u16, tls: Tls, size: u64) -> Result<Vec<u8>, NbdError> {
    let address = Address::tcp("127.0.0.1", port, tls, "");
    let client = Client::connect(&address, &Options { connections: 2, ..Options::default() }, None).await?;
    let bytes = client.read(0..size, None).await?.to_vec();
    client.close().await;
    Ok(bytes)
}

#[tokio::test]
async fn only_a_server_with_the_right_certificate_is_read_and_only_by_a_client_with_one() {
    let folder = tempfile::tempdir().unwrap();
    let ours = certificates(&folder.path().join("ours"));
    let theirs = certificates(&folder.path().join("theirs"));
    let bytes = image(8, 5 << 20);
    let disk = folder.path().join("disk");
    std::fs::write(&disk, &bytes).unwrap();
    let creds = format!("tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir={}", text(&ours));
    let qemu = ["-t", "-r", "-e", "4", "-f", "raw", "--object", &creds, "--tls-creds", "t", text(&disk)];
    let (certificates, file) =
        (format!("--tls-certificates={}", text(&ours)), format!("file={}", text(&disk)));
    let kit = ["-f", "-r", "--tls=require", "--tls-verify-peer", &certificates, "file", &file];
    for (program, args) in [("qemu-nbd", &qemu[..]), ("nbdkit", &kit)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let _server = Server::start(listener, program, args);
        let good = Tls::folder(&ours);
        assert!(read(port, good.clone(), 5 << 20).await.unwrap() == bytes, "{program}");
        let named = |name: &str| Tls { name: Some(name.into()), ..good.clone() };
        assert!(read(port, named("vault.example"), 5 << 20).await.unwrap() == bytes);
        let stranger = Tls { authority: theirs.join("ca-cert.pem"), ..good.clone() };
        for (why, tls) in [("another name", named("other.example")), ("another authority", stranger)] {
            let error = read(port, tls, 512).await.unwrap_err();
            assert!(matches!(error, NbdError::Tls { .. }), "{program}, {why}: {error}");
        }
        // With TLS 1.3 the server's refusal comes after the client is done.
        let foreign = Tls::folder(&theirs).client;
        for client in [None, foreign] {
            let error = read(port, Tls { client, ..good.clone() }, 512).await.unwrap_err();
            assert!(matches!(error, NbdError::Tls { .. } | NbdError::Lost { .. }), "{program}: {error}");
        }
        for file in ["nothing.pem", "ca.info"] {
            let error =
                read(port, Tls { authority: ours.join(file), ..good.clone() }, 512).await.unwrap_err();
            assert!(error.to_string().contains(file), "{error}");
        }
    }
}

#[tokio::test]
async fn a_server_without_tls_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    let ours = certificates(&folder.path().join("ours"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _server = Server::start(listener, "nbdkit", &["-f", "--tls=off", "memory", "1M"]);
    match read(port, Tls::folder(&ours), 512).await.unwrap_err() {
        NbdError::Refused { option: "STARTTLS", .. } => {}
        other => panic!("{other}"),
    }
}
