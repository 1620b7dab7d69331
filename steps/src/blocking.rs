//! Work that blocks, where blocking is allowed.
//!
//! In a simulation (feature `simulation`) it is done on the spot instead, and whoever directs the simulation is asked
//! before and after: so a run depends on nothing but its seed, and the process can "die" between the work and the moment
//! at which anybody hears of it. In the middle it is asked before each change of a file ([`touch`]), which can fail there.

use std::fs::File;

use tokio::task::JoinError;

/// Does it on a thread of its own kind.
pub(crate) async fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    #[cfg(feature = "simulation")]
    if let Some(witness) = crate::simulation::witness() {
        return Ok(crate::simulation::on_the_spot(&*witness, work).await);
    }
    tokio::task::spawn_blocking(work).await
}

/// The same for what fails as files do.
pub(crate) async fn io<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    run(work).await.unwrap_or_else(|e| Err(std::io::Error::other(e)))
}

/// Removes a file.
pub(crate) async fn remove(file: std::path::PathBuf) -> std::io::Result<()> {
    io(move || {
        touch("remove")?;
        std::fs::remove_file(file)
    })
    .await
}

/// A file is about to be changed in this way: by its creation, by a write, a sync, another name, its removal.
///
/// # Errors
/// Only in a simulation, where whoever directs it may let it fail as the kernel would.
#[cfg(feature = "simulation")]
pub(crate) fn touch(how: &'static str) -> rustix::io::Result<()> {
    crate::simulation::witness().map_or(Ok(()), |witness| crate::simulation::touch(&*witness, how))
}

/// A file is about to be read in this way: opened, looked at, listed, read from.
///
/// # Errors
/// As [`touch`].
#[cfg(feature = "simulation")]
pub(crate) fn look(how: &'static str) -> rustix::io::Result<()> {
    crate::simulation::witness().map_or(Ok(()), |witness| crate::simulation::look(&*witness, how))
}

/// Without a simulation nothing is asked.
#[cfg(not(feature = "simulation"))]
#[inline(always)]
pub(crate) const fn look(_how: &'static str) -> rustix::io::Result<()> {
    Ok(())
}

/// Without a simulation nothing is asked.
#[cfg(not(feature = "simulation"))]
#[inline(always)]
pub(crate) const fn touch(_how: &'static str) -> rustix::io::Result<()> {
    Ok(())
}

/// A file was made by this process. A simulation remembers that it is not durable until it is synced.
///
/// # Errors
/// Only in a simulation, when it cannot be looked at.
pub(crate) fn made(file: File) -> std::io::Result<File> {
    #[cfg(feature = "simulation")]
    crate::simulation::made(&file)?;
    Ok(file)
}

/// Makes durable what was written to a file, with its length and its attributes.
///
/// # Errors
/// When it cannot be: then nobody knows what of it is.
pub(crate) fn sync(file: &File) -> std::io::Result<()> {
    synced(file, File::sync_all)
}

/// The same without attributes that nobody needs to read it back.
///
/// # Errors
/// See [`sync`].
pub(crate) fn sync_data(file: &File) -> std::io::Result<()> {
    synced(file, File::sync_data)
}

fn synced(file: &File, sync: impl FnOnce(&File) -> std::io::Result<()>) -> std::io::Result<()> {
    touch("sync a file")?;
    sync(file)?;
    #[cfg(feature = "simulation")]
    crate::simulation::synced(file)?;
    Ok(())
}

/// Waits, from work that blocks, for what is asynchronous.
pub(crate) fn wait<F: Future>(runtime: &tokio::runtime::Handle, work: F) -> F::Output {
    #[cfg(feature = "simulation")]
    if crate::simulation::witness().is_some() {
        // Whatever a simulation's store is asked for it does at once.
        let mut work = std::pin::pin!(work);
        let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
        loop {
            if let std::task::Poll::Ready(done) = work.as_mut().poll(&mut cx) {
                return done;
            }
        }
    }
    runtime.block_on(work)
}
