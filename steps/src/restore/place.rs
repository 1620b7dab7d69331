//! The place of a restored file: it is written beside it under a name of the job's, and gets its own when it is whole.
//!
//! What bears a name that holds the job's id is this job's, and may be written anew or removed. Under its own name a file is
//! told from one that somebody else put there by what was noted of it before the renaming: device, inode and size; before it has
//! that name, also the times, for an inode may be given to another file. Nothing is ever overwritten, and nothing is removed that is not known to be ours.
//!
//! The note is there before the name, the output of the step only after it: an attempt may end in between, and fail. So the
//! undo goes by the note as well ([`Known`]).

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::Stat;
use vmkeep_workflow::{Class, Code, Fault, JobId, StepContext, Verdict};

use crate::codes;
use crate::image::copy::Identity;
use crate::image::rights::{Kind, Wish};
use crate::image::root::{Component, Folder, RelPath, RootError};
use crate::snapshot::Places;
use crate::snapshot::copy::place_fault;

const DOING: &str = "restore the file";
const REMOVING: &str = "remove the restored file";

/// Where a file goes.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) places: Places,
    /// The folder that it goes to.
    pub(crate) folder: PathBuf,
    /// That is the folder of an image of the domain's own.
    pub(crate) own: bool,
    /// Its name there; without one it keeps the name that it is written under.
    pub(crate) name: Option<Component>,
    /// What the name that it is written under is made of, when it gets no other.
    pub(crate) source: Component,
    /// What it is given before it gets its name.
    pub(crate) rights: Wish,
}

/// The name under which a job writes a file.
pub(crate) fn aside(job: JobId, what: &str) -> Component {
    let digest = blake3::hash(what.as_bytes()).to_hex();
    Component::literal(format!(".vmkeep-{}-{}", job.short(), &digest.as_str()[..16]))
}

/// The job (its short id) that was writing a file, if the path is that of one under way.
pub(crate) fn aside_job(path: &Path) -> Option<&str> {
    let (job, digest) = path.file_name()?.to_str()?.strip_prefix(".vmkeep-")?.split_once('-')?;
    let hexadecimal = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    (hexadecimal(job, 12) && hexadecimal(digest, 16)).then_some(job)
}

/// The file that a step may have given its name, as its undo knows it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Known {
    /// By the step's output: it was used since, and may have been written to.
    Output(Identity),
    /// By the note from before it got its name: nobody has used it, so it has its size and times still. An inode alone proves
    /// little: it may have been given to another file since.
    Noted(Identity),
}

impl Known {
    fn is(&self, stat: Option<&Stat>) -> bool {
        match self {
            Self::Output(identity) => stat.is_some_and(|stat| Identity::from_stat(stat).same_file(identity)),
            Self::Noted(identity) => untouched(stat, identity),
        }
    }
}

/// Whether what has the final name is the file of a note: it gets that name only when it is whole, and may be looked at since, or
/// started from.
fn named(stat: Option<&Stat>, noted: &Identity) -> bool {
    stat.map(Identity::from_stat).is_some_and(|is| is.same_file(noted) && is.size == noted.size)
}

/// Whether it is a file that nobody has written to since its note.
fn untouched(stat: Option<&Stat>, noted: &Identity) -> bool {
    stat.is_some_and(|stat| Identity::from_stat(stat) == *noted)
}

impl Place {
    pub(crate) fn key(&self) -> &str {
        self.name.as_ref().unwrap_or(&self.source).as_str()
    }

    /// What messages call it.
    pub(crate) fn object(&self) -> String {
        self.folder.join(self.key()).display().to_string()
    }

    /// The name under which a job writes it.
    pub(crate) fn aside(&self, job: JobId) -> Component {
        aside(job, self.key())
    }

    pub(crate) fn fault(&self, e: &RootError) -> Fault {
        place_fault(e, codes::CANNOT_WRITE_TO_BACKUP_LOCATION, DOING, &self.object())
    }

    pub(crate) fn open(&self) -> Result<Folder, Fault> {
        self.places.open(&self.folder, self.own).map_err(|e| self.fault(&e))
    }

    /// Its path, once it has been written under that name.
    pub(crate) fn path(&self, folder: &Folder, aside: &Component) -> PathBuf {
        folder.path_of(self.name.as_ref().unwrap_or(aside))
    }

    /// What has a name in its folder is looked at.
    fn is(
        &self,
        folder: &Folder,
        name: &Component,
        as_noted: fn(Option<&Stat>, &Identity) -> bool,
        identity: &Identity,
    ) -> Result<bool, Fault> {
        folder.stat(name).map(|stat| as_noted(stat.as_ref(), identity)).map_err(|e| self.fault(&e))
    }

    /// Goes on with a file of which a note was stored when it was whole. `false`: it is neither in its place nor under the
    /// job's name.
    pub(crate) fn finish(
        &self,
        folder: &Folder,
        aside: &Component,
        identity: &Identity,
    ) -> Result<bool, Fault> {
        if let Some(name) = &self.name
            && self.is(folder, name, named, identity)?
        {
            self.keep(folder)?;
            return Ok(true);
        }
        if !self.is(folder, aside, untouched, identity)? {
            return Ok(false);
        }
        self.put(folder, aside, identity)?;
        Ok(true)
    }

    /// Whether nothing has its name.
    pub(crate) fn assert_free(&self, folder: &Folder) -> Result<(), Fault> {
        match &self.name {
            Some(name) if folder.stat(name).map_err(|e| self.fault(&e))?.is_some() => Err(self.taken()),
            _ => Ok(()),
        }
    }

    fn taken(&self) -> Fault {
        Fault::permanent(codes::BACKUP_EXISTS, DOING, self.object(), "something of that name exists already")
            .remedy("Choose another place: nothing is ever overwritten")
    }

