//! The oracle against results that this project did not make: `models/golden.json` of the
//! shared directory, computed in float32 by the `transformers` library, and perplexities by
//! llama.cpp.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;
use tegula_gguf::{Gguf, Tokenizer, tokenizer::EncodeOptions};

use crate::{
    compare,
    oracle::{Activations, Oracle, argmax},
};

/// Largest relative L2 distance of last-position logits that counts as equal.
pub const LOGITS_WITHIN: f64 = 1e-3;
/// Largest deviation of a perplexity, as a share of it.
///
/// The figures carry llama.cpp's own rounding of activations, which shows where weights are
/// coarse: of `IQ2_XS` the oracle with exact activations is 0.65 % below the figure. With
/// [`Activations::EightBits`] it is between 0.05 % below and 0.25 % above, by how the compiler
/// orders sums: last bits decide which way an activation is rounded.
pub const PERPLEXITY_WITHIN: f64 = 5e-3;
/// Tokens to a window of the perplexities.
pub const WINDOW: usize = 512;
/// Windows that the given perplexities are taken over: about the first half of the text.
pub const CHUNKS: usize = 60;

/// The results for one model.
#[derive(Clone, Debug, Deserialize)]
pub struct Golden {
    pub prompts: Vec<Prompt>,
    pub perplexity: Perplexities,
}

/// A prompt, its tokens, and what follows.
#[derive(Clone, Debug, Deserialize)]
pub struct Prompt {
    pub prompt: String,
    pub ids: Vec<u32>,
    /// Logits after the prompt: `[n_vocab]`.
    pub last_logits: Vec<f32>,
    /// The greedy continuation.
    pub greedy: Vec<u32>,
}

/// Perplexities over the held-out text by the type of the file.
#[derive(Clone, Debug, Deserialize)]
pub struct Perplexities {
    pub ppl: BTreeMap<String, f64>,
}

impl Golden {
    /// The files of `model` that have a figure and are given in `models`.
    pub fn files(&self, models: &Path, model: &str) -> Vec<String> {
        let types = self.perplexity.ppl.keys();
        let file = |ty: &String| file(model, ty);
        types
            .map(file)
            .filter(|f| models.join(f).is_file())
            .collect()
    }
}

/// The name of `model`'s file of type `ty`, as the figures spell it.
pub fn file(model: &str, ty: &str) -> String {
    match ty {
        "BF16" => format!("{model}-bf16.gguf"),
        ty => format!("{model}-{ty}.gguf"),
    }
}

/// Reads `golden.json` in `models`: results by the model's name.
///
/// # Errors
/// Says what can't be read.
pub fn read(models: &Path) -> Result<BTreeMap<String, Golden>, String> {
    let text =
        fs::read_to_string(models.join("golden.json")).map_err(|e| format!("golden.json: {e}"))?;
    serde_json::from_str(&text).map_err(|e| format!("golden.json: {e}"))
}

/// Opens a model of the directory and loads it into an oracle.
///
/// # Errors
/// Says what can't be read.
pub fn load(
    models: &Path,
    file: &str,
    activations: Activations,
) -> Result<(Tokenizer, Oracle), String> {
    let gguf = Gguf::open(models.join(file)).map_err(|e| e.to_string())?;
    let tokenizer = Tokenizer::from_gguf(&gguf).map_err(|e| e.to_string())?;
    let oracle = Oracle::load_with(&gguf, activations).map_err(|e| e.to_string())?;
    Ok((tokenizer, oracle))
}

/// Runs every prompt of `model`'s bf16 file: token ids and greedy continuations must be
/// equal, last-position logits within [`LOGITS_WITHIN`]. Returns the largest distance.
///
/// # Errors
/// Says which prompt differs, and how.
pub fn continuations(models: &Path, model: &str, golden: &Golden) -> Result<f64, String> {
    let (tokenizer, oracle) = load(models, &format!("{model}-bf16.gguf"), Activations::Exact)?;
    let mut worst = 0f64;
    for p in &golden.prompts {
        let at = |what: String| format!("{model}, `{}`: {what}", p.prompt);
        let options = EncodeOptions {
            add_special: true,
            parse_special: true,
        };
        let ids = tokenizer.encode(&p.prompt, options);
        if ids != p.ids {
            return Err(at(format!("token ids {ids:?}, not {:?}", p.ids)));
        }
        let logits = oracle.logits(&ids).map_err(|e| at(e.to_string()))?;
        let distance = compare::relative_l2(&p.last_logits, &logits);
        if distance > LOGITS_WITHIN {
            return Err(at(format!("logits are {distance:.2e} apart")));
        }
        worst = worst.max(distance);
        let greedy = oracle
            .generate(&ids, p.greedy.len(), |logits| Some(argmax(logits)))
            .map_err(|e| at(e.to_string()))?;
        if greedy != p.greedy {
            return Err(at(format!("continues {greedy:?}, not {:?}", p.greedy)));
        }
    }
    Ok(worst)
}

/// The oracle's perplexity of a file over the held-out text, at most `chunks` windows.
///
/// # Errors
/// Says what can't be read or run.
pub fn perplexity(
    models: &Path,
    file: &str,
    activations: Activations,
    chunks: usize,
) -> Result<f64, String> {
    let (tokenizer, oracle) = load(models, file, activations)?;
    let text =
        fs::read_to_string(models.join("heldout.txt")).map_err(|e| format!("heldout.txt: {e}"))?;
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let tokens = tokenizer.encode(&text, options);
    let bos = tokenizer.add_bos().then(|| tokenizer.bos()).flatten();
    oracle
        .perplexity(&tokens, WINDOW, chunks, bos, |_| true)
        .map(|p| p.ppl)
        .map_err(|e| format!("{file}: {e}"))
}
