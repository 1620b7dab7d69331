//! Lines, keys, and what a crash leaves of them.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::PermissionsExt;

use vmkeep_workflow::journal::StoreError;

use super::*;
use crate::chain::Commit;

fn commit(number: u64) -> Commit {
    Commit { number, digest: [1; 32], link: [u8::try_from(number).unwrap(); 32] }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn store() -> Uuid {
    Uuid::from_u128(7)
}

/// A folder with a key, its notary, and what it signed: three heads, a new key after the second.
fn signed() -> (tempfile::TempDir, Notary, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let (mut notary, origin) = Notary::open(&folder.path().join("audit"), store()).unwrap();
    assert_eq!(origin, KeyOrigin::Made);
    notary.sign(&commit(1), at(0)).unwrap().unwrap();
    notary.sign(&commit(2), at(1)).unwrap().unwrap();
    notary.rotate(at(2)).unwrap();
    notary.sign(&commit(5), at(3)).unwrap().unwrap();
    let lines = lines(&folder);
    (folder, notary, lines)
}

fn lines(folder: &tempfile::TempDir) -> Vec<String> {
    let text = fs::read_to_string(log_path(&folder.path().join("audit"))).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines().map(str::to_owned).collect()
}

fn read(lines: &[String], trust: Trust<'_>) -> Result<Heads, HeadsError> {
    Heads::read(Cursor::new(lines.join("\n") + "\n"), trust)
}

#[test]
fn a_line_comes_back_as_it_was_and_with_any_byte_changed_it_is_refused() {
    let (_folder, _, lines) = signed();
    assert_eq!(lines.len(), 4);
    for line in &lines {
        assert_eq!(Line::parse(line).unwrap().render(), *line);
        for at in 0..line.len() {
            for with in [b'0', b'1', b'a', b'A', b' ', b'"', b'}', line.as_bytes()[at] ^ 1] {
                let mut changed = line.clone().into_bytes();
                changed[at] = with;
                if changed == line.as_bytes() {
                    continue;
                }
                if let Ok(changed) = String::from_utf8(changed) {
                    assert!(Line::parse(&changed).is_err(), "byte {at}: {changed}");
                }
            }
            assert!(Line::parse(&line[..at]).is_err());
        }
        assert!(Line::parse(&format!("{line} ")).is_err());
        assert!(Line::parse(&line.replacen("{", "{\"more\":1,", 1)).is_err());
    }
    let newer = lines[0].replacen("\"version\":1", "\"version\":2,\"unheard\":true", 1);
    assert_eq!(Line::parse(&newer), Err(LineError::TooNew { found: 2, known: 1 }));
}

#[test]
fn a_signature_of_a_head_is_none_of_another_store_commit_time_or_key() {
    let (_folder, notary, lines) = signed();
    let Line::Head(signed) = Line::parse(&lines[0]).unwrap() else { panic!() };
    let changed = |change: fn(&mut SignedHead, PublicKey)| {
        let mut head = signed.clone();
        change(&mut head, notary.public_key());
        Line::parse(&Line::Head(head).render())
    };
    assert!(changed(|_, _| {}).is_ok());
    for change in [
        (|s, _| s.head.store = Uuid::from_u128(8)) as fn(&mut SignedHead, PublicKey),
        |s, _| s.head.commit += 1,
        |s, _| s.head.link[31] ^= 1,
        |s, _| s.head.at = at(1),
        |s, key| s.key = key,
    ] {
        assert_eq!(changed(change), Err(LineError::Signature));
    }
}

#[test]
fn keys_are_trusted_along_the_line_of_succession_and_no_others() {
    let (_folder, notary, lines) = signed();
    let Line::Head(first) = Line::parse(&lines[0]).unwrap() else { panic!() };
    let (old, new) = (first.key, notary.public_key());
    assert_ne!(old, new);
    for key in [old, new] {
        assert_eq!(read(&lines, Trust::Keys(&[key])).unwrap().commits().len(), 3);
    }
    // Without the succession nobody vouches, in either direction.
    let without: Vec<String> = lines.iter().filter(|line| !line.contains("by_old")).cloned().collect();
    assert!(
        matches!(read(&without, Trust::Keys(&[old])), Err(HeadsError::Untrusted { line: 3, key }) if key == new)
    );
    assert!(matches!(read(&without, Trust::Keys(&[new])), Err(HeadsError::Untrusted { line: 1, .. })));
    assert!(read(&without, Trust::Keys(&[old, new])).is_ok());
    assert!(read(&without, Trust::Named).is_ok());

    // Somebody who stole the old key makes himself its successor: whoever trusts the new one does not believe him.
    let thief = SigningKey::from_bytes(&[9; 32]);
    let key_file = SigningKey::from_bytes(&[3; 32]);
    let by = |old: &SigningKey, new: &SigningKey| {
        Line::Key(Box::new(Succession::new(store(), at(9), old, new))).render()
    };
    let head = Head { store: store(), commit: 6, link: [6; 32], at: at(9) };
    let mut forged = vec![by(&key_file, &SigningKey::from_bytes(&[4; 32])), by(&key_file, &thief)];
    forged.push(Line::Head(SignedHead::new(head, &thief)).render());
    let genuine = PublicKey::of(&SigningKey::from_bytes(&[4; 32]));
    assert!(matches!(read(&forged, Trust::Keys(&[genuine])), Err(HeadsError::Untrusted { line: 3, .. })));
    assert!(matches!(read(&[], Trust::Named), Err(HeadsError::Line { .. } | HeadsError::Empty)));
}

#[test]
fn a_journal_is_held_against_every_head() {
    let (_folder, notary, lines) = signed();
    let heads = read(&lines, Trust::Keys(&[notary.public_key()])).unwrap();
    let links = |numbers: &[u64]| numbers.iter().map(|n| (*n, commit(*n).link)).collect();
    let vouched = heads.compare(store(), 9, &links(&[1, 2, 5])).unwrap();
    assert_eq!((vouched.heads, vouched.newest.commit, vouched.after), (3, 5, 4));
    let cut = heads.compare(store(), 4, &links(&[1, 2])).unwrap_err();
    assert_eq!(cut, [Contradiction::Beyond { at: at(3), commit: 5, last: 4 }]);
    let mut other = links(&[1, 2, 5]);
    other.insert(2, [0; 32]);
    other.remove(&5);
    let rewritten = heads.compare(store(), 9, &other).unwrap_err();
    let differs = |at, commit| Contradiction::Differs { at, commit };
    assert_eq!(rewritten, [differs(at(1), 2), differs(at(3), 5)]);
    assert_eq!(heads.compare(Uuid::nil(), 9, &links(&[1, 2, 5])).unwrap_err().len(), 3);
}

#[test]
fn a_crash_in_the_middle_of_a_line_costs_that_line_at_most() {
    let (folder, notary, lines) = signed();
    drop(notary);
    let audit = folder.path().join("audit");
    let path = log_path(&audit);
    let whole = fs::read(&path).unwrap();
    let kept = whole.len() - lines[3].len() - 1;
    for end in kept..=whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        // Whoever reads it meanwhile leaves the torn line out.
        let heads = Heads::read(Cursor::new(&whole[..end]), Trust::Named).unwrap();
        let readable = end + 1 >= whole.len();
        assert_eq!(
            (heads.commits().len(), heads.cut_off()),
            (2 + usize::from(readable), end > kept && !readable)
        );
        let (mut notary, origin) = Notary::open(&audit, store()).unwrap();
        assert_eq!(origin, KeyOrigin::Found);
        let complete = end == whole.len();
        assert_eq!(notary.last().map(|head| head.commit), Some(if complete { 5 } else { 2 }));
        assert_eq!(notary.sign(&commit(5), at(3)).unwrap().is_some(), !complete);
        assert_eq!(fs::read(&path).unwrap(), whole, "the same line again, cut at {end}");
    }
    // Its sectors came in another order: the end is there and the middle is not.
    let mut torn = whole.clone();
    torn[kept + 20..kept + 60].fill(0);
    fs::write(&path, &torn).unwrap();
    drop(Notary::open(&audit, store()).unwrap());
    assert_eq!(fs::read(&path).unwrap(), whole[..kept]);
    // Room that was allocated and never written.
    fs::write(&path, [&whole[..], &[0; 100]].concat()).unwrap();
    drop(Notary::open(&audit, store()).unwrap());
    assert_eq!(fs::read(&path).unwrap(), whole);
}

