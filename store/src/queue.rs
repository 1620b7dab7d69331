//! The queue before an engine's writing thread.
//!
//! Whoever wants something written puts a command into the queue and waits for its answer; the thread takes one, and with
//! it whatever else waits (`Queue::gather`), makes that durable as one group, and answers (`deliver`). How a group is
//! made durable is the engine's; who waits, in which order, and who hears of it when, is the same for all.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;

use serde_json::Value;
use tokio::sync::{broadcast, oneshot};
use uuid::Uuid;
use vmkeep_workflow::ids::Seq;
use vmkeep_workflow::journal::{Append, AppendError, Appended, Record, Reserve, StoreError};

use crate::Adoption;
use crate::chain::Hash;
use crate::lock::Lock;
use crate::reserve::ReserveFile;

/// The most appends of a group.
const GROUP: usize = 512;
/// A group is closed when its records reach so many bytes.
const GROUP_BYTES: usize = 8 << 20;

/// An append that was checked, in the form in which an engine stores it.
pub(crate) trait Prepare {
    /// The append without its summary.
    fn append(&self) -> &Append;
    /// The same.
    fn into_append(self) -> Append;
}

/// What a writer is asked to do.
pub(crate) enum Command<P> {
    Append(Box<Pending<P>>),
    Row {
        change: RowChange,
        reply: oneshot::Sender<Result<(), StoreError>>,
    },
    Adopt {
        adoption: Box<Adoption>,
        reply: oneshot::Sender<Result<(), AppendError>>,
    },
    /// To look whether there is something to tidy up.
    Tidy,
}

/// An append that waits for its turn.
pub(crate) struct Pending<P> {
    pub(crate) prepared: P,
    pub(crate) reply: oneshot::Sender<Result<Appended, AppendError>>,
}

/// A change of a job's rows.
pub(crate) enum RowChange {
    Put { job: Uuid, row: String, value: Value },
    Clear { job: Uuid },
}

/// A change of rows with whoever waits for it.
pub(crate) type RowReply = (RowChange, oneshot::Sender<Result<(), StoreError>>);

/// What became of an append whose group was committed.
pub(crate) type Outcome = Result<Written, AppendError>;

/// An append that was written.
#[derive(Debug)]
pub(crate) struct Written {
    /// Where the stream ends.
    pub(crate) last: Seq,
    /// The hashes of the records.
    pub(crate) hashes: Vec<Hash>,
}

/// What is written together: appends, changes of rows, and a command that has to come after them.
pub(crate) type Gathered<P> = (Vec<Pending<P>>, Vec<RowReply>, Option<Command<P>>);

/// Takes with a command what else waits.
pub(crate) fn gather<P: Prepare>(commands: &Receiver<Command<P>>, first: Command<P>) -> Gathered<P> {
    let (mut group, mut rows, mut bytes) = (Vec::new(), Vec::new(), 0);
    let mut next = Some(first);
    while let Some(command) = next {
        match command {
            Command::Append(pending) => {
                bytes += pending.prepared.append().records.iter().map(Vec::len).sum::<usize>();
                group.push(*pending);
            }
            Command::Row { change, reply } => rows.push((change, reply)),
            Command::Tidy => {}
            adopt @ Command::Adopt { .. } => return (group, rows, Some(adopt)),
        }
        if group.len() + rows.len() >= GROUP || bytes >= GROUP_BYTES {
            break;
        }
        next = commands.try_recv().ok();
    }
    (group, rows, None)
}

/// Tells of a group that is durable: subscribers first, then whoever waits.
pub(crate) fn deliver<P: Prepare>(
    subscribers: &broadcast::Sender<Record>,
    group: Vec<Pending<P>>,
    outcomes: Vec<Outcome>,
) {
    let listened_to = subscribers.receiver_count() > 0;
    let mut answers = Vec::with_capacity(group.len());
    for (pending, outcome) in group.into_iter().zip(outcomes) {
        let Pending { prepared, reply } = pending;
        match outcome {
            Ok(written) => {
                answers.push((reply, Ok(Appended { last: written.last })));
                if listened_to {
                    publish(subscribers, prepared.into_append(), &written.hashes);
                }
            }
            Err(error) => answers.push((reply, Err(error))),
        }
    }
    for (reply, answer) in answers {
        // Whoever no longer waits is no reason to stop.
        let _ = reply.send(answer);
    }
}

