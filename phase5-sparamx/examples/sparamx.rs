//! Imports layers that SparAMX has saved: each file becomes a sparse tensor of a GGUF file, with
//! the same values in the same places.
//!
//! ```text
//! cargo run --release -p phase5-sparamx --example sparamx -- out.gguf blk.0.attn_q.weight=q.pt …
//! ```

use std::{fs, process::ExitCode};

use phase5_sparamx::sparamx::{layer::Values, torch::read_layer};
use tegula_gguf::{GgmlType, Metadata, sparse::pack_tensor, writer::GgufWriter};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(said) => {
            print!("{said}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("error: {why}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &[String]) -> Result<String, String> {
    let (out, layers) = match args {
        [out, layers @ ..] if !layers.is_empty() => (out, layers),
        _ => return Err("expected OUT.gguf NAME=LAYER.pt …".into()),
    };
    let mut writer = GgufWriter::new(Metadata::new(out.as_str()));
    let (mut tensors, mut said) = (Vec::new(), String::new());
    for layer in layers {
        let (name, path) = layer
            .split_once('=')
            .ok_or_else(|| format!("{layer}: expected NAME=LAYER.pt"))?;
        let file = fs::read(path).map_err(|e| format!("{path}: {e}"))?;
        let layer = read_layer(&file).map_err(|e| format!("{path}: {e}"))?;
        let rows = layer.rows().map_err(|e| format!("{path}: {e}"))?;
        let ty = match layer.values {
            Values::Bf16 => GgmlType::S_BF16,
            Values::Int8 => GgmlType::S8,
        };
        let shape = [layer.inputs() as u64, layer.outputs as u64];
        let packed = pack_tensor(ty, &shape, None, &rows).map_err(|e| format!("{path}: {e}"))?;
        writer
            .add_sparse(name, ty, &shape, packed.len() as u64)
            .map_err(|e| e.to_string())?;
        said += &format!(
            "{name}: {ty} {} x {}, packed for {} threads; {} bytes\n",
            shape[0],
            shape[1],
            layer.starts.len(),
            packed.len()
        );
        tensors.push(packed);
    }
    let mut file = writer.create(out).map_err(|e| e.to_string())?;
    for packed in &tensors {
        file.write(packed).map_err(|e| e.to_string())?;
    }
    file.finish().map_err(|e| e.to_string())?;
    Ok(said)
}
