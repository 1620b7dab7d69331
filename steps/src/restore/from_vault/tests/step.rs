//! One file: cut off between its durable acts, in somebody's way, and of content that is not what it should be.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;

use tokio_util::sync::CancellationToken;
use vmkeep_vault::ids::BlobId;
use vmkeep_workflow::progress::Progress;
use vmkeep_workflow::{JobId, Outputs, Phase, Step as _, StepContext, Verdict};

use super::fetch::{Wanted, What};
use super::image::{FetchImage, FetchInput};
use super::reader::{Readers, Source};
use super::*;
use crate::codes::assert_told;
use crate::image::rights::Wish;
use crate::image::root::Component;
use crate::restore::place::aside;

const NAME: &str = "vda.img";

/// A vault that cannot be opened.
struct Gone;

#[async_trait]
impl Vaults for Gone {
    async fn open(&self, name: &str) -> Result<Opened, Fault> {
        Err(Fault::transient(codes::VAULT_UNREACHABLE, "open the vault", name, "it is not there"))
    }
}

struct Bench {
    host: Host,
    input: FetchInput,
    cx: StepContext,
}

impl Bench {
    async fn new(format: Format) -> Self {
        let host = Host::new().await;
        let all = Backups::load(&host.vault, None).await.unwrap();
        let image = all.get(host.backup).unwrap().manifest.as_ref().unwrap().disks[0].image;
        let source =
            Source { vault: "main".to_owned(), id: host.vault.id(), domain: ORIGINAL, lease: "lease".into() };
        let input = FetchInput {
            wanted: Wanted { source, what: What::Disk("vda".to_owned()), image },
            folder: host.at("images"),
            name: Component::literal(NAME.to_owned()),
            format,
            bandwidth: 0,
            rights: Wish::default(),
        };
        let (request, _) = request(json!({}));
        let cx = StepContext {
            job: JobId::new(),
            step: "image/vda".into(),
            phase: Phase::Forward,
            attempt: 1,
            resume: None,
            request: Arc::new(request),
            facts: Arc::new(Value::Null),
            outputs: Outputs::default(),
            stop: CancellationToken::new(),
            started_in: Arc::new(BTreeMap::new()),
            still_running: false,
            progress: Progress::detached(),
            left: None,
        };
        Self { host, input, cx }
    }

    fn step(&self) -> FetchImage {
        self.over(Arc::new(There(self.host.vault.clone())))
    }

    fn over(&self, vaults: Arc<dyn Vaults>) -> FetchImage {
        FetchImage { places: self.host.places(), readers: Readers::new(vaults) }
    }

    async fn run(&self) -> Result<fetch::Fetched, Fault> {
        self.step().run(&self.cx, self.input.clone()).await
    }

    async fn probe(&self) -> Verdict<fetch::Fetched> {
        self.step().probe(&self.cx, self.input.clone()).await
    }

    /// As the engine does it: with what the attempts have left.
    async fn undo(&self, output: Option<fetch::Fetched>) {
        let left = self.cx.progress.saved();
        let cx = StepContext { phase: Phase::Undo, left, progress: Progress::detached(), ..self.cx.clone() };
        self.step().undo(&cx, self.input.clone(), output).await.unwrap();
    }

    fn path(&self) -> PathBuf {
        self.host.at("images").join(NAME)
    }

