//! What the graphs are made of. A [`Step`] holds one micro-batch on its way through the
//! layers; its buffers are kept from step to step.

use super::{FfnKind, HostAttention, HostFfn, Network, Output, Sharing, multiply};
use crate::{ModelConfig, Result};
use tegula_kernels::{
    Acts, Compute, Forms, Weights,
    device::stream::Feeder,
    kv::{KvCache, PageTable},
    mem,
    ops::{
        Attended, Heads, RopeTable, Token,
        moe::{MoeScratch, Routing},
    },
};

/// Buffers of a step, as large as the largest step so far.
#[derive(Default)]
pub(crate) struct Buffers {
    /// `[m][embd]`: the residual stream.
    pub x: Vec<f32>,
    /// `[m][embd]`: normalised.
    pub input: Vec<f32>,
    /// `input` in the forms that the next products take.
    acts: Acts,
    /// `[m][heads][dim]`
    pub q: Vec<f32>,
    /// `[m][kv_heads][dim]`
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    /// `[m][heads][dim]`
    pub attention: Vec<f32>,
    /// Attention is in `acts` instead.
    attended: bool,
    /// `[m][ff]`, in the form that `down` takes.
    hidden: Acts,
    /// `[ff]` of one token whose products are shared: of gate, of up, and what goes to down.
    network: [Vec<f32>; 3],
    /// `[m][embd]`: what is about to be added to `x`, where it has a bias.
    pub delta: Vec<f32>,
    /// `[m][experts]`
    pub router: Vec<f32>,
    experts: MoeScratch,
    pub rope: RopeTable,
}

/// One micro-batch.
pub(crate) struct Step<'a> {
    pub compute: &'a Compute,
    pub config: &'a ModelConfig,
    pub cache: &'a mut KvCache,
    pub tables: &'a [&'a PageTable],
    /// Where each token stands.
    pub tokens: &'a [Token],
    /// Rows that want logits, ascending.
    pub outputs: &'a [usize],
    pub buffers: &'a mut Buffers,
    /// Rows of `x`.
    pub m: usize,
}

