//! Loading: executes the plan.

use crate::{
    Error, ModelConfig, Plan, PlanFlags, Result,
    lora::{AdapterInfo, Adapters, LoraFile},
    models::{
        Attention, Ffn, FfnKind, Layer, LayerShares, Matrices, Network, Output, Placed, SharedRows,
        Streamed,
    },
    offload::{self, OffloadFlags, Unit},
    packed::{self, PackedFile},
    plan::{Buffer, Encoding, plan},
    scales,
    share::DecodeShare,
    tensor_split::{Cut, TensorSplit},
};
use std::{
    panic::resume_unwind,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tegula_gguf::{Bytes, Gguf, OpenOptions, TensorInfo, Tokenizer, blocks, sparse};
use tegula_kernels::{
    Amx, Compute, PoolConfig, Tier, Weights,
    device::{self, Device, DeviceError, RawMatrix},
    weights::WeightsError,
};

/// How long idle threads spin where the CPU and devices take turns: longer than most devices work on
/// their part of a token.
const HYBRID_SPIN: Duration = Duration::from_millis(3);

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum Source {
    Path(PathBuf),
    /// A file inside the program.
    Embedded {
        bytes: &'static [u8],
        name: &'static str,
    },
}

/// How to load a model.
#[derive(Clone)]
pub struct LoadOptions {
    pub source: Source,
    pub mmap: bool,
    pub mlock: bool,
    pub huge_pages: bool,
    /// Repack matrices where it pays.
    pub repack: bool,
    /// Pack matrices that have many zeros without them.
    pub sparse_pack: bool,
    /// Adapters that change matrices, all at once.
    pub lora: Vec<LoraFile>,
    /// Keep the packed matrices in this file and map them from it; it is written when it is
    /// not there or does not fit.
    pub packed_cache: Option<PathBuf>,
    /// The highest tier to use; what the CPU lacks is never used.
    pub tier: Tier,
    /// Use AMX, with this right to.
    pub amx: Option<Amx>,
    pub threads: usize,
    /// Spread the threads over all memory nodes.
    pub distribute: bool,
    /// Refuse a model whose weights take more than these bytes of memory besides the mapped
    /// file.
    pub memory: Option<u64>,
    /// Devices in use; [`OffloadFlags::devices`] describes the same ones.
    pub devices: Vec<Arc<dyn Device>>,
    /// What goes to them.
    pub offload: OffloadFlags,
}

impl std::fmt::Debug for LoadOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "LoadOptions({:?}, {} devices)",
            self.source,
            self.devices.len()
        )
    }
}

impl LoadOptions {
    /// Mapped, repacked, with all that the CPU has.
    pub fn new(source: Source) -> LoadOptions {
        LoadOptions {
            source,
            mmap: true,
            mlock: false,
            huge_pages: true,
            repack: true,
            sparse_pack: true,
            lora: Vec::new(),
            packed_cache: None,
            tier: Tier::detect_max(),
            amx: None,
            threads: crate::threads::default_threads(),
            distribute: false,
            memory: None,
            devices: Vec::new(),
            offload: OffloadFlags::default(),
        }
    }

    /// Uses these devices.
    ///
    /// # Errors
    /// When one can't say what it is.
    pub fn with_devices(mut self, devices: Vec<Arc<dyn Device>>) -> Result<LoadOptions> {
        let infos = devices.iter().map(|d| d.info());
        self.offload.devices = infos.collect::<Result<_, _>>()?;
        self.devices = devices;
        Ok(self)
    }

    /// Opens the file, without loading anything.
    pub fn open(&self) -> Result<Gguf> {
        Ok(match &self.source {
            Source::Path(path) => Gguf::open_with(
                path,
                &OpenOptions {
                    mmap: self.mmap,
                    populate: false,
                    mlock: self.mlock,
                    huge_pages: self.huge_pages,
                },
            )?,
            Source::Embedded { bytes, name } => Gguf::from_static(bytes, name)?,
        })
    }

