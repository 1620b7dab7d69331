//! The command line. See [`vmkeep_host::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(Box::pin(vmkeep_host::cli::run(std::env::args_os()))),
        Err(error) => {
            eprintln!("vmkeep: could not start: {error}");
            ExitCode::FAILURE
        }
    }
}
