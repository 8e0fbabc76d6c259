//! Phase 1: isolation. The probe that sees whether AMX was touched, the programs that it is
//! built into, and the phase's checks.
#![forbid(unsafe_code)]

mod checks;
mod devices;
mod gpu;
mod matrix;
pub mod probe;
pub mod programs;

pub use checks::{checks, gpu_checks, phase};