    /// The adapters, checked against the model, and the flags that the plan depends on.
    ///
    /// # Errors
    /// When an adapter can't be used.
    pub fn adapters_and_flags(
        &self,
        gguf: &Gguf,
        config: &ModelConfig,
    ) -> Result<(Adapters, PlanFlags)> {
        let adapters = Adapters::open(&self.lora, gguf, config)?;
        let mut flags = self.plan_flags();
        flags.offload.adapted = adapters.by_tensor();
        Ok((adapters, flags))
    }

    /// The same flags without adapters.
    pub fn plan_flags(&self) -> PlanFlags {
        let tier = self.tier.min(Tier::detect_max());
        PlanFlags {
            tier,
            amx: self.amx,
            repack: self.repack,
            sparse_pack: self.sparse_pack,
            mmap: self.mmap,
            packed_cache: self.packed_cache.is_some(),
            threads: self.threads,
            offload: self.offload.clone(),
        }
    }
}

/// Progress of [`Model::load`].
#[derive(Clone, Copy, Debug)]
pub enum LoadEvent<'a> {
    /// A tensor is in its place; counts are of bytes in the file.
    Tensor {
        name: &'a str,
        done: u64,
        total: u64,
    },
    /// A tensor is in the packed file that is being written; counts are of bytes in it.
    Packed {
        name: &'a str,
        done: u64,
        total: u64,
    },
    /// What became of the packed file that was asked for.
    PackedFile(&'a PackedFile),
}

/// A loaded model: read-only, shared by all contexts.
pub struct Model {
    config: ModelConfig,
    plan: Plan,
    adapters: Vec<AdapterInfo>,
    tokenizer: Tokenizer,
    gguf: Gguf,
    pub(crate) compute: Compute,
    pub(crate) matrices: Matrices,
    pub(crate) devices: Vec<Arc<dyn Device>>,
    load_ms: f64,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Model({} {:?})", self.config.arch, self.config.name)
    }
}

