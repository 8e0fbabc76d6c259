//! Kernels: PTX made ahead, or compiled here from the same sources where the driver does not
//! take it.

use crate::driver::Gpu;
use cudarc::{driver::sys, nvrtc};
use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    sync::{Mutex, PoisonError},
};
use tegula_gguf::GgmlType;
use tegula_kernels::device::{DeviceError, Result};

const COMMON: &str = include_str!("../kernels/common.cuh");
const DECODE: &str = include_str!("../kernels/decode.cuh");
const MUL: &str = include_str!("../kernels/mul.cu");
const ROWS: &str = include_str!("../kernels/rows.cu");
const ATTENTION: &str = include_str!("../kernels/attention.cu");

/// No unit's PTX is longer.
const PTX_LIMIT: usize = 16 << 20;

/// A compilation unit.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unit {
    Rows,
    Attention,
    /// Products with one format.
    Mul(GgmlType),
}

macro_rules! units {
    ($($ty:ident),*) => {
        /// All of them.
        pub const UNITS: &[Unit] = &[Unit::Rows, Unit::Attention, $(Unit::Mul(GgmlType::$ty)),*];

        fn shipped(unit: Unit) -> Option<&'static [u8]> {
            Some(match unit {
                Unit::Rows => include_bytes!("../ptx/rows.ptx.z"),
                Unit::Attention => include_bytes!("../ptx/attention.ptx.z"),
                $(Unit::Mul(GgmlType::$ty) =>
                    include_bytes!(concat!("../ptx/mul_", stringify!($ty), ".ptx.z")),)*
                Unit::Mul(_) => return None,
            })
        }
    };
}

units!(
    F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
    MXFP4, NVFP4, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M
);

impl Unit {
    /// The PTX's file name, without its ending.
    pub fn name(self) -> String {
        match self {
            Unit::Rows => "rows".to_owned(),
            Unit::Attention => "attention".to_owned(),
            Unit::Mul(ty) => format!("mul_{ty}"),
        }
    }

    /// All sources as one text.
    pub fn source(self) -> String {
        match self {
            Unit::Rows => [COMMON, ROWS].concat(),
            Unit::Attention => [COMMON, ATTENTION].concat(),
            Unit::Mul(ty) => {
                let define = format!("#define TYPE {}\n", ty.id());
                [&define, COMMON, DECODE, MUL].concat()
            }
        }
    }

    /// What stands on the first line of shipped PTX: a hash of the sources it was made from.
    pub fn stamp(self) -> String {
        format!(
            "// sources {:08x}\n",
            crc32fast::hash(self.source().as_bytes())
        )
    }

    /// The PTX made ahead: `cargo xtask ptx` makes it.
    ///
    /// # Errors
    /// When there is none, or it is damaged.
    pub fn shipped(self) -> Result<String, &'static str> {
        let packed = shipped(self).ok_or("none is shipped")?;
        let bytes = miniz_oxide::inflate::decompress_to_vec_with_limit(packed, PTX_LIMIT);
        let bytes = bytes.map_err(|_| "the shipped one is damaged")?;
        String::from_utf8(bytes).map_err(|_| "the shipped one is damaged")
    }

    /// PTX as it is shipped: stamped and deflated.
    pub fn packed(self, ptx: &str) -> Vec<u8> {
        let text = [&self.stamp(), ptx].concat();
        miniz_oxide::deflate::compress_to_vec(text.as_bytes(), 10)
    }

    /// Compiles the sources for an architecture such as `compute_80`.
    ///
    /// # Errors
    /// When there is no NVRTC, or it refuses, in words.
    pub fn compile(self, arch: &str) -> Result<String, String> {
        // SAFETY: it only tries to open the library.
        if !unsafe { nvrtc::sys::is_culib_present() } {
            return Err("NVRTC, CUDA's run-time compiler, is not installed".to_owned());
        }
        let options = nvrtc::CompileOptions {
            options: vec![
                format!("--gpu-architecture={arch}"),
                "-default-device".to_owned(),
                "--std=c++17".to_owned(),
            ],
            ..nvrtc::CompileOptions::default()
        };
        let ptx = nvrtc::compile_ptx_with_opts(self.source(), options);
        Ok(ptx.map_err(|e| format!("{e:?}"))?.to_src())
    }
}

/// The kernels of one device, loaded as they are first used.
#[derive(Default)]
pub(crate) struct Modules {
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<Unit, Handle<sys::CUmodule>>,
    functions: HashMap<(Unit, &'static CStr), Handle<sys::CUfunction>>,
}

#[derive(Clone, Copy)]
struct Handle<T>(T);

// SAFETY: handles of the driver may be used from any thread.
unsafe impl<T> Send for Handle<T> {}

impl Modules {
    pub fn function(&self, gpu: &Gpu, unit: Unit, name: &'static CStr) -> Result<sys::CUfunction> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(&(unit, name)) {
            return Ok(function.0);
        }
        let module = match loaded.modules.get(&unit) {
            Some(module) => module.0,
            None => {
                let module = load(gpu, unit)?;
                loaded.modules.insert(unit, Handle(module));
                module
            }
        };
        let function = gpu.function(module, name)?;
        loaded.functions.insert((unit, name), Handle(function));
        Ok(function)
    }
}

/// Loads the PTX made ahead unless `TEGULA_CUDA_PTX=off`, or else compiles it here.
fn load(gpu: &Gpu, unit: Unit) -> Result<sys::CUmodule> {
    let terminated = |text: &str| CString::new(text).unwrap_or_default().into_bytes_with_nul();
    let shipped = match crate::switched_off("TEGULA_CUDA_PTX") {
        true => Err("switched off by TEGULA_CUDA_PTX=off"),
        false => unit.shipped(),
    };
    let refused = match shipped {
        Err(why) => why.to_owned(),
        Ok(ptx) => match gpu.module(&terminated(&ptx)) {
            Ok(module) => return Ok(module),
            Err(result) => format!("{result:?}"),
        },
    };
    let (major, minor) = gpu.arch;
    let compiled = unit.compile(&format!("compute_{major}{minor}"));
    let why = match compiled.map(|ptx| gpu.module(&terminated(&ptx))) {
        Ok(Ok(module)) => return Ok(module),
        Ok(Err(result)) => format!("the one compiled here: {result:?}"),
        Err(why) => why,
    };
    Err(no_image(&gpu.name, unit, gpu.arch, &refused, &why))
}

/// No kernels for a GPU: neither the shipped ones nor any that could be made here.
fn no_image(
    gpu: &str,
    unit: Unit,
    (major, minor): (i32, i32),
    shipped: &str,
    compiled: &str,
) -> DeviceError {
    DeviceError::Unusable(format!(
        "{gpu}: no image of kernels `{}` for compute capability {major}.{minor}: the shipped PTX: \
         {shipped}; {compiled}",
        unit.name()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_image_is_said_with_both_reasons() {
        let unit = Unit::Mul(GgmlType::I8);
        let shipped = unit.shipped().unwrap_err();
        let error = no_image("CUDA0", unit, (9, 0), shipped, "NVRTC is not installed");
        assert!(matches!(error, DeviceError::Unusable(_)));
        assert_eq!(
            error.to_string(),
            "CUDA0: no image of kernels `mul_I8` for compute capability 9.0: the shipped PTX: none \
             is shipped; NVRTC is not installed"
        );
    }
}
