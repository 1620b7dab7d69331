//! Every name and every value in a JSON text, and the text with one of them changed. What is changed is still JSON, and of the
//! same shape.

use std::ops::Range;

/// Where a name or a value stands: within its quotes, if it has some.
pub(crate) struct Spot(pub(crate) Range<usize>, bool);

/// The names and values of a text.
pub(crate) fn spots(text: &str) -> Vec<Spot> {
    let bytes = text.as_bytes();
    let (mut spots, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'"' => {
                at += 1;
                while bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                spots.push(Spot(start + 1..at, true));
                at += 1;
            }
            b'{' | b'}' | b'[' | b']' | b',' | b':' | b' ' => at += 1,
            _ => {
                while at < bytes.len() && !b"{}[],: ".contains(&bytes[at]) {
                    at += 1;
                }
                spots.push(Spot(start..at, false));
            }
        }
    }
    spots
}

/// The text with that one changed.
pub(crate) fn flipped(text: &str, Spot(range, quoted): &Spot) -> String {
    let was = &text[range.clone()];
    let is = match was {
        _ if *quoted => match was.strip_suffix(|last: char| last.is_ascii_alphanumeric()) {
            // Of the same length: only the last character differs.
            Some(start) => format!("{start}{}", if was.ends_with('0') { '1' } else { '0' }),
            None => format!("{was}x"),
        },
        "true" => "false".to_owned(),
        "false" => "true".to_owned(),
        "null" => "0".to_owned(),
        number => {
            let (start, last) = number.split_at(number.len() - 1);
            let last = last.parse::<u8>().unwrap();
            format!("{start}{}", if last == 9 { 8 } else { last + 1 })
        }
    };
    format!("{}{is}{}", &text[..range.start], &text[range.end..])
}
