//! SentencePiece-style encoding: adjacent symbols are merged into the token of highest score,
//! leftmost first, until no two make a token. What is left over becomes byte tokens.

use std::collections::BinaryHeap;

use super::TokenizerError;
use super::vocab::Vocab;

/// The character that stands for a space in the text of tokens.
pub(crate) const SPACE: char = '\u{2581}';

/// Longer texts are cut, so that positions fit 32 bits.
const MAX_TEXT_BYTES: usize = 1 << 30;

const NONE: u32 = u32::MAX;

/// Scores and byte tokens.
pub(crate) struct Spm {
    /// Each token's score as an integer of the same order.
    scores: Vec<u32>,
    bytes: [Option<u32>; 256],
}

#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    /// 0 when merged into the left neighbour.
    len: u32,
    prev: u32,
    next: u32,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    /// The score, and then the left position inverted: the greatest is merged first.
    key: u64,
    right: u32,
    len: u32,
}

/// Maps floats to integers that compare the same way.
fn ordered(score: f32) -> u32 {
    // Adding zero makes -0 equal to +0, as it compares.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    }
}

impl Spm {
    pub(crate) fn new(
        vocab: &Vocab,
        scores: &[f32],
        warnings: &mut Vec<String>,
    ) -> Result<Spm, TokenizerError> {
        if scores.len() < vocab.len() {
            return Err(TokenizerError::ArrayTooShort {
                key: "tokenizer.ggml.scores",
                len: scores.len(),
                tokens: vocab.len(),
            });
        }
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            return Err(TokenizerError::Score { id: id as u32 });
        }
        let scores = scores.iter().map(|&s| ordered(s)).collect();
        let mut bytes = [None; 256];
        for byte in 0..=255u8 {
            bytes[byte as usize] = vocab.id(&format!("<0x{byte:02X}>")).or_else(|| {
                byte.is_ascii()
                    .then(|| vocab.id(char::from(byte).encode_utf8(&mut [0; 4])))?
            });
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
        Ok(Spm { scores, bytes })
    }

    /// Appends the tokens of `text`, in which spaces are already [`SPACE`].
    pub(crate) fn encode(&self, vocab: &Vocab, mut text: &str, out: &mut Vec<u32>) {
        while text.len() > MAX_TEXT_BYTES {
            let (head, tail) = text.split_at(text.floor_char_boundary(MAX_TEXT_BYTES));
            self.encode_chunk(vocab, head, out);
            text = tail;
        }
        self.encode_chunk(vocab, text, out);
    }

    fn encode_chunk(&self, vocab: &Vocab, text: &str, out: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        for (at, (start, c)) in (0u32..).zip(text.char_indices()) {
            symbols.push(Symbol {
                start: start as u32,
                len: c.len_utf8() as u32,
                prev: at.wrapping_sub(1),
                next: at + 1,
            });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }

        let candidate = |symbols: &[Symbol], left: u32| {
            let l = symbols[left as usize];
            let r = symbols.get(l.next as usize)?;
            let len = l.len + r.len;
            let id = vocab.id(&text[l.start as usize..(l.start + len) as usize])?;
            let score = self.scores[id as usize];
            Some(Candidate {
                key: u64::from(score) << 32 | u64::from(!left),
                right: l.next,
                len,
            })
        };
        let mut queue: BinaryHeap<Candidate> = (0..symbols.len() as u32)
            .filter_map(|left| candidate(&symbols, left))
            .collect();
        while let Some(Candidate { key, right, len }) = queue.pop() {
            let at = !(key as u32);
            let (l, r) = (symbols[at as usize], symbols[right as usize]);
            // Symbols only grow or vanish: the same total length means that neither changed.
            if l.len == 0 || r.len == 0 || l.len + r.len != len {
                continue;
            }
            symbols[right as usize].len = 0;
            symbols[at as usize].len = len;
            symbols[at as usize].next = r.next;
            if let Some(next) = symbols.get_mut(r.next as usize) {
                next.prev = at;
            }
            queue.extend(candidate(&symbols, at));
            if l.prev != NONE {
                queue.extend(candidate(&symbols, l.prev));
            }
        }

        for symbol in symbols.iter().filter(|s| s.len > 0) {
            let piece = &text[symbol.start as usize..(symbol.start + symbol.len) as usize];
            match vocab.id(piece) {
                Some(id) => out.push(id),
                None => out.extend(
                    piece
                        .bytes()
                        .filter_map(|b| self.bytes[b as usize].or(vocab.special.unknown)),
                ),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ordered;

    #[test]
    fn ordered_scores_compare_as_the_floats_do() {
        let scores = [
            f32::NEG_INFINITY,
            -1e9,
            -1.5,
            -f32::MIN_POSITIVE,
            0.0,
            1e-30,
            2.0,
            f32::INFINITY,
        ];
        assert!(scores.windows(2).all(|w| ordered(w[0]) < ordered(w[1])));
        assert_eq!(ordered(-0.0), ordered(0.0));
    }
}
