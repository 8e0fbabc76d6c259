//! `cargo +nightly fuzz run template`, in `crates/gguf`: arbitrary text as a chat template.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tegula_gguf::fuzz::fuzz_template(data));
