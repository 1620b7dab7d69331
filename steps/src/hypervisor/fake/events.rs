//! What happens to the world without being asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::guests::tick;
use super::{Def, Domain, Fake, HEAD, Inner, Mind, Open, Process, disk, home, io, no};
use crate::hypervisor::{DomainId, FileId, HvResult, Layer, PauseReason, RunState, Target, Trouble, local};
use crate::image::chain;
use crate::image::qcow2::Format;
use crate::snapshot::memory::{PART, WHOLE};

impl Fake {
    /// The host loses power, and comes up again; files that vmkeepd made and did not sync are empty. With `autostart` every guest that ran starts with it.
    pub fn power_cut(&self, autostart: bool) {
        let mut inner = self.inner();
        crate::simulation::power_cut();
        inner.late.clear();
        inner.helpers.clear();
        inner.readers.clear();
        inner.boot += 1;
        inner.libvirtd += 1;
        let mut ran = Vec::new();
        let ids: Vec<DomainId> = inner.domains.keys().copied().collect();
        ids.iter().for_each(|id| inner.images_closed(id, true));
        inner.domains.retain(|id, domain| {
            ran.extend(domain.process.is_some().then_some(*id));
            domain.process = None;
            domain.persistent = domain.durable.clone();
            (domain.saved, domain.crashed) = (None, false);
            domain.persistent.is_some()
        });
        if let Some(ram) = inner.ram.clone() {
            for entry in std::fs::read_dir(ram).into_iter().flatten().flatten() {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        ran.retain(|id| autostart || inner.domains.get(id).is_some_and(|d| d.autostart));
        for id in ran {
            inner.start(&id, false, true);
        }
    }

    /// libvirtd is killed, and comes back: calls in progress are not finished, waiting ones forgotten, guests live on.
    pub fn libvirtd_dies(&self) {
        let mut inner = self.inner();
        inner.late.clear();
        inner.libvirtd += 1;
        for domain in inner.domains.values_mut() {
            (domain.saved, domain.crashed) = (None, false);
            let Some(process) = &mut domain.process else { continue };
            process.libvirtd_forgets_pull();
            // A save that was cut off is given up, and its guest runs on.
            if process.saving.take().is_some() && process.run == RunState::Paused(PauseReason::Job) {
                process.run = RunState::Running;
            }
        }
    }

    /// QEMU is killed.
    pub fn qemu_dies(&self, id: &DomainId) {
        let mut inner = self.inner();
        inner.ended(id, false, true);
        inner.theirs(id);
    }

    /// An operator starts the domain; it may fail, as theirs may.
    pub fn operator_starts(&self, id: &DomainId) {
        self.inner().start(id, false, true);
    }

    /// An operator pulls the plug.
    pub fn operator_destroys(&self, id: &DomainId) {
        let mut inner = self.inner();
        inner.ended(id, false, false);
        inner.theirs(id);
    }

    /// An operator pauses the guest, or lets it run.
    pub fn operator_pauses(&self, id: &DomainId, on: bool) {
        let mut inner = self.inner();
        if let Ok(process) = inner.process(id) {
            process.run = if on { RunState::Paused(PauseReason::Asked) } else { RunState::Running };
        }
        if let Ok(domain) = inner.domain(id) {
            domain.theirs = true;
        }
    }

    /// An operator saves the guest into libvirt's own file (virsh managedsave).
    ///
    /// # Errors
    /// When it does not run.
    pub fn operator_saves(&self, id: &DomainId) -> HvResult<()> {
        let mut inner = self.inner();
        let Some(image) = inner.managed_save(id) else { return no(Trouble::NoSuchDomain, "there is none") };
        let process = inner.process(id)?;
        let bytes =
            memory_image(&process.live.text(), &process.mind(), process.run == RunState::Running, true)?;
        std::fs::write(image, bytes).map_err(io)?;
        inner.ended(id, true, false);
        inner.theirs(id);
        Ok(())
    }

    /// An operator undefines the domain (virsh undefine): while it runs it is transient from here on.
    pub fn operator_undefines(&self, id: &DomainId) {
        let mut inner = self.inner();
        let Some(domain) = inner.domains.get_mut(id) else { return };
        (domain.persistent, domain.durable, domain.autostart) = (None, None, false);
        if domain.process.is_none() {
            inner.forgotten(id);
        }
    }

    /// Somebody's program opens an image, to write to it.
    pub fn helper_opens(&self, image: &Path) {
        self.inner().helpers.push(image.to_owned());
    }

    /// And closes it.
    pub fn helper_closes(&self, image: &Path) {
        self.inner().helpers.retain(|held| held != image);
    }

    /// The guest fills a cluster of a disk with a byte.
    ///
    /// # Errors
    /// When it does not run, or its image cannot be written.
    pub fn guest_writes(&self, id: &DomainId, target: &Target, at: u64, byte: u8) -> HvResult<()> {
        let mut inner = self.inner();
        let when = inner.stamp();
        let process = inner.process(id)?;
        let Some(open) = process.disks.iter().find(|open| open.target == *target) else {
            return no(Trouble::Refused, "no such disk");
        };
        let (number, bytes) = (at / disk::CLUSTER, vec![byte; disk::CLUSTER as usize]);
        let open = open.clone();
        inner.guest_overwrites(id, &open, number, &bytes, when).map_err(io)?;
        let process = inner.process(id)?;
        // A commit that has caught up goes along with every write.
        if process.jobs.get(target).is_some_and(|job| job.ready)
            && let [_, base, ..] = open.chain.as_slice()
        {
            disk::write(base, number, &bytes, when).map_err(io)?;
        }
        Ok(())
    }

    /// The last tick that a guest has written, and which of its boots it is.
    #[must_use]
    pub fn guest_ticks(&self, id: &DomainId) -> Option<(u64, u64)> {
        let inner = self.inner();
        let process = inner.domains.get(id)?.process.as_ref()?;
        Some((process.memory.values().max().copied().unwrap_or(0), process.life))
    }

    /// The guest gets an agent.
    pub fn gets_agent(&self, id: &DomainId) {
        if let Ok(domain) = self.inner().domain(id) {
            domain.persistent.iter_mut().for_each(|def| def.agent = true);
            domain.durable.iter_mut().for_each(|def| def.agent = true);
        }
    }

    /// What somebody did to it so far is no matter: it is this job's to bring back.
    pub fn forget_theirs(&self, id: &DomainId) {
        if let Ok(domain) = self.inner().domain(id) {
            domain.theirs = false;
        }
    }

    /// How long the world has existed.
    #[must_use]
    pub fn elapsed(&self) -> std::time::Duration {
        self.inner().now()
    }

    /// The instances that carry out calls, as an [`Environment`](vmkeep_workflow::Environment) tells them.
    #[must_use]
    pub fn instances(&self) -> BTreeMap<String, String> {
        let inner = self.inner();
        [("boot", inner.boot), ("libvirtd", inner.libvirtd)]
            .map(|(k, v)| (k.to_owned(), v.to_string()))
            .into()
    }

    /// The domain starts with the host.
    pub fn starts_with_host(&self, id: &DomainId) {
        if let Ok(domain) = self.inner().domain(id) {
            domain.autostart = true;
        }
    }

    /// Time has passed.
    pub fn pass(&self) {
        self.inner().pass();
    }
}

impl Inner {
    /// QEMU is gone, if there was one, and with it a domain that is not defined.
    pub(super) fn ended(&mut self, id: &DomainId, saved: bool, crashed: bool) {
        self.images_closed(id, crashed);
        let Some(domain) = self.domains.get_mut(id).filter(|domain| domain.process.is_some()) else { return };
        domain.process = None;
        (domain.saved, domain.crashed) = (Some(saved), crashed);
        if domain.persistent.is_none() {
            self.forgotten(id);
        }
    }

    /// QEMU closes its images, or is killed with them.
    fn images_closed(&mut self, id: &DomainId, killed: bool) {
        let process = self.domains.get(id).and_then(|domain| domain.process.as_ref());
        let chains = process.into_iter().flat_map(|p| &p.disks).flat_map(|open| &open.chain);
        chains.for_each(|layer| self.bitmaps.closed(&layer.path, killed));
    }

    /// It was somebody else who ended it.
    fn theirs(&mut self, id: &DomainId) {
        if let Some(domain) = self.domains.get_mut(id) {
            domain.theirs = true;
        }
    }

    /// Somebody else starts a domain, from its managed save image if there is one.
    fn start(&mut self, id: &DomainId, paused: bool, theirs: bool) {
        if self.domains.get(id).is_none_or(|d| d.process.is_some()) {
            return;
        }
        self.by_others = theirs;
        let started = self.start_as_libvirt_does(id, paused);
        self.by_others = false;
        if started.is_ok()
            && let Some(domain) = self.domains.get_mut(id)
        {
            domain.theirs |= theirs;
        }
    }

    /// From the managed save image if there is one, else from the persistent definition.
    pub(super) fn start_as_libvirt_does(&mut self, id: &DomainId, paused: bool) -> HvResult<()> {
        let domain = self.domain(id)?;
        if domain.process.is_some() {
            return Ok(());
        }
        let def = domain.persistent.clone();
        let managed = self.managed_save(id);
        if let Some(image) = managed.filter(|image| image.exists()) {
            let (def, memory, was_running) = read_memory(&image)?;
            self.power_on(id, def, paused || !was_running, Some(memory))?;
            return std::fs::remove_file(image).map_err(io);
        }
        match def {
            Some(def) => self.power_on(id, def, paused, None),
            None => no(Trouble::NoSuchDomain, "it is not defined"),
        }
    }

    pub(super) fn managed_save(&self, id: &DomainId) -> Option<std::path::PathBuf> {
        let domain = self.domains.get(id)?;
        Some(self.folder.join(format!("libvirt/save/{}.save", domain.name)))
    }

    /// A QEMU begins, with memory or without.
    pub(super) fn power_on(
        &mut self,
        id: &DomainId,
        mut live: Def,
        paused: bool,
        memory: Option<Mind>,
    ) -> HvResult<()> {
        let mut disks = Vec::new();
        for disk in &mut live.disks {
            let chain = match &disk.backing {
                Some(below) => [std::slice::from_ref(&disk.layer), below.as_slice()].concat(),
                None => opened(&disk.layer)?,
            };
            disk.found |= disk.backing.is_none();
            disk.backing = Some(chain[1..].to_vec());
            let (files, ids) = held_open(&chain)?;
            let size = local::inspect(&disk.layer)?.map_or(0, |image| image.virtual_size);
            disks.push(Open { target: disk.target.clone(), chain, files, ids, size });
        }
        let held = |open: &Open| {
            let others = self.domains.values().filter_map(|d| d.process.as_ref()).flat_map(|p| &p.disks);
            let top = &open.chain[0].path;
            open.chain.iter().any(|layer| self.helpers.contains(&layer.path))
                || self.readers.contains(top)
                || others.into_iter().any(|other| other.chain[0].path == *top)
        };
        if let Some(open) = disks.iter().find(|open| held(open)) {
            return no(
                Trouble::Locked,
                format!("Failed to get \"write\" lock on {}", open.chain[0].path.display()),
            );
        }
        let mut found = BTreeMap::new();
        for open in &disks {
            found.insert(open.target.clone(), tick(&open.chain).map_err(io)?);
        }
        match &memory {
            Some(Mind { ticks, .. }) if *ticks != found => self
                .wrong
                .push(format!("memory that knows {ticks:?} was loaded onto disks that hold {found:?}")),
            _ => {}
        }
        for open in &disks {
            let Some(flushed) = home(&open.chain).and_then(|home| self.flushed.get(home)) else { continue };
            if found[&open.target] != *flushed {
                self.wrong.push(format!(
                    "{} starts from {}, which holds {}, and {flushed} had been flushed",
                    live.name,
                    open.chain[0].path.display(),
                    found[&open.target]
                ));
            }
        }
        let (least, most) = (found.values().min().copied(), found.values().max().copied());
        if least.zip(most).is_some_and(|(least, most)| most - least >= disks.len().max(2) as u64) {
            self.wrong.push(format!("{} starts from disks of different instants: {found:?}", live.name));
        }
        let knows = memory.as_ref().and_then(|mind| mind.knows.clone());
        let first = disks.first().map(|open| open.chain.clone());
        let outside = self.outside_of(id, &mut live, first.as_deref(), knows).map_err(io)?;
        disks.iter().for_each(|open| self.bitmaps.opened(&open.chain[0].path));
        self.processes += 1;
        let number = self.processes;
        // Of a guest that comes with its memory libvirt never says that somebody asked for its pause.
        let reason = if memory.is_some() { PauseReason::Job } else { PauseReason::Asked };
        let run = if paused { RunState::Paused(reason) } else { RunState::Running };
        let mind = memory.unwrap_or(Mind { life: u64::from(number), ticks: found, knows: None });
        let domain = self.domain(id)?;
        (domain.saved, domain.crashed) = (None, false);
        domain.process = Some(Process {
            number,
            live,
            run,
            disks,
            jobs: BTreeMap::new(),
            pull: None,
            stray: Vec::new(),
            frozen: false,
            memory: mind.ticks,
            life: mind.life,
            outside,
            obeys_at: None,
            saving: None,
            aborted: false,
        });
        Ok(())
    }

    /// Moves a disk of QEMU's to another chain.
    pub(super) fn moves(
        process: &mut Process,
        target: &crate::hypervisor::Target,
        chain: Vec<Layer>,
    ) -> HvResult<()> {
        let (files, ids) = held_open(&chain)?;
        if let Some(open) = process.disks.iter_mut().find(|open| open.target == *target) {
            (open.chain, open.files, open.ids) = (chain, files, ids);
        }
        Ok(())
    }
}

/// The files of a chain, as QEMU holds them open, and which they are.
fn held_open(chain: &[Layer]) -> HvResult<(Vec<Arc<File>>, Vec<FileId>)> {
    let one = |layer: &Layer| {
        let file = disk::open(&layer.path)?;
        let id = FileId::of(&file.metadata()?);
        Ok((Arc::new(file), id))
    };
    chain.iter().map(one).collect::<std::io::Result<_>>().map_err(io)
}

/// The chain that QEMU opens.
pub(super) fn opened(top: &Layer) -> HvResult<Vec<Layer>> {
    let Some(format) = Format::from_name(&top.format) else {
        return no(Trouble::Refused, "an unknown format");
    };
    let chain = chain::probe(&top.path, format)
        .map_err(|e| crate::hypervisor::HvError::new(Trouble::Missing, e.to_string()))?;
    Ok(chain.into_iter().map(|e| Layer { path: e.path, format: e.format.as_str().to_owned() }).collect())
}

/// A memory image: a head with the definition, then what the guest remembers.
pub(super) fn memory_image(def: &str, memory: &Mind, was_running: bool, whole: bool) -> HvResult<Vec<u8>> {
    let mut bytes = memory_head(def, was_running, whole)?;
    bytes.extend(serde_json::to_vec(memory).unwrap_or_default());
    Ok(bytes)
}

pub(super) fn memory_head(def: &str, was_running: bool, whole: bool) -> HvResult<Vec<u8>> {
    let mut bytes = if whole { WHOLE.to_vec() } else { PART.to_vec() };
    let length = u32::try_from(def.len()).unwrap_or(u32::MAX);
    for field in [2, length, u32::from(was_running), 0] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes.resize(92, 0);
    bytes.extend(def.as_bytes());
    if bytes.len() > HEAD {
        return no(Trouble::Unsupported, "no room for this definition");
    }
    bytes.resize(HEAD, 0);
    Ok(bytes)
}

/// Reads one: definition, memory, whether the guest ran.
pub(super) fn read_memory(path: &Path) -> HvResult<(Def, Mind, bool)> {
    let bytes = std::fs::read(path).map_err(io)?;
    if bytes.len() < HEAD || !bytes.starts_with(WHOLE) {
        return no(Trouble::Refused, "the image is incomplete");
    }
    let field = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let end = 92 + usize::try_from(field(20)).unwrap_or(0);
    let text = std::str::from_utf8(&bytes[92..end.min(HEAD)]).unwrap_or_default();
    let memory = serde_json::from_slice(&bytes[HEAD..]).map_err(|e| {
        crate::hypervisor::HvError::new(Trouble::Refused, format!("the memory's stream is damaged: {e}"))
    })?;
    Ok((Def::read(text)?, memory, field(24) != 0))
}

impl Process {
    /// What its guest remembers.
    pub(super) fn mind(&self) -> Mind {
        let knows = self.outside.as_ref().map(|outside| outside.knows.clone());
        Mind { life: self.life, ticks: self.memory.clone(), knows }
    }
}

impl Domain {
    /// Nothing but a name.
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            persistent: None,
            durable: None,
            autostart: false,
            checkpoints: Vec::new(),
            saved: None,
            crashed: false,
            process: None,
            agent_answers: true,
            theirs: false,
            mixed: false,
        }
    }

    pub(super) fn define(&mut self, def: Def) {
        self.persistent = Some(def);
    }

    /// libvirt syncs the file, and nobody the folder but who is asked to.
    pub(super) fn sync(&mut self) {
        self.durable = self.persistent.clone();
    }
}

/// Commits what an overlay holds into its base, as QEMU does at the end of a job.
pub(super) fn drain(inner: &mut Inner, chain: &[Layer]) -> HvResult<()> {
    let when = inner.stamp();
    match chain {
        [top, base, ..] => inner.committed(&top.path, base, when).map_err(io),
        _ => no(Trouble::Refused, "could not find image beneath"),
    }
}
