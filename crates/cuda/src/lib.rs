//! NVIDIA GPUs: the driver, loaded at run time, and kernels.
//!
//! The build needs nothing of CUDA. Where there is no driver there is no GPU, and no error;
//! kernels are shipped as PTX for compute capability 8.0 and later, which the driver
//! translates. [`detect`] is the way in.

mod blas;
mod copies;
mod device;
mod driver;
mod launch;
mod modules;
mod operations;
mod pinned;
mod products;
mod streaming;

pub use device::CudaDevice;
pub use modules::{UNITS, Unit};

use std::sync::Arc;
use tegula_kernels::device::{DeviceError, Result};

/// The GPUs that can be used, by the driver's numbers: `CUDA0`, `CUDA1`, …
///
/// `split` presents every GPU as that many devices with streams and memory of their own, to
/// run what is meant for several GPUs on one.
///
/// # Errors
/// When there is a driver that can't be used, or a GPU refuses.
pub fn detect(split: usize) -> Result<Vec<Arc<CudaDevice>>> {
    let parts = split.max(1);
    let mut devices = Vec::new();
    for ordinal in 0..driver::count()? {
        for _ in 0..parts {
            let name = format!("CUDA{}", devices.len());
            devices.push(Arc::new(CudaDevice::open(ordinal, &name, parts as u64)?));
        }
    }
    Ok(devices)
}

/// Whether the environment says `NAME=off`.
fn switched_off(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|v| v == "off")
}

/// What `TEGULA_CUDA_SPLIT` asks for: 1 where it is not set.
///
/// # Errors
/// When it is no number from 1 to 16.
pub fn split_from_env() -> Result<usize> {
    match std::env::var("TEGULA_CUDA_SPLIT") {
        Err(_) => Ok(1),
        Ok(text) => match text.parse() {
            Ok(n @ 1..=16) => Ok(n),
            _ => Err(DeviceError::Unusable(format!(
                "TEGULA_CUDA_SPLIT={text}: expected a number from 1 to 16"
            ))),
        },
    }
}
