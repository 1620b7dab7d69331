//! Changes of an input. All choices come from one generator, so a seed repeats them.

use fastrand::Rng;

/// No input grows beyond this.
pub(crate) const LONGEST: usize = 256 << 10;

const NUMBERS: [&str; 20] = [
    "0",
    "-1",
    "1",
    "255",
    "65536",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "-0.0",
    "0.1",
    "9007199254740993.5",
    "1E-320",
    // Read without care, neither is the number that was written.
    "51.248178375505404",
    "-93.31137037688033",
];

const WORDS: [&str; 22] = [
    "null",
    "true",
    "{}",
    "[]",
    "\"\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\\",
    "\u{feff}",
    "\u{202e}",
    "\u{1f980}",
    "&#0;",
    "&lt;",
    "&#x110000;",
    "<![CDATA[",
    "]]>",
    "<!--",
    "<!DOCTYPE a>",
    "..",
    "/",
    "\r\n",
    "\0",
];

/// What opens a level, of the formats that have levels, and what ends it.
const NESTS: [(&str, &str); 6] = [
    ("[", "]"),
    ("{\"a\":", "}"),
    ("<a>", "</a>"),
    ("a.", ""),
    ("[[", "]]"),
    ("<backingStore>", "</backingStore>"),
];

/// Words of the corpus: names, values, marks.
pub(crate) fn words(corpus: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut words = std::collections::BTreeSet::new();
    for text in corpus {
        for word in text.split(|byte| !(byte.is_ascii_alphanumeric() || b"_-./:@".contains(byte))) {
            if (2..=64).contains(&word.len()) && words.len() < 4096 {
                words.insert(word.to_vec());
            }
        }
    }
    words.into_iter().collect()
}

/// A changed copy of one of the inputs.
pub(crate) fn mutated(rng: &mut Rng, pool: &[Vec<u8>], words: &[Vec<u8>]) -> Vec<u8> {
    let mut input = pool[rng.usize(..pool.len())].clone();
    for _ in 0..1 + rng.usize(..4) {
        change(rng, &mut input, pool, words);
        input.truncate(LONGEST);
    }
    input
}

fn range(rng: &mut Rng, input: &[u8], most: usize) -> std::ops::Range<usize> {
    let start = rng.usize(..=input.len());
    start..start + rng.usize(..=most.min(input.len() - start))
}

fn put(input: &mut Vec<u8>, range: std::ops::Range<usize>, with: &[u8]) {
    drop(input.splice(range, with.iter().copied()));
}

/// The place of a word or number of the input.
fn word_at(rng: &mut Rng, input: &[u8], wanted: fn(&u8) -> bool) -> Option<std::ops::Range<usize>> {
    let from = rng.usize(..=input.len());
    let start = from + input[from..].iter().position(wanted)?;
    let length = input[start..].iter().position(|byte| !wanted(byte)).unwrap_or(input.len() - start);
    Some(start..start + length)
}

fn change(rng: &mut Rng, input: &mut Vec<u8>, pool: &[Vec<u8>], words: &[Vec<u8>]) {
    match rng.u8(..16) {
        0 if !input.is_empty() => {
            let at = rng.usize(..input.len());
            input[at] ^= 1 << rng.u8(..8);
        }
        1 if !input.is_empty() => {
            let at = rng.usize(..input.len());
            input[at] =
                *rng.choice(&[0, 1, 0x7f, 0x80, 0xff, b'"', b'<', b'>', b'\\', b'\n', b'0', b' ']).unwrap();
        }
        2 => {
            let gone = range(rng, input, 64);
            put(input, gone, &[]);
        }
        3 => {
            let piece = range(rng, input, 256);
            let piece = input[piece].to_vec();
            let at = rng.usize(..=input.len());
            put(input, at..at, &piece);
        }
        4 | 5 => {
            if let (Some(place), Some(word)) = (
                word_at(rng, input, |b| b.is_ascii_alphanumeric() || b"_-./:@".contains(b)),
                rng.choice(words),
            ) {
                put(input, place, word);
            }
        }
        6 => {
            let at = rng.usize(..=input.len());
            put(input, at..at, rng.choice(WORDS).unwrap().as_bytes());
        }
        7 | 8 => {
            if let Some(place) = word_at(rng, input, u8::is_ascii_digit) {
                put(input, place, rng.choice(NUMBERS).unwrap().as_bytes());
            }
        }
        9 => {
            let other = &pool[rng.usize(..pool.len())];
            let (end, begin) = (rng.usize(..=input.len()), rng.usize(..=other.len()));
            input.truncate(end);
            input.extend_from_slice(&other[begin..]);
        }
        10 => {
            let end = rng.usize(..=input.len());
            input.truncate(end);
        }
        11 => lines(rng, input),
        12 => {
            // Of a binary format: an extreme number where one may stand.
            let number: u64 =
                *rng.choice(&[0, 1, 0xff, 0xffff, 0xffff_ffff, 1 << 31, u64::MAX, 1 << 63]).unwrap();
            let bytes = if rng.bool() { number.to_be_bytes() } else { number.to_le_bytes() };
            let bytes = if rng.bool() { &bytes[..4] } else { &bytes[..] };
            let at = rng.usize(..=input.len()) & !3;
            let end = (at + bytes.len()).min(input.len());
            put(input, at.min(end)..end, bytes);
        }
        13 if rng.u8(..8) == 0 => nest(rng, input),
        14 if rng.u8(..4) == 0 => {
            let piece = range(rng, input, 32);
            let piece = input[piece].repeat(1 + rng.usize(..2000));
            let at = rng.usize(..=input.len());
            put(input, at..at, &piece);
        }
        _ => {
            let at = rng.usize(..=input.len());
            let bytes: Vec<u8> = (0..1 + rng.usize(..8)).map(|_| rng.u8(..)).collect();
            put(input, at..at, &bytes);
        }
    }
}

/// Lines removed, written twice, exchanged.
fn lines(rng: &mut Rng, input: &mut Vec<u8>) {
    let mut lines: Vec<&[u8]> = input.split_inclusive(|byte| *byte == b'\n').collect();
    if lines.is_empty() {
        return;
    }
    let (one, other) = (rng.usize(..lines.len()), rng.usize(..lines.len()));
    match rng.u8(..3) {
        0 => drop(lines.remove(one)),
        1 => lines.insert(other, lines[one]),
        _ => lines.swap(one, other),
    }
    *input = lines.concat();
}

/// Levels within levels, around a piece or in place of it; ended, or not.
fn nest(rng: &mut Rng, input: &mut Vec<u8>) {
    let (open, close) = rng.choice(NESTS).unwrap();
    let depth = *rng.choice(&[100, 130, 260, 5000, 40_000]).unwrap();
    let place = word_at(rng, input, u8::is_ascii_alphanumeric).unwrap_or(0..0);
    let inner = input[place.clone()].to_vec();
    let end = if rng.bool() { close.repeat(depth) } else { String::new() };
    put(input, place, &[open.repeat(depth).as_bytes(), &inner, end.as_bytes()].concat());
}
