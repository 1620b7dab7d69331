//! libvirt's and QEMU's calls.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use super::acts::{chain_of, marked, moved_aside, observed, pivot, qemu, redefined, save, synced, take};
use super::effects::part;
use super::events::{memory_head, read_memory};
use super::{Client, Def, Domain, Fake, HEAD, Job, disk, io, no, pulls, shown};
use crate::hypervisor::*;
use crate::simulation::Hands;

/// How long a guest needs to shut down.
const SHUTDOWN: Duration = Duration::from_secs(3);
/// How long a commit needs to catch up.
const CATCH_UP: Duration = Duration::from_millis(30);

#[async_trait]
impl Hypervisor for Client {
    async fn environment(&self) -> HvResult<BTreeMap<String, String>> {
        self.look(|inner| {
            let facts = [
                ("boot", inner.boot.to_string()),
                ("libvirtd", inner.libvirtd.to_string()),
                ("libvirt", "9.0.0".to_owned()),
                ("qemu", "7.2.22".to_owned()),
            ];
            Ok(facts.map(|(name, value)| (name.to_owned(), value)).into())
        })
        .await
    }

    async fn own_folders(&self) -> HvResult<OwnFolders> {
        let root = self.world.inner().folder.join("libvirt");
        Ok(OwnFolders { nvram: root.join("nvram"), tpm: root.join("tpm"), save: root.join("save") })
    }

    async fn domains(&self) -> HvResult<Vec<DomainRef>> {
        self.look(|inner| {
            let one = |(id, domain): (&DomainId, &Domain)| DomainRef { id: *id, name: domain.name.clone() };
            let mut all: Vec<DomainRef> = inner.domains.iter().map(one).collect();
            all.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(all)
        })
        .await
    }

    async fn find(&self, name: &str) -> HvResult<DomainRef> {
        let all = self.domains().await?;
        if let Some(found) = all.iter().find(|d| d.name == name) {
            return Ok(found.clone());
        }
        let beginning = name.to_ascii_lowercase();
        let fits = |d: &&DomainRef| !beginning.is_empty() && d.id.to_string().starts_with(&beginning);
        match all.iter().filter(fits).collect::<Vec<_>>()[..] {
            [found] => Ok(found.clone()),
            [] => no(Trouble::NoSuchDomain, "there is no such domain"),
            _ => no(Trouble::Refused, "several domains have a UUID that begins so"),
        }
    }

    async fn observe(&self, id: &DomainId) -> HvResult<Observation> {
        self.look(|inner| observed(inner, id)).await
    }

    async fn state(&self, id: &DomainId) -> HvResult<RunState> {
        self.look(|inner| Ok(inner.domain(id)?.process.as_ref().map_or(RunState::Off, |p| p.run))).await
    }

    async fn qemu(&self, id: &DomainId) -> HvResult<Option<Qemu>> {
        self.look(|inner| {
            let boot = inner.boot;
            Ok(inner.domain(id)?.process.as_ref().map(|p| qemu(p, boot)))
        })
        .await
    }

    async fn control(&self, id: &DomainId) -> HvResult<Control> {
        self.look(|inner| {
            inner.process(id)?;
            Ok(Fake::busy(inner, id).map_or(Control::Idle, |for_ms| Control::Busy { for_ms }))
        })
        .await
    }

    async fn domain_job(&self, id: &DomainId) -> HvResult<Option<DomainJob>> {
        self.look(|inner| {
            if let Some(pull) = &inner.process(id)?.pull {
                return pull.job();
            }
            Ok(inner.process(id)?.saving.map(|operation| DomainJob {
                operation: operation.to_owned(),
                elapsed_ms: 1,
                done: 1,
                remaining: 1,
                total: 2,
                dirty_rate: 0,
                iteration: 1,
            }))
        })
        .await
    }

