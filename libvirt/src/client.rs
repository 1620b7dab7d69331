//! The async face: one daemon, reconnected as often as needed, its events as a stream.
//!
//! Invariants:
//! - no call ever runs on an async thread: each has a thread of its own, so a call that hangs (behind a
//!   stopped QEMU, say) holds up neither the runtime nor its shutdown;
//! - dropping the future of a call does not end the call, and the call stays in [`Client::in_flight`]
//!   until its effect can no longer come;
//! - ordinary calls share a limited number of places; urgent ones (thaw, resume, abort) need none, and
//!   no call waits behind others in a connection (`lines`), so calls that hang cannot keep a guest
//!   frozen, nor another domain unseen;
//! - while connected, all events are registered: a connection without events is not shown as one.
//!
//! A supervisor thread opens the connection, registers for events, waits until it breaks, and starts
//! over with growing pauses. It is a plain thread because all it does is wait for libvirt.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use tokio::sync::{Semaphore, broadcast, oneshot, watch};
use uuid::Uuid;

use crate::conn::{ConnectOptions, Connection};
use crate::domain::Domain;
use crate::error::{Class, Error, ErrorCode, Result};
use crate::event::Event;
use crate::inflight::InFlight;
use crate::instance::DaemonInstance;
use crate::lines::Lines;
use crate::uri::LocalUri;

/// How a client behaves.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// How each connection is opened.
    pub connect: ConnectOptions,
    /// The first pause after a failure; doubles up to `backoff_max`.
    pub backoff_min: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// Events kept for a slow receiver; when it falls further behind it is told that it missed some.
    pub event_capacity: usize,
    /// Ordinary calls at the same time.
    pub parallel_calls: usize,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connect: ConnectOptions::default(),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
            event_capacity: 1024,
            parallel_calls: 32,
        }
    }
}

/// Whether there is a connection.
#[derive(Debug, Clone)]
pub enum Status {
    /// There is.
    Connected {
        /// Which one, counted from 1.
        generation: u64,
        /// The daemon behind it.
        instance: Option<DaemonInstance>,
    },
    /// There is none now.
    Disconnected {
        /// Why the last attempt failed; `None` before its end.
        error: Option<Error>,
    },
}

#[derive(Clone)]
enum Link {
    Up { generation: u64, lines: Arc<Lines> },
    Down { error: Option<Error> },
}

enum Order {
    /// The connection of this generation broke, or may have.
    Check(u64),
    Closed(u64),
    Stop,
}

struct Inner {
    uri: LocalUri,
    link: watch::Receiver<Link>,
    events: broadcast::Sender<Event>,
    in_flight: InFlight,
    places: Arc<Semaphore>,
    orders: mpsc::Sender<Order>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
    }
}

/// A libvirt daemon. Clones share it; the last one ends it.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("uri", &self.inner.uri).field("status", &self.status()).finish()
    }
}

/// One domain of a client's.
#[derive(Debug, Clone)]
pub struct DomainHandle {
    client: Client,
    uuid: Uuid,
}

impl Client {
    /// Starts to connect to a URI and returns at once; [`Client::connected`] waits.
    ///
    /// # Errors
    /// [`ErrorCode::RemoteUri`] and the other faults of the URI; a daemon that is not there is none.
    pub fn start(uri: &str, options: ClientOptions) -> Result<Self> {
        let uri = LocalUri::parse(uri)?;
        let (events, _) = broadcast::channel(options.event_capacity.max(1));
        let (link_tx, link) = watch::channel(Link::Down { error: None });
        let (orders, inbox) = mpsc::channel();
        let supervisor = Supervisor {
            uri: uri.clone(),
            places: options.parallel_calls.max(1),
            options,
            link: link_tx,
            events: events.clone(),
            inbox,
            orders: orders.clone(),
        };
        let places = Arc::new(Semaphore::new(supervisor.places));
        std::thread::Builder::new()
            .name("libvirt-client".to_owned())
            .spawn(move || supervisor.run())
            .map_err(|e| {
                Error::own("virConnectOpen", uri.to_string(), ErrorCode::SystemError, e.to_string())
            })?;
        let in_flight = InFlight::default();
        Ok(Self { inner: Arc::new(Inner { uri, link, events, in_flight, places, orders }) })
    }

    /// What it was started with.
    pub fn uri(&self) -> &LocalUri {
        &self.inner.uri
    }

