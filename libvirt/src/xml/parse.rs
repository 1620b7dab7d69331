//! From text to tree.
//!
//! Invariant: what is accepted is well formed, has one root and no DOCTYPE, and every reference and
//! character in it is one that XML allows; so that the tree can decode and write it without failing.

use quick_xml::Reader;
use quick_xml::escape::unescape;
use quick_xml::events::{BytesStart, Event};

use super::tree::{Document, Element, MAX_DEPTH, Node, XmlError, check_chars, check_name, is_blank};

pub(super) fn parse(text: &str) -> Result<Document, XmlError> {
    Parser::default().run(text)
}

#[derive(Default)]
struct Parser {
    before: Vec<Node>,
    root: Option<Element>,
    after: Vec<Node>,
    open: Vec<Element>,
}

impl Parser {
    fn run(mut self, text: &str) -> Result<Document, XmlError> {
        check_chars(text)?;
        let mut reader = Reader::from_str(text);
        reader.config_mut().check_comments = true;
        loop {
            let event = reader.read_event().map_err(|e| XmlError::Malformed {
                offset: reader.error_position(),
                reason: e.to_string(),
            })?;
            let malformed = |reason: String| XmlError::Malformed { offset: reader.buffer_position(), reason };
            match event {
                Event::Start(s) => {
                    if self.open.len() >= MAX_DEPTH {
                        return Err(XmlError::TooDeep);
                    }
                    let element = element(&s, false).map_err(|e| e.or_else_malformed(&malformed))?;
                    self.open.push(element);
                }
                Event::Empty(s) => {
                    let element = element(&s, true).map_err(|e| e.or_else_malformed(&malformed))?;
                    self.close(element).map_err(malformed)?;
                }
                // The library checks that it matches.
                Event::End(_) => match self.open.pop() {
                    Some(element) => self.close(element).map_err(malformed)?,
                    None => return Err(malformed("an end tag without a start".to_owned())),
                },
                Event::Text(t) => self.text(&t.into_inner()).map_err(malformed)?,
                Event::GeneralRef(r) => {
                    let raw = format!("&{};", &*r);
                    match unescape(&raw) {
                        Ok(decoded) => check_chars(&decoded)?,
                        Err(e) => return Err(malformed(e.to_string())),
                    }
                    self.text(&raw).map_err(malformed)?;
                }
                Event::CData(c) => self.node(Node::CData(c.into_inner().into_owned())),
                Event::Comment(c) => self.node(Node::Comment(c.into_inner().into_owned())),
                Event::PI(p) => self.node(Node::Instruction(p.into_inner().into_owned())),
                Event::Decl(d) => self.node(Node::Instruction(d.as_ref().to_owned())),
                Event::DocType(_) => return Err(XmlError::Doctype),
                Event::Eof => break,
            }
        }
        let end = text.len() as u64;
        if let Some(open) = self.open.last() {
            return Err(XmlError::Malformed {
                offset: end,
                reason: format!("<{}> is not closed", open.name),
            });
        }
        let root = self
            .root
            .ok_or_else(|| XmlError::Malformed { offset: end, reason: "no root element".to_owned() })?;
        Ok(Document { before: self.before, root, after: self.after })
    }

    fn close(&mut self, element: Element) -> Result<(), String> {
        if let Some(parent) = self.open.last_mut() {
            parent.children.push(Node::Element(element));
        } else if self.root.is_none() {
            self.root = Some(element);
        } else {
            return Err("a second root element".to_owned());
        }
        Ok(())
    }

    fn text(&mut self, raw: &str) -> Result<(), String> {
        let raw = raw.replace('\r', "&#13;");
        if self.open.is_empty() && !is_blank(&raw) {
            return Err("text outside the root element".to_owned());
        }
        // Text and references arrive in pieces.
        match self.siblings().last_mut() {
            Some(Node::Text(before)) => before.push_str(&raw),
            _ => self.node(Node::Text(raw)),
        }
        Ok(())
    }

    fn node(&mut self, node: Node) {
        self.siblings().push(node);
    }

    fn siblings(&mut self) -> &mut Vec<Node> {
        match (self.open.last_mut(), &self.root) {
            (Some(parent), _) => &mut parent.children,
            (None, None) => &mut self.before,
            (None, Some(_)) => &mut self.after,
        }
    }
}

/// A fault inside a tag, before the position is known.
enum TagFault {
    Malformed(String),
    Other(XmlError),
}

impl TagFault {
    fn or_else_malformed(self, malformed: &dyn Fn(String) -> XmlError) -> XmlError {
        match self {
            Self::Malformed(reason) => malformed(reason),
            Self::Other(e) => e,
        }
    }
}

fn element(start: &BytesStart<'_>, self_closing: bool) -> Result<Element, TagFault> {
    let name = start.name().into_inner().to_owned();
    check_name(&name).map_err(TagFault::Other)?;
    let mut attributes = Vec::new();
    let mut literal_white_space = false;
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|e| TagFault::Malformed(e.to_string()))?;
        let key = attribute.key.into_inner();
        check_name(key).map_err(TagFault::Other)?;
        literal_white_space |= attribute.value.contains(['\n', '\t', '\r']);
        if attribute.value.contains('<') {
            return Err(TagFault::Malformed("'<' inside an attribute".to_owned()));
        }
        let value = unescape(&attribute.value).map_err(|e| TagFault::Malformed(e.to_string()))?;
        check_chars(&value).map_err(TagFault::Other)?;
        attributes.push((key.to_owned(), value.into_owned()));
    }
    let raw_attributes = (!literal_white_space).then(|| start.attributes_raw().to_owned());
    Ok(Element { name, attributes, raw_attributes, children: Vec::new(), self_closing })
}
