//! The oracle: what an image holds of the guest's ticks.
//!
//! The guest makes tick n durable on its first disk, then on its second, then prints it (`replay-tests/guest`).
//! So whatever a host does, three things can be asked of any pair of images that claim to be the guest's disks at
//! one point in time: each holds its ticks without hole and damage; the first ends at the same tick as the second
//! or one later; and no tick that was printed before that point is missing. Each tick carries the checksum of the
//! one before, so a disk that mixes two histories (an overlay put over a base that had moved on) is found out even
//! if no number is missing.

use super::{
    MIB,
    error::{Error, Result},
    image::{Format, read_guest_bytes},
};
use serde::Serialize;
use std::{fmt, path::Path};

const HEADER_MAGIC: u64 = 0x3152_4448_5449_4b56;
const TICK_MAGIC: u64 = 0x314b_4349_5456_4b56;
const SECTOR: usize = 512;
/// A badly damaged disk is described by its first defects.
const MOST_DEFECTS: usize = 32;

/// Something that a disk with ticks must not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Defect {
    /// The first sector is neither empty nor a header.
    Header,
    /// The tick's place holds nothing, or an older tick.
    Hole(u64),
    /// The tick's place holds something that is no whole tick.
    Damaged(u64),
    /// The tick is whole but does not follow from the one before, or belongs to another disk.
    Foreign(u64),
    /// The mebibytes of the ring are not all there.
    Short,
}

/// The ticks of one boot of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Boot {
    /// Its id.
    pub id: u64,
    /// Its first tick on the disk.
    pub first: u64,
    /// Its last.
    pub last: u64,
}

/// What one image holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TickReport {
    /// Which of the guest's disks it is, from 0.
    pub disk: u32,
    /// The guest's identity, given to its disks at the first boot; 0 if it never booted.
    pub pair: u64,
    /// First tick that must be there: 1, or later once the ring has come round.
    pub first: u64,
    /// Last tick of those without a hole from the first on; 0 if there is none.
    pub last: u64,
    /// Highest number of any whole tick. More than `last` when there is a hole.
    pub highest: u64,
    /// Boots, oldest first.
    pub boots: Vec<Boot>,
    /// The tick's count since boot, of the last tick.
    pub ram: u64,
    /// What is wrong, at most the first 32 defects.
    pub defects: Vec<Defect>,
}

impl TickReport {
    /// No hole, no damage.
    pub fn is_whole(&self) -> bool {
        self.defects.is_empty()
    }

    /// Id of the boot that wrote the last tick.
    pub fn last_boot(&self) -> Option<u64> {
        self.boots.last().map(|boot| boot.id)
    }
}

impl fmt::Display for TickReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {}: ticks {} to {}, {} boot(s)", self.disk, self.first, self.last, self.boots.len())?;
        if self.is_whole() { write!(f, ", whole") } else { write!(f, ", DEFECTS {:?}", self.defects) }
    }
}

/// Reads the ticks of an image, through its backing files if it has any. The image may be in use; then what the
/// guest has flushed is seen.
pub fn ticks_on(image: &Path, format: Format) -> Result<TickReport> {
    let head = read_guest_bytes(image, format, 0, 1)?;
    let header = Sector(&head);
    if head.len() < SECTOR {
        return Err(Error::Unclear {
            what: format!("{}", image.display()),
            answer: "it is too short".into(),
        });
    }
    let mut report = TickReport {
        disk: 0,
        pair: 0,
        first: 1,
        last: 0,
        highest: 0,
        boots: Vec::new(),
        ram: 0,
        defects: Vec::new(),
    };
    if head[..SECTOR].iter().all(|b| *b == 0) {
        return Ok(report);
    }
    if header.word(0) != HEADER_MAGIC || !header.is_summed() {
        report.defects.push(Defect::Header);
        return Ok(report);
    }
    let (slots, offset) = (header.word(2), header.word(3));
    report.pair = header.word(1);
    report.disk = header.half(40);
    let ring = read_guest_bytes(image, format, offset / MIB, slots * SECTOR as u64 / MIB)?;
    if ring.len() as u64 != slots * SECTOR as u64 {
        report.defects.push(Defect::Short);
        return Ok(report);
    }
    judge(&ring, &mut report);
    Ok(report)
}