    /// Whether there is a connection now.
    pub fn status(&self) -> Status {
        match &*self.inner.link.borrow() {
            Link::Up { generation, lines } => {
                Status::Connected { generation: *generation, instance: lines.first().instance().cloned() }
            }
            Link::Down { error } => Status::Disconnected { error: error.clone() },
        }
    }

    /// Waits until there is a connection, for at most `limit`.
    ///
    /// # Errors
    /// The last attempt's error, or [`ErrorCode::Disconnected`].
    pub async fn connected(&self, limit: Duration) -> Result<Status> {
        let mut link = self.inner.link.clone();
        let up = link.wait_for(|l| matches!(l, Link::Up { .. }));
        // The guard must not be held across the end of the statement.
        let came = tokio::time::timeout(limit, up).await.is_ok_and(|r| r.is_ok());
        match self.status() {
            status @ Status::Connected { .. } if came => Ok(status),
            Status::Disconnected { error: Some(error) } => Err(error),
            _ => Err(self.disconnected()),
        }
    }

    /// All events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    /// The calls that have not come back.
    pub fn in_flight(&self) -> &InFlight {
        &self.inner.in_flight
    }

    /// Goes in order, for at most `limit`: calls under way come back first, then the events are given up, then the connection
    /// ends. Whether it came to that. No call is taken any more.
    ///
    /// The kernel would end the connection as well. But a libvirtd whose client goes in the middle of a call takes its events
    /// apart in two threads, and libvirt 9.0 can crash of it.
    pub async fn close(&self, limit: Duration) -> bool {
        let in_order = async {
            self.inner.in_flight.all_back().await;
            let _ = self.inner.orders.send(Order::Stop);
            let mut link = self.inner.link.clone();
            // Its sender is the last that goes.
            while link.changed().await.is_ok() {}
        };
        tokio::time::timeout(limit, in_order).await.is_ok()
    }

    fn disconnected(&self) -> Error {
        let object = format!("connection {}", self.inner.uri);
        match &*self.inner.link.borrow() {
            Link::Down { error: Some(e) } => {
                Error::own("virConnectOpen", object, ErrorCode::Disconnected, e.message.clone())
            }
            _ => Error::own("virConnectOpen", object, ErrorCode::Disconnected, "not connected"),
        }
    }

    /// Runs `f` with the connection on a thread of its own. `what` names the call in
    /// [`Client::in_flight`].
    ///
    /// # Errors
    /// [`ErrorCode::Disconnected`] when there is no connection; whatever `f` says.
    pub async fn call<T, F>(&self, what: &str, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        self.run(what, None, false, f).await
    }

    /// The domain with that UUID; it is looked up at each call, so it outlives connections.
    pub fn domain(&self, uuid: Uuid) -> DomainHandle {
        DomainHandle { client: self.clone(), uuid }
    }

    async fn run<T, F>(&self, what: &str, domain: Option<Uuid>, urgent: bool, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T> + Send + 'static,
    {
        let place = if urgent { None } else { Arc::clone(&self.inner.places).acquire_owned().await.ok() };
        let link = self.inner.link.borrow().clone();
        let Link::Up { generation, lines } = link else { return Err(self.disconnected()) };
        let guard = self.inner.in_flight.begin(what, domain, lines.first().instance().cloned());
        let abandon = AbandonOnDrop(Some(Arc::clone(&guard.abandoned)));
        let orders = self.inner.orders.clone();
        let (answer, waiting) = oneshot::channel();
        std::thread::Builder::new()
            .name("libvirt-call".to_owned())
            .spawn(move || {
                let line = lines.line();
                drop(lines);
                let result = line.as_ref().map_err(Clone::clone).and_then(|line| f(line.conn()));
                let mut lost = false;
                if let Err(error) = &result
                    && error.is_connection_lost()
                {
                    let _ = orders.send(Order::Check(generation));
                    lost = error.class() == Class::InDoubt;
                }
                if lost {
                    guard.answer_lost()
                } else {
                    drop(guard)
                }
                drop(place);
                // The last handle of a connection closes it, which may wait: not on an async thread.
                drop(line);
                let _ = answer.send(result);
            })
            .map_err(|e| Error::own("thread", what, ErrorCode::SystemError, e.to_string()))?;
        let result = waiting.await;
        abandon.came_back();
        result.unwrap_or_else(|_| {
            Err(Error::own(
                "thread",
                what,
                ErrorCode::OperationFailed,
                "the call's thread ended without an answer",
            ))
        })
    }
}

/// Marks a call as abandoned when its future is dropped before the answer.
struct AbandonOnDrop(Option<Arc<std::sync::atomic::AtomicBool>>);

impl AbandonOnDrop {
    fn came_back(mut self) {
        self.0 = None;
    }
}

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        if let Some(flag) = &self.0 {
            flag.store(true, Ordering::Relaxed);
        }
    }
}

