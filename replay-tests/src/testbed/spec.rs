//! What a test guest looks like: its disks are made and its definition is written from a [`GuestSpec`].

use super::{
    MIB,
    command::run,
    error::{IoContext, Result},
    hypervisor::Hypervisor,
    image::{Format, create, import_raw, write_device, write_raw},
    parts::GuestParts,
};
use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Seed of the pattern that [`DiskSpec::data`] puts on a disk.
pub(crate) const DATA_SEED: u64 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Ticks,
    Plain,
    Ext4,
}

/// One disk of a guest. The first is `vda`, the second `vdb`, and so on.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    size: u64,
    format: Format,
    role: Role,
    data: u64,
    chain: usize,
    linked_to: Option<(PathBuf, Format)>,
    path: Option<PathBuf>,
    device: bool,
    driver: String,
    options: String,
}

impl DiskSpec {
    /// An empty qcow2 disk of `size` bytes with ticks.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            format: Format::Qcow2,
            role: Role::Ticks,
            data: 0,
            chain: 0,
            linked_to: None,
            path: None,
            device: false,
            driver: "discard='unmap'".to_owned(),
            options: String::new(),
        }
    }

    /// A raw file instead of qcow2.
    pub fn raw(mut self) -> Self {
        self.format = Format::Raw;
        self
    }

    /// Of the given format.
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// Without ticks: the guest does not touch it unless told to.
    pub fn plain(mut self) -> Self {
        self.role = Role::Plain;
        self
    }

    /// With an ext4 file system, which the guest mounts and keeps writing to (20 small files' worth of fsync a
    /// second), instead of ticks. One per guest.
    pub fn ext4(mut self) -> Self {
        self.role = Role::Ext4;
        self
    }

    /// With `bytes` of data that were there before the first boot, behind the place of the ticks:
    /// `check vda OFFSET BYTES 1` in the guest, or [`super::pattern_on`] with seed 1, find them again.
    /// OFFSET is [`data_offset`].
    pub fn data(mut self, bytes: u64) -> Self {
        self.data = bytes;
        self
    }

    /// On top of `depth` backing files of its own, each of which holds something (the deepest one the data).
    pub fn chain(mut self, depth: usize) -> Self {
        self.chain = depth;
        self
    }

    /// A linked clone: an empty image over an existing one, whose size and content it has at first.
    pub fn linked_to(mut self, image: &Path, format: Format) -> Self {
        self.linked_to = Some((image.to_owned(), format));
        self
    }

    /// At this path instead of one made from the domain's name. The folder must be the hypervisor's user's.
    pub fn at(mut self, path: &Path) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// Raw, on a block device of the host that is there, is as large, and is the hypervisor's user's.
    pub fn on_device(mut self, device: &Path) -> Self {
        self.device = true;
        self.raw().at(device)
    }

    /// Further attributes of the XML element `<driver>`, for example `cache='none' io='native'`.
    pub fn driver(mut self, attributes: &str) -> Self {
        write!(self.driver, " {attributes}").unwrap_or_default();
        self
    }

    /// Further children of the XML element `<disk>`, for example `<shareable/>` or `<readonly/>`.
    pub fn options(mut self, xml: &str) -> Self {
        self.options.push_str(xml);
        self
    }
}

/// Where data may lie on a disk of `size` bytes: behind the header and the ring of ticks. In bytes.
pub fn data_offset(size: u64) -> u64 {
    MIB + ((size / 8 / 512).min(65536) & !2047) * 512
}

/// A guest: name, disks and what it does.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    name: String,
    disks: Vec<DiskSpec>,
    memory_mib: u64,
    rate: u64,
    agent: bool,
    machine: String,
    extra_devices: String,
    extra_domain: String,
}

