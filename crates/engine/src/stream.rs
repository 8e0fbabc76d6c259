//! Which weights on the CPU are brought to a device for batches of many tokens, and for how
//! many: op offload, as llama.cpp calls it.
//!
//! Decided behind the placement and without any say in it: what lies on devices is the same
//! with and without streaming. A device takes part if there is room for its slots, which hold
//! one unit's matrices at a time; half of the margin may be used for that, since it is there
//! for what a device needs besides weights. Slots depend on neither tier nor AMX, so that a
//! device holds the same bytes with AMX and without it.

use crate::{
    ModelConfig, PlanFlags,
    offload::{Device, Offload, Unit, device_bytes},
    scales,
};
use serde::Serialize;
use tegula_gguf::{Gguf, TensorInfo};
use tegula_kernels::{
    device::{
        self,
        stream::{Cpu, LANDING, Work},
    },
    ops::moe::Routing,
};

/// Where weights on the CPU are multiplied, in batches of at least so many tokens.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Stream {
    pub device: Device,
    /// Tokens.
    pub from: usize,
    /// The CPU computes a part of the experts meanwhile: those with the fewest tokens.
    pub shared: bool,
    /// By which the parts are reckoned.
    #[serde(skip)]
    pub(crate) reckoned: (Work, Cpu),
}

impl Stream {
    /// The experts that go to the device of a batch of `m` tokens that is shared, ascending.
    pub(crate) fn chosen(&self, routing: &Routing, m: usize) -> Vec<u32> {
        let (work, cpu) = &self.reckoned;
        work.split(m, &routing.counts(), cpu)
    }
}

/// What streams.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Streams {
    attention: Vec<Option<Stream>>,
    ffn: Vec<Option<Stream>>,
    experts: Vec<Option<Stream>>,
    /// Bytes of the slots on each device; `None` where nothing streams to.
    pub(crate) slots: Vec<Option<[u64; 3]>>,
}

impl Streams {
    /// Whether a unit streams.
    pub(crate) fn get(&self, unit: Unit) -> Option<Stream> {
        let (all, i) = match unit {
            Unit::Attention(i) => (&self.attention, i),
            Unit::Ffn(i) => (&self.ffn, i),
            Unit::Experts(i) => (&self.experts, i),
            Unit::Output => return None,
        };
        all.get(i).copied().flatten()
    }

    /// Layers whose attention streams, whose dense network does, and whose experts do.
    pub fn layers(&self) -> [usize; 3] {
        [&self.attention, &self.ffn, &self.experts].map(|all| all.iter().flatten().count())
    }

    fn set(&mut self, unit: Unit, stream: Option<Stream>) {
        match unit {
            Unit::Attention(i) => self.attention[i] = stream,
            Unit::Ffn(i) => self.ffn[i] = stream,
            Unit::Experts(i) => self.experts[i] = stream,
            Unit::Output => {}
        }
    }

    /// In words; empty where nothing streams.
    fn summary(&self, devices: &[device::DeviceInfo]) -> String {
        let units = self.attention.iter().chain(&self.ffn).chain(&self.experts);
        let all: Vec<Stream> = units.flatten().copied().collect();
        let (Some(least), Some(most)) = (
            all.iter().map(|s| s.from).min(),
            all.iter().map(|s| s.from).max(),
        ) else {
            return String::new();
        };
        let mut names: Vec<&str> = Vec::new();
        for (d, info) in devices.iter().enumerate() {
            if all.iter().any(|s| s.device == Device::Gpu(d)) {
                names.push(&info.name);
            }
        }
        let tokens = match least == most {
            true => format!("{least}"),
            false => format!("{least} to {most}"),
        };
        format!(
            "; of the weights on the CPU {} units stream to {} in batches of at least {tokens} tokens",
            all.len(),
            names.join(", ")
        )
    }
}

/// The matrices of a unit, in the slots that they take.
fn matrices(unit: Unit) -> &'static [(&'static str, usize)] {
    match unit {
        Unit::Attention(_) => &[
            ("attn_q", 0),
            ("attn_k", 1),
            ("attn_v", 2),
            ("attn_output", 0),
        ],
        Unit::Ffn(_) => &[("ffn_gate", 0), ("ffn_up", 1), ("ffn_down", 2)],
        Unit::Experts(_) => &[
            ("ffn_gate_exps", 0),
            ("ffn_up_exps", 1),
            ("ffn_down_exps", 2),
        ],
        Unit::Output => &[],
    }
}

/// True if the tensor is one that its unit's streaming brings to a device.
pub(crate) fn is_streamed(unit: Unit, name: &str) -> bool {
    let part = name.splitn(3, '.').nth(2).unwrap_or("");
    let part = part.strip_suffix(".weight").unwrap_or("");
    matrices(unit).iter().any(|(matrix, _)| *matrix == part)
}

