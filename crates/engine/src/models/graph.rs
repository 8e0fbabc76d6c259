//! One micro-batch on its way through layers that lie on the CPU and on devices.
//!
//! Where a layer's part lies on the CPU, the [`Step`] runs it; where it lies on a device, its
//! [`Lane`]. The residual stream is in one place at a time and moves when a part elsewhere
//! wants it. A graph without devices is its step and nothing else.

use super::{Attention, Lane, Layer, Matrices, Network, Output, Placed, Step};
use crate::{Error, Result};
use tegula_kernels::{
    Weights,
    device::{Ended, Matrix, PlacesData, Recording},
    ops::moe::Routing,
};

/// A step and the devices beside it.
pub(crate) struct Graph<'a> {
    pub step: Step<'a>,
    pub matrices: &'a Matrices,
    pub lanes: &'a mut [Lane],
    /// The device on which the whole model lies.
    pub only: Option<usize>,
    /// Whether logits are wanted, not hidden states alone.
    logits: bool,
    places: PlacesData,
    /// Where x is: on a device, or on the CPU.
    at: Option<usize>,
    /// The lane whose buffers [`Lane::keep_rows`] swapped.
    swapped: Option<usize>,
    /// The first thing that went wrong; nothing runs after it.
    error: Option<Error>,
}

