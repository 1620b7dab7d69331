//! What exchanging a whole machine for another needs: bringing it to rest, replacing its definition, and libvirt's
//! records beside the definition: managed save images and checkpoints.
//!
//! **Managed save images.** libvirt has calls to make and to remove one, and none to keep one. Its file is therefore
//! given a second name (a hard link, or a copy where that cannot be) before libvirt is told to remove it, and its old
//! name back later: a start looks for the file itself, whatever libvirt has noted. Where the file lies follows from the
//! daemon's scope, as for definitions.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vmkeep_libvirt::flags::{
    CheckpointCreateFlags, CheckpointDeleteFlags, CheckpointListFlags, CheckpointXmlFlags, ShutdownFlags,
    XmlFlags,
};
use vmkeep_libvirt::uri::Scope;
use vmkeep_libvirt::xml::DomainXml;
use vmkeep_libvirt::{ErrorCode, Status};
use vmkeep_steps::hypervisor::{DomainId, HvError, HvResult, Marker, Trouble};

use super::{Libvirt, changes, definition, folders, marker};

impl Libvirt {
    pub(super) async fn ask_to_shut_down(&self, domain: &DomainId) -> HvResult<()> {
        let agent = self.look_at(domain, "agent", |d| d.xml(XmlFlags::NONE)).await?;
        let agent = DomainXml::parse(&agent).is_ok_and(|xml| xml.has_agent_channel());
        if agent && self.change(domain, "shut down", |d| d.shutdown(ShutdownFlags::AGENT)).await.is_ok() {
            return Ok(());
        }
        match self.change(domain, "shut down", |d| d.shutdown(ShutdownFlags::ACPI)).await {
            Err(e) if e.trouble == Trouble::NotRunning => Ok(()),
            other => other,
        }
    }

    pub(super) async fn save_to(&self, domain: &DomainId, path: &Path) -> HvResult<()> {
        self.save_guest(domain, path).await?;
        changes::seal(path.to_owned()).await
    }

    pub(super) async fn replace_definition(&self, domain: &DomainId, xml: &str) -> HvResult<()> {
        self.change_definition(domain, "define", xml.to_owned()).await?;
        self.sync_folders().await
    }

    /// Where libvirt keeps the managed save image of a domain of that name.
    pub(super) fn managed_save_path(&self, name: &str) -> HvResult<PathBuf> {
        let uri = self.client.uri();
        let folder = match uri.scope() {
            Scope::System => PathBuf::from("/var/lib/libvirt/qemu/save"),
            Scope::Session if rustix::process::geteuid().is_root() => {
                PathBuf::from("/var/lib/libvirt/qemu/save")
            }
            Scope::Session => {
                let daemon = match self.client.status() {
                    Status::Connected { instance, .. } => instance.map(|daemon| daemon.process.pid),
                    Status::Disconnected { .. } => None,
                };
                folders::definitions(uri, daemon)?.join("save")
            }
            Scope::Embed | Scope::Other(_) => {
                let what = "where this driver keeps managed save images is not known";
                return Err(HvError::new(Trouble::Unsupported, what));
            }
        };
        Ok(folder.join(format!("{name}.save")))
    }

    pub(super) async fn keep_managed_save(&self, domain: &DomainId, to: &Path) -> HvResult<bool> {
        let (name, there) = self
            .look_at(domain, "managed save image", |d| Ok((d.name().to_owned(), d.has_managed_save()?)))
            .await?;
        // libvirt knows only of one that it made itself, or found when it started.
        let from = self.managed_save_path(&name)?;
        if !from.exists() {
            if there {
                let what = format!("libvirt's managed save image is not at {}", from.display());
                return Err(HvError::new(Trouble::Missing, what));
            }
            return Ok(false);
        }
        let (source, target) = (from.clone(), to.to_owned());
        blocking(move || second_name(&source, &target)).await?;
        if there {
            self.change(domain, "forget the managed save image", |d| d.remove_managed_save()).await?;
        }
        blocking(move || gone(&from)).await?;
        Ok(true)
    }