    async fn abort_domain_job(&self, id: &DomainId) -> HvResult<()> {
        let id = *id;
        let abort = part(move |inner| {
            let now = inner.now();
            if let Some(process) = &mut inner.domain(&id)?.process {
                process.aborted = process.saving.is_some();
                process.aborts_pull(now);
            }
            Ok(())
        });
        // It waits behind no other call.
        self.carry_out("abort-domain-job", Some(id), Hands::Libvirt, vec![abort]).await
    }

    async fn stragglers(&self, id: &DomainId) -> HvResult<Option<String>> {
        self.look(
            |inner| Ok(Fake::busy(inner, id).map(|_| "a call of somebody who is gone waits".to_owned())),
        )
        .await
    }

    async fn redefine_disks(&self, id: &DomainId, change: &DiskChange) -> HvResult<()> {
        let change = change.clone();
        self.effect("redefine-disks", Some(*id), redefined(*id, move |def| def.change(&change))).await
    }

    async fn sync_definitions(&self) -> HvResult<()> {
        let all = part(|inner| {
            inner.domains.values_mut().for_each(Domain::sync);
            Ok(())
        });
        self.own("sync-definitions", vec![all]).await
    }

    async fn set_marker(&self, id: &DomainId, marker: &Marker) -> HvResult<()> {
        let (id, kept) = (*id, marker.clone());
        let write = part(move |inner| {
            inner.domain(&id)?.persistent.iter_mut().for_each(|def| def.marker = Some(kept.clone()));
            Ok(())
        });
        let parts = vec![write, marked(id, Some(marker.clone())), synced(id)];
        self.effect("set-marker", Some(id), parts).await
    }

    async fn set_hold(&self, id: &DomainId, marker: &Marker) -> HvResult<()> {
        let (id, marker) = (*id, marker.clone());
        let one = part(move |inner| {
            inner.process(&id)?.live.marker = Some(marker);
            Ok(())
        });
        self.effect("set-hold", Some(id), vec![one]).await
    }

    async fn clear_marker(&self, id: &DomainId) -> HvResult<()> {
        let id = *id;
        let write = part(move |inner| {
            inner.domain(&id)?.persistent.iter_mut().for_each(|def| def.marker = None);
            Ok(())
        });
        let parts = vec![write, marked(id, None), synced(id)];
        self.effect("clear-marker", Some(id), parts).await
    }

    async fn take(&self, id: &DomainId, wanted: &Take) -> HvResult<()> {
        self.effect("take", Some(*id), take(*id, wanted.clone())).await
    }

    async fn save(&self, id: &DomainId, file: &Path) -> HvResult<()> {
        self.effect("save", Some(*id), save(*id, file.to_owned(), "save")).await
    }

    async fn note(&self, id: &DomainId, marker: &Marker) -> HvResult<()> {
        let marker = marker.clone();
        let parts = redefined(*id, move |def| {
            def.marker = Some(marker);
            Ok(())
        });
        self.effect("note", Some(*id), parts).await
    }

    fn reloaded_definition(&self, xml: &str, disks: &[(Target, Layer)], marker: &Marker) -> HvResult<String> {
        let mut def = Def::read(xml)?;
        for (target, layer) in disks {
            def.point(target, layer);
        }
        def.marker = Some(marker.clone());
        Ok(def.text())
    }

    async fn suspend(&self, id: &DomainId) -> HvResult<()> {
        let id = *id;
        let one = part(move |inner| {
            inner.process(&id)?.run = RunState::Paused(PauseReason::Asked);
            Ok(())
        });
        self.effect("suspend", Some(id), vec![one]).await
    }

    async fn resume(&self, id: &DomainId) -> HvResult<()> {
        let id = *id;
        let one = part(move |inner| {
            inner.process(&id)?.run = RunState::Running;
            Ok(())
        });
        self.effect("resume", Some(id), vec![one]).await
    }

    async fn freeze_state(&self, id: &DomainId) -> HvResult<FreezeState> {
        let frozen = self.look(|inner| Ok(inner.agent(id)?.frozen)).await?;
        Ok(if frozen { FreezeState::Frozen } else { FreezeState::Thawed })
    }

