//! What the simulated device records: operations with the places that they work on. A recording
//! that is replayed does exactly them, whatever the caller would have issued now, so that
//! somebody who replays what does not fit gets other results, as on a real device.

use super::super::{
    Buffer, Device, DeviceRouting, HeadOptions, Heads, Matrix, Memory, Network, Places, Product,
    Result,
};
use super::SimDevice;
use crate::{kv::KvShape, ops::moe::RouteOptions};
use std::{collections::HashMap, sync::Arc};

/// An operation that can be done again.
pub(super) type Operation = Arc<dyn Fn(&SimDevice) -> Result<()> + Send + Sync>;

/// A recording that is being made.
pub(super) struct Open {
    pub key: Vec<u64>,
    pub operations: Vec<Operation>,
    /// What memory held when it began.
    pub before: HashMap<u64, Vec<u8>>,
    /// Something that can't be recorded came between.
    pub broken: bool,
}

/// Somebody else's memory.
struct Borrowed;

impl Memory for Borrowed {
    fn free(&self, _: u64, _: usize) {}
}

/// The same places, which must outlive this.
fn alias(buffer: &Buffer) -> Buffer {
    Buffer::new(buffer.address(), buffer.bytes(), Arc::new(Borrowed))
}

fn alias_matrix(m: &Matrix) -> Matrix {
    Matrix {
        buffer: alias(&m.buffer),
        ..*m
    }
}

fn alias_places(p: &Places) -> Places {
    Places {
        tokens: alias(&p.tokens),
        pages: alias(&p.pages),
        cos: alias(&p.cos),
        sin: alias(&p.sin),
        ..*p
    }
}

fn alias_routing(r: &DeviceRouting) -> DeviceRouting {
    DeviceRouting {
        ids: alias(&r.ids),
        weights: alias(&r.weights),
        used: r.used,
    }
}

impl SimDevice {
    /// Before what can't be recorded.
    pub(super) fn not_recorded(&self) {
        if let Some(open) = &mut self.shared.heap().open {
            open.broken = true;
        }
    }

    fn records(&self) -> bool {
        self.shared.heap().open.is_some()
    }

    fn record(&self, operation: impl Fn(&SimDevice) -> Result<()> + Send + Sync + 'static) {
        if let Some(open) = &mut self.shared.heap().open {
            open.operations.push(Arc::new(operation));
        }
    }

    /// Notes an operation on up to four buffers.
    pub(super) fn record_on<const N: usize>(
        &self,
        buffers: [&Buffer; N],
        operation: impl Fn(&SimDevice, &[Buffer; N]) -> Result<()> + Send + Sync + 'static,
    ) {
        if self.records() {
            let buffers = buffers.map(alias);
            self.record(move |d| operation(d, &buffers));
        }
    }

    pub(super) fn record_products(&self, products: &[Product<'_>], x: &Buffer, m: usize) {
        if !self.records() {
            return;
        }
        let one = |p: &Product<'_>| {
            let (w, bias) = (alias_matrix(p.w), p.bias.map(alias));
            (w, alias(p.out), bias, p.add)
        };
        let products: Vec<_> = products.iter().map(one).collect();
        let x = alias(x);
        self.record(move |d| {
            let products: Vec<Product<'_>> = products
                .iter()
                .map(|(w, out, bias, add)| Product {
                    w,
                    out,
                    bias: bias.as_ref(),
                    add: *add,
                })
                .collect();
            d.matmul(&products, &x, m)
        });
    }

    pub(super) fn record_heads(&self, both: &[Heads<'_>; 2], o: &HeadOptions, places: &Places) {
        if !self.records() {
            return;
        }
        let [a, b] = both.map(|h| (alias(h.x), h.norm.map(alias), h.heads));
        let (o, places) = (*o, alias_places(places));
        self.record(move |d| {
            let [a, b] = [&a, &b].map(|(x, norm, heads)| Heads {
                x,
                norm: norm.as_ref(),
                heads: *heads,
            });
            d.heads([a, b], &o, &places)
        });
    }

    pub(super) fn record_placed<const N: usize>(
        &self,
        buffers: [&Buffer; N],
        shape: &KvShape,
        places: &Places,
        operation: impl Fn(&SimDevice, &[Buffer; N], &KvShape, &Places) -> Result<()>
        + Send
        + Sync
        + 'static,
    ) {
        if self.records() {
            let (buffers, shape) = (buffers.map(alias), *shape);
            let places = alias_places(places);
            self.record(move |d| operation(d, &buffers, &shape, &places));
        }
    }

    pub(super) fn record_network(
        &self,
        network: &Network<'_>,
        input: &Buffer,
        routing: Option<&DeviceRouting>,
        m: usize,
        x: &Buffer,
    ) {
        if !self.records() {
            return;
        }
        let all = [network.gate, network.up, network.down].map(alias_matrix);
        let (input, x) = (alias(input), alias(x));
        let routing = routing.map(alias_routing);
        self.record(move |d| {
            let [gate, up, down] = &all;
            let network = Network { gate, up, down };
            match &routing {
                None => d.ffn(&network, &input, m, &x),
                Some(routing) => d.experts(&network, &input, routing, m, &x),
            }
        });
    }

    pub(super) fn record_route(
        &self,
        logits: &Buffer,
        m: usize,
        experts: usize,
        options: &RouteOptions,
        routing: &DeviceRouting,
    ) {
        if self.records() {
            let (logits, routing, options) = (alias(logits), alias_routing(routing), *options);
            self.record(move |d| d.route(&logits, m, experts, &options, &routing));
        }
    }
}
