//! What a disk may hold after the power has gone.
//!
//! The rules are those of POSIX, and harder than most file systems: a file's bytes and length are durable when a sync of
//! that file, begun after they were written, has ended; a name is durable when a sync of its folder has. What is not
//! durable may be there all the same: a file's writes each for itself, whole, not at all, or in some of their sectors;
//! a folder's changes in their order up to some point. `sync_file_range` makes nothing durable.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use fastrand::Rng;

use super::trace::{Act, Call};

const SECTOR: u64 = 512;

type Node = usize;
const ROOT: Node = 0;

/// A change of a file's content.
#[derive(Clone, Debug)]
enum Change {
    Write { at: u64, data: Vec<u8> },
    Length(u64),
    AtLeast(u64),
}

/// A change of the names in one folder, or, for a name that moves, in two at once.
#[derive(Clone, Debug)]
struct Naming {
    ended: usize,
    removed: Option<(Node, String)>,
    added: Option<(Node, String, Node)>,
}

#[derive(Debug, Default)]
struct File {
    base: Vec<u8>,
    changes: Vec<(usize, Change)>,
}

/// What a program did to one folder and all below it.
#[derive(Debug, Default)]
pub struct Disk {
    files: HashMap<Node, File>,
    /// The names there were before.
    base: Vec<(Node, String, Node)>,
    folders: Vec<Node>,
    namings: Vec<Naming>,
    /// When each sync began and ended.
    syncs: HashMap<Node, Vec<(usize, usize)>>,
    /// What the program said on its standard output, line by line, and when it had begun to say it.
    said: Vec<(usize, String)>,
    /// The instants right after something has changed.
    moments: Vec<usize>,
    nodes: usize,
}

/// One disk that the cut may have left.
#[derive(Debug)]
pub struct Image<'a> {
    disk: &'a Disk,
    /// The instant.
    pub at: usize,
    files: HashMap<Node, Vec<u8>>,
    names: BTreeMap<(Node, String), Node>,
}

/// The state of the recorded program while its calls are followed.
struct Follower {
    disk: Disk,
    root: PathBuf,
    names: BTreeMap<(Node, String), Node>,
    /// Per process and descriptor: the node, where it stands, whether it always writes to the end.
    open: HashMap<(u32, i32), (Node, u64, bool)>,
    lengths: HashMap<Node, u64>,
}

impl Disk {
    /// Follows a recording below a folder, which held `before` (a copy of it) when it began.
    ///
    /// # Errors
    /// When the copy cannot be read.
    ///
    /// # Panics
    /// When the program did something to these files that this model does not know.
    pub fn of(calls: &[Call], root: &Path, before: Option<&Path>) -> io::Result<Self> {
        let disk = Self { nodes: 1, folders: vec![ROOT], ..Self::default() };
        let mut follower = Follower {
            disk,
            root: root.to_owned(),
            names: BTreeMap::new(),
            open: HashMap::new(),
            lengths: HashMap::new(),
        };
        if let Some(before) = before {
            follower.take_in(ROOT, before)?;
        }
        follower.disk.base =
            follower.names.iter().map(|((dir, name), node)| (*dir, name.clone(), *node)).collect();
        for call in calls {
            follower.follow(call);
        }
        Ok(follower.disk)
    }

    /// How many instants there are between which the power can go.
    #[must_use]
    pub fn instants(&self) -> usize {
        self.moments.len()
    }

    /// One of them, or the one before all.
    #[must_use]
    pub fn instant(&self, rng: &mut Rng) -> usize {
        rng.choice(&self.moments).copied().filter(|_| rng.u8(..) > 0).unwrap_or_default()
    }

    /// What the program had said when the power went.
    pub fn said_before(&self, at: usize) -> impl Iterator<Item = &str> {
        self.said.iter().filter(move |(when, _)| *when < at).map(|(_, line)| line.as_str())
    }

    /// Does as if the program had never synced what bears, or bore, a name: to see whether it would be noticed.
    pub fn without_syncs_of(&mut self, name: &str) {
        let added = self.namings.iter().filter_map(|naming| naming.added.as_ref());
        let named = self.base.iter().chain(added).filter(|(_, of, _)| of == name);
        let nodes: Vec<Node> = named.map(|(.., node)| *node).collect();
        self.syncs.retain(|node, _| !nodes.contains(node));
    }

