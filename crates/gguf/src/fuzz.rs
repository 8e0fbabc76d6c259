//! Bodies of the fuzz targets, shared by libFuzzer, the stable mutation driver and the test
//! that replays the corpus. They panic when an invariant breaks and do nothing otherwise.

pub mod driver;

use crate::{
    Bytes, Gguf, Metadata, blocks,
    chat::{ChatTemplate, Message, PANICKED, RenderOptions, TemplateError, Value},
    sparse::{Sparse, pack_strip, unpack_strip},
    tokenizer::{Decoder, EncodeOptions, Tokenizer},
    writer::GgufWriter,
};

/// Reads `data` as a GGUF file; where that works, touches all that it holds and writes it
/// again.
///
/// # Panics
/// When a file that reads does not come back the same after writing it.
pub fn fuzz_read(data: &[u8]) {
    let Ok(gguf) = Gguf::from_bytes(Bytes::from_vec(data.to_vec()), "fuzz") else {
        return;
    };
    touch_metadata(&gguf);
    if let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) {
        encode_and_decode(&tokenizer, "Grüße <s>1234 it's\r\n\u{0}🦀🦀  end </s>");
    }

    let mut tensors = Vec::new();
    for t in gguf.tensors() {
        let bytes = gguf.data(t);
        assert_eq!(bytes.len() as u64, t.bytes);
        assert_eq!(gguf.tensor(&t.name), Some(t));
        tensors.push(bytes);
        if t.ty.is_sparse() {
            let sparse = Sparse::parse(bytes).expect("a tensor that was shown as sparse");
            let h = sparse.header();
            assert_eq!((h.ty, &h.shape()), (t.ty, &t.shape));
            fuzz_sparse(bytes);
            continue;
        }
        assert_eq!(t.ty.bytes_for(t.elements()), Some(t.bytes));
        assert_eq!(t.row_bytes() * t.rows(), t.bytes);
        let some = bytes.len().min(4 * t.ty.block_bytes());
        let mut weights = vec![0.0; some / t.ty.block_bytes() * t.ty.block_len()];
        let known = blocks::can_dequantize(t.ty);
        assert_eq!(
            blocks::dequantize(t.ty, &bytes[..some], &mut weights).is_ok(),
            known
        );
    }

    let writer = GgufWriter::like(&gguf).expect("what was read can be declared");
    let written = writer
        .to_bytes(&tensors)
        .expect("what was read can be written");
    let again = Gguf::from_bytes(Bytes::from_vec(written.clone()), "again")
        .expect("what was written can be read");
    let rewritten = GgufWriter::like(&again).and_then(|w| w.to_bytes(&tensors));
    // Compared as bytes, since NaN values differ from themselves.
    assert!(
        rewritten.is_ok_and(|r| r == written),
        "writing what was written changed it"
    );
}

/// Reads `data` as the bytes of a sparse tensor; unpacks what is right and packs it again.
///
/// # Panics
/// When packing what was unpacked gives other weights.
pub fn fuzz_sparse(data: &[u8]) {
    let Ok(sparse) = Sparse::parse(data) else {
        return;
    };
    let h = sparse.header();
    let ty = h.ty;
    if sparse.check().is_err() || h.k > 1 << 16 {
        return;
    }
    let row_bytes = ty.dense().bytes_for(h.k as u64).expect("whole blocks") as usize;
    for s in 0..h.strips() {
        let mut dense = vec![0; h.rows_of(s).len() * row_bytes];
        let mut rows: Vec<_> = dense.chunks_exact_mut(row_bytes).collect();
        unpack_strip(ty, h.k, sparse.strip(s), &mut rows);
        let rows: Vec<_> = dense.chunks_exact(row_bytes).collect();
        let mut strip = Vec::new();
        // Another program may have stored zeros as values; ours does not, so no more come back.
        let values = pack_strip(ty, h.k, &rows, None, &mut strip).expect("no pattern");
        assert!(values <= sparse.check_strip(s).expect("it was checked"));
        let mut again = vec![0; dense.len()];
        let mut rows: Vec<_> = again.chunks_exact_mut(row_bytes).collect();
        unpack_strip(ty, h.k, &strip, &mut rows);
        assert!(again == dense, "packing changed a strip");
    }
}

