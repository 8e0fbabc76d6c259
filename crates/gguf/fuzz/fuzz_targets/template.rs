//! `cargo +nightly fuzz run template`, in `crates/gguf`: arbitrary templates and messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tegula_gguf::fuzz::fuzz_template(data));
