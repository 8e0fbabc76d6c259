//! The device: memory, copies, scratch and recordings. What it computes is in
//! [`crate::operations`].

use crate::{
    blas::Blas,
    copies::Ring,
    driver::{Gpu, Recorded},
    launch::{Kv, PlaneTable, Q8, Where, launch},
    modules::{Modules, Unit},
    streaming::Stage,
};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};
use tegula_gguf::{GgmlType, blocks::grids};
use tegula_kernels::{
    device::{
        Budget, Buffer, DeviceError, DeviceInfo, Ended, LIBRARY_WORKSPACE, Matrix, Memory, Places,
        Recording, Result, planes,
    },
    kv::{KvShape, KvType},
};

/// Tokens up to which rows of weights are multiplied one by one.
pub(crate) const FEW: usize = 8;
/// Operations of the recordings that are kept: prompts of every length would fill memory with
/// them. A hybrid has a recording per layer.
const RECORDED: usize = 32 << 10;

/// A GPU's memory, counted where a GPU is presented as several.
pub(crate) struct Pool {
    pub(crate) gpu: Gpu,
    budget: Option<Budget>,
}

impl Memory for Pool {
    fn free(&self, address: u64, bytes: usize) {
        if let Some(budget) = &self.budget {
            budget.give(bytes);
        }
        self.gpu.free(address);
    }
}

impl Pool {
    pub(crate) fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        if let Some(budget) = &self.budget {
            budget.take(bytes)?;
        }
        match self.gpu.alloc(bytes) {
            Ok(address) => Ok(Buffer::new(address, bytes, Arc::clone(self) as _)),
            Err(error) => {
                if let Some(budget) = &self.budget {
                    budget.give(bytes);
                }
                Err(error)
            }
        }
    }
}

/// A buffer's contents in other forms, made along with it or for an earlier product.
#[derive(Clone, Copy)]
struct Prepared {
    of: u64,
    len: usize,
    q8: Option<Q8>,
    bf16: Option<u64>,
}

struct State {
    /// Buffers of the device's own, by use; each grows to the largest use and stays.
    scratch: HashMap<&'static str, Buffer>,
    prepared: Option<Prepared>,
    /// Keys of operations that were issued once, so that nothing more is allocated by them.
    seen: HashSet<Vec<u64>>,
    recordings: HashMap<Vec<u64>, Recorded>,
    /// The key that is being recorded.
    recording: Option<Vec<u64>>,
    /// Recordings failed: nothing is recorded any more.
    eager: bool,
    notes: Vec<String>,
}

/// cuBLAS on this device, and what it works in.
struct Library {
    blas: Mutex<Blas>,
    _workspace: Buffer,
}

/// One GPU, or a part of one.
pub struct CudaDevice {
    library: OnceLock<Result<Library, String>>,
    state: Mutex<State>,
    pub(crate) ring: Mutex<Ring>,
    /// Where weights that stream pass through; made with the first slot for them.
    pub(crate) stage: Mutex<Option<Stage>>,
    pub(crate) modules: Modules,
    pub(crate) grids: Buffer,
    /// How many blocks of a kernel have ended whose last one does more, a u32; zero between kernels.
    pub(crate) counter: Buffer,
    pub(crate) pool: Arc<Pool>,
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.recordings.clear();
        let ring = self.ring.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the ring came from `pinned`; after waiting nothing reads it.
        unsafe {
            let _ = self.pool.gpu.sync();
            self.pool.gpu.free_pinned(ring.start);
        }
    }
}

pub(crate) fn failed(gpu: &Gpu, operation: &'static str, cause: String) -> DeviceError {
    DeviceError::Failed {
        device: gpu.name.clone(),
        operation,
        cause,
    }
}

pub(crate) fn is_float(ty: GgmlType) -> bool {
    !ty.is_quantized()
}

/// True if tensor cores multiply the matrix with many tokens.
pub(crate) fn on_tensor_cores(ty: GgmlType, k: usize) -> bool {
    ty != GgmlType::F32 && k.is_multiple_of(32)
}

