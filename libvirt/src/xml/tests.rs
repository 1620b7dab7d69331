//! What the XML module promises, on definitions as libvirt writes them.

use proptest::prelude::*;
use uuid::Uuid;

use super::*;

const LIVE: &str = r#"<domain type='qemu' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>we &quot;q&quot; $(x) &amp; &apos;é&apos;</name>
  <uuid>1695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
  <title>a title</title>
  <metadata>
    <other:thing xmlns:other="urn:other" a="q&#10;z'"><!-- kept --><other:t> s <![CDATA[a<b]]></other:t></other:thing>
  </metadata>
  <memory unit='KiB'>131072</memory>
  <currentMemory unit='KiB'>131072</currentMemory>
  <sysinfo type='smbios'>
    <system>
      <entry name='uuid'>1695eb01-f6a4-8304-79aa-97f2502e193f</entry>
    </system>
  </sysinfo>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <loader readonly='yes' secure='no' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>
    <nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/var/lib/libvirt/qemu/nvram/we_VARS.fd</nvram>
  </os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='/img/top.qcow2' index='3'/>
      <backingStore type='file' index='1'>
        <format type='qcow2'/>
        <source file='/img/base.qcow2'/>
        <backingStore type='block' index='4'>
          <format type='raw'/>
          <source dev='/dev/vg/template'/>
          <backingStore/>
        </backingStore>
      </backingStore>
      <mirror type='file' file='/img/base.qcow2' format='qcow2' job='active-commit' ready='yes'>
        <format type='qcow2'/>
        <source file='/img/base.qcow2' index='1'/>
        <backingStore/>
      </mirror>
      <target dev='vda' bus='virtio'/>
      <serial>S-1</serial>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x03' slot='0x00' function='0x0'/>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/vg/data' index='2'/>
      <backingStore/>
      <target dev='vdb' bus='virtio'/>
      <shareable/>
      <alias name='ua-data'/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='pool/image'>
        <host name='mon' port='6789'/>
      </source>
      <target dev='vdc' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
    <interface type='network'>
      <mac address='52:54:00:11:22:33'/>
      <source network='default' portid='x'/>
      <target dev='vnet7'/>
      <model type='virtio'/>
      <alias name='net0'/>
    </interface>
    <interface type='bridge'>
      <mac address='52:54:00:11:22:34'/>
      <source bridge='br0'/>
      <target dev='tap-of-ours'/>
      <link state='up'/>
    </interface>
    <serial type='file'>
      <source path='/var/log/we.log'/>
      <target type='isa-serial' port='0'/>
    </serial>
    <console type='pty' tty='/dev/pts/4'>
      <source path='/dev/pts/4'/>
      <log file='/var/log/we-console.log' append='on'/>
      <target type='serial' port='0'/>
    </console>
    <channel type='unix'>
      <source mode='bind' path='/run/libvirt/qemu/channel/3-we/org.qemu.guest_agent.0'/>
      <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
    </channel>
    <tpm model='tpm-crb'>
      <backend type='emulator' version='2.0'/>
    </tpm>
    <graphics type='vnc' port='5900' autoport='yes' listen='127.0.0.1' passwd='x'>
      <listen type='address' address='127.0.0.1'/>
    </graphics>
    <hostdev mode='subsystem' type='pci' managed='yes'><source/></hostdev>
    <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/><target dir='tag'/></filesystem>
  </devices>
  <seclabel type='dynamic' model='dac' relabel='yes'>
    <label>+64055:+64055</label>
  </seclabel>
  <seclabel type='none' model='none'/>
  <launchSecurity type='sev'/>
  <qemu:commandline>
    <qemu:arg value='-S'/>
  </qemu:commandline>
</domain>
"#;

fn live() -> DomainXml {
    DomainXml::parse(LIVE).unwrap()
}

/// The lines in which two texts differ: `-` only in the first, `+` only in the second.
fn diff(a: &str, b: &str) -> Vec<String> {
    let (a, b): (Vec<_>, Vec<_>) = (a.lines().collect(), b.lines().collect());
    let gone = a.iter().filter(|l| !b.contains(l)).map(|l| format!("-{}", l.trim()));
    let came = b.iter().filter(|l| !a.contains(l)).map(|l| format!("+{}", l.trim()));
    gone.chain(came).collect()
}

