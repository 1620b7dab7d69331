//! How a call takes effect: part by part, and what becomes of it when somebody dies between two of them.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Client, Fake, Inner, Late, Part, no};
use crate::hypervisor::{DomainId, HvError, HvResult, Trouble};
use crate::simulation::{Hands, MOMENT, Order, Place, Side};

/// libvirt's lock timeout.
const LOCK: Duration = Duration::from_secs(30);

/// A part of an effect.
pub(super) fn part(act: impl FnOnce(&mut Inner) -> HvResult<()> + Send + 'static) -> Part {
    Box::new(act)
}

fn broken() -> HvError {
    HvError::new(Trouble::Unreachable, "the connection to libvirt broke")
}

/// libvirt's lock of a domain, held as long as a call is carried out.
struct Lock {
    world: Fake,
    domain: Option<DomainId>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Some(id) = &self.domain {
            self.world.inner().locked.remove(id);
        }
    }
}

/// What became of the next part.
enum Next {
    /// The host went down, and this process with it.
    Gone,
    /// libvirtd did.
    Broken,
    /// There is none.
    Over,
    /// It was tried.
    Did(HvResult<()>),
}

impl Client {
    /// Looks at the world, at one moment.
    pub(super) async fn look<T>(&self, look: impl FnOnce(&mut Inner) -> HvResult<T>) -> HvResult<T> {
        tokio::time::sleep(MOMENT).await;
        let mut inner = self.world.inner();
        inner.pass();
        look(&mut inner)
    }

    /// Carries a call of libvirt's out, part by part.
    pub(super) async fn effect(
        &self,
        what: &'static str,
        domain: Option<DomainId>,
        parts: Vec<Part>,
    ) -> HvResult<()> {
        self.wait_for_the_lock(domain).await?;
        let _lock = Lock { world: self.world.clone(), domain };
        self.carry_out(what, domain, Hands::Libvirt, parts).await
    }

    /// The same by a helper, or by this process itself: nobody else goes on with it.
    pub(super) async fn own(&self, what: &'static str, parts: Vec<Part>) -> HvResult<()> {
        self.carry_out(what, None, Hands::Helper, parts).await
    }

    /// A call waits behind another one, also of a client that is gone.
    async fn wait_for_the_lock(&self, domain: Option<DomainId>) -> HvResult<()> {
        let mut waited = Duration::ZERO;
        loop {
            {
                let mut inner = self.world.inner();
                inner.pass();
                let late = inner.late.iter().any(|late| late.domain == domain);
                if !late && domain.is_none_or(|id| inner.locked.insert(id)) {
                    return Ok(());
                }
            }
            if waited >= LOCK {
                return no(Trouble::Busy, "cannot acquire state change lock");
            }
            tokio::time::sleep(MOMENT).await;
            waited += MOMENT;
        }
    }

    pub(super) async fn carry_out(
        &self,
        what: &'static str,
        domain: Option<DomainId>,
        hands: Hands,
        parts: Vec<Part>,
    ) -> HvResult<()> {
        let (libvirtd, boot) = {
            let inner = self.world.inner();
            (inner.libvirtd, inner.boot)
        };
        let mut parts: VecDeque<Part> = parts.into();
        let mut done = 0;
        let mut lost: Option<HvError> = None;
        loop {
            let side = match done {
                _ if parts.is_empty() => Side::After,
                0 => Side::Before,
                n => Side::Within(n),
            };
            if lost.is_none() {
                tokio::time::sleep(MOMENT).await;
                let left = || (domain, hands, (libvirtd, boot));
                match self.witness.at(&Place { what, domain, side, hands }) {
                    Order::Go => {}
                    Order::Linger(so_long) => tokio::time::sleep(so_long).await,
                    Order::Die if side == Side::Before => std::future::pending().await,
                    Order::Die => self.die(left(), std::mem::take(&mut parts), Duration::ZERO).await,
                    Order::DieAndLeave(after) => self.die(left(), std::mem::take(&mut parts), after).await,
                    Order::Fail(e) if side == Side::After => return Err(e.in_doubt()),
                    Order::Fail(e) => return Err(e),
                    Order::Lose(e) => lost = Some(e.in_doubt()),
                    Order::LoseAndLeave(after, e) => {
                        self.leave(left(), std::mem::take(&mut parts).into(), after);
                        return Err(e.in_doubt());
                    }
                }
            }
            match self.next(&mut parts, (libvirtd, boot), hands) {
                Next::Gone => std::future::pending().await,
                Next::Broken if side == Side::Before => return Err(broken()),
                Next::Broken => return Err(broken().in_doubt()),
                Next::Over => return lost.map_or(Ok(()), Err),
                Next::Did(outcome) => outcome?,
            }
            done += 1;
        }
    }

    /// The next part, if the one who carries it out is still there.
    fn next(&self, parts: &mut VecDeque<Part>, (libvirtd, boot): (u32, u32), hands: Hands) -> Next {
        let mut inner = self.world.inner();
        if inner.boot != boot {
            return Next::Gone;
        }
        if inner.libvirtd != libvirtd && hands == Hands::Libvirt {
            return Next::Broken;
        }
        inner.pass();
        let Some(part) = parts.pop_front() else { return Next::Over };
        let outcome = part(&mut inner);
        inner.pass();
        Next::Did(outcome)
    }

    async fn die(&self, left: (Option<DomainId>, Hands, (u32, u32)), parts: VecDeque<Part>, after: Duration) {
        self.leave(left, parts.into(), after);
        std::future::pending().await
    }

    /// libvirt goes on with a call, if it is still the libvirtd that has it.
    fn leave(
        &self,
        (domain, hands, begun): (Option<DomainId>, Hands, (u32, u32)),
        parts: Vec<Part>,
        after: Duration,
    ) {
        let mut inner = self.world.inner();
        if hands == Hands::Libvirt && !parts.is_empty() && begun == (inner.libvirtd, inner.boot) {
            let now = inner.now();
            inner.late.push(Late { domain, since: now, due: now + after, parts });
        }
    }

    /// An effect with an answer.
    pub(super) async fn answer<T: Send + 'static>(
        &self,
        what: &'static str,
        domain: Option<DomainId>,
        act: impl FnOnce(&mut Inner) -> HvResult<T> + Send + 'static,
    ) -> HvResult<T> {
        let slot = std::sync::Arc::new(std::sync::Mutex::new(None));
        let put = slot.clone();
        let one = part(move |inner| {
            let got = act(inner)?;
            *put.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(got);
            Ok(())
        });
        self.effect(what, domain, vec![one]).await?;
        let got = slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        got.ok_or_else(|| broken().in_doubt())
    }
}

impl Fake {
    /// libvirt is busy with the domain since so many milliseconds, on behalf of one that may be gone.
    pub(super) fn busy(inner: &Inner, domain: &DomainId) -> Option<u64> {
        let late = inner.late.iter().find(|late| late.domain == Some(*domain))?;
        let since = inner.now().saturating_sub(late.since);
        // Nobody who only looks takes that long.
        Some(u64::try_from(since.as_millis()).unwrap_or(u64::MAX).max(2000))
    }
}