    async fn freeze(&self, id: &DomainId) -> HvResult<u32> {
        let id = *id;
        self.answer("freeze", Some(id), move |inner| {
            match std::mem::replace(&mut inner.agent(&id)?.frozen, true) {
                false => Ok(1),
                true => no(Trouble::Refused, "the agent takes no such command while it is frozen"),
            }
        })
        .await
    }

    async fn thaw(&self, id: &DomainId) -> HvResult<u32> {
        let id = *id;
        self.answer("thaw", Some(id), move |inner| {
            Ok(u32::from(std::mem::take(&mut inner.agent(&id)?.frozen)))
        })
        .await
    }

    async fn commit_begin(&self, id: &DomainId, commit: &Commit) -> HvResult<()> {
        let (id, commit) = (*id, commit.clone());
        let one = part(move |inner| {
            let slowly = match commit.bandwidth {
                0 => Duration::ZERO,
                rate => Duration::from_secs(disk::allocated(&commit.overlay).map_err(io)? / rate),
            };
            let ready_at = inner.now() + CATCH_UP + slowly;
            if inner.helpers.contains(&commit.base) || inner.readers.contains(&commit.base) {
                return no(Trouble::Locked, "Failed to get \"write\" lock");
            }
            let libvirt_knows = commit.through == Through::Libvirt;
            // Without a QEMU there is no chain, and libvirt looks for that first.
            if libvirt_knows && inner.domain(&id)?.process.is_none() {
                return no(Trouble::Refused, "could not find image beneath");
            }
            let process = inner.process(&id)?;
            process.free_of_pulls()?;
            chain_of(process, &commit)?;
            if process.jobs.contains_key(&commit.target) {
                return no(Trouble::Busy, "disk already in active block job");
            }
            let believed = process.live.disk(&commit.target).map(|disk| disk.layer.path.clone());
            if libvirt_knows && believed.as_ref() != Some(&commit.overlay) {
                return no(Trouble::Refused, "could not find image beneath");
            }
            process.jobs.insert(commit.target, Job { ready_at, ready: false, known: libvirt_knows });
            Ok(())
        });
        self.effect("commit-begin", Some(id), vec![one]).await
    }

    async fn commit_pivot(&self, id: &DomainId, commit: &Commit) -> HvResult<()> {
        self.effect("commit-pivot", Some(*id), pivot(*id, commit.clone())).await
    }

    async fn commit_abort(&self, id: &DomainId, commit: &Commit) -> HvResult<()> {
        let (id, target) = (*id, commit.target.clone());
        let one = part(move |inner| {
            inner.process(&id)?.jobs.remove(&target);
            Ok(())
        });
        self.effect("commit-abort", Some(id), vec![one]).await
    }

    async fn close_unused(&self, id: &DomainId, files: &[PathBuf]) -> HvResult<()> {
        self.look(|inner| {
            if let Some(process) = &mut inner.domain(id)?.process {
                process.stray.retain(|file| !files.contains(file));
            }
            Ok(())
        })
        .await
    }

    async fn memory_image_definition(&self, path: &Path) -> HvResult<String> {
        self.look(|_| Ok(read_memory(path)?.0.text())).await
    }

    async fn memory_image_head(&self, _: &Path, xml: &str) -> HvResult<Vec<u8>> {
        let head = memory_head(&Def::read(xml)?.text(), true, true)?;
        debug_assert_eq!(head.len(), HEAD);
        Ok(head)
    }

    async fn pull_links(&self, id: &DomainId) -> HvResult<u32> {
        let id = *id;
        self.answer("pull-links", Some(id), move |inner| {
            let cards = inner.process(&id)?.live.cards;
            Ok(u32::try_from(cards).unwrap_or(0))
        })
        .await
    }

