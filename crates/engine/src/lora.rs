//! LoRA adapters: small files that change matrices of a model by products of low rank,
//! `W x + scale · B (A x)`, as llama.cpp's `convert_lora_to_gguf` writes them.
//!
//! A file is checked as a whole against the model before anything is loaded. The weights of the
//! model stay as they are in memory; what multiplies them adds the adapters' part
//! ([`Weights::adapt`]).

use crate::{
    Error, ModelConfig, Result,
    plan::{Role, role},
};
use serde::Serialize;
use std::{collections::BTreeMap, path::PathBuf};
use tegula_gguf::{Gguf, TensorInfo};
use tegula_kernels::{Pool, Weights};

/// An adapter's file and what the adapter is multiplied by.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraFile {
    pub path: PathBuf,
    /// Besides the file's own alpha; with 0 the file is checked and changes nothing.
    pub scale: f32,
}

/// What a loaded adapter is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterInfo {
    pub file: String,
    /// As it was asked for.
    pub scale: f32,
    /// The file's; 0: the scale is taken as it is, whatever the rank.
    pub alpha: f32,
    /// The least and the largest rank of its matrices.
    pub ranks: [usize; 2],
    /// Tensors of the model that it changes.
    pub matrices: usize,
    /// Bytes of its matrices in the file, which are about those in memory.
    pub bytes: u64,
    /// Of everything that decides what it adds.
    #[serde(skip)]
    pub(crate) checksum: u32,
}

impl AdapterInfo {
    /// What a file says of itself, if it is a LoRA adapter; nothing of it is checked.
    pub fn of_file(gguf: &Gguf) -> Option<AdapterInfo> {
        let md = gguf.metadata();
        let says = |key, value| md.str(key).is_ok_and(|v| v == Some(value));
        if !says("general.type", "adapter") || !says("adapter.type", "lora") {
            return None;
        }
        let firsts = gguf.tensors().iter();
        let firsts = firsts.filter(|t| t.name.ends_with(".lora_a"));
        let ranks = firsts.filter_map(|t| Some(dims(t)?[1] as usize));
        let ranks: Vec<usize> = ranks.collect();
        Some(AdapterInfo {
            file: md.origin().to_owned(),
            scale: 1.0,
            alpha: md.f32("adapter.lora.alpha").ok()?.unwrap_or(0.0),
            ranks: [*ranks.iter().min()?, *ranks.iter().max()?],
            matrices: ranks.len(),
            bytes: gguf.tensors().iter().map(|t| t.bytes).sum(),
            checksum: 0,
        })
    }

    /// In words: how it is used, without the file's name.
    pub fn describe(&self) -> String {
        format!("{}, scale {}", self.size(), self.scale)
    }

    /// In words: what it is.
    pub fn size(&self) -> String {
        let AdapterInfo {
            alpha,
            ranks: [least, most],
            matrices,
            ..
        } = self;
        let rank = match least == most {
            true => format!("rank {least}"),
            false => format!("ranks {least} to {most}"),
        };
        let alpha = match *alpha == 0.0 {
            true => String::new(),
            false => format!(", alpha {alpha}"),
        };
        format!("{matrices} matrices of {rank}{alpha}")
    }
}

/// What one adapter adds to one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LoraPart {
    /// Its number, from 0.
    pub adapter: usize,
    pub rank: usize,
    /// All factors together: what is asked for, times alpha / rank.
    pub scale: f32,
    /// In memory.
    pub bytes: u64,
}

/// Adapters of a model: checked, and still as the files have them.
#[derive(Default)]
pub struct Adapters {
    infos: Vec<AdapterInfo>,
    /// By tensor: A `[experts][rank][k]`, B `[experts][n][rank]`.
    parts: BTreeMap<String, Vec<(LoraPart, Weights, Weights)>>,
}

