//! Asks the linker for packed relative relocations (`DT_RELR`) in release builds. A position-independent program has some
//! forty thousand of them; unpacked they are a megabyte that the loader reads at every start, and that stays resident.
//!
//! The loader must know them: glibc does from 2.36 on. A program that is linked against an older one keeps the old form, and a
//! linker that has never heard of the option warns and goes on.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|it| it == value);
    let native = std::env::var("HOST").ok() == std::env::var("TARGET").ok();
    if is("PROFILE", "release")
        && is("CARGO_CFG_TARGET_ENV", "gnu")
        && native
        && knows_relr().unwrap_or(false)
    {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

/// Whether this system's glibc is at least 2.36. `getconf` says `glibc 2.36`.
fn knows_relr() -> Option<bool> {
    let said = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?.stdout;
    let said = String::from_utf8(said).ok()?;
    let (major, minor) = said.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?) >= (2_u32, 36_u32))
}
