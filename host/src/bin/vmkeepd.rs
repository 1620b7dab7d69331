//! The command line. See [`vmkeep_host::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::SUCCESS
}
