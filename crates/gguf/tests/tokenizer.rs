//! The tokenizer of the project's own models against ids made by Hugging Face's `tokenizers`
//! from the `tokenizer.json` that the models were trained with (`data/README.md`).

use std::path::Path;

use serde_json::Value;
use tegula_gguf::tokenizer::{Decoder, EncodeOptions, TokenKind, Tokenizer};
use tegula_gguf::{Gguf, metadata};

fn data(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn ferrous() -> Tokenizer {
    let gguf = Gguf::open(data("ferrous-vocab.gguf")).expect("vocabulary file");
    Tokenizer::from_gguf(&gguf).expect("tokenizer")
}

const TEXT: EncodeOptions = EncodeOptions {
    add_special: true,
    parse_special: false,
};
const PROMPT: EncodeOptions = EncodeOptions {
    add_special: true,
    parse_special: true,
};

fn cases() -> Vec<(String, Vec<u32>)> {
    let json = std::fs::read_to_string(data("ferrous-ids.json")).expect("cases");
    let json: Vec<Value> = serde_json::from_str(&json).expect("JSON");
    json.iter()
        .map(|case| {
            let ids = case["ids"].as_array().expect("ids").iter();
            let ids = ids.map(|id| id.as_u64().expect("id") as u32).collect();
            (case["text"].as_str().expect("text").to_owned(), ids)
        })
        .collect()
}

#[test]
fn ids_equal_those_of_the_training_tokenizer() {
    let tokenizer = ferrous();
    assert_eq!(tokenizer.warnings(), &[] as &[String]);
    let cases = cases();
    assert!(cases.len() > 80);
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(&text, PROMPT), ids, "{text:?}");
        // Byte-level tokens lose nothing; only the control tokens are left out.
        let shown: String = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
            .iter()
            .fold(text, |t, s| t.replace(s, ""));
        assert_eq!(tokenizer.decode(&ids), shown);
    }
}

#[test]
fn facts_of_the_vocabulary() {
    let t = ferrous();
    assert_eq!(t.vocab_size(), 4096);
    assert_eq!((t.bos(), t.eos(), t.eot()), (None, Some(0), Some(2)));
    assert_eq!((t.add_bos(), t.add_eos()), (false, false));
    assert_eq!(t.eog(), &[0, 2]);
    assert!(t.is_eog(2) && !t.is_eog(1) && !t.is_eog(u32::MAX));
    assert_eq!(t.token_kind(1), Some(TokenKind::Control));
    assert_eq!(t.token_text(1), Some("<|im_start|>"));
    assert_eq!(t.token_id("Ġis"), t.encode(" is", TEXT).first().copied());
    assert_eq!(t.piece(t.token_id("Ġis").expect("token")), b" is");
    assert_eq!(t.piece(4096), b"");
}

#[test]
fn control_tokens_in_plain_text_are_text() {
    let t = ferrous();
    let text = "<|im_end|>";
    assert_eq!(t.encode(text, PROMPT), [2]);
    let ids = t.encode(text, TEXT);
    assert!(ids.len() > 1 && !ids.contains(&2));
    assert_eq!(t.decode(&ids), text);
    assert_eq!(t.decode(&[2]), "");
    assert_eq!(Decoder::new(&t).show_special(true).push(2), text);
}

#[test]
fn streamed_text_is_whole_characters_and_equals_the_whole() {
    let t = ferrous();
    for (text, ids) in cases() {
        let mut decoder = Decoder::new(&t).show_special(true);
        let mut streamed = String::new();
        for &id in &ids {
            let piece = decoder.push(id);
            assert!(text[streamed.len()..].starts_with(&piece), "{text:?}");
            streamed.push_str(&piece);
        }
        assert_eq!(decoder.flush(), "");
        assert_eq!(streamed, text);
    }
}

#[test]
fn bytes_that_never_complete_become_replacement_characters() {
    let t = ferrous();
    let byte = |b: char| t.token_id(b.encode_utf8(&mut [0; 4])).expect("byte token");
    // 🦀 is F0 9F A6 80; the vocabulary writes these bytes ð Ł ¦ Ģ.
    let crab = ['ð', 'Ł', '¦', 'Ģ'].map(byte);
    let a = byte('a');
    let mut decoder = Decoder::new(&t);
    assert_eq!(crab.map(|id| decoder.push(id)), ["", "", "", "🦀"]);
    assert_eq!(
        [crab[0], crab[1], a].map(|id| decoder.push(id)),
        ["", "", "\u{FFFD}a"]
    );
    assert_eq!(decoder.push(crab[3]), "\u{FFFD}");
    assert_eq!(decoder.push(crab[0]), "");
    assert_eq!(decoder.flush(), "\u{FFFD}");
    assert_eq!(decoder.flush(), "");
    assert_eq!(
        t.decode(&[crab[0], crab[1], a, crab[3]]),
        "\u{FFFD}a\u{FFFD}"
    );
}

