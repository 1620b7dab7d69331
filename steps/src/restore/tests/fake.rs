//! A hypervisor that exists only here: definitions are lines of `key=value`, a memory image is a text of 4 KiB before a
//! stream, and QEMU is a row in a table. It refuses to give a guest memory that does not fit its disks, which the real
//! one does without a word.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;

use crate::hypervisor::*;
use crate::image::chain;
use crate::image::qcow2::Format;
use crate::snapshot::memory::WHOLE;

/// Bytes before the stream of a memory image.
pub(in crate::restore) const HEAD: usize = 4096;

#[derive(Clone, Debug)]
pub(in crate::restore) struct Running {
    pub(in crate::restore) paused: bool,
    pub(in crate::restore) memory: bool,
    pub(in crate::restore) pulled: bool,
    chains: Vec<(Target, Vec<Layer>)>,
}

#[derive(Default)]
pub(in crate::restore) struct State {
    pub(in crate::restore) defined: HashMap<DomainId, String>,
    pub(in crate::restore) running: HashMap<DomainId, Running>,
    /// Domains that have ever executed an instruction.
    pub(in crate::restore) ran: Vec<DomainId>,
    /// These calls fail, once each.
    pub(in crate::restore) fail: Vec<&'static str>,
    /// These calls take effect and then report a failure in doubt, once each.
    pub(in crate::restore) doubt: Vec<&'static str>,
    /// QEMU ends by itself right after this call.
    pub(in crate::restore) die_after: Option<&'static str>,
    pub(in crate::restore) calls: Vec<&'static str>,
    /// Domains that start with the host.
    pub(in crate::restore) autostart: Vec<DomainId>,
    /// Below which libvirt keeps its own things.
    pub(in crate::restore) root: PathBuf,
}

#[derive(Clone, Default)]
pub(in crate::restore) struct Fake(Arc<Mutex<State>>);

fn no<T>(what: &str) -> HvResult<T> {
    Err(HvError::new(Trouble::Unsupported, what))
}

pub(in crate::restore) fn field<'a>(xml: &'a str, key: &str) -> Option<&'a str> {
    xml.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}

/// A memory image with this definition and this stream.
pub(in crate::restore) fn memory_image(xml: &str, stream: &[u8]) -> Vec<u8> {
    let mut bytes = WHOLE.to_vec();
    bytes.extend_from_slice(xml.as_bytes());
    assert!(bytes.len() < HEAD);
    bytes.resize(HEAD, 0);
    bytes.extend_from_slice(stream);
    bytes
}

impl Fake {
    pub(in crate::restore) fn inner(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn called(&self, call: &'static str) -> HvResult<()> {
        let mut s = self.inner();
        s.calls.push(call);
        if let Some(at) = s.fail.iter().position(|c| *c == call) {
            s.fail.remove(at);
            return Err(HvError::new(Trouble::Refused, format!("{call} was told to fail")));
        }
        Ok(())
    }

    fn doubtful(&self, call: &'static str, id: &DomainId) -> HvResult<()> {
        let mut s = self.inner();
        if s.die_after == Some(call) {
            s.die_after = None;
            s.running.remove(id);
        }
        if let Some(at) = s.doubt.iter().position(|c| *c == call) {
            s.doubt.remove(at);
            return Err(HvError::new(Trouble::Unreachable, "the connection broke").in_doubt());
        }
        Ok(())
    }

    fn disks(xml: &str) -> Vec<(Target, Layer)> {
        let disks = xml.lines().filter_map(|line| line.strip_prefix("disk="));
        disks
            .filter_map(|line| {
                let mut parts = line.splitn(3, ' ');
                let (target, format, path) = (parts.next()?, parts.next()?, parts.next()?);
                Some((target.into(), Layer { path: path.into(), format: format.to_owned() }))
            })
            .collect()
    }

    fn power_on(&self, id: &DomainId, xml: &str, paused: bool, memory: bool) -> HvResult<()> {
        let mut chains = Vec::new();
        for (target, layer) in Self::disks(xml) {
            let format = Format::from_name(&layer.format).unwrap();
            let chain = chain::probe(&layer.path, format)
                .map_err(|e| HvError::new(Trouble::Missing, e.to_string()))?;
            let layers =
                chain.into_iter().map(|e| Layer { path: e.path, format: e.format.as_str().to_owned() });
            chains.push((target, layers.collect()));
        }
        let mut s = self.inner();
        if !paused {
            s.ran.push(*id);
        }
        s.running.insert(*id, Running { paused, memory, pulled: false, chains });
        Ok(())
    }
}

#[async_trait]
impl Hypervisor for Fake {
    async fn environment(&self) -> HvResult<BTreeMap<String, String>> {
        Ok([("qemu".to_owned(), "7.2.22".to_owned())].into())
    }

