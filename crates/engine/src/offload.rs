//! Which part of a model goes to which device: a pure function of the model, the devices and
//! the flags.
//!
//! What is placed are units, so that a layer costs one hop each way at most: a layer's
//! attention, its feed-forward network (with the router, if there is one), its experts, and
//! the output matrix. The first rule that says something about a unit decides: `-ot`, then
//! `--cpu-moe`, then the layer's number (`-ngl`). What stays on the CPU may be packed for it.

use crate::{
    Error, LoraPart, ModelConfig, Result,
    context::UBATCH,
    scales,
    share::{DecodeShare, Shares},
    stream::Streams,
    tensor_split::{Cut, TensorSplit},
};
use regex::Regex;
use serde::{Serialize, Serializer};
use std::{collections::BTreeMap, fmt};
use tegula_gguf::{Gguf, TensorInfo};
use tegula_kernels::{
    device::{
        self, DeviceInfo,
        stream::{RATES, Rates},
    },
    kv::{KV_PAGE, KvShape, KvType},
};

/// Where something lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Device {
    Cpu,
    /// An index into the devices in use.
    Gpu(usize),
    /// A part on each device in use.
    Split,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.pad("cpu"),
            Device::Gpu(i) => f.pad(&format!("gpu{i}")),
            Device::Split => f.pad("gpus"),
        }
    }
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// `-ngl`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GpuLayers {
    /// As much as fits.
    #[default]
    Fit,
    /// That many of the last layers; the output matrix counts as one behind the last.
    Count(usize),
}

/// `-sm`
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Split {
    /// Runs of layers.
    #[default]
    Layer,
    /// Every layer over all of them; the output matrix on the main device.
    Tensor,
    /// All on one device.
    None,
}

/// `-ot REGEX=DEVICE`
#[derive(Clone, Debug)]
pub struct Override {
    pub pattern: Regex,
    pub device: Device,
}

/// What decides which parts go to devices.
#[derive(Clone, Debug)]
pub struct OffloadFlags {
    /// Devices in use, in the order in which layers are split over them.
    pub devices: Vec<DeviceInfo>,
    pub layers: GpuLayers,
    pub split: Split,
    /// Shares of the devices, `-ts`; by free memory where none are given.
    pub shares: Option<Vec<f32>>,
    /// The device that takes all with [`Split::None`], and the output matrix with
    /// [`Split::Tensor`], `-mg`.
    pub main: usize,
    pub overrides: Vec<Override>,
    /// Layers, from the first, whose experts stay on the CPU.
    pub cpu_moe: usize,
    /// The KV cache stays on the CPU, `-nkvo`.
    pub kv_on_cpu: bool,
    /// Positions that the KV cache will hold, over all sequences; 0: what the model was
    /// trained with.
    pub context: usize,
    pub k_type: KvType,
    pub v_type: KvType,
    /// Tokens that run through the layers together.
    pub ubatch: usize,
    /// Bytes of each device that are left free.
    pub margin: u64,
    /// Weights on the CPU may stream to a device for batches of many tokens.
    pub op_offload: bool,
    /// From how many tokens on they do; where it is `None`, from when it is faster.
    pub op_offload_min_batch: Option<usize>,
    /// What that is reckoned from.
    pub rates: Rates,
    /// Of dense matrices on the CPU, the part that a device multiplies for single tokens.
    pub decode_share: DecodeShare,
    /// What adapters add, by tensor: the CPU computes it, so these tensors' units stay there.
    pub adapted: BTreeMap<String, Vec<LoraPart>>,
}

impl Default for OffloadFlags {
    fn default() -> Self {
        OffloadFlags {
            devices: Vec::new(),
            layers: GpuLayers::Fit,
            split: Split::Layer,
            shares: None,
            main: 0,
            overrides: Vec::new(),
            cpu_moe: 0,
            kv_on_cpu: false,
            context: 4096,
            k_type: KvType::F16,
            v_type: KvType::F16,
            ubatch: UBATCH,
            margin: 512 << 20,
            op_offload: true,
            op_offload_min_batch: None,
            rates: RATES,
            decode_share: DecodeShare::Auto,
            adapted: BTreeMap::new(),
        }
    }
}

