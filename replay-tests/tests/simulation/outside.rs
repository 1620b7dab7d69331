//! Firmware variables and TPM state after a run: each machine has its own, and none are left over.

use std::path::Path;
use std::sync::Arc;

use vmkeep_steps::hypervisor::Layer;
use vmkeep_steps::hypervisor::fake::Fake;
use vmkeep_steps::image::root::Roots;
use vmkeep_steps::inplace::kept;
use vmkeep_steps::manifest::Manifest;
use vmkeep_steps::snapshot::Places;

use super::judge::End;
use super::run::{Before, copy};
use super::scenario::{Purpose, Scenario, Stage};

/// What a file says of the boots that its machine has been through, for comparison.
fn boots(file: &Path) -> String {
    Fake::boots_in(file).map_or_else(|e| format!("{}: {e}", file.display()), |boots| format!("{boots:?}"))
}

fn on(chain: &[Layer]) -> String {
    Fake::boots_on(chain).map_or_else(|e| e.to_string(), |boots| format!("{boots:?}"))
}

fn layer(path: &Path) -> Layer {
    let format = path.extension().map_or("raw".to_owned(), |format| format.to_string_lossy().into_owned());
    Layer { path: path.to_owned(), format }
}

/// They belong to the machine that the domain is now; what is kept aside has its own; nothing is left.
pub fn judge(scenario: &Scenario, stage: &Stage, was: &Before, end: End, wrong: &mut Vec<String>) {
    if !scenario.sealed || end.attended {
        return;
    }
    let now = stage.world.picture(&stage.domain.id);
    let same = now.persistent == was.picture.persistent;
    if same != (now.variables == was.picture.variables) {
        wrong.push(format!("with the disks {:?} the variables are {:?}", now.persistent, now.variables));
    }
    let mut expected = was.tpms.clone();
    if scenario.purpose == Purpose::Another && end.succeeded {
        expected.insert(copy().to_string().into());
    }
    let tpms = stage.tpms();
    if tpms != expected {
        wrong.push(format!("libvirt has TPMs of {tpms:?}, and not of {expected:?}"));
    }
    let roots = Roots::open(["restored", "images"].map(|name| stage.at(name))).unwrap();
    let (machines, troubles) = kept::list(&Places { roots: Arc::new(roots) }, &stage.at("restored"));
    wrong.extend(troubles);
    for machine in machines {
        let disks = &machine.kept.disks;
        if disks.len() != scenario.formats.len() {
            wrong.push(format!("the record of what is kept aside names the disks {disks:?}"));
            continue;
        }
        let disk = on(&[layer(&disks[0].path)]);
        let variables = machine.kept.variables.as_ref().map(|variables| boots(&variables.path));
        let tpm =
            machine.kept.tpm.iter().flatten().map(|file| boots(&machine.folder.join(file.file.as_str())));
        let tpm: Vec<_> = tpm.collect();
        let mixed = stage.world.mixed(&stage.domain.id);
        if variables.as_ref() != Some(&disk) || (tpm != std::slice::from_ref(&disk) && !mixed) {
            wrong.push(format!("what is kept aside is a mixture: {disk}, {variables:?}, {tpm:?}"));
        }
    }
}

/// What a backup says to be of the disks' instant is.
pub fn backup(manifest: &Manifest, folder: &Path) -> Vec<String> {
    let Some(disk) = manifest.disks.first() else { return Vec::new() };
    let layers = disk.chain.iter().map(|name| {
        let format = manifest.file(name).and_then(|file| file.format);
        Layer {
            path: folder.join(name.as_str()),
            format: format.map_or("raw", |format| format.as_str()).to_owned(),
        }
    });
    let disk = on(&layers.collect::<Vec<_>>());
    let variables = manifest.nvram.iter().filter(|kept| kept.at_instant).map(|kept| &kept.file);
    let tpm = manifest.tpm.iter().filter(|kept| kept.at_instant).flat_map(|kept| &kept.files);
    let all = variables.chain(tpm.map(|file| &file.file));
    let others = all.filter(|name| boots(&folder.join(name.as_str())) != disk);
    others.map(|name| format!("{} of a backup is not of its disks' instant", name.as_str())).collect()
}
