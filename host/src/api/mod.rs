//! The API: HTTP and JSON over a Unix socket that only the daemon's owner may use.
//!
//! Why only the owner: whoever may restore to any path of a daemon that runs as root *is* root. Until there are roles
//! the answer to "who may" is therefore the user that the daemon runs as, proven twice: by the socket (0600 in a 0700
//! folder), and by the peer credentials that the kernel attaches to each connection. The journal's actor is that user's
//! name, and nothing that a request could claim.

pub mod answer;
pub mod listener;
pub mod prefix;
mod routes;
pub mod serve;
pub mod types;

pub use routes::{App, router};
