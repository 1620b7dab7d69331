//! Text for people: names that strangers chose, sizes, spans of time, and the same read back from a command line.
//!
//! A domain may be called almost anything, and what is printed may reach a terminal that obeys escape sequences.
//! [`safe`] is therefore applied to every name, path and message that did not originate here, at the last moment
//! before it is shown. JSON output is exempt: JSON escapes control characters by itself.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

pub use vmkeep_steps::text::bytes;

/// Makes text harmless to a terminal and visible to a person, on one line: control characters, line ends and the
/// invisible characters that reorder text become escapes (`\n`, `\u{202e}`), and `\` becomes `\\`, so that no two
/// names look the same because of it.
#[must_use]
pub fn safe(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() || is_invisible(c) => {
                let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

/// The same for text of our own that may hold a name: line ends stay, everything else is escaped as in [`safe`].
#[must_use]
pub fn safe_lines(text: &str) -> String {
    text.lines().map(|line| safe(line).replace("\\\\", "\\")).collect::<Vec<_>>().join("\n")
}

/// Characters without a shape that change how their neighbours are shown.
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// A span of time with two telling units at most: `0.31 s`, `12.4 s`, `3 min 05 s`, `2 h 10 min`, `4 d 3 h`.
#[must_use]
pub fn span(span: Duration) -> String {
    let secs = span.as_secs();
    match secs {
        0..10 => format!("{:.2} s", span.as_secs_f64()),
        10..60 => format!("{:.1} s", span.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", secs / 60, secs % 60),
        3600..86400 => format!("{} h {:02} min", secs / 3600, secs % 3600 / 60),
        _ => format!("{} d {} h", secs / 86400, secs % 86400 / 3600),
    }
}

/// A span of time rounded to what matters when one looks back: `just now`, `5 min ago`, `3 h ago`, `12 d ago`.
#[must_use]
pub fn ago(then: Timestamp, now: Timestamp) -> String {
    let past: SignedDuration = now.duration_since(then);
    match past.as_secs() {
        ..0 => "in the future".to_owned(),
        0..5 => "just now".to_owned(),
        s @ 5..60 => format!("{s} s ago"),
        s @ 60..3600 => format!("{} min ago", s / 60),
        s @ 3600..172_800 => format!("{} h ago", s / 3600),
        s => format!("{} d ago", s / 86400),
    }
}

/// An instant in the zone of whoever reads it, to the second: `2026-11-21 08:07:44`.
#[must_use]
pub fn local(at: Timestamp) -> String {
    at.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// Reads a size: `512`, `64K`, `20M`, `4G`, `1T`, also `4GiB` and `4GB`. All units are powers of 1024, as libvirt and
/// qemu-img read them.
///
/// # Errors
/// When it is not a size, with the reason.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size such as 512M or 4G"))?;
    let unit = unit.trim().to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(format!("{unit:?} is not a unit of size: use K, M, G or T")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is too large"))
}

/// Reads an amount per second: `100M`, `100M/s`, in bytes; `0` for no limit.
///
/// # Errors
/// When it is not one, with the reason.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let amount = text.strip_suffix("/s").or_else(|| text.strip_suffix("ps")).unwrap_or(text);
    parse_size(amount).map_err(|_| {
        format!("{text:?} is not an amount of bytes per second such as 100M or 1G (0: no limit)")
    })
}

/// Reads a span of time: `90` (seconds), `90s`, `5m`, `2h`, `1d`, `500ms`.
///
/// # Errors
/// When it is not a span, with the reason.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 =
        number.parse().map_err(|_| format!("{text:?} is not a span of time such as 90s or 5m"))?;
    let millis = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        other => return Err(format!("{other:?} is not a unit of time: use ms, s, m, h or d")),
    };
    number.checked_mul(millis).map(Duration::from_millis).ok_or_else(|| format!("{text:?} is too long"))
}

/// How many columns a text takes on a terminal.
#[must_use]
pub fn width(text: &str) -> usize {
    unicode_width::UnicodeWidthStr::width(text)
}

/// Lays rows out in columns, two blanks apart, without blanks at the ends of lines. Cells must be [`safe`] already.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            rows.iter().filter_map(|row| row.get(column)).map(|cell| width(cell)).max().unwrap_or(0)
        })
        .collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, wide) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.push_str(&" ".repeat(wide - width(cell) + 2));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_reach_the_terminal_as_commands_or_break_a_line() {
        assert_eq!(safe("web 1 'x' \"y\" $(id)"), "web 1 'x' \"y\" $(id)");
        assert_eq!(safe("a\nb\tc\r"), "a\\nb\\tc\\r");
        assert_eq!(safe("\u{1b}[2Jgone\u{7}"), "\\u{1b}[2Jgone\\u{7}");
        assert_eq!(safe("\u{9b}2J"), "\\u{9b}2J");
        assert_eq!(safe("evil\u{202e}cod"), "evil\\u{202e}cod");
        assert_eq!(safe("Büro 東京"), "Büro 東京");
    }

    #[test]
    fn an_escape_written_into_a_name_differs_from_a_real_one() {
        assert_ne!(safe("a\\nb"), safe("a\nb"));
        assert_eq!(safe("a\\nb"), "a\\\\nb");
    }

    #[test]
    fn sizes_and_spans_are_read_as_people_write_them() {
        assert_eq!(parse_size("20M"), Ok(20 << 20));
        assert_eq!(parse_size("4GiB"), Ok(4 << 30));
        assert_eq!(parse_size(" 4 gb "), Ok(4 << 30));
        assert_eq!(parse_size("17"), Ok(17));
        for wrong in ["", "M", "-1", "1.5G", "4X", "99999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        for (text, rate) in
            [("100M", 100 << 20), ("100M/s", 100 << 20), ("1GiB/s", 1 << 30), ("5MBps", 5 << 20), ("0", 0)]
        {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
        }
        for wrong in ["fast", "-1", "1.5G", "100Mbit/s", "/s", "5m/h"] {
            let said = parse_rate(wrong).unwrap_err();
            assert!(said.contains(wrong) && said.contains("per second"), "{said}");
        }
        assert_eq!(parse_span("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_span("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_span("500ms"), Ok(Duration::from_millis(500)));
        for wrong in ["", "m", "-5s", "5y"] {
            assert!(parse_span(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn spans_tell_two_units_at_most() {
        assert_eq!(span(Duration::from_millis(312)), "0.31 s");
        assert_eq!(span(Duration::from_millis(12_400)), "12.4 s");
        assert_eq!(span(Duration::from_secs(185)), "3 min 05 s");
        assert_eq!(span(Duration::from_secs(7800)), "2 h 10 min");
        assert_eq!(span(Duration::from_secs(4 * 86400 + 3 * 3600)), "4 d 3 h");
    }

    #[test]
    fn columns_line_up_whatever_the_alphabet() {
        let rows = vec![vec!["東京".to_owned(), "a".to_owned()], vec!["Büro".to_owned(), "b".to_owned()]];
        assert_eq!(table(&rows), "東京  a\nBüro  b\n");
    }
}
