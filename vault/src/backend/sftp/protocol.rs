//! SFTP, version 3: the packets that a vault needs, as bytes.
//!
//! A packet is its length (u32), its kind (u8), the number of the request (u32) and fields; all numbers are big-endian, a
//! string is its length (u32) and bytes. **Handles and names are bytes, not text**: OpenSSH's handles are numbers, and what
//! else lies in a folder may have any name. Status codes beyond version 3 are kept as they are: some servers send them, and
//! among them are those that say why.

use bytes::{Buf, Bytes};

/// The longest packet that is taken from a server. OpenSSH's have 256 KiB at most.
pub(super) const LONGEST: usize = 1 << 20;

const INIT: u8 = 1;
const VERSION: u8 = 2;

/// What a server is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Verb {
    Open = 3,
    Close = 4,
    Read = 5,
    Write = 6,
    Lstat = 7,
    Fstat = 8,
    Fsetstat = 10,
    Opendir = 11,
    Readdir = 12,
    Remove = 13,
    Mkdir = 14,
    Rmdir = 15,
    Stat = 17,
    Rename = 18,
    Extended = 200,
}

/// How a file is opened.
pub(super) const READ: u32 = 1;
pub(super) const CREATE_NEW: u32 = 2 | 8 | 32;

/// Status codes; those from 11 on are of later versions.
pub(super) const OK: u32 = 0;
pub(super) const EOF: u32 = 1;
pub(super) const NO_SUCH_FILE: u32 = 2;
pub(super) const PERMISSION_DENIED: u32 = 3;
pub(super) const FAILURE: u32 = 4;
pub(super) const EXISTS: u32 = 11;
pub(super) const READ_ONLY: u32 = 12;
pub(super) const NO_SPACE: u32 = 14;
pub(super) const QUOTA: u32 = 15;

const HAS_SIZE: u32 = 1;
const HAS_OWNER: u32 = 2;
const HAS_MODE: u32 = 4;
const HAS_TIMES: u32 = 8;
const HAS_MORE: u32 = 0x8000_0000;

/// The bytes are not of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server does not speak SFTP 3")]
pub(super) struct Malformed;

/// A request that is being written.
pub(super) struct Request(Vec<u8>);

impl Request {
    pub(super) fn new(verb: Verb, id: u32) -> Self {
        let mut bytes = vec![0; 4];
        bytes.push(verb as u8);
        bytes.extend(id.to_be_bytes());
        Self(bytes)
    }

    /// The first packet of all.
    pub(super) fn init() -> Bytes {
        let mut request = Self(vec![0; 4]);
        request.0.push(INIT);
        request.u32(3).finish()
    }

    pub(super) fn u32(mut self, number: u32) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    pub(super) fn u64(mut self, number: u64) -> Self {
        self.0.extend(number.to_be_bytes());
        self
    }

    /// A string. Longer ones than a packet holds are cut by nobody: callers send parts of 256 KiB and names of a line.
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(length(bytes.len()));
        self.0.extend(bytes);
        self
    }

    /// The attributes of what is made: its mode.
    pub(super) fn mode(self, mode: u32) -> Self {
        self.u32(HAS_MODE).u32(mode)
    }

    pub(super) fn finish(mut self) -> Bytes {
        let length = length(self.0.len() - 4);
        self.0[..4].copy_from_slice(&length);
        self.0.into()
    }
}

fn length(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes()
}

/// What a server knows of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    pub(super) mode: Option<u32>,
}

/// What lies under a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    File,
    Folder,
    Other,
    /// The server did not say.
    Unknown,
}

