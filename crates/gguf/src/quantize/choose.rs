//! Which type each tensor gets: the rules of llama.cpp's quantiser, so that a file type means
//! the same here and there.

use regex::Regex;

use super::{FileType, QuantizeOptions};
use crate::{Error, GgmlType, Metadata, TensorInfo, blocks, error::Result};

/// What is decided for one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The type to write.
    pub ty: GgmlType,
    /// The type that was meant and that the row length does not allow, if so.
    pub instead_of: Option<GgmlType>,
}

/// The roles that the rules know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    TokenEmbedding,
    Output,
    AttnQ,
    AttnK,
    AttnV,
    AttnQkv,
    AttnKvB,
    AttnOutput,
    FfnUp,
    FfnGate,
    FfnDown,
    Other,
}

impl Role {
    fn of(name: &str) -> Role {
        match name {
            "output.weight" => return Role::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => return Role::TokenEmbedding,
            _ => {}
        }
        const PARTS: [(&str, Role); 9] = [
            ("attn_qkv.weight", Role::AttnQkv),
            ("attn_kv_b.weight", Role::AttnKvB),
            ("attn_v.weight", Role::AttnV),
            ("attn_k.weight", Role::AttnK),
            ("attn_q.weight", Role::AttnQ),
            ("attn_output.weight", Role::AttnOutput),
            ("ffn_up", Role::FfnUp),
            ("ffn_gate", Role::FfnGate),
            ("ffn_down", Role::FfnDown),
        ];
        PARTS
            .iter()
            .find(|(part, _)| name.contains(part))
            .map_or(Role::Other, |&(_, role)| role)
    }

    /// Holds values of the attention, which suffer most from quantisation.
    fn is_value(self) -> bool {
        matches!(self, Role::AttnV | Role::AttnQkv | Role::AttnKvB)
    }
}

/// Names (or parts of them) of tensors that stay as they are: small, or sensitive.
const KEPT: [&str; 29] = [
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    ".rel_pos",
    ".patch_embd",
];

fn stays(t: &TensorInfo, options: &QuantizeOptions) -> bool {
    // Trailing dimensions of 1 don't count.
    let dims = t
        .shape
        .iter()
        .rposition(|&d| d > 1)
        .map_or(1, |last| last + 1);
    dims < 2
        || !blocks::can_dequantize(t.ty)
        || !t.name.ends_with("weight")
        || matches!(
            t.name.as_str(),
            "position_embd.weight" | "token_types.weight"
        )
        || (options.leave_output_tensor && t.name == "output.weight")
        || KEPT.iter().any(|part| t.name.contains(part))
}

/// The number in `blk.N.…`.
fn layer_of(name: &str) -> Option<usize> {
    let (number, _) = name.strip_prefix("blk.")?.split_once('.')?;
    number.parse().ok()
}

/// What the rules ask of the model.
struct Rules<'a> {
    options: &'a QuantizeOptions,
    file_type: FileType,
    falcon: bool,
    /// 80 layers with grouped heads: the 70B models.
    seventy: bool,
    layers: usize,
    experts: u64,
    /// Query heads per key head.
    grouped: u64,
    tied: bool,
    importance: bool,
    values: usize,
    value_at: usize,
    down_at: usize,
    gate_at: usize,
    up_at: usize,
}

/// Chooses the type of every tensor, in the order of `tensors`.
///
/// # Errors
/// Mistyped metadata.
pub fn choose(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    options: &QuantizeOptions,
) -> Result<Vec<Choice>> {
    let mut rules = Rules::new(metadata, tensors, options)?;
    // Rules that count tensors count them by layer, then by name, wherever they lie.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (layer_of(&tensors[i].name), &tensors[i].name));
    let mut choices = vec![
        Choice {
            ty: GgmlType::F32,
            instead_of: None
        };
        tensors.len()
    ];
    for i in order {
        choices[i] = rules.choose(&tensors[i]);
    }
    Ok(choices)
}

