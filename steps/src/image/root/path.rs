//! Names that cannot lead elsewhere, whoever chose them.

use super::RootError;
use serde::{Deserialize, Serialize};
use std::fmt;

/// One plain path component: not empty, not `.` or `..`, without `/` and NUL, at most 255 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Component(String);

impl Component {
    /// Checks a name.
    pub fn new(name: impl Into<String>) -> Result<Self, RootError> {
        let name = name.into();
        let bad = name.is_empty() || name == "." || name == ".." || name.len() > 255;
        if bad || name.bytes().any(|b| b == b'/' || b == 0) {
            return Err(RootError::BadName { name });
        }
        Ok(Self(name))
    }

    /// A component from any string, by [`crate::image::name::encode`].
    pub fn encoded(name: &str) -> Self {
        Self(crate::image::name::encode(name))
    }

    /// A name that is made of encoded parts and a suffix, and so needs no check.
    pub(crate) fn literal(name: String) -> Self {
        debug_assert!(Self::new(name.clone()).is_ok(), "{name:?}");
        Self(name)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for Component {
    type Error = RootError;
    fn try_from(name: String) -> Result<Self, RootError> {
        Self::new(name)
    }
}

impl From<Component> for String {
    fn from(c: Component) -> Self {
        c.0
    }
}

/// A relative path of plain components, `/` between them. Never empty, absolute, or climbing.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RelPath(String);

impl RelPath {
    /// Checks a path.
    pub fn new(path: impl Into<String>) -> Result<Self, RootError> {
        let path = path.into();
        if path.len() > 4000 || path.split('/').any(|c| Component::new(c).is_err()) {
            return Err(RootError::BadName { name: path });
        }
        Ok(Self(path))
    }

    /// The path.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its components, first to last.
    pub fn components(&self) -> impl Iterator<Item = Component> + '_ {
        self.0.split('/').map(|c| Component(c.to_owned()))
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for RelPath {
    type Error = RootError;
    fn try_from(path: String) -> Result<Self, RootError> {
        Self::new(path)
    }
}

impl From<RelPath> for String {
    fn from(p: RelPath) -> Self {
        p.0
    }
}

impl From<Component> for RelPath {
    fn from(c: Component) -> Self {
        Self(c.0)
    }
}