#[test]
fn an_untouched_definition_comes_back_byte_for_byte() {
    assert_eq!(live().to_string(), LIVE);
    let odd = "<?xml version=\"1.0\"?>\n<!-- x -->\n<domain  a = \"1\"\n  b='&lt;&#x41;' ><n:x/><y></y>&amp;&gt;\
               <![CDATA[]]><?pi a b?></domain><!-- end -->\n";
    // White space inside a tag is kept as well, unless it stands inside a value.
    assert_eq!(Document::parse(odd).unwrap().to_string(), odd);
}

#[test]
fn every_part_is_read() {
    let d = live();
    assert_eq!(d.kind(), Some("qemu"));
    assert_eq!(d.id(), Some(3));
    assert_eq!(d.name().unwrap(), "we \"q\" $(x) & 'é'");
    assert_eq!(d.memory().unwrap(), 128 << 20);
    assert_eq!(d.launch_security(), Some("sev"));
    let disks = d.disks();
    assert_eq!(disks.iter().map(|d| d.target.as_str()).collect::<Vec<_>>(), ["vda", "vdb", "vdc", "sda"]);
    let vda = &disks[0];
    assert_eq!(
        (vda.format.as_deref(), vda.cache.as_deref(), vda.discard.as_deref()),
        (Some("qcow2"), Some("none"), Some("unmap"))
    );
    assert_eq!(
        (vda.serial.as_deref(), vda.alias.as_deref(), vda.source.index),
        (Some("S-1"), Some("virtio-disk0"), Some(3))
    );
    let layers: Vec<_> =
        vda.layers().iter().map(|(s, f)| (s.path.clone().unwrap(), f.map(str::to_owned))).collect();
    assert_eq!(
        layers,
        [
            ("/img/top.qcow2".to_owned(), Some("qcow2".to_owned())),
            ("/img/base.qcow2".to_owned(), Some("qcow2".to_owned())),
            ("/dev/vg/template".to_owned(), Some("raw".to_owned())),
        ]
    );
    let mirror = vda.mirror.as_ref().unwrap();
    assert_eq!((mirror.ready.clone(), mirror.job.as_deref()), (MirrorReady::Yes, Some("active-commit")));
    assert_eq!(mirror.source.path.as_deref(), Some("/img/base.qcow2"));
    assert_eq!((disks[1].source.kind.clone(), disks[1].backing.clone()), (SourceKind::Block, Backing::End));
    assert!(disks[1].shareable);
    assert_eq!(disks[2].source.kind, SourceKind::Network("rbd".into()));
    assert_eq!((disks[3].device.clone(), disks[3].source.path.clone()), (DiskDevice::Cdrom, None));
    assert_eq!((disks[3].readonly, disks[3].backing.clone()), (true, Backing::Unstated));
    let os = d.os().unwrap();
    assert_eq!(os.machine.as_deref(), Some("pc-q35-7.2"));
    assert_eq!(os.nvram.unwrap().path.as_deref(), Some("/var/lib/libvirt/qemu/nvram/we_VARS.fd"));
    assert_eq!(os.loader.unwrap().kind.as_deref(), Some("pflash"));
    assert_eq!(d.interfaces()[1].source.as_deref(), Some("br0"));
    assert!(d.has_agent_channel());
    assert_eq!(d.char_devices().len(), 3);
    assert_eq!(d.tpms()[0].version.as_deref(), Some("2.0"));
    assert_eq!(d.hostdevs()[0].kind.as_deref(), Some("pci"));
    assert_eq!(d.filesystems()[0].driver.as_deref(), Some("virtiofs"));
    assert!(d.graphics()[0].autoport && d.graphics()[0].password);
    assert!(d.metadata("urn:other").is_some());
    assert!(d.metadata("urn:none").is_none());
}