impl OffloadFlags {
    /// An override from `REGEX=DEVICE`, where `DEVICE` is `CPU` or a device in use.
    pub fn parse_override(&self, text: &str) -> Result<Override> {
        let usage = |what: String| Error::Placement(format!("-ot {text}: {what}"));
        let Some((pattern, name)) = text.rsplit_once('=') else {
            return Err(usage("expected REGEX=DEVICE".to_owned()));
        };
        let pattern = Regex::new(pattern).map_err(|e| usage(e.to_string()))?;
        let named = |d: &DeviceInfo| d.name.eq_ignore_ascii_case(name);
        let device = if name.eq_ignore_ascii_case("cpu") {
            Device::Cpu
        } else if let Some(i) = self.devices.iter().position(named) {
            Device::Gpu(i)
        } else {
            let known: Vec<_> = self.devices.iter().map(|d| d.name.as_str()).collect();
            let known = match known.is_empty() {
                true => "CPU; no GPU is in use".to_owned(),
                false => format!("CPU, {}", known.join(", ")),
            };
            return Err(usage(format!("no device `{name}` (there are: {known})")));
        };
        Ok(Override { pattern, device })
    }

    /// Refuses flags that don't suit the devices.
    pub fn check(&self) -> Result<()> {
        let (n, wrong) = (self.devices.len(), |what| Err(Error::Placement(what)));
        if let Some(shares) = &self.shares {
            if shares.len() != n {
                let given = shares.len();
                return wrong(format!("-ts has {given} shares for {n} devices in use"));
            }
            if shares.iter().any(|s| !s.is_finite() || *s < 0.0)
                || shares.iter().sum::<f32>() <= 0.0
            {
                return wrong(
                    "-ts needs shares that are not negative, and not all zero".to_owned(),
                );
            }
        }
        if self.main >= n.max(1) {
            return wrong(format!("-mg {}: there are {n} devices in use", self.main));
        }
        if self.tensor() {
            if self.kv_on_cpu {
                return wrong(
                    "-sm tensor splits the KV cache with the heads: not with -nkvo".to_owned(),
                );
            }
            if self.overrides.iter().any(|o| o.device != Device::Cpu) {
                return wrong("with -sm tensor, -ot can name CPU alone".to_owned());
            }
        }
        if n == 0 && matches!(self.layers, GpuLayers::Count(1..)) {
            return wrong("-ngl: no GPU is in use".to_owned());
        }
        Ok(())
    }

    /// Whether adapters change a tensor of a unit.
    pub(crate) fn adapts(&self, of: Unit) -> bool {
        self.adapted.keys().any(|name| unit(name) == Some(of))
    }

    /// Layers are split over several devices. One device has them whole.
    fn tensor(&self) -> bool {
        self.split == Split::Tensor && self.devices.len() > 1
    }

    /// Each device's share, as the flags say or by free memory.
    fn by_share(&self) -> Vec<f64> {
        match &self.shares {
            Some(shares) => shares.iter().map(|s| f64::from(*s)).collect(),
            None => self.devices.iter().map(|d| d.free as f64).collect(),
        }
    }

    /// The cache's bytes, for one head of one layer.
    fn kv_head(&self, c: &ModelConfig) -> u64 {
        let shape = KvShape {
            layers: 1,
            heads: 1,
            dim: c.head_dim,
            k: self.k_type,
            v: self.v_type,
        };
        let positions = if self.context == 0 {
            c.context
        } else {
            self.context
        };
        shape.bytes(positions.div_ceil(KV_PAGE)) as u64
    }
}

/// A part of the model that is placed as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unit {
    Attention(usize),
    Ffn(usize),
    Experts(usize),
    Output,
}

