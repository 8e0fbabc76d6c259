//! What a context keeps on one device: buffers of a step, and the cache of the layers that
//! attend there.

use super::{Behind, DeviceAttention, DeviceFfn, FfnKind, Network, Results, TopRow, Want};
use crate::{
    ModelConfig, Result,
    offload::{LOGIT_ROWS, TOP_ROWS},
};
use bytemuck::{cast_slice, cast_slice_mut};
use std::{ops::Range, sync::Arc};
use tegula_kernels::{
    device::{
        self, Buffer, Device, DeviceError, DeviceRouting, HeadOptions, Heads, MOST_LARGEST, Matrix,
        Norm, Places, PlacesData, Product, RawMatrix, stream::Feeder,
    },
    kv::KvShape,
    mem,
    ops::{RopeTable, moe::Routing},
    profile::{Op, Profile, Span},
};

/// One device's share of a context.
pub(crate) struct Lane {
    pub device: Arc<dyn Device>,
    /// Where time is counted.
    profile: Arc<Profile>,
    config: ModelConfig,
    /// Per layer, where it attends here.
    pub cache: Vec<Option<Buffer>>,
    shape: KvShape,
    /// `[m][embd]`: the residual stream.
    x: Buffer,
    /// `[m][embd]`: normalised.
    input: Buffer,
    /// `[m][embd]`: what is about to be added, or rows of `x`.
    delta: Buffer,
    /// `[m][heads][dim]`
    q: Buffer,
    attention: Buffer,
    /// `[m][kv_heads][dim]`
    k: Buffer,
    v: Buffer,
    /// `[m][experts]`
    router: Option<Buffer>,
    routing: Option<DeviceRouting>,
    /// `[LOGIT_ROWS][vocab]`, if the output matrix is here.
    logits: Option<Buffer>,
    /// `[LOGIT_ROWS]`: the likeliest tokens, likewise.
    best: Option<Buffer>,
    /// Likewise.
    top: Option<LaneTop>,
    /// `[embd]`: a norm's weights of a layer on the CPU.
    norm: Buffer,
    /// For matrices that stay on the CPU, if any are multiplied here.
    slots: Option<Network<Matrix>>,
    /// Pinned: rows of the results that this device has a share in, if there are any.
    shares: Option<[Buffer; 3]>,
    /// Row numbers.
    rows: Buffer,
    places: Places,
    /// The places are those of this step.
    placed: bool,
}

/// Where the largest logits go, of up to [`TOP_ROWS`] rows, and those of some tokens.
struct LaneTop {
    /// `[rows][k]`
    ids: Buffer,
    values: Buffer,
    /// `[n]`
    wanted: Buffer,
    /// `[rows][n]`
    picked: Buffer,
}

/// Positions that a recording stands for: the next power of two.
fn rounded(longest: usize) -> usize {
    longest.next_power_of_two().max(256)
}