impl Adapters {
    /// Opens files and checks them against the model.
    ///
    /// # Errors
    /// When one can't be read, is no LoRA adapter, belongs to another model, or changes what no
    /// product reads.
    pub fn open(files: &[LoraFile], model: &Gguf, config: &ModelConfig) -> Result<Adapters> {
        let mut all = Adapters::default();
        for file in files {
            let gguf = Gguf::open(&file.path)?;
            let reader = Reader {
                file: file.path.display().to_string(),
                gguf: &gguf,
                model,
                config,
            };
            reader.read(file.scale, &mut all)?;
        }
        Ok(all)
    }

    /// What they are, in the order of the files.
    pub fn infos(&self) -> &[AdapterInfo] {
        &self.infos
    }

    /// By tensor, what is added to it.
    pub fn by_tensor(&self) -> BTreeMap<String, Vec<LoraPart>> {
        let part = |(p, ..): &(LoraPart, Weights, Weights)| *p;
        let parts = self.parts.iter();
        parts
            .map(|(name, all)| (name.clone(), all.iter().map(part).collect()))
            .collect()
    }

    /// Gives the weights of a tensor its adapters, packed.
    pub(crate) fn adapt(&self, tensor: &str, weights: &mut Weights, pool: &Pool) {
        for (part, a, b) in self.parts.get(tensor).into_iter().flatten() {
            let adapted = weights.adapt(a.pack(pool), b.pack(pool), part.scale);
            adapted.expect("shapes were checked against the tensor's");
        }
    }
}

/// Reads one file.
struct Reader<'a> {
    file: String,
    gguf: &'a Gguf,
    model: &'a Gguf,
    config: &'a ModelConfig,
}

