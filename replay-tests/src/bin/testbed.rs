//! The test bed at the command line.

fn main() {}
