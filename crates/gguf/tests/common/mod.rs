//! Small models for several tests.
#![allow(dead_code)]

use std::path::PathBuf;

use tegula_gguf::{
    Array, GgmlType, Metadata, Value,
    sparse::{ALIGN, Header, Pattern, pack_strip},
    writer::GgufWriter,
};

/// Metadata with every value type, among them nested arrays.
pub fn every_value() -> Metadata {
    let mut m = Metadata::new("sample");
    m.set("general.architecture", "llama");
    m.set("u8", 200u8);
    m.set("i8", -100i8);
    m.set("u16", 60_000u16);
    m.set("i16", -30_000i16);
    m.set("u32", 4_000_000_000u32);
    m.set("i32", -2_000_000_000i32);
    m.set("u64", u64::MAX);
    m.set("i64", i64::MIN);
    m.set("f32", 1.5f32);
    m.set("f64", -0.1f64);
    m.set("bool", true);
    m.set("text", "häuser ∮ 🦀");
    m.set("a.u8", vec![1u8, 2, 3]);
    m.set("a.i8", vec![-1i8]);
    m.set("a.u16", vec![1u16, 2]);
    m.set("a.i16", vec![-5i16]);
    m.set("a.u32", vec![7u32; 3]);
    m.set("a.i32", vec![-7i32, 8]);
    m.set("a.u64", vec![1u64 << 40]);
    m.set("a.i64", vec![-1i64]);
    m.set("a.f32", vec![0.25f32, -8.0]);
    m.set("a.f64", vec![1e300f64]);
    m.set("a.bool", vec![true, false]);
    m.set(
        "a.string",
        vec!["a".to_owned(), String::new(), "ü".to_owned()],
    );
    m.set("a.empty", Vec::<String>::new());
    m.set(
        "a.nested",
        vec![Array::I32(vec![1, 2]), Array::String(vec!["x".to_owned()])],
    );
    m
}

/// A model of `tensors` (name, type, shape) over `metadata`, its data counting bytes.
pub fn model(metadata: Metadata, tensors: &[(&str, GgmlType, &[u64])]) -> Vec<u8> {
    let mut writer = GgufWriter::new(metadata);
    for (name, ty, shape) in tensors {
        writer.add_tensor(name, *ty, shape).unwrap();
    }
    let data: Vec<Vec<u8>> = writer
        .tensors()
        .iter()
        .enumerate()
        .map(|(i, t)| (0..t.bytes).map(|b| (b as usize * 7 + i) as u8).collect())
        .collect();
    writer
        .to_bytes(&data.iter().map(Vec::as_slice).collect::<Vec<_>>())
        .unwrap()
}

/// A file with every value type and a tensor of several types and shapes each; about 3 KiB.
pub fn sample() -> Vec<u8> {
    model(
        every_value(),
        &[
            ("token_embd.weight", GgmlType::Q8_0, &[64, 5]),
            ("blk.0.attn_q.weight", GgmlType::Q4_K, &[256, 2]),
            ("blk.0.attn_norm.weight", GgmlType::F32, &[3]),
            ("blk.0.experts", GgmlType::MXFP4, &[32, 2, 3]),
            ("scalar", GgmlType::F16, &[]),
            ("last", GgmlType::BF16, &[5, 1, 1, 1]),
        ],
    )
}

/// A plain model without metadata but the alignment.
pub fn with_alignment(alignment: u32) -> Vec<u8> {
    let mut m = Metadata::default();
    m.set("general.alignment", Value::U32(alignment));
    model(m, &[("a", GgmlType::F32, &[3]), ("b", GgmlType::F32, &[1])])
}

/// The directory of shared data: `TEGULA_SHARED` or `shared` beside the workspace.
pub fn shared() -> PathBuf {
    std::env::var_os("TEGULA_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    )
}

/// A sparse matrix of each type, with and without a pattern.
pub fn sparse_tensors() -> Vec<(GgmlType, Vec<u8>)> {
    let mut tensors = Vec::new();
    for ty in GgmlType::SPARSE {
        for pattern in [None, Pattern::new(2, 4)] {
            let mut header = Header::new(*ty, &[64, 3], pattern).unwrap();
            let bytes = ty.dense().bytes_for(64).unwrap() as usize;
            // Two of four weights of any type have no value.
            let row: Vec<u8> = match ty {
                GgmlType::S_BF16 => (0..bytes).map(|i| (i % 8 / 4 * 63) as u8).collect(),
                GgmlType::S8 => (0..bytes).map(|i| (i % 34 % 4 / 2 * 7) as u8).collect(),
                _ => (0..bytes)
                    .map(|i| [0x88, 0x88, 0x5a, 0xa7][i % 18 % 4])
                    .collect(),
            };
            let mut strip = Vec::new();
            let rows = [&row[..]; 3];
            header.values = pack_strip(*ty, 64, &rows, pattern, &mut strip).unwrap();
            let mut bytes = header.encode(&[strip.len()]).unwrap();
            bytes.extend(strip);
            bytes.extend([0; ALIGN]);
            tensors.push((*ty, bytes));
        }
    }
    tensors
}

/// A model of these.
pub fn sparse() -> Vec<u8> {
    let mut writer = GgufWriter::new(Metadata::default());
    let tensors = sparse_tensors();
    for (i, (ty, bytes)) in tensors.iter().enumerate() {
        let bytes = bytes.len() as u64;
        writer
            .add_sparse(&format!("{i}"), *ty, &[64, 3], bytes)
            .unwrap();
    }
    let slices: Vec<&[u8]> = tensors.iter().map(|t| &t.1[..]).collect();
    writer.to_bytes(&slices).unwrap()
}

/// The first inputs of the sparse reader's fuzzers: tensors without a file around them.
pub fn sparse_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let names = ["s-bf16", "s-bf16-2-4", "s8", "s8-2-4", "s4", "s4-2-4"];
    let tensors = sparse_tensors().into_iter().map(|t| t.1);
    names.into_iter().zip(tensors).collect()
}