#[test]
fn damage_before_the_last_line_is_left_for_a_check_to_find() {
    let (folder, notary, lines) = signed();
    let key = notary.public_key();
    drop(notary);
    let path = log_path(&folder.path().join("audit"));
    let text = fs::read_to_string(&path).unwrap().replacen("\"commit\":2", "\"commit\":3", 1);
    fs::write(&path, &text).unwrap();
    drop(Notary::open(&folder.path().join("audit"), store()).unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
    let found = Heads::read(Cursor::new(text), Trust::Keys(&[key]));
    assert!(matches!(found, Err(HeadsError::Line { line: 2, error: LineError::Signature })), "{found:?}");
    assert_eq!(lines.len(), 4);
}

#[test]
fn a_crash_at_any_point_of_a_new_key_leaves_the_old_or_the_new_one_and_heads_that_are_believed() {
    let folder = tempfile::tempdir().unwrap();
    let audit = folder.path().join("audit");
    let (mut notary, _) = Notary::open(&audit, store()).unwrap();
    let first = notary.public_key();
    notary.sign(&commit(1), at(0)).unwrap();
    let (key, log) = (fs::read(audit.join("key")).unwrap(), fs::read(log_path(&audit)).unwrap());
    let succession = notary.rotate(at(1)).unwrap();
    let (new_key, new_log) = (fs::read(audit.join("key")).unwrap(), fs::read(log_path(&audit)).unwrap());
    drop(notary);
    let whole_line = new_log.len();
    let worlds = [
        // The young key is not there, torn, or whole; the line is not there, torn, or whole.
        (None, log.len(), first),
        (Some(0), log.len(), first),
        (Some(30), log.len(), first),
        (Some(new_key.len()), log.len(), first),
        (Some(new_key.len()), log.len() + 50, first),
        (Some(new_key.len()), whole_line - 1, first),
        (Some(new_key.len()), whole_line, succession.new),
    ];
    for (young, length, expected) in worlds {
        fs::write(audit.join("key"), &key).unwrap();
        fs::write(log_path(&audit), &new_log[..length]).unwrap();
        match young {
            Some(length) => fs::write(audit.join("key.new"), &new_key[..length]).unwrap(),
            None => drop(fs::remove_file(audit.join("key.new"))),
        }
        let (mut notary, origin) = Notary::open(&audit, store()).unwrap();
        assert_eq!((notary.public_key(), origin), (expected, KeyOrigin::Found), "{young:?} {length}");
        assert!(!audit.join("key.new").exists());
        notary.sign(&commit(2), at(2)).unwrap().unwrap();
        let text = fs::read(log_path(&audit)).unwrap();
        let heads = Heads::read(Cursor::new(&text), Trust::Keys(&[first])).unwrap();
        assert_eq!(heads.commits().len(), 2);
    }
}

#[test]
fn a_young_folder_that_was_cut_off_anywhere_gets_one_key_and_keeps_it() {
    let folder = tempfile::tempdir().unwrap();
    let audit = folder.path().join("audit");
    fs::create_dir(&audit).unwrap();
    fs::write(audit.join("key.new"), "{\"vmkeep\":").unwrap();
    let (notary, origin) = Notary::open(&audit, store()).unwrap();
    assert_eq!(origin, KeyOrigin::Made);
    assert_eq!(public_key(&audit).unwrap(), Some(notary.public_key()));
    assert_eq!(notary.public_key().to_string().parse(), Ok(notary.public_key()));
    for file in ["key", "heads.jsonl"] {
        assert_eq!(fs::metadata(audit.join(file)).unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }
    let (again, origin) = Notary::open(&audit, store()).unwrap();
    assert_eq!((again.public_key(), origin), (notary.public_key(), KeyOrigin::Found));
    // One that others could read is taken away from them.
    fs::set_permissions(audit.join("key"), PermissionsExt::from_mode(0o644)).unwrap();
    drop(Notary::open(&audit, store()).unwrap());
    assert_eq!(fs::metadata(audit.join("key")).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_lost_key_is_replaced_and_said_to_be_lost_and_a_damaged_one_is_left_alone() {
    let (folder, notary, lines) = signed();
    let audit = folder.path().join("audit");
    let old = notary.public_key();
    drop(notary);
    let kept = fs::read_to_string(audit.join("key")).unwrap();
    for damaged in [kept.replacen("\"secret\":\"", "\"secret\":\"0", 1), kept[..40].to_owned(), String::new()]
    {
        fs::write(audit.join("key"), &damaged).unwrap();
        assert!(matches!(Notary::open(&audit, store()), Err(StoreError::Damaged(_))));
        assert!(matches!(public_key(&audit), Err(StoreError::Damaged(_))));
        assert_eq!(fs::read_to_string(audit.join("key")).unwrap(), damaged);
    }
    fs::remove_file(audit.join("key")).unwrap();
    let (mut notary, origin) = Notary::open(&audit, store()).unwrap();
    assert_eq!(origin, KeyOrigin::Lost);
    notary.sign(&commit(7), at(9)).unwrap().unwrap();
    let now = self::lines(&folder);
    assert_eq!(now[..4], lines[..], "what was signed stays");
    assert!(matches!(read(&now, Trust::Keys(&[old])), Err(HeadsError::Untrusted { line: 5, .. })));
    assert_eq!(read(&now, Trust::Keys(&[old, notary.public_key()])).unwrap().commits().len(), 4);
}

#[test]
fn a_head_that_could_not_be_kept_is_signed_again_in_its_place() {
    let (folder, mut notary, lines) = signed();
    let path = log_path(&folder.path().join("audit"));
    // As a failed write may leave it: more than is known to be durable.
    let mut text = fs::read_to_string(&path).unwrap();
    text.push_str("{\"vmkeep\":\"head\",\"ver");
    fs::write(&path, text).unwrap();
    notary.sign(&commit(6), at(6)).unwrap().unwrap();
    let now = self::lines(&folder);
    assert_eq!((now.len(), &now[..4]), (5, &lines[..]));
    assert!(notary.sign(&commit(6), at(7)).unwrap().is_none(), "nothing new");
}

#[test]
fn what_is_no_key_is_none() {
    let key = PublicKey::of(&SigningKey::from_bytes(&[5; 32])).to_string();
    assert!(key.parse::<PublicKey>().is_ok());
    let zero = "0".repeat(64);
    let one = format!("01{}", "0".repeat(62));
    let upper = key.to_uppercase();
    for text in ["", "12", &key[1..], &upper, &zero, &one, &format!("{key}0"), &format!(" {key}")] {
        assert_eq!(text.parse::<PublicKey>(), Err(NoKey), "{text}");
    }
}