fn judge(ring: &[u8], report: &mut TickReport) {
    let sectors: Vec<Sector<'_>> = ring.chunks_exact(SECTOR).map(Sector).collect();
    let slots = sectors.len() as u64;
    let slot = |number: u64| &sectors[usize::try_from(number % slots).unwrap_or(0)];
    report.highest = sectors.iter().filter(|s| s.is_tick()).map(Sector::number).max().unwrap_or(0);
    report.first = (report.highest + 1).saturating_sub(slots).max(1);
    let mut previous: Option<u64> = None;
    let mut broken = false;
    for number in report.first..=report.highest {
        let sector = slot(number);
        let defect = if !sector.is_tick() {
            Some(if sector.is_empty() { Defect::Hole(number) } else { Defect::Damaged(number) })
        } else if sector.number() != number {
            Some(Defect::Hole(number))
        } else if sector.word(5) != report.pair
            || sector.half(48) != report.disk
            || previous.is_some_and(|sum| sum != sector.word(7))
        {
            Some(Defect::Foreign(number))
        } else {
            None
        };
        previous = sector.is_tick().then(|| sector.sum());
        if let Some(defect) = defect {
            broken = true;
            if report.defects.len() < MOST_DEFECTS {
                report.defects.push(defect);
            }
            continue;
        }
        if !broken {
            report.last = number;
            report.ram = sector.word(3);
        }
        match report.boots.last_mut() {
            Some(boot) if boot.id == sector.word(2) => boot.last = number,
            _ => report.boots.push(Boot { id: sector.word(2), first: number, last: number }),
        }
    }
    // Places that no tick has reached yet are empty.
    for number in (report.highest + 1)..slots {
        if !slot(number).is_empty() && report.defects.len() < MOST_DEFECTS {
            report.defects.push(Defect::Damaged(number));
        }
    }
}

struct Sector<'a>(&'a [u8]);

