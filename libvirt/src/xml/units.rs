//! Sizes with units, as libvirt writes them.

use super::tree::{Element, XmlError};

/// The bytes that an element such as `<memory unit='KiB'>1024</memory>` means.
pub(super) fn bytes_of(element: &Element, what: &'static str) -> Result<u64, XmlError> {
    let text = element.text();
    let unit = element.attr("unit").unwrap_or("KiB");
    let value = || XmlError::Value { what, value: format!("{} {unit}", text.trim()) };
    let number: u64 = text.trim().parse().map_err(|_| value())?;
    let factor: u64 = match unit {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1000_u64.pow(2),
        "M" | "MiB" => 1 << 20,
        "GB" => 1000_u64.pow(3),
        "G" | "GiB" => 1 << 30,
        "TB" => 1000_u64.pow(4),
        "T" | "TiB" => 1 << 40,
        _ => return Err(value()),
    };
    number.checked_mul(factor).ok_or_else(value)
}
