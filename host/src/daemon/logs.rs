//! The daemon's log: lines for people or JSON objects, on standard error, with the spans job, step and attempt.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::util::SubscriberInitExt;
use vmkeep_workflow::Fault;

use crate::codes;
use crate::config::{Log, LogFormat};

/// Starts logging for this process.
///
/// # Errors
/// When the filter makes no sense.
pub fn start(log: &Log) -> Result<(), Fault> {
    let filter = EnvFilter::try_new(&log.filter).map_err(|error| {
        Fault::permanent(
            codes::UNSUPPORTED_CONFIGURATION_PARAMETER,
            "read the log level",
            log.filter.clone(),
            error,
        )
        .remedy("Use error, warn, info, debug or trace, or a filter such as vmkeep_steps=debug,info")
    })?;
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Somebody who embeds the daemon, a test say, may log already; that is theirs to decide.
    let _ = match log.format {
        // A journal of the system adds the time by itself, but standard error does not always end there.
        LogFormat::Text => base.with_ansi(false).finish().try_init(),
        LogFormat::Json => base.json().with_span_list(true).with_current_span(false).finish().try_init(),
    };
    Ok(())
}