impl<'a> Rules<'a> {
    fn new(
        metadata: &Metadata,
        tensors: &[TensorInfo],
        options: &'a QuantizeOptions,
    ) -> Result<Rules<'a>> {
        let arch = metadata.str("general.architecture")?.unwrap_or("");
        let key = |name: &str| format!("{arch}.{name}");
        // Per-layer arrays: the first layer speaks for all.
        let first = |name: &str| -> Result<Option<u64>> {
            let key = key(name);
            match metadata.get(&key).and_then(|v| v.as_array()) {
                Some(_) => Ok(metadata
                    .u32s(&key)?
                    .and_then(|v| v.first().map(|&n| n.into()))),
                None => metadata.u64(&key),
            }
        };
        let in_names = tensors.iter().filter_map(|t| layer_of(&t.name)).max();
        let layers = match metadata.u32(&key("block_count"))? {
            Some(n) => n as usize,
            None => in_names.map_or(0, |n| n.saturating_add(1)),
        };
        let heads = first("attention.head_count")?.unwrap_or(0);
        let kv_heads = first("attention.head_count_kv")?.unwrap_or(heads);
        let seventy = layers == 80 && (arch == "qwen2" || (arch == "llama" && heads != kv_heads));
        Ok(Rules {
            options,
            file_type: options.file_type,
            falcon: arch == "falcon",
            seventy,
            layers,
            experts: metadata.u64(&key("expert_count"))?.unwrap_or(0),
            grouped: heads.checked_div(kv_heads).unwrap_or(0),
            tied: !tensors.iter().any(|t| Role::of(&t.name) == Role::Output),
            importance: options.importance.is_some(),
            values: tensors
                .iter()
                .filter(|t| Role::of(&t.name).is_value())
                .count(),
            value_at: 0,
            down_at: 0,
            gate_at: 0,
            up_at: 0,
        })
    }

    fn choose(&mut self, t: &TensorInfo) -> Choice {
        let as_is = |ty| Choice {
            ty,
            instead_of: None,
        };
        if stays(t, self.options) {
            return as_is(t.ty);
        }
        let role = Role::of(&t.name);
        let named = self
            .options
            .tensor_types
            .iter()
            .find(|(re, _)| re.is_match(&t.name));
        let base = self.file_type.base();
        let wanted = match (
            role,
            self.options.token_embedding_type,
            self.options.output_tensor_type,
        ) {
            // The per-layer table is separate and large: naming it wins.
            (Role::TokenEmbedding, Some(ty), _)
                if named.is_none() || t.name != "per_layer_token_embd.weight" =>
            {
                return as_is(ty);
            }
            (Role::Output, _, Some(ty)) => return as_is(ty),
            _ if !base.is_quantized() => return as_is(base),
            _ => match named {
                Some(&(_, ty)) => ty,
                None if self.options.pure => base,
                None => self.mixed(base, t, role),
            },
        };
        let ty = fitting(wanted, t.row_len());
        Choice {
            ty,
            instead_of: (ty != wanted).then_some(wanted),
        }
    }

    /// The layer that a rule counts by, for the tensor that is the `at`-th of its role.
    fn layer(&self, t: &TensorInfo, at: usize) -> usize {
        // Old files have one tensor per expert; their names tell the layer.
        if self.experts > 1 {
            layer_of(&t.name).unwrap_or(at)
        } else {
            at
        }
    }

    /// The type by the file type's mix.
    fn mixed(&mut self, base: GgmlType, t: &TensorInfo, role: Role) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        let f = self.file_type;
        let tiny = matches!(
            f,
            F::IQ1_S | F::IQ1_M | F::IQ2_XXS | F::IQ2_XS | F::IQ2_S | F::IQ2_M
        );
        if role == Role::Output || (self.tied && role == Role::TokenEmbedding) {
            return match self.options.output_tensor_type {
                Some(ty) => ty,
                None if f == F::MXFP4_MOE || self.falcon => T::Q8_0,
                None if !t.row_len().is_multiple_of(base.block_len() as u64) => T::Q8_0,
                None if tiny || f == F::IQ3_XXS => T::Q5_K,
                None if base == T::Q8_0 => T::Q8_0,
                None => T::Q6_K,
            };
        }
        if f == F::MXFP4_MOE {
            return if t.shape.get(2).is_some_and(|&n| n > 1) {
                T::MXFP4
            } else {
                T::Q8_0
            };
        }
        match role {
            Role::TokenEmbedding => match f {
                F::IQ2_XXS | F::IQ2_XS | F::IQ1_S | F::IQ1_M => T::Q2_K,
                F::IQ2_S | F::IQ2_M | F::IQ3_XXS => T::IQ3_S,
                _ => base,
            },
            _ if tiny => self.tiny(base, role),
            _ if role.is_value() => self.value(base),
            Role::AttnK if self.experts == 8 => T::Q8_0,
            Role::AttnK | Role::AttnQ => match f {
                F::IQ3_XS => T::IQ3_XXS,
                F::IQ3_XXS => T::IQ2_S,
                _ => base,
            },
            Role::FfnDown => {
                let layer = self.layer(t, self.down_at);
                self.down_at += 1;
                self.down(base, layer)
            }
            Role::AttnOutput => self.attn_output(base),
            Role::FfnGate | Role::FfnUp => {
                let at = if role == Role::FfnGate {
                    &mut self.gate_at
                } else {
                    &mut self.up_at
                };
                let nth = *at;
                *at += 1;
                let (layer, n) = (self.layer(t, nth), self.layers);
                let middle = layer >= n / 8 && layer < 7 * n / 8;
                if f == F::IQ3_XS && middle {
                    T::IQ3_XXS
                } else {
                    base
                }
            }
            _ => base,
        }
    }

    /// The mixes of one to two bits.
    fn tiny(&mut self, base: GgmlType, role: Role) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        let f = self.file_type;
        let better = if matches!(f, F::IQ2_S | F::IQ2_M) {
            T::IQ3_S
        } else {
            T::Q2_K
        };
        match role {
            _ if role.is_value() => {
                self.value_at += 1;
                if self.grouped >= 4 || self.experts >= 4 {
                    T::Q4_K
                } else {
                    better
                }
            }
            Role::AttnK if self.experts == 8 => T::Q4_K,
            Role::FfnDown => {
                let early = self.down_at < self.layers / 8;
                self.down_at += 1;
                if early { better } else { base }
            }
            Role::AttnOutput if self.experts == 8 => T::Q5_K,
            Role::AttnOutput => match f {
                F::IQ1_S | F::IQ1_M => T::IQ2_XXS,
                F::IQ2_S | F::IQ2_M => T::IQ3_S,
                _ => base,
            },
            _ => base,
        }
    }

    fn value(&mut self, base: GgmlType) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        let at = self.value_at;
        self.value_at += 1;
        // Eight experts leave the attention so small a part that it can be kept exact.
        if self.experts == 8 {
            return T::Q8_0;
        }
        let grouped = self.grouped >= 4;
        let ty = match self.file_type {
            F::Q2_K => {
                if grouped {
                    T::Q4_K
                } else {
                    T::Q3_K
                }
            }
            F::Q2_K_S if grouped => T::Q4_K,
            F::IQ3_XXS if grouped => T::Q4_K,
            F::IQ3_XXS => {
                if self.importance {
                    T::IQ3_XXS
                } else {
                    T::IQ3_S
                }
            }
            F::IQ3_XS | F::IQ3_S if grouped => T::Q4_K,
            F::IQ3_M => T::Q4_K,
            F::Q3_K_M => {
                if at < 2 {
                    T::Q5_K
                } else {
                    T::Q4_K
                }
            }
            F::Q3_K_L => T::Q5_K,
            F::IQ4_NL | F::IQ4_XS if grouped => T::Q5_K,
            F::Q4_K_M | F::Q5_K_M if more_bits(at, self.values) => T::Q6_K,
            F::Q4_K_S if at < 4 => T::Q5_K,
            _ => base,
        };
        // Eight heads share the values there, so the tensor is small and matters.
        if self.seventy && matches!(ty, T::Q3_K | T::Q4_K) {
            T::Q5_K
        } else {
            ty
        }
    }

    fn down(&self, base: GgmlType, layer: usize) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        let n = self.layers;
        let (eighth, sixteenth) = (layer < n / 8, layer < n / 16);
        let more = more_bits(layer, n);
        match self.file_type {
            F::Q2_K => T::Q3_K,
            F::Q2_K_S if eighth => T::Q4_K,
            F::IQ3_XXS if !self.importance => {
                if eighth {
                    T::Q4_K
                } else {
                    T::Q3_K
                }
            }
            F::Q3_K_M if sixteenth => T::Q5_K,
            F::Q3_K_M if !self.falcon || more => T::Q4_K,
            F::IQ3_M if eighth || (self.experts == 8 && more) => T::Q4_K,
            F::Q3_K_L => {
                if self.falcon {
                    T::Q4_K
                } else {
                    T::Q5_K
                }
            }
            F::Q4_K_M if self.falcon => match (sixteenth, more) {
                (true, _) => T::Q6_K,
                (_, true) => T::Q5_K,
                _ => T::Q4_K,
            },
            F::Q4_K_M | F::Q5_K_M if more => T::Q6_K,
            F::IQ4_NL | F::IQ4_XS if eighth && !self.importance => T::Q5_K,
            F::Q4_K_S if eighth && !self.falcon => T::Q5_K,
            // Importance can lead these astray in the first layers; a minimum repairs it.
            F::Q4_0 if eighth && self.importance => T::Q4_1,
            F::Q5_0 if eighth && self.importance => T::Q5_1,
            _ => base,
        }
    }

    fn attn_output(&self, base: GgmlType) -> GgmlType {
        use FileType as F;
        use GgmlType as T;
        match self.file_type {
            F::Q3_K_L if self.falcon => T::Q4_K,
            _ if self.falcon => base,
            F::Q2_K
            | F::IQ3_XS
            | F::IQ3_XXS
            | F::Q3_K_S
            | F::Q3_K_M
            | F::IQ4_NL
            | F::Q4_K_S
            | F::Q4_K_M
            | F::IQ3_S
            | F::IQ3_M
            | F::IQ4_XS
                if self.experts == 8 =>
            {
                T::Q5_K
            }
            _ if self.experts == 8 => base,
            F::Q2_K => T::Q3_K,
            F::IQ3_XXS => T::IQ3_S,
            F::Q3_K_M | F::IQ3_M => T::Q4_K,
            F::Q3_K_L => T::Q5_K,
            _ => base,
        }
    }
}

