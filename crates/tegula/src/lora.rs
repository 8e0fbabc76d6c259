//! The flags that load LoRA adapters.

use clap::Args;
use phase4_parity::oracle::{Activations, Oracle};
use std::path::PathBuf;
use tegula_engine::{Adapters, LoadOptions, LoraFile, ModelConfig};
use tegula_gguf::Gguf;

#[derive(Args, Clone, Debug, Default)]
pub struct LoraArgs {
    /// LoRA adapter (GGUF) that changes the model while it runs; may be repeated
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    lora: Vec<PathBuf>,
    /// The same, multiplied by SCALE; may be repeated
    #[arg(long, value_name = "FILE:SCALE", value_delimiter = ',', value_parser = scaled)]
    lora_scaled: Vec<LoraFile>,
}

fn scaled(s: &str) -> Result<LoraFile, String> {
    let parse = || {
        let (path, scale) = s.rsplit_once(':')?;
        let scale: f32 = scale.parse().ok()?;
        (!path.is_empty() && scale.is_finite()).then(|| LoraFile {
            path: path.into(),
            scale,
        })
    };
    parse().ok_or_else(|| "expected a file and a number, such as adapter.gguf:0.5".to_owned())
}

impl LoraArgs {
    /// The adapters: those that have no scale first.
    pub fn files(&self) -> Vec<LoraFile> {
        let plain = self.lora.iter().map(|path| LoraFile {
            path: path.clone(),
            scale: 1.0,
        });
        plain.chain(self.lora_scaled.iter().cloned()).collect()
    }
}

/// The f32 reference of a model with the adapters that go with it.
pub fn oracle(load: &LoadOptions, gguf: &Gguf) -> anyhow::Result<Oracle> {
    // What is no adapter for the model has the same message as from the engine.
    Adapters::open(&load.lora, gguf, &ModelConfig::from_gguf(gguf)?)?;
    let open = |file: &LoraFile| Ok((Gguf::open(&file.path)?, file.scale));
    let adapters: Vec<_> = load.lora.iter().map(open).collect::<anyhow::Result<_>>()?;
    Ok(Oracle::load_adapted(gguf, Activations::Exact, &adapters)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_stand_behind_the_last_colon() {
        let file = |path: &str, scale| LoraFile {
            path: path.into(),
            scale,
        };
        assert_eq!(scaled("a.gguf:0.5"), Ok(file("a.gguf", 0.5)));
        assert_eq!(scaled("a:b.gguf:-1"), Ok(file("a:b.gguf", -1.0)));
        for bad in ["a.gguf", "a.gguf:", "a.gguf:x", "a.gguf:nan", ":1"] {
            assert!(scaled(bad).is_err(), "{bad}");
        }
    }
}
