use vmkeep_steps::hypervisor::DomainId;

use super::*;

const DOMAIN: &str = "<domain type='qemu' id='4'>
  <name>web</name>
  <uuid>11111111-1111-4111-8111-111111111111</uuid>
  <genid>22222222-2222-4222-8222-222222222222</genid>
  <metadata><vmkeep:job xmlns:vmkeep='urn:vmkeep:job:1' store='s' job='j'/></metadata>
  <memory unit='KiB'>131072</memory>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/img/a b.qcow2' index='1'/>
      <backingStore type='file' index='2'><format type='raw'/><source file='/img/base.raw'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>S1</serial>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='/img/b.raw'/>
      <backingStore/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <interface type='user'><mac address='52:54:00:00:00:01'/></interface>
    <interface type='user'><mac address='52:54:00:00:00:02'/><link state='up'/></interface>
    <serial type='file'><source path='/log/serial'/><target port='0'/></serial>
    <channel type='unix'>
      <source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-4-web/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <graphics type='vnc' port='5901' autoport='no' listen='127.0.0.1'/>
  </devices>
</domain>";

fn identity() -> NewIdentity {
    NewIdentity {
        name: "web copy".to_owned(),
        id: DomainId("33333333-3333-4333-8333-333333333333".parse().unwrap()),
        mac_seed: Some(7),
        disks: vec![("vda".into(), Layer { path: "/new/a.qcow2".into(), format: "qcow2".to_owned() })],
        without: vec!["vdb".into()],
        links_down: true,
        same: false,
        nvram: None,
    }
}

#[test]
fn disks_are_read_with_what_the_definition_says_below_them() {
    let found = read(DOMAIN).unwrap();
    let disk = found.disk(&"vda".into()).unwrap();
    assert_eq!(disk.source, DiskSource::File("/img/a b.qcow2".into()));
    let base = Layer { path: "/img/base.raw".into(), format: "raw".to_owned() };
    assert_eq!(disk.backing, Backing::Explicit(vec![base]));
    assert_eq!(found.disk(&"vdb".into()).unwrap().backing, Backing::Explicit(vec![]));
    assert_eq!(found.disk(&"sda".into()).unwrap().source, DiskSource::Empty);
    assert!(found.disk(&"sda".into()).unwrap().read_only);
    assert_eq!(found.devices.memory, 128 << 20);
    assert!(found.devices.agent && found.devices.tpm.is_none() && found.devices.nvram.is_none());
}

#[test]
fn what_a_job_changes_itself_does_not_change_the_bare_hash_and_everything_else_does() {
    let bare = |text: &str| read(text).unwrap().bare;
    let same = DOMAIN
        .replace("<metadata><vmkeep:job xmlns:vmkeep='urn:vmkeep:job:1' store='s' job='j'/></metadata>", "")
        .replace("<source file='/img/b.raw'/>\n      <backingStore/>", "<source file='/img/o.qcow2'/>")
        .replace("type='raw'/>\n      <source", "type='qcow2'/>\n<source");
    assert_ne!(same, DOMAIN);
    assert_eq!(bare(&same), bare(DOMAIN));
    let marker = "<metadata><vmkeep:job xmlns:vmkeep='urn:vmkeep:job:1' store='s' job='j'/></metadata>";
    for without in ["", "<metadata/>", "<metadata>\n  </metadata>"] {
        assert_eq!(
            bare(&DOMAIN.replace(marker, without)),
            bare(DOMAIN),
            "{without:?} is left behind by libvirt"
        );
    }
    for (old, new) in [
        ("<serial>S1</serial>", "<serial>S2</serial>"),
        ("131072", "262144"),
        ("cache='none'", "cache='writeback'"),
        ("52:54:00:00:00:01", "52:54:00:00:00:09"),
        ("device='cdrom'", "device='floppy'"),
    ] {
        assert_ne!(bare(&DOMAIN.replace(old, new)), bare(DOMAIN), "{old}");
    }
}

