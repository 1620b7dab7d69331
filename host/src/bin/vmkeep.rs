//! The command line. See [`vmkeep_host::cli`].

fn main() {
    let status = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(Box::pin(vmkeep_host::cli::run(std::env::args_os()))),
        Err(error) => {
            eprintln!("vmkeep: could not start: {error}");
            1
        }
    };
    vmkeep_libvirt::leave(status)
}
