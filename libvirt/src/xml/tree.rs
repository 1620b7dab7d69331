//! An XML tree that gives back what it does not touch exactly as it was.
//!
//! Invariants:
//! - what was not edited serialises to the very text it was parsed from: attribute order and quoting,
//!   entities, CDATA, comments, processing instructions, white space, unknown names and prefixes;
//! - what was edited is escaped by the library, so no value can change the structure, and values
//!   survive: newlines and tabs in attributes become character references;
//! - a document that serialises is well formed: names, characters and references are checked when they
//!   come in; there is no DOCTYPE, hence no entity to expand.
//!
//! # Why this and not a ready-made tree
//! `quick-xml` is the actively kept XML library of this language; it gives events with their *raw* text
//! and writes such events back unchanged, so a thin tree over it is lossless by construction. The
//! ready-made trees are not: `xmltree` keeps attributes in a hash map (or sorted) and drops the
//! difference between text and CDATA; `xot` is richer, but keeps decoded values only, writes newlines
//! in attributes literally, so that they come back as spaces, and stands on a tokenizer and a generator
//! crate that are no longer developed.
//!
//! # One deliberate departure from the specification
//! XML says that a literal newline or tab inside an attribute value reads as a space. libvirt *writes*
//! such characters literally (seen: a disk path with a newline), and what it means is the character
//! itself. This parser therefore reads them as themselves, and writes them as references, which every
//! parser, libvirt's included, reads right. The same goes for a carriage return in text.

use std::fmt;

use quick_xml::Writer;
use quick_xml::escape::{partial_escape, unescape};
use quick_xml::events::attributes::Attribute;
use quick_xml::events::{BytesCData, BytesEnd, BytesPI, BytesStart, BytesText, Event};

/// Why a document could not be read, or an edit not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    /// Not well formed.
    #[error("not well-formed XML at byte {offset}: {reason}")]
    Malformed {
        /// Where.
        offset: u64,
        /// What the library says.
        reason: String,
    },
    /// It has a DOCTYPE, which could define entities. libvirt never writes one.
    #[error("a DOCTYPE is not accepted")]
    Doctype,
    /// A character that XML cannot hold, not even as a reference.
    #[error("the character {0:?} cannot stand in XML")]
    Character(char),
    /// A name that is no XML name.
    #[error("'{0}' is not an XML name")]
    Name(String),
    /// Nested more deeply than anything libvirt writes.
    #[error("nested more than {MAX_DEPTH} levels deep")]
    TooDeep,
    /// The root element is not the expected one.
    #[error("expected <{expected}>, found <{found}>")]
    Root {
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A part that the operation needs is not there.
    #[error("the document has no {0}")]
    Missing(String),
    /// A part that the operation is about is there more than once.
    #[error("the document has more than one {0}")]
    Twice(String),
    /// A value that cannot be understood.
    #[error("{what} is '{value}', which cannot be understood")]
    Value {
        /// Of what.
        what: &'static str,
        /// The value.
        value: String,
    },
}

pub(super) const MAX_DEPTH: usize = 256;

/// A node. Texts are raw: escaped, as they stand in the document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// An element.
    Element(Element),
    /// Character data, still escaped.
    Text(String),
    /// The content of a CDATA section.
    CData(String),
    /// The content of a comment.
    Comment(String),
    /// The content of a processing instruction, or of the XML declaration.
    Instruction(String),
}

/// An element with its attributes and children.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    pub(super) name: String,
    pub(super) attributes: Vec<(String, String)>,
    /// The attributes as they stood, as long as nobody changed them.
    pub(super) raw_attributes: Option<String>,
    /// Its children, in order.
    pub children: Vec<Node>,
    pub(super) self_closing: bool,
}

/// A whole document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    pub(super) before: Vec<Node>,
    pub(super) root: Element,
    pub(super) after: Vec<Node>,
}

pub(super) fn check_chars(text: &str) -> Result<(), XmlError> {
    match text.chars().find(|c| !is_xml_char(*c)) {
        Some(c) => Err(XmlError::Character(c)),
        None => Ok(()),
    }
}

fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{FFFD}' | '\u{10000}'..)
}

pub(super) fn check_name(name: &str) -> Result<(), XmlError> {
    let start = |c: char| c.is_alphabetic() || c == '_' || c == ':';
    let rest = |c: char| start(c) || c.is_numeric() || matches!(c, '-' | '.' | '\u{B7}');
    let mut chars = name.chars();
    if chars.next().is_some_and(start) && chars.all(rest) {
        Ok(())
    } else {
        Err(XmlError::Name(name.to_owned()))
    }
}

impl Element {
    /// An element without attributes and children.
    ///
    /// # Errors
    /// [`XmlError::Name`].
    pub fn new(name: &str) -> Result<Self, XmlError> {
        check_name(name)?;
        Ok(Self {
            name: name.to_owned(),
            attributes: Vec::new(),
            raw_attributes: None,
            children: Vec::new(),
            self_closing: true,
        })
    }

