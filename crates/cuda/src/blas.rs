//! cuBLAS, where it is installed: products of many tokens with matrices of bf16.

use crate::driver::Gpu;
use libloading::Library;
use std::{
    ffi::{c_int, c_void},
    ptr,
    sync::OnceLock,
};
use tegula_kernels::device::LIBRARY_WORKSPACE;

/// Names under which the library is installed: of the driver's own generation first.
const NAMES: [&str; 3] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so"];

type Handle = *mut c_void;

/// As the library's headers have them.
const OP_N: c_int = 0;
const OP_T: c_int = 1;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const ALGO_DEFAULT: c_int = -1;

type GemmEx = unsafe extern "C" fn(
    Handle,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

struct Functions {
    create: unsafe extern "C" fn(*mut Handle) -> c_int,
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> c_int,
    set_workspace: unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int,
    gemm: GemmEx,
}

fn functions() -> Result<&'static Functions, String> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    let load = || {
        // SAFETY: loading runs the library's own initialisation, nothing else.
        let open = |name: &&str| unsafe { Library::new(*name) }.ok();
        let library = NAMES.iter().find_map(open);
        let library = library.ok_or("cuBLAS is not installed")?;
        // The library stays loaded as long as the process.
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the types are those of the library's headers, the same since 11.0.
                *unsafe { library.get($name.as_bytes()) }
                    .map_err(|_| concat!("cuBLAS has no ", $name))?
            };
        }
        Ok(Functions {
            create: symbol!("cublasCreate_v2"),
            destroy: symbol!("cublasDestroy_v2"),
            set_stream: symbol!("cublasSetStream_v2"),
            set_workspace: symbol!("cublasSetWorkspace_v2"),
            gemm: symbol!("cublasGemmEx"),
        })
    };
    LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// The library on one device's stream.
pub(crate) struct Blas {
    functions: &'static Functions,
    handle: Handle,
}

// SAFETY: the library's handle may be used from any thread, by one at a time; the device's
// caller issues one operation at a time.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    /// Opens the library for a device; it works in `workspace`, [`LIBRARY_WORKSPACE`] bytes there.
    ///
    /// # Errors
    /// When it is not installed or refuses, in words.
    pub fn open(gpu: &Gpu, workspace: u64) -> Result<Blas, String> {
        let f = functions()?;
        let stream = gpu.stream().map_err(|e| e.to_string())?;
        let mut handle = ptr::null_mut();
        let said = |what: &str, status: c_int| match status {
            0 => Ok(()),
            n => Err(format!("{what} says {n}")),
        };
        // SAFETY: the context is current; the handle is written once and destroyed once, with
        // what this makes of it. The workspace lives as long as the device.
        unsafe {
            said("cublasCreate", (f.create)(&raw mut handle))?;
            let blas = Blas {
                functions: f,
                handle,
            };
            said("cublasSetStream", (f.set_stream)(handle, stream.cast()))?;
            let place = ptr::with_exposed_provenance_mut(workspace as usize);
            said(
                "cublasSetWorkspace",
                (f.set_workspace)(handle, place, LIBRARY_WORKSPACE),
            )?;
            Ok(blas)
        }
    }

    /// `out[m][stride] (+)= x[m][k] · w[n][k]ᵀ`: bf16 by bf16, f32 sums. Addresses are the
    /// device's.
    ///
    /// # Errors
    /// The library's status.
    pub fn product(&self, shape: Shape, w: u64, x: u64, out: u64, add: bool) -> Result<(), String> {
        let at = |address: u64| ptr::with_exposed_provenance::<c_void>(address as usize);
        let to = ptr::with_exposed_provenance_mut::<c_void>(out as usize);
        let (one, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let [n, m, k, stride] =
            [shape.n, shape.m, shape.k, shape.stride].map(|v| c_int::try_from(v).unwrap_or(0));
        // SAFETY: the scalars are read before the call returns; the caller vouches for the
        // addresses. In the library's column-major terms the output is n by m.
        let status = unsafe {
            (self.functions.gemm)(
                self.handle,
                OP_T,
                OP_N,
                n,
                m,
                k,
                (&raw const one).cast(),
                at(w),
                R_16BF,
                k,
                at(x),
                R_16BF,
                k,
                (&raw const beta).cast(),
                to,
                R_32F,
                stride,
                COMPUTE_32F,
                ALGO_DEFAULT,
            )
        };
        match status {
            0 => Ok(()),
            status => Err(format!("cublasGemmEx says {status}")),
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made by `open`, destroyed once.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

/// Rows of weights, tokens, inputs, and the output's row length.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub n: usize,
    pub m: usize,
    pub k: usize,
    pub stride: usize,
}