    async fn define_new(&self, xml: &str) -> HvResult<DomainRef> {
        let def = Def::read(xml)?;
        let (id, name) = (def.id, def.name.clone());
        let write = part(move |inner| {
            if inner.domains.iter().any(|(other, domain)| *other == def.id || domain.name == def.name) {
                return no(Trouble::Exists, "domain already exists");
            }
            let mut domain = Domain::new(&def.name);
            let id = def.id;
            domain.define(def);
            inner.domains.insert(id, domain);
            Ok(())
        });
        self.effect("define-new", Some(id), vec![write, synced(id)]).await?;
        Ok(DomainRef { id, name })
    }

    async fn undefine(&self, id: &DomainId) -> HvResult<()> {
        let id = *id;
        let one = part(move |inner| match inner.domains.get(&id) {
            Some(domain) if domain.process.is_some() => no(Trouble::Busy, "it runs"),
            Some(_) if inner.managed_save(&id).is_some_and(|image| image.exists()) => {
                no(Trouble::Refused, "it has a managed save image")
            }
            Some(domain) if !domain.checkpoints.is_empty() => no(Trouble::Refused, "it has checkpoints"),
            _ => {
                inner.forgotten(&id);
                Ok(())
            }
        });
        self.effect("undefine", Some(id), vec![one]).await
    }

    async fn start(&self, id: &DomainId, paused: bool) -> HvResult<()> {
        let id = *id;
        let one = part(move |inner| inner.start_as_libvirt_does(&id, paused));
        self.effect("start", Some(id), vec![one]).await
    }

    async fn start_from_memory(&self, image: &Path, xml: &str, paused: bool) -> HvResult<()> {
        let (image, def) = (image.to_owned(), Def::read(xml)?);
        let id = def.id;
        let one = part(move |inner| {
            let (stored, memory, _) = read_memory(&image)?;
            if (&stored.name, &stored.id) != (&def.name, &def.id) {
                return no(Trouble::Refused, "another name or UUID");
            }
            let id = def.id;
            // Without a definition it is a transient domain.
            let domain = inner.domains.entry(id).or_insert_with(|| Domain::new(&def.name));
            if domain.process.is_some() {
                return no(Trouble::Refused, "domain is already active");
            }
            let transient = domain.persistent.is_none();
            let started = inner.power_on(&id, def, paused, Some(memory));
            if transient && started.is_err() {
                inner.domains.remove(&id);
            }
            started
        });
        self.effect("start-from-memory", Some(id), vec![one]).await
    }

    async fn set_autostart(&self, id: &DomainId, on: bool) -> HvResult<()> {
        let id = *id;
        let one = part(move |inner| {
            let domain = inner.domain(&id)?;
            if domain.persistent.is_none() {
                return no(Trouble::Refused, "cannot set autostart for transient domain");
            }
            domain.autostart = on;
            Ok(())
        });
        self.effect("set-autostart", Some(id), vec![one]).await
    }

    async fn destroy(&self, id: &DomainId) -> HvResult<()> {
        let id = *id;
        let one = part(move |inner| {
            inner.domain(&id)?;
            inner.ended(&id, false, false);
            Ok(())
        });
        self.effect("destroy", Some(id), vec![one]).await
    }

    async fn shutdown(&self, id: &DomainId) -> HvResult<()> {
        let id = *id;
        let one = part(move |inner| {
            let at = inner.now() + SHUTDOWN;
            if let Some(process) = &mut inner.domain(&id)?.process {
                process.obeys_at.get_or_insert(at);
            }
            Ok(())
        });
        self.effect("shutdown", Some(id), vec![one]).await
    }

    async fn save_memory(&self, id: &DomainId, path: &Path) -> HvResult<()> {
        self.effect("save-memory", Some(*id), save(*id, path.to_owned(), "save")).await
    }

    async fn redefine(&self, id: &DomainId, xml: &str) -> HvResult<()> {
        let new = Def::read(xml)?;
        let parts = redefined(*id, move |def| {
            if (&def.name, &def.id) != (&new.name, &new.id) {
                return no(Trouble::Refused, "domain is already defined with uuid");
            }
            *def = new;
            Ok(())
        });
        self.effect("redefine", Some(*id), parts).await
    }

