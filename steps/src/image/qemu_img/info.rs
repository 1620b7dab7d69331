//! What `qemu-img` says, as far as vmkeep wants to know. Fields that newer versions add are ignored.

use serde::Deserialize;

/// `qemu-img info`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The name as QEMU opened it.
    pub filename: String,
    /// `qcow2`, `raw`.
    pub format: String,
    /// Size of the disk that a guest sees, in bytes.
    pub virtual_size: u64,
    /// Bytes allocated on the file system.
    #[serde(default)]
    pub actual_size: u64,
    /// The backing name as written in the header.
    #[serde(default)]
    pub backing_filename: Option<String>,
    /// The same as a path that can be opened.
    #[serde(default)]
    pub full_backing_filename: Option<String>,
    /// The format of the backing file as written in the header.
    #[serde(default)]
    pub backing_filename_format: Option<String>,
    /// Not closed properly.
    #[serde(default)]
    pub dirty_flag: bool,
    /// Whether the content is encrypted.
    #[serde(default)]
    pub encrypted: bool,
    /// Snapshots inside the image.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
    #[serde(default)]
    format_specific: Option<Specific>,
}

/// A snapshot inside an image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Snapshot {
    /// QEMU's number for it.
    pub id: String,
    /// Its name.
    pub name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Specific {
    data: SpecificData,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SpecificData {
    #[serde(default)]
    bitmaps: Vec<Bitmap>,
    #[serde(default)]
    corrupt: bool,
    #[serde(default)]
    data_file: Option<String>,
}

/// A persistent bitmap of an image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes per bit.
    pub granularity: u64,
    /// `auto`: records writes; `in-use`: was not stored properly and is worthless.
    pub flags: Vec<String>,
}

impl ImageInfo {
    /// Persistent bitmaps.
    pub fn bitmaps(&self) -> &[Bitmap] {
        self.format_specific.as_ref().map_or(&[], |s| &s.data.bitmaps)
    }

    /// Whether QEMU marked the image as damaged.
    pub fn corrupt(&self) -> bool {
        self.format_specific.as_ref().is_some_and(|s| s.data.corrupt)
    }

    /// The external data file, if the image has one.
    pub fn data_file(&self) -> Option<&str> {
        self.format_specific.as_ref().and_then(|s| s.data.data_file.as_deref())
    }
}

/// `qemu-img check`. All zero: nothing wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Clusters whose content is wrong or lost.
    #[serde(default)]
    pub corruptions: u64,
    /// Clusters that take space and belong to nothing: harmless.
    #[serde(default)]
    pub leaks: u64,
    /// Things that could not be checked.
    #[serde(default)]
    pub check_errors: u64,
}

impl CheckReport {
    /// Whether the content can be trusted. Leaks take space and nothing else.
    pub fn sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }
}