impl DomainHandle {
    /// Its UUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Runs `f` with the domain on a thread of its own.
    ///
    /// # Errors
    /// [`ErrorCode::Disconnected`], [`ErrorCode::NoDomain`], whatever `f` says.
    pub async fn call<T, F>(&self, what: &str, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> Result<T> + Send + 'static,
    {
        let uuid = self.uuid;
        self.client.run(what, Some(uuid), false, move |c| f(&c.domain_by_uuid(uuid)?)).await
    }

    /// As [`Self::call`], without waiting for a place: for what brings a guest to safety.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub async fn urgent<T, F>(&self, what: &str, f: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Domain) -> Result<T> + Send + 'static,
    {
        let uuid = self.uuid;
        self.client.run(what, Some(uuid), true, move |c| f(&c.domain_by_uuid(uuid)?)).await
    }
}

struct Supervisor {
    uri: LocalUri,
    options: ClientOptions,
    places: usize,
    link: watch::Sender<Link>,
    events: broadcast::Sender<Event>,
    inbox: mpsc::Receiver<Order>,
    orders: mpsc::Sender<Order>,
}

impl Supervisor {
    fn run(self) {
        let mut generation = 0;
        let mut pause = self.options.backoff_min;
        loop {
            match self.open(generation + 1) {
                Ok((conn, subscription)) => {
                    generation += 1;
                    pause = self.options.backoff_min;
                    let instance = conn.instance().cloned();
                    tracing::info!(uri = %self.uri, generation, ?instance, "connected to libvirt");
                    let lines = Lines::new(conn.clone(), self.options.connect.clone());
                    self.link.send_replace(Link::Up { generation, lines });
                    let _ = self.events.send(Event::Connected { generation, instance });
                    let stop = self.wait_for_end(generation, &conn);
                    self.link.send_replace(Link::Down { error: None });
                    drop(subscription);
                    drop(conn);
                    if stop {
                        return;
                    }
                    tracing::warn!(uri = %self.uri, generation, "the connection to libvirt broke");
                    let _ = self.events.send(Event::Disconnected { generation });
                }
                Err(error) => {
                    tracing::debug!(uri = %self.uri, %error, "no connection to libvirt");
                    self.link.send_replace(Link::Down { error: Some(error) });
                    if self.rest(pause) {
                        return;
                    }
                    pause = (pause * 2).min(self.options.backoff_max);
                }
            }
        }
    }

    fn open(&self, generation: u64) -> Result<(Connection, crate::event::Subscription)> {
        let conn = Connection::open_with(&self.uri, &self.options.connect)?;
        let events = self.events.clone();
        let orders = self.orders.clone();
        let subscription = conn.subscribe(
            move |event| {
                // Nobody listening is no fault.
                let _ = events.send(event);
            },
            move || {
                let _ = orders.send(Order::Closed(generation));
            },
        )?;
        Ok((conn, subscription))
    }

    /// Returns when the connection broke (`false`) or the client ended (`true`).
    fn wait_for_end(&self, generation: u64, conn: &Connection) -> bool {
        loop {
            match self.inbox.recv() {
                Ok(Order::Stop) | Err(_) => return true,
                Ok(Order::Closed(g)) if g == generation => return false,
                Ok(Order::Check(g)) if g == generation && !conn.is_alive().unwrap_or(false) => return false,
                // About a connection that is no more, or one that is well.
                Ok(Order::Closed(_) | Order::Check(_)) => {}
            }
        }
    }

    /// Pauses; `true` when the client ended meanwhile.
    fn rest(&self, pause: Duration) -> bool {
        let until = std::time::Instant::now() + pause;
        loop {
            match self.inbox.recv_timeout(until.saturating_duration_since(std::time::Instant::now())) {
                Ok(Order::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return true,
                Err(mpsc::RecvTimeoutError::Timeout) => return false,
                Ok(_) => {}
            }
        }
    }
}