impl Attributes {
    pub(super) fn what(self) -> What {
        match self.mode.map(|mode| mode & 0o170_000) {
            Some(0o100_000) => What::File,
            Some(0o040_000) => What::Folder,
            Some(0) | None => What::Unknown,
            Some(_) => What::Other,
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Status { code: u32, message: String },
    Handle(Bytes),
    Data(Bytes),
    Names(Vec<(Bytes, Attributes)>),
    Attributes(Attributes),
    Extended(Bytes),
}

/// The extensions of a server, from its first packet (without the length).
pub(super) fn version(mut packet: Bytes) -> Result<Vec<(Bytes, Bytes)>, Malformed> {
    let kind = u8(&mut packet)?;
    let version = u32(&mut packet)?;
    if kind != VERSION || version < 3 {
        return Err(Malformed);
    }
    let mut extensions = Vec::new();
    while packet.has_remaining() {
        extensions.push((string(&mut packet)?, string(&mut packet)?));
    }
    Ok(extensions)
}

/// The number of the request and the answer, from a packet (without the length).
pub(super) fn reply(mut packet: Bytes) -> Result<(u32, Reply), Malformed> {
    let kind = u8(&mut packet)?;
    let id = u32(&mut packet)?;
    let reply = match kind {
        101 => {
            let code = u32(&mut packet)?;
            // Old servers leave the message out.
            let message = string(&mut packet).unwrap_or_default();
            Reply::Status { code, message: String::from_utf8_lossy(&message).into_owned() }
        }
        102 => Reply::Handle(string(&mut packet)?),
        103 => Reply::Data(string(&mut packet)?),
        104 => {
            let count = u32(&mut packet)?;
            let mut names = Vec::new();
            for _ in 0..count {
                let name = string(&mut packet)?;
                let _for_people = string(&mut packet)?;
                names.push((name, attributes(&mut packet)?));
            }
            Reply::Names(names)
        }
        105 => Reply::Attributes(attributes(&mut packet)?),
        201 => Reply::Extended(packet),
        _ => return Err(Malformed),
    };
    Ok((id, reply))
}

/// Numbers of 64 bits, as extensions answer.
pub(super) fn numbers<const N: usize>(mut bytes: Bytes) -> Result<[u64; N], Malformed> {
    let mut numbers = [0; N];
    for number in &mut numbers {
        *number = u64(&mut bytes)?;
    }
    Ok(numbers)
}

fn attributes(packet: &mut Bytes) -> Result<Attributes, Malformed> {
    let flags = u32(packet)?;
    let has = |flag| flags & flag != 0;
    let mut attributes = Attributes::default();
    if has(HAS_SIZE) {
        attributes.size = Some(u64(packet)?);
    }
    if has(HAS_OWNER) {
        u64(packet)?;
    }
    if has(HAS_MODE) {
        attributes.mode = Some(u32(packet)?);
    }
    if has(HAS_TIMES) {
        u64(packet)?;
    }
    if has(HAS_MORE) {
        for _ in 0..u32(packet)? {
            string(packet)?;
            string(packet)?;
        }
    }
    Ok(attributes)
}

fn u8(packet: &mut Bytes) -> Result<u8, Malformed> {
    packet.try_get_u8().map_err(|_| Malformed)
}

fn u32(packet: &mut Bytes) -> Result<u32, Malformed> {
    packet.try_get_u32().map_err(|_| Malformed)
}

fn u64(packet: &mut Bytes) -> Result<u64, Malformed> {
    packet.try_get_u64().map_err(|_| Malformed)
}

fn string(packet: &mut Bytes) -> Result<Bytes, Malformed> {
    let length = u32(packet)? as usize;
    if packet.remaining() < length {
        return Err(Malformed);
    }
    Ok(packet.split_to(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_has_the_bytes_of_the_draft() {
        let bytes = Request::new(Verb::Open, 7).bytes(b"a").u32(CREATE_NEW).mode(0o600).finish();
        let expected: &[u8] = b"\0\0\0\x1a\x03\0\0\0\x07\0\0\0\x01a\0\0\0\x2a\0\0\0\x04\0\0\x01\x80";
        assert_eq!(bytes[4..], expected[4..]);
        assert_eq!(bytes[..4], (u32::try_from(bytes.len()).unwrap() - 4).to_be_bytes());
        assert_eq!(&Request::init()[..], b"\0\0\0\x05\x01\0\0\0\x03");
    }

    #[test]
    fn a_handle_that_is_no_text_is_kept() {
        let packet = Bytes::from_static(b"\x66\0\0\0\x09\0\0\0\x04\0\0\0\x80");
        assert_eq!(reply(packet), Ok((9, Reply::Handle(Bytes::from_static(b"\0\0\0\x80")))));
    }

    #[test]
    fn names_come_with_what_they_are() {
        let mut packet = vec![104];
        packet.extend([0, 0, 0, 1, 0, 0, 0, 1]);
        packet.extend(b"\0\0\0\x02ab\0\0\0\x01-");
        packet.extend((HAS_SIZE | HAS_OWNER | HAS_MODE | HAS_TIMES).to_be_bytes());
        packet.extend(5u64.to_be_bytes());
        packet.extend([0; 8]);
        packet.extend(0o100_600u32.to_be_bytes());
        packet.extend([0; 8]);
        let (_, reply) = reply(packet.into()).unwrap();
        let Reply::Names(names) = reply else { panic!("{reply:?}") };
        assert_eq!((&names[0].0[..], names[0].1.size, names[0].1.what()), (&b"ab"[..], Some(5), What::File));
    }

    proptest! {
        #[test]
        fn whatever_a_server_sends_is_read_or_refused(packet: Vec<u8>, kind in 100u8..=202) {
            let mut framed = vec![kind];
            framed.extend(&packet);
            let _ = reply(framed.into());
            let _ = version(packet.clone().into());
            let _ = numbers::<4>(packet.into());
        }

        #[test]
        fn a_packet_that_was_cut_is_refused(cut in 0usize..30) {
            let whole = b"\x68\0\0\0\x01\0\0\0\x01\0\0\0\x02ab\0\0\0\x01-\0\0\0\x01\0\0\0\0\0\0\0\x05";
            prop_assert_eq!(reply(Bytes::copy_from_slice(&whole[..cut.min(whole.len() - 1)])), Err(Malformed));
        }
    }
}
