//! `cargo +nightly fuzz run tokenizer`, in `crates/gguf`: arbitrary vocabularies and texts.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tegula_gguf::fuzz::fuzz_tokenizer(data));
