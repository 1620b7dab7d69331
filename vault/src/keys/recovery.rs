//! The recovery key: the master key as 24 words, which opens the vault when all of `keys/` is lost.
//!
//! The words and their check sum are those of BIP 39 (English): four letters tell each word, and eight bits tell a typing
//! error with 255 of 256; the header's keyed hash tells the rest.

use bip39::{Language, Mnemonic};
use zeroize::Zeroizing;

use super::{KeyError, Secret32};

/// The words of a master key.
///
/// # Errors
/// Never for 32 bytes.
pub fn words(master: &Secret32) -> Result<Zeroizing<String>, KeyError> {
    let mnemonic = Mnemonic::from_entropy_in(Language::English, &master[..])
        .map_err(|error| KeyError::Words(error.to_string()))?;
    let words: Vec<&str> = mnemonic.words().collect();
    Ok(Zeroizing::new(words.join(" ")))
}

/// The master key of words, however they are spaced and whatever their case.
///
/// # Errors
/// If they are not 24 known words, or their check sum does not fit.
pub fn master(typed: &str) -> Result<Secret32, KeyError> {
    let folded = Zeroizing::new(typed.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase());
    let count = folded.split(' ').filter(|word| !word.is_empty()).count();
    if count != 24 {
        return Err(KeyError::Words(format!("the recovery key has 24 words, these are {count}")));
    }
    let mnemonic = Mnemonic::parse_in_normalized(Language::English, &folded)
        .map_err(|error| KeyError::Words(explain(&error)))?;
    let (entropy, length) = mnemonic.to_entropy_array();
    let entropy = Zeroizing::new(entropy);
    let mut master = Zeroizing::new([0; 32]);
    match entropy.get(..length) {
        Some(bytes) if bytes.len() == 32 => master.copy_from_slice(bytes),
        _ => return Err(KeyError::Words("these words are of something else".into())),
    }
    Ok(master)
}

fn explain(error: &bip39::Error) -> String {
    match error {
        bip39::Error::UnknownWord(place) => format!("word {} is not one of the list", place + 1),
        bip39::Error::InvalidChecksum => "the check sum does not fit: a word is wrong or out of place".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_give_the_master_key_back_however_they_are_typed() {
        let key: Secret32 = Zeroizing::new(std::array::from_fn(|i| (i * 7) as u8));
        let text = words(&key).unwrap();
        assert_eq!(text.split(' ').count(), 24);
        assert_eq!(*master(&text).unwrap(), *key);
        assert_eq!(*master(&format!("  {}\n", text.to_uppercase().replace(' ', "\n  "))).unwrap(), *key);
    }

    #[test]
    fn a_typing_error_is_told_with_its_place() {
        let text = words(&Zeroizing::new([9; 32])).unwrap();
        let list: Vec<&str> = text.split(' ').collect();
        let said = |typed: &[&str]| master(&typed.join(" ")).unwrap_err().to_string();
        assert!(said(&list[..23]).contains("these are 23"));
        let mut unknown = list.clone();
        unknown[4] = "vmkeep";
        assert_eq!(said(&unknown), "word 5 is not one of the list");
        // Each exchange of the last word but the right one, and those few that share its check sum, is seen.
        let mut missed = 0;
        for word in Language::English.word_list() {
            let mut wrong = list.clone();
            wrong[0] = word;
            missed += usize::from(master(&wrong.join(" ")).is_ok());
        }
        assert!(missed < 30, "{missed} of 2048 wrong words pass");
    }
}