    /// Its name, with prefix.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its name without prefix.
    pub fn local_name(&self) -> &str {
        self.name.rsplit_once(':').map_or(&self.name, |(_, local)| local)
    }

    /// The prefix of its name.
    pub fn prefix(&self) -> Option<&str> {
        self.name.split_once(':').map(|(prefix, _)| prefix)
    }

    /// The value of an attribute.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// All attributes in order.
    pub fn attrs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.attributes.iter().map(|(n, v)| (n.as_str(), v.as_str()))
    }

    /// Sets an attribute; an existing one keeps its place.
    ///
    /// # Errors
    /// [`XmlError::Name`], [`XmlError::Character`].
    pub fn set_attr(&mut self, name: &str, value: &str) -> Result<(), XmlError> {
        check_name(name)?;
        check_chars(value)?;
        match self.attributes.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) if old == value => return Ok(()),
            Some((_, old)) => value.clone_into(old),
            None => self.attributes.push((name.to_owned(), value.to_owned())),
        }
        self.raw_attributes = None;
        Ok(())
    }

    /// Removes an attribute; tells whether it was there.
    pub fn remove_attr(&mut self, name: &str) -> bool {
        let before = self.attributes.len();
        self.attributes.retain(|(n, _)| n != name);
        let removed = self.attributes.len() != before;
        if removed {
            self.raw_attributes = None;
        }
        removed
    }

    /// Its own text (of all its text and CDATA children), decoded.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for node in &self.children {
            match node {
                // Checked when it came in, so it can be decoded.
                Node::Text(raw) => out.push_str(&unescape(raw).unwrap_or_default()),
                Node::CData(text) => out.push_str(text),
                _ => {}
            }
        }
        out
    }

    /// Replaces all children by a text.
    ///
    /// # Errors
    /// [`XmlError::Character`].
    pub fn set_text(&mut self, text: &str) -> Result<(), XmlError> {
        check_chars(text)?;
        self.children =
            if text.is_empty() { Vec::new() } else { vec![Node::Text(partial_escape(text).into_owned())] };
        Ok(())
    }

    /// Its child elements.
    pub fn elements(&self) -> impl Iterator<Item = &Self> {
        self.children.iter().filter_map(|n| match n {
            Node::Element(e) => Some(e),
            _ => None,
        })
    }

    /// Its child elements, to be changed.
    pub fn elements_mut(&mut self) -> impl Iterator<Item = &mut Self> {
        self.children.iter_mut().filter_map(|n| match n {
            Node::Element(e) => Some(e),
            _ => None,
        })
    }

    /// Its first child of that name.
    pub fn child(&self, name: &str) -> Option<&Self> {
        self.elements().find(|e| e.name == name)
    }

    /// Its first child of that name, to be changed.
    pub fn child_mut(&mut self, name: &str) -> Option<&mut Self> {
        self.elements_mut().find(|e| e.name == name)
    }

    /// Its children of that name.
    pub fn children_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.elements().filter(move |e| e.name == name)
    }

    /// The element at the end of a path of names, first match at each level.
    pub fn at(&self, path: &[&str]) -> Option<&Self> {
        path.iter().try_fold(self, |e, name| e.child(name))
    }

    /// As [`Self::at`], to be changed.
    pub fn at_mut(&mut self, path: &[&str]) -> Option<&mut Self> {
        path.iter().try_fold(self, |e, name| e.child_mut(name))
    }

    /// The decoded text of a child, if there is such a child.
    pub fn child_text(&self, name: &str) -> Option<String> {
        self.child(name).map(Self::text)
    }

    /// Adds a child element after the others, indented as they are.
    pub fn push(&mut self, child: Self) {
        let after = self.children.iter().rposition(|n| matches!(n, Node::Element(_)));
        self.insert_at(after.map_or(0, |i| i + 1), child);
    }

    /// Adds a child element right after the first of that name, or after all others.
    pub fn insert_after(&mut self, name: &str, child: Self) {
        let at = self.children.iter().position(|n| matches!(n, Node::Element(e) if e.name == name));
        match at {
            Some(i) => self.insert_at(i + 1, child),
            None => self.push(child),
        }
    }

    /// `at` is right behind a child element, or 0 where there is none.
    fn insert_at(&mut self, at: usize, child: Self) {
        // The white space in front of the first child element is how this level is indented.
        let first = self.children.iter().position(|n| matches!(n, Node::Element(_)));
        let indent = match first.and_then(|i| i.checked_sub(1)).and_then(|i| self.children.get(i)) {
            Some(Node::Text(t)) if is_blank(t) => Some(t.clone()),
            _ => None,
        };
        self.children.insert(at, Node::Element(child));
        if let Some(indent) = indent {
            self.children.insert(at, Node::Text(indent));
        }
    }

    /// The first child of that name, made if there is none.
    ///
    /// # Errors
    /// [`XmlError::Name`].
    pub fn child_or_new(&mut self, name: &str) -> Result<&mut Self, XmlError> {
        if self.child(name).is_none() {
            self.push(Self::new(name)?);
        }
        self.child_mut(name).ok_or_else(|| XmlError::Missing(format!("<{name}>")))
    }

    /// Removes the child elements for which `which` says so, with the white space in front of them.
    /// Returns how many.
    pub fn remove_elements(&mut self, mut which: impl FnMut(&Self) -> bool) -> usize {
        let mut removed = 0;
        let mut kept: Vec<Node> = Vec::with_capacity(self.children.len());
        for node in std::mem::take(&mut self.children) {
            match node {
                Node::Element(e) if which(&e) => {
                    removed += 1;
                    if matches!(kept.last(), Some(Node::Text(t)) if is_blank(t)) {
                        kept.pop();
                    }
                }
                other => kept.push(other),
            }
        }
        // Nothing but the white space before the end tag is left: an empty element.
        if removed > 0 && kept.iter().all(|n| matches!(n, Node::Text(t) if is_blank(t))) {
            kept.clear();
        }
        self.children = kept;
        removed
    }

    /// Removes the children of that name. Returns how many.
    pub fn remove_named(&mut self, name: &str) -> usize {
        self.remove_elements(|e| e.name == name)
    }

    /// Calls `visit` for this element and all below it.
    pub fn walk_mut(&mut self, visit: &mut dyn FnMut(&mut Self)) {
        visit(self);
        for child in self.elements_mut() {
            child.walk_mut(visit);
        }
    }

    /// The element without its children.
    pub(super) fn clone_shallow(&self) -> Self {
        Self {
            name: self.name.clone(),
            attributes: self.attributes.clone(),
            raw_attributes: self.raw_attributes.clone(),
            children: Vec::new(),
            self_closing: self.self_closing,
        }
    }

    fn start(&self) -> BytesStart<'_> {
        match &self.raw_attributes {
            Some(raw) => BytesStart::from_content(format!("{}{raw}", self.name), self.name.len()),
            None => {
                // Rendered with single quotes, as libvirt writes; the library escapes both kinds.
                let mut content = self.name.clone();
                for (name, value) in &self.attributes {
                    let attribute = Attribute::from((name.as_str(), value.as_str()));
                    content.push_str(&format!(" {name}='{}'", attribute.value));
                }
                BytesStart::from_content(content, self.name.len())
            }
        }
    }

    fn write(&self, out: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        if self.children.is_empty() && self.self_closing {
            return out.write_event(Event::Empty(self.start()));
        }
        out.write_event(Event::Start(self.start()))?;
        for node in &self.children {
            node.write(out)?;
        }
        out.write_event(Event::End(BytesEnd::new(self.name.as_str())))
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Writer::new(Vec::new());
        self.write(&mut out).map_err(|_| fmt::Error)?;
        f.write_str(&String::from_utf8_lossy(&out.into_inner()))
    }
}