impl Model {
    /// Opens, plans and loads.
    pub fn load(options: &LoadOptions, progress: &mut dyn FnMut(LoadEvent<'_>)) -> Result<Model> {
        let start = Instant::now();
        let gguf = options.open()?;
        let config = ModelConfig::from_gguf(&gguf)?;
        let (adapters, mut flags) = options.adapters_and_flags(&gguf, &config)?;
        flags.offload.check()?;
        let mut placed = plan(&config, &gguf, &flags);
        let mut pool = PoolConfig {
            distribute: options.distribute,
            ..PoolConfig::new(options.threads)
        };
        let offload = &placed.offload;
        if !offload.is_cpu_only() && offload.only_device().is_none() {
            // Devices take longer for their layers of a token than threads spin otherwise, and
            // waking all of them takes a part of what the CPU's layers take.
            pool.spin = HYBRID_SPIN;
        }
        let compute = match options.amx {
            None => Compute::new(flags.tier, pool),
            Some(amx) => Compute::with_amx(flags.tier, amx, pool),
        };
        let cache = options
            .packed_cache
            .as_ref()
            .and_then(|path| packed::open(path, &gguf, &placed, &compute.pool, progress));
        if flags.packed_cache && cache.is_none() {
            flags.packed_cache = false;
            placed = plan(&config, &gguf, &flags);
        }
        placed.offload.check_memory()?;
        let needed = placed.bytes_in(Buffer::Heap)
            + placed.bytes_in(Buffer::Packed)
            + placed.adapter_bytes();
        if let Some(available) = options.memory.filter(|&limit| needed > limit) {
            return Err(Error::Memory {
                file: gguf.metadata().origin().to_owned(),
                needed,
                available,
            });
        }
        let room = options.memory.map_or(u64::MAX, |limit| limit - needed);
        let pinned = match pin(&placed, &options.devices, room)? {
            Ok(pinned) => pinned,
            Err(why) => {
                flags.offload.decode_share = DecodeShare::Fraction(0.0);
                placed = plan(&config, &gguf, &flags);
                placed.offload.summary += &format!("; no share of single tokens on a GPU: {why}");
                None
            }
        };
        let plan = placed;
        let total = plan.placements.iter().map(|p| p.bytes).sum();
        let mut loader = Loader {
            gguf: &gguf,
            plan: &plan,
            adapters: &adapters,
            compute: &compute,
            cache: cache.as_ref(),
            devices: &options.devices,
            pinned,
            progress,
            done: 0,
            total,
        };
        // A large vocabulary takes as long as a large matrix.
        let (tokenizer, matrices) = thread::scope(|scope| {
            let tokenizer = scope.spawn(|| Tokenizer::from_gguf(&gguf));
            let matrices = loader.matrices(&config);
            let tokenizer = tokenizer.join().unwrap_or_else(|e| resume_unwind(e));
            (tokenizer, matrices)
        });
        let (tokenizer, matrices) = (tokenizer?, matrices?);
        let load_ms = start.elapsed().as_secs_f64() * 1e3;
        Ok(Model {
            config,
            plan,
            adapters: adapters.infos().to_vec(),
            tokenizer,
            gguf,
            compute,
            matrices,
            devices: options.devices.clone(),
            load_ms,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The LoRA adapters in use.
    pub fn adapters(&self) -> &[AdapterInfo] {
        &self.adapters
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The file, for its metadata and the tensors that no graph reads.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// Pool and kernels.
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// What a user should know of how the devices have worked, since the last call.
    pub fn device_notes(&self) -> Vec<String> {
        self.devices.iter().flat_map(|d| d.notes()).collect()
    }

    /// What goes into the first layer for these tokens, `[tokens][embd]`.
    ///
    /// # Panics
    /// When the vocabulary lacks a token.
    pub fn embed(&self, ids: &[u32]) -> Vec<f32> {
        let mut x = vec![0.0; ids.len() * self.config.embd];
        self.compute.get_rows(&self.matrices.embedding, ids, &mut x);
        x
    }

    /// How long loading took.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }
}

/// Memory for the shares of a plan, if it has some, no more than `room` bytes; or why there is
/// none.
fn pin(
    plan: &Plan,
    devices: &[Arc<dyn Device>],
    room: u64,
) -> Result<Result<Option<Pinned>, String>> {
    let Some(shares) = plan.offload.shares else {
        return Ok(Ok(None));
    };
    if shares.bytes > room {
        return Ok(Err(format!(
            "it needs {} bytes of pinned memory, and {room} are left",
            shares.bytes
        )));
    }
    match devices[shares.device].pin(shares.bytes as usize) {
        Ok(memory) => Ok(Ok(Some(Pinned {
            memory: Arc::new(memory),
            used: 0,
        }))),
        Err(error @ DeviceError::Pinned { .. }) => Ok(Err(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

/// Memory of which matrices take parts, one behind another.
struct Pinned {
    memory: Arc<device::Buffer>,
    used: usize,
}

struct Loader<'a> {
    gguf: &'a Gguf,
    plan: &'a Plan,
    adapters: &'a Adapters,
    compute: &'a Compute,
    cache: Option<&'a packed::Cache>,
    devices: &'a [Arc<dyn Device>],
    pinned: Option<Pinned>,
    progress: &'a mut dyn FnMut(LoadEvent<'_>),
    done: u64,
    total: u64,
}

impl Loader<'_> {
    fn file(&self) -> String {
        self.gguf.metadata().origin().to_owned()
    }

    fn wrong(&self, tensor: &TensorInfo, what: String) -> Error {
        Error::Tensor {
            file: self.file(),
            tensor: tensor.name.clone(),
            what,
        }
    }

    fn count(&mut self, name: &str) {
        self.done += self.plan.get(name).map_or(0, |p| p.bytes);
        (self.progress)(LoadEvent::Tensor {
            name,
            done: self.done,
            total: self.total,
        });
    }

    /// The tensor with the given shape (ggml order, trailing ones optional).
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let tensor = self.gguf.require_tensor(name)?;
        let mut got: Vec<u64> = tensor.shape.clone();
        while got.len() > shape.len() && got.last() == Some(&1) {
            got.pop();
        }
        let want: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        if got == want {
            Ok(tensor)
        } else {
            Err(self.wrong(
                tensor,
                format!("has shape {:?} where {want:?} was expected", tensor.shape),
            ))
        }
    }

    /// A small tensor as f32.
    fn vector(&mut self, name: &str, len: usize, counted: bool) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, &[len])?;
        let mut values = vec![0.0; len];
        blocks::dequantize(tensor.ty, self.gguf.data(tensor), &mut values)
            .map_err(|e| self.wrong(tensor, e.to_string()))?;
        if counted {
            self.count(name);
        }
        Ok(values)
    }

    /// A matrix of `[k, n]` or a stack of them, in the encoding that the plan gives it.
    fn matrix(
        &mut self,
        name: &str,
        k: usize,
        n: usize,
        experts: Option<usize>,
    ) -> Result<Weights> {
        let shape = [k, n, experts.unwrap_or(1)];
        let tensor = self.tensor(name, &shape[..if experts.is_some() { 3 } else { 2 }])?;
        let refused = |source| Error::Weights {
            file: self.file(),
            tensor: name.to_owned(),
            source,
        };
        let experts = experts.unwrap_or(1);
        let place = self.plan.get(name);
        let packed = place.is_some_and(|p| p.encoding == Encoding::Strip16);
        let mut weights = if tensor.ty.is_sparse() {
            let sparse = self.sparse(tensor, n, k, experts)?;
            match place.is_some_and(|p| p.buffer == Buffer::Packed) {
                true => {
                    let packed = sparse.pack(&self.compute.pool);
                    self.gguf.bytes(tensor).release();
                    packed
                }
                false => sparse,
            }
        } else if place.is_some_and(|p| p.encoding == Encoding::Sparse16) {
            self.without_zeros(tensor, n, k, experts)?
        } else if let Some(strips) = self.cache.and_then(|c| c.strips(name)) {
            Weights::from_strips(tensor.ty, n, k, experts, strips).map_err(refused)?
        } else {
            let bytes: Bytes = self.gguf.bytes(tensor);
            let raw = Weights::raw(tensor.ty, n, k, experts, bytes.clone()).map_err(refused)?;
            if packed {
                let packed = raw.pack(&self.compute.pool);
                bytes.release();
                packed
            } else {
                raw
            }
        };
        if let Some(scale) = scales::of(self.gguf, name) {
            let factors = self.vector(&scale.name, experts, true)?;
            let scaled = weights.scale_by(factors);
            scaled.expect("as many factors as experts were asked for");
        }
        self.adapters.adapt(name, &mut weights, &self.compute.pool);
        self.count(name);
        Ok(weights)
    }

    /// A sparse matrix as the file has it.
    fn sparse(&self, tensor: &TensorInfo, n: usize, k: usize, experts: usize) -> Result<Weights> {
        let bytes = self.gguf.bytes(tensor);
        let pool = &self.compute.pool;
        Weights::sparse(tensor.ty, n, k, experts, bytes, pool).map_err(|source| Error::Weights {
            file: self.file(),
            tensor: tensor.name.clone(),
            source,
        })
    }

    /// A dense matrix without its zeros, on large pages.
    fn without_zeros(
        &self,
        tensor: &TensorInfo,
        n: usize,
        k: usize,
        experts: usize,
    ) -> Result<Weights> {
        let bytes = self.gguf.bytes(tensor);
        let refused = |source: WeightsError| Error::Weights {
            file: self.file(),
            tensor: tensor.name.clone(),
            source,
        };
        let ty = tensor.ty.sparse().unwrap_or(tensor.ty);
        let packed = sparse::pack_tensor(ty, &tensor.shape, None, &bytes);
        let packed = packed.map_err(|e| refused(e.into()))?;
        bytes.release();
        let pool = &self.compute.pool;
        let sparse = Weights::sparse(ty, n, k, experts, Bytes::from_vec(packed), pool);
        Ok(sparse.map_err(refused)?.pack(pool))
    }

    /// A matrix as devices take it, with the bytes that it is made of.
    fn raw(
        &self,
        name: &str,
        k: usize,
        n: usize,
        experts: Option<usize>,
    ) -> Result<(RawMatrix, Bytes)> {
        let shape = [k, n, experts.unwrap_or(1)];
        let tensor = self.tensor(name, &shape[..if experts.is_some() { 3 } else { 2 }])?;
        let bytes: Bytes = if tensor.ty.is_sparse() {
            let sparse = self.sparse(tensor, n, k, experts.unwrap_or(1))?;
            Bytes::from_vec(sparse.unpack_raw(&self.compute.pool))
        } else {
            self.gguf.bytes(tensor)
        };
        let ty = tensor.ty.dense();
        let raw = RawMatrix::new(ty, n, k, experts.unwrap_or(1), bytes.clone());
        let raw = raw.map_err(|source| Error::Weights {
            file: self.file(),
            tensor: name.to_owned(),
            source,
        })?;
        Ok((raw, bytes))
    }

    /// The same, or what it holds of it, on a device, which takes sparse weights as dense ones.
    fn device_matrix(
        &mut self,
        to: &OnDevice,
        name: &str,
        k: usize,
        n: usize,
        experts: Option<usize>,
    ) -> Result<device::Matrix> {
        let (raw, bytes) = self.raw(name, k, n, experts)?;
        let matrix = match to.cut(name) {
            Cut::Whole | Cut::Nothing => to.device.load(&raw)?,
            Cut::Rows(rows) => to.device.load(&raw.rows(rows))?,
            Cut::Columns(columns) => to.device.load(&raw.columns(columns))?,
        };
        bytes.release();
        if to.counted {
            self.count(name);
        }
        Ok(matrix)
    }

    /// The shares of matrices `(name, k, n)` that are multiplied together, in pinned memory.
    fn shared(&mut self, matrices: &[(&str, usize, usize)]) -> Result<Option<SharedRows>> {
        let (Some(shares), Some(mut pinned)) = (self.plan.offload.shares, self.pinned.take())
        else {
            return Ok(None);
        };
        let device = &self.devices[shares.device];
        let mut one = |&(name, k, n): &(&str, usize, usize)| {
            let Some(share) = self.plan.get(name).and_then(|p| p.share) else {
                return Ok(None);
            };
            let (raw, _) = self.raw(name, k, n, None)?;
            let (at, len) = (pinned.used, share.bytes as usize);
            pinned.used += len;
            let buffer = device::Buffer::part(&pinned.memory, at, len);
            let rows = raw.rows(n - share.rows..n);
            Ok::<_, Error>(Some(device.load_to(&rows, buffer)?))
        };
        let loaded: Vec<_> = matrices.iter().map(&mut one).collect::<Result<_>>()?;
        self.pinned = Some(pinned);
        let some = loaded.iter().any(Option::is_some);
        Ok(some.then_some(SharedRows {
            device: shares.device,
            matrices: loaded,
        }))
    }

    /// The shares of a layer.
    fn layer_shares(&mut self, c: &ModelConfig, i: usize) -> Result<LayerShares> {
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let mut shared = |parts: &[(&str, usize, usize)]| {
            let name = |part| format!("blk.{i}.{part}.weight");
            let names: Vec<_> = parts.iter().map(|p| name(p.0)).collect();
            let both = names.iter().zip(parts);
            let matrices: Vec<_> = both.map(|(name, p)| (name.as_str(), p.1, p.2)).collect();
            self.shared(&matrices)
        };
        Ok(LayerShares {
            qkv: shared(&[
                ("attn_q", c.embd, q),
                ("attn_k", c.embd, kv),
                ("attn_v", c.embd, kv),
            ])?,
            out: shared(&[("attn_output", q, c.embd)])?,
            gate_up: shared(&[("ffn_gate", c.embd, c.ff), ("ffn_up", c.embd, c.ff)])?,
            down: shared(&[("ffn_down", c.ff, c.embd)])?,
        })
    }

    fn matrices(&mut self, c: &ModelConfig) -> Result<Matrices> {
        let own = self.gguf.tensor("output.weight").is_some();
        let output = if own {
            "output.weight"
        } else {
            "token_embd.weight"
        };
        let output_share = self.shared(&[(output, c.embd, c.vocab)])?;
        let embedding = self.matrix("token_embd.weight", c.embd, c.vocab, None)?;
        let layers = (0..c.layers)
            .map(|i| self.layer(c, i))
            .collect::<Result<_>>()?;
        let output = match self.plan.offload.device(Unit::Output) {
            offload::Device::Cpu => {
                Placed::Host(self.output(&Host, c, own.then_some("output.weight"))?)
            }
            offload::Device::Split => unreachable!("the output matrix is on one device"),
            offload::Device::Gpu(d) => {
                let to = OnDevice::whole(&self.devices[d]);
                Placed::Device(d, self.output(&to, c, Some(output))?)
            }
        };
        Ok(Matrices {
            embedding,
            output,
            output_share,
            layers,
        })
    }

    fn output<T: Target>(
        &mut self,
        to: &T,
        c: &ModelConfig,
        matrix: Option<&str>,
    ) -> Result<Output<T::Matrix, T::Vector>> {
        Ok(Output {
            norm: to.vector(self, "output_norm.weight", c.embd)?,
            matrix: matrix
                .map(|name| to.matrix(self, name, c.embd, c.vocab, None))
                .transpose()?,
        })
    }

    /// Loads one part of the model to where the plan puts it.
    fn placed<H, D>(
        &mut self,
        unit: Unit,
        host: impl FnOnce(&mut Self, &Host) -> Result<H>,
        device: impl Fn(&mut Self, &OnDevice) -> Result<D>,
    ) -> Result<Placed<H, D>> {
        Ok(match self.plan.offload.device(unit) {
            offload::Device::Cpu => Placed::Host(host(self, &Host)?),
            offload::Device::Gpu(d) => {
                let to = OnDevice::whole(&self.devices[d]);
                Placed::Device(d, device(self, &to)?)
            }
            offload::Device::Split => {
                let Some(split) = &self.plan.offload.tensor else {
                    unreachable!("a split unit without a split");
                };
                let devices = match unit {
                    Unit::Attention(_) => split.attending(),
                    Unit::Ffn(_) | Unit::Experts(_) | Unit::Output => split.feeding(),
                };
                let first = devices.first().copied();
                let part = |d: usize| {
                    let to = OnDevice {
                        device: Arc::clone(&self.devices[d]),
                        part: Some((split.clone(), d)),
                        counted: Some(d) == first,
                    };
                    (d, to)
                };
                let parts: Vec<_> = devices.into_iter().map(part).collect();
                let load = |(d, to): (usize, OnDevice)| Ok((d, device(self, &to)?));
                Placed::Split(parts.into_iter().map(load).collect::<Result<_>>()?)
            }
        })
    }

    /// What of a layer streams from the file's bytes.
    fn streamed(&self, c: &ModelConfig, i: usize) -> Result<Streamed> {
        let plan = &self.plan.offload.streams;
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let raw = |part: &str, k, n, experts| {
            let name = format!("blk.{i}.{part}.weight");
            Ok::<_, Error>(self.raw(&name, k, n, experts)?.0)
        };
        let network = |suffix: &str, ff, experts| {
            Ok::<_, Error>(Network {
                gate: raw(&format!("ffn_gate{suffix}"), c.embd, ff, experts)?,
                up: raw(&format!("ffn_up{suffix}"), c.embd, ff, experts)?,
                down: raw(&format!("ffn_down{suffix}"), ff, c.embd, experts)?,
            })
        };
        let mut streamed = Streamed::default();
        if let Some(stream) = plan.get(Unit::Attention(i)) {
            let qkv = [
                raw("attn_q", c.embd, q, None)?,
                raw("attn_k", c.embd, kv, None)?,
                raw("attn_v", c.embd, kv, None)?,
            ];
            let out = raw("attn_output", q, c.embd, None)?;
            streamed.attention = Some((stream, (qkv, out)));
        }
        if let Some(stream) = plan.get(Unit::Ffn(i)) {
            streamed.ffn = Some((stream, network("", c.ff, None)?));
        }
        if let (Some(stream), Some(e)) = (plan.get(Unit::Experts(i)), c.experts) {
            streamed.experts = Some((stream, network("_exps", e.ff, Some(e.count))?));
        }
        Ok(streamed)
    }

    fn layer(&mut self, c: &ModelConfig, i: usize) -> Result<Layer> {
        Ok(Layer {
            streamed: self.streamed(c, i)?,
            shares: self.layer_shares(c, i)?,
            attention: self.placed(
                Unit::Attention(i),
                |l, to| l.attention(to, c, i),
                |l, to| l.attention(to, c, i),
            )?,
            ffn: self.placed(
                Unit::Ffn(i),
                |l, to| l.ffn(to, c, i),
                |l, to| l.ffn(to, c, i),
            )?,
            experts: match c.experts {
                None => None,
                Some(e) => Some(self.placed(
                    Unit::Experts(i),
                    |l, to| l.network(to, i, "_exps", (c.embd, e.ff), Some(e.count)),
                    |l, to| l.network(to, i, "_exps", (c.embd, e.ff), Some(e.count)),
                )?),
            },
        })
    }

    fn attention<T: Target>(
        &mut self,
        to: &T,
        c: &ModelConfig,
        i: usize,
    ) -> Result<Attention<T::Matrix, T::Vector>> {
        let name = |part: &str| format!("blk.{i}.{part}");
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let norms = c.arch.has_qk_norm();
        let mut norm = |part: &str| {
            norms
                .then(|| to.vector(self, &name(part), c.head_dim))
                .transpose()
        };
        let (q_norm, k_norm) = (norm("attn_q_norm.weight")?, norm("attn_k_norm.weight")?);
        let mut bias = |part: &str, len| {
            let name = name(part);
            let there = self.gguf.tensor(&name).is_some() && to.holds(&name);
            there.then(|| to.vector(self, &name, len)).transpose()
        };
        let (q_bias, k_bias) = (bias("attn_q.bias", q)?, bias("attn_k.bias", kv)?);
        let (v_bias, out_bias) = (bias("attn_v.bias", kv)?, bias("attn_output.bias", c.embd)?);
        Ok(Attention {
            norm: to.vector(self, &name("attn_norm.weight"), c.embd)?,
            q: to.matrix(self, &name("attn_q.weight"), c.embd, q, None)?,
            k: to.matrix(self, &name("attn_k.weight"), c.embd, kv, None)?,
            v: to.matrix(self, &name("attn_v.weight"), c.embd, kv, None)?,
            q_bias,
            k_bias,
            v_bias,
            q_norm,
            k_norm,
            out: to.matrix(self, &name("attn_output.weight"), q, c.embd, None)?,
            out_bias,
        })
    }

    fn ffn<T: Target>(
        &mut self,
        to: &T,
        c: &ModelConfig,
        i: usize,
    ) -> Result<Ffn<T::Matrix, T::Vector>> {
        let kind = match c.experts {
            Some(e) => {
                let name = format!("blk.{i}.ffn_gate_inp.weight");
                FfnKind::Router(to.matrix(self, &name, c.embd, e.count, None)?)
            }
            None => FfnKind::Dense(self.network(to, i, "", (c.embd, c.ff), None)?),
        };
        Ok(Ffn {
            norm: to.vector(self, &format!("blk.{i}.ffn_norm.weight"), c.embd)?,
            kind,
        })
    }

    fn network<T: Target>(
        &mut self,
        to: &T,
        i: usize,
        suffix: &str,
        (embd, ff): (usize, usize),
        experts: Option<usize>,
    ) -> Result<Network<T::Matrix>> {
        let name = |part: &str| format!("blk.{i}.ffn_{part}{suffix}.weight");
        Ok(Network {
            gate: to.matrix(self, &name("gate"), embd, ff, experts)?,
            up: to.matrix(self, &name("up"), embd, ff, experts)?,
            down: to.matrix(self, &name("down"), ff, embd, experts)?,
        })
    }
}

/// Where tensors are loaded to.
trait Target {
    type Matrix;
    type Vector;

    /// Whether anything of a tensor belongs there.
    fn holds(&self, _name: &str) -> bool {
        true
    }

    fn matrix(
        &self,
        loader: &mut Loader<'_>,
        name: &str,
        k: usize,
        n: usize,
        experts: Option<usize>,
    ) -> Result<Self::Matrix>;

    fn vector(&self, loader: &mut Loader<'_>, name: &str, len: usize) -> Result<Self::Vector>;
}

/// The CPU.
struct Host;

impl Target for Host {
    type Matrix = Weights;
    type Vector = Vec<f32>;

    fn matrix(
        &self,
        loader: &mut Loader<'_>,
        name: &str,
        k: usize,
        n: usize,
        experts: Option<usize>,
    ) -> Result<Weights> {
        loader.matrix(name, k, n, experts)
    }

    fn vector(&self, loader: &mut Loader<'_>, name: &str, len: usize) -> Result<Vec<f32>> {
        loader.vector(name, len, true)
    }
}

/// A device, or its part of layers that are split.
struct OnDevice {
    device: Arc<dyn Device>,
    part: Option<(TensorSplit, usize)>,
    /// Whether loading counts as progress: for one device of those that share a tensor.
    counted: bool,
}

impl OnDevice {
    fn whole(device: &Arc<dyn Device>) -> OnDevice {
        OnDevice {
            device: Arc::clone(device),
            part: None,
            counted: true,
        }
    }

    fn cut(&self, name: &str) -> Cut {
        let of = |(split, d): &(TensorSplit, usize)| split.cut(name, *d);
        self.part.as_ref().map_or(Cut::Whole, of)
    }
}

impl Target for OnDevice {
    type Matrix = device::Matrix;
    type Vector = device::Buffer;

    fn holds(&self, name: &str) -> bool {
        self.cut(name) != Cut::Nothing
    }

    fn matrix(
        &self,
        loader: &mut Loader<'_>,
        name: &str,
        k: usize,
        n: usize,
        experts: Option<usize>,
    ) -> Result<device::Matrix> {
        loader.device_matrix(self, name, k, n, experts)
    }

    fn vector(&self, loader: &mut Loader<'_>, name: &str, len: usize) -> Result<device::Buffer> {
        let mut values = loader.vector(name, len, self.counted)?;
        if let Cut::Rows(rows) = self.cut(name) {
            values = values[rows].to_vec();
        }
        let buffer = self.device.alloc(4 * values.len())?;
        self.device
            .write(&buffer, 0, bytemuck::cast_slice(&values))?;
        Ok(buffer)
    }
}