    async fn own_folders(&self) -> HvResult<OwnFolders> {
        let root = self.inner().root.clone();
        let at = |name: &str| root.join(name);
        Ok(OwnFolders { nvram: at("nvram"), tpm: at("swtpm"), save: at("save") })
    }
    async fn domains(&self) -> HvResult<Vec<DomainRef>> {
        let s = self.inner();
        let all = s
            .defined
            .iter()
            .map(|(id, xml)| DomainRef { id: *id, name: field(xml, "name").unwrap_or_default().to_owned() });
        Ok(all.collect())
    }

    async fn find(&self, name: &str) -> HvResult<DomainRef> {
        let all = self.domains().await?;
        let found = all.into_iter().find(|d| d.name == name || d.id.to_string() == name);
        found.ok_or_else(|| HvError::new(Trouble::NoSuchDomain, "there is none"))
    }

    async fn observe(&self, domain: &DomainId) -> HvResult<Observation> {
        let domain = self.find(&domain.to_string()).await?;
        let state = self.state(&domain.id).await?;
        let qemu = self.qemu(&domain.id).await?;
        Ok(Observation {
            domain,
            state,
            persistent: None,
            live: None,
            qemu,
            marker: None,
            persistent_marker: None,
            managed_save: false,
            autostart: false,
            saved: None,
            crashed: false,
            snapshots: Vec::new(),
            checkpoints: Vec::new(),
        })
    }

    async fn state(&self, domain: &DomainId) -> HvResult<RunState> {
        let s = self.inner();
        if !s.defined.contains_key(domain) {
            return Err(HvError::new(Trouble::NoSuchDomain, "there is none"));
        }
        Ok(match s.running.get(domain) {
            None => RunState::Off,
            Some(r) if r.paused => RunState::Paused(PauseReason::Asked),
            Some(_) => RunState::Running,
        })
    }

    async fn qemu(&self, domain: &DomainId) -> HvResult<Option<Qemu>> {
        let s = self.inner();
        Ok(s.running.get(domain).map(|r| Qemu {
            instance: "1".to_owned(),
            disks: r
                .chains
                .iter()
                .map(|(target, chain)| QemuDisk {
                    target: target.clone(),
                    chain: chain.clone(),
                    read_only: false,
                })
                .collect(),
            jobs: Vec::new(),
            open: Vec::new(),
        }))
    }

    async fn control(&self, _: &DomainId) -> HvResult<Control> {
        Ok(Control::Idle)
    }

    async fn domain_job(&self, _: &DomainId) -> HvResult<Option<DomainJob>> {
        Ok(None)
    }

    async fn stragglers(&self, _: &DomainId) -> HvResult<Option<String>> {
        Ok(None)
    }

    async fn sync_definitions(&self) -> HvResult<()> {
        Ok(())
    }

    async fn suspend(&self, _: &DomainId) -> HvResult<()> {
        no("suspend")
    }

