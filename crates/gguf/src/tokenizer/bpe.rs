//! Byte-level byte-pair encoding: within each word, the adjacent pair of lowest merge rank is
//! merged, leftmost first, until none is left.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::TokenizerError;
use super::pretokenize::PreTokenizer;
use super::vocab::{Vocab, shorten};

/// Merge tables over token ids.
pub(crate) struct Bpe {
    pre: PreTokenizer,
    /// The token that stands for each byte.
    bytes: [Option<u32>; 256],
    /// (left, right) to (rank, merged token).
    merges: HashMap<u64, (u32, u32)>,
}

/// Longer words are cut, so that positions fit 32 bits; no model's words come near.
const MAX_WORD_BYTES: usize = 1 << 30;

/// A symbol without a token: a byte that the vocabulary lacks.
const NO_TOKEN: u32 = u32::MAX;
/// The id of a symbol that was merged into its left neighbour.
const MERGED: u32 = u32::MAX - 1;
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    prev: u32,
    next: u32,
}

/// Buffers kept from word to word.
#[derive(Default)]
pub(crate) struct Scratch {
    symbols: Vec<Symbol>,
    /// (rank and left position, left token, right token), the least first.
    queue: BinaryHeap<Reverse<(u64, u32, u32)>>,
    text: String,
}

/// The character that stands for `byte` in the text of byte-level tokens: printable Latin-1
/// stands for itself, the rest is numbered from U+0100.
pub const fn byte_char(byte: u8) -> char {
    let code = match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as u32,
        0..=0x20 => 0x100 + byte as u32,
        0x7F..=0xA0 => 0x121 + (byte as u32 - 0x7F),
        0xAD => 0x143,
    };
    match char::from_u32(code) {
        Some(c) => c,
        None => char::REPLACEMENT_CHARACTER,
    }
}

/// The byte that `c` stands for in the text of byte-level tokens.
pub(crate) fn char_byte(c: char) -> Option<u8> {
    let code = c as u32;
    Some(match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code as u8,
        0x100..=0x120 => (code - 0x100) as u8,
        0x121..=0x142 => (code - 0x121) as u8 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    })
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl Bpe {
    pub(crate) fn new(
        vocab: &Vocab,
        pre: PreTokenizer,
        merges: &[String],
        warnings: &mut Vec<String>,
    ) -> Result<Bpe, TokenizerError> {
        let mut buffer = [0u8; 4];
        let mut bytes = [None; 256];
        for byte in 0..=255u8 {
            bytes[byte as usize] = vocab.id(byte_char(byte).encode_utf8(&mut buffer));
        }
        let missing = bytes.iter().filter(|id| id.is_none()).count();
        if missing > 0 {
            let fate = match vocab.special.unknown {
                Some(_) => "become the unknown token",
                None => "are left out",
            };
            warnings.push(format!(
                "{missing} of the 256 bytes have no token: they {fate}"
            ));
        }

        let mut table = HashMap::with_capacity(merges.len());
        let mut merged = String::new();
        let mut last = 0;
        for (rank, merge) in merges.iter().enumerate() {
            // The first character may itself be a space.
            let space = merge.char_indices().skip(1).find(|&(_, c)| c == ' ');
            let Some((left, right)) = space.map(|(at, _)| (&merge[..at], &merge[at + 1..])) else {
                return Err(TokenizerError::Merge {
                    rank,
                    what: format!("{} has no space", shorten(merge)),
                });
            };
            merged.clear();
            merged.push_str(left);
            merged.push_str(right);
            let id = |text: &str| {
                vocab.id(text).ok_or_else(|| TokenizerError::Merge {
                    rank,
                    what: format!(
                        "{} needs {}, which isn't a token",
                        shorten(merge),
                        shorten(text)
                    ),
                })
            };
            // Vocabularies mostly list merged tokens in the order of the merges, one merge or
            // several for each: comparing is cheaper than looking up.
            let next = [last, last + 1]
                .into_iter()
                .find(|&id| vocab.text(id) == Some(&merged));
            let (left, right) = (id(left)?, id(right)?);
            let merged = match next {
                Some(id) => id,
                None => id(&merged)?,
            };
            last = merged;
            // Of repeated merges the first, which is the best, counts.
            table
                .entry(pair(left, right))
                .or_insert((rank as u32, merged));
        }
        Ok(Bpe {
            pre,
            bytes,
            merges: table,
        })
    }

    /// Appends the tokens of `text`, in which there are no special tokens.
    pub(crate) fn encode(
        &self,
        vocab: &Vocab,
        text: &str,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        for word in self.pre.split(text) {
            for word in text.as_bytes()[word].chunks(MAX_WORD_BYTES) {
                self.encode_word(vocab, word, scratch, out);
            }
        }
    }

    fn encode_word(&self, vocab: &Vocab, word: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        if self.pre.ignore_merges && word.len() <= vocab.max_token_bytes {
            scratch.text.clear();
            scratch.text.extend(word.iter().map(|&b| byte_char(b)));
            if let Some(id) = vocab.id(&scratch.text) {
                out.push(id);
                return;
            }
        }
        let symbols = &mut scratch.symbols;
        symbols.clear();
        symbols.extend(word.iter().zip(0u32..).map(|(&byte, at)| Symbol {
            id: self.bytes[byte as usize].unwrap_or(NO_TOKEN),
            prev: at.wrapping_sub(1),
            next: at + 1,
        }));
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        self.merge(symbols, &mut scratch.queue);
        for symbol in symbols.iter() {
            match symbol.id {
                MERGED => {}
                NO_TOKEN => out.extend(vocab.special.unknown),
                id => out.push(id),
            }
        }
    }

    fn merge(&self, symbols: &mut [Symbol], queue: &mut BinaryHeap<Reverse<(u64, u32, u32)>>) {
        queue.clear();
        let candidate = |symbols: &[Symbol], left: u32, queue: &mut BinaryHeap<_>| {
            let l = symbols[left as usize];
            if l.next == NONE {
                return;
            }
            let r = symbols[l.next as usize];
            if let Some(&(rank, _)) = self.merges.get(&pair(l.id, r.id)) {
                queue.push(Reverse((pair(rank, left), l.id, r.id)));
            }
        };
        for left in 0..symbols.len() as u32 {
            candidate(symbols, left, queue);
        }
        while let Some(Reverse((key, left_id, right_id))) = queue.pop() {
            let at = key as u32;
            let left = symbols[at as usize];
            // Either side may have been merged with another neighbour meanwhile.
            if left.id != left_id || left.next == NONE || symbols[left.next as usize].id != right_id
            {
                continue;
            }
            let Some(&(_, merged)) = self.merges.get(&pair(left_id, right_id)) else {
                continue;
            };
            let next = symbols[left.next as usize].next;
            symbols[left.next as usize].id = MERGED;
            symbols[at as usize].id = merged;
            symbols[at as usize].next = next;
            if next != NONE {
                symbols[next as usize].prev = at;
            }
            candidate(symbols, at, queue);
            if left.prev != NONE {
                candidate(symbols, left.prev, queue);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_characters_are_distinct_and_invertible() {
        let mut seen = std::collections::HashSet::new();
        for byte in 0..=255u8 {
            let c = byte_char(byte);
            assert!(seen.insert(c));
            assert_eq!(char_byte(c), Some(byte));
        }
        assert_eq!(
            (byte_char(b' '), byte_char(b'\n'), byte_char(0xAD)),
            ('Ġ', 'Ċ', 'Ń')
        );
        assert_eq!(
            (char_byte(' '), char_byte('\u{144}'), char_byte('\u{AD}')),
            (None, None, None)
        );
    }
}