    /// The same of what has, or had, one of certain paths, which begin below the root.
    pub fn without_syncs_at(&mut self, which: impl Fn(&Path) -> bool) {
        let added = self.namings.iter().filter_map(|naming| naming.added.as_ref());
        let mut paths = HashMap::from([(ROOT, PathBuf::new())]);
        let mut nodes = Vec::new();
        // A folder is named before what lies in it; what moves away from its first name is no folder.
        for (dir, name, node) in self.base.iter().chain(added) {
            let path = paths.get(dir).map(|dir| dir.join(name)).expect("the folder has a path");
            if which(&path) {
                nodes.push(*node);
            }
            paths.entry(*node).or_insert(path);
        }
        self.syncs.retain(|node, _| !nodes.contains(node));
    }

    /// Whether what had ended at an instant was durable at another.
    fn durable(&self, node: Node, ended: usize, at: usize) -> bool {
        let syncs = self.syncs.get(&node).map(Vec::as_slice).unwrap_or_default();
        syncs.iter().any(|(from, to)| ended < *from && *to < at)
    }

    /// One disk that may be left when the power goes at an instant.
    #[must_use]
    pub fn cut(&self, at: usize, rng: &mut Rng) -> Image<'_> {
        let files =
            self.files.iter().map(|(node, file)| (*node, self.content(*node, file, at, rng))).collect();
        Image { disk: self, at, files, names: self.names(at, rng) }
    }

    fn content(&self, node: Node, file: &File, at: usize, rng: &mut Rng) -> Vec<u8> {
        let mut content = file.base.clone();
        // Of a file: nothing that was not synced, all of it, or a mixture.
        let mood = rng.u8(0..4);
        for (ended, change) in file.changes.iter().take_while(|(ended, _)| *ended < at) {
            let kept = self.durable(node, *ended, at);
            match change {
                _ if !kept && mood == 0 => {}
                Change::Length(len) if kept || mood == 1 || rng.bool() => {
                    content.resize(usize::try_from(*len).unwrap_or(usize::MAX), 0);
                }
                Change::AtLeast(len) if kept || mood == 1 || rng.bool() => {
                    let len = usize::try_from(*len).unwrap_or(usize::MAX).max(content.len());
                    content.resize(len, 0);
                }
                Change::Length(_) | Change::AtLeast(_) => {}
                Change::Write { at, data } if kept || mood == 1 => put(&mut content, *at, data),
                Change::Write { at, data } => match rng.u8(0..3) {
                    0 => {}
                    1 => put(&mut content, *at, data),
                    _ => tear(&mut content, *at, data, rng),
                },
            }
        }
        content
    }

    fn names(&self, at: usize, rng: &mut Rng) -> BTreeMap<(Node, String), Node> {
        let mut names: BTreeMap<_, _> =
            self.base.iter().map(|(dir, name, node)| ((*dir, name.clone()), *node)).collect();
        // Each folder's changes, in their order, up to some point beyond what is durable.
        let until: HashMap<Node, usize> =
            self.folders.iter().map(|dir| (*dir, [0, at, rng.usize(0..=at)][rng.usize(0..3)])).collect();
        for naming in self.namings.iter().take_while(|naming| naming.ended < at) {
            let dirs = [naming.removed.as_ref().map(|r| r.0), naming.added.as_ref().map(|a| a.0)];
            let mut dirs = dirs.into_iter().flatten();
            if !dirs.any(|dir| self.durable(dir, naming.ended, at) || naming.ended < until[&dir]) {
                continue;
            }
            if let Some((dir, name)) = &naming.removed {
                names.remove(&(*dir, name.clone()));
            }
            if let Some((dir, name, node)) = &naming.added {
                names.insert((*dir, name.clone()), *node);
            }
        }
        names
    }
}

impl Image<'_> {
    /// What the program had said when the power went.
    pub fn said(&self) -> impl Iterator<Item = &str> {
        self.disk.said_before(self.at)
    }

    /// Writes the image into a folder that is there and empty.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        self.write_node(ROOT, folder)
    }

    fn write_node(&self, dir: Node, folder: &Path) -> io::Result<()> {
        for ((_, name), node) in self.names.range((dir, String::new())..(dir + 1, String::new())) {
            let path = folder.join(name);
            if let Some(content) = self.files.get(node) {
                write_sparse(&path, content)?;
            } else {
                fs::create_dir(&path)?;
                self.write_node(*node, &path)?;
            }
        }
        Ok(())
    }
}