pub(super) fn is_blank(text: &str) -> bool {
    text.chars().all(|c| matches!(c, ' ' | '\t' | '\n' | '\r'))
}

impl Node {
    fn write(&self, out: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        match self {
            Self::Element(e) => e.write(out),
            Self::Text(raw) => out.write_event(Event::Text(BytesText::from_escaped(raw.as_str()))),
            Self::CData(text) => out.write_event(Event::CData(BytesCData::new(text.as_str()))),
            Self::Comment(text) => out.write_event(Event::Comment(BytesText::from_escaped(text.as_str()))),
            Self::Instruction(text) => out.write_event(Event::PI(BytesPI::new(text.as_str()))),
        }
    }
}

impl Document {
    /// A document with nothing but a root.
    pub fn new(root: Element) -> Self {
        Self { before: Vec::new(), root, after: Vec::new() }
    }

    /// Reads a document.
    ///
    /// # Errors
    /// [`XmlError::Malformed`], [`XmlError::Doctype`], [`XmlError::Character`], [`XmlError::TooDeep`].
    pub fn parse(text: &str) -> Result<Self, XmlError> {
        super::parse::parse(text)
    }

    /// Its root.
    pub fn root(&self) -> &Element {
        &self.root
    }

    /// Its root, to be changed.
    pub fn root_mut(&mut self) -> &mut Element {
        &mut self.root
    }

    /// The root alone, with what stood around it dropped.
    pub fn into_root(self) -> Element {
        self.root
    }
}

impl fmt::Display for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Writer::new(Vec::new());
        let mut all = || {
            self.before.iter().try_for_each(|n| n.write(&mut out))?;
            self.root.write(&mut out)?;
            self.after.iter().try_for_each(|n| n.write(&mut out))
        };
        all().map_err(|_: std::io::Error| fmt::Error)?;
        f.write_str(&String::from_utf8_lossy(&out.into_inner()))
    }
}