/// A slice of a device is not the device: an overlay over all of it would show, and be committed to, other bytes.
#[test]
fn a_part_of_a_device_or_file_is_neither() {
    for (kind, source) in [("block", "dev='/dev/vg/b'"), ("file", "file='/img/b.raw'")] {
        let text = DOMAIN.replace(
            "<source file='/img/b.raw'/>",
            &format!(
                "<source {source}><slices><slice type='storage' offset='512' size='512'/></slices></source>"
            ),
        );
        let text = text.replacen(
            "<disk type='file' device='disk'>\n      <driver name='qemu' type='raw'/>",
            &format!("<disk type='{kind}' device='disk'>\n      <driver name='qemu' type='raw'/>"),
            1,
        );
        let vdb = vmkeep_steps::hypervisor::Target::from("vdb");
        let source = read(&text).unwrap().disk(&vdb).unwrap().source.clone();
        assert!(matches!(&source, DiskSource::Other(what) if what.starts_with("a part of")), "{source:?}");
    }
}

/// A disk on a block device is one on a file as long as it is on its overlay, and again a block device afterwards.
#[test]
fn a_disk_on_a_device_goes_to_its_overlay_and_back_by_the_same_hash() {
    let block = DOMAIN.replace(
        "<disk type='file' device='disk'>\n      <driver name='qemu' type='raw'/>\n      \
        <source file='/img/b.raw'/>",
        "<disk type='block' device='disk'>\n      <driver name='qemu' type='raw'/>\n      \
        <source dev='/dev/vg/b'><seclabel model='dac' relabel='no'/></source>",
    );
    let before = DomainXml::parse(&block).unwrap();
    let was = read(&block).unwrap();
    let vdb: Target = "vdb".into();
    assert_eq!(was.disk(&vdb).unwrap().source, DiskSource::Block("/dev/vg/b".into()));
    assert_eq!(was.file(&vdb).unwrap(), std::path::Path::new("/dev/vg/b"));
    let mut xml = before.clone();
    let overlay = Layer { path: "/overlays/o.qcow2".into(), format: "qcow2".to_owned() };
    point(&mut xml, &vdb, &overlay).unwrap();
    let on_overlay = read(&xml.to_string()).unwrap();
    assert_eq!(on_overlay.disk(&vdb).unwrap().source, DiskSource::File("/overlays/o.qcow2".into()));
    assert_eq!(on_overlay.bare, was.bare);
    like_in(&mut xml, &before, &vdb).unwrap();
    assert_eq!(xml.to_string(), before.to_string());
}

/// QEMU opens a device only as a device.
#[test]
fn a_disk_that_is_pointed_at_a_device_names_it_as_one() {
    let nodes = std::fs::read_dir("/dev").unwrap().flatten().map(|entry| entry.path());
    let Some(node) = nodes.into_iter().find(|path| device::at(path)) else {
        println!("SKIPPED: there is no block device here");
        return;
    };
    let mut xml = DomainXml::parse(DOMAIN).unwrap();
    let layer = Layer { path: node.clone(), format: "raw".to_owned() };
    point(&mut xml, &"vdb".into(), &layer).unwrap();
    let disk = read(&xml.to_string()).unwrap().disk(&"vdb".into()).unwrap().clone();
    assert_eq!((disk.source, disk.format.as_deref()), (DiskSource::Block(node), Some("raw")));
}

#[test]
fn a_rewritten_definition_shares_nothing_with_the_original_that_both_cannot_have() {
    let text = rewrite(DOMAIN, &identity()).unwrap();
    let found = read(&text).unwrap();
    for gone in [
        "11111111-",
        "22222222-",
        "/img/",
        "/log/serial'",
        "00:00:01",
        "00:00:02",
        "5901",
        "domain-4-web",
        "vmkeep:job",
    ] {
        assert!(!text.contains(gone), "{gone} is still in {text}");
    }
    assert_eq!(found.file(&"vda".into()).unwrap(), std::path::Path::new("/new/a.qcow2"));
    assert_eq!(found.disk(&"vda".into()).unwrap().backing, Backing::Probed);
    assert!(found.disk(&"vdb".into()).is_none());
    assert!(text.contains("<serial>S1</serial>"), "what the guest sees of the disk stays");
    assert_eq!(text.matches("state=\"down\"").count() + text.matches("state='down'").count(), 2);
    assert!(text.contains("/log/serial.web%20copy"));
    assert!(text.contains("org.qemu.guest_agent.0"));
}

