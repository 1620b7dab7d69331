//! One hand on a guest at a time.
//!
//! Two of this process let a guest run or stand still: the steps that stop it for the instant of their act, and the
//! watchdog that lets it run again after an I/O error. Each looks first and acts then; were the other to act in between,
//! a guest could run in the middle of a pivot. So each takes the guest before it looks and keeps it until its act is
//! over. Another process is kept away by the marker's hold, and calls of a dead one by the fence.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::DomainId;

/// The guests that somebody of this process has in hand.
#[derive(Clone, Debug, Default)]
pub struct Standstills(Arc<Mutex<HashMap<DomainId, Arc<tokio::sync::Mutex<()>>>>>);

/// A guest in hand; let go when dropped.
#[derive(Debug)]
pub struct InHand {
    _alone: tokio::sync::OwnedMutexGuard<()>,
}

impl Standstills {
    /// Takes a guest as soon as nobody else has it.
    pub async fn take(&self, domain: &DomainId) -> InHand {
        let own = {
            let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|id, hand| id == domain || Arc::strong_count(hand) > 1);
            Arc::clone(all.entry(*domain).or_default())
        };
        InHand { _alone: own.lock_owned().await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_is_in_one_hand_at_a_time_and_others_are_not_held_up() {
        let (one, two) = (DomainId(uuid::Uuid::from_u128(1)), DomainId(uuid::Uuid::from_u128(2)));
        let guests = Standstills::default();
        let first = guests.take(&one).await;
        drop(guests.take(&two).await);
        let mut second = Box::pin(guests.take(&one));
        tokio::select! {
            biased;
            _ = &mut second => panic!("the same guest in two hands"),
            () = std::future::ready(()) => {}
        }
        drop(first);
        second.await;
        drop(guests.take(&two).await);
        assert_eq!(guests.0.lock().unwrap().len(), 1, "nothing is kept of guests that nobody has");
    }
}
