//! Loading: executes the plan.

use crate::{
    Error, ModelConfig, Plan, PlanFlags, Result,
    models::{Ffn, Layer, Matrices},
    packed::{self, PackedFile},
    plan::{Buffer, Encoding, plan},
};
use std::{panic::resume_unwind, path::PathBuf, thread, time::Instant};
use tegula_gguf::{Bytes, Gguf, OpenOptions, TensorInfo, Tokenizer, blocks};
use tegula_kernels::{Amx, Compute, PoolConfig, Tier, Weights};

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
#[derive(Clone, Debug)]
pub struct LoadOptions {
    pub source: Source,
    pub mmap: bool,
    pub mlock: bool,
    pub huge_pages: bool,
    /// Repack matrices where it pays.
    pub repack: bool,
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
            packed_cache: None,
            tier: Tier::detect_max(),
            amx: None,
            threads: crate::threads::default_threads(),
            distribute: false,
            memory: None,
        }
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

    /// The flags that the plan depends on.
    pub fn plan_flags(&self) -> PlanFlags {
        let tier = self.tier.min(Tier::detect_max());
        PlanFlags {
            tier,
            amx: self.amx,
            repack: self.repack,
            mmap: self.mmap,
            packed_cache: self.packed_cache.is_some(),
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
    tokenizer: Tokenizer,
    gguf: Gguf,
    pub(crate) compute: Compute,
    pub(crate) matrices: Matrices,
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
        let mut flags = options.plan_flags();
        let mut placed = plan(&config, &gguf, &flags);
        let pool = PoolConfig {
            distribute: options.distribute,
            ..PoolConfig::new(options.threads)
        };
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
        let plan = placed;
        let needed = plan.bytes_in(Buffer::Heap) + plan.bytes_in(Buffer::Packed);
        if let Some(available) = options.memory.filter(|&limit| needed > limit) {
            return Err(Error::Memory {
                file: gguf.metadata().origin().to_owned(),
                needed,
                available,
            });
        }
        let total = plan.placements.iter().map(|p| p.bytes).sum();
        let mut loader = Loader {
            gguf: &gguf,
            plan: &plan,
            compute: &compute,
            cache: cache.as_ref(),
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
            tokenizer,
            gguf,
            compute,
            matrices,
            load_ms,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
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

    /// How long loading took.
    pub fn load_ms(&self) -> f64 {
        self.load_ms
    }
}

struct Loader<'a> {
    gguf: &'a Gguf,
    plan: &'a Plan,
    compute: &'a Compute,
    cache: Option<&'a packed::Cache>,
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
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, &[len])?;
        let mut values = vec![0.0; len];
        blocks::dequantize(tensor.ty, self.gguf.data(tensor), &mut values)
            .map_err(|e| self.wrong(tensor, e.to_string()))?;
        self.count(name);
        Ok(values)
    }

    fn optional_vector(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        self.gguf
            .tensor(name)
            .is_some()
            .then(|| self.vector(name, len))
            .transpose()
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
        let weights = if let Some(strips) = self.cache.and_then(|c| c.strips(name)) {
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
        self.count(name);
        Ok(weights)
    }

    fn matrices(&mut self, c: &ModelConfig) -> Result<Matrices> {
        let embedding = self.matrix("token_embd.weight", c.embd, c.vocab, None)?;
        let output = match self.gguf.tensor("output.weight") {
            Some(_) => Some(self.matrix("output.weight", c.embd, c.vocab, None)?),
            None => None,
        };
        let output_norm = self.vector("output_norm.weight", c.embd)?;
        let layers = (0..c.layers)
            .map(|i| self.layer(c, i))
            .collect::<Result<_>>()?;
        Ok(Matrices {
            embedding,
            output,
            output_norm,
            layers,
        })
    }

    fn layer(&mut self, c: &ModelConfig, i: usize) -> Result<Layer> {
        let name = |part: &str| format!("blk.{i}.{part}");
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let norms = c.arch.has_qk_norm();
        let ffn = match c.experts {
            Some(e) => Ffn::Experts {
                router: self.matrix(&name("ffn_gate_inp.weight"), c.embd, e.count, None)?,
                gate: self.matrix(&name("ffn_gate_exps.weight"), c.embd, e.ff, Some(e.count))?,
                up: self.matrix(&name("ffn_up_exps.weight"), c.embd, e.ff, Some(e.count))?,
                down: self.matrix(&name("ffn_down_exps.weight"), e.ff, c.embd, Some(e.count))?,
            },
            None => Ffn::Dense {
                gate: self.matrix(&name("ffn_gate.weight"), c.embd, c.ff, None)?,
                up: self.matrix(&name("ffn_up.weight"), c.embd, c.ff, None)?,
                down: self.matrix(&name("ffn_down.weight"), c.ff, c.embd, None)?,
            },
        };
        let mut norm = |part: &str| {
            if norms {
                self.vector(&name(part), c.head_dim).map(Some)
            } else {
                Ok(None)
            }
        };
        let (q_norm, k_norm) = (norm("attn_q_norm.weight")?, norm("attn_k_norm.weight")?);
        Ok(Layer {
            attn_norm: self.vector(&name("attn_norm.weight"), c.embd)?,
            q: self.matrix(&name("attn_q.weight"), c.embd, q, None)?,
            k: self.matrix(&name("attn_k.weight"), c.embd, kv, None)?,
            v: self.matrix(&name("attn_v.weight"), c.embd, kv, None)?,
            q_bias: self.optional_vector(&name("attn_q.bias"), q)?,
            k_bias: self.optional_vector(&name("attn_k.bias"), kv)?,
            v_bias: self.optional_vector(&name("attn_v.bias"), kv)?,
            q_norm,
            k_norm,
            out: self.matrix(&name("attn_output.weight"), q, c.embd, None)?,
            out_bias: self.optional_vector(&name("attn_output.bias"), c.embd)?,
            ffn_norm: self.vector(&name("ffn_norm.weight"), c.embd)?,
            ffn,
        })
    }
}
