//! vmkeepd, the backup daemon of a KVM host, and vmkeep, its command line.
//!
//! | to learn about | read |
//! |---|---|
//! | what can be configured | [`config`] |
//! | how the daemon starts and stops | [`daemon`] |
//! | what the API offers, and who may use it | [`api`] |
//! | what the command line offers | [`cli`], [`client`] |
//! | how libvirt becomes what the steps need | [`hypervisor`], [`environment`] |
//! | domains, backups and orders of this host | [`site`] |
//! | whether a backup is what was published | [`verify`], [`genuine`] |
//! | letting the history of old jobs go | [`history`] |
//! | what proves that nobody rewrote the history | [`heads`], [`audit`] |
//! | the store, and what can be done with it while no daemon runs | [`store`] |
//! | which backups there are and were | [`catalogue`] |
//! | what becomes of older ones after a backup | [`retention`] |
//! | what would make backups fail | [`doctor`] |
//! | the graphs of the workflows | [`diagram`] |
//! | vaults: which there are, opening one | [`vaults`] |
//!
//! The binaries are a few lines each: everything is here, so that everything can be tested.

pub mod api;
pub mod audit;
pub mod catalogue;
pub mod cli;
pub mod client;
pub mod codes;
pub mod config;
pub mod daemon;
pub mod diagram;
pub mod doctor;
pub mod environment;
pub mod explain;
pub mod genuine;
pub mod guests;
pub mod heads;
pub mod history;
pub mod hypervisor;
pub mod location;
pub mod retention;
pub mod site;
pub mod store;
pub mod text;
pub mod vaults;
pub mod verify;