impl Step<'_> {
    /// Looks the tokens up: `x = embedding[ids]`.
    pub fn embed(&mut self, embedding: &Weights, ids: &[u32]) {
        let b = &mut *self.buffers;
        self.m = ids.len();
        mem::resize(&mut b.x, self.m * self.config.embd);
        self.compute.get_rows(embedding, ids, &mut b.x);
        self.place();
    }

    /// Begins with this `x`, a row for each token.
    pub fn begin(&mut self, x: &[f32]) {
        mem::resize(&mut self.buffers.x, x.len());
        self.buffers.x.copy_from_slice(x);
        self.place();
    }

    /// Angles of the tokens' positions.
    fn place(&mut self) {
        let positions = self.tokens.iter().map(|t| t.position);
        self.buffers.rope.fill(&self.config.rope, positions);
    }

    /// `input = rms_norm(x) * w`.
    pub fn norm(&mut self, w: &[f32]) {
        let b = &mut *self.buffers;
        mem::resize(&mut b.input, b.x.len());
        self.compute
            .rms_norm(&b.x, w, self.config.rms_eps, &mut b.input);
    }

    fn prepare_input(&mut self, forms: Forms) {
        let b = &mut *self.buffers;
        self.compute
            .prepare(&mut b.acts, &b.input, self.m, self.config.embd, forms);
    }

    /// `acts = rms_norm(x) * w` in `forms`.
    fn norm_acts(&mut self, w: &[f32], forms: Forms) {
        let (b, eps) = (&mut *self.buffers, self.config.rms_eps);
        self.compute
            .norm_prepare(&mut b.acts, &b.x, w, eps, forms, &mut b.input);
    }

    /// The three projections of the normalised `x` in one dispatch, biases added.
    pub fn norm_qkv(&mut self, layer: &HostAttention, sharing: Option<Sharing<'_>>) -> Result<()> {
        let forms = self.compute.forms(self.m, [&layer.q, &layer.k, &layer.v]);
        self.norm_acts(&layer.norm, forms);
        let b = &mut *self.buffers;
        let (c, m) = (self.config, self.m);
        mem::resize(&mut b.q, m * c.heads * c.head_dim);
        mem::resize(&mut b.k, m * c.kv_heads * c.head_dim);
        mem::resize(&mut b.v, m * c.kv_heads * c.head_dim);
        let mut products = [
            (&layer.q, &mut b.q[..]),
            (&layer.k, &mut b.k[..]),
            (&layer.v, &mut b.v[..]),
        ];
        let (compute, x) = (self.compute, &b.input);
        multiply(
            compute,
            sharing,
            &mut products,
            &b.acts,
            x,
            false,
            &[&layer.out],
        )?;
        self.add_biases(layer);
        Ok(())
    }

    /// Adds the biases of the three projections.
    pub fn add_biases(&mut self, layer: &HostAttention) {
        let b = &mut *self.buffers;
        let biases = [
            (&layer.q_bias, &mut b.q),
            (&layer.k_bias, &mut b.k),
            (&layer.v_bias, &mut b.v),
        ];
        for (bias, rows) in biases {
            if let Some(bias) = bias {
                self.compute.add_bias(rows, bias);
            }
        }
    }

    /// Normalises each head of q and k, where there is a norm, and rotates it by its position.
    pub fn heads(&mut self, layer: &HostAttention) {
        let (b, c) = (&mut *self.buffers, self.config);
        let of = |x, heads, norm| Heads { x, heads, norm };
        let both = [
            of(&mut b.q, c.heads, layer.q_norm.as_deref()),
            of(&mut b.k, c.kv_heads, layer.k_norm.as_deref()),
        ];
        let (eps, style) = (c.rms_eps, c.rope.style);
        self.compute.heads(both, c.head_dim, eps, style, &b.rope);
    }

    /// Writes k and v to the cache and attends: to rows, or to what the next product takes, in
    /// these forms.
    pub fn attend(&mut self, layer: usize, forms: Option<Forms>) {
        let (b, c) = (&mut *self.buffers, self.config);
        self.compute
            .kv_store(self.cache, layer, self.tables, self.tokens, &b.k, &b.v);
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let out = match forms {
            Some(forms) => Attended::Acts(&mut b.acts, forms),
            None => {
                mem::resize(&mut b.attention, b.q.len());
                Attended::Rows(&mut b.attention)
            }
        };
        b.attended = forms.is_some();
        self.compute.attention(
            self.cache,
            layer,
            self.tables,
            self.tokens,
            &b.q,
            c.heads,
            scale,
            out,
        );
    }

    /// The forms that attention can go to right away: those that its product takes here, if
    /// every token's is wanted as it is.
    pub fn attends_to(&self, layer: usize, a: &HostAttention) -> Option<Forms> {
        let c = self.config;
        let all = layer + 1 != c.layers || self.outputs.len() == self.m;
        let direct = all && c.head_dim.is_multiple_of(32);
        direct.then(|| self.compute.forms(self.m, [&a.out]))
    }

    /// Behind the last attention only tokens that want logits matter: the others' rows are
    /// dropped.
    pub fn last_layer_keeps_outputs(&mut self, layer: usize) {
        let (b, c) = (&mut *self.buffers, self.config);
        if layer + 1 != c.layers || self.outputs.len() == self.m {
            return;
        }
        keep_rows(&mut b.x, c.embd, self.outputs);
        keep_rows(&mut b.attention, c.heads * c.head_dim, self.outputs);
        self.m = self.outputs.len();
    }

    /// `x += out · attention`. `next` are the products behind this one.
    pub fn add_attention_output(
        &mut self,
        layer: &HostAttention,
        sharing: Option<Sharing<'_>>,
        next: &[&Weights],
    ) -> Result<()> {
        let b = &mut *self.buffers;
        if !b.attended {
            let (k, forms) = (layer.out.k(), self.compute.forms(self.m, [&layer.out]));
            self.compute
                .prepare(&mut b.acts, &b.attention, self.m, k, forms);
        }
        let product = |y: &mut [f32], adds| {
            let mut products = [(&layer.out, y)];
            let (compute, x) = (self.compute, &b.attention);
            multiply(compute, sharing, &mut products, &b.acts, x, adds, next)
        };
        match &layer.out_bias {
            None => product(&mut b.x, true)?,
            Some(bias) => {
                mem::resize(&mut b.delta, b.x.len());
                product(&mut b.delta, false)?;
                self.compute.add_bias(&mut b.delta, bias);
                self.compute.add_assign(&mut b.x, &b.delta);
            }
        }
        Ok(())
    }

    /// `x += ffn(rms_norm(x) * norm)`, or with experts the choice of them: see
    /// [`Step::add_experts`]. `sharing` is of gate and up, and of down; `next` are the products behind a dense
    /// network.
    pub fn norm_ffn(
        &mut self,
        layer: &HostFfn,
        sharing: [Option<Sharing<'_>>; 2],
        next: &[&Weights],
    ) -> Result<Option<Routing>> {
        Ok(match &layer.kind {
            FfnKind::Dense(network) => {
                let forms = self.compute.forms(self.m, [&network.gate, &network.up]);
                self.norm_acts(&layer.norm, forms);
                match sharing {
                    [None, None] => {
                        let (Network { gate, up, down }, b) = (network, &mut *self.buffers);
                        self.compute.gate_up(&b.acts, gate, up, down, &mut b.hidden);
                        let (products, x) = (&mut [(down, &mut b.x[..])], &b.input);
                        multiply(self.compute, None, products, &b.hidden, x, true, next)?;
                    }
                    sharing => self.shared_network(network, sharing, next)?,
                }
                None
            }
            FfnKind::Router(router) => {
                self.norm(&layer.norm);
                self.prepare_input(self.compute.forms(self.m, [router]));
                let b = &mut *self.buffers;
                mem::resize(&mut b.router, self.m * router.n());
                self.compute.matmul(router, &b.acts, &mut b.router);
                Some(self.route(router.n()))
            }
        })
    }

    /// A dense network of one token, with a device that takes a share of its products: it wants
    /// plain values between them.
    fn shared_network(
        &mut self,
        network: &Network<Weights>,
        sharing: [Option<Sharing<'_>>; 2],
        next: &[&Weights],
    ) -> Result<()> {
        let (Network { gate, up, down }, b) = (network, &mut *self.buffers);
        let (compute, m, ff) = (self.compute, self.m, down.k());
        b.network
            .iter_mut()
            .for_each(|values| mem::resize(values, m * ff));
        let [g, u, hidden] = &mut b.network;
        let mut products = [(gate, &mut g[..]), (up, &mut u[..])];
        multiply(
            compute,
            sharing[0],
            &mut products,
            &b.acts,
            &b.input,
            false,
            &[down],
        )?;
        compute.swiglu(g, u, hidden);
        compute.prepare(&mut b.hidden, hidden, m, ff, compute.forms(m, [down]));
        let mut products = [(down, &mut b.x[..])];
        multiply(
            compute,
            sharing[1],
            &mut products,
            &b.hidden,
            hidden,
            true,
            next,
        )
    }

    /// The experts that the router's logits choose.
    pub fn route(&self, count: usize) -> Routing {
        let options = self.config.route_options();
        self.compute.route(&self.buffers.router, count, &options)
    }

    /// `x += Σ weight · expert(input)`. `next` are the products behind it.
    pub fn add_experts(
        &mut self,
        experts: &Network<Weights>,
        routing: &Routing,
        next: &[&Weights],
    ) {
        let b = &mut *self.buffers;
        let Network { gate, up, down } = experts;
        let (input, scratch) = (&b.input, &mut b.experts);
        let (compute, m, x) = (self.compute, self.m, &mut b.x);
        compute.moe_ffn_beside(input, routing, gate, up, down, scratch, x, || {
            compute.ahead(next.iter().copied(), m);
        });
    }

    /// The same for an `x` that is elsewhere: `delta = Σ weight · expert(input)`.
    pub fn experts_apart(&mut self, experts: &Network<Weights>, routing: &Routing) {
        let b = &mut *self.buffers;
        let Network { gate, up, down } = experts;
        let (input, scratch) = (&b.input, &mut b.experts);
        b.delta.clear();
        mem::resize(&mut b.delta, input.len());
        self.compute
            .moe_ffn(input, routing, gate, up, down, scratch, &mut b.delta);
    }

    /// The same in parts, one after another, for experts that are computed while others are on
    /// their way to a device: see [`Parts`].
    pub fn experts_in_parts<'b>(
        &'b mut self,
        experts: &'b Network<Weights>,
        parts: Vec<Routing>,
    ) -> Parts<'b> {
        let b = &mut *self.buffers;
        b.delta.clear();
        mem::resize(&mut b.delta, b.input.len());
        Parts {
            compute: self.compute,
            experts,
            input: &b.input,
            scratch: &mut b.experts,
            delta: &mut b.delta,
            parts: parts.into_iter(),
        }
    }

    /// Final norm: appends `[m][embd]`.
    pub fn hidden(&mut self, output: &Output<Weights, Vec<f32>>, hidden: &mut Vec<f32>) {
        self.norm(&output.norm);
        hidden.extend_from_slice(&self.buffers.input);
    }

    /// Output matrix behind [`Step::hidden`]: appends `[m][vocab]`.
    pub fn logits(
        &mut self,
        output: &Output<Weights, Vec<f32>>,
        embedding: &Weights,
        sharing: Option<Sharing<'_>>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let output = output.matrix.as_ref().unwrap_or(embedding);
        self.prepare_input(self.compute.forms(self.m, [output]));
        let b = &mut *self.buffers;
        let start = logits.len();
        logits.resize(start + self.m * output.n(), 0.0);
        let mut products = [(output, &mut logits[start..])];
        let (compute, x) = (self.compute, &b.input);
        multiply(compute, sharing, &mut products, &b.acts, x, false, &[])
    }
}