/// The unit that a tensor belongs to; `None` for what stays on the CPU.
pub(crate) fn unit(name: &str) -> Option<Unit> {
    if name.starts_with("output") {
        return Some(Unit::Output);
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer = layer.parse().ok()?;
    Some(match part.split_once('.').map_or(part, |(of, _)| of) {
        "ffn_gate_exps" | "ffn_up_exps" | "ffn_down_exps" => Unit::Experts(layer),
        _ if part.starts_with("attn_") => Unit::Attention(layer),
        _ => Unit::Ffn(layer),
    })
}

/// Where the units of a model go.
#[derive(Clone, Debug, PartialEq)]
pub struct Offload {
    pub(crate) attention: Vec<Device>,
    pub(crate) ffn: Vec<Device>,
    pub(crate) experts: Vec<Device>,
    pub(crate) output: Device,
    pub(crate) kv: Vec<Device>,
    /// Each device's part of the layers that are split.
    pub tensor: Option<TensorSplit>,
    /// Why the layers can't be split as the flags ask.
    pub refused: Option<String>,
    /// Bytes per token that go between devices and here for layers that are split, both ways.
    pub exchanged: u64,
    /// What of the weights on the CPU is multiplied on devices all the same.
    pub streams: Streams,
    /// And for single tokens in part, from pinned memory.
    pub shares: Option<Shares>,
    /// Why, where it was not the layer's number.
    overridden: Vec<(UnitKey, &'static str)>,
    /// What was chosen, in words; empty without devices.
    pub summary: String,
    /// Per device.
    pub devices: Vec<DeviceUse>,
}

type UnitKey = (u8, usize);

fn key(unit: Unit) -> UnitKey {
    match unit {
        Unit::Attention(i) => (0, i),
        Unit::Ffn(i) => (1, i),
        Unit::Experts(i) => (2, i),
        Unit::Output => (3, 0),
    }
}

/// What a device holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceUse {
    pub name: String,
    pub description: String,
    /// Bytes.
    pub weights: u64,
    pub kv: u64,
    /// Activations of the largest micro-batch.
    pub activations: u64,
    /// Where weights that stay on the CPU are brought for a batch.
    pub streaming: u64,
    /// What may be used: the free memory less a margin.
    pub budget: u64,
    /// Transformer layers whose attention is there.
    pub layers: usize,
}

impl DeviceUse {
    /// What decides whether the model fits.
    pub fn placed(&self) -> u64 {
        self.weights + self.kv + self.activations
    }

    /// All together.
    pub fn needed(&self) -> u64 {
        self.placed() + self.streaming
    }
}

impl Offload {
    /// Where a unit goes.
    pub(crate) fn device(&self, unit: Unit) -> Device {
        match unit {
            Unit::Attention(i) => self.attention[i],
            Unit::Ffn(i) => self.ffn[i],
            Unit::Experts(i) => self.experts[i],
            Unit::Output => self.output,
        }
    }

    /// Why there.
    pub(crate) fn reason(&self, unit: Unit) -> &'static str {
        let k = key(unit);
        let found = self.overridden.iter().find(|(other, _)| *other == k);
        found.map_or("its layer's number", |(_, why)| why)
    }

    /// Bytes of what device `d` holds of a tensor of layers that are split.
    pub(crate) fn cut_bytes(&self, tensor: &TensorInfo, d: usize) -> u64 {
        let cut = self.tensor.as_ref().map(|t| t.cut(&tensor.name, d));
        cut.map_or(0, |cut| cut_bytes(tensor, &cut))
    }

    /// True without anything on a device.
    pub fn is_cpu_only(&self) -> bool {
        let mut all = self.attention.iter().chain(&self.ffn).chain(&self.experts);
        all.all(|d| *d == Device::Cpu) && self.output == Device::Cpu
    }

    /// The one device that holds everything, if there is one.
    pub(crate) fn only_device(&self) -> Option<usize> {
        let Device::Gpu(d) = self.output else {
            return None;
        };
        let mut all = self.attention.iter().chain(&self.ffn).chain(&self.experts);
        (all.all(|x| *x == self.output) && self.kv.iter().all(|x| *x == self.output)).then_some(d)
    }

    /// Whether device `d` keeps a cache of a layer.
    pub(crate) fn attends(&self, layer: usize, d: usize) -> bool {
        match self.kv[layer] {
            Device::Cpu => false,
            Device::Gpu(at) => at == d,
            Device::Split => self.tensor.as_ref().is_some_and(|t| !t.heads[d].is_empty()),
        }
    }

    /// Layers whose KV cache is on the CPU.
    pub fn cpu_cache_layers(&self) -> usize {
        self.kv.iter().filter(|d| **d == Device::Cpu).count()
    }

    /// Refuses what can't be split or does not fit the devices.
    pub fn check_memory(&self) -> Result<()> {
        if let Some(why) = &self.refused {
            return Err(Error::Placement(why.clone()));
        }
        for d in &self.devices {
            if d.placed() > d.budget {
                return Err(Error::DeviceMemory {
                    device: d.name.clone(),
                    needed: d.placed(),
                    available: d.budget,
                });
            }
        }
        Ok(())
    }
}