    async fn take_managed_save(&self, id: &DomainId, to: &Path) -> HvResult<bool> {
        let id = *id;
        let image = self
            .look(|inner| {
                inner.domain(&id)?;
                Ok(inner.managed_save(&id))
            })
            .await?;
        let Some(image) = image.filter(|image| image.exists()) else { return Ok(false) };
        self.effect("take-managed-save", Some(id), moved_aside(image, to.to_owned())).await?;
        Ok(true)
    }

    async fn give_managed_save(&self, id: &DomainId, from: &Path) -> HvResult<()> {
        let (id, from) = (*id, from.to_owned());
        let one = part(move |inner| match inner.managed_save(&id) {
            Some(image) if !image.exists() => std::fs::hard_link(&from, image).map_err(io),
            _ => Ok(()),
        });
        self.effect("give-managed-save", Some(id), vec![one]).await
    }

    async fn bitmaps(&self, id: &DomainId, image: &Path) -> HvResult<Vec<Bitmap>> {
        self.look(|inner| {
            inner.process(id)?;
            Ok(inner.bitmaps.of(image))
        })
        .await
    }

    async fn checkpoint_definitions(&self, id: &DomainId) -> HvResult<Vec<(String, String)>> {
        self.look(|inner| Ok(inner.domain(id)?.checkpoints.iter().map(|n| (n.clone(), n.clone())).collect()))
            .await
    }

    async fn forget_checkpoints(&self, id: &DomainId) -> HvResult<()> {
        self.effect("forget-checkpoints", Some(*id), pulls::checkpoints(*id, Vec::clear)).await
    }

    async fn give_checkpoint(&self, id: &DomainId, name: &str, _: &str) -> HvResult<()> {
        let name = name.to_owned();
        let give = move |known: &mut Vec<String>| known.push(name);
        self.effect("give-checkpoint", Some(*id), pulls::checkpoints(*id, give)).await
    }

    async fn socket_folder(&self, id: &DomainId) -> HvResult<PathBuf> {
        self.look(|inner| {
            let number = inner.process(id)?.number;
            Ok(inner.folder.join(format!("libvirt/domain-{number}")))
        })
        .await
    }

    async fn pull_begin(&self, id: &DomainId, pull: &Pull) -> HvResult<()> {
        self.effect("pull-begin", Some(*id), pulls::begin(*id, pull)).await.map_err(pulls::doubt)
    }

    async fn pulling(&self, id: &DomainId) -> HvResult<Pulling> {
        self.look(|inner| {
            let pull = inner.domain(id)?.process.as_ref().and_then(|p| p.pull.as_ref());
            Ok(pull.map(pulls::Pulled::told).unwrap_or_default())
        })
        .await
    }

    async fn pull_clean(&self, id: &DomainId, _: &[PathBuf]) -> HvResult<()> {
        self.own("pull-clean", pulls::clean(*id)).await
    }

    async fn open_export(
        &self,
        id: &DomainId,
        instance: &str,
        (_, disk): (&Path, &Target),
        changes: bool,
    ) -> Result<Shown, NotShown> {
        Ok(shown::export(self, id, instance, disk, changes).await?)
    }

    async fn delete_checkpoint(&self, id: &DomainId, name: &str) -> HvResult<()> {
        self.effect("delete-checkpoint", Some(*id), pulls::forget(*id, name)).await
    }

    fn with_marker(&self, xml: &str, marker: &Marker) -> HvResult<String> {
        Ok(Def { marker: Some(marker.clone()), ..Def::read(xml)? }.text())
    }

    fn rewrite_definition(&self, xml: &str, identity: &NewIdentity) -> HvResult<String> {
        Ok(Def::read(xml)?.rewritten(identity).text())
    }

    fn definition_changes(&self, _: &str, _: &str) -> HvResult<Vec<String>> {
        Ok(Vec::new())
    }

    fn parse_definition(&self, xml: &str) -> HvResult<Definition> {
        Ok(Def::read(xml)?.told())
    }
}