#[test]
fn setting_a_disks_file_changes_that_disk_only() {
    let mut d = live();
    d.set_disk_file("vda", "/new/a 'b' <&>\n$(c) é.qcow2", "qcow2").unwrap();
    assert_eq!(
        diff(LIVE, &d.to_string()),
        [
            "-<source file='/img/top.qcow2' index='3'/>",
            "+<source file='/new/a &apos;b&apos; &lt;&amp;&gt;&#10;$(c) é.qcow2'/>"
        ]
    );
    let back = DomainXml::parse(&d.to_string()).unwrap();
    assert_eq!(back.disk("vda").unwrap().source.path.unwrap(), "/new/a 'b' <&>\n$(c) é.qcow2");
    // A block device becomes a file, and its format is stated.
    d.set_disk_file("vdb", "/new/b.raw", "raw").unwrap();
    let vdb = d.disk("vdb").unwrap();
    assert_eq!((vdb.source.kind, vdb.source.path.as_deref()), (SourceKind::File, Some("/new/b.raw")));
    assert_eq!((vdb.format.as_deref(), vdb.driver.as_deref()), (Some("raw"), Some("qemu")));
    assert_eq!(d.set_disk_file("vdz", "/x", "raw"), Err(XmlError::Missing("disk 'vdz'".into())));
    // And back.
    d.set_disk_device("vdb", "/dev/vg/b", "raw").unwrap();
    let vdb = DomainXml::parse(&d.to_string()).unwrap().disk("vdb").unwrap();
    assert_eq!((vdb.source.kind, vdb.source.path.as_deref()), (SourceKind::Block, Some("/dev/vg/b")));
}

#[test]
fn a_backing_chain_is_dropped_ended_or_written_out() {
    let mut d = live();
    d.set_disk_backing("vda", &BackingEdit::Drop).unwrap();
    assert_eq!(d.disk("vda").unwrap().backing, Backing::Unstated);
    d.set_disk_backing("vda", &BackingEdit::End).unwrap();
    assert_eq!(d.disk("vda").unwrap().backing, Backing::End);
    let chain = BackingEdit::Chain(vec![("/a&b".into(), "qcow2".into()), ("/c".into(), "raw".into())]);
    d.set_disk_backing("vda", &chain).unwrap();
    let vda = DomainXml::parse(&d.to_string()).unwrap().disk("vda").unwrap();
    let names: Vec<_> =
        vda.layers().into_iter().map(|(s, f)| (s.path.clone().unwrap(), f.unwrap().to_owned())).collect();
    assert_eq!(names[1..], [("/a&b".to_owned(), "qcow2".to_owned()), ("/c".to_owned(), "raw".to_owned())]);
    let Backing::Layer(first) = vda.backing else { panic!("no chain") };
    let Backing::Layer(second) = first.below else { panic!("short chain") };
    assert_eq!(second.below, Backing::End);
}

#[test]
fn a_new_identity_reaches_every_place_that_repeats_it() {
    let mut d = live();
    let uuid = Uuid::from_u128(0x1234);
    d.set_uuid(uuid).unwrap();
    d.set_name("it's & <new>").unwrap();
    d.set_title(None).unwrap();
    d.set_links(LinkState::Down).unwrap();
    let macs = d.regenerate_macs().unwrap();
    let text = d.to_string();
    assert!(!text.contains("1695eb01"), "the system information must not keep the old UUID");
    let back = DomainXml::parse(&text).unwrap();
    assert_eq!(
        (back.name().unwrap().as_str(), back.uuid().unwrap(), back.title()),
        ("it's & <new>", uuid, None)
    );
    let interfaces = back.interfaces();
    assert!(interfaces.iter().all(|i| i.link.as_deref() == Some("down")));
    assert_eq!(interfaces.iter().map(|i| i.mac.clone().unwrap()).collect::<Vec<_>>(), macs);
    assert!(macs.iter().all(|m| m.starts_with("52:54:00:") && m.len() == 17));
    assert_ne!(macs[0], macs[1]);
    assert!(!d.set_genid(uuid).unwrap(), "a definition without a generation id gets none");
    let mut with = DomainXml::parse("<domain><genid>1</genid></domain>").unwrap();
    assert!(with.set_genid(uuid).unwrap());
    assert_eq!(with.genid(), Some(uuid.to_string()));
}