/// Bytes of the units.
struct Sizes {
    attention: Vec<u64>,
    ffn: Vec<u64>,
    experts: Vec<u64>,
    output: u64,
    /// Of one head.
    kv: u64,
    kv_heads: usize,
    activations: u64,
    /// Each device's part of the layers, or why they can't be split.
    tensor: Option<TensorSplit>,
    refused: Option<String>,
    parts: Vec<Parts>,
}

/// The same of a device's part of the layers.
#[derive(Clone, Default)]
struct Parts {
    attention: Vec<u64>,
    ffn: Vec<u64>,
    experts: Vec<u64>,
}

/// Bytes of a tensor on a device.
pub(crate) fn device_bytes(tensor: &TensorInfo) -> u64 {
    cut_bytes(tensor, &Cut::Whole)
}

/// Bytes of what a device holds of a tensor.
pub(crate) fn cut_bytes(tensor: &TensorInfo, cut: &Cut) -> u64 {
    let (mut k, mut n) = (tensor.row_len(), tensor.shape.get(1).copied().unwrap_or(1));
    let experts = tensor.shape.get(2).copied().unwrap_or(1);
    let vector = tensor.shape.len() < 2;
    match cut {
        Cut::Nothing => return 0,
        Cut::Whole => {}
        Cut::Rows(rows) if vector => k = rows.len() as u64,
        Cut::Rows(rows) => n = rows.len() as u64,
        Cut::Columns(columns) => k = columns.len() as u64,
    }
    let floats = (k * n * experts * 4).next_multiple_of(device::ALIGN);
    if vector {
        return floats;
    }
    device::matrix_bytes(tensor.ty.dense(), n, k, experts).unwrap_or(floats)
}

fn sizes(c: &ModelConfig, gguf: &Gguf, flags: &OffloadFlags) -> Sizes {
    let split = flags
        .tensor()
        .then(|| TensorSplit::new(c, gguf, &flags.by_share()));
    let (tensor, refused) = match split {
        None => (None, None),
        Some(Ok(tensor)) => (Some(tensor), None),
        Some(Err(error)) => (None, Some(error.to_string())),
    };
    let none = Parts {
        attention: vec![0; c.layers],
        ffn: vec![0; c.layers],
        experts: vec![0; c.layers],
    };
    let mut s = Sizes {
        parts: vec![none; tensor.as_ref().map_or(0, |_| flags.devices.len())],
        tensor,
        refused,
        kv_heads: c.kv_heads,
        attention: vec![0; c.layers],
        ffn: vec![0; c.layers],
        experts: vec![0; c.layers],
        output: 0,
        kv: flags.kv_head(c),
        activations: activations(c, flags.ubatch),
    };
    for tensor in gguf.tensors() {
        let bytes = device_bytes(tensor);
        match unit(&tensor.name) {
            Some(Unit::Attention(i)) if i < c.layers => s.attention[i] += bytes,
            Some(Unit::Ffn(i)) if i < c.layers => s.ffn[i] += bytes,
            Some(Unit::Experts(i)) if i < c.layers => s.experts[i] += bytes,
            Some(Unit::Output) => s.output += bytes,
            _ => {}
        }
        let Some(tensor_split) = &s.tensor else {
            continue;
        };
        for (d, parts) in s.parts.iter_mut().enumerate() {
            let bytes = cut_bytes(tensor, &tensor_split.cut(&tensor.name, d));
            match unit(&tensor.name) {
                Some(Unit::Attention(i)) if i < c.layers => parts.attention[i] += bytes,
                Some(Unit::Ffn(i)) if i < c.layers => parts.ffn[i] += bytes,
                Some(Unit::Experts(i)) if i < c.layers => parts.experts[i] += bytes,
                _ => {}
            }
        }
    }
    if let (None, Some(tied)) = (
        gguf.tensor("output.weight"),
        gguf.tensor("token_embd.weight"),
    ) {
        s.output += device_bytes(tied);
    }
    s
}