/// Moves the given rows (ascending) to the front and drops the rest.
fn keep_rows(x: &mut Vec<f32>, len: usize, rows: &[usize]) {
    for (to, &from) in rows.iter().enumerate() {
        x.copy_within(from * len..(from + 1) * len, to * len);
    }
    x.truncate(rows.len() * len);
}

/// Fills staging memory on all threads.
pub(crate) struct OnPool<'a>(pub &'a Compute);

impl Feeder for OnPool<'_> {
    fn fill(&mut self, to: &mut [u8], parts: &[&[u8]]) {
        self.0.copy(to, parts);
    }
}

/// The same, and meanwhile a part of the experts after another: `delta += Σ weight ·
/// expert(input)`. When which is computed changes nothing, since their order doesn't.
pub(crate) struct Parts<'a> {
    compute: &'a Compute,
    experts: &'a Network<Weights>,
    input: &'a [f32],
    scratch: &'a mut MoeScratch,
    delta: &'a mut [f32],
    parts: std::vec::IntoIter<Routing>,
}

impl Feeder for Parts<'_> {
    fn fill(&mut self, to: &mut [u8], parts: &[&[u8]]) {
        self.compute.copy(to, parts);
    }

    fn meanwhile(&mut self) -> bool {
        let Some(part) = self.parts.next() else {
            return false;
        };
        let Network { gate, up, down } = self.experts;
        self.compute
            .moe_ffn(self.input, &part, gate, up, down, self.scratch, self.delta);
        true
    }
}
