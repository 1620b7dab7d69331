//! How far the reading of disks is, durably: in the progress row of its step.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmkeep_vault::ids::RunId;
use vmkeep_vault::write::Log;
use vmkeep_workflow::progress::Progress;

use super::read::ReadDisk;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Token {
    /// Runs that were named and of which nobody knows whether they were put.
    in_flight: Vec<RunId>,
    /// The disks that are in the vault.
    disks: Vec<ReadDisk>,
}

/// Writes down what is put, before it is, and what is durable.
pub(super) struct Notes {
    progress: Progress,
    token: Mutex<Token>,
}

impl Notes {
    /// What an earlier attempt has noted, and what this one will.
    pub(super) fn of(progress: &Progress) -> Self {
        let saved = progress.saved().and_then(|saved| Token::deserialize(saved).ok());
        Self { progress: progress.clone(), token: Mutex::new(saved.unwrap_or_default()) }
    }

    fn token(&self) -> std::sync::MutexGuard<'_, Token> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn note(&self, change: impl FnOnce(&mut Token) + Send) -> std::io::Result<()> {
        let token = {
            let mut token = self.token();
            change(&mut token);
            token.clone()
        };
        self.progress.save(&token).await.map_err(std::io::Error::other)
    }

    pub(super) fn in_flight(&self) -> Vec<RunId> {
        self.token().in_flight.clone()
    }

    pub(super) fn disks(&self) -> Vec<ReadDisk> {
        self.token().disks.clone()
    }

    /// Notes that a disk is in the vault, in place of what was known of it.
    pub(super) async fn disk(&self, read: ReadDisk) -> std::io::Result<()> {
        self.note(|token| match token.disks.iter_mut().find(|known| known.disk.target == read.disk.target) {
            Some(known) => *known = read,
            None => token.disks.push(read),
        })
        .await
    }
}

#[async_trait]
impl Log for Notes {
    async fn run_named(&self, run: RunId) -> std::io::Result<()> {
        self.note(|token| token.in_flight.push(run)).await
    }

    async fn run_put(&self, run: RunId) -> std::io::Result<()> {
        self.note(|token| token.in_flight.retain(|known| *known != run)).await
    }
}
