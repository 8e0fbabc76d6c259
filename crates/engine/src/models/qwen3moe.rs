//! Qwen 3 with experts: Qwen 3's attention, and per token the best few of many small
//! feed-forward networks, weighted by a softmax that is renormalised over the chosen.

use super::Graph;

pub(super) fn layer(layer: usize, s: &mut Graph<'_>) {
    s.norm_qkv(layer); //                      input = norm of x [m][embd]; q [m][heads][dim], k and v [m][kv_heads][dim]
    s.heads(layer); //                         q and k, each head by its own mean square, rotated in place
    s.attend(layer); //                        cache, q -> attention [m][heads][dim]
    s.last_layer_keeps_outputs(layer); //      m shrinks to the tokens that want logits
    s.add_attention_output(layer); //          x += out · attention
    s.norm_ffn(layer); //                      input = norm of x; x += Σ weight · down_e · (silu(gate_e · input) * (up_e · input)), by Graph::experts
}
