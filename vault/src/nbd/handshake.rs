//! What client and server agree upon before the first request.
//!
//! Nothing is buffered here: a byte beyond the answer that is waited for stays where it is, for TLS or for the replies.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::address::{Address, Endpoint, Stream};
use super::error::NbdError;
use super::proto::*;

/// The most bytes of an answer to an option. The longest are names and descriptions of exports.
const MOST_ANSWER: u32 = 64 << 10;
/// The most answers to one option.
const MOST_ANSWERS: usize = 64;
/// The largest minimum block size that the protocol has.
const MOST_MINIMUM: u32 = 64 << 10;

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Export {
    /// Bytes.
    pub size: u64,
    /// Whether it cannot be written to.
    pub read_only: bool,
    /// Whether several connections see the same.
    pub multi_conn: bool,
    /// What requests must be multiples of, bytes; a power of two.
    pub minimum: u32,
    /// What it likes best, bytes.
    pub preferred: u32,
    /// The most that one request may read, bytes.
    pub maximum: u32,
}

/// What both have agreed upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) export: Export,
    /// Whether replies are structured.
    pub(super) structured: bool,
    /// The contexts that were granted: number, and place in what was asked for.
    pub(super) contexts: Vec<(u32, usize)>,
}

/// Agrees with a server, and enters the phase of requests.
pub(super) async fn handshake(
    address: &Address,
    stream: Stream,
    contexts: &[String],
) -> Result<(Stream, Agreed), NbdError> {
    if address.export.len() > MOST_STRING || contexts.iter().any(|name| name.len() > MOST_STRING) {
        return Err(NbdError::Contract("a name of an export or context is longer than 4096 bytes".into()));
    }
    let mut talk = Talk { address, stream };
    talk.greet().await?;
    if let Endpoint::Tcp { host, tls, .. } = &address.endpoint {
        talk.demand(OPT_STARTTLS, &[]).await?;
        talk.stream = tls
            .secure(host, talk.stream)
            .await
            .map_err(|cause| NbdError::Tls { address: address.to_string(), cause })?;
    }
    let structured = talk.ask(OPT_STRUCTURED_REPLY, &[]).await?;
    let granted =
        if structured && !contexts.is_empty() { talk.contexts(contexts).await? } else { Vec::new() };
    let export = talk.go().await?;
    Ok((talk.stream, Agreed { export, structured, contexts: granted }))
}

struct Talk<'a> {
    address: &'a Address,
    stream: Stream,
}

/// An answer to an option.
struct Answer {
    reply: u32,
    data: Vec<u8>,
}