    /// An attempt that was cut off may have given the file rights with which this user cannot write to it any more.
    pub(crate) fn not_locked_out(&self, folder: &Folder, aside: &Component) -> Result<(), Fault> {
        let there = folder.stat(aside).map_err(|e| self.fault(&e))?;
        if there.is_some_and(|stat| stat.st_mode & 0o600 != 0o600) {
            folder.remove_file(aside).map_err(|e| self.fault(&e))?;
        }
        Ok(())
    }

    /// Whole, and not in its place yet: the last that is done to it under the name that nobody looks for. Only to the file
    /// that was written, and that has no other name: who may write to the folder may have put another there.
    pub(crate) fn give_rights(
        &self,
        folder: &Folder,
        aside: &Component,
        written: &Identity,
    ) -> Result<(), Fault> {
        if self.rights.is_empty() {
            return Ok(());
        }
        let object = self.object();
        let file = folder.open_file(&RelPath::from(aside.clone())).map_err(|e| self.fault(&e))?;
        let alone = file.metadata().is_ok_and(|data| data.nlink() == 1);
        if !alone || !Identity::of(&file).is_ok_and(|is| is == *written) {
            let cause = "somebody has put another file in its place, or given it another name";
            return Err(Fault::permanent(Code::EFFECT_DIVERGED, DOING, object, cause)
                .remedy("See who else writes to that folder, and restore again"));
        }
        self.rights.give(&file).map_err(|e| e.fault(Kind::File, DOING, &object))?;
        crate::blocking::sync(&file).map_err(|e| {
            Fault::transient(codes::CANNOT_COPY_FILE_TO_BACKUP_LOCATION, "make its rights durable", object, e)
        })
    }

    /// Makes its name durable. The name is there in any case, so a failure leaves the effect in doubt.
    fn keep(&self, folder: &Folder) -> Result<(), Fault> {
        folder.sync().map_err(|e| self.fault(&e).class(Class::Transient).in_doubt())
    }

    /// Gives it its name, replacing nothing.
    pub(crate) fn put(&self, folder: &Folder, aside: &Component, identity: &Identity) -> Result<(), Fault> {
        if let Some(name) = &self.name {
            // Beside the old image of a domain that exists, or for a domain that does not exist yet.
            let code = match self.own {
                true => codes::CANNOT_MOVE_DISK_IMAGE_TO_ORIGINAL_LOCATION,
                false => codes::CANNOT_RENAME_DISK_IMAGE,
            };
            let unnamed =
                |e: &RootError| place_fault(e, code, "give the restored image its name", &self.object());
            match folder.rename(aside, name) {
                Ok(()) => {}
                // A network file system may ask its server twice, and hear of what the first time has done.
                Err(RootError::Exists { .. }) => match self.is(folder, name, named, identity) {
                    Ok(true) => {}
                    Ok(false) => return Err(self.taken()),
                    Err(unseen) => return Err(unseen.class(Class::Transient).in_doubt()),
                },
                Err(e) => return Err(unnamed(&e).class(Class::Transient).in_doubt()),
            }
        }
        self.keep(folder)
    }

    /// Opens the folder for a probe: `None` says that it is not there.
    pub(crate) fn look_in<T>(&self) -> Result<Option<Folder>, Verdict<T>> {
        match self.places.open(&self.folder, self.own) {
            Ok(folder) => Ok(Some(folder)),
            Err(RootError::Missing { .. }) => Ok(None),
            Err(e) => Err(Verdict::Unknown(e.to_string())),
        }
    }

    /// Whether a file of which a note was stored when it was whole is durably in its place.
    pub(crate) fn stands<T>(
        &self,
        folder: &Folder,
        aside: &Component,
        identity: &Identity,
        done: T,
    ) -> Verdict<T> {
        let (name, as_noted) = match &self.name {
            Some(name) => (name, named as fn(Option<&Stat>, &Identity) -> bool),
            None => (aside, untouched as _),
        };
        match folder.stat(name) {
            Ok(stat) if as_noted(stat.as_ref(), identity) => match folder.sync() {
                Ok(()) => Verdict::Done(done),
                Err(e) => Verdict::Unknown(e.to_string()),
            },
            Ok(_) => Verdict::NotDone,
            Err(e) => Verdict::Unknown(e.to_string()),
        }
    }

    /// Removes what this job made, and only that: what bears its names, and the file itself if it is the one that is known.
    pub(crate) fn remove(&self, asides: &[Component], known: Option<&Known>) -> Result<(), Fault> {
        let removed = || -> Result<(), RootError> {
            let folder = match self.places.open(&self.folder, self.own) {
                Err(RootError::Missing { .. }) => return Ok(()),
                folder => folder?,
            };
            for aside in asides {
                folder.remove_file(aside)?;
            }
            if let (Some(name), Some(known)) = (&self.name, known)
                && known.is(folder.stat(name)?.as_ref())
            {
                folder.remove_file(name)?;
            }
            folder.sync()
        };
        removed().map_err(|e| {
            place_fault(&e, codes::CANNOT_REMOVE_FILE, REMOVING, &self.object()).class(Class::Transient)
        })
    }

    /// The same as a step's undo, on a blocking thread.
    pub(crate) async fn undo(
        self,
        cx: &StepContext,
        known: Option<Known>,
        asides: impl FnOnce(&Self, JobId) -> Vec<Component> + Send + 'static,
    ) -> Result<(), Fault> {
        let (job, object) = (cx.job, self.object());
        match crate::blocking::run(move || self.remove(&asides(&self, job), known.as_ref())).await {
            Ok(gone) => gone,
            Err(e) => Err(Fault::permanent(Code::UNDEFINED, REMOVING, object, e)),
        }
    }
}

#[cfg(test)]
mod tests;