impl Reader<'_> {
    fn wrong<T>(&self, what: impl Into<String>) -> Result<T> {
        Err(Error::Lora {
            file: self.file.clone(),
            what: what.into(),
        })
    }

    /// The file's alpha, if it is an adapter of such a model.
    fn alpha(&self) -> Result<f32> {
        let md = self.gguf.metadata();
        let general = md.str("general.type")?.unwrap_or("model");
        if general != "adapter" {
            return self.wrong(format!(
                "no adapter: general.type is `{general}`; make one with llama.cpp's \
                 convert_lora_to_gguf.py"
            ));
        }
        let kind = md.str("adapter.type")?.unwrap_or("");
        if kind != "lora" {
            return self.wrong(format!(
                "adapters of type `{kind}` are not supported, those of type `lora` are"
            ));
        }
        if md.contains("adapter.alora.invocation_tokens") {
            return self.wrong(
                "adapters that a text switches on (aLoRA) are not supported; use a plain LoRA",
            );
        }
        let arch = md.str("general.architecture")?.unwrap_or("");
        let own = self.config.arch.name();
        if arch != own {
            return self.wrong(format!(
                "an adapter for architecture `{arch}`, and the model is `{own}`; use the one made \
                 for this model"
            ));
        }
        let alpha = md.f32("adapter.lora.alpha")?.unwrap_or(0.0);
        match alpha.is_finite() {
            true => Ok(alpha),
            false => self.wrong(format!("adapter.lora.alpha is {alpha}")),
        }
    }

    /// Names of the tensors that the file changes, in its order, each with both of its factors.
    fn pairs(&self) -> Result<Vec<(&str, &TensorInfo, &TensorInfo)>> {
        let mut pairs = Vec::new();
        for tensor in self.gguf.tensors() {
            let name = tensor.name.as_str();
            let (base, other) = match (name.strip_suffix(".lora_a"), name.strip_suffix(".lora_b")) {
                (Some(base), _) => (base, format!("{base}.lora_b")),
                (_, Some(base)) => (base, format!("{base}.lora_a")),
                _ => {
                    return self.wrong(format!(
                        "tensor `{name}` ends in neither .lora_a nor .lora_b: whole tensors, such \
                         as norms, can't be replaced; convert the adapter without it"
                    ));
                }
            };
            let Some(second) = self.gguf.tensor(&other) else {
                return self.wrong(format!(
                    "tensor `{name}` has no `{other}` beside it: the file is incomplete"
                ));
            };
            if name.ends_with(".lora_a") {
                pairs.push((base, tensor, second));
            }
        }
        match pairs.is_empty() {
            true => self.wrong("the adapter has no tensors"),
            false => Ok(pairs),
        }
    }

    /// The model's matrix of that name.
    fn base(&self, name: &str) -> Result<&TensorInfo> {
        let Some(base) = self.model.tensor(name) else {
            return self.wrong(format!(
                "tensor `{name}` is not in the model: the adapter was made for another one"
            ));
        };
        let what = match role(self.config.arch, self.model, base) {
            Role::Matrix if self.is_run(name) => return Ok(base),
            Role::Embedding | Role::TiedEmbedding => "rows of it are looked up",
            Role::Vector => "it is a norm or a bias",
            Role::Matrix | Role::Unused => "no operation reads it",
        };
        self.wrong(format!(
            "adapters of tensor `{name}` are not supported: {what}; adapters change matrices of \
             attention, feed-forward networks, experts and the output"
        ))
    }

    /// Whether a matrix is the output's or of a layer that is run.
    fn is_run(&self, name: &str) -> bool {
        let Some((layer, _)) = name.strip_prefix("blk.").and_then(|r| r.split_once('.')) else {
            return true;
        };
        layer.parse::<usize>().is_ok_and(|i| i < self.config.layers)
    }

    fn read(&self, scale: f32, all: &mut Adapters) -> Result<()> {
        let alpha = self.alpha()?;
        if !scale.is_finite() {
            return self.wrong(format!("scale {scale} is no number to multiply by"));
        }
        let adapter = all.infos.len();
        let mut info = AdapterInfo {
            file: self.file.clone(),
            scale,
            alpha,
            ranks: [usize::MAX, 0],
            matrices: 0,
            bytes: 0,
            checksum: 0,
        };
        let mut sum = crc32fast::Hasher::new();
        for (name, a, b) in self.pairs()? {
            let base = self.base(name)?;
            let [k, n, experts] = dims(base).unwrap_or_default();
            // Files have no tensors of length 0, so a rank is at least 1.
            let rank = dims(a).map_or(1, |[_, rank, _]| rank);
            if dims(a) != Some([k, rank, experts]) || dims(b) != Some([rank, n, experts]) {
                return self.wrong(format!(
                    "tensors `{name}.lora_a` {:?} and `.lora_b` {:?} don't fit the model's {:?}: \
                     the adapter was made for another one",
                    a.shape, b.shape, base.shape
                ));
            }
            let weights = |t: &TensorInfo, n: u64, k: u64| {
                let bytes = self.gguf.bytes(t);
                Weights::raw(t.ty, n as usize, k as usize, experts as usize, bytes).map_err(
                    |source| Error::Weights {
                        file: self.file.clone(),
                        tensor: t.name.clone(),
                        source,
                    },
                )
            };
            let (a_weights, b_weights) = (weights(a, rank, k)?, weights(b, n, rank)?);
            let part = LoraPart {
                adapter,
                rank: rank as usize,
                scale: match alpha == 0.0 {
                    true => scale,
                    false => scale * alpha / rank as f32,
                },
                bytes: a.bytes + b.bytes,
            };
            info.ranks = [info.ranks[0].min(part.rank), info.ranks[1].max(part.rank)];
            info.matrices += 1;
            info.bytes += part.bytes;
            if scale == 0.0 {
                continue;
            }
            sum.update(name.as_bytes());
            sum.update(&part.scale.to_bits().to_le_bytes());
            sum.update(self.gguf.data(a));
            sum.update(self.gguf.data(b));
            let parts = all.parts.entry(name.to_owned()).or_default();
            parts.push((part, a_weights, b_weights));
        }
        info.checksum = sum.finalize();
        all.infos.push(info);
        Ok(())
    }
}

/// Row length, rows and experts; `None` with more dimensions.
fn dims(tensor: &TensorInfo) -> Option<[u64; 3]> {
    let at = |i: usize| tensor.shape.get(i).copied().unwrap_or(1);
    let more = tensor.shape.iter().skip(3).any(|&n| n != 1);
    (!more).then(|| [at(0), at(1), at(2)])
}