    async fn resume(&self, domain: &DomainId) -> HvResult<()> {
        self.called("resume")?;
        {
            let mut s = self.inner();
            s.ran.push(*domain);
            let running =
                s.running.get_mut(domain).ok_or_else(|| HvError::new(Trouble::NotRunning, "off"))?;
            running.paused = false;
            // The guest writes at once: from now on no memory image fits these disks.
            let tops: Vec<PathBuf> = running.chains.iter().map(|(_, chain)| chain[0].path.clone()).collect();
            for top in tops {
                let file = std::fs::File::options().append(true).open(top).unwrap();
                std::io::Write::write_all(&mut &file, &[0; 512]).unwrap();
            }
        }
        self.doubtful("resume", domain)
    }

    async fn memory_image_definition(&self, path: &Path) -> HvResult<String> {
        let bytes = std::fs::read(path).map_err(|e| HvError::new(Trouble::Io, e.to_string()))?;
        match bytes.get(..HEAD) {
            Some(head) if head.starts_with(WHOLE) => {
                let text = String::from_utf8_lossy(&head[16..]).trim_end_matches('\0').to_owned();
                Ok(text)
            }
            _ => no("not a memory image"),
        }
    }

    async fn memory_image_head(&self, _: &Path, xml: &str) -> HvResult<Vec<u8>> {
        if 16 + xml.len() >= HEAD {
            return no("no room for this definition");
        }
        Ok(memory_image(xml, b""))
    }

    async fn pull_links(&self, domain: &DomainId) -> HvResult<u32> {
        self.called("pull_links")?;
        let mut s = self.inner();
        s.running.get_mut(domain).unwrap().pulled = true;
        Ok(1)
    }

    async fn define_new(&self, xml: &str) -> HvResult<DomainRef> {
        self.called("define")?;
        let id = DomainId(field(xml, "uuid").unwrap().parse().unwrap());
        let name = field(xml, "name").unwrap().to_owned();
        if self.domains().await?.iter().any(|d| d.name == name || d.id == id) {
            return Err(HvError::new(Trouble::Exists, "it exists"));
        }
        self.inner().defined.insert(id, xml.to_owned());
        self.doubtful("define", &id)?;
        Ok(DomainRef { id, name })
    }

    async fn undefine(&self, domain: &DomainId) -> HvResult<()> {
        self.called("undefine")?;
        let mut s = self.inner();
        if s.running.contains_key(domain) {
            return Err(HvError::new(Trouble::Busy, "it runs"));
        }
        s.defined.remove(domain);
        Ok(())
    }

    async fn start(&self, domain: &DomainId, paused: bool) -> HvResult<()> {
        self.called("start")?;
        let xml = self.inner().defined.get(domain).cloned();
        let xml = xml.ok_or_else(|| HvError::new(Trouble::NoSuchDomain, "there is none"))?;
        self.power_on(domain, &xml, paused, false)?;
        self.doubtful("start", domain)
    }

    async fn start_from_memory(&self, image: &Path, xml: &str, paused: bool) -> HvResult<()> {
        self.called("start_from_memory")?;
        let stored = self.memory_image_definition(image).await?;
        let id = DomainId(field(xml, "uuid").unwrap().parse().unwrap());
        // As libvirt does.
        assert_eq!(field(&stored, "uuid"), field(xml, "uuid"), "libvirt refuses another UUID");
        assert_eq!(field(&stored, "name"), field(xml, "name"), "libvirt refuses another name");
        // As libvirt does not.
        assert!(
            !self.inner().ran.contains(&id),
            "memory was combined with disks that a guest has written to"
        );
        let bytes = std::fs::read(image).unwrap();
        assert_eq!(&bytes[HEAD..], super::STREAM, "the stream was changed");
        self.power_on(&id, xml, paused, true)?;
        self.doubtful("start_from_memory", &id)
    }

    async fn set_autostart(&self, domain: &DomainId, on: bool) -> HvResult<()> {
        let autostart = &mut self.inner().autostart;
        autostart.retain(|other| other != domain);
        autostart.extend(on.then_some(*domain));
        Ok(())
    }

    async fn destroy(&self, domain: &DomainId) -> HvResult<()> {
        self.called("destroy")?;
        self.inner().running.remove(domain);
        Ok(())
    }

