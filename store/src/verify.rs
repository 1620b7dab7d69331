//! Checking that a journal is whole: that each stream is complete and its chain fits, that the commits are those that were
//! sealed, that the summaries and keys are those that the events give.
//!
//! Everything is read once, in the order of the commits. After a finding the walk goes on from what is stored, so one
//! damaged record gives one finding and not one for each record after it. A store that is written to meanwhile is checked
//! up to some commit, and its summaries up to where they are.

mod report;

use std::collections::{HashMap, HashSet, VecDeque};

use vmkeep_workflow::ids::{JobId, Seq, StreamId};
use vmkeep_workflow::journal::{JobFilter, StoreError, link};
use vmkeep_workflow::summary::JobSummary;

use crate::Store;
use crate::burial::Graves;
use crate::chain::{self, Commit, Digest, GENESIS, Hash, Placed, genesis};
use crate::fold::{Job, Jobs};

pub use self::report::{Finding, Problem, Report};

/// So many records or commits are asked for at a time.
const PAGE: usize = 512;

/// Checks a store.
///
/// # Errors
/// Only when the store cannot be read at all; what is wrong with it stands in the report.
pub async fn verify(store: &dyn Store) -> Result<Report, StoreError> {
    let mut walk = Walk::new(store);
    for text in store.inspect().await? {
        walk.report.add(Finding::of(Problem::Engine { text }));
    }
    match walk.everything().await {
        // As far as it could be read: the rest is one more finding.
        Err(StoreError::Damaged(text)) => walk.report.add(Finding::of(Problem::Engine { text })),
        outcome => outcome?,
    }
    Ok(walk.report)
}

struct Walk<'a> {
    store: &'a dyn Store,
    report: Report,
    ends: HashMap<StreamId, (Seq, Hash)>,
    jobs: Jobs,
    graves: Graves,
    ahead: VecDeque<Commit>,
    /// The commit whose records are being read.
    commit: u64,
    digest: Digest,
    /// The last commit that was closed, and its link.
    closed: (u64, Hash),
}

impl<'a> Walk<'a> {
    fn new(store: &'a dyn Store) -> Self {
        Self {
            store,
            report: Report::new(store.id(), store.engine()),
            ends: HashMap::new(),
            jobs: Jobs::default(),
            graves: Graves::default(),
            ahead: VecDeque::new(),
            commit: 0,
            digest: Digest::default(),
            closed: (0, genesis(store.id())),
        }
    }

    async fn everything(&mut self) -> Result<(), StoreError> {
        let mut position = 0;
        loop {
            let page = self.store.history(position, PAGE).await?;
            let Some(last) = page.last() else { break };
            position = last.position;
            for placed in &page {
                self.place(placed).await?;
            }
        }
        self.close_up_to(self.commit).await?;
        self.report.streams = self.ends.len() as u64;
        self.report.link = chain::hex(&self.closed.1);
        for stream in self.graves.wrong(|stream| self.ends.get(stream).copied()) {
            self.report.add(Finding::in_stream(&stream, Problem::Tombstone));
        }
        self.report.pruned = self.graves.tombstones();
        self.summaries().await
    }

    async fn place(&mut self, placed: &Placed) -> Result<(), StoreError> {
        if placed.commit > self.commit {
            self.close_up_to(placed.commit - 1).await?;
            self.commit = placed.commit;
        } else if placed.commit < self.commit {
            self.report.add(Finding::at(&placed.record, Problem::OutOfOrder { commit: placed.commit }));
        }
        let record = &placed.record;
        self.report.records += 1;
        self.digest.add(&record.stream, record.seq, &record.hash);
        if record.stream.as_str().is_empty() {
            self.report.add(Finding::at(record, Problem::NoStream));
        }
        let gone = self.graves.take(record);
        let (last, hash) = *self.ends.entry(record.stream.clone()).or_insert((Seq(0), GENESIS));
        if record.seq != last.next() {
            self.report.add(Finding::at(record, Problem::Missing { after: last }));
        } else if !gone && link(&hash, &record.bytes) != record.hash {
            self.report.add(Finding::at(record, Problem::Chain));
        }
        self.ends.insert(record.stream.clone(), (record.seq, record.hash));
        if !gone && let Err(why) = self.jobs.take(record) {
            self.report.add(Finding::at(record, Problem::NotUnderstood { why }));
        }
        Ok(())
    }