impl Sector<'_> {
    fn word(&self, index: usize) -> u64 {
        self.0.get(index * 8..index * 8 + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    fn half(&self, offset: usize) -> u32 {
        self.0.get(offset..offset + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    fn sum(&self) -> u64 {
        self.word(SECTOR / 8 - 1)
    }

    fn is_summed(&self) -> bool {
        let sum = (0..SECTOR / 8 - 1).fold(0xcbf2_9ce4_8422_2325_u64, |h, i| {
            (h ^ self.word(i)).rotate_left(23).wrapping_mul(0x100_0000_01b3)
        });
        sum == self.sum()
    }

    fn is_tick(&self) -> bool {
        self.word(0) == TICK_MAGIC && self.is_summed()
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }

    fn number(&self) -> u64 {
        self.word(1)
    }
}

/// Whether two images are a guest's first and second disk at one point in time; else why not.
pub fn consistency(first: &TickReport, second: &TickReport) -> std::result::Result<(), String> {
    let fail = |why: &str| Err(format!("{why}: {first}; {second}"));
    if !first.is_whole() || !second.is_whole() {
        return fail("ticks are missing or damaged");
    }
    if first.pair != second.pair {
        return fail("the disks are of two guests");
    }
    if first.disk + 1 != second.disk && first.pair != 0 {
        return fail("these are not the first and the second disk");
    }
    if first.last != second.last && first.last != second.last + 1 {
        return fail("the disks are of two points in time");
    }
    Ok(())
}

/// Panics unless [`consistency`] holds.
pub fn assert_consistent(first: &TickReport, second: &TickReport) {
    let verdict = consistency(first, second);
    assert!(verdict.is_ok(), "{}", verdict.err().unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::FileExt};

    const SLOTS: u64 = 2048;

    fn seal(words: &mut [u64; 64]) -> Vec<u8> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let h = (0..63).fold(0xcbf2_9ce4_8422_2325_u64, |h, i| {
            (h ^ words[i]).rotate_left(23).wrapping_mul(0x100_0000_01b3)
        });
        words[63] = h;
        [&bytes[..504], &h.to_le_bytes()[..]].concat()
    }

    struct Disk {
        _dir: tempfile::TempDir,
        path: std::path::PathBuf,
        file: fs::File,
        index: u64,
        sum: u64,
    }

    impl Disk {
        fn new(index: u64) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            let file = fs::File::create(&path).unwrap();
            file.set_len(4 * MIB).unwrap();
            let mut header = [0; 64];
            header[..6].copy_from_slice(&[HEADER_MAGIC, 99, SLOTS, MIB, 2 * MIB, index | 2 << 32]);
            file.write_all_at(&seal(&mut header), 0).unwrap();
            Self { _dir: dir, path, file, index, sum: 0 }
        }

        fn tick(&mut self, number: u64, boot: u64) {
            let mut tick = [0; 64];
            tick[..8].copy_from_slice(&[
                TICK_MAGIC,
                number,
                boot,
                number,
                1,
                99,
                self.index | 1 << 32,
                self.sum,
            ]);
            let bytes = seal(&mut tick);
            self.sum = tick[63];
            self.file.write_all_at(&bytes, Self::place(number)).unwrap();
        }

        fn place(number: u64) -> u64 {
            MIB + number % SLOTS * 512
        }

        fn report(&self) -> TickReport {
            ticks_on(&self.path, Format::Raw).unwrap()
        }
    }

    fn disk(index: u64, ticks: u64) -> Disk {
        let mut disk = Disk::new(index);
        (1..=ticks).for_each(|n| disk.tick(n, 5));
        disk
    }

    #[test]
    fn whole_disks_agree_at_the_same_tick_or_one_apart_in_the_order_of_writing() {
        let (a, b) = (disk(0, 40).report(), disk(1, 40).report());
        assert!(a.is_whole() && a.last == 40 && a.highest == 40, "{a:?}");
        assert_eq!(a.boots, [Boot { id: 5, first: 1, last: 40 }]);
        assert_consistent(&a, &b);
        assert_consistent(&disk(0, 41).report(), &b);
        assert!(consistency(&disk(0, 42).report(), &b).is_err());
        assert!(
            consistency(&disk(0, 39).report(), &b).is_err(),
            "the second disk is never ahead of the first"
        );
        assert!(consistency(&b, &a).is_err(), "disks in the wrong order");
    }

    #[test]
    fn a_lost_tick_is_a_hole_and_a_changed_bit_is_damage() {
        let disk = disk(0, 40);
        disk.file.write_all_at(&[0; 512], Disk::place(17)).unwrap();
        let report = disk.report();
        // The tick after a hole cannot be checked against it, so there is one defect.
        assert_eq!((report.last, report.highest, &report.defects[..]), (16, 40, &[Defect::Hole(17)][..]));
        let disk = super::tests::disk(0, 40);
        disk.file.write_all_at(&[1], Disk::place(17) + 300).unwrap();
        assert_eq!(disk.report().defects, [Defect::Damaged(17)]);
        disk.file.write_all_at(&[1], 100).unwrap();
        assert_eq!(disk.report().defects, [Defect::Header]);
    }

    #[test]
    fn garbage_behind_the_last_tick_is_damage() {
        let disk = disk(0, 40);
        disk.file.write_all_at(&[7], Disk::place(41) + 9).unwrap();
        let report = disk.report();
        assert_eq!((report.last, &report.defects[..]), (40, &[Defect::Damaged(41)][..]));
    }

    #[test]
    fn a_stale_tick_of_another_history_is_found_though_no_number_is_missing() {
        // Boot 6 started from tick 20 and wrote 21 to 40 anew; of these, 30 is then overlaid by the lost history's.
        let mut disk = disk(0, 40);
        let mut stale = vec![0; 512];
        fs::File::open(&disk.path).unwrap().read_exact_at(&mut stale, Disk::place(30)).unwrap();
        let mut again = super::tests::disk(0, 20);
        (21..=40).for_each(|n| again.tick(n, 6));
        assert!(again.report().is_whole());
        assert_eq!(again.report().boots.len(), 2);
        again.file.write_all_at(&stale, Disk::place(30)).unwrap();
        assert_eq!(again.report().defects, [Defect::Foreign(30), Defect::Foreign(31)]);
        disk.index = 1;
        disk.tick(41, 5);
        assert_eq!(disk.report().defects, [Defect::Foreign(41)], "a tick of another disk");
    }

    #[test]
    fn the_ring_comes_round_and_an_old_tick_in_a_new_ones_place_is_a_hole() {
        let mut disk = disk(0, SLOTS + 50);
        let report = disk.report();
        assert!(report.is_whole(), "{report}");
        assert_eq!((report.first, report.last), (51, SLOTS + 50));
        // Tick SLOTS + 51 never reached the disk, the next one did.
        disk.tick(SLOTS + 52, 5);
        let report = disk.report();
        assert_eq!((report.last, &report.defects[..1]), (SLOTS + 50, &[Defect::Hole(SLOTS + 51)][..]));
    }

    #[test]
    fn a_disk_that_no_guest_has_seen_has_no_ticks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        fs::File::create(&path).unwrap().set_len(4 * MIB).unwrap();
        let report = ticks_on(&path, Format::Raw).unwrap();
        assert!(report.is_whole());
        assert_eq!((report.pair, report.last), (0, 0));
    }
}