/// Rows of logits that are made together on a device.
pub(crate) const LOGIT_ROWS: usize = 64;

/// Rows of which a device finds the largest logits.
pub(crate) const TOP_ROWS: usize = 16;

/// Bytes of activations of a micro-batch: the executor's buffers and the device's own, which
/// hold the inputs of products in another form and the experts' intermediate.
fn activations(c: &ModelConfig, ubatch: usize) -> u64 {
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let (ff, used) = c.experts.map_or((c.ff, 1), |e| (e.ff, e.used));
    let router = c.experts.map_or(0, |e| e.count + 2 * e.used);
    let widest = c.embd.max(q).max(ff * used);
    let floats = 3 * c.embd + 2 * q + 2 * kv + router + 2 * c.head_dim + 2 * widest;
    let experts = used * (3 * ff + c.embd);
    let per_token = 4 * (floats + experts + 2);
    // From so many tokens on a library multiplies, which takes matrices decoded, one at a time.
    let decoded = match ubatch >= device::LIBRARY_FROM {
        true => 2 * c.embd * q.max(c.ff) + device::LIBRARY_WORKSPACE,
        false => 0,
    };
    let top = 4 * device::MOST_LARGEST * (3 * TOP_ROWS.min(ubatch) + 1);
    let norm = 4 * c.embd;
    ((per_token * ubatch + 4 * c.vocab * LOGIT_ROWS.min(ubatch) + top + norm + decoded) as u64)
        + 64 * device::ALIGN
}

/// Places all units.
pub(crate) fn offload(c: &ModelConfig, gguf: &Gguf, flags: &OffloadFlags) -> Offload {
    let sizes = sizes(c, gguf, flags);
    let names = Names::new(c, gguf, flags);
    let everything = c.layers + 1;
    let place = |count: usize, cpu_moe: usize| place(c, flags, &sizes, &names, count, cpu_moe);
    let fits = |o: &Offload| o.check_memory().is_ok();
    let (mut chosen, how) = match flags.layers {
        _ if flags.devices.is_empty() => (place(0, 0), None),
        GpuLayers::Count(n) => (place(n.min(everything), flags.cpu_moe), None),
        GpuLayers::Fit => {
            let moe = c.experts.is_some();
            // First experts leave, layer by layer; then whole layers do.
            let kept = if moe { c.layers } else { 0 };
            let by_experts = (flags.cpu_moe.min(kept)..=kept).map(|n| (everything, n));
            let by_layers = (0..everything).rev().map(|n| (n, kept));
            let found = by_experts
                .chain(by_layers)
                .map(|(n, e)| (place(n, e), n, e))
                .find(|(o, ..)| fits(o));
            match found {
                Some((o, n, e)) => (o, Some((n, e))),
                None => (place(0, 0), Some((0, 0))),
            }
        }
    };
    if !flags.devices.is_empty() {
        chosen.summary = summary(c, &chosen, how.is_some());
        for why in [ADAPTED, SCALED] {
            let kept = names.units.iter().filter(|u| u.kept.contains(&why));
            let kept = kept.count();
            if kept == 0 {
                continue;
            }
            if chosen.is_cpu_only() {
                "all on the CPU".clone_into(&mut chosen.summary);
            }
            chosen.summary += &format!("; {why}: {kept} parts of layers stay there for them");
        }
    }
    chosen
}