fn publish(subscribers: &broadcast::Sender<Record>, append: Append, hashes: &[Hash]) {
    let Append { stream, expected, records, .. } = append;
    let mut seq = expected;
    for (bytes, &hash) in records.into_iter().zip(hashes) {
        seq = seq.next();
        // An error means that the last receiver has just gone.
        let _ = subscribers.send(Record { stream: stream.clone(), seq, bytes, hash });
    }
}

/// Gives all of a group the same answer.
pub(crate) fn refuse<P>(group: Vec<Pending<P>>, error: &AppendError) {
    for pending in group {
        let _ = pending.reply.send(Err(error.clone()));
    }
}

/// The writing side of an open store: the queue, the thread behind it, and what it holds.
pub(crate) struct Writing<P> {
    commands: mpsc::Sender<Command<P>>,
    thread: JoinHandle<()>,
    reserve: Arc<ReserveFile>,
    lock: Lock,
}

impl<P: Send + 'static> Writing<P> {
    /// Starts the thread: `run` works until the last sender is gone.
    pub(crate) fn start(
        commands: mpsc::Sender<Command<P>>,
        reserve: Arc<ReserveFile>,
        lock: Lock,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<Self, StoreError> {
        let thread = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(run)
            .map_err(|e| StoreError::Io(format!("could not start the store's writer: {e}")))?;
        Ok(Self { commands, thread, reserve, lock })
    }

    /// The writing side, if the store is not only read.
    pub(crate) fn of(writing: &Option<Self>) -> Result<&Self, AppendError> {
        let refused = || AppendError::Rejected("the store is open for reading only".to_owned());
        writing.as_ref().ok_or_else(refused)
    }

    fn beside_appends(writing: &Option<Self>) -> Result<&Self, StoreError> {
        let refused = || StoreError::Io("the store is open for reading only".to_owned());
        writing.as_ref().ok_or_else(refused)
    }

    /// Has an append written. It is queued on the first poll; one whose future is dropped after that takes place all the
    /// same.
    pub(crate) async fn append(&self, prepared: P) -> Result<Appended, AppendError> {
        let (reply, answer) = oneshot::channel();
        self.order(Command::Append(Box::new(Pending { prepared, reply })), answer).await
    }

    /// Has the commits of another store taken in.
    pub(crate) async fn adopt(&self, adoption: Adoption) -> Result<(), AppendError> {
        let (reply, answer) = oneshot::channel();
        self.order(Command::Adopt { adoption: Box::new(adoption), reply }, answer).await
    }

    /// Has the thread look whether there is something to tidy up.
    pub(crate) fn tidy(&self) {
        // Without the thread there is nothing to be tidied.
        let _ = self.commands.send(Command::Tidy);
    }

    async fn order<T>(
        &self,
        command: Command<P>,
        answer: oneshot::Receiver<Result<T, AppendError>>,
    ) -> Result<T, AppendError> {
        if self.commands.send(command).is_err() {
            return Err(AppendError::Fatal("the store's writer has ended".to_owned()));
        }
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(AppendError::Unknown("the store's writer ended in the middle".to_owned())),
        }
    }

    /// Has rows changed.
    pub(crate) async fn change_rows(writing: &Option<Self>, change: RowChange) -> Result<(), StoreError> {
        let gone = || StoreError::Io("the store's writer has ended".to_owned());
        let (reply, answer) = oneshot::channel();
        let command = Command::Row { change, reply };
        Self::beside_appends(writing)?.commands.send(command).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Looks at the reserve.
    pub(crate) async fn reserve(writing: &Option<Self>) -> Result<Reserve, StoreError> {
        let reserve = Arc::clone(&Self::beside_appends(writing)?.reserve);
        tokio::task::spawn_blocking(move || reserve.look())
            .await
            .map_err(|e| StoreError::Io(format!("looking at the reserve was cut off: {e}")))
    }

    /// Ends the thread, and then lets go of the lock. Waits for what is queued.
    pub(crate) fn close(self) {
        let Self { commands, thread, reserve: _, lock } = self;
        drop(commands);
        if thread.join().is_err() {
            tracing::error!("the store's writer panicked");
        }
        drop(lock);
    }
}