    /// Under what name the job writes the file, and what it is converted from.
    fn aside(&self, what: &str) -> PathBuf {
        self.host.at("images").join(aside(self.cx.job, what).as_str())
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.host.at("images")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn assert_whole(&self) {
        assert_eq!(self.names(), [NAME]);
        let path = self.path();
        if self.input.format == Format::Raw {
            assert!(std::fs::read(path).unwrap() == flat(&disk(1)));
            return;
        }
        let raw = self.host.at("raw");
        let limit = std::time::Duration::from_secs(60);
        let from = (path.as_path(), Format::Qcow2);
        QemuImg::default().convert(from, (&raw, Format::Raw), limit, &|| false).unwrap();
        assert!(std::fs::read(raw).unwrap()[..flat(&disk(1)).len()] == flat(&disk(1)));
    }
}

fn inode(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_is_cut_off_between_any_two_durable_acts_goes_on_to_a_whole_file() {
    for format in [Format::Raw, Format::Qcow2] {
        let last = match format {
            Format::Raw => NAME.to_owned(),
            Format::Qcow2 => format!("{NAME}, converted"),
        };
        // In the middle of the writing: what is there counts for nothing.
        let bench = Bench::new(format).await;
        for name in [NAME, &last] {
            std::fs::write(bench.aside(name), vec![0x5a; 20 * C]).unwrap();
        }
        assert!(matches!(bench.probe().await, Verdict::NotDone));
        let fetched = bench.run().await.unwrap();
        assert_eq!(fetched.root, bench.input.wanted.image.root);
        bench.assert_whole();

        // It has its name, and nobody was told.
        let Verdict::Done(again) = bench.probe().await else { panic!("it is there") };
        assert_eq!(again, fetched);

        // The note is there, the name is not: it is only named.
        let was = inode(&bench.path());
        std::fs::rename(bench.path(), bench.aside(&last)).unwrap();
        assert!(matches!(bench.probe().await, Verdict::NotDone));
        let gone = bench.over(Arc::new(Gone)).run(&bench.cx, bench.input.clone()).await.unwrap();
        assert_eq!((gone, inode(&bench.path())), (fetched.clone(), was), "the vault was asked again");
        bench.assert_whole();

        // Taken back: by what is known of it, and without anything being known of it.
        bench.undo(Some(fetched)).await;
        assert_eq!(bench.names(), Vec::<String>::new());
        for name in [NAME, &last] {
            std::fs::write(bench.aside(name), "half").unwrap();
        }
        bench.undo(None).await;
        assert_eq!(bench.names(), Vec::<String>::new());

        // It has its name, and there never was an output.
        let bench = Bench::new(format).await;
        bench.run().await.unwrap();
        bench.undo(None).await;
        assert_eq!(bench.names(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversion_that_is_cut_off_does_not_read_the_vault_again_unless_the_raw_file_was_touched() {
    let bench = Bench::new(Format::Qcow2).await;
    let raw = bench.aside(NAME);
    std::fs::write(&raw, flat(&disk(1))).unwrap();
    let note = json!({ "stage": "whole", "data": crate::image::copy::Identity::at(&raw).unwrap() });
    bench.cx.progress.save(&note).await.unwrap();
    std::fs::write(bench.aside(&format!("{NAME}, converted")), "half").unwrap();
    assert!(matches!(bench.probe().await, Verdict::Partial(token) if token == note));
    bench.over(Arc::new(Gone)).run(&bench.cx, bench.input.clone()).await.unwrap();
    bench.assert_whole();

    let bench = Bench::new(Format::Qcow2).await;
    let raw = bench.aside(NAME);
    std::fs::write(&raw, flat(&disk(1))).unwrap();
    let note = json!({ "stage": "whole", "data": crate::image::copy::Identity::at(&raw).unwrap() });
    bench.cx.progress.save(&note).await.unwrap();
    std::fs::write(&raw, vec![1; 14 * C]).unwrap();
    assert!(matches!(bench.probe().await, Verdict::NotDone));
    let fault = bench.over(Arc::new(Gone)).run(&bench.cx, bench.input.clone()).await.unwrap_err();
    assert_eq!(fault.code, codes::VAULT_UNREACHABLE);
    bench.run().await.unwrap();
    bench.assert_whole();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_somebody_else_at_the_place_is_neither_overwritten_nor_removed() {
    for noted in [false, true] {
        let bench = Bench::new(Format::Raw).await;
        if noted {
            // It comes between the note and the name.
            bench.run().await.unwrap();
            std::fs::rename(bench.path(), bench.aside(NAME)).unwrap();
        }
        std::fs::write(bench.path(), "mine").unwrap();
        let fault = bench.run().await.unwrap_err();
        assert_told(&fault, codes::BACKUP_EXISTS, NAME);
        assert!(matches!(bench.probe().await, Verdict::NotDone));
        bench.undo(None).await;
        assert_eq!(bench.names(), [NAME]);
        assert_eq!(std::fs::read(bench.path()).unwrap(), b"mine");
    }
    // Also one that took the place of ours after it had been named.
    let bench = Bench::new(Format::Raw).await;
    let fetched = bench.run().await.unwrap();
    std::fs::rename(bench.path(), bench.host.at("ours")).unwrap();
    std::fs::write(bench.path(), "mine").unwrap();
    assert!(matches!(bench.probe().await, Verdict::NotDone));
    bench.undo(Some(fetched)).await;
    assert_eq!(std::fs::read(bench.path()).unwrap(), b"mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_does_not_have_the_root_of_the_plan_is_never_named() {
    let mut bench = Bench::new(Format::Raw).await;
    bench.input.wanted.image.root = BlobId::new([7; 32]);
    let fault = bench.run().await.unwrap_err();
    assert_told(&fault, codes::VAULT_DAMAGED, "disk vda");
    assert!(!bench.path().exists());

    let mut bench = Bench::new(Format::Raw).await;
    bench.input.wanted.source.id = vmkeep_vault::ids::VaultId::random().unwrap();
    assert_eq!(bench.run().await.unwrap_err().code, codes::VAULT_EXCHANGED);
    assert_eq!(bench.names(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_to_stop_stops_and_the_next_attempt_begins_anew() {
    let bench = Bench::new(Format::Raw).await;
    bench.cx.stop.cancel();
    let fault = bench.run().await.unwrap_err();
    assert!(!bench.path().exists(), "{fault}");
    let bench = Bench { cx: StepContext { stop: CancellationToken::new(), ..bench.cx.clone() }, ..bench };
    bench.run().await.unwrap();
    bench.assert_whole();
}

/// A power cut may take the name of a whole file, and the next one get its inode.
#[tokio::test(flavor = "multi_thread")]
async fn a_note_never_speaks_for_another_file_than_the_one_that_was_whole() {
    for format in [Format::Raw, Format::Qcow2] {
        let bench = Bench::new(format).await;
        bench.run().await.unwrap();
        // The inode is the same, and half of it was never written.
        let half = std::fs::File::options().write(true).open(bench.path()).unwrap();
        half.set_len(C as u64).unwrap();
        assert!(matches!(bench.probe().await, Verdict::NotDone));
        let last = if format == Format::Raw { NAME.to_owned() } else { format!("{NAME}, converted") };
        std::fs::rename(bench.path(), bench.aside(&last)).unwrap();
        let fault = bench.over(Arc::new(Gone)).run(&bench.cx, bench.input.clone()).await.unwrap_err();
        assert_eq!(fault.code, codes::VAULT_UNREACHABLE);
        assert!(!bench.path().exists(), "it was taken for whole");
        // Before anything is made anew.
        assert_eq!(bench.cx.progress.saved(), Some(json!({ "stage": "nothing" })));
        bench.run().await.unwrap();
        bench.assert_whole();
    }
}

/// Changes every chunk of the first disk, and none of the second.
async fn damage(host: &Host) {
    for pack in &host.packs {
        let mut bytes = host.vault.backend().get(pack, None).await.unwrap().unwrap().to_vec();
        bytes.iter_mut().step_by(256).for_each(|byte| *byte ^= 1);
        host.vault.backend().put(pack, bytes.into()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_chunk_fails_the_restore_with_the_disk_and_the_bytes_and_leaves_nothing() {
    for format in ["raw", "qcow2"] {
        let host = Host::new().await;
        damage(&host).await;
        let before = host.everything();
        let (view, _) = host.restore(&json!({ "format": format })).await;
        let fault = view.summary.fault.unwrap();
        assert_told(&fault, codes::VAULT_DAMAGED, "disk vda");
        assert!(fault.cause.contains("bytes 0..131072, 720896..786432, 851968..852480"), "{fault}");
        assert!(fault.remedy.contains("vmkeep vault check main"), "{fault}");
        assert_eq!(view.summary.status, JobStatus::RolledBack);
        assert_eq!(host.everything(), before);
        assert!(host.nobody_reads().await);
    }
}