fn summary(c: &ModelConfig, o: &Offload, fitted: bool) -> String {
    let gpu = |d: &[Device]| d.iter().filter(|d| **d != Device::Cpu).count();
    if let Some(why) = &o.refused {
        return why.clone();
    }
    let mut text = format!("{} of {} layers", gpu(&o.attention), c.layers);
    if c.experts.is_some() {
        text += &format!(", the experts of {}", gpu(&o.experts));
    }
    text += match o.output {
        Device::Cpu => "",
        Device::Gpu(_) | Device::Split => ", the output matrix",
    };
    text += " on ";
    let used: Vec<_> = o.devices.iter().filter(|d| d.weights > 0).collect();
    match used.as_slice() {
        [] => return "nothing fits on a GPU; all on the CPU".to_owned(),
        used => {
            let one = |d: &&DeviceUse| {
                format!(
                    "{} ({:.1} GiB)",
                    d.name,
                    d.needed() as f64 / f64::from(1 << 30)
                )
            };
            text += &used.iter().map(one).collect::<Vec<_>>().join(", ");
        }
    }
    if o.exchanged > 0 {
        text += &format!(
            ", every layer split, {} bytes exchanged per token",
            o.exchanged
        );
    }
    if fitted {
        text += " (as much as fits)";
    }
    text
}

/// Reasons of [`Named::kept`].
const ADAPTED: &str = "LoRA adapters are computed on the CPU";
const SCALED: &str = "matrices with a .scale are multiplied on the CPU";

/// A unit's tensors by name, for `-ot`, and why it is on the CPU whatever else is asked for.
struct Named<'a> {
    unit: Unit,
    tensors: Vec<&'a str>,
    kept: Vec<&'static str>,
}

/// All units of a model.
struct Names<'a> {
    units: Vec<Named<'a>>,
}