fn codebooks() -> Vec<u8> {
    let mut out = Vec::with_capacity(33_920);
    let bytes = |v: &i8| *v as u8;
    out.extend(grids::IQ2_XXS.as_flattened().iter().map(bytes));
    out.extend(grids::IQ2_XS.as_flattened().iter().map(bytes));
    out.extend(grids::IQ2_S.as_flattened().iter().map(bytes));
    out.extend(grids::IQ1.as_flattened().iter().map(bytes));
    out.extend(grids::IQ3_XXS.as_flattened().iter().map(bytes));
    out.extend(grids::IQ3_S.as_flattened().iter().map(bytes));
    out.extend_from_slice(&grids::SIGNS);
    out
}

fn kv_number(ty: KvType) -> i32 {
    match ty {
        KvType::F16 => 0,
        KvType::BF16 => 1,
        KvType::Q8_0 => 2,
    }
}

pub(crate) fn where_of(places: &Places) -> Where {
    Where {
        tokens: places.tokens.address(),
        pages: places.pages.address(),
    }
}

impl CudaDevice {
    /// Opens GPU `ordinal` under a name, with a share of its memory if it is one of several.
    ///
    /// # Errors
    /// When the driver refuses, or the GPU is older than compute capability 8.0.
    pub(crate) fn open(ordinal: usize, name: &str, parts: u64) -> Result<CudaDevice> {
        let gpu = Gpu::open(ordinal, name)?;
        if gpu.arch < (8, 0) {
            let (major, minor) = gpu.arch;
            return Err(DeviceError::Unusable(format!(
                "{name} ({}): compute capability {major}.{minor}; 8.0 or later is needed",
                gpu.description
            )));
        }
        let (free, _) = gpu.memory()?;
        let pool = Arc::new(Pool {
            gpu,
            budget: (parts > 1).then(|| Budget::new(name, free / parts)),
        });
        let books = codebooks();
        let device = CudaDevice {
            library: OnceLock::new(),
            stage: Mutex::new(None),
            ring: Mutex::new(Ring::new(&pool.gpu)?),
            state: Mutex::new(State {
                scratch: HashMap::new(),
                prepared: None,
                seen: HashSet::new(),
                recordings: HashMap::new(),
                recording: None,
                eager: false,
                notes: Vec::new(),
            }),
            modules: Modules::default(),
            grids: pool.alloc(books.len())?,
            counter: pool.alloc(4)?,
            pool,
        };
        device.write_at(&device.grids, 0, &books)?;
        device.write_at(&device.counter, 0, &[0; 4])?;
        Ok(device)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is, and how much memory is free now.
    pub(crate) fn describe(&self) -> Result<DeviceInfo> {
        let (mut free, mut total) = self.pool.gpu.memory()?;
        if let Some(budget) = &self.pool.budget {
            total = budget.total();
            free = free.min(budget.free());
        }
        Ok(DeviceInfo {
            name: self.pool.gpu.name.clone(),
            description: self.pool.gpu.description.clone(),
            total,
            free,
        })
    }

    /// How a file's blocks become a matrix's planes.
    pub(crate) fn plane_table(&self, matrix: &Matrix) -> PlaneTable {
        let (ty, planes) = (matrix.ty, planes(matrix.ty));
        let mut table = PlaneTable {
            to: self.mat(matrix).planes,
            at: [0; 5],
            len: [0; 5],
            count: planes.len() as i32,
            block: ty.block_bytes() as i32,
        };
        for (i, plane) in planes.iter().enumerate() {
            table.at[i] = plane.at as i32;
            table.len[i] = plane.len as i32;
        }
        table
    }

    /// The address of a buffer of the device's own.
    pub(crate) fn scratch(&self, what: &'static str, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        if let Some(buffer) = state.scratch.get(what)
            && buffer.bytes() >= bytes
        {
            return Ok(buffer.address());
        }
        // Recordings name the old one.
        state.recordings.clear();
        state.seen.clear();
        state.scratch.remove(what);
        let buffer = self.pool.alloc(bytes)?;
        let address = buffer.address();
        state.scratch.insert(what, buffer);
        Ok(address)
    }

    /// A place for the q8 form of `m` rows of `k`, among buffers of these names.
    pub(crate) fn q8_scratch(&self, names: [&'static str; 3], m: usize, k: usize) -> Result<Q8> {
        let groups = m * k / 32;
        Ok(Q8 {
            codes: self.scratch(names[0], m * k)?,
            scales: self.scratch(names[1], 4 * groups)?,
            sums: self.scratch(names[2], 8 * groups)?,
        })
    }

    /// The buffer at this address is about to change.
    pub(crate) fn overwritten(&self, address: u64) {
        let mut state = self.state();
        if state.prepared.is_some_and(|p| p.of == address) {
            state.prepared = None;
        }
    }

    /// Places for other forms of `m` rows of `k` that are about to be written to `of`, as the
    /// next product will take them: an operation that is given them must fill them. Zeros
    /// where there is none.
    pub(crate) fn prepare(&self, of: u64, m: usize, k: usize) -> Result<(Q8, u64)> {
        self.overwritten(of);
        if !k.is_multiple_of(32) {
            return Ok((Q8::default(), 0));
        }
        let (q8, bf16) = match m <= FEW {
            true => (Some(self.q8_scratch(INPUT, m, k)?), None),
            false => (None, Some(self.scratch("rounded", 2 * m * k)?)),
        };
        self.state().prepared = Some(Prepared {
            of,
            len: m * k,
            q8,
            bf16,
        });
        Ok((q8.unwrap_or_default(), bf16.unwrap_or(0)))
    }

    /// Forms of a buffer that there already are.
    fn prepared(&self, of: u64, len: usize) -> Prepared {
        let found = self.state().prepared.filter(|p| p.of == of && p.len == len);
        found.unwrap_or(Prepared {
            of,
            len,
            q8: None,
            bf16: None,
        })
    }

    /// The q8 form of `m` rows of `k` at `x`.
    pub(crate) fn quantized(&self, x: u64, m: usize, k: usize) -> Result<Q8> {
        let mut forms = self.prepared(x, m * k);
        if let Some(q8) = forms.q8 {
            return Ok(q8);
        }
        let q8 = self.q8_scratch(INPUT, m, k)?;
        let groups = (m * k / 32) as u64;
        let grid = [(m * k / 32).div_ceil(8), 1, 1];
        let (unit, name) = (Unit::Rows, c"quantize");
        launch!(self, unit, name, grid, 256, 0, x, groups, k as i32, q8)?;
        forms.q8 = Some(q8);
        self.state().prepared = Some(forms);
        Ok(q8)
    }

    /// Pairs of bf16 of `len` values at `x`.
    pub(crate) fn rounded(&self, x: u64, len: usize) -> Result<u64> {
        let mut forms = self.prepared(x, len);
        if let Some(bf16) = forms.bf16 {
            return Ok(bf16);
        }
        let out = self.scratch("rounded", 2 * len)?;
        let (grid, pairs) = ([(len / 2).div_ceil(256), 1, 1], (len / 2) as u64);
        let (unit, name) = (Unit::Rows, c"round_bf16");
        launch!(self, unit, name, grid, 256, 0, x, pairs, out)?;
        forms.bf16 = Some(out);
        self.state().prepared = Some(forms);
        Ok(out)
    }

    /// cuBLAS, if it is installed and not switched off by `TEGULA_CUDA_BLAS=off`.
    pub(crate) fn blas(&self) -> Option<MutexGuard<'_, Blas>> {
        let open = || {
            if crate::switched_off("TEGULA_CUDA_BLAS") {
                return Err("switched off".to_owned());
            }
            let workspace = self
                .pool
                .alloc(LIBRARY_WORKSPACE)
                .map_err(|e| e.to_string())?;
            let blas = Blas::open(&self.pool.gpu, workspace.address())?;
            Ok(Library {
                blas: Mutex::new(blas),
                _workspace: workspace,
            })
        };
        let library = self.library.get_or_init(open).as_ref().ok()?;
        Some(library.blas.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn kv(&self, cache: &Buffer, shape: &KvShape) -> Kv {
        let page = shape.layer_page_bytes();
        Kv {
            cache: cache.address(),
            k_type: kv_number(shape.k),
            v_type: kv_number(shape.v),
            heads: shape.heads as i32,
            dim: shape.dim as i32,
            k_bytes: shape.k.page_bytes(shape.dim) as i32,
            head_bytes: (page / shape.heads) as i32,
            page_bytes: page as i32,
        }
    }

    /// Loads every kernel, to see that the device takes them all.
    ///
    /// # Errors
    /// For the first that it does not take.
    pub fn load_all(&self) -> Result<()> {
        for &unit in crate::modules::UNITS {
            let name = match unit {
                Unit::Rows => c"rms_norm",
                Unit::Attention => c"attention_8_f16",
                Unit::Mul(_) => c"mul_mat_64",
            };
            self.modules.function(&self.pool.gpu, unit, name)?;
        }
        Ok(())
    }

    pub(crate) fn begin_recording(&self, key: &[u64]) -> Result<Recording> {
        let mut state = self.state();
        state.prepared = None;
        // Somebody's that was never ended.
        if state.recording.take().is_some() {
            self.pool.gpu.drop_capture();
        }
        if let Some(recorded) = state.recordings.get(key) {
            self.pool.gpu.replay(recorded)?;
            return Ok(Recording::Replayed);
        }
        // The first time everything that is needed is allocated, the second time recorded.
        if !state.eager && !state.seen.insert(key.to_vec()) {
            match self.pool.gpu.begin_capture() {
                Ok(()) => state.recording = Some(key.to_vec()),
                Err(error) => state.only_eager(&self.pool.gpu, &error.to_string()),
            }
        }
        Ok(Recording::Issue)
    }

    pub(crate) fn end_recording(&self) -> Result<Ended> {
        let mut state = self.state();
        state.prepared = None;
        let Some(key) = state.recording.take() else {
            return Ok(Ended::Done);
        };
        let recorded = match self.pool.gpu.end_capture() {
            Ok(recorded) => recorded,
            Err(why) => {
                state.only_eager(&self.pool.gpu, &why);
                return Ok(Ended::Again);
            }
        };
        self.pool.gpu.replay(&recorded)?;
        let held: usize = state.recordings.values().map(|r| r.operations).sum();
        if held + recorded.operations > RECORDED {
            state.recordings.clear();
        }
        state.recordings.insert(key, recorded);
        Ok(Ended::Done)
    }

    pub(crate) fn forget_recordings(&self) {
        let mut state = self.state();
        state.recordings.clear();
        state.seen.clear();
        state.prepared = None;
    }

    pub(crate) fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.state().notes)
    }
}

/// Names of the buffers that hold the inputs of products.
const INPUT: [&str; 3] = ["codes", "scales", "sums"];

impl State {
    /// Stops recording, and says so once.
    fn only_eager(&mut self, gpu: &Gpu, why: &str) {
        if !self.eager {
            let name = &gpu.name;
            self.notes.push(format!(
                "{name}: operations are issued one by one, since recording them failed: {why}"
            ));
        }
        self.eager = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::{Attended, HeadsOf, Mat, Parts, PlaneTable, Products};

    #[test]
    fn parameters_lie_as_the_kernels_expect() {
        assert_eq!(size_of::<Mat>(), 56);
        assert_eq!(size_of::<Products>(), 232);
        assert_eq!(size_of::<Kv>(), 40);
        assert_eq!(size_of::<PlaneTable>(), 88);
        assert_eq!(size_of::<Q8>(), 24);
        assert_eq!(size_of::<Attended>(), 40);
        assert_eq!(size_of::<HeadsOf>(), 24);
        assert_eq!(size_of::<Parts>(), 120);
    }

    #[test]
    fn codebooks_are_where_the_kernels_look() {
        let books = codebooks();
        assert_eq!(books.len(), 33_792 + 128);
        assert_eq!(books[2048..2056], grids::IQ2_XS[0].map(|v| v as u8));
        assert_eq!(books[14_336..14_344], grids::IQ1[0].map(|v| v as u8));
        assert_eq!(books[33_793], grids::SIGNS[1]);
    }
}