/// True for the first and last eighth of the layers and every third between.
fn more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// `ty`, or what replaces it where rows are no whole number of its blocks.
fn fitting(ty: GgmlType, row_len: u64) -> GgmlType {
    use GgmlType as T;
    let fits = |ty: GgmlType| row_len.is_multiple_of(ty.block_len() as u64);
    if fits(ty) {
        return ty;
    }
    let smaller = match ty {
        T::IQ1_S
        | T::IQ1_M
        | T::IQ2_XXS
        | T::IQ2_XS
        | T::IQ2_S
        | T::IQ3_XXS
        | T::IQ3_S
        | T::IQ4_XS => T::IQ4_NL,
        T::Q2_K | T::Q3_K => T::Q4_0,
        T::Q4_K => T::Q5_0,
        T::Q5_K => T::Q5_1,
        T::Q6_K => T::Q8_0,
        other => other,
    };
    if fits(smaller) { smaller } else { T::F16 }
}

/// Takes `PATTERN=TYPE` apart: a regular expression sought in tensor names, and their type.
///
/// # Errors
/// [`Error::Unsupported`] with what is wrong.
pub fn parse_tensor_type(s: &str) -> Result<(Regex, GgmlType)> {
    let bad = |why: String| Error::Unsupported(format!("tensor type `{s}`: {why}"));
    let (pattern, ty) = s
        .split_once('=')
        .ok_or_else(|| bad("expected NAME=TYPE".into()))?;
    if pattern.is_empty() {
        return Err(bad("the name is missing".into()));
    }
    let pattern = Regex::new(&pattern.to_lowercase()).map_err(|e| bad(e.to_string()))?;
    let ty = ty
        .parse()
        .map_err(|e: crate::types::UnknownType| bad(e.to_string()))?;
    Ok((pattern, ty))
}