    pub(super) async fn return_managed_save(&self, domain: &DomainId, from: &Path) -> HvResult<()> {
        let name = self.look_at(domain, "name", |d| Ok(d.name().to_owned())).await?;
        let to = self.managed_save_path(&name)?;
        let source = from.to_owned();
        blocking(move || if to.exists() { Ok(()) } else { second_name(&source, &to) }).await
    }

    pub(super) async fn read_checkpoints(&self, domain: &DomainId) -> HvResult<Vec<(String, String)>> {
        self.look_at(domain, "checkpoints", |d| {
            let all = d.checkpoints(CheckpointListFlags::TOPOLOGICAL)?;
            all.iter().map(|c| Ok((c.name().to_owned(), c.xml(CheckpointXmlFlags::SECURE)?))).collect()
        })
        .await
    }

    pub(super) async fn drop_checkpoints(&self, domain: &DomainId) -> HvResult<()> {
        self.change(domain, "forget the checkpoints", |d| {
            // Children first: then nobody has to be given other parents.
            for checkpoint in d.checkpoints(CheckpointListFlags::TOPOLOGICAL)?.iter().rev() {
                checkpoint.delete(CheckpointDeleteFlags::METADATA_ONLY)?;
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn return_checkpoint(&self, domain: &DomainId, name: &str, xml: &str) -> HvResult<()> {
        let (name, xml) = (name.to_owned(), xml.to_owned());
        self.change(domain, "give a checkpoint back", move |d| match d.checkpoint(&name) {
            Ok(_) => Ok(()),
            Err(e) if e.code == ErrorCode::NoDomainCheckpoint => {
                d.create_checkpoint(&xml, CheckpointCreateFlags::REDEFINE).map(drop)
            }
            Err(e) => Err(e),
        })
        .await
    }
}

pub(super) fn marked(xml: &str, mark: &Marker) -> HvResult<String> {
    let mut xml = DomainXml::parse(xml).map_err(|e| definition::broken(&e))?;
    marker::put(&mut xml, mark).map_err(|e| definition::broken(&e))?;
    Ok(xml.to_string())
}

async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> HvResult<()> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => Err(HvError::new(Trouble::Io, format!("the managed save image: {e}"))),
        Err(e) => Err(HvError::new(Trouble::Refused, e.to_string())),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// The same file under a second name; where that cannot be, a copy with the same times. Durable. What stands at that
/// name already is of an attempt that was cut off, and is replaced.
fn second_name(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::remove_file(to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    if std::fs::hard_link(from, to).is_err() {
        std::fs::copy(from, to)?;
        let times = std::fs::metadata(from)?;
        let file = File::options().write(true).open(to)?;
        file.set_times(std::fs::FileTimes::new().set_modified(times.modified()?))?;
    }
    File::open(to)?.sync_all()?;
    sync_folder(to)
}

fn gone(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    sync_folder(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_name_survives_the_first_and_may_be_given_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&first, "memory").unwrap();
        second_name(&first, &second).unwrap();
        second_name(&first, &second).unwrap();
        gone(&first).unwrap();
        gone(&first).unwrap();
        assert_eq!(std::fs::read_to_string(&second).unwrap(), "memory");
    }

    #[test]
    fn a_definition_bears_exactly_the_marker_that_it_was_given() {
        let marker = |job: &str| Marker { store: "s".to_owned(), job: job.to_owned(), hold: None };
        let text =
            "<domain type='qemu'><name>x</name><uuid>11111111-1111-4111-8111-111111111111</uuid></domain>";
        let once = marked(text, &marker("1")).unwrap();
        let twice = marked(&once, &marker("2")).unwrap();
        let read = |text: &str| super::marker::read(&DomainXml::parse(text).unwrap());
        assert_eq!(read(&once), Some(marker("1")));
        assert_eq!(read(&twice), Some(marker("2")));
        assert_eq!(twice.matches("vmkeep:job ").count(), 1);
    }
}
