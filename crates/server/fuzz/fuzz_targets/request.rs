//! `cargo +nightly fuzz run request`, in `crates/server`: arbitrary bodies of requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tegula_server::fuzz::fuzz_request(data));