#[test]
fn metadata_of_wrong_type_or_missing_is_an_error_that_names_the_key() {
    let gguf = Gguf::open(data("ferrous-vocab.gguf")).expect("vocabulary file");
    let good = gguf.metadata();
    for (key, value, expected) in [
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens"),
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges"),
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model"),
        ("tokenizer.ggml.model", Some("bert".into()), "bert"),
        (
            "tokenizer.ggml.tokens",
            Some(metadata::Value::U32(1)),
            "tokenizer.ggml.tokens",
        ),
        (
            "tokenizer.ggml.tokens",
            Some(Vec::<String>::new().into()),
            "no tokens",
        ),
        (
            "tokenizer.ggml.merges",
            Some(vec![1u32].into()),
            "tokenizer.ggml.merges",
        ),
        (
            "tokenizer.ggml.merges",
            Some(vec!["nospace".to_owned()].into()),
            "merge 0",
        ),
        (
            "tokenizer.ggml.merges",
            Some(vec!["a absent!".to_owned()].into()),
            "absent!",
        ),
        (
            "tokenizer.ggml.token_type",
            Some(vec![1i32].into()),
            "tokenizer.ggml.token_type",
        ),
        (
            "tokenizer.ggml.token_type",
            Some(vec![7i32; 4096].into()),
            "type 7",
        ),
        (
            "tokenizer.ggml.add_bos_token",
            Some("yes".into()),
            "tokenizer.ggml.add_bos_token",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            Some(1.5f32.into()),
            "tokenizer.ggml.eos_token_id",
        ),
    ] {
        let mut md = good.clone();
        match value {
            Some(value) => drop(md.set(key, value)),
            None => drop(md.remove(key)),
        }
        let error = Tokenizer::from_metadata(&md).expect_err(key).to_string();
        assert!(
            error.contains(expected) && error.contains("ferrous-vocab.gguf"),
            "{error}"
        );
    }
}

#[test]
fn doubtful_vocabularies_warn() {
    let gguf = Gguf::open(data("ferrous-vocab.gguf")).expect("vocabulary file");
    let mut md = gguf.metadata().clone();
    md.set("tokenizer.ggml.pre", "brand-new");
    md.set("tokenizer.ggml.eos_token_id", 4_000_000_000u32);
    md.set("tokenizer.ggml.bos_token_id", -1i32);
    md.set("tokenizer.ggml.add_bos_token", true);
    let t = Tokenizer::from_metadata(&md).expect("tokenizer");
    let warnings = t.warnings().join("\n");
    for expected in ["brand-new", "4000000000", "bos"] {
        assert!(warnings.contains(expected), "{warnings}");
    }
    assert_eq!((t.eos(), t.bos(), t.add_bos()), (None, None, false));
}

/// The fuzz target's body over texts and vocabularies drawn at random from what matters.
#[test]
fn random_vocabularies_do_not_panic() {
    let parts: &[&[u8]] = &[
        b"\xff",
        b"\xff\x01",
        b"\xff\x03",
        b"\xff\x04",
        b"\xff\x06",
        b"a",
        b"b",
        b" ",
        "Ġ".as_bytes(),
        "\u{2581}".as_bytes(),
        b"<s>",
        b"</s>",
        b"<|im_end|>",
        b"<|endoftext|>",
        b"<0x41>",
        b"<0x>",
        "é".as_bytes(),
        "🦀".as_bytes(),
        b"\xf0\x9f",
        b"\n",
        b"1",
        b"a b",
        b"\xffa a\xff\x01aa",
        b"\0",
    ];
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    for _ in 0..20_000 {
        let mut data = vec![random(256) as u8, random(60) as u8];
        for _ in 0..random(40) {
            data.extend_from_slice(parts[random(parts.len())]);
        }
        tegula_gguf::tokenizer::fuzz_tokenizer(&data);
    }
}
