//! The book's page of formats: which kernels take which types, from the tables that the engine
//! itself asks. It says the same on every machine.

use std::fmt::Write as _;
use tegula_gguf::{GgmlType, blocks};
use tegula_kernels::{Forms, Tier, amx, device, kv::KvType, strip};

const INTRODUCTION: &str = "# Formats and kernels

What multiplies the weights of each block format. `tegula explain MODEL` says it of each tensor of a
model, with the number of tokens from which on tiles are used.

";

const COLUMNS: &str = "
- **bits** per weight, scales included. **Groups** of so many weights share a scale, and a minimum
  where that is said.
- **quantize**: whether `tegula quantize` and `tegula synth` write it.
- **activations**: what the products take them as on vectors. *q8*: 8-bit codes with a scale per 32,
  multiplied as integers. *f32*: as they are; for BF16 weights as pairs of bf16 where the CPU has
  `avx512_bf16`.
- **AMX**: with `--amx`, from how many tokens in a batch on tiles are used; fewer are faster on
  vectors. Tiles want rows of a multiple of 32 weights. Up to 16 tokens with quantised weights their
  products are those of vectors, bit for bit; beyond, and with others, activations become bf16.
- **GPU**: whether a GPU (compute capability 8.0 or later) takes it.
";

pub fn page() -> String {
    let mut out = INTRODUCTION.to_owned();
    let tiers: Vec<&str> = Tier::ALL.iter().map(|tier| tier.name()).collect();
    // Writing to a String can't fail.
    let _ = writeln!(
        out,
        "| format | bits | groups | quantize | activations | {} | AMX | GPU |\n|---|---:|---|---|---|{}---|---|",
        tiers.join(" | "),
        "---|".repeat(tiers.len())
    );
    for &ty in GgmlType::ALL.iter().filter(|ty| is_multiplied(**ty)) {
        let _ = writeln!(out, "| {} |", row(ty, tiers.len()).join(" | "));
    }
    out += COLUMNS;
    let others = GgmlType::ALL.iter().filter(|ty| !is_multiplied(**ty));
    let others: Vec<&str> = others.map(|ty| ty.name()).collect();
    let cache: Vec<&str> = KvType::ALL.iter().map(|ty| ty.name()).collect();
    let _ = write!(
        out,
        "\nNo product takes {}: files may hold tensors of these types, and models whose matrices \
         are of one are refused.\n\nThe KV cache (`-ctk`, `-ctv`) is {}, on every tier and on GPUs.\n",
        others.join(", "),
        cache.join(" or ")
    );
    out
}

/// Whether matrices of the type can be multiplied; then every tier does it.
fn is_multiplied(ty: GgmlType) -> bool {
    strip::layout(ty).is_some()
}

fn row(ty: GgmlType, tiers: usize) -> Vec<String> {
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let bits = ty.block_bytes() as f64 * 8.0 / ty.block_len() as f64;
    let groups = match blocks::group_len(ty) {
        Some(n) if blocks::has_min(ty) => format!("{n}, minimum"),
        Some(n) => n.to_string(),
        None => String::new(),
    };
    let activations = match strip::kernels::vector_form(ty) {
        Forms::Q8 => "q8",
        _ => "f32",
    };
    let amx = amx::fewest_tokens(ty).map_or("no".to_owned(), |n| format!("from {n}"));
    let on_gpu = device::matrix_bytes(ty, 1, ty.block_len() as u64, 1).is_some();
    let mut cells = vec![
        ty.name().to_owned(),
        // Six digits are all that any format has.
        format!("{bits:.6}")
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
        groups,
        yes(blocks::can_quantize(ty)),
        activations.to_owned(),
    ];
    cells.extend((0..tiers).map(|_| yes(is_multiplied(ty))));
    cells.extend([amx, yes(on_gpu)]);
    cells
}