/// Runs every getter over every key; wrong types must be errors.
fn touch_metadata(gguf: &Gguf) {
    let m = gguf.metadata();
    for (key, value) in m.iter() {
        assert_eq!(m.get(key).map(|v| v.ty()), Some(value.ty()));
        let fits = [
            m.str(key).is_ok(),
            m.u32(key).is_ok(),
            m.u64(key).is_ok(),
            m.i32(key).is_ok(),
            m.f32(key).is_ok(),
            m.bool(key).is_ok(),
            m.array(key).is_ok(),
            m.strings(key).is_ok(),
            m.f32s(key).is_ok(),
            m.i32s(key).is_ok(),
            m.u32s(key).is_ok(),
        ];
        assert_eq!(fits[0], value.as_str().is_some());
        assert_eq!(fits[6], value.as_array().is_some());
        if let Some(array) = value.as_array() {
            assert_eq!(array.get(0).is_none(), array.is_empty());
            assert!(array.get(array.len()).is_none());
        }
    }
}

/// The present, for templates that ask for it.
const NOW: i64 = 1_721_995_200;
/// A prompt may have this many bytes, whatever the (small) messages are.
const LONGEST_PROMPT: usize = 2 << 20;

/// Takes the first of the parts of `data`, between zero bytes, for options, the second for a
/// chat template, and the others for messages of alternating roles; renders them.
///
/// # Panics
/// When the renderer panics, a prompt is longer than its limit, or the same messages give
/// another prompt the second time.
pub fn fuzz_template(data: &[u8]) {
    let mut parts = data.split(|&b| b == 0).map(String::from_utf8_lossy);
    let flags = parts.next().unwrap_or_default();
    let source = parts.next().unwrap_or_default();
    let roles = ["system", "user", "assistant", "user", "tool"];
    let mut messages: Vec<_> = parts
        .take(32)
        .zip(roles.iter().cycle())
        .map(|(text, role)| Message::new(*role, text))
        .collect();
    let value = |json: &str| serde_json::from_str::<Value>(json).expect("JSON of this file");
    if flags.contains('c') {
        let calls =
            r#"[{"type":"function","function":{"name":"f","arguments":{"x":[1,2.5,null]}}}]"#;
        let assistants = messages.iter_mut().filter(|m| m.role == "assistant");
        for message in assistants {
            message.extra.insert("tool_calls".into(), value(calls));
            message.content = ().into();
        }
    }
    let tools = r#"[{"type":"function","function":{"name":"f","description":"<d>","parameters":{"type":"object","properties":{"x":{"type":"array"}}}}}]"#;
    let options = RenderOptions {
        add_generation_prompt: flags.contains('g'),
        tools: flags.contains('t').then(|| value(tools)),
        documents: flags.contains('d').then(|| value(r#"[{"title":"t"}]"#)),
        enable_thinking: flags.contains('e').then(|| flags.contains('E')),
        now: Some(NOW),
        ..RenderOptions::default()
    };
    let template: ChatTemplate = match source.parse() {
        Ok(template) => template,
        Err(e) => return not_panicked(&e),
    };
    let template = template.with_tokens(Some("<s>".into()), Some("</s>".into()));
    match template.render(&messages, &options) {
        Ok(prompt) => {
            assert!(prompt.len() <= LONGEST_PROMPT.max(32 * data.len()));
            let again = template.render(&messages, &options);
            assert_eq!(again.ok().as_deref(), Some(prompt.as_str()));
        }
        Err(e) => not_panicked(&e),
    }
}

fn not_panicked(error: &TemplateError) {
    let panicked = matches!(error, TemplateError::Render(what) if what == PANICKED);
    assert!(!panicked, "the renderer panicked");
}

/// Builds a tokenizer from the first bytes of `data` and runs the rest, as text, through it.
///
/// The layout: model and pre-tokenizer (1 byte each), flags, a count of merged tokens with two
/// bytes each (which tokens they join), a count of extra tokens, each with its type, length
/// and text.
///
/// # Panics
/// When the tokens are no tokens of the vocabulary, decoding in steps differs from decoding at
/// once, or byte-level tokens lose text.
pub fn fuzz_tokenizer(data: &[u8]) {
    let mut input = data.iter().copied();
    let mut byte = || input.next().unwrap_or(0);
    let bpe = byte() % 2 == 0;
    let pre = byte();
    let flags = byte();

    let mut tokens: Vec<String> = Vec::new();
    let mut types: Vec<i32> = Vec::new();
    if bpe {
        tokens.extend((0..=255u8).map(|b| byte_char(b).to_string()));
        types.resize(256, 1);
    } else {
        tokens.extend(["<unk>", "<s>", "</s>"].map(str::to_owned));
        types.extend([2, 3, 3]);
        tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
        types.resize(259, 6);
        tokens.push("\u{2581}".to_owned());
        tokens.extend((b'a'..=b'z').map(|b| char::from(b).to_string()));
        types.resize(tokens.len(), 1);
    }
    let mut merges = Vec::new();
    for _ in 0..byte() % 64 {
        let pick = |b: u8, n: usize| {
            if b < 128 {
                usize::from(b) % n
            } else {
                n - 1 - usize::from(b - 128) % n
            }
        };
        let (a, b) = (pick(byte(), tokens.len()), pick(byte(), tokens.len()));
        let joined = format!("{}{}", tokens[a], tokens[b]);
        if joined.len() <= 64 && !tokens.contains(&joined) {
            merges.push(format!("{} {}", tokens[a], tokens[b]));
            tokens.push(joined);
            types.push(1);
        }
    }
    let extra = byte() % 8;
    for _ in 0..extra {
        types.push(i32::from(byte() % 7));
        let len = byte() % 16;
        let text: Vec<u8> = (0..len).map(|_| byte()).collect();
        tokens.push(String::from_utf8_lossy(&text).into_owned());
    }
    let text: Vec<u8> = input.collect();
    let text = String::from_utf8_lossy(&text);

    let mut m = Metadata::new("fuzz");
    m.set("tokenizer.ggml.model", if bpe { "gpt2" } else { "llama" });
    if let Some(name) = Tokenizer::pre_tokenizers().nth(pre.into()) {
        m.set("tokenizer.ggml.pre", name);
    }
    m.set(
        "tokenizer.ggml.scores",
        (0..tokens.len()).map(|i| -(i as f32)).collect::<Vec<_>>(),
    );
    m.set("tokenizer.ggml.tokens", tokens);
    m.set("tokenizer.ggml.token_type", types);
    m.set("tokenizer.ggml.merges", merges);
    m.set("tokenizer.ggml.add_bos_token", flags & 1 != 0);
    m.set("tokenizer.ggml.add_eos_token", flags & 2 != 0);
    m.set("tokenizer.ggml.add_space_prefix", flags & 4 != 0);
    if flags & 8 != 0 {
        m.set("tokenizer.ggml.bos_token_id", u32::from(flags >> 4));
    }
    let Ok(tokenizer) = Tokenizer::from_metadata(&m) else {
        return;
    };
    encode_and_decode(&tokenizer, &text);
    if bpe && extra == 0 {
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text, options)), text);
    }
}

/// Encodes `text` in every way and holds the tokens to what tokens must be.
fn encode_and_decode(tokenizer: &Tokenizer, text: &str) {
    for bits in 0..4 {
        let options = EncodeOptions {
            add_special: bits & 1 != 0,
            parse_special: bits & 2 != 0,
        };
        let ids = tokenizer.encode(text, options);
        for &id in &ids {
            assert!((id as usize) < tokenizer.vocab_size());
            tokenizer.piece(id);
        }
        let mut decoder = Decoder::at_start(tokenizer);
        let mut pieces: String = ids.iter().map(|&id| decoder.push(id)).collect();
        pieces.push_str(&decoder.flush());
        assert_eq!(pieces, tokenizer.decode(&ids));
    }
    tokenizer.encode_chat(text);
}

/// The character by which byte-level vocabularies write a byte.
fn byte_char(byte: u8) -> char {
    let plain = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if plain(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !plain(b)).count();
    char::from_u32(256 + before as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
}