#[test]
fn paths_of_serial_ports_channels_and_nvram_are_rewritten_or_dropped() {
    let mut d = live();
    let n = d
        .rewrite_char_paths(|role, path| match role {
            CharRole::Serial => Some(format!("{path}.copy")),
            CharRole::Channel => None,
            _ => Some(path.to_owned()),
        })
        .unwrap();
    assert_eq!(n, 2);
    let devices = d.char_devices();
    assert_eq!(devices[0].path.as_deref(), Some("/var/log/we.log.copy"));
    assert_eq!(devices[1].log.as_deref(), Some("/var/log/we-console.log"));
    assert_eq!((devices[2].path.clone(), devices[2].kind.as_str()), (None, "unix"));
    assert!(d.set_nvram(Some("/nv/new.fd")).unwrap());
    assert_eq!(d.os().unwrap().nvram.unwrap().path.as_deref(), Some("/nv/new.fd"));
    assert!(d.set_nvram(None).unwrap());
    let nvram = d.os().unwrap().nvram.unwrap();
    assert_eq!(
        (nvram.path, nvram.template.is_some()),
        (None, true),
        "the template is needed to make it anew"
    );
    let mut newer = DomainXml::parse(
        "<domain><os><nvram type='file' format='qcow2'><source file='/a'/></nvram></os></domain>",
    )
    .unwrap();
    newer.set_nvram(Some("/b")).unwrap();
    assert_eq!(newer.os().unwrap().nvram.unwrap().path.as_deref(), Some("/b"));
}

#[test]
fn what_only_a_running_domain_has_is_stripped_and_what_the_user_chose_stays() {
    let mut d = live();
    d.strip_runtime();
    d.drop_dynamic_seclabels();
    let text = d.to_string();
    assert_eq!(d.id(), None);
    assert!(d.disks().iter().all(|k| k.mirror.is_none() && k.source.index.is_none()));
    assert_eq!(d.disk("vdb").unwrap().alias.as_deref(), Some("ua-data"));
    assert_eq!(d.disk("vda").unwrap().alias, None);
    let devices: Vec<_> = d.interfaces().into_iter().map(|i| i.host_device).collect();
    assert_eq!(devices, [None, Some("tap-of-ours".to_owned())]);
    assert!(!text.contains("/dev/pts/4"));
    assert!(!text.contains("type='dynamic'") && text.contains("type='none'"));
    assert!(text.contains("<qemu:arg value='-S'/>") && text.contains("org.qemu.guest_agent.0"));
}

#[test]
fn our_metadata_is_set_replaced_and_removed_without_touching_others() {
    let mut d = live();
    d.set_metadata("<v:job xmlns:v='urn:vmkeep' id='1'/>").unwrap();
    d.set_metadata("<w:job xmlns:w='urn:vmkeep' id='2'/>").unwrap();
    assert_eq!(diff(LIVE, &d.to_string()), ["+<w:job xmlns:w='urn:vmkeep' id='2'/>"]);
    assert_eq!(d.metadata("urn:vmkeep").unwrap().attr("id"), Some("2"));
    assert!(d.remove_metadata("urn:vmkeep"));
    assert!(!d.remove_metadata("urn:vmkeep"));
    assert_eq!(d.to_string(), LIVE);
    let mut bare = DomainXml::parse("<domain>\n  <name>x</name>\n  <os/>\n</domain>").unwrap();
    bare.set_metadata("<job xmlns='urn:vmkeep'/>").unwrap();
    assert_eq!(
        bare.to_string(),
        "<domain>\n  <name>x</name>\n  <metadata><job xmlns='urn:vmkeep'/></metadata>\n  <os/>\n</domain>"
    );
    assert!(bare.remove_metadata("urn:vmkeep"));
    assert_eq!(bare.to_string(), "<domain>\n  <name>x</name>\n  <os/>\n</domain>");
    assert!(matches!(bare.set_metadata("<job/>"), Err(XmlError::Missing(_))));
}

#[test]
fn white_space_that_libvirt_writes_literally_into_attributes_means_itself() {
    // As virsh dumpxml prints a path with a newline and a tab.
    let doc = Document::parse("<a f='/tmp/a\nb\tc' g='x'>r\rs</a>").unwrap();
    assert_eq!(doc.root().attr("f"), Some("/tmp/a\nb\tc"));
    assert_eq!(doc.to_string(), "<a f='/tmp/a&#10;b&#9;c' g='x'>r&#13;s</a>");
}

