//! `cargo +nightly fuzz run read`, in `crates/gguf`: arbitrary bytes as a GGUF file.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tegula_gguf::fuzz::fuzz_sparse(data));