impl Follower {
    fn new_node(&mut self) -> Node {
        self.disk.nodes += 1;
        self.disk.nodes - 1
    }

    fn new_folder(&mut self) -> Node {
        let node = self.new_node();
        self.disk.folders.push(node);
        node
    }

    /// What there was before is durable.
    fn take_in(&mut self, dir: Node, folder: &Path) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let node = if entry.file_type()?.is_dir() {
                let node = self.new_folder();
                self.take_in(node, &entry.path())?;
                node
            } else {
                let node = self.new_node();
                let base = fs::read(entry.path())?;
                self.lengths.insert(node, base.len() as u64);
                self.disk.files.insert(node, File { base, changes: Vec::new() });
                node
            };
            self.names.insert((dir, name), node);
        }
        Ok(())
    }

    /// The folder and the name of a path below the root; nothing if it is elsewhere. The root itself has no name.
    fn place(&self, path: &Path) -> Option<(Node, String)> {
        let below = path.strip_prefix(&self.root).ok()?;
        let mut names: Vec<String> = below
            .components()
            .filter(|part| matches!(part, Component::Normal(_)))
            .map(|part| part.as_os_str().to_string_lossy().into_owned())
            .collect();
        let last = names.pop()?;
        let mut dir = ROOT;
        for name in names {
            dir = *self.names.get(&(dir, name))?;
        }
        Some((dir, last))
    }

    fn node(&self, path: &Path) -> Option<Node> {
        if path == self.root {
            return Some(ROOT);
        }
        self.names.get(&self.place(path)?).copied()
    }

    fn name(&mut self, ended: usize, removed: Option<(Node, String)>, added: Option<(Node, String, Node)>) {
        if let Some(place) = &removed {
            self.names.remove(place);
        }
        if let Some((dir, name, node)) = &added {
            self.names.insert((*dir, name.clone()), *node);
        }
        self.disk.namings.push(Naming { ended, removed, added });
        self.disk.moments.push(ended + 1);
    }

    fn change(&mut self, ended: usize, node: Node, change: Change) {
        let length = self.lengths.entry(node).or_default();
        match &change {
            Change::Write { at, data } => *length = (*length).max(at + data.len() as u64),
            Change::Length(len) => *length = *len,
            Change::AtLeast(len) => *length = (*length).max(*len),
        }
        self.disk.files.entry(node).or_default().changes.push((ended, change));
        self.disk.moments.push(ended + 1);
    }

    fn follow(&mut self, call: &Call) {
        let ended = call.ended;
        let of = |fd: &i32| (call.process, *fd);
        match &call.act {
            Act::Open { fd, path, create, truncate, append } => {
                self.open.remove(&of(fd));
                let node = match (self.node(path), self.place(path)) {
                    (Some(node), _) => node,
                    (None, Some((dir, name))) if *create => {
                        let node = self.new_node();
                        self.disk.files.insert(node, File::default());
                        self.name(ended, None, Some((dir, name, node)));
                        node
                    }
                    _ => return,
                };
                if *truncate && self.disk.files.contains_key(&node) {
                    self.change(ended, node, Change::Length(0));
                }
                self.open.insert(of(fd), (node, 0, *append));
            }
            Act::Duplicate { fd, new } => match self.open.get(&of(fd)).copied() {
                Some(open) => drop(self.open.insert(of(new), open)),
                None => drop(self.open.remove(&of(new))),
            },
            Act::Seek { fd, at } => {
                if let Some((_, stands, _)) = self.open.get_mut(&of(fd)) {
                    *stands = *at;
                }
            }
            Act::Read { fd, count } => {
                if let Some((_, stands, _)) = self.open.get_mut(&of(fd)) {
                    *stands += count;
                }
            }
            Act::Write { fd: 1, data, .. } if !self.open.contains_key(&of(&1)) => {
                let text = String::from_utf8_lossy(data);
                self.disk.said.extend(text.lines().map(|line| (call.begun, line.to_owned())));
                self.disk.moments.push(call.begun + 1);
            }
            Act::Write { fd, at, data } => {
                let Some((node, stands, append)) = self.open.get_mut(&of(fd)) else { return };
                let from = match at {
                    Some(at) => *at,
                    None if *append => self.lengths.get(node).copied().unwrap_or_default(),
                    None => *stands,
                };
                if at.is_none() {
                    *stands = from + data.len() as u64;
                }
                let node = *node;
                self.change(ended, node, Change::Write { at: from, data: data.clone() });
            }
            Act::Truncate { fd, len } => {
                if let Some((node, ..)) = self.open.get(&of(fd)).copied() {
                    self.change(ended, node, Change::Length(*len));
                }
            }
            Act::Allocate { fd, mode, at, len } => {
                if let Some((node, ..)) = self.open.get(&of(fd)).copied() {
                    match mode.as_str() {
                        "0" => self.change(ended, node, Change::AtLeast(at + len)),
                        "FALLOC_FL_KEEP_SIZE" => {}
                        "FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE"
                        | "FALLOC_FL_KEEP_SIZE|FALLOC_FL_ZERO_RANGE" => {
                            let length = self.lengths.get(&node).copied().unwrap_or_default();
                            let len = (at + len).min(length).saturating_sub(*at);
                            let data = vec![0; usize::try_from(len).expect("a length")];
                            self.change(ended, node, Change::Write { at: *at, data });
                        }
                        "FALLOC_FL_ZERO_RANGE" => {
                            let data = vec![0; usize::try_from(*len).expect("a length")];
                            self.change(ended, node, Change::Write { at: *at, data });
                        }
                        other => panic!("fallocate {other}"),
                    }
                }
            }
            Act::Sync { fd } => {
                if let Some((node, ..)) = self.open.get(&of(fd)).copied() {
                    self.disk.syncs.entry(node).or_default().push((call.begun, ended));
                    self.disk.moments.push(ended + 1);
                }
            }
            Act::Rename { from, to } => match (self.node(from), self.place(from), self.place(to)) {
                (Some(node), Some(old), Some((dir, name))) => {
                    self.name(ended, Some(old), Some((dir, name, node)))
                }
                (None, _, None) => {}
                _ => panic!("a name moved in or out: {} to {}", from.display(), to.display()),
            },
            Act::Remove { path } => {
                if let (Some(_), Some(place)) = (self.node(path), self.place(path)) {
                    self.name(ended, Some(place), None);
                }
            }
            Act::MakeFolder { path } => {
                if let Some((dir, name)) = self.place(path) {
                    let node = self.new_folder();
                    self.name(ended, None, Some((dir, name, node)));
                }
            }
            // SQLite's index of its log is shared memory that happens to have a name: it is made anew from the log.
            Act::Share { fd } => {
                if let Some((node, ..)) = self.open.get(&of(fd)) {
                    let name =
                        self.names.iter().find(|(_, at)| *at == node).map(|((_, name), _)| name.as_str());
                    assert!(
                        name.is_some_and(|name| name.ends_with("-shm")),
                        "{name:?} is written through memory"
                    );
                }
            }
            Act::Strange { paths, call } => {
                let ours = paths.iter().any(|path| path.starts_with(&self.root));
                // Copied out of, not into.
                let only_read = call.starts_with("copy_file_range")
                    && !paths.last().is_some_and(|to| to.starts_with(&self.root));
                assert!(!ours || only_read, "a disk cannot be built from {call}");
            }
        }
    }
}