impl GuestSpec {
    /// A guest without disks, 128 MiB of memory, 20 ticks a second, no agent. The name may be nasty.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            disks: Vec::new(),
            memory_mib: 128,
            rate: 20,
            agent: false,
            machine: "q35".to_owned(),
            extra_devices: String::new(),
            extra_domain: String::new(),
        }
    }

    /// Two disks with ticks, a qcow2 and a raw one of 64 MiB: the usual guest.
    pub fn two_disks(name: &str) -> Self {
        Self::new(name).disk(DiskSpec::new(64 * MIB)).disk(DiskSpec::new(64 * MIB).raw())
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: DiskSpec) -> Self {
        self.disks.push(disk);
        self
    }

    /// Memory in MiB; less than 96 does not boot.
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Ticks a second from the boot on (0: as many as it can; the pause between ticks is 1 s / rate).
    pub fn rate(mut self, per_second: u64) -> Self {
        self.rate = per_second;
        self
    }

    /// With the real guest agent and its channel.
    pub fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// `q35` (the default) or `pc`, or a versioned machine type.
    pub fn machine(mut self, machine: &str) -> Self {
        machine.clone_into(&mut self.machine);
        self
    }

    /// With a network card that reaches nothing but QEMU's own user network.
    pub fn network(self) -> Self {
        self.extra_devices("<interface type='user'><model type='virtio'/></interface>")
    }

    /// Further children of the XML element `<devices>`.
    pub fn extra_devices(mut self, xml: &str) -> Self {
        self.extra_devices.push_str(xml);
        self
    }

    /// Further children of the XML element `<domain>`, for example `<metadata>`.
    pub fn extra_domain(mut self, xml: &str) -> Self {
        self.extra_domain.push_str(xml);
        self
    }

    /// The domain's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name as part of a file name: letters, digits and dashes; different for different names.
    pub(crate) fn slug(&self) -> String {
        let plain: String =
            self.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(24).collect();
        if plain == self.name {
            return plain;
        }
        let hash = self.name.bytes().fold(0, |h, b| super::image::mix(h ^ u64::from(b)));
        format!("{plain}-{:08x}", hash >> 32)
    }

    pub(crate) fn serial(&self, hypervisor: &Hypervisor) -> PathBuf {
        hypervisor.dir().join("serial").join(format!("{}.log", self.slug()))
    }

    /// Makes all disks and returns the definition.
    pub(crate) fn build(&self, hypervisor: &Hypervisor) -> Result<String> {
        let parts = GuestParts::locate()?;
        let (mut disks, mut ticks, mut mounted) = (String::new(), Vec::new(), String::new());
        for (disk, letter) in self.disks.iter().zip('a'..='z') {
            let target = format!("vd{letter}");
            let path = disk.make(hypervisor, &format!("{}-{target}", self.slug()))?;
            let (kind, attribute) = if disk.device { ("block", "dev") } else { ("file", "file") };
            write!(
                disks,
                "<disk type='{kind}' device='disk'><driver name='qemu' type='{}' {}/><source {attribute}='{}'/>\
                 <target dev='{target}' bus='virtio'/>{}</disk>",
                disk.format.name(),
                disk.driver,
                escape(&path.to_string_lossy()),
                disk.options
            )
            .unwrap_or_default();
            match disk.role {
                Role::Ticks => ticks.push(target),
                Role::Ext4 => mounted = target,
                Role::Plain => {}
            }
        }
        let mut command_line =
            format!("console=ttyS0 quiet loglevel=4 mitigations=off nokaslr panic=-1 vk.rate={}", self.rate);
        let mut channels = "<channel type='unix'><source mode='bind'/>\
             <target type='virtio' name='org.vmkeep.testbed.0'/></channel>"
            .to_owned();
        if !ticks.is_empty() {
            write!(command_line, " vk.ticks={}", ticks.join(",")).unwrap_or_default();
        }
        if !mounted.is_empty() {
            write!(command_line, " vk.fs={mounted}").unwrap_or_default();
        }
        if self.agent {
            command_line.push_str(" vk.agent");
            channels.push_str(
                "<channel type='unix'><source mode='bind'/>\
                 <target type='virtio' name='org.qemu.guest_agent.0'/></channel>",
            );
        }
        Ok(format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>{extra}\
             <os><type arch='x86_64' machine='{machine}'>hvm</type><kernel>{kernel}</kernel>\
             <initrd>{initrd}</initrd><cmdline>{command_line}</cmdline></os><features><acpi/></features>\
             <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>\
             <devices>{disks}<controller type='usb' model='none'/>\
             <serial type='file'><source path='{serial}' append='on'/><target port='0'/></serial>{channels}\
             <memballoon model='none'/>{devices}</devices></domain>",
            name = escape(&self.name),
            memory = self.memory_mib,
            extra = self.extra_domain,
            machine = escape(&self.machine),
            kernel = escape(&parts.kernel.to_string_lossy()),
            initrd = escape(&(if self.agent { parts.initrd_agent } else { parts.initrd }).to_string_lossy()),
            serial = escape(&self.serial(hypervisor).to_string_lossy()),
            devices = self.extra_devices,
        ))
    }
}