    /// Compares the commits up to one with what was read of them.
    async fn close_up_to(&mut self, number: u64) -> Result<(), StoreError> {
        while self.closed.0 < number {
            if self.ahead.is_empty() {
                self.ahead.extend(self.store.commits(self.closed.0, PAGE).await?);
            }
            let expected = self.closed.0 + 1;
            match self.ahead.front() {
                Some(commit) if commit.number == expected => {
                    let commit = *commit;
                    self.ahead.pop_front();
                    self.close(&commit);
                }
                _ => {
                    self.report.add(Finding::in_commit(expected, Problem::CommitMissing));
                    // The next link cannot be checked; it is taken as it stands.
                    self.closed.0 = expected;
                    if expected == self.commit {
                        self.digest = Digest::default();
                    }
                }
            }
        }
        Ok(())
    }

    fn close(&mut self, commit: &Commit) {
        let number = commit.number;
        self.report.commits += 1;
        if number == self.commit {
            if std::mem::take(&mut self.digest).finish() != commit.digest {
                self.report.add(Finding::in_commit(number, Problem::Digest));
            }
        } else {
            self.report.add(Finding::in_commit(number, Problem::CommitEmpty));
        }
        if chain::link(&self.closed.1, number, &commit.digest) != commit.link {
            self.report.add(Finding::in_commit(number, Problem::Link));
        }
        self.closed = (number, commit.link);
    }

    async fn summaries(&mut self) -> Result<(), StoreError> {
        let mut jobs = std::mem::take(&mut self.jobs).into_inner();
        // Those that were let go while the walk was under way.
        jobs.retain(|stream, _| !self.graves.has(stream));
        self.keys(&jobs).await?;
        let mut stored = HashSet::new();
        for summary in self.store.jobs(&JobFilter::default()).await? {
            let stream = StreamId::job(summary.job);
            let mut job = jobs.remove(&stream).unwrap_or_default();
            self.report.jobs += 1;
            self.summary(&stream, &mut job, &summary).await?;
            stored.insert(stream);
        }
        for (stream, job) in jobs {
            if job.summary.is_some() && !stored.contains(&stream) {
                // It may have been let go after the walk came to its end.
                if let Err(StoreError::Pruned { .. }) = self.store.read(&stream, Seq(1), 1).await {
                    continue;
                }
                self.report.add(Finding::in_stream(&stream, Problem::SummaryMissing));
            }
        }
        Ok(())
    }

    async fn summary(
        &mut self,
        stream: &StreamId,
        job: &mut Job,
        stored: &JobSummary,
    ) -> Result<(), StoreError> {
        self.catch_up(stream, stored.job, job, stored.seq).await?;
        if job.lost {
            return Ok(());
        }
        match &job.summary {
            None => self.report.add(Finding::in_stream(stream, Problem::SummaryStray)),
            Some(computed) if computed == stored => {}
            Some(computed) => {
                let fields = report::differing(computed, stored);
                self.report.add(Finding::in_stream(stream, Problem::SummaryDiffers { fields }));
            }
        }
        Ok(())
    }

    /// Takes in what was appended to a job after the walk came by.
    async fn catch_up(&self, stream: &StreamId, id: JobId, job: &mut Job, to: Seq) -> Result<(), StoreError> {
        let (seen, _) = self.ends.get(stream).copied().unwrap_or((Seq(0), GENESIS));
        if to <= seen {
            return Ok(());
        }
        let missing = usize::try_from(to.0 - seen.0).unwrap_or(usize::MAX);
        for record in self.store.read(stream, seen.next(), missing).await? {
            // It was not understood then either: the next check will say so.
            let _ = job.take(id, &record);
        }
        Ok(())
    }

    async fn keys(&mut self, jobs: &HashMap<StreamId, Job>) -> Result<(), StoreError> {
        let keys: HashMap<String, StreamId> = self.store.keys().await?.into_iter().collect();
        let buried = self.report.pruned.iter().filter_map(|grave| Some((&grave.stream, grave.key.as_ref()?)));
        let living = jobs.iter().filter_map(|(stream, job)| Some((stream, job.key.as_ref()?)));
        let mut findings = Vec::new();
        for (stream, key) in buried.chain(living) {
            match keys.get(key) {
                Some(holder) if holder == stream => {}
                Some(holder) => {
                    let problem = Problem::KeyElsewhere { key: key.clone(), holder: holder.clone() };
                    findings.push(Finding::in_stream(stream, problem));
                }
                None => {
                    findings.push(Finding::in_stream(stream, Problem::KeyMissing { key: key.clone() }));
                }
            }
        }
        findings.into_iter().for_each(|finding| self.report.add(finding));
        Ok(())
    }
}