fn put(content: &mut Vec<u8>, at: u64, data: &[u8]) {
    let at = usize::try_from(at).expect("an offset");
    if content.len() < at + data.len() {
        content.resize(at + data.len(), 0);
    }
    content[at..at + data.len()].copy_from_slice(data);
}

/// Writes only some of the sectors; the length may be there without them.
fn tear(content: &mut Vec<u8>, at: u64, data: &[u8], rng: &mut Rng) {
    let end = at + data.len() as u64;
    if rng.bool() {
        let len = usize::try_from(end).expect("a length").max(content.len());
        content.resize(len, 0);
    }
    let mut from = at;
    while from < end {
        let to = ((from / SECTOR + 1) * SECTOR).min(end);
        if rng.bool() {
            let range = [from, to].map(|place| usize::try_from(place - at).expect("a place"));
            put(content, from, &data[range[0]..range[1]]);
        }
        from = to;
    }
}

/// Zeroes are left out, a page at a time.
fn write_sparse(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create_new(path)?;
    file.set_len(content.len() as u64)?;
    for (n, page) in content.chunks(4096).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, n as u64 * 4096)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acts(acts: Vec<Act>) -> Disk {
        let calls: Vec<Call> = acts
            .into_iter()
            .enumerate()
            .map(|(n, act)| Call { begun: n, ended: n, process: 1, act })
            .collect();
        Disk::of(&calls, Path::new("/r"), None).unwrap()
    }

    fn open(fd: i32, path: &str, create: bool) -> Act {
        Act::Open { fd, path: path.into(), create, truncate: false, append: false }
    }

    /// All contents that a file may have when the power goes at the end.
    fn contents(disk: &Disk, name: &str) -> std::collections::BTreeSet<Option<Vec<u8>>> {
        (0..500)
            .map(|seed| {
                let folder = tempfile::tempdir().unwrap();
                disk.cut(usize::MAX, &mut Rng::with_seed(seed)).write(folder.path()).unwrap();
                fs::read(folder.path().join(name)).ok()
            })
            .collect()
    }

    fn write(fd: i32, at: u64, byte: u8, len: usize) -> Act {
        Act::Write { fd, at: Some(at), data: vec![byte; len] }
    }

    #[test]
    fn only_what_was_synced_is_sure_and_a_name_only_with_its_folder() {
        let begin = || vec![open(3, "/r/a", true), write(3, 0, 1, 1024)];
        let sync = |fd| Act::Sync { fd };
        let dir = || vec![open(4, "/r", false), sync(4)];
        let whole = Some(vec![1; 1024]);
        let with = |more: Vec<Act>| contents(&acts([begin(), more].concat()), "a");
        let unsynced = with(vec![]);
        for possible in [
            None,
            Some(vec![]),
            whole.clone(),
            Some([vec![0; 512], vec![1; 512]].concat()),
            Some(vec![1; 512]),
        ] {
            assert!(unsynced.contains(&possible), "{unsynced:?}");
        }
        assert_eq!(with(vec![sync(3)]), [None, whole.clone()].into());
        assert!(!with(dir()).contains(&None));
        assert_eq!(with([vec![sync(3)], dir()].concat()), [whole.clone()].into());
        // What is written after the sync is not sure again.
        let later = with([vec![sync(3)], dir(), vec![write(3, 0, 2, 512)]].concat());
        assert_eq!(later, [whole, Some([vec![2; 512], vec![1; 512]].concat())].into());
    }

    #[test]
    fn a_sync_speaks_only_for_what_had_ended_when_it_began() {
        let call = |begun, ended, act| Call { begun, ended, process: 1, act };
        let calls = [
            call(0, 0, open(3, "/r/a", true)),
            call(1, 1, open(4, "/r", false)),
            call(2, 2, Act::Sync { fd: 4 }),
            call(3, 5, Act::Sync { fd: 3 }),
            call(4, 4, write(3, 0, 1, 1)),
        ];
        let disk = Disk::of(&calls, Path::new("/r"), None).unwrap();
        assert_eq!(contents(&disk, "a"), [Some(vec![]), Some(vec![0]), Some(vec![1])].into());
    }

    #[test]
    fn a_name_that_moves_has_the_one_or_the_other_place_and_what_replaced_another_is_whole() {
        let disk = acts(vec![
            open(4, "/r", false),
            open(3, "/r/new", true),
            write(3, 0, 2, 1),
            Act::Sync { fd: 3 },
            open(5, "/r/a", true),
            write(5, 0, 1, 1),
            Act::Sync { fd: 5 },
            Act::Sync { fd: 4 },
            Act::Rename { from: "/r/new".into(), to: "/r/a".into() },
        ]);
        assert_eq!(contents(&disk, "a"), [Some(vec![1]), Some(vec![2])].into());
        assert_eq!(contents(&disk, "new"), [None, Some(vec![2])].into());
    }
}
