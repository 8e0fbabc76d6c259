//! One micro-batch on its way through layers that lie on the CPU and on devices.
//!
//! Where a layer's part lies on the CPU, the [`Step`] runs it; where it lies on a device, its
//! [`Lane`]. The residual stream is in one place at a time and moves when a part elsewhere
//! wants it. A graph without devices is its step and nothing else.

use super::{
    Behind, DeviceAttention, FfnKind, HostAttention, HostFfn, Lane, Layer, Matrices, Network,
    OnPool, Output, Placed, Results, SharedRows, Sharing, Step, Want,
};
use crate::{Error, Result, offload::Device, stream::Stream};
use std::{ops::Range, sync::Arc};
use tegula_kernels::{
    Weights,
    device::{self, Ended, Matrix, PlacesData, RawMatrix, Recording, stream::Feeder as _},
    ops::moe::Routing,
    profile::Op,
};

/// Which devices a graph runs on.
#[derive(Clone, Default)]
pub(crate) struct On {
    /// The device on which the whole model lies.
    pub only: Option<usize>,
    /// Devices that hold parts of layers that are split.
    pub shared: Vec<usize>,
}

/// Tokens up to which layers are recorded that are not all on one device: with more, issuing
/// them takes no time beside what they compute.
const RECORDED: usize = 8;

/// Layers that run on a device without leaving it.
struct Stretch {
    device: usize,
    layers: Range<usize>,
    behind: Behind,
}

/// Where x is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Host,
    Device(usize),
    /// On each device that layers are split over: the same values.
    All,
}

/// A step and the devices beside it.
pub(crate) struct Graph<'a> {
    pub step: Step<'a>,
    pub matrices: &'a Matrices,
    pub lanes: &'a mut [Lane],
    on: On,
    want: Want,
    places: PlacesData,
    at: At,
    /// The lanes whose buffers [`Lane::keep_rows`] swapped.
    swapped: Vec<usize>,
    /// The numbers of the rows that are kept are where a stretch runs.
    rows_there: bool,
    /// What a router on the CPU has chosen.
    routing: Option<Routing>,
    /// One device's share of a sum, on its way.
    share: Vec<f32>,
    /// The first thing that went wrong; nothing runs after it.
    error: Option<Error>,
}