#[test]
fn what_is_not_well_formed_or_could_expand_is_refused() {
    for bad in [
        "",
        "<a>",
        "</a>",
        "<a></b>",
        "<a/><b/>",
        "<a/>x",
        "<a b='1' b='2'/>",
        "<a>&nope;</a>",
        "<a>&#1;</a>",
        "<a b='<'/>",
        "<a b='&#0;'/>",
        "<a>\u{1}</a>",
        "<1/>",
        "<a b='x'",
    ] {
        assert!(Document::parse(bad).is_err(), "{bad:?} was accepted");
    }
    assert_eq!(Document::parse("<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>"), Err(XmlError::Doctype));
    let deep = "<a>".repeat(300) + &"</a>".repeat(300);
    assert_eq!(Document::parse(&deep), Err(XmlError::TooDeep));
    assert!(matches!(DomainXml::parse("<network/>"), Err(XmlError::Root { .. })));
    assert_eq!(live().set_name("a\u{1}b"), Err(XmlError::Character('\u{1}')));
}

#[test]
fn sizes_are_read_in_every_unit_and_overflow_is_an_error() {
    let memory = |unit: &str, n: &str| {
        DomainXml::parse(&format!("<domain><memory {unit}>{n}</memory></domain>")).unwrap().memory()
    };
    assert_eq!(memory("", "1"), Ok(1024));
    assert_eq!(memory("unit='GiB'", "2"), Ok(2 << 30));
    assert_eq!(memory("unit='MB'", "2"), Ok(2_000_000));
    assert!(memory("unit='TiB'", "99999999999").is_err());
    assert!(memory("unit='furlong'", "1").is_err());
}

#[test]
fn descriptions_are_built_with_everything_escaped() {
    let snapshot = SnapshotXml {
        name: Some("a<b".into()),
        description: None,
        memory: SnapshotMemory::File("/m '1'".into()),
        disks: vec![
            ("vda".into(), SnapshotDisk::External { path: "/o&".into(), format: "qcow2".into() }),
            ("sda".into(), SnapshotDisk::No),
        ],
    };
    assert_eq!(
        snapshot.to_xml().unwrap(),
        "<domainsnapshot><name>a&lt;b</name><memory snapshot='external' file='/m &apos;1&apos;'/><disks>\
         <disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='/o&amp;'/></disk>\
         <disk name='sda' snapshot='no'/></disks></domainsnapshot>"
    );
    let checkpoint = CheckpointXml {
        name: "c".into(),
        description: None,
        disks: vec![("vda".into(), true), ("vdb".into(), false)],
    };
    assert_eq!(
        checkpoint.to_xml().unwrap(),
        "<domaincheckpoint><name>c</name><disks><disk name='vda' checkpoint='bitmap'/>\
         <disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>"
    );
    let part = BackupPart {
        file: "/scratch".into(),
        format: Some("qcow2".into()),
        incremental: Some(Some("c".into())),
        export: Some("e".into()),
        export_bitmap: Some("b".into()),
    };
    let backup = BackupXml {
        mode: BackupMode::Pull { socket: "/s".into() },
        incremental: Some("c".into()),
        disks: vec![
            BackupDisk { target: "vda".into(), part: Some(part) },
            BackupDisk { target: "vdb".into(), part: None },
        ],
    };
    assert_eq!(
        backup.to_xml().unwrap(),
        "<domainbackup mode='pull'><incremental>c</incremental><server transport='unix' socket='/s'/><disks>\
         <disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='c' exportname='e' \
         exportbitmap='b'><driver type='qcow2'/><scratch file='/scratch'/></disk><disk name='vdb' backup='no'/>\
         </disks></domainbackup>"
    );
}

