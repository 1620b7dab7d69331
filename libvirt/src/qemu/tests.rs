//! Answers recorded from QEMU 7.2: an overlay on two images, first with an active commit that is ready,
//! then with a pull-mode backup.

use serde::Deserialize;

use super::graph::build;
use super::wire::{Drive, Graph, Job, NamedNode};
use super::*;
use crate::xml::DomainXml;

#[derive(Deserialize)]
struct Recorded {
    block: Vec<Drive>,
    nodes: Vec<NamedNode>,
    graph: Graph,
    jobs: Vec<Job>,
}

fn commit_ready() -> Recorded {
    serde_json::from_str(include_str!("fixtures/commit-ready.json")).unwrap()
}

fn backup() -> Recorded {
    serde_json::from_str(include_str!("fixtures/backup.json")).unwrap()
}

const CHAIN: [&str; 3] = ["/img/o.qcow2", "/img/a.qcow2", "/img/base.qcow2"];

#[test]
fn a_chain_is_read_through_the_filter_of_an_active_commit() {
    let r = commit_ready();
    let graph = build(Some(&r.graph), &r.block, &r.nodes, r.jobs);
    let live = "<domain><devices><disk><target dev='vda'/><alias name='virtio-disk0'/></disk>\
                <disk><target dev='sda'/><alias name='sata0-0-0'/></disk></devices></domain>";
    let live = DomainXml::parse(live).unwrap();
    let disk = graph.disk(&live, "vda").unwrap();
    assert_eq!(disk.files(), CHAIN);
    assert_eq!(disk.filters, ["mirror_top"]);
    let nodes: Vec<_> =
        disk.chain.iter().map(|i| (i.node.as_deref().unwrap(), i.driver.as_str(), i.read_only)).collect();
    assert_eq!(
        nodes,
        [
            ("libvirt-5-format", "qcow2", false),
            ("libvirt-3-format", "qcow2", true),
            ("libvirt-4-format", "qcow2", false)
        ],
        "the commit writes to the base"
    );
    let names: Vec<_> = disk.chain[0].bitmaps.iter().map(|b| (b.name.as_deref(), b.persistent)).collect();
    assert_eq!(names, [(None, false), (Some("c1"), true)]);
    assert!(graph.disk(&live, "sda").unwrap().chain.is_empty());
    assert!(graph.disk(&live, "vdz").is_none());
}

#[test]
fn a_ready_job_is_told_with_the_files_it_works_on() {
    let r = commit_ready();
    let graph = build(Some(&r.graph), &r.block, &r.nodes, r.jobs);
    let job = &graph.jobs[0];
    assert_eq!((job.kind.as_str(), job.phase.clone(), job.ready), ("commit", BlockJobPhase::Ready, true));
    assert_eq!(job.id, "commit-vda-libvirt-5-format");
    for file in CHAIN {
        assert!(job.files.iter().any(|f| f == file), "{file} is missing in {:?}", job.files);
    }
}

#[test]
fn a_backups_scratch_file_is_held_but_in_no_guests_chain() {
    let r = backup();
    let graph = build(Some(&r.graph), &r.block, &r.nodes, r.jobs);
    assert_eq!(graph.disks[0].files(), CHAIN);
    assert_eq!(graph.disks[0].filters, ["copy-before-write"]);
    assert!(graph.uses("/img/s.qcow2"));
    assert!(!graph.uses("/img/t.qcow2"));
    assert_eq!(
        graph.files,
        ["/img/a.qcow2", "/img/b.raw", "/img/base.qcow2", "/img/o.qcow2", "/img/s.qcow2"]
    );
    assert_eq!((graph.jobs[0].kind.as_str(), graph.jobs[0].ready), ("backup", false));
}

#[test]
fn without_the_graph_the_chain_is_read_as_query_block_nests_it() {
    let r = backup();
    let graph = build(None, &r.block, &r.nodes, Vec::new());
    assert_eq!(graph.disks[0].files(), CHAIN);
    assert_eq!(graph.disks[1].files(), ["/img/b.raw"]);
    assert!(graph.uses("/img/s.qcow2"));
}

#[test]
fn a_device_is_found_in_every_form_in_which_qemu_names_it() {
    let disk = |qdev: &str| BlockDisk {
        qdev: qdev.into(),
        removable: false,
        io_status: None,
        chain: Vec::new(),
        filters: Vec::new(),
    };
    assert!(disk("/machine/peripheral/virtio-disk1/virtio-backend").is_device("virtio-disk1"));
    assert!(disk("sata0-0-0").is_device("sata0-0-0"));
    assert!(disk("drive-ide0-0-0").is_device("ide0-0-0"));
    assert!(!disk("/machine/peripheral/virtio-disk11/virtio-backend").is_device("virtio-disk1"));
}