impl<'a> Graph<'a> {
    pub fn new(
        step: Step<'a>,
        matrices: &'a Matrices,
        lanes: &'a mut [Lane],
        on: On,
        want: Want,
    ) -> Graph<'a> {
        let places = match lanes.is_empty() {
            true => PlacesData::default(),
            false => PlacesData::new(step.tables, step.tokens),
        };
        lanes.iter_mut().for_each(Lane::begin_step);
        Graph {
            step,
            matrices,
            lanes,
            on,
            want,
            places,
            at: At::Host,
            swapped: Vec::new(),
            rows_there: false,
            routing: None,
            share: Vec::new(),
            error: None,
        }
    }

    fn layer(&self, layer: usize) -> &'a Layer {
        &self.matrices.layers[layer]
    }

    /// What the layer's feed-forward network multiplies first, where it is on the CPU.
    fn ffn_products(&self, layer: usize) -> Vec<&'a Weights> {
        match &self.layer(layer).ffn {
            Placed::Host(f) => match &f.kind {
                FfnKind::Dense(network) => vec![&network.gate],
                FfnKind::Router(router) => vec![router],
            },
            _ => Vec::new(),
        }
    }

    /// What is multiplied behind the layer, where that is on the CPU.
    fn products_behind(&self, layer: usize) -> Vec<&'a Weights> {
        match self.matrices.layers.get(layer + 1) {
            Some(next) => match &next.attention {
                Placed::Host(a) => vec![&a.q, &a.k, &a.v],
                _ => Vec::new(),
            },
            None => match &self.matrices.output {
                Placed::Host(output) => {
                    vec![output.matrix.as_ref().unwrap_or(&self.matrices.embedding)]
                }
                _ => Vec::new(),
            },
        }
    }

    /// Runs `f` unless something has gone wrong.
    fn run(&mut self, f: impl FnOnce(&mut Graph<'a>) -> Result<()>) {
        if self.error.is_none() {
            self.error = f(self).err();
        }
    }

    /// Moves x.
    fn move_to(&mut self, to: At) -> Result<()> {
        if self.at == to {
            return Ok(());
        }
        let there = |d: &usize| self.on.shared.contains(d);
        let (from, present) = match (self.at, to) {
            (At::All, At::Device(d)) if there(&d) => (None, true),
            (At::Host, _) => (None, false),
            (At::Device(d), _) => (Some(d), false),
            (At::All, _) => (self.on.shared.first().copied(), false),
        };
        let feeder = &mut OnPool(self.step.compute);
        if let Some(from) = from {
            self.lanes[from].read_x(self.step.m, &mut self.step.buffers.x, feeder)?;
        }
        let x = &self.step.buffers.x;
        match to {
            _ if present => {}
            At::Host => {}
            At::Device(d) => self.lanes[d].write_x(x, feeder)?,
            At::All => {
                for &d in &self.on.shared {
                    self.lanes[d].write_x(x, feeder)?;
                }
            }
        }
        self.at = to;
        Ok(())
    }

    /// Adds to x, on all devices, what these have made of it, in their order.
    fn exchange(&mut self, from: impl Iterator<Item = usize>) -> Result<()> {
        let (m, delta) = (self.step.m, &mut self.step.buffers.delta);
        let feeder = &mut OnPool(self.step.compute);
        for (i, d) in from.enumerate() {
            if i == 0 {
                self.lanes[d].read_delta(m, delta, feeder)?;
            } else {
                self.lanes[d].read_delta(m, &mut self.share, feeder)?;
                self.step.compute.add_assign(delta, &self.share);
            }
        }
        self.add_to_all()
    }

    /// Adds what is here to x on all devices.
    fn add_to_all(&mut self) -> Result<()> {
        let delta = &self.step.buffers.delta;
        let feeder = &mut OnPool(self.step.compute);
        let mut shared = self.on.shared.iter();
        shared.try_for_each(|d| self.lanes[*d].add_delta(delta, feeder))
    }

    /// Norm and the three projections.
    pub fn norm_qkv(&mut self, layer: usize) {
        let Layer {
            attention,
            streamed,
            shares,
            ..
        } = self.layer(layer);
        self.run(|g| match attention {
            Placed::Host(a) => match g.streams(&streamed.attention) {
                Some((d, (qkv, _))) => g.stream_qkv(d, a, qkv),
                None => {
                    g.move_to(At::Host)?;
                    let sharing = sharing(g.lanes, &g.step, &shares.qkv);
                    g.step.norm_qkv(a, sharing)
                }
            },
            Placed::Device(d, a) => {
                g.move_to(At::Device(*d))?;
                g.norm_qkv_on(*d, a)
            }
            Placed::Split(parts) => {
                g.move_to(At::All)?;
                parts.iter().try_for_each(|(d, a)| g.norm_qkv_on(*d, a))
            }
        });
    }

    fn norm_qkv_on(&mut self, d: usize, a: &DeviceAttention) -> Result<()> {
        let lane = &mut self.lanes[d];
        lane.place(&self.places, &self.step.buffers.rope)?;
        lane.norm_qkv(a, self.step.m)
    }

    /// Normalises each head of q and k, where there is a norm, and rotates it by its position.
    pub fn heads(&mut self, layer: usize) {
        let attention = &self.layer(layer).attention;
        self.run(|g| match attention {
            Placed::Host(a) => {
                g.step.heads(a);
                Ok(())
            }
            Placed::Device(d, a) => g.lanes[*d].heads(a, layer),
            Placed::Split(parts) => parts
                .iter()
                .try_for_each(|(d, a)| g.lanes[*d].heads(a, layer)),
        });
    }

    /// Writes k and v to the cache and attends, where the cache is.
    pub fn attend(&mut self, layer: usize) {
        let Layer {
            attention,
            streamed,
            shares,
            ..
        } = self.layer(layer);
        self.run(|g| {
            let d = match attention {
                Placed::Host(a) => {
                    let elsewhere = g.streams(&streamed.attention).is_some()
                        || sharing(g.lanes, &g.step, &shares.out).is_some();
                    let forms = g.step.attends_to(layer, a).filter(|_| !elsewhere);
                    g.step.attend(layer, forms);
                    return Ok(());
                }
                Placed::Split(parts) => {
                    return parts
                        .iter()
                        .try_for_each(|(d, _)| g.lanes[*d].attend(layer));
                }
                Placed::Device(d, _) => d,
            };
            let lane = &g.lanes[*d];
            if lane.cache[layer].is_some() {
                return lane.attend(layer);
            }
            let (feeder, b) = (&mut OnPool(g.step.compute), &mut *g.step.buffers);
            lane.read_qkv(g.step.m, [&mut b.q, &mut b.k, &mut b.v], feeder)?;
            g.step.attend(layer, None);
            lane.write_attention(&g.step.buffers.attention, feeder)
        });
    }

    /// Behind the last attention only tokens that want logits matter.
    pub fn last_layer_keeps_outputs(&mut self, layer: usize) {
        let attention = &self.layer(layer).attention;
        self.run(|g| {
            let devices = match attention {
                Placed::Host(_) => {
                    let keeps = g.step.outputs.len() != g.step.m;
                    if keeps && layer + 1 == g.step.config.layers {
                        g.move_to(At::Host)?;
                    }
                    g.step.last_layer_keeps_outputs(layer);
                    return Ok(());
                }
                Placed::Device(d, _) => vec![*d],
                Placed::Split(_) => g.on.shared.clone(),
            };
            let count = g.step.outputs.len();
            if layer + 1 == g.step.config.layers && count != g.step.m {
                for d in devices {
                    if !g.rows_there {
                        g.lanes[d].write_rows(g.step.outputs)?;
                    }
                    if count > 0 {
                        g.lanes[d].keep_rows(count)?;
                        g.swapped.push(d);
                    }
                }
                g.step.m = count;
            }
            Ok(())
        });
    }

    /// `x += out · attention`.
    pub fn add_attention_output(&mut self, layer: usize) {
        let Layer {
            attention,
            streamed,
            shares,
            ..
        } = self.layer(layer);
        let m = self.step.m;
        self.run(|g| match attention {
            Placed::Host(a) => match g.streams(&streamed.attention) {
                Some((d, (_, out))) => g.stream_attention_output(d, a, out),
                None => {
                    g.move_to(At::Host)?;
                    let sharing = sharing(g.lanes, &g.step, &shares.out);
                    g.step
                        .add_attention_output(a, sharing, &g.ffn_products(layer))
                }
            },
            Placed::Device(..) | Placed::Split(_) if m == 0 => Ok(()),
            Placed::Device(d, a) => g.lanes[*d].add_attention_output(a, m),
            Placed::Split(parts) => {
                for (d, a) in parts {
                    g.lanes[*d].attention_output_apart(a, m)?;
                }
                g.exchange(parts.iter().map(|(d, _)| *d))
            }
        });
    }

    /// `x += ffn(rms_norm(x))`, or the choice of experts: then [`Graph::experts`] follows.
    pub fn norm_ffn(&mut self, layer: usize) {
        let Layer {
            ffn,
            experts,
            streamed,
            shares,
            ..
        } = self.layer(layer);
        let m = self.step.m;
        self.run(|g| match ffn {
            Placed::Host(f) => {
                if let (FfnKind::Dense(_), Some((d, network))) = (&f.kind, g.streams(&streamed.ffn))
                {
                    return g.stream_ffn(d, f, network);
                }
                g.move_to(At::Host)?;
                let both = [&shares.gate_up, &shares.down];
                let both = both.map(|rows| sharing(g.lanes, &g.step, rows));
                g.routing = g.step.norm_ffn(f, both, &g.products_behind(layer))?;
                Ok(())
            }
            Placed::Device(..) | Placed::Split(_) if m == 0 => Ok(()),
            Placed::Split(parts) => {
                g.move_to(At::All)?;
                for (d, f) in parts {
                    g.lanes[*d].norm_ffn_apart(f, m)?;
                }
                match experts {
                    Some(_) => Ok(()),
                    None => g.exchange(parts.iter().map(|(d, _)| *d)),
                }
            }
            Placed::Device(d, f) => {
                g.move_to(At::Device(*d))?;
                let chooses = matches!(experts, Some(Placed::Device(e, _)) if e == d);
                g.lanes[*d].norm_ffn(f, m, chooses)
            }
        });
    }

    /// `x += experts(input)`, if the layer has experts.
    pub fn experts(&mut self, layer: usize) {
        let Layer {
            ffn,
            experts: Some(experts),
            streamed,
            ..
        } = self.layer(layer)
        else {
            return;
        };
        let m = self.step.m;
        self.run(|g| match ffn {
            Placed::Host(_) => match g.routing.take() {
                Some(routing) => {
                    let streams = g.streams(&streamed.experts);
                    g.host_experts(experts, streams, &routing, &g.products_behind(layer))
                }
                None => Ok(()),
            },
            Placed::Device(..) | Placed::Split(_) if m == 0 => Ok(()),
            Placed::Split(parts) => g.shared_experts(parts, experts, g.streams(&streamed.experts)),
            Placed::Device(d, _) => {
                let streams = g.streams(&streamed.experts);
                let whole = streams.map(|(d, _)| d).zip(streamed.experts.as_ref());
                g.device_experts(*d, experts, whole)
            }
        });
    }

    /// Something that streams, and the device that takes it, if the batch is large enough.
    fn streams<T>(&self, streamed: &'a Option<(Stream, T)>) -> Option<(usize, &'a T)> {
        let (stream, what) = streamed.as_ref()?;
        match stream.device {
            Device::Gpu(d) if self.step.m >= stream.from => Some((d, what)),
            _ => None,
        }
    }

    /// Norm and the three projections on device `d`, where x goes and stays: between layers that
    /// stream it need not cross the link.
    fn stream_qkv(&mut self, d: usize, a: &HostAttention, qkv: &[RawMatrix; 3]) -> Result<()> {
        self.move_to(At::Device(d))?;
        let (lane, m, b) = (&mut self.lanes[d], self.step.m, &mut *self.step.buffers);
        let feeder = &mut OnPool(self.step.compute);
        lane.norm_by(&a.norm, m)?;
        lane.stream_qkv(qkv, m, feeder)?;
        lane.read_qkv(m, [&mut b.q, &mut b.k, &mut b.v], feeder)?;
        self.step.add_biases(a);
        Ok(())
    }

    fn stream_attention_output(
        &mut self,
        d: usize,
        a: &HostAttention,
        out: &RawMatrix,
    ) -> Result<()> {
        self.move_to(At::Device(d))?;
        let (lane, m, b) = (&mut self.lanes[d], self.step.m, &mut *self.step.buffers);
        let feeder = &mut OnPool(self.step.compute);
        lane.write_attention(&b.attention, feeder)?;
        let apart = a.out_bias.is_some();
        lane.stream_attention_output(out, m, apart, feeder)?;
        if let Some(bias) = &a.out_bias {
            lane.read_delta(m, &mut b.delta, feeder)?;
            self.step.compute.add_bias(&mut b.delta, bias);
            lane.add_delta(&b.delta, feeder)?;
        }
        Ok(())
    }

    /// Norm and a dense network on device `d`, where x goes and stays.
    fn stream_ffn(&mut self, d: usize, f: &HostFfn, network: &Network<RawMatrix>) -> Result<()> {
        self.move_to(At::Device(d))?;
        let (lane, m) = (&mut self.lanes[d], self.step.m);
        lane.norm_by(&f.norm, m)?;
        lane.stream_network(network, None, &mut OnPool(self.step.compute))?;
        lane.streamed_ffn(m)
    }

    /// Experts of the CPU on device `d`, which has their input: those that tokens use are
    /// brought there. Their sum is added to x or, apart, it is the lane's delta.
    fn stream_experts(
        &mut self,
        d: usize,
        network: &Network<RawMatrix>,
        routing: &Routing,
        apart: bool,
    ) -> Result<()> {
        let (chosen, routing) = routing.compact();
        let lane = &mut self.lanes[d];
        lane.write_routing(&routing)?;
        lane.stream_network(network, Some(&chosen), &mut OnPool(self.step.compute))?;
        lane.streamed_experts(self.step.m, apart)
    }

    /// The chosen experts of the CPU on device `d`, which has their input and x, and the others,
    /// of which there are some, here meanwhile.
    fn share_experts(
        &mut self,
        d: usize,
        here: &Network<Weights>,
        network: &Network<RawMatrix>,
        routing: &Routing,
        chosen: &[u32],
    ) -> Result<()> {
        let m = self.step.m;
        let counts = routing.counts().into_iter();
        let rest: Vec<_> = counts
            .filter(|(id, _)| chosen.binary_search(id).is_err())
            .collect();
        let parts = parts(&rest).iter().map(|p| routing.only(p)).collect();
        let lane = &mut self.lanes[d];
        lane.write_routing(&routing.among(chosen))?;
        let mut feeder = self.step.experts_in_parts(here, parts);
        lane.stream_network(network, Some(chosen), &mut feeder)?;
        lane.streamed_experts(m, false)?;
        while feeder.meanwhile() {}
        let feeder = &mut OnPool(self.step.compute);
        lane.add_delta(&self.step.buffers.delta, feeder)
    }

    /// Experts of a router on the CPU. `next` are the products behind them.
    fn host_experts(
        &mut self,
        experts: &Placed<Network<Weights>, Network<Matrix>>,
        streams: Option<(usize, &Network<RawMatrix>)>,
        routing: &Routing,
        next: &[&Weights],
    ) -> Result<()> {
        match experts {
            Placed::Host(experts) => match streams {
                None => self.step.add_experts(experts, routing, next),
                Some((d, network)) => {
                    let feeder = &mut OnPool(self.step.compute);
                    self.lanes[d].write_input(&self.step.buffers.input, feeder)?;
                    self.stream_experts(d, network, routing, true)?;
                    let b = &mut *self.step.buffers;
                    self.lanes[d].read_delta(self.step.m, &mut b.delta, feeder)?;
                    self.step.compute.add_assign(&mut b.x, &b.delta);
                }
            },
            Placed::Device(e, experts) => {
                if self.step.m == 0 {
                    return Ok(());
                }
                let (lane, b) = (&self.lanes[*e], &mut *self.step.buffers);
                let feeder = &mut OnPool(self.step.compute);
                lane.write_routing(routing)?;
                lane.write_input(&b.input, feeder)?;
                lane.experts_apart(experts, self.step.m)?;
                lane.read_delta(self.step.m, &mut b.delta, feeder)?;
                self.step.compute.add_assign(&mut b.x, &b.delta);
            }
            Placed::Split(_) => unreachable!("experts are split with their router"),
        }
        Ok(())
    }

    /// Experts of a router on device `d`, where x is.
    fn device_experts(
        &mut self,
        d: usize,
        experts: &Placed<Network<Weights>, Network<Matrix>>,
        streams: Option<(usize, &(Stream, Network<RawMatrix>))>,
    ) -> Result<()> {
        let m = self.step.m;
        let count = self.step.config.experts.map_or(0, |e| e.count);
        if let Placed::Device(e, experts) = experts
            && *e == d
        {
            // `norm_ffn` has chosen.
            return self.lanes[d].add_experts(experts, m);
        }
        let streams = streams.filter(|(at, _)| *at == d);
        let (feeder, b) = (&mut OnPool(self.step.compute), &mut *self.step.buffers);
        let routing = if let (Placed::Host(here), Some((_, (stream, network)))) = (experts, streams)
        {
            self.lanes[d].read_router(m, count, &mut b.router, feeder)?;
            let routing = self.step.route(count);
            let chosen = stream.shared.then(|| stream.chosen(&routing, m));
            let used = routing.counts().len();
            let Some(chosen) = chosen.filter(|chosen| chosen.len() < used) else {
                // Input and sum stay where they are.
                return self.stream_experts(d, network, &routing, false);
            };
            let input = &mut self.step.buffers.input;
            self.lanes[d].read_norm(m, input, feeder)?;
            if !chosen.is_empty() {
                return self.share_experts(d, here, network, &routing, &chosen);
            }
            routing
        } else {
            self.lanes[d].read_input(m, count, &mut b.router, &mut b.input, feeder)?;
            self.step.route(count)
        };
        match experts {
            Placed::Host(experts) => self.step.experts_apart(experts, &routing),
            Placed::Device(e, experts) => {
                let (lane, b) = (&self.lanes[*e], &mut *self.step.buffers);
                lane.write_routing(&routing)?;
                lane.write_input(&b.input, feeder)?;
                lane.experts_apart(experts, m)?;
                lane.read_delta(m, &mut b.delta, feeder)?;
            }
            Placed::Split(_) => unreachable!("experts are split with their router"),
        }
        self.lanes[d].add_delta(&self.step.buffers.delta, feeder)
    }

    /// Experts of routers on all devices that hold a part of them, which choose alike, or on
    /// the CPU.
    fn shared_experts<F>(
        &mut self,
        routers: &[(usize, F)],
        experts: &Placed<Network<Weights>, Network<Matrix>>,
        streams: Option<(usize, &Network<RawMatrix>)>,
    ) -> Result<()> {
        let m = self.step.m;
        let count = self.step.config.experts.map_or(0, |e| e.count);
        match experts {
            Placed::Split(parts) => {
                for (d, experts) in parts {
                    self.lanes[*d].route(count, m)?;
                    self.lanes[*d].experts_apart(experts, m)?;
                }
                self.exchange(parts.iter().map(|(d, _)| *d))
            }
            Placed::Host(experts) => {
                let Some((d, _)) = routers.first() else {
                    unreachable!("a split network without parts");
                };
                let (feeder, b) = (&mut OnPool(self.step.compute), &mut *self.step.buffers);
                if let Some((at, network)) = streams.filter(|(at, _)| at == d) {
                    self.lanes[at].read_router(m, count, &mut b.router, feeder)?;
                    let routing = self.step.route(count);
                    self.stream_experts(at, network, &routing, true)?;
                    self.lanes[at].read_delta(m, &mut self.step.buffers.delta, feeder)?;
                    return self.add_to_all();
                }
                self.lanes[*d].read_input(m, count, &mut b.router, &mut b.input, feeder)?;
                let routing = self.step.route(count);
                self.step.experts_apart(experts, &routing);
                self.add_to_all()
            }
            Placed::Device(..) => unreachable!("layers are split, their experts are not"),
        }
    }

    /// Runs all layers, whose blocks `layer` calls up to the choice of experts, and the output;
    /// appends what is wanted.
    pub fn finish(
        mut self,
        layer: impl Fn(usize, &mut Graph<'a>),
        mut results: Results<'_>,
    ) -> Result<()> {
        let (mut next, mut output) = (0, false);
        while next < self.matrices.layers.len() {
            let Some(stretch) = self.stretch(next) else {
                layer(next, &mut self);
                self.experts(next);
                next += 1;
                continue;
            };
            next = stretch.layers.end;
            output = stretch.behind == Behind::Output;
            self.run(|g| g.stay(&stretch, &layer));
            if stretch.behind == Behind::Router {
                self.experts(next - 1);
            }
        }
        if !output {
            self.run(|g| g.output());
        }
        // The results are in the swapped buffers until they have been read.
        self.run(|g| g.read_output(&mut results));
        self.restore_rows();
        match self.error {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// The step behind what has run, unless something went wrong.
    pub fn ended(self) -> Result<Step<'a>> {
        self.error.map_or(Ok(self.step), Err)
    }

    fn restore_rows(&mut self) {
        for d in std::mem::take(&mut self.swapped) {
            self.lanes[d].swap_rows();
        }
    }

    /// The longest stretch that begins with this layer.
    fn stretch(&self, first: usize) -> Option<Stretch> {
        let layers = &self.matrices.layers;
        let device = match layers[first].attention {
            Placed::Device(d, _) => d,
            Placed::Host(_) | Placed::Split(_) => return None,
        };
        let at = |at: &usize| *at == device;
        let (mut end, mut behind) = (first, Behind::Layer);
        while let Some(Layer {
            attention: Placed::Device(a, _),
            ffn: Placed::Device(f, _),
            experts,
            ..
        }) = layers.get(end)
            && at(a)
            && at(f)
            && self.lanes[device].layer_cache(end).is_some()
        {
            end += 1;
            if experts
                .as_ref()
                .is_some_and(|e| !matches!(e, Placed::Device(e, _) if at(e)))
            {
                behind = Behind::Router;
                break;
            }
        }
        if behind == Behind::Layer
            && end == layers.len()
            && matches!(&self.matrices.output, Placed::Device(d, _) if at(d))
        {
            behind = Behind::Output;
        }
        (end > first).then_some(Stretch {
            device,
            layers: first..end,
            behind,
        })
    }

    /// Layers on one device, from a recording if there is one.
    fn stay(&mut self, stretch: &Stretch, layer: &impl Fn(usize, &mut Graph<'a>)) -> Result<()> {
        let Stretch {
            device: d,
            layers,
            behind,
        } = stretch;
        let (d, m, outputs) = (*d, self.step.m, self.step.outputs.len());
        let keeps = layers.end == self.matrices.layers.len() && outputs != m;
        self.lanes[d].place(&self.places, &self.step.buffers.rope)?;
        if keeps {
            self.lanes[d].write_rows(self.step.outputs)?;
        }
        self.move_to(At::Device(d))?;
        self.rows_there = true;
        if self.on.only.is_none() && m > RECORDED {
            self.issue(stretch, layer);
            self.rows_there = false;
            return self.error.take().map_or(Ok(()), Err);
        }
        let device = Arc::clone(&self.lanes[d].device);
        let profile = &self.step.compute.profile;
        let key = self.lanes[d].key(m, outputs, self.want, layers, *behind);
        let ended = loop {
            if profile.timed(Op::Issue, || device.begin(&key))? == Recording::Replayed {
                if keeps {
                    self.step.m = outputs;
                    if outputs > 0 {
                        self.lanes[d].swap_rows();
                        self.swapped.push(d);
                    }
                }
                break Ok(());
            }
            self.issue(stretch, layer);
            // Whatever happened, a recording must not stay open.
            let ended = profile.timed(Op::Issue, || device.end());
            let error = self.error.take();
            match ended? {
                Ended::Done => break error.map_or(Ok(()), Err),
                // As before the layers.
                Ended::Again => {
                    self.restore_rows();
                    self.step.m = m;
                }
            }
        };
        self.rows_there = false;
        ended
    }

    /// Issues what is in a stretch.
    fn issue(&mut self, stretch: &Stretch, layer: &impl Fn(usize, &mut Graph<'a>)) {
        let Range { start, end } = stretch.layers;
        for i in start..end {
            layer(i, self);
            if i + 1 < end || stretch.behind != Behind::Router {
                self.experts(i);
            }
        }
        if stretch.behind == Behind::Output {
            self.run(|g| g.output());
        }
    }

    /// Final norm and output matrix on a device.
    fn output(&mut self) -> Result<()> {
        if self.step.m == 0 || self.step.outputs.is_empty() {
            return Ok(());
        }
        let Placed::Device(d, Output { norm, matrix }) = &self.matrices.output else {
            return self.move_to(At::Host);
        };
        self.move_to(At::Device(*d))?;
        let Some(matrix) = matrix else {
            unreachable!("a device has its own copy of a tied output matrix");
        };
        self.lanes[*d].output(norm, matrix, self.step.m, self.want)
    }

    fn read_output(&mut self, results: &mut Results<'_>) -> Result<()> {
        if self.step.outputs.is_empty() {
            return Ok(());
        }
        match &self.matrices.output {
            Placed::Host(output) => {
                let embedding = &self.matrices.embedding;
                let sharing = sharing(self.lanes, &self.step, &self.matrices.output_share);
                match self.want {
                    Want::Hidden => self.step.hidden(output, results.hidden),
                    Want::Logits => {
                        self.step.hidden(output, results.hidden);
                        self.step
                            .logits(output, embedding, sharing, results.logits)?;
                    }
                    Want::Best => {
                        let logits = &mut Vec::new();
                        self.step.hidden(output, &mut Vec::new());
                        self.step.logits(output, embedding, sharing, logits)?;
                        let rows = logits.chunks(self.step.config.vocab);
                        results.best.extend(rows.map(device::largest));
                    }
                }
                Ok(())
            }
            Placed::Split(_) => unreachable!("the output matrix is on one device"),
            Placed::Device(d, Output { matrix, .. }) => {
                let Some(matrix) = matrix else {
                    unreachable!("a device has its own copy of a tied output matrix");
                };
                let feeder = &mut OnPool(self.step.compute);
                self.lanes[*d].read_output(matrix, self.step.m, self.want, results, feeder)
            }
        }
    }
}

/// Rows that a device multiplies for a step: of a single token.
fn sharing<'a>(
    lanes: &'a [Lane],
    step: &Step<'_>,
    rows: &'a Option<SharedRows>,
) -> Option<Sharing<'a>> {
    let single = step.tokens.len() == 1 && step.m == 1;
    single.then(|| SharedRows::on(rows, lanes)).flatten()
}

/// Experts and their tokens, some at a time: so many that all threads have work, and so few that
/// a piece on its way to a device is not kept waiting. Each ascends.
fn parts(experts: &[(u32, usize)]) -> Vec<Vec<u32>> {
    const TOKENS: usize = 256;
    const EXPERTS: usize = 8;
    let mut parts: Vec<Vec<u32>> = Vec::new();
    let mut tokens = 0;
    for &(id, n) in experts {
        match parts.last_mut() {
            Some(part) if part.len() < EXPERTS && tokens < TOKENS => {
                part.push(id);
                tokens += n;
            }
            _ => {
                parts.push(vec![id]);
                tokens = n;
            }
        }
    }
    parts.iter_mut().for_each(|part| part.sort_unstable());
    parts
}