impl DiskSpec {
    fn make(&self, hypervisor: &Hypervisor, stem: &str) -> Result<PathBuf> {
        let extension = if self.format == Format::Raw { "raw" } else { "qcow2" };
        let path =
            self.path.clone().unwrap_or_else(|| hypervisor.images().join(format!("{stem}.{extension}")));
        if self.device {
            write_device(&path, data_offset(self.size), self.data, DATA_SEED)?;
            return Ok(path);
        }
        if let Some((image, format)) = &self.linked_to {
            create(
                hypervisor,
                &path,
                self.format,
                super::image_info(image)?.virtual_size,
                Some((image, *format)),
            )?;
            return Ok(path);
        }
        // The deepest image of the chain holds the data; every further one some of its own.
        let layer = |depth: usize| match depth {
            depth if depth == self.chain => path.clone(),
            depth => path.with_file_name(format!("{stem}-base{depth}.qcow2")),
        };
        let format = |depth: usize| if depth == self.chain { self.format } else { Format::Qcow2 };
        self.fill(hypervisor, &layer(0), format(0))?;
        for depth in 1..=self.chain {
            let below = layer(depth - 1);
            create(hypervisor, &layer(depth), format(depth), self.size, Some((&below, format(depth - 1))))?;
            // In the last mebibytes, where neither ticks nor (unless it is asked for) data lie.
            let place = self.size.saturating_sub(depth as u64 * MIB);
            let write = format!("write -q -P {} {place} 64K", 0x40 + depth);
            hypervisor.run(
                "qemu-io",
                ["-f", format(depth).name(), "-c", &write, &layer(depth).to_string_lossy()],
            )?;
        }
        Ok(path)
    }

    fn fill(&self, hypervisor: &Hypervisor, path: &Path, format: Format) -> Result<()> {
        if self.role != Role::Ext4 && self.data == 0 {
            return create(hypervisor, path, format, self.size, None);
        }
        let raw = path.with_extension("making");
        write_raw(&raw, self.size, data_offset(self.size), self.data, DATA_SEED)?;
        if self.role == Role::Ext4 {
            let path = hypervisor.env().remove("PATH").unwrap_or_default();
            run(Command::new("mkfs.ext4").env("PATH", path).args(["-q", "-F"]).arg(&raw))?;
        }
        if format == Format::Raw {
            fs::rename(&raw, path).doing("rename", &raw)?;
            return hypervisor.give_to_user(path, 0);
        }
        import_raw(hypervisor, &raw, path, format)?;
        fs::remove_file(&raw).doing("remove", raw)
    }
}

/// Text for an XML element or attribute.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_names_never_share_a_file() {
        let slug = |name| GuestSpec::new(name).slug();
        assert_eq!(slug("web"), "web");
        let names =
            ["web server", "web-server", "web/server", "wéb server", &"a".repeat(40), &"a".repeat(41)];
        let slugs: std::collections::BTreeSet<String> = names.into_iter().map(slug).collect();
        assert_eq!(slugs.len(), names.len());
    }
}