    fn rewrite_definition(&self, xml: &str, identity: &NewIdentity) -> HvResult<String> {
        let mut lines = vec![format!("name={}", identity.name), format!("uuid={}", identity.id)];
        for (target, layer) in Self::disks(xml) {
            if identity.without.contains(&target) {
                continue;
            }
            let new = identity.disks.iter().find(|(t, _)| *t == target).map_or(&layer, |(_, layer)| layer);
            lines.push(format!("disk={target} {} {}", new.format, new.path.display()));
        }
        lines.push(format!("links={}", if identity.links_down { "down" } else { "up" }));
        lines.extend(
            xml.lines().filter(|l| l.starts_with("cdrom") || l.starts_with("tpm")).map(str::to_owned),
        );
        lines.extend(identity.nvram.as_ref().map(|file| format!("nvram={}", file.display())));
        Ok(lines.join("\n"))
    }

    fn definition_changes(&self, _: &str, new: &str) -> HvResult<Vec<String>> {
        Ok(vec![format!("links are {}", field(new, "links").unwrap_or_default())])
    }

    fn parse_definition(&self, xml: &str) -> HvResult<Definition> {
        let disk = |target: Target, source, format: Option<String>, device, read_only| DiskDef {
            target,
            device,
            source,
            format,
            backing: Backing::Probed,
            read_only,
            shareable: false,
            transient: false,
            encrypted: false,
            mirror: None,
        };
        let mut disks: Vec<_> = Self::disks(xml)
            .into_iter()
            .map(|(t, l)| disk(t, DiskSource::File(l.path), Some(l.format), DiskDevice::Disk, false))
            .collect();
        if let Some(path) = field(xml, "cdrom") {
            let source = if path.is_empty() { DiskSource::Empty } else { DiskSource::File(path.into()) };
            disks.push(disk("sda".into(), source, None, DiskDevice::Cdrom, true));
        }
        let nvram = field(xml, "nvram").map(|file| NvramDef {
            file: (!file.is_empty()).then(|| file.into()),
            format: "raw".to_owned(),
            ..NvramDef::default()
        });
        let tpm = field(xml, "tpm").map(|version| TpmDef {
            kind: TpmKind::Emulator,
            version: Some(version.to_owned()),
            encrypted: false,
        });
        Ok(Definition {
            xml: xml.to_owned(),
            bare: xml.to_owned(),
            disks,
            devices: Devices {
                nvram,
                tpm,
                network_cards: field(xml, "cards").map_or(0, |n| n.parse().unwrap()),
                ..Devices::default()
            },
        })
    }

    async fn abort_domain_job(&self, _: &DomainId) -> HvResult<()> {
        no("abort")
    }
    async fn redefine_disks(&self, _: &DomainId, _: &DiskChange) -> HvResult<()> {
        no("redefine")
    }
    async fn set_marker(&self, _: &DomainId, _: &Marker) -> HvResult<()> {
        no("marker")
    }
    async fn set_hold(&self, _: &DomainId, _: &Marker) -> HvResult<()> {
        no("hold")
    }
    async fn clear_marker(&self, _: &DomainId) -> HvResult<()> {
        no("marker")
    }
    async fn take(&self, _: &DomainId, _: &Take) -> HvResult<()> {
        no("take")
    }
    async fn freeze_state(&self, _: &DomainId) -> HvResult<FreezeState> {
        no("freeze")
    }
    async fn freeze(&self, _: &DomainId) -> HvResult<u32> {
        no("freeze")
    }
    async fn thaw(&self, _: &DomainId) -> HvResult<u32> {
        no("thaw")
    }
    async fn commit_begin(&self, _: &DomainId, _: &Commit) -> HvResult<()> {
        no("commit")
    }
    async fn commit_pivot(&self, _: &DomainId, _: &Commit) -> HvResult<()> {
        no("commit")
    }
    async fn commit_abort(&self, _: &DomainId, _: &Commit) -> HvResult<()> {
        no("commit")
    }
    async fn close_unused(&self, _: &DomainId, _: &[PathBuf]) -> HvResult<()> {
        no("close")
    }
}