impl Lane {
    /// Allocates everything that a context will need on the device, for micro-batches of `m`
    /// tokens and a cache of `pages` pages in the layers that `attends` names; `slots` are the
    /// bytes of three matrices that are brought here for a batch, `shares` the rows of three
    /// results that this device has a share in.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        device: Arc<dyn Device>,
        profile: Arc<Profile>,
        config: &ModelConfig,
        shape: &KvShape,
        pages: usize,
        m: usize,
        attends: impl Fn(usize) -> bool,
        output: bool,
        slots: Option<[u64; 3]>,
        shares: Option<[usize; 3]>,
    ) -> Result<Lane> {
        let c = config;
        let floats = |n: usize| device.alloc(4 * n.max(1));
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let one = KvShape {
            layers: 1,
            ..*shape
        };
        let layer = || {
            let cache = device.alloc(one.bytes(pages))?;
            device.zero(&cache)?;
            Ok::<_, DeviceError>(cache)
        };
        let cache = (0..c.layers)
            .map(|i| attends(i).then(layer).transpose())
            .collect::<Result<_, _>>()?;
        let pairs = c.rope.frequencies.len();
        let routing = match c.experts {
            Some(e) => Some(DeviceRouting {
                ids: floats(m * e.used)?,
                weights: floats(m * e.used)?,
                used: e.used,
            }),
            None => None,
        };
        let lane = Lane {
            cache,
            shape: one,
            x: floats(m * c.embd)?,
            input: floats(m * c.embd)?,
            delta: floats(m * c.embd)?,
            q: floats(m * q)?,
            attention: floats(m * q)?,
            k: floats(m * kv)?,
            v: floats(m * kv)?,
            router: c.experts.map(|e| floats(m * e.count)).transpose()?,
            routing,
            logits: match output {
                true => Some(floats(LOGIT_ROWS.min(m) * c.vocab)?),
                false => None,
            },
            best: match output {
                true => Some(floats(LOGIT_ROWS.min(m))?),
                false => None,
            },
            top: match output {
                true => Some(LaneTop {
                    ids: floats(TOP_ROWS.min(m) * MOST_LARGEST)?,
                    values: floats(TOP_ROWS.min(m) * MOST_LARGEST)?,
                    wanted: floats(MOST_LARGEST)?,
                    picked: floats(TOP_ROWS.min(m) * MOST_LARGEST)?,
                }),
                false => None,
            },
            norm: floats(c.embd)?,
            slots: match slots {
                Some([gate, up, down]) => Some(Network {
                    gate: device.slot(gate as usize)?,
                    up: device.slot(up as usize)?,
                    down: device.slot(down as usize)?,
                }),
                None => None,
            },
            shares: match shares.map(|rows| rows.map(|n| device.pin(4 * n.max(1)))) {
                Some([a, b, c]) => Some([a?, b?, c?]),
                None => None,
            },
            rows: floats(m)?,
            places: Places {
                tokens: floats(2 * m)?,
                pages: floats(pages)?,
                cos: floats(m * pairs)?,
                sin: floats(m * pairs)?,
                m: 0,
                pairs,
                longest: 0,
                runs: 0,
            },
            placed: false,
            config: config.clone(),
            profile,
            device,
        };
        Ok(lane)
    }

    /// A new step begins.
    pub fn begin_step(&mut self) {
        self.placed = false;
    }

    /// Brings the places of the step's tokens here, once per step.
    pub fn place(&mut self, data: &PlacesData, rope: &RopeTable) -> Result<()> {
        if self.placed {
            return Ok(());
        }
        let _span = self.profile.span(Op::Upload);
        let (cos, sin, pairs) = device::rope_rows(rope);
        let p = &mut self.places;
        let parts: [(&Buffer, &[u8]); 4] = [
            (&p.tokens, cast_slice(&data.tokens)),
            (&p.pages, cast_slice(&data.pages)),
            (&p.cos, cast_slice(cos)),
            (&p.sin, cast_slice(sin)),
        ];
        let count = if pairs > 0 { 4 } else { 2 };
        self.device.write_all(&parts[..count])?;
        p.m = data.tokens.len() / 2;
        p.longest = rounded(data.longest);
        p.runs = data.runs;
        self.placed = true;
        Ok(())
    }

    /// What names a recording of `layers`, and of `what` stands behind them.
    pub fn key(
        &self,
        m: usize,
        outputs: usize,
        want: Want,
        layers: &Range<usize>,
        what: Behind,
    ) -> [u64; 10] {
        let cache = self
            .cache
            .iter()
            .flatten()
            .next()
            .map_or(0, Buffer::address);
        let longest = self.places.longest as u64;
        [
            want as u64,
            self.x.address(),
            cache,
            m as u64,
            outputs as u64,
            longest,
            self.places.runs as u64,
            layers.start as u64,
            layers.end as u64,
            what as u64,
        ]
    }

    /// Counts the time of a call that issues operations.
    pub fn issuing(&self) -> Span<'_> {
        self.profile.span(Op::Issue)
    }

    fn upload(&self, to: &Buffer, values: &[f32], feeder: &mut dyn Feeder) -> Result<()> {
        let _span = self.profile.span(Op::Upload);
        Ok(self.device.upload(to, cast_slice(values), feeder)?)
    }

    pub fn write_x(&self, x: &[f32], feeder: &mut dyn Feeder) -> Result<()> {
        self.upload(&self.x, x, feeder)
    }

    /// Reads the beginnings of buffers, as long as their parts.
    fn download(&self, parts: &mut [(&Buffer, &mut [u8])], feeder: &mut dyn Feeder) -> Result<()> {
        let _span = self.profile.span(Op::Wait);
        Ok(self.device.download(parts, feeder)?)
    }

    /// Reads `len` values.
    fn read(
        &self,
        buffer: &Buffer,
        len: usize,
        out: &mut Vec<f32>,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        mem::resize(out, len);
        self.download(&mut [(buffer, cast_slice_mut(out))], feeder)
    }

    pub fn read_x(&self, m: usize, x: &mut Vec<f32>, feeder: &mut dyn Feeder) -> Result<()> {
        self.read(&self.x, m * self.config.embd, x, feeder)
    }

    /// `input = rms_norm(x) * w`
    fn norm(&self, w: &Buffer, m: usize) -> Result<()> {
        let c = &self.config;
        let (x, out) = (&self.x, &self.input);
        Ok(self.device.rms_norm(x, w, c.rms_eps, m, c.embd, out)?)
    }

    /// The same by weights that come from here.
    pub fn norm_by(&self, w: &[f32], m: usize) -> Result<()> {
        {
            let _span = self.profile.span(Op::Upload);
            self.device.write_all(&[(&self.norm, cast_slice(w))])?;
        }
        let _span = self.issuing();
        self.norm(&self.norm, m)
    }

    pub fn norm_qkv(&self, a: &DeviceAttention, m: usize) -> Result<()> {
        let _span = self.issuing();
        self.norm(&a.norm, m)?;
        let one = |w, out, bias| Product {
            w,
            out,
            bias,
            add: false,
        };
        let products = [
            one(&a.q, &self.q, a.q_bias.as_ref()),
            one(&a.k, &self.k, a.k_bias.as_ref()),
            one(&a.v, &self.v, a.v_bias.as_ref()),
        ];
        Ok(self.device.matmul(&products, &self.input, m)?)
    }

    /// Normalises the heads of q and k, where there is a norm, and rotates them; k and v go to
    /// the layer's cache, if it is here.
    pub fn heads(&self, a: &DeviceAttention, layer: usize) -> Result<()> {
        let _span = self.issuing();
        let (c, places) = (&self.config, &self.places);
        let options = HeadOptions {
            dim: c.head_dim,
            style: c.rope.style,
            eps: c.rms_eps,
        };
        let of = |x, norm, heads| Heads { x, norm, heads };
        let both = [
            of(&self.q, a.q_norm.as_ref(), c.heads),
            of(&self.k, a.k_norm.as_ref(), c.kv_heads),
        ];
        match &self.cache[layer] {
            None => self.device.heads(both, &options, places)?,
            Some(cache) => {
                let (v, shape) = (&self.v, &self.shape);
                self.device
                    .heads_and_store(both, v, &options, places, cache, shape)?;
            }
        }
        Ok(())
    }

    /// Attends over the layer's cache, which must be here and has this step's k and v.
    pub fn attend(&self, layer: usize) -> Result<()> {
        let _span = self.issuing();
        let Some(cache) = &self.cache[layer] else {
            unreachable!("the plan puts layer {layer}'s cache elsewhere");
        };
        let (shape, places, heads) = (&self.shape, &self.places, self.config.heads);
        let (q, out) = (&self.q, &self.attention);
        Ok(self.device.attention(cache, shape, places, q, heads, out)?)
    }

    /// Reads q, k and v, for a cache on the CPU.
    pub fn read_qkv(
        &self,
        m: usize,
        to: [&mut Vec<f32>; 3],
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        let c = &self.config;
        let heads = [c.heads, c.kv_heads, c.kv_heads];
        let [q, k, v] = to;
        for (out, heads) in [&mut *q, &mut *k, &mut *v].into_iter().zip(heads) {
            mem::resize(out, m * heads * c.head_dim);
        }
        let mut parts = [
            (&self.q, cast_slice_mut(q)),
            (&self.k, cast_slice_mut(k)),
            (&self.v, cast_slice_mut(v)),
        ];
        self.download(&mut parts, feeder)
    }

    pub fn write_attention(&self, attention: &[f32], feeder: &mut dyn Feeder) -> Result<()> {
        self.upload(&self.attention, attention, feeder)
    }

    /// Brings row numbers here.
    pub fn write_rows(&self, rows: &[usize]) -> Result<()> {
        let _span = self.profile.span(Op::Upload);
        let rows: Vec<u32> = rows.iter().map(|r| *r as u32).collect();
        Ok(self.device.write(&self.rows, 0, cast_slice(&rows))?)
    }

    /// Moves the rows that [`Lane::write_rows`] brought to the front of x and attention.
    pub fn keep_rows(&mut self, count: usize) -> Result<()> {
        let profile = Arc::clone(&self.profile);
        let _span = profile.span(Op::Issue);
        let c = &self.config;
        self.device
            .gather(&self.x, &self.rows, count, c.embd, &self.delta)?;
        std::mem::swap(&mut self.x, &mut self.delta);
        // The queries have been used.
        let q = c.heads * c.head_dim;
        self.device
            .gather(&self.attention, &self.rows, count, q, &self.q)?;
        std::mem::swap(&mut self.attention, &mut self.q);
        Ok(())
    }

    /// The swaps of [`Lane::keep_rows`], done for a recording of it, or undone, so that every
    /// step finds the same buffers.
    pub fn swap_rows(&mut self) {
        std::mem::swap(&mut self.x, &mut self.delta);
        std::mem::swap(&mut self.attention, &mut self.q);
    }

    /// `x += out · attention`
    pub fn add_attention_output(&self, a: &DeviceAttention, m: usize) -> Result<()> {
        self.attention_output(a, m, &self.x, true)
    }

    /// The same without x, where its sum over devices is added: `delta = out · attention`.
    pub fn attention_output_apart(&self, a: &DeviceAttention, m: usize) -> Result<()> {
        self.attention_output(a, m, &self.delta, false)
    }

    fn attention_output(
        &self,
        a: &DeviceAttention,
        m: usize,
        out: &Buffer,
        add: bool,
    ) -> Result<()> {
        let _span = self.issuing();
        let product = Product {
            w: &a.out,
            out,
            bias: a.out_bias.as_ref(),
            add,
        };
        Ok(self.device.matmul(&[product], &self.attention, m)?)
    }

    /// Norm and dense network, or norm and the router's logits, and the choice by them if `chooses`.
    pub fn norm_ffn(&self, ffn: &DeviceFfn, m: usize, chooses: bool) -> Result<()> {
        self.norm_ffn_to(ffn, m, &self.x, chooses)
    }

    /// The same, but the network's result is not added to x: it is `delta`.
    pub fn norm_ffn_apart(&self, ffn: &DeviceFfn, m: usize) -> Result<()> {
        if matches!(ffn.kind, FfnKind::Dense(_)) {
            self.device.zero(&self.delta)?;
        }
        self.norm_ffn_to(ffn, m, &self.delta, false)
    }

    fn norm_ffn_to(&self, ffn: &DeviceFfn, m: usize, to: &Buffer, chooses: bool) -> Result<()> {
        let _span = self.issuing();
        let router = match &ffn.kind {
            FfnKind::Dense(network) => {
                self.norm(&ffn.norm, m)?;
                let network = on_device(network);
                return Ok(self.device.ffn(&network, &self.input, m, to)?);
            }
            FfnKind::Router(router) => Product {
                w: router,
                out: self.router_logits(),
                bias: None,
                add: false,
            },
        };
        if !chooses {
            self.norm(&ffn.norm, m)?;
            return Ok(self.device.matmul(&[router], &self.input, m)?);
        }
        let norm = Norm {
            x: &self.x,
            w: &ffn.norm,
            eps: self.config.rms_eps,
            k: self.config.embd,
            out: &self.input,
        };
        let (options, routing) = (self.config.route_options(), self.routing());
        Ok(self
            .device
            .norm_route(&norm, router, m, &options, routing)?)
    }

    fn router_logits(&self) -> &Buffer {
        let Some(router) = &self.router else {
            unreachable!("a router in a model without experts");
        };
        router
    }

    fn routing(&self) -> &DeviceRouting {
        let Some(routing) = &self.routing else {
            unreachable!("a router in a model without experts");
        };
        routing
    }

    /// Chooses experts by the router's logits, here.
    pub fn route(&self, count: usize, m: usize) -> Result<()> {
        let _span = self.issuing();
        let options = self.config.route_options();
        let (logits, routing) = (self.router_logits(), self.routing());
        Ok(self.device.route(logits, m, count, &options, routing)?)
    }

    /// Reads the router's logits.
    pub fn read_router(
        &self,
        m: usize,
        count: usize,
        router: &mut Vec<f32>,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        self.read(self.router_logits(), m * count, router, feeder)
    }

    /// Reads the normalised input.
    pub fn read_norm(&self, m: usize, input: &mut Vec<f32>, feeder: &mut dyn Feeder) -> Result<()> {
        self.read(&self.input, m * self.config.embd, input, feeder)
    }

    /// Reads what experts elsewhere need: the router's logits and the normalised input.
    pub fn read_input(
        &self,
        m: usize,
        count: usize,
        router: &mut Vec<f32>,
        input: &mut Vec<f32>,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        router.resize(m * count, 0.0);
        mem::resize(input, m * self.config.embd);
        let mut parts = [
            (self.router_logits(), cast_slice_mut(router)),
            (&self.input, cast_slice_mut(input)),
        ];
        self.download(&mut parts, feeder)
    }

    /// Brings a choice of experts here.
    pub fn write_routing(&self, routing: &Routing) -> Result<()> {
        let _span = self.profile.span(Op::Upload);
        let here = self.routing();
        Ok(self.device.write_all(&[
            (&here.ids, cast_slice(&routing.ids)),
            (&here.weights, cast_slice(&routing.weights)),
        ])?)
    }

    /// Brings the input of a network, or of projections, here.
    pub fn write_input(&self, input: &[f32], feeder: &mut dyn Feeder) -> Result<()> {
        self.upload(&self.input, input, feeder)
    }

    /// `x += experts(input)`, as routed here.
    pub fn add_experts(&self, experts: &Network<Matrix>, m: usize) -> Result<()> {
        let _span = self.issuing();
        let (network, routing) = (on_device(experts), self.routing());
        Ok(self
            .device
            .experts(&network, &self.input, routing, m, &self.x)?)
    }

    /// Experts whose sum is added elsewhere: `delta`.
    pub fn experts_apart(&self, experts: &Network<Matrix>, m: usize) -> Result<()> {
        let _span = self.issuing();
        self.device.zero(&self.delta)?;
        let (network, routing) = (on_device(experts), self.routing());
        Ok(self
            .device
            .experts(&network, &self.input, routing, m, &self.delta)?)
    }

    /// The three projections of the input with matrices that are brought here. Each multiplies
    /// while the next is on its way.
    pub fn stream_qkv(
        &mut self,
        qkv: &[RawMatrix; 3],
        m: usize,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        let device = Arc::clone(&self.device);
        let Some(Network { gate, up, down }) = &mut self.slots else {
            unreachable!("the plan streams nothing to this device");
        };
        let out = [&self.q, &self.k, &self.v];
        for ((raw, slot), out) in qkv.iter().zip([gate, up, down]).zip(out) {
            self.profile
                .timed(Op::Stream, || device.stream(raw, None, feeder, slot))?;
            let _span = self.profile.span(Op::Issue);
            let product = Product {
                w: slot,
                out,
                bias: None,
                add: false,
            };
            device.matmul(&[product], &self.input, m)?;
        }
        Ok(())
    }

    /// `x += out · attention` or, apart, `delta = out · attention`, with a matrix that is brought
    /// here.
    pub fn stream_attention_output(
        &mut self,
        out: &RawMatrix,
        m: usize,
        apart: bool,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        let device = Arc::clone(&self.device);
        let Some(Network { gate: slot, .. }) = &mut self.slots else {
            unreachable!("the plan streams nothing to this device");
        };
        self.profile
            .timed(Op::Stream, || device.stream(out, None, feeder, slot))?;
        let _span = self.profile.span(Op::Issue);
        let product = Product {
            w: slot,
            out: if apart { &self.delta } else { &self.x },
            bias: None,
            add: !apart,
        };
        Ok(device.matmul(&[product], &self.attention, m)?)
    }

    fn shares(&self) -> &[Buffer; 3] {
        let Some(shares) = &self.shares else {
            unreachable!("the plan gives this device no share");
        };
        shares
    }

    /// Multiplies rows that this device has a share in with one token's `x`.
    pub fn send(&self, rows: &[Option<Matrix>], x: &[f32]) -> Result<()> {
        let _span = self.issuing();
        let one = |(w, out)| Product {
            w,
            out,
            bias: None,
            add: false,
        };
        let there = rows.iter().zip(self.shares());
        let there = there.filter_map(|(w, out)| Some((w.as_ref()?, out)));
        let products: Vec<_> = there.map(one).collect();
        Ok(self.device.matmul_from(&products, cast_slice(x), 1)?)
    }

    /// Waits for the results, as long as their parts.
    pub fn collect(&self, to: &mut [&mut [f32]]) -> Result<()> {
        let _span = self.profile.span(Op::Wait);
        let parts = self.shares().iter().zip(to);
        let mut parts: Vec<(&Buffer, &mut [u8])> =
            parts.map(|(b, y)| (b, cast_slice_mut(y))).collect();
        Ok(self.device.collect(&mut parts)?)
    }

    /// Brings a network here, or the experts that are chosen.
    pub fn stream_network(
        &mut self,
        network: &Network<RawMatrix>,
        chosen: Option<&[u32]>,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        let device = Arc::clone(&self.device);
        let Some(Network { gate, up, down }) = &mut self.slots else {
            unreachable!("the plan streams nothing to this device");
        };
        let _span = self.profile.span(Op::Stream);
        device.stream(&network.gate, chosen, feeder, gate)?;
        device.stream(&network.up, chosen, feeder, up)?;
        Ok(device.stream(&network.down, chosen, feeder, down)?)
    }

    /// `x += network(input)`, of the dense network that was brought here.
    pub fn streamed_ffn(&self, m: usize) -> Result<()> {
        let _span = self.issuing();
        let Some(slots) = &self.slots else {
            unreachable!("the plan streams nothing to this device");
        };
        let network = on_device(slots);
        Ok(self.device.ffn(&network, &self.input, m, &self.x)?)
    }

    /// Experts that were brought here, as routed here: added to x or, apart, to `delta`.
    pub fn streamed_experts(&self, m: usize, apart: bool) -> Result<()> {
        let Some(slots) = &self.slots else {
            unreachable!("the plan streams nothing to this device");
        };
        match apart {
            true => self.experts_apart(slots, m),
            false => self.add_experts(slots, m),
        }
    }

    /// Reads what is to be added elsewhere.
    pub fn read_delta(&self, m: usize, out: &mut Vec<f32>, feeder: &mut dyn Feeder) -> Result<()> {
        self.read(&self.delta, m * self.config.embd, out, feeder)
    }

    /// `x += delta`, which comes from elsewhere.
    pub fn add_delta(&self, delta: &[f32], feeder: &mut dyn Feeder) -> Result<()> {
        let _span = self.profile.span(Op::Upload);
        let (x, via, delta) = (&self.x, &self.delta, cast_slice(delta));
        Ok(self.device.add_from(x, via, delta, feeder)?)
    }

    /// Final norm, and for up to [`LOGIT_ROWS`] rows the logits, or the likeliest tokens.
    pub fn output(&self, norm: &Buffer, matrix: &Matrix, m: usize, want: Want) -> Result<()> {
        let _span = self.issuing();
        self.norm(norm, m)?;
        match m <= LOGIT_ROWS {
            true => self.wanted(matrix, &self.input, m, want),
            false => Ok(()),
        }
    }

    /// What is wanted of `m` rows, no more than [`LOGIT_ROWS`].
    fn wanted(&self, matrix: &Matrix, x: &Buffer, m: usize, want: Want) -> Result<()> {
        let _span = self.issuing();
        if want == Want::Hidden {
            return Ok(());
        }
        self.logits(matrix, x, m)?;
        match (want, &self.best) {
            (Want::Best, Some(best)) => {
                let (logits, vocab) = (self.logits_buffer(), self.config.vocab);
                Ok(self.device.argmax(logits, m, vocab, best)?)
            }
            _ => Ok(()),
        }
    }

    fn logits_buffer(&self) -> &Buffer {
        let Some(logits) = &self.logits else {
            unreachable!("the plan puts the output matrix elsewhere");
        };
        logits
    }

    fn logits(&self, matrix: &Matrix, x: &Buffer, m: usize) -> Result<()> {
        let product = Product {
            w: matrix,
            out: self.logits_buffer(),
            bias: None,
            add: false,
        };
        Ok(self.device.matmul(&[product], x, m)?)
    }

    /// Reads what [`Lane::output`] made, and makes the rest.
    pub fn read_output(
        &self,
        matrix: &Matrix,
        m: usize,
        want: Want,
        to: &mut Results<'_>,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        let c = &self.config;
        if m <= LOGIT_ROWS {
            return self.read_wanted(m, want, to, true, feeder);
        }
        if want != Want::Hidden {
            for first in (0..m).step_by(LOGIT_ROWS) {
                let count = LOGIT_ROWS.min(m - first);
                self.write_rows(&(first..first + count).collect::<Vec<_>>())?;
                let (input, part) = (&self.input, &self.delta);
                self.device.gather(input, &self.rows, count, c.embd, part)?;
                self.wanted(matrix, part, count, want)?;
                self.read_wanted(count, want, to, false, feeder)?;
            }
        }
        match want {
            Want::Best => Ok(()),
            _ => {
                let start = to.hidden.len();
                to.hidden.resize(start + m * c.embd, 0.0);
                let hidden = cast_slice_mut(&mut to.hidden[start..]);
                self.download(&mut [(&self.input, hidden)], feeder)
            }
        }
    }

    /// Reads what is wanted of `m` rows, waiting once.
    fn read_wanted(
        &self,
        m: usize,
        want: Want,
        to: &mut Results<'_>,
        hidden: bool,
        feeder: &mut dyn Feeder,
    ) -> Result<()> {
        let c = &self.config;
        let starts = (to.hidden.len(), to.logits.len(), to.best.len());
        let (mut ids, mut values, mut picked) = (Vec::new(), Vec::new(), Vec::new());
        if let (Some((top, _)), Some(here)) = (&to.top, &self.top) {
            let (logits, count) = (self.logits_buffer(), top.ids.len());
            if count > 0 {
                let _span = self.profile.span(Op::Upload);
                self.device.write(&here.wanted, 0, cast_slice(&top.ids))?;
            }
            let _span = self.issuing();
            self.device
                .top_k(logits, m, c.vocab, top.k, &here.ids, &here.values)?;
            if count > 0 {
                let (wanted, picked) = (&here.wanted, &here.picked);
                self.device
                    .pick(logits, m, c.vocab, wanted, count, picked)?;
            }
            ids.resize(m * top.k, 0u32);
            values.resize(m * top.k, 0f32);
            picked.resize(m * count, 0f32);
        }
        let mut parts: Vec<(&Buffer, &mut [u8])> = Vec::new();
        if let (Some(_), Some(here)) = (&to.top, &self.top) {
            parts.push((&here.ids, cast_slice_mut(&mut ids)));
            parts.push((&here.values, cast_slice_mut(&mut values)));
            parts.push((&here.picked, cast_slice_mut(&mut picked)));
        } else if want == Want::Logits {
            to.logits.resize(starts.1 + m * c.vocab, 0.0);
            let logits = &mut to.logits[starts.1..];
            parts.push((self.logits_buffer(), cast_slice_mut(logits)));
        }
        if let (Want::Best, Some(best)) = (want, &self.best) {
            to.best.resize(starts.2 + m, 0);
            parts.push((best, cast_slice_mut(&mut to.best[starts.2..])));
        }
        if hidden && want != Want::Best {
            to.hidden.resize(starts.0 + m * c.embd, 0.0);
            let hidden = &mut to.hidden[starts.0..];
            parts.push((&self.input, cast_slice_mut(hidden)));
        }
        self.download(&mut parts, feeder)?;
        if let Some((top, rows)) = &mut to.top {
            rows.extend((0..m).map(|i| {
                let (of, count) = (i * top.k..(i + 1) * top.k, top.ids.len());
                let largest = ids[of.clone()].iter().zip(&values[of]);
                let others = top.ids.iter().zip(&picked[i * count..]);
                let mut row: TopRow = largest.chain(others).map(|(id, v)| (*id, *v)).collect();
                row.sort_unstable_by_key(|v| v.0);
                row.dedup_by_key(|v| v.0);
                row
            }));
        }
        Ok(())
    }

    /// Copies a page of all layers here.
    pub fn copy_page(&self, from: u32, to: u32) -> Result<()> {
        for cache in self.cache.iter().flatten() {
            self.device.kv_copy(cache, &self.shape, from, to)?;
        }
        Ok(())
    }

    /// A layer's cache, if it is here.
    pub fn layer_cache(&self, layer: usize) -> Option<&Buffer> {
        self.cache[layer].as_ref()
    }

    /// Bytes of a page of one layer here.
    pub fn page_bytes(&self) -> usize {
        self.shape.layer_page_bytes()
    }

    /// Bytes of the cache here.
    pub fn cache_bytes(&self) -> usize {
        self.cache.iter().flatten().map(Buffer::bytes).sum()
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.device.forget();
    }
}

fn on_device(network: &Network<Matrix>) -> device::Network<'_> {
    device::Network {
        gate: &network.gate,
        up: &network.up,
        down: &network.down,
    }
}