impl<'a> Graph<'a> {
    pub fn new(
        step: Step<'a>,
        matrices: &'a Matrices,
        lanes: &'a mut [Lane],
        only: Option<usize>,
        logits: bool,
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
            only,
            logits,
            places,
            at: None,
            swapped: None,
            error: None,
        }
    }

    fn layer(&self, layer: usize) -> &'a Layer {
        &self.matrices.layers[layer]
    }

    /// Runs `f` unless something has gone wrong.
    fn run(&mut self, f: impl FnOnce(&mut Graph<'a>) -> Result<()>) {
        if self.error.is_none() {
            self.error = f(self).err();
        }
    }

    /// Moves x to a device, or with `None` to the CPU.
    fn move_to(&mut self, to: Option<usize>) -> Result<()> {
        if self.at == to {
            return Ok(());
        }
        if let Some(from) = self.at {
            self.lanes[from].read_x(self.step.m, &mut self.step.buffers.x)?;
        }
        if let Some(to) = to {
            self.lanes[to].write_x(&self.step.buffers.x)?;
        }
        self.at = to;
        Ok(())
    }

    /// Norm and the three projections.
    pub fn norm_qkv(&mut self, layer: usize) {
        let attention = &self.layer(layer).attention;
        self.run(|g| match attention {
            Placed::Host(a) => {
                g.move_to(None)?;
                g.step.norm_qkv(a);
                Ok(())
            }
            Placed::Device(d, a) => {
                g.move_to(Some(*d))?;
                let lane = &mut g.lanes[*d];
                lane.place(&g.places, &g.step.buffers.rope)?;
                lane.norm_qkv(a, g.step.m)
            }
        });
    }

    /// Normalises each head of q and k. On a device this happens together with the rotation.
    pub fn norm_heads(&mut self, layer: usize) {
        if let (Placed::Host(a), None) = (&self.layer(layer).attention, &self.error) {
            self.step.norm_heads(a);
        }
    }

    /// Rotates q and k by their positions.
    pub fn rope(&mut self, layer: usize) {
        let attention = &self.layer(layer).attention;
        self.run(|g| match attention {
            Placed::Host(_) => {
                g.step.rope();
                Ok(())
            }
            Placed::Device(d, a) => g.lanes[*d].heads(a),
        });
    }

    /// Writes k and v to the cache and attends, where the cache is.
    pub fn attend(&mut self, layer: usize) {
        let attention = &self.layer(layer).attention;
        self.run(|g| {
            let Placed::Device(d, _) = attention else {
                g.step.attend(layer);
                return Ok(());
            };
            let lane = &g.lanes[*d];
            if lane.cache[layer].is_some() {
                return lane.attend(layer);
            }
            let b = &mut *g.step.buffers;
            lane.read_qkv(g.step.m, [&mut b.q, &mut b.k, &mut b.v])?;
            g.step.attend(layer);
            lane.write_attention(&g.step.buffers.attention)
        });
    }

    /// Behind the last attention only tokens that want logits matter.
    pub fn last_layer_keeps_outputs(&mut self, layer: usize) {
        let attention = &self.layer(layer).attention;
        self.run(|g| {
            let Placed::Device(d, _) = attention else {
                g.step.last_layer_keeps_outputs(layer);
                return Ok(());
            };
            let count = g.step.outputs.len();
            if layer + 1 == g.step.config.layers && count != g.step.m {
                if g.only.is_none() {
                    g.lanes[*d].write_rows(g.step.outputs)?;
                }
                if count > 0 {
                    g.lanes[*d].keep_rows(count)?;
                    g.swapped = Some(*d);
                }
                g.step.m = count;
            }
            Ok(())
        });
    }

    /// `x += out · attention`.
    pub fn add_attention_output(&mut self, layer: usize) {
        let attention = &self.layer(layer).attention;
        let m = self.step.m;
        self.run(|g| match attention {
            Placed::Host(a) => {
                g.step.add_attention_output(a);
                Ok(())
            }
            Placed::Device(..) if m == 0 => Ok(()),
            Placed::Device(d, a @ Attention { .. }) => g.lanes[*d].add_attention_output(a, m),
        });
    }

    /// `x += ffn(rms_norm(x))`, dense or by experts.
    pub fn norm_ffn(&mut self, layer: usize) {
        let Layer { ffn, experts, .. } = self.layer(layer);
        let m = self.step.m;
        self.run(|g| match ffn {
            Placed::Host(f) => {
                g.move_to(None)?;
                match (g.step.norm_ffn(f), experts) {
                    (Some(routing), Some(experts)) => g.host_experts(experts, &routing),
                    _ => Ok(()),
                }
            }
            Placed::Device(..) if m == 0 => Ok(()),
            Placed::Device(d, f) => {
                g.move_to(Some(*d))?;
                g.lanes[*d].norm_ffn(f, m)?;
                match experts {
                    Some(experts) => g.device_experts(*d, experts),
                    None => Ok(()),
                }
            }
        });
    }

    /// Experts of a router on the CPU.
    fn host_experts(
        &mut self,
        experts: &Placed<Network<Weights>, Network<Matrix>>,
        routing: &Routing,
    ) -> Result<()> {
        match experts {
            Placed::Host(experts) => self.step.add_experts(experts, routing),
            Placed::Device(e, experts) => {
                if self.step.m == 0 {
                    return Ok(());
                }
                let b = &mut *self.step.buffers;
                self.lanes[*e].write_input(routing, &b.input)?;
                self.lanes[*e].experts_apart(experts, self.step.m, &mut b.delta)?;
                self.step.compute.add_assign(&mut b.x, &b.delta);
            }
        }
        Ok(())
    }

    /// Experts of a router on device `d`, where x is.
    fn device_experts(
        &mut self,
        d: usize,
        experts: &Placed<Network<Weights>, Network<Matrix>>,
    ) -> Result<()> {
        let m = self.step.m;
        let count = self.step.config.experts.map_or(0, |e| e.count);
        if let Placed::Device(e, experts) = experts
            && *e == d
        {
            self.lanes[d].route(count, m)?;
            return self.lanes[d].add_experts(experts, m);
        }
        let b = &mut *self.step.buffers;
        self.lanes[d].read_input(m, count, &mut b.router, &mut b.input)?;
        let routing = self.step.route(count);
        match experts {
            Placed::Host(experts) => self.step.experts_apart(experts, &routing),
            Placed::Device(e, experts) => {
                let b = &mut *self.step.buffers;
                self.lanes[*e].write_input(&routing, &b.input)?;
                self.lanes[*e].experts_apart(experts, m, &mut b.delta)?;
            }
        }
        self.lanes[d].add_delta(&self.step.buffers.delta)
    }

    /// Runs `layers`, which calls the graph's blocks, and the output; appends `hidden`
    /// `[outputs][embd]` and `logits` `[outputs][vocab]`.
    pub fn finish(
        mut self,
        layers: impl Fn(&mut Graph<'a>),
        hidden: &mut Vec<f32>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        match self.only {
            None => {
                layers(&mut self);
                self.run(|g| g.output());
            }
            Some(d) => self.run(|g| g.recorded(d, layers)),
        }
        if let Some(d) = self.swapped.take() {
            // The results are in the swapped buffers until they have been read.
            self.run(|g| g.read_output(hidden, logits));
            self.lanes[d].restore_rows();
        } else {
            self.run(|g| g.read_output(hidden, logits));
        }
        match self.error {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// The whole step on one device, from a recording if there is one.
    fn recorded(&mut self, d: usize, layers: impl Fn(&mut Graph<'a>)) -> Result<()> {
        let (m, outputs) = (self.step.m, self.step.outputs.len());
        self.lanes[d].place(&self.places, &self.step.buffers.rope)?;
        self.lanes[d].write_rows(self.step.outputs)?;
        self.move_to(Some(d))?;
        let device = std::sync::Arc::clone(&self.lanes[d].device);
        let key = self.lanes[d].key(m, outputs, self.logits);
        loop {
            if device.begin(&key)? == Recording::Replayed {
                self.step.m = outputs;
                return Ok(());
            }
            layers(self);
            if self.error.is_none() {
                self.error = self.output().err();
            }
            // Whatever happened, a recording must not stay open.
            let ended = device.end();
            let error = self.error.take();
            match ended? {
                Ended::Done => return error.map_or(Ok(()), Err),
                // As before the layers.
                Ended::Again => {
                    if let Some(d) = self.swapped.take() {
                        self.lanes[d].restore_rows();
                    }
                    self.step.m = m;
                }
            }
        }
    }

    /// Final norm and output matrix on a device.
    fn output(&mut self) -> Result<()> {
        if self.step.m == 0 || self.step.outputs.is_empty() {
            return Ok(());
        }
        let Placed::Device(d, Output { norm, matrix }) = &self.matrices.output else {
            return self.move_to(None);
        };
        self.move_to(Some(*d))?;
        let Some(matrix) = matrix else {
            unreachable!("a device has its own copy of a tied output matrix");
        };
        self.lanes[*d].output(norm, self.logits.then_some(matrix), self.step.m)
    }

    fn read_output(&mut self, hidden: &mut Vec<f32>, logits: &mut Vec<f32>) -> Result<()> {
        if self.step.outputs.is_empty() {
            return Ok(());
        }
        match &self.matrices.output {
            Placed::Host(output) => {
                let embedding = &self.matrices.embedding;
                self.step.hidden(output, hidden);
                if self.logits {
                    self.step.logits(output, embedding, logits);
                }
                Ok(())
            }
            Placed::Device(d, Output { matrix, .. }) => {
                let Some(matrix) = matrix else {
                    unreachable!("a device has its own copy of a tied output matrix");
                };
                let matrix = self.logits.then_some(matrix);
                self.lanes[*d].read_output(matrix, self.step.m, hidden, logits)
            }
        }
    }
}
