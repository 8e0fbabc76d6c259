//! Phase 1: isolation. The probe that sees whether AMX was touched, and the phase's checks.
#![forbid(unsafe_code)]

mod checks;
pub mod probe;

pub use checks::{checks, phase};
