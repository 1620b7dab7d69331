use std::sync::Mutex;

use super::*;
use crate::backend::memory::Memory;
use crate::vault::Confirmed;

/// A clock that runs only while somebody waits by it, and does something each time.
struct Stepped {
    now: Mutex<Duration>,
    lease: LeaseId,
    vault: Vault,
    beats: u64,
}

impl fmt::Debug for Stepped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stepped")
    }
}

#[async_trait]
impl Clock for Stepped {
    fn now(&self) -> Duration {
        *self.now.lock().unwrap()
    }

    async fn pause(&self, _: Duration) {
        let hour = {
            let mut now = self.now.lock().unwrap();
            *now += Duration::from_secs(3600);
            now.as_secs() / 3600
        };
        // A sign of life every hour, for so many hours.
        if hour <= self.beats {
            let name = crate::names::ObjectName::Lease(self.lease, crate::names::LeasePart::Beat(hour));
            let object = crate::codec::encode(self.vault.keys(), &name, &Holder::default()).unwrap();
            self.vault.put(&name, object).await.unwrap();
        }
    }
}

async fn vault() -> Vault {
    Confirmed::plain(false).unwrap().put(Arc::new(Memory::default()), None).await.unwrap()
}

#[tokio::test]
async fn one_that_shows_no_sign_of_life_for_a_day_of_watching_is_revoked_and_no_sooner() {
    for beats in [0, 30] {
        let vault = vault().await;
        let (own, other) = (
            Lease::begin(&vault, &Holder::default()).await.unwrap(),
            Lease::begin(&vault, &Holder::default()).await.unwrap(),
        );
        let now = Mutex::new(Duration::ZERO);
        let clock = Arc::new(Stepped { now, lease: other.id(), vault: vault.clone(), beats });
        let mut watch = Watch::new(clock.clone(), PATIENCE);
        let limit = Some(Duration::from_secs((beats + 23) * 3600));
        let waited = watch.wait(&vault, &own, &Holder::default(), limit).await.unwrap();
        assert_eq!(waited, Waited::Still(std::iter::once(other.id()).collect()));
        assert!(!other.is_revoked().await.unwrap());
        // The watch goes on where it was, though somebody else waits now.
        let waited = watch.wait(&vault, &own, &Holder::default(), None).await.unwrap();
        assert_eq!(waited, Waited::Over);
        assert!(other.is_revoked().await.unwrap() && !own.is_revoked().await.unwrap());
        assert_eq!(clock.now().as_secs() / 3600, beats + 24);
    }
}

#[tokio::test]
async fn who_began_later_is_not_waited_for_and_who_was_revoked_does_not_wait() {
    let vault = vault().await;
    let own = Lease::begin(&vault, &Holder::default()).await.unwrap();
    let mut watch = Watch::default();
    assert_eq!(watch.wait(&vault, &own, &Holder::default(), None).await.unwrap(), Waited::Over);
    let ended = Lease::begin(&vault, &Holder::default()).await.unwrap();
    ended.end().await.unwrap();
    assert_eq!(watch.wait(&vault, &own, &Holder::default(), None).await.unwrap(), Waited::Over);
    let _later = Lease::begin(&vault, &Holder::default()).await.unwrap();
    lease::revoke(&vault, own.id(), &Holder::default()).await.unwrap();
    assert_eq!(watch.wait(&vault, &own, &Holder::default(), None).await.unwrap(), Waited::Revoked);
}
