//! The body of the tokenizer's fuzz target.

use super::{Decoder, EncodeOptions, PreTokenizer, SpecialIds, Tokenizer, VocabSpec};

/// Makes a vocabulary and a text of `data`, and checks what must hold of any: nothing panics,
/// ids are in range, and a streamed text is the whole text.
///
/// Byte 0 sets the options, byte 1 the pre-tokenizer; then come strings that end with byte
/// 0xFF: the text, and tokens by turns with merges. A token's first byte is its type.
#[doc(hidden)]
pub fn fuzz_tokenizer(data: &[u8]) {
    let [options, pre, rest @ ..] = data else {
        return;
    };
    let option = |bit: u8| options & 1 << bit != 0;
    let mut strings = rest.split(|&b| b == 0xFF);
    let text = String::from_utf8_lossy(strings.next().unwrap_or_default()).into_owned();
    let mut spec = VocabSpec {
        model: if option(0) { "gpt2" } else { "llama" }.to_owned(),
        pre: PreTokenizer::names().nth(*pre as usize).map(str::to_owned),
        model_name: option(1).then(|| "phi-3".to_owned()),
        add_bos: option(2).then_some(true),
        add_eos: option(3).then_some(true),
        add_space_prefix: option(4).then_some(false),
        special: SpecialIds {
            bos: Some(u32::from(*pre)),
            eos: option(5).then_some(u32::MAX),
            ..SpecialIds::default()
        },
        ..VocabSpec::default()
    };
    let mut types = Vec::new();
    let mut scores = Vec::new();
    let mut merges = Vec::new();
    if option(6) {
        for byte in 0..=255u8 {
            spec.tokens.push(match option(0) {
                true => super::bpe::byte_char(byte).to_string(),
                false => format!("<0x{byte:02X}>"),
            });
            types.push(if option(0) { 1 } else { 6 });
            scores.push(0.0);
        }
    }
    for (i, string) in strings.enumerate() {
        if i % 2 == 1 {
            merges.push(String::from_utf8_lossy(string).into_owned());
        } else if let [kind, token @ ..] = string {
            spec.tokens
                .push(String::from_utf8_lossy(token).into_owned());
            types.push(i32::from(kind % 8));
            scores.push(f32::from_bits(u32::from(*kind) << 24));
        }
    }
    spec.token_types = Some(types);
    spec.scores = Some(scores);
    spec.merges = Some(merges.into());
    let Ok(tokenizer) = Tokenizer::new(spec) else {
        return;
    };
    for options in [(true, true), (true, false), (false, true), (false, false)] {
        let (add_special, parse_special) = options;
        let ids = tokenizer.encode(
            &text,
            EncodeOptions {
                add_special,
                parse_special,
            },
        );
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        let mut decoder = Decoder::at_start(&tokenizer);
        let mut streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
        streamed.push_str(&decoder.flush());
        assert_eq!(streamed, tokenizer.decode(&ids));
    }
    for id in [0, 1, *pre as u32, u32::MAX] {
        let _ = (
            tokenizer.piece(id),
            tokenizer.is_eog(id),
            tokenizer.token_text(id),
        );
    }
}
