//! The daemon's own command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;
use vmkeep_workflow::Fault;

use crate::config::{Config, LogFormat, Overrides, Surroundings};

/// The backup daemon of a KVM host. Needs no options and no configuration.
#[derive(Debug, Parser)]
#[command(name = "vmkeepd", version, max_term_width = 100)]
pub struct Args {
    /// The configuration file (default: /etc/vmkeep/vmkeep.toml or ~/.config/vmkeep/vmkeep.toml, if there)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where journal and backups are kept (default: /var/lib/vmkeep or ~/.local/state/vmkeep)
    #[arg(long, value_name = "FOLDER")]
    state_dir: Option<PathBuf>,
    /// The API's socket (default: /run/vmkeep/vmkeepd.sock or $XDG_RUNTIME_DIR/vmkeep/vmkeepd.sock)
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The local hypervisor (default: qemu:///system as root, else qemu:///session)
    #[arg(long, value_name = "URI")]
    connect: Option<String>,
    /// text or json
    #[arg(long, value_name = "FORMAT", value_parser = log_format)]
    log_format: Option<LogFormat>,
    /// error, warn, info, debug, trace, or a filter by module
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Only read the configuration and say whether it is sound
    #[arg(long)]
    check: bool,
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("it is text or json".to_owned()),
    }
}

/// Runs the daemon's command line and returns its exit status.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => return crate::cli::misspelt(&error),
    };
    match start(&args) {
        Ok(()) => 0,
        Err(fault) => {
            eprintln!("{}", crate::cli::fault_text("vmkeepd", &fault));
            crate::cli::status_of(&fault)
        }
    }
}

fn start(args: &Args) -> Result<(), Fault> {
    let overrides = Overrides {
        config: args.config.clone(),
        state_dir: args.state_dir.clone(),
        socket: args.socket.clone(),
        connect: args.connect.clone(),
    };
    let mut config = Config::load(&overrides, &Surroundings::here())?;
    if let Some(format) = args.log_format {
        config.log.format = format;
    }
    if let Some(level) = &args.log_level {
        config.log.filter.clone_from(level);
    }
    if args.check {
        println!("{config:#?}");
        return Ok(());
    }
    // A few workers are plenty: whatever takes long (libvirt, copies) has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("vmkeepd")
        .enable_all()
        .build()
        .map_err(|e| Fault::permanent(crate::codes::UNDEFINED_ERROR, "start vmkeepd", "", e))?;
    let ended = runtime.block_on(Box::pin(crate::daemon::run(config)));
    // With the last task the store is closed, which tidies its log away. Calls that libvirt never answers are on threads
    // of their own; nothing may keep the process for long.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    ended
}
