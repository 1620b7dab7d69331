//! The daemon. See [`vmkeep_host::daemon`].

use std::process::ExitCode;

fn main() -> ExitCode {
    vmkeep_host::daemon::args::main(std::env::args_os())
}