impl Talk<'_> {
    fn wrong(&self, cause: impl Into<String>) -> NbdError {
        NbdError::Protocol { address: self.address.to_string(), cause: cause.into() }
    }

    fn lost(&self, cause: &std::io::Error) -> NbdError {
        NbdError::Lost { address: self.address.to_string(), cause: cause.to_string() }
    }

    fn refused(&self, option: u32, answer: &Answer) -> NbdError {
        let words = String::from_utf8_lossy(&answer.data);
        let words: String = words.chars().filter(|c| !c.is_control()).take(MOST_STRING).collect();
        let cause = refusal(answer.reply).to_owned();
        NbdError::Refused {
            address: self.address.to_string(),
            option: option_name(option),
            cause: if words.is_empty() { cause } else { format!("{cause}: {words}") },
        }
    }

    async fn take<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        match self.stream.read_exact(&mut bytes).await {
            Ok(_) => Ok(bytes),
            Err(error) => Err(self.lost(&error)),
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        let sent = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        let sent = sent.await;
        sent.map_err(|error| self.lost(&error))
    }

    async fn greet(&mut self) -> Result<(), NbdError> {
        if u64::from_be_bytes(self.take().await?) != NBDMAGIC {
            return Err(self.wrong("it does not begin as an NBD server"));
        }
        if u64::from_be_bytes(self.take().await?) != IHAVEOPT {
            return Err(
                self.wrong("it speaks the oldstyle handshake, which nothing has agreed upon for years")
            );
        }
        let flags = u16::from_be_bytes(self.take().await?);
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(self.wrong("it does not speak the fixed newstyle handshake"));
        }
        let ours = flags & (FIXED_NEWSTYLE | NO_ZEROES);
        self.send(&u32::from(ours).to_be_bytes()).await
    }

    async fn answer(&mut self, option: u32) -> Result<Answer, NbdError> {
        if u64::from_be_bytes(self.take().await?) != OPTION_REPLY {
            return Err(self.wrong(format!("no reply to {}", option_name(option))));
        }
        let to = u32::from_be_bytes(self.take().await?);
        let reply = u32::from_be_bytes(self.take().await?);
        let length = u32::from_be_bytes(self.take().await?);
        if to != option {
            return Err(self.wrong(format!("a reply to option {to} instead of {}", option_name(option))));
        }
        if length > MOST_ANSWER {
            return Err(self.wrong(format!("a reply to {} of {length} bytes", option_name(option))));
        }
        let mut data = vec![0; length as usize];
        match self.stream.read_exact(&mut data).await {
            Ok(_) => Ok(Answer { reply, data }),
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// Whether the server grants something that it need not know.
    async fn ask(&mut self, option: u32, data: &[u8]) -> Result<bool, NbdError> {
        self.send(&super::proto::option(option, data)).await?;
        let answer = self.answer(option).await?;
        match answer.reply {
            REP_ACK => Ok(true),
            REP_ERR_UNSUP => Ok(false),
            error if error & REP_ERROR != 0 => Err(self.refused(option, &answer)),
            other => Err(self.wrong(format!("{} was answered with {other}", option_name(option)))),
        }
    }

    async fn demand(&mut self, option: u32, data: &[u8]) -> Result<(), NbdError> {
        if self.ask(option, data).await? {
            return Ok(());
        }
        Err(self.refused(option, &Answer { reply: REP_ERR_UNSUP, data: Vec::new() }))
    }

    async fn contexts(&mut self, asked: &[String]) -> Result<Vec<(u32, usize)>, NbdError> {
        let mut data = Vec::new();
        put_string(&mut data, &self.address.export);
        data.extend_from_slice(&u32::try_from(asked.len()).unwrap_or(u32::MAX).to_be_bytes());
        asked.iter().for_each(|name| put_string(&mut data, name));
        self.send(&option(OPT_SET_META_CONTEXT, &data)).await?;
        let mut granted: Vec<(u32, usize)> = Vec::new();
        loop {
            let answer = self.answer(OPT_SET_META_CONTEXT).await?;
            match (answer.reply, answer.data.split_first_chunk()) {
                (REP_ACK, _) => return Ok(granted),
                // A server that knows no contexts at all.
                (REP_ERR_UNSUP, _) if granted.is_empty() => return Ok(granted),
                (REP_META_CONTEXT, Some((id, name))) => {
                    let id = u32::from_be_bytes(*id);
                    let place = asked.iter().position(|asked| asked.as_bytes() == name);
                    match place {
                        Some(place) if granted.iter().all(|(i, p)| *i != id && *p != place) => {
                            granted.push((id, place));
                        }
                        Some(_) => return Err(self.wrong("it grants one meta context twice")),
                        None => return Err(self.wrong("it grants a meta context that was not asked for")),
                    }
                }
                (error, _) if error & REP_ERROR != 0 => {
                    return Err(self.refused(OPT_SET_META_CONTEXT, &answer));
                }
                (other, _) => return Err(self.wrong(format!("SET_META_CONTEXT was answered with {other}"))),
            }
        }
    }

    async fn go(&mut self) -> Result<Export, NbdError> {
        let mut data = Vec::new();
        put_string(&mut data, &self.address.export);
        data.extend_from_slice(&1_u16.to_be_bytes());
        data.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
        self.send(&option(OPT_GO, &data)).await?;
        let mut told: Option<(u64, u16)> = None;
        let mut sizes: Option<[u32; 3]> = None;
        for _ in 0..MOST_ANSWERS {
            let answer = self.answer(OPT_GO).await?;
            match answer.reply {
                REP_ACK => {
                    let Some((size, flags)) = told else {
                        return Err(self.wrong("it does not tell the size of the export"));
                    };
                    return self.export(size, flags, sizes);
                }
                REP_INFO => match info(&answer.data) {
                    Some(Info::Export(size, flags)) => told = Some((size, flags)),
                    Some(Info::Sizes(three)) => sizes = Some(three),
                    Some(Info::Other) => {}
                    None => return Err(self.wrong("an information about the export of a wrong length")),
                },
                error if error & REP_ERROR != 0 => return Err(self.refused(OPT_GO, &answer)),
                other => return Err(self.wrong(format!("GO was answered with {other}"))),
            }
        }
        Err(self.wrong("its answers to GO do not end"))
    }

    fn export(&self, size: u64, flags: u16, sizes: Option<[u32; 3]>) -> Result<Export, NbdError> {
        let [minimum, preferred, maximum] = sizes.unwrap_or([1, 4096, 32 << 20]);
        if size > i64::MAX as u64 {
            return Err(self.wrong(format!("an export of {size} bytes")));
        }
        if flags & FLAG_HAS_FLAGS == 0 {
            return Err(self.wrong("flags of an export without their mark"));
        }
        if !minimum.is_power_of_two() || minimum > MOST_MINIMUM || preferred < minimum || maximum < minimum {
            return Err(self.wrong(format!("block sizes of {minimum}, {preferred}, {maximum} bytes")));
        }
        Ok(Export {
            size,
            read_only: flags & FLAG_READ_ONLY != 0,
            multi_conn: flags & FLAG_CAN_MULTI_CONN != 0,
            minimum,
            preferred,
            maximum: maximum - maximum % minimum,
        })
    }
}

enum Info {
    Export(u64, u16),
    Sizes([u32; 3]),
    Other,
}

/// An information about an export; nothing if it has not the length that its kind has.
fn info(data: &[u8]) -> Option<Info> {
    let (kind, rest) = data.split_first_chunk()?;
    match u16::from_be_bytes(*kind) {
        INFO_EXPORT => {
            let (size, flags) = rest.split_first_chunk()?;
            Some(Info::Export(u64::from_be_bytes(*size), u16::from_be_bytes(flags.try_into().ok()?)))
        }
        INFO_BLOCK_SIZE => {
            let (three, []) = rest.as_chunks::<4>() else { return None };
            let three: [[u8; 4]; 3] = three.try_into().ok()?;
            Some(Info::Sizes(three.map(u32::from_be_bytes)))
        }
        _ => Some(Info::Other),
    }
}
