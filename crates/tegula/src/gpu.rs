//! The flags that place a model on GPUs.

use crate::exit::Refusal;
use clap::Args;
use std::sync::Arc;
use tegula_engine::{
    LoadOptions,
    offload::{GpuLayers, Split},
    share::DecodeShare,
};
use tegula_kernels::device::Device;

#[derive(Args, Clone, Debug, Default)]
pub struct GpuArgs {
    /// Layers on GPUs (-ngl), the last ones; the output matrix counts as one; `all`, or `auto`:
    /// as many as fit [default: auto]
    #[arg(long, value_name = "N", value_parser = layers)]
    gpu_layers: Option<GpuLayers>,
    /// How several GPUs share the model (-sm): layer; tensor: every layer by heads and hidden
    /// values; or none: all on one [default: layer]
    #[arg(long, value_name = "MODE", value_parser = split)]
    split_mode: Option<Split>,
    /// Shares of the GPUs (-ts), such as 3,1 [default: by free memory]
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    tensor_split: Option<Vec<f32>>,
    /// The GPU that takes all with -sm none, and the output matrix with -sm tensor (-mg)
    #[arg(long, value_name = "I", default_value_t = 0)]
    main_gpu: usize,
    /// GPUs to use (-dev), by name, or none [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    device: Option<Vec<String>>,
    /// Parts whose tensors match go to a device (-ot): CPU or a GPU's name; the first match counts
    #[arg(long, value_name = "REGEX=DEVICE", value_delimiter = ',')]
    override_tensor: Vec<String>,
    /// Keep all experts on the CPU
    #[arg(long)]
    cpu_moe: bool,
    /// Keep the experts of the first N layers on the CPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    n_cpu_moe: usize,
    /// Keep the KV cache on the CPU (-nkvo)
    #[arg(long)]
    no_kv_offload: bool,
    /// Bring weights on the CPU to a GPU for batches of many tokens where that is faster; the
    /// default
    #[arg(long, overrides_with = "no_op_offload")]
    op_offload: bool,
    /// Multiply weights on the CPU there, whatever the batch
    #[arg(long, overrides_with = "op_offload")]
    no_op_offload: bool,
    /// Tokens from which --op-offload does so [default: from when it is faster, by tensor; see
    /// explain]
    #[arg(long, value_name = "N", conflicts_with = "no_op_offload")]
    op_offload_min_batch: Option<usize>,
    /// Of dense matrices on the CPU, the fraction of the rows that a GPU multiplies for single tokens
    /// meanwhile, from pinned memory; auto: where it pays, unless --no-op-offload; 0: none
    /// [default: auto]
    #[arg(long, value_name = "FRACTION")]
    decode_share: Option<DecodeShare>,
    /// MiB that are left free on every GPU
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    fit_target: u64,
}

fn layers(s: &str) -> Result<GpuLayers, String> {
    match s {
        "auto" | "-1" => Ok(GpuLayers::Fit),
        "all" | "-2" => Ok(GpuLayers::Count(usize::MAX)),
        n => n
            .parse()
            .map(GpuLayers::Count)
            .map_err(|_| "expected a number, all or auto".to_owned()),
    }
}

fn split(s: &str) -> Result<Split, String> {
    match s {
        "layer" => Ok(Split::Layer),
        "none" => Ok(Split::None),
        "tensor" => Ok(Split::Tensor),
        "row" => Err("splitting by row is not supported; use tensor, which splits more".to_owned()),
        _ => Err("expected layer, tensor or none".to_owned()),
    }
}

/// The GPUs of this machine.
#[cfg(feature = "cuda")]
pub fn detect() -> anyhow::Result<Vec<Arc<dyn Device>>> {
    let split = tegula_cuda::split_from_env().map_err(|e| Refusal::Usage(e.to_string()))?;
    let found = tegula_cuda::detect(split).map_err(tegula_engine::Error::from)?;
    Ok(found.into_iter().map(|d| d as Arc<dyn Device>).collect())
}

/// None: this build has no support for them.
#[cfg(not(feature = "cuda"))]
pub fn detect() -> anyhow::Result<Vec<Arc<dyn Device>>> {
    Ok(Vec::new())
}

impl GpuArgs {
    /// True if the flags keep the model on the CPU, so that no driver need be asked.
    fn cpu_only(&self) -> bool {
        let none = self
            .device
            .as_ref()
            .is_some_and(|d| d.as_slice() == ["none"]);
        none || (self.gpu_layers == Some(GpuLayers::Count(0)) && self.override_tensor.is_empty())
    }

    /// Looks for the GPUs and sets what the flags ask for.
    pub fn apply(&self, options: LoadOptions) -> anyhow::Result<LoadOptions> {
        let mut devices = match self.cpu_only() {
            true => Vec::new(),
            false => detect()?,
        };
        if let Some(names) = self.device.as_ref().filter(|_| !self.cpu_only()) {
            let mut chosen = Vec::new();
            let mut known = Vec::new();
            for device in &devices {
                known.push(device.info().map_err(tegula_engine::Error::from)?.name);
            }
            for name in names {
                let at = known.iter().position(|k| k.eq_ignore_ascii_case(name));
                let Some(at) = at else {
                    let there = match known.is_empty() {
                        true => "there is no GPU".to_owned(),
                        false => format!("there are {}", known.join(", ")),
                    };
                    return Err(Refusal::Requirement(format!("-dev {name}: {there}")).into());
                };
                chosen.push(Arc::clone(&devices[at]));
            }
            devices = chosen;
        }
        if devices.is_empty() && matches!(self.gpu_layers, Some(GpuLayers::Count(1..))) {
            let what = "-ngl asks for a GPU, and there is none (tegula doctor)".to_owned();
            return Err(Refusal::Requirement(what).into());
        }
        let mut options = options.with_devices(devices)?;
        let flags = &mut options.offload;
        flags.layers = self.gpu_layers.unwrap_or_default();
        flags.split = self.split_mode.unwrap_or_default();
        flags.shares.clone_from(&self.tensor_split);
        flags.main = self.main_gpu;
        flags.cpu_moe = if self.cpu_moe {
            usize::MAX
        } else {
            self.n_cpu_moe
        };
        flags.kv_on_cpu = self.no_kv_offload;
        flags.margin = self.fit_target << 20;
        flags.op_offload = !self.no_op_offload;
        flags.decode_share = self.decode_share.unwrap_or_default();
        flags.op_offload_min_batch = self.op_offload_min_batch;
        for text in &self.override_tensor {
            let parsed = flags.parse_override(text)?;
            flags.overrides.push(parsed);
        }
        flags.check()?;
        Ok(options)
    }
}
