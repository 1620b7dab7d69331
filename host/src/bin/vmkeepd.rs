//! The daemon. See [`vmkeep_host::daemon`].

fn main() {
    vmkeep_libvirt::few_arenas();
    vmkeep_libvirt::leave(vmkeep_host::daemon::args::main(std::env::args_os()))
}
