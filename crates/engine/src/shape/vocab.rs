//! A vocabulary of the exact size: the 256 bytes, some merges, invented words, and an
//! end-of-text token, so that every prompt tokenises and every token has a text.

use super::Shape;
use tegula_gguf::{Metadata, tokenizer::byte_char};

/// The fewest tokens that a vocabulary can have: the bytes and the end of text.
pub(super) const MIN: usize = 257;

/// Merged in this order; each makes a token.
const MERGES: [(&str, &str); 16] = [
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġ", "a"),
    ("i", "n"),
    ("r", "e"),
    ("o", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "s"),
    ("a", "t"),
    ("n", "d"),
    ("Ġ", "o"),
    ("e", "n"),
    ("Ġ", "in"),
    ("i", "t"),
    ("Ġa", "nd"),
];

const END: &str = "<|endoftext|>";

/// Adds the vocabulary of `shape` to its metadata.
pub(super) fn describe(shape: &Shape, metadata: &mut Metadata) {
    let size = shape.vocab;
    let merges = &MERGES[..MERGES.len().min(size - MIN)];
    let mut tokens: Vec<String> = (0..=255).map(|b| byte_char(b).to_string()).collect();
    tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
    tokens.extend((0..size - 1 - tokens.len()).map(word));
    tokens.push(END.to_owned());
    let mut types = vec![1i32; size];
    types[size - 1] = 3;
    let end = (size - 1) as u32;
    metadata.set("tokenizer.ggml.model", "gpt2");
    metadata.set("tokenizer.ggml.pre", "qwen2");
    metadata.set("tokenizer.ggml.tokens", tokens);
    metadata.set("tokenizer.ggml.token_type", types);
    let merges: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
    metadata.set("tokenizer.ggml.merges", merges);
    metadata.set("tokenizer.ggml.bos_token_id", end);
    metadata.set("tokenizer.ggml.eos_token_id", end);
    metadata.set("tokenizer.ggml.add_bos_token", false);
}

/// An invented word with a space before it, another one for each number.
fn word(mut n: usize) -> String {
    const CONSONANTS: &[u8] = b"bdfgklmnprstvz";
    const VOWELS: &[u8] = b"aeiou";
    let mut text = String::from("Ġ");
    // At least two syllables: no merge makes that.
    for syllable in 0.. {
        if n == 0 && syllable >= 2 {
            break;
        }
        text.push(char::from(CONSONANTS[n % CONSONANTS.len()]));
        n /= CONSONANTS.len();
        text.push(char::from(VOWELS[n % VOWELS.len()]));
        n /= VOWELS.len();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_gguf::{Tokenizer, tokenizer::EncodeOptions};

    #[test]
    fn vocabularies_of_every_size_are_usable() {
        for size in [MIN, 258, 270, 280, 4096, 151_936] {
            let shape = Shape {
                vocab: size,
                ..Shape::preset("qwen3").unwrap()
            };
            let mut metadata = Metadata::default();
            describe(&shape, &mut metadata);
            let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
            assert_eq!(tokenizer.vocab_size(), size);
            assert!(
                tokenizer.warnings().is_empty(),
                "{:?}",
                tokenizer.warnings()
            );
            let text = "The cat and the \u{1F408} sat in\tthe hat.\n";
            let ids = tokenizer.encode(text, EncodeOptions::default());
            assert_eq!(tokenizer.decode(&ids), text);
            assert!(tokenizer.is_eog(size as u32 - 1));
        }
    }
}