#[test]
fn rewriting_twice_gives_the_same_so_that_a_repeated_attempt_does_no_harm() {
    assert_eq!(rewrite(DOMAIN, &identity()).unwrap(), rewrite(DOMAIN, &identity()).unwrap());
    let other = NewIdentity { mac_seed: Some(8), ..identity() };
    assert_ne!(rewrite(DOMAIN, &identity()).unwrap(), rewrite(DOMAIN, &other).unwrap());
}

#[test]
fn a_disk_is_put_back_exactly_as_it_was() {
    let before = DomainXml::parse(DOMAIN).unwrap();
    let mut xml = before.clone();
    let overlay = Layer { path: "/img/o.qcow2".into(), format: "qcow2".to_owned() };
    point(&mut xml, &"vda".into(), &overlay).unwrap();
    point(&mut xml, &"vdb".into(), &overlay).unwrap();
    assert_ne!(xml.to_string(), before.to_string());
    for target in ["vda", "vdb"] {
        like_in(&mut xml, &before, &target.into()).unwrap();
    }
    assert_eq!(xml.to_string(), before.to_string());
    assert!(like_in(&mut xml, &before, &"vdz".into()).is_err());
}

#[test]
fn a_copy_never_shares_a_file_of_firmware_variables_whoever_chose_it() {
    let os = |inner: &str| {
        format!("<domain type='kvm'><name>a</name><memory>1</memory>{inner}<devices/></domain>")
    };
    let own =
        NewIdentity { nvram: Some("/new/v.fd".into()), disks: Vec::new(), without: Vec::new(), ..identity() };
    let none = NewIdentity { nvram: None, ..own.clone() };
    let chosen = os("<os firmware='efi'><type>hvm</type></os>");
    let found = read(&chosen).unwrap().devices.nvram.unwrap();
    assert_eq!((found.file, found.format.as_str(), found.elsewhere), (None, "raw", None));
    assert!(rewrite(&chosen, &own).unwrap().contains("<nvram>/new/v.fd</nvram>"));
    let named = os("<os><type>hvm</type><loader type='pflash'>/c.fd</loader>\
                    <nvram template='/t.fd' format='qcow2'>/old/v.fd</nvram></os>");
    let found = read(&named).unwrap().devices.nvram.unwrap();
    assert_eq!((found.file, found.format.as_str()), (Some("/old/v.fd".into()), "qcow2"));
    for identity in [&own, &none] {
        let copy = rewrite(&named, identity).unwrap();
        assert!(!copy.contains("/old/v.fd") && copy.contains("/t.fd"), "{copy}");
    }
    let block = os("<os><type>hvm</type><nvram type='block'><source dev='/dev/x'/></nvram></os>");
    assert_eq!(read(&block).unwrap().devices.nvram.unwrap().elsewhere.as_deref(), Some("block /dev/x"));
}

#[test]
fn a_tpm_that_is_not_libvirts_own_is_told_apart() {
    let with = |backend: &str| {
        let text = format!(
            "<domain type='kvm'><name>a</name><memory>1</memory><devices><tpm>{backend}</tpm></devices></domain>"
        );
        read(&text).unwrap().devices.tpm.unwrap()
    };
    let emulated = with("<backend type='emulator' version='2.0'><encryption secret='x'/></backend>");
    assert_eq!((emulated.kind, emulated.encrypted), (TpmKind::Emulator, true));
    assert_eq!(with("<backend type='external'/>").kind, TpmKind::Other("external".to_owned()));
}

#[test]
fn a_disk_is_encrypted_if_any_image_below_it_is() {
    let with = |inner: &str| {
        let text = format!(
            "<domain type='kvm'><name>a</name><memory>1</memory><devices><disk type='file' device='disk'>\
             <driver name='qemu' type='qcow2'/><source file='/i/a'/>{inner}<target dev='vda' bus='virtio'/></disk>\
             </devices></domain>"
        );
        read(&text).unwrap().disks[0].encrypted
    };
    let below = "<backingStore type='file'><format type='qcow2'/><source file='/i/b'>\
                 <encryption format='luks'><secret type='passphrase' uuid='x'/></encryption></source>\
                 <backingStore/></backingStore>";
    assert!(with(below));
    assert!(!with("<backingStore/>"));
}
