//! `tegula serve` as its clients and its enemies meet it.

mod access;
mod api;
mod faults;
mod soak;
mod support;