/// Decides what streams, and notes it in `offload`.
pub(crate) fn decide(
    c: &ModelConfig,
    gguf: &Gguf,
    flags: &PlanFlags,
    tiles: &dyn Fn(&TensorInfo) -> bool,
    offload: &mut Offload,
) {
    let f = &flags.offload;
    let mut streams = Streams {
        attention: vec![None; c.layers],
        ffn: vec![None; c.layers],
        experts: vec![None; c.layers],
        slots: vec![None; f.devices.len()],
    };
    if f.op_offload && !offload.is_cpu_only() && offload.refused.is_none() {
        // In the order of what they gain: a kind that does not fit leaves the others alone.
        let experts: Vec<Unit> = match c.experts {
            Some(_) => (0..c.layers).map(Unit::Experts).collect(),
            None => (0..c.layers).map(Unit::Ffn).collect(),
        };
        let attention: Vec<Unit> = (0..c.layers).map(Unit::Attention).collect();
        for unit in experts.into_iter().chain(attention) {
            if let Some((d, slots, stream)) = unit_streams(c, gguf, flags, tiles, offload, unit)
                && let Some(slots) = room(f, offload, d, streams.slots[d], slots)
            {
                streams.slots[d] = Some(slots);
                streams.set(unit, stream);
            }
        }
    }
    for (d, slots) in streams.slots.iter().enumerate() {
        offload.devices[d].streaming = slots.map_or(0, |s| s.iter().sum::<u64>() + LANDING as u64);
    }
    offload.summary += &streams.summary(&f.devices);
    offload.streams = streams;
}

/// Slots that are as large as both ask for, if the device has room for them.
fn room(
    flags: &crate::OffloadFlags,
    offload: &Offload,
    d: usize,
    held: Option<[u64; 3]>,
    wanted: [u64; 3],
) -> Option<[u64; 3]> {
    let held = held.unwrap_or_default();
    let slots = [0, 1, 2].map(|i| held[i].max(wanted[i]));
    let needed = offload.devices[d].placed() + slots.iter().sum::<u64>() + LANDING as u64;
    (needed <= flags.devices[d].free.saturating_sub(flags.margin / 2)).then_some(slots)
}

/// The device that a unit on the CPU would stream to, the slots that it takes there, and from
/// how many tokens on it pays; `None` where it can't.
fn unit_streams(
    c: &ModelConfig,
    gguf: &Gguf,
    flags: &PlanFlags,
    tiles: &dyn Fn(&TensorInfo) -> bool,
    offload: &Offload,
    unit: Unit,
) -> Option<(usize, [u64; 3], Option<Stream>)> {
    let f = &flags.offload;
    if offload.device(unit) != Device::Cpu || f.adapts(unit) {
        return None;
    }
    let holds = |d: &usize| offload.devices[*d].weights > 0;
    let beside = match unit {
        Unit::Experts(i) => offload.ffn[i],
        // A device that has a part of the heads has room for no more of them.
        Unit::Attention(_) if offload.tensor.is_some() => return None,
        _ => Device::Cpu,
    };
    let d = match (beside, &offload.tensor) {
        (Device::Gpu(d), _) => d,
        (Device::Split, Some(tensor)) => *tensor.feeding().first()?,
        _ => [f.main].into_iter().chain(0..f.devices.len()).find(holds)?,
    };
    let (i, experts) = match unit {
        Unit::Attention(i) | Unit::Ffn(i) => (i, None),
        Unit::Experts(i) => (i, c.experts.map(|e| (e.count, e.used))),
        Unit::Output => return None,
    };
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let (values, hops) = match unit {
        Unit::Attention(_) => (2 * c.embd + 2 * q + 2 * kv, 2),
        _ => (2 * c.embd, 1),
    };
    let mut work = Work {
        bytes: 0,
        weights: 0,
        values: values as u64,
        hops,
        experts,
    };
    let mut slots = [0; 3];
    let mut on_tiles = flags.amx.is_some();
    for (part, slot) in matrices(unit) {
        let tensor = gguf.tensor(&format!("blk.{i}.{part}.weight"))?;
        let n = tensor.shape.get(1).copied().unwrap_or(1);
        let stack = tensor.shape.get(2).copied().unwrap_or(1);
        // Sparse ones are not in the file as a device takes them, and it knows no factors.
        if tensor.ty.is_sparse() || scales::of(gguf, &tensor.name).is_some() {
            return None;
        }
        device::matrix_bytes(tensor.ty, n, tensor.row_len(), stack)?;
        slots[*slot] = device_bytes(tensor).max(slots[*slot]);
        work.bytes += tensor.bytes;
        work.weights += tensor.elements();
        on_tiles &= tiles(tensor);
    }
    let cpu = Cpu {
        rates: f.rates,
        tier: flags.tier,
        tiles: on_tiles,
        threads: flags.threads,
    };
    // What a user asks for is not second-guessed. A sum of two parts is simple where the device
    // has the input and x.
    let shared = f.op_offload_min_batch.is_none() && beside == Device::Gpu(d);
    let from = match f.op_offload_min_batch {
        Some(n) => Some(n.max(1)),
        None => work.fewest_tokens(&cpu, shared),
    };
    let stream = |from| Stream {
        device: Device::Gpu(d),
        from,
        shared,
        reckoned: (work, cpu),
    };
    Some((d, slots, from.map(stream)))
}
