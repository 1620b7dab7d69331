//! The numbers of the protocol, and the bytes of what the client sends. All numbers are big-endian.

/// The first eight bytes of a server.
pub(super) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// The next eight, and the first of each option.
pub(super) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// What a reply to an option begins with.
pub(super) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) const OPT_STARTTLS: u32 = 5;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
/// Set in every reply that is an error.
pub(super) const REP_ERROR: u32 = 1 << 31;
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR + 1;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const FLAG_HAS_FLAGS: u16 = 1;
pub(super) const FLAG_READ_ONLY: u16 = 2;
pub(super) const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

const REQUEST: u32 = 0x2560_9513;
pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

pub(super) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// The flag of the last chunk of a structured reply.
pub(super) const REPLY_DONE: u16 = 1;
pub(super) const REPLY_NONE: u16 = 0;
pub(super) const REPLY_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_OFFSET_HOLE: u16 = 2;
pub(super) const REPLY_BLOCK_STATUS: u16 = 5;
/// Set in every chunk that is an error.
pub(super) const REPLY_ERROR_BIT: u16 = 1 << 15;
pub(super) const REPLY_ERROR_OFFSET: u16 = REPLY_ERROR_BIT + 2;

/// The longest string of the protocol.
pub(super) const MOST_STRING: usize = 4096;

/// A request: 28 bytes.
pub(super) fn request(command: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// An option with its data.
pub(super) fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

/// A string after its length.
pub(super) fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend_from_slice(&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
}

/// What an option is called in messages.
pub(super) fn option_name(option: u32) -> &'static str {
    match option {
        OPT_STARTTLS => "STARTTLS",
        OPT_GO => "GO",
        OPT_STRUCTURED_REPLY => "STRUCTURED_REPLY",
        OPT_SET_META_CONTEXT => "SET_META_CONTEXT",
        _ => "an option",
    }
}

/// What a refusal of an option means.
pub(super) fn refusal(reply: u32) -> &'static str {
    match reply & !REP_ERROR {
        1 => "not supported",
        2 => "forbidden by its policy",
        3 => "called invalid",
        4 => "not supported on its platform",
        5 => "TLS is required",
        6 => "there is no such export",
        7 => "it is shutting down",
        8 => "it requires block sizes to be asked for",
        9 => "too big",
        _ => "refused",
    }
}

/// What an error of a request means.
pub(super) fn errno_name(errno: u32) -> &'static str {
    match errno {
        1 => "EPERM",
        5 => "EIO",
        12 => "ENOMEM",
        22 => "EINVAL",
        28 => "ENOSPC",
        75 => "EOVERFLOW",
        95 => "ENOTSUP",
        108 => "ESHUTDOWN",
        _ => "an error without a name",
    }
}
