//! What tests of backends share: a line that breaks.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};

/// A line to a server that breaks, for good, when so many bytes went one way.
pub(crate) struct Cutting {
    pub(crate) at: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Cutting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Cutting {
    pub(crate) async fn start(to: SocketAddr, upwards: u64, downwards: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut lines = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                lines.spawn(async move {
                    let Ok(server) = TcpStream::connect(to).await else { return };
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    // Whichever ends first ends both.
                    tokio::select! {
                        () = carry(from_client, to_server, upwards) => {}
                        () = carry(from_server, to_client, downwards) => {}
                    }
                });
            }
        });
        Self { at, task }
    }
}

async fn carry(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, bytes: u64) {
    let _ = copy(&mut from.take(bytes), &mut to).await;
    let _ = to.flush().await;
}
