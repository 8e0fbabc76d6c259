//! LLaMA (1, 2, 3), Mistral, and with experts Mixtral.
//!
//! Pre-norm, RoPE over neighbouring pairs, grouped-query attention, SwiGLU.

use super::Graph;

pub(super) fn layer(layer: usize, s: &mut Graph<'_>) {
    s.norm_qkv(layer); //                      input = norm of x [m][embd]; q [m][heads][dim], k and v [m][kv_heads][dim]
    s.heads(layer); //                         q and k, rotated in place
    s.attend(layer); //                        cache, q -> attention [m][heads][dim]
    s.last_layer_keeps_outputs(layer); //      m shrinks to the tokens that want logits
    s.add_attention_output(layer); //          x += out · attention
    s.norm_ffn(layer); //                      input = norm of x; x += down · (silu(gate · input) * (up · input))
}
