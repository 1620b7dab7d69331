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
    assert!(found.devices.agent && !found.devices.tpm && found.devices.nvram.is_none());
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
