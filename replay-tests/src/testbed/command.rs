//! Programs run to their end.

use super::error::{Error, Result};
use std::process::Command;

/// Runs a command to its end; its standard output, without the last line's end.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| Error::Spawn { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
    }
    let both = [&output.stderr[..], &output.stdout[..]].concat();
    Err(Error::Command {
        command: line_of(command),
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&both).trim().to_owned(),
    })
}

/// Program and arguments, without the environment.
pub(crate) fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
