//! From token ids back to text.

use super::Tokenizer;
use super::bpe::char_byte;
use super::spm::SPACE;
use super::vocab::{TokenKind, Vocab, VocabKind};

/// The bytes that token `id` stands for.
pub(super) fn piece(vocab: &Vocab, id: u32) -> Vec<u8> {
    let (Some(text), Some(kind)) = (vocab.text(id), vocab.kind_of(id)) else {
        return Vec::new();
    };
    match (kind, vocab.kind) {
        (TokenKind::Unused, _) => Vec::new(),
        (TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown, _) => text.into(),
        (TokenKind::Byte, _) => match byte(text) {
            Some(byte) => vec![byte],
            None => text.into(),
        },
        (TokenKind::Normal, VocabKind::Spm) => text.replace(SPACE, " ").into(),
        // Tokens that aren't written in byte characters are taken as they are.
        (TokenKind::Normal, VocabKind::Bpe) => text
            .chars()
            .map(char_byte)
            .collect::<Option<_>>()
            .unwrap_or_else(|| text.into()),
    }
}

/// The byte of `<0xHH>`.
fn byte(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok()
}

/// Turns a stream of tokens into text as it comes.
///
/// What [`Decoder::push`] returns is always whole characters: bytes of a character that later
/// tokens may complete are held back. Bytes that can't become UTF-8 any more turn into U+FFFD
/// (one per maximal broken sequence, as everywhere in Rust's standard library).
#[derive(Clone, Debug)]
pub struct Decoder {
    tokenizer: Tokenizer,
    pending: Vec<u8>,
    strip_space: bool,
    show_special: bool,
}

impl Decoder {
    /// For tokens that continue a text: nothing is stripped.
    pub fn new(tokenizer: &Tokenizer) -> Decoder {
        Decoder {
            tokenizer: tokenizer.clone(),
            pending: Vec::new(),
            strip_space: false,
            show_special: false,
        }
    }

    /// For tokens from the beginning of a text: the space that a SentencePiece-style encoder
    /// puts before the first word is taken away.
    pub fn at_start(tokenizer: &Tokenizer) -> Decoder {
        let inner = &tokenizer.0;
        let strip_space = inner.add_space_prefix && inner.vocab.kind == VocabKind::Spm;
        Decoder {
            strip_space,
            ..Decoder::new(tokenizer)
        }
    }

    /// Whether control and unknown tokens appear as their texts instead of being left out.
    pub fn show_special(mut self, show: bool) -> Decoder {
        self.show_special = show;
        self
    }

    /// The characters that `id` completes, possibly none.
    pub fn push(&mut self, id: u32) -> String {
        let vocab = &self.tokenizer.0.vocab;
        let hidden = matches!(
            vocab.kind_of(id),
            Some(TokenKind::Control | TokenKind::Unknown)
        );
        if hidden && !self.show_special {
            return String::new();
        }
        let mut bytes = piece(vocab, id);
        if self.strip_space && !bytes.is_empty() {
            // Only the text that comes first has the space, also after control tokens.
            self.strip_space = hidden;
            if !hidden && bytes[0] == b' ' {
                bytes.remove(0);
            }
        }
        self.pending.extend_from_slice(&bytes);
        self.take_complete()
    }

    /// What is still held back, at the end of the stream.
    pub fn flush(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut held = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let at_end = held + chunk.valid().len() + invalid.len() == self.pending.len();
            if at_end && is_incomplete(invalid) {
                held += chunk.valid().len();
                break;
            }
            held += chunk.valid().len() + invalid.len();
            if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..held);
        text
    }
}

/// Whether more bytes could make a character of `bytes`.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}