impl<'a> Names<'a> {
    fn new(c: &ModelConfig, gguf: &'a Gguf, flags: &OffloadFlags) -> Names<'a> {
        let mut units: Vec<Named<'a>> = (0..c.layers)
            .flat_map(|i| [Unit::Attention(i), Unit::Ffn(i), Unit::Experts(i)])
            .chain([Unit::Output])
            .map(|unit| Named {
                unit,
                tensors: Vec::new(),
                kept: Vec::new(),
            })
            .collect();
        for tensor in gguf.tensors() {
            let at = match unit(&tensor.name) {
                Some(Unit::Attention(i)) if i < c.layers => 3 * i,
                Some(Unit::Ffn(i)) if i < c.layers => 3 * i + 1,
                Some(Unit::Experts(i)) if i < c.layers => 3 * i + 2,
                Some(Unit::Output) => 3 * c.layers,
                _ => continue,
            };
            units[at].tensors.push(&tensor.name);
        }
        for named in &mut units {
            if flags.adapts(named.unit) {
                named.kept.push(ADAPTED);
            }
            if named.tensors.iter().any(|t| scales::matrix(t).is_some()) {
                named.kept.push(SCALED);
            }
        }
        Names { units }
    }
}

/// With `count` layers on devices and the experts of the first `cpu_moe` layers not.
fn place(
    c: &ModelConfig,
    flags: &OffloadFlags,
    sizes: &Sizes,
    names: &Names<'_>,
    count: usize,
    cpu_moe: usize,
) -> Offload {
    let mut by_layer = layer_devices(c.layers + 1, flags, count);
    if sizes.tensor.is_some() {
        let (output, layers) = by_layer.split_last_mut().expect("at least the output");
        let split = |d: &mut Device| {
            if *d != Device::Cpu {
                *d = Device::Split;
            }
        };
        layers.iter_mut().for_each(split);
        if *output != Device::Cpu {
            *output = Device::Gpu(flags.main);
        }
    }
    let mut o = Offload {
        attention: by_layer[..c.layers].to_vec(),
        ffn: by_layer[..c.layers].to_vec(),
        experts: by_layer[..c.layers].to_vec(),
        output: by_layer[c.layers],
        kv: Vec::new(),
        tensor: sizes.tensor.clone(),
        refused: sizes.refused.clone(),
        exchanged: 0,
        streams: Streams::default(),
        shares: None,
        overridden: Vec::new(),
        summary: String::new(),
        devices: Vec::new(),
    };
    if c.experts.is_some() {
        for i in 0..cpu_moe.min(c.layers) {
            o.experts[i] = Device::Cpu;
            o.overridden
                .push((key(Unit::Experts(i)), "experts stay on the CPU"));
        }
    }
    for named in &names.units {
        let unit = named.unit;
        let hit = |r: &&Override| named.tensors.iter().any(|t| r.pattern.is_match(t));
        let (device, why) = match (named.kept.first(), flags.overrides.iter().find(hit)) {
            (Some(why), _) => (Device::Cpu, *why),
            (None, Some(found)) => (found.device, "-ot, which comes first"),
            (None, None) => continue,
        };
        match unit {
            Unit::Attention(i) => o.attention[i] = device,
            Unit::Ffn(i) => o.ffn[i] = device,
            Unit::Experts(i) => o.experts[i] = device,
            Unit::Output => o.output = device,
        }
        o.overridden.retain(|(k, _)| *k != key(unit));
        o.overridden.push((key(unit), why));
    }
    if c.experts.is_none() {
        // There are none: they follow the network, and count for nothing.
        o.experts.clone_from(&o.ffn);
    }
    o.kv = match flags.kv_on_cpu {
        true => vec![Device::Cpu; c.layers],
        false => o.attention.clone(),
    };
    if let Some(tensor) = &o.tensor {
        let split = |units: &[Device]| units.iter().filter(|d| **d == Device::Split).count() as u64;
        let [attention, ffn] = tensor.exchanged(c);
        o.exchanged = split(&o.attention) * attention;
        // Experts on the CPU take one device's input and the router's logits; their sum goes
        // to all.
        let count = c.experts.map_or(0, |e| e.count);
        let apart = (count + c.embd + tensor.all().len() * c.embd) as u64 * 4;
        for (at, experts) in o.ffn.iter().zip(&o.experts) {
            o.exchanged += match (at, experts) {
                (Device::Split, Device::Split) => ffn,
                (Device::Split, _) => apart,
                _ => 0,
            };
        }
    }
    o.devices = flags
        .devices
        .iter()
        .enumerate()
        .map(|(d, info)| device_use(&o, flags, sizes, d, info))
        .collect();
    o
}

fn device_use(
    o: &Offload,
    flags: &OffloadFlags,
    sizes: &Sizes,
    d: usize,
    info: &DeviceInfo,
) -> DeviceUse {
    let here = Device::Gpu(d);
    let sum = |at: &[Device], bytes: &[u64]| -> u64 {
        let both = at.iter().zip(bytes);
        both.filter(|(at, _)| **at == here).map(|(_, b)| b).sum()
    };
    let mut weights = sum(&o.attention, &sizes.attention)
        + sum(&o.ffn, &sizes.ffn)
        + sum(&o.experts, &sizes.experts);
    if let Some(parts) = sizes.parts.get(d) {
        let split = |at: &[Device], bytes: &[u64]| -> u64 {
            let both = at.iter().zip(bytes);
            both.filter(|(at, _)| **at == Device::Split)
                .map(|(_, b)| b)
                .sum()
        };
        weights += split(&o.attention, &parts.attention)
            + split(&o.ffn, &parts.ffn)
            + split(&o.experts, &parts.experts);
    }
    if o.output == here {
        weights += sizes.output;
    }
    let count = |at: &[Device]| at.iter().filter(|at| **at == here).count();
    let split_heads = o.tensor.as_ref().map_or(0, |t| t.heads[d].len());
    let heads = |at: &Device| match at {
        Device::Split => split_heads,
        at if *at == here => sizes.kv_heads,
        _ => 0,
    };
    let kv_heads: usize = o.kv.iter().map(heads).sum();
    let split_layers = o
        .attention
        .iter()
        .filter(|at| **at == Device::Split)
        .count();
    DeviceUse {
        name: info.name.clone(),
        description: info.description.clone(),
        weights,
        kv: kv_heads as u64 * sizes.kv,
        activations: if weights > 0 { sizes.activations } else { 0 },
        streaming: 0,
        budget: info.free.saturating_sub(flags.margin),
        layers: count(&o.attention) + if split_heads > 0 { split_layers } else { 0 },
    }
}

/// The devices of `total` layers (with the output matrix behind the last) when `count` of
/// them are on devices: the last ones, in runs by the devices' shares.
fn layer_devices(total: usize, flags: &OffloadFlags, count: usize) -> Vec<Device> {
    let start = total - count;
    let n = flags.devices.len();
    let shares: Vec<f64> = match flags.split {
        Split::None => (0..n)
            .map(|i| f64::from(u8::from(i == flags.main)))
            .collect(),
        Split::Layer | Split::Tensor => flags.by_share(),
    };
    let sum: f64 = shares.iter().sum();
    let mut ends = Vec::with_capacity(n);
    let mut so_far = 0.0;
    for share in &shares {
        so_far += share;
        ends.push(so_far / sum);
    }
    let last = shares.iter().rposition(|s| *s > 0.0).unwrap_or(0);
    (0..total)
        .map(|layer| {
            if layer < start {
                return Device::Cpu;
            }
            let at = (layer - start) as f64 / count as f64;
            let device = ends.iter().position(|end| at < *end).unwrap_or(last);
            Device::Gpu(device)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(n: usize) -> OffloadFlags {
        let device = |i| DeviceInfo {
            name: format!("SIM{i}"),
            description: String::new(),
            total: 1 << 30,
            free: 1 << 30,
        };
        OffloadFlags {
            devices: (0..n).map(device).collect(),
            margin: 0,
            ..OffloadFlags::default()
        }
    }

    fn spelt(devices: &[Device]) -> String {
        let one = |d: &Device| match d {
            Device::Cpu => '-',
            Device::Gpu(i) => char::from(b'0' + *i as u8),
            Device::Split => '*',
        };
        devices.iter().map(one).collect()
    }

    #[test]
    fn layers_split_by_shares_from_the_end() {
        let cut = |f: &OffloadFlags, count| spelt(&layer_devices(7, f, count));
        assert_eq!(cut(&flags(1), 0), "-------");
        assert_eq!(cut(&flags(1), 3), "----000");
        assert_eq!(cut(&flags(2), 7), "0000111");
        assert_eq!(cut(&flags(3), 6), "-001122");
        let shares = |s: &[f32]| OffloadFlags {
            shares: Some(s.to_vec()),
            ..flags(2)
        };
        assert_eq!(cut(&shares(&[3.0, 1.0]), 4), "---0001");
        assert_eq!(cut(&shares(&[0.0, 1.0]), 4), "---1111");
        assert_eq!(cut(&shares(&[1.0, 0.0]), 4), "---0000");
        let none = OffloadFlags {
            split: Split::None,
            main: 1,
            ..flags(2)
        };
        assert_eq!(cut(&none, 4), "---1111");
    }

    #[test]
    fn units_by_name() {
        assert_eq!(unit("blk.3.attn_q.weight"), Some(Unit::Attention(3)));
        assert_eq!(unit("blk.3.ffn_gate_inp.weight"), Some(Unit::Ffn(3)));
        assert_eq!(unit("blk.12.ffn_up_exps.weight"), Some(Unit::Experts(12)));
        assert_eq!(unit("output_norm.weight"), Some(Unit::Output));
        assert_eq!(unit("token_embd.weight"), None);
        assert_eq!(unit("blk.x.attn_q.weight"), None);
    }

    #[test]
    fn overrides_name_devices_in_use() {
        let f = flags(2);
        assert_eq!(f.parse_override("exps=CPU").unwrap().device, Device::Cpu);
        let found = f.parse_override(r"blk\.(1|2)\.=sim1").unwrap();
        assert_eq!(found.device, Device::Gpu(1));
        let error = f.parse_override("exps=CUDA7").unwrap_err().to_string();
        assert_eq!(
            error,
            "-ot exps=CUDA7: no device `CUDA7` (there are: CPU, SIM0, SIM1)"
        );
        assert!(f.parse_override("exps").is_err());
        assert!(f.parse_override("(=CPU").is_err());
    }

    #[test]
    fn wrong_flags_are_refused() {
        let shares = |s: &[f32]| OffloadFlags {
            shares: Some(s.to_vec()),
            ..flags(2)
        };
        assert!(shares(&[1.0, 2.0]).check().is_ok());
        let error = shares(&[1.0]).check().unwrap_err().to_string();
        assert_eq!(error, "-ts has 1 shares for 2 devices in use");
        assert!(shares(&[0.0, 0.0]).check().is_err());
        assert!(
            OffloadFlags {
                main: 2,
                ..flags(2)
            }
            .check()
            .is_err()
        );
        let none = OffloadFlags {
            layers: GpuLayers::Count(1),
            ..flags(0)
        };
        assert!(none.check().is_err());
    }
}
