//! The matrices on the CPU by their tensors' names.

use crate::{
    Model,
    models::{Ffn, FfnKind, Layer, Network, Output, Placed},
};
use tegula_kernels::Weights;

impl Model {
    /// The matrices on the CPU with their tensors' names, but for a tied output matrix.
    pub fn host_matrices(&self) -> Vec<(String, &Weights)> {
        let mut all = vec![("token_embd.weight".to_owned(), &self.matrices.embedding)];
        if let Placed::Host(Output {
            matrix: Some(w), ..
        }) = &self.matrices.output
        {
            all.push(("output.weight".to_owned(), w));
        }
        for (i, layer) in self.matrices.layers.iter().enumerate() {
            let mut put = |part: &str, w| all.push((format!("blk.{i}.{part}.weight"), w));
            if let Placed::Host(a) = &layer.attention {
                put("attn_q", &a.q);
                put("attn_k", &a.k);
                put("attn_v", &a.v);
                put("attn_output", &a.out);
            }
            if let Placed::Host(f) = &layer.ffn {
                match &f.kind {
                    FfnKind::Dense(Network { gate, up, down }) => {
                        put("ffn_gate", gate);
                        put("ffn_up", up);
                        put("ffn_down", down);
                    }
                    FfnKind::Router(router) => put("ffn_gate_inp", router),
                }
            }
            if let Some(Placed::Host(Network { gate, up, down })) = &layer.experts {
                put("ffn_gate_exps", gate);
                put("ffn_up_exps", up);
                put("ffn_down_exps", down);
            }
        }
        all
    }

    /// A matrix on the CPU, to be replaced by another of the same shape; by its tensor's name, as
    /// [`Model::host_matrices`] lists them.
    pub fn host_matrix_mut(&mut self, tensor: &str) -> Option<&mut Weights> {
        let (layer, part) = tensor.strip_prefix("blk.")?.split_once('.')?;
        let layer = self.matrices.layers.get_mut(layer.parse::<usize>().ok()?)?;
        match (part.strip_suffix(".weight")?, layer) {
            (
                part @ ("attn_q" | "attn_k" | "attn_v" | "attn_output"),
                Layer {
                    attention: Placed::Host(a),
                    ..
                },
            ) => Some(match part {
                "attn_q" => &mut a.q,
                "attn_k" => &mut a.k,
                "attn_v" => &mut a.v,
                _ => &mut a.out,
            }),
            (
                "ffn_gate_inp",
                Layer {
                    ffn: Placed::Host(f),
                    ..
                },
            ) => match &mut f.kind {
                FfnKind::Router(router) => Some(router),
                FfnKind::Dense(_) => None,
            },
            (part, Layer { ffn, experts, .. }) => {
                let (part, network) = match (part.strip_suffix("_exps"), experts, ffn) {
                    (Some(part), Some(Placed::Host(network)), _) => (part, network),
                    (
                        None,
                        _,
                        Placed::Host(Ffn {
                            kind: FfnKind::Dense(network),
                            ..
                        }),
                    ) => (part, network),
                    _ => return None,
                };
                match part {
                    "ffn_gate" => Some(&mut network.gate),
                    "ffn_up" => Some(&mut network.up),
                    "ffn_down" => Some(&mut network.down),
                    _ => None,
                }
            }
        }
    }
}