/// Text that XML can hold, heavy with what needs escaping.
fn xml_text() -> impl Strategy<Value = String> {
    prop::collection::vec(
        prop_oneof![
            Just('<'),
            Just('>'),
            Just('&'),
            Just('\''),
            Just('"'),
            Just('\n'),
            Just('\t'),
            Just('\r'),
            Just(';'),
            Just('$'),
            Just('('),
            Just(']'),
            Just('é'),
            Just('\u{1F600}'),
            prop::char::range(' ', '~'),
        ],
        0..24,
    )
    .prop_map(|chars| chars.into_iter().collect())
}

fn xml_element() -> impl Strategy<Value = Element> {
    let name = "[a-z]{1,6}(:[a-z]{1,4})?";
    let leaf = (name, prop::collection::vec(("[a-z]{1,5}", xml_text()), 0..4), xml_text()).prop_map(
        |(name, attributes, text)| {
            let mut e = Element::new(&name).unwrap();
            for (key, value) in attributes {
                e.set_attr(&key, &value).unwrap();
            }
            e.set_text(&text).unwrap();
            e
        },
    );
    leaf.prop_recursive(4, 32, 5, move |inner| {
        (name, prop::collection::vec((inner, xml_text()), 0..5)).prop_map(|(name, children)| {
            let mut e = Element::new(&name).unwrap();
            for (child, comment) in children {
                e.children.push(Node::Element(child));
                e.children.push(Node::Comment(comment.replace(['-', '\r'], " ")));
            }
            e
        })
    })
}

/// Names, values and texts, without how they were written.
fn meaning(e: &Element) -> Vec<String> {
    let mut out = vec![e.name().to_owned(), e.text()];
    out.extend(e.attrs().map(|(n, v)| format!("{n}={v}")));
    out.extend(e.children.iter().filter_map(|n| match n {
        Node::Comment(c) => Some(format!("#{c}")),
        _ => None,
    }));
    out.extend(e.elements().flat_map(meaning));
    out
}

proptest! {
    #[test]
    fn any_tree_survives_writing_and_reading(tree in xml_element()) {
        let written = Document::new(tree.clone()).to_string();
        let read = Document::parse(&written).unwrap();
        prop_assert_eq!(meaning(read.root()), meaning(&tree));
        prop_assert_eq!(read.to_string(), written.clone());
        prop_assert_eq!(Document::parse(&read.to_string()).unwrap(), read);
    }

    #[test]
    fn any_name_and_path_survive_an_edit_and_leave_the_rest_alone(name in xml_text(), path in xml_text()) {
        let mut d = live();
        d.set_name(&name).unwrap();
        d.set_disk_file("vda", &path, "qcow2").unwrap();
        let mut back = DomainXml::parse(&d.to_string()).unwrap();
        prop_assert_eq!(back.name().unwrap(), name);
        prop_assert_eq!(back.disk("vda").unwrap().source.path.unwrap(), path);
        // Undone, everything but the one source element is as it was.
        back.set_name(&live().name().unwrap()).unwrap();
        back.set_disk_file("vda", "/img/top.qcow2", "qcow2").unwrap();
        let changed = diff(LIVE, &back.to_string());
        prop_assert!(changed.iter().all(|l| l.contains("<source file='/img/top.qcow2'") || l.contains("<name>")), "{:?}", changed);
    }

    #[test]
    fn arbitrary_input_never_panics(text in ".{0,80}", cut in 0usize..4000) {
        let _ = Document::parse(&text);
        let cut = (0..=cut.min(LIVE.len())).rev().find(|i| LIVE.is_char_boundary(*i)).unwrap();
        let _ = DomainXml::parse(&LIVE[..cut]).map(|d| (d.disks(), d.to_string()));
    }
}

#[test]
fn of_two_disks_with_one_target_neither_is_edited() {
    let disk = "<disk type='file'><source file='/a'/><target dev='vda'/></disk>";
    let text = format!("<domain><name>d</name><devices>{disk}{disk}</devices></domain>");
    let mut domain = DomainXml::parse(&text).unwrap();
    let twice = Err(XmlError::Twice("disk 'vda'".to_owned()));
    assert_eq!(domain.set_disk_file("vda", "/b", "raw"), twice);
    assert_eq!(domain.set_disk_backing("vda", &BackingEdit::End), twice);
    assert_eq!(domain.remove_disk("vda"), twice);
    assert_eq!(domain.to_string(), text);
}
