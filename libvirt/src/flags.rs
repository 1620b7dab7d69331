//! Typed flag sets of libvirt's functions.
//!
//! Invariant: a flag can only be passed to a function that knows it; the bits are libvirt's own, taken
//! from the binding's constants.

use virt_sys as sys;

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $flag:ident = $raw:ident,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
            pub struct $name(u32);

            impl $name {
                /// No flag at all.
                pub const NONE: Self = Self(0);
                $($(#[$fdoc])* pub const $flag: Self = Self(sys::$raw);)*

                /// libvirt's bits.
                pub fn bits(self) -> u32 {
                    self.0
                }

                /// Whether every flag of `other` is set.
                pub fn contains(self, other: Self) -> bool {
                    self.0 & other.0 == other.0
                }

                /// `self` with `other` if `on`, else `self`.
                #[must_use]
                pub fn with(self, other: Self, on: bool) -> Self {
                    if on { Self(self.0 | other.0) } else { self }
                }
            }

            impl std::ops::BitOr for $name {
                type Output = Self;
                fn bitor(self, other: Self) -> Self {
                    Self(self.0 | other.0)
                }
            }
        )*
    };
}

flags! {
    /// Which description of a domain to give.
    XmlFlags {
        /// With passwords.
        SECURE = VIR_DOMAIN_XML_SECURE,
        /// The persistent definition, also while the domain runs.
        INACTIVE = VIR_DOMAIN_XML_INACTIVE,
        /// With the CPU the guest really has.
        UPDATE_CPU = VIR_DOMAIN_XML_UPDATE_CPU,
        /// As another host can use it.
        MIGRATABLE = VIR_DOMAIN_XML_MIGRATABLE,
    }

    /// How to define a domain.
    DefineFlags {
        /// Check against the schema.
        VALIDATE = VIR_DOMAIN_DEFINE_VALIDATE,
    }

    /// What to remove together with a definition.
    UndefineFlags {
        /// Its managed save image.
        MANAGED_SAVE = VIR_DOMAIN_UNDEFINE_MANAGED_SAVE,
        /// Its snapshots' metadata.
        SNAPSHOTS_METADATA = VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA,
        /// Its checkpoints' metadata.
        CHECKPOINTS_METADATA = VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA,
        /// Its NVRAM file.
        NVRAM = VIR_DOMAIN_UNDEFINE_NVRAM,
        /// Keep the NVRAM file.
        KEEP_NVRAM = VIR_DOMAIN_UNDEFINE_KEEP_NVRAM,
        /// Its TPM state.
        TPM = VIR_DOMAIN_UNDEFINE_TPM,
        /// Keep the TPM state.
        KEEP_TPM = VIR_DOMAIN_UNDEFINE_KEEP_TPM,
    }

    /// How to start a domain.
    CreateFlags {
        /// With the guest paused.
        PAUSED = VIR_DOMAIN_START_PAUSED,
        /// Destroyed when this connection closes.
        AUTODESTROY = VIR_DOMAIN_START_AUTODESTROY,
        /// Read a managed save image past the page cache.
        BYPASS_CACHE = VIR_DOMAIN_START_BYPASS_CACHE,
        /// Drop a managed save image and boot.
        FORCE_BOOT = VIR_DOMAIN_START_FORCE_BOOT,
        /// Check the XML against the schema.
        VALIDATE = VIR_DOMAIN_START_VALIDATE,
        /// Make the NVRAM anew from its template.
        RESET_NVRAM = VIR_DOMAIN_START_RESET_NVRAM,
    }

    /// How to end a domain by force.
    DestroyFlags {
        /// Only if the process ends on SIGTERM; otherwise fail.
        GRACEFUL = VIR_DOMAIN_DESTROY_GRACEFUL,
        /// Drop what the monitor still has to say.
        REMOVE_LOGS = VIR_DOMAIN_DESTROY_REMOVE_LOGS,
    }

    /// How to ask a guest to shut down.
    ShutdownFlags {
        /// By the power button.
        ACPI = VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN,
        /// Through the guest agent.
        AGENT = VIR_DOMAIN_SHUTDOWN_GUEST_AGENT,
    }

    /// How to save a domain to a file or restore one from it.
    SaveFlags {
        /// Past the page cache.
        BYPASS_CACHE = VIR_DOMAIN_SAVE_BYPASS_CACHE,
        /// The restored guest runs, whatever it did when it was saved.
        RUNNING = VIR_DOMAIN_SAVE_RUNNING,
        /// The restored guest is paused, whatever it did when it was saved.
        PAUSED = VIR_DOMAIN_SAVE_PAUSED,
        /// Make the NVRAM anew from its template (restore only).
        RESET_NVRAM = VIR_DOMAIN_SAVE_RESET_NVRAM,
    }

    /// Which description a save image is to give.
    SaveImageXmlFlags {
        /// With passwords.
        SECURE = VIR_DOMAIN_SAVE_IMAGE_XML_SECURE,
    }

    /// How to make a snapshot.
    SnapshotCreateFlags {
        /// Restore metadata of one that exists.
        REDEFINE = VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE,
        /// With REDEFINE: make it the current one.
        CURRENT = VIR_DOMAIN_SNAPSHOT_CREATE_CURRENT,
        /// libvirt keeps no record of it.
        NO_METADATA = VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
        /// Stop the guest afterwards.
        HALT = VIR_DOMAIN_SNAPSHOT_CREATE_HALT,
        /// Disks only, no memory.
        DISK_ONLY = VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY,
        /// The overlays exist already.
        REUSE_EXTERNAL = VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT,
        /// Freeze the guest's file systems meanwhile.
        QUIESCE = VIR_DOMAIN_SNAPSHOT_CREATE_QUIESCE,
        /// All disks or none.
        ATOMIC = VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC,
        /// The guest runs on while its memory is written.
        LIVE = VIR_DOMAIN_SNAPSHOT_CREATE_LIVE,
        /// Check the XML against the schema.
        VALIDATE = VIR_DOMAIN_SNAPSHOT_CREATE_VALIDATE,
    }

    /// How to delete a snapshot.
    SnapshotDeleteFlags {
        /// Its descendants too.
        CHILDREN = VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN,
        /// Only libvirt's record of it.
        METADATA_ONLY = VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY,
        /// Only its descendants.
        CHILDREN_ONLY = VIR_DOMAIN_SNAPSHOT_DELETE_CHILDREN_ONLY,
    }

    /// Which snapshots to list.
    SnapshotListFlags {
        /// Without parents.
        ROOTS = VIR_DOMAIN_SNAPSHOT_LIST_ROOTS,
        /// Without children.
        LEAVES = VIR_DOMAIN_SNAPSHOT_LIST_LEAVES,
        /// With metadata.
        METADATA = VIR_DOMAIN_SNAPSHOT_LIST_METADATA,
        /// Internal ones.
        INTERNAL = VIR_DOMAIN_SNAPSHOT_LIST_INTERNAL,
        /// External ones.
        EXTERNAL = VIR_DOMAIN_SNAPSHOT_LIST_EXTERNAL,
        /// Parents before children.
        TOPOLOGICAL = VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL,
    }

    /// How to make a checkpoint.
    CheckpointCreateFlags {
        /// Restore metadata of one that exists.
        REDEFINE = VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE,
        /// Freeze the guest's file systems meanwhile.
        QUIESCE = VIR_DOMAIN_CHECKPOINT_CREATE_QUIESCE,
        /// With REDEFINE: check that the bitmaps are there.
        REDEFINE_VALIDATE = VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE,
    }

    /// How to delete a checkpoint.
    CheckpointDeleteFlags {
        /// Its descendants too.
        CHILDREN = VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN,
        /// Only libvirt's record of it; the bitmaps stay.
        METADATA_ONLY = VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY,
        /// Only its descendants.
        CHILDREN_ONLY = VIR_DOMAIN_CHECKPOINT_DELETE_CHILDREN_ONLY,
    }

    /// Which checkpoints to list.
    CheckpointListFlags {
        /// Without parents; when listing children: all descendants.
        ROOTS = VIR_DOMAIN_CHECKPOINT_LIST_ROOTS,
        /// When listing children: all descendants.
        DESCENDANTS = VIR_DOMAIN_CHECKPOINT_LIST_DESCENDANTS,
        /// Parents before children.
        TOPOLOGICAL = VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL,
        /// Without children.
        LEAVES = VIR_DOMAIN_CHECKPOINT_LIST_LEAVES,
    }

    /// Which description of a checkpoint to give.
    CheckpointXmlFlags {
        /// With passwords.
        SECURE = VIR_DOMAIN_CHECKPOINT_XML_SECURE,
        /// Without the domain inside.
        NO_DOMAIN = VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN,
        /// With the bytes that became dirty since.
        SIZE = VIR_DOMAIN_CHECKPOINT_XML_SIZE,
    }

    /// How to begin a backup job.
    BackupBeginFlags {
        /// The target or scratch files exist already.
        REUSE_EXTERNAL = VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL,
    }

    /// How to commit an overlay.
    CommitFlags {
        /// Only one level down when no base is given.
        SHALLOW = VIR_DOMAIN_BLOCK_COMMIT_SHALLOW,
        /// Delete what was committed.
        DELETE = VIR_DOMAIN_BLOCK_COMMIT_DELETE,
        /// The top is the active layer: becomes ready and waits for a pivot.
        ACTIVE = VIR_DOMAIN_BLOCK_COMMIT_ACTIVE,
        /// Keep backing file names relative.
        RELATIVE = VIR_DOMAIN_BLOCK_COMMIT_RELATIVE,
        /// The bandwidth is in bytes/s, not MiB/s.
        BANDWIDTH_BYTES = VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES,
    }

    /// How to pull a chain into its top.
    PullFlags {
        /// The bandwidth is in bytes/s, not MiB/s.
        BANDWIDTH_BYTES = VIR_DOMAIN_BLOCK_PULL_BANDWIDTH_BYTES,
    }

    /// How to end a block job.
    BlockJobAbortFlags {
        /// Only ask; an event tells the end.
        ASYNC = VIR_DOMAIN_BLOCK_JOB_ABORT_ASYNC,
        /// Move the domain to the commit's base (or the copy).
        PIVOT = VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT,
    }

    /// In which unit a block job's rate is given.
    BlockJobRateFlags {
        /// Bytes/s instead of MiB/s.
        BANDWIDTH_BYTES = VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES,
    }

    /// How to resize a disk.
    ResizeFlags {
        /// The size is in bytes, not KiB.
        BYTES = VIR_DOMAIN_BLOCK_RESIZE_BYTES,
    }

    /// Which job statistics to give.
    JobStatsFlags {
        /// Those of the job that ended last.
        COMPLETED = VIR_DOMAIN_JOB_STATS_COMPLETED,
        /// With COMPLETED: leave them for the next reader.
        KEEP_COMPLETED = VIR_DOMAIN_JOB_STATS_KEEP_COMPLETED,
    }

    /// Which copy of the definition an edit concerns.
    ImpactFlags {
        /// The running domain's.
        LIVE = VIR_DOMAIN_AFFECT_LIVE,
        /// The persistent one.
        CONFIG = VIR_DOMAIN_AFFECT_CONFIG,
    }

    /// Which domains to list; flags of different groups narrow, of one group widen.
    ListFlags {
        /// Running or paused.
        ACTIVE = VIR_CONNECT_LIST_DOMAINS_ACTIVE,
        /// Shut off.
        INACTIVE = VIR_CONNECT_LIST_DOMAINS_INACTIVE,
        /// With a definition that stays.
        PERSISTENT = VIR_CONNECT_LIST_DOMAINS_PERSISTENT,
        /// Without one.
        TRANSIENT = VIR_CONNECT_LIST_DOMAINS_TRANSIENT,
        /// Running.
        RUNNING = VIR_CONNECT_LIST_DOMAINS_RUNNING,
        /// Paused.
        PAUSED = VIR_CONNECT_LIST_DOMAINS_PAUSED,
        /// Shut off.
        SHUTOFF = VIR_CONNECT_LIST_DOMAINS_SHUTOFF,
        /// In another state.
        OTHER = VIR_CONNECT_LIST_DOMAINS_OTHER,
        /// With a managed save image.
        MANAGED_SAVE = VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE,
        /// Without one.
        NO_MANAGED_SAVE = VIR_CONNECT_LIST_DOMAINS_NO_MANAGEDSAVE,
        /// Started with the host.
        AUTOSTART = VIR_CONNECT_LIST_DOMAINS_AUTOSTART,
        /// Not started with the host.
        NO_AUTOSTART = VIR_CONNECT_LIST_DOMAINS_NO_AUTOSTART,
        /// With a snapshot.
        HAS_SNAPSHOT = VIR_CONNECT_LIST_DOMAINS_HAS_SNAPSHOT,
        /// Without one.
        NO_SNAPSHOT = VIR_CONNECT_LIST_DOMAINS_NO_SNAPSHOT,
        /// With a checkpoint.
        HAS_CHECKPOINT = VIR_CONNECT_LIST_DOMAINS_HAS_CHECKPOINT,
        /// Without one.
        NO_CHECKPOINT = VIR_CONNECT_LIST_DOMAINS_NO_CHECKPOINT,
    }
}