/// The fuzzers' first inputs, by name: small files that together use all of the format.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut version_2 = sample();
    version_2[4] = 2;
    let names: Vec<String> = GgmlType::ALL
        .iter()
        .map(|t| t.name().to_lowercase())
        .collect();
    let shapes: Vec<[u64; 1]> = GgmlType::ALL
        .iter()
        .map(|t| [t.block_len() as u64])
        .collect();
    let types: Vec<(&str, GgmlType, &[u64])> = GgmlType::ALL
        .iter()
        .zip(&names)
        .zip(&shapes)
        .map(|((&t, name), shape)| (name.as_str(), t, &shape[..]))
        .collect();
    let mut part = Metadata::default();
    part.set("split.no", 0u16);
    part.set("split.count", 2u16);
    let mut vocabulary = Metadata::default();
    vocabulary.set("general.architecture", "llama");
    vocabulary.set("tokenizer.ggml.model", "gpt2");
    vocabulary.set(
        "tokenizer.ggml.tokens",
        ["a", "b", "ab"].map(String::from).to_vec(),
    );
    vocabulary.set("tokenizer.ggml.merges", vec!["a b".to_owned()]);
    vocabulary.set("tokenizer.ggml.token_type", vec![1i32; 3]);
    vec![
        ("aligned-1.gguf", with_alignment(1)),
        ("aligned-64.gguf", with_alignment(64)),
        ("empty.gguf", model(Metadata::default(), &[])),
        ("every-type.gguf", model(Metadata::default(), &types)),
        ("every-value.gguf", sample()),
        ("part.gguf", model(part, &[])),
        ("sparse.gguf", sparse()),
        ("version-2.gguf", version_2),
        ("vocabulary.gguf", model(vocabulary, &[])),
    ]
}

/// The first inputs of the tokenizer's fuzzers; `fuzz_tokenizer` says what the bytes mean.
pub fn tokenizer_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |head: &[u8], text: &str| [head, text.as_bytes()].concat();
    let words = "Hello world's 12345  tabs\t\r\n\n über 東京 🦀👩‍👩‍👧 \u{301}e";
    vec![
        ("bpe-plain", seed(&[0, 0, 0, 0, 0], words)),
        (
            "bpe-merges",
            seed(
                &[0, 3, 0, 4, b'h', b'e', b'l', b'l', 128, 128, b' ', b't', 0],
                words,
            ),
        ),
        (
            "bpe-special",
            seed(
                &[0, 5, 15, 0, 2, 3, 3, b'<', b's', b'>', 4, 2, b'o', b' '],
                "a<s>o o",
            ),
        ),
        ("spm-plain", seed(&[1, 0, 0, 0, 0], words)),
        (
            "spm-merges",
            seed(
                &[1, 0, 31, 3, 148, 140, 128, 150, 129, 128, 0],
                "hello hello",
            ),
        ),
        (
            "spm-special",
            seed(
                &[1, 0, 7, 0, 1, 4, 4, b'<', b'x', b'>', b' '],
                " <x>  <x> y",
            ),
        ),
    ]
}

/// The first inputs of the template's fuzzers: real templates, and one that uses what minijinja
/// has besides; `fuzz_template` says what the parts mean.
pub fn template_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |flags: &str, source: &str, messages: &[&str]| {
        let mut parts = vec![flags, source];
        parts.extend(messages);
        parts.join("\0").into_bytes()
    };
    let talk = ["Be kind.", "Hi!", "<think>x</think>\n\nHello.", "And now?"];
    let chatml = include_str!("../data/chat/chatml.jinja");
    let llama3 = include_str!("../data/chat/llama3.jinja");
    let mistral = include_str!("../data/chat/mistral.jinja");
    let qwen3 = include_str!("../data/chat/qwen3.jinja");
    let everything = "{%- macro m(x, y=2) -%}[{{ x }}:{{ y|default('d', true) }}]{%- endmacro -%}\
        {% set ns = namespace(n=0, seen=[]) %}\
        {% for m in messages if m.content is string and 'i' in m.content %}\
        {% set ns.n = ns.n + loop.index0 %}{{ m.role.upper()[::-1] }}\
        {% if loop.first %}{% continue %}{% elif ns.n > 9 %}{% break %}{% endif %}\
        {{ m(m.content.split('i')[-1].strip() ~ '!', y=loop.length // 2) }}{% else %}none{% endfor %}\
        {{ tools|tojson(indent=2, sort_keys=true) }}{{ {'a': [1, 2.5, none]}.items()|list|tojson }}\
        {{ messages|map(attribute='content')|select('string')|join(',')|replace('a', 'b') }}\
        {{ range(3)|list|reverse|first }}{{ 'a'.join(['x', 'y']) }}{{ '%d' is defined }}\
        {{ strftime_now('%Y-%m-%d %H:%M:%S %j %%') }}{% filter upper %}x{% endfilter %}\
        {% if 3 ** 2 % 4 == 1 and not false %}{{ raise_exception('no') }}{% endif %}{# end #}";
    vec![
        ("chatml", seed("g", chatml, &talk)),
        ("llama3", seed("g", llama3, &talk)),
        ("llama3-tools", seed("gtc", llama3, &talk)),
        ("mistral", seed("", mistral, &talk[..3])),
        ("mistral-tools", seed("tc", mistral, &talk)),
        ("qwen3", seed("ge", qwen3, &talk)),
        ("qwen3-tools", seed("gtceE", qwen3, &talk)),
        ("everything", seed("gtd", everything, &talk)),
    ]
}
