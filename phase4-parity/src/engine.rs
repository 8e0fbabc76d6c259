//! The engine held against the oracle.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

use tegula_engine::{Batch, Context, ContextOptions, LoadOptions, Model, Source, perplexity};
use tegula_gguf::tokenizer::EncodeOptions;
use tegula_kernels::Tier;
use tegula_lab::Outcome;

use crate::{
    compare::{kl_divergence, perplexity_excess, relative_l2, top_k_agreement},
    golden::{self, Golden},
    oracle::Activations,
};

/// Windows of the held-out text whose perplexities are compared. The oracle is slow.
const CHUNKS: usize = 2;

/// Best tokens that are compared.
const TOP: usize = 10;

/// How far the engine may be from the oracle, whose weights are the same and whose
/// activations are never rounded. The engine's are: to bf16, or to 8 bits per 32.
struct Bounds {
    /// Relative L2 distance of last-position logits.
    logits: f64,
    /// Share of the [`TOP`] best tokens that are common, on average over the prompts.
    top: f64,
    /// Nats, for each prompt.
    kl: f64,
    /// Deviation of the perplexity, as a share of it.
    perplexity: f64,
}

/// Files whose weights are floats.
const FLOATS: Bounds = Bounds {
    logits: 2e-2,
    top: 0.9,
    kl: 2e-3,
    perplexity: 5e-3,
};

/// Quantised weights: activations of 8 bits in every product.
const QUANTIZED: Bounds = Bounds {
    logits: 4e-2,
    top: 0.9,
    kl: 1e-2,
    perplexity: 1e-2,
};

/// The same with experts: where two are about equally good for a token, rounding can choose
/// the other one, which moves that token's logits more than rounding alone.
const QUANTIZED_EXPERTS: Bounds = Bounds {
    logits: 1e-1,
    top: 0.9,
    kl: 5e-2,
    perplexity: 1e-2,
};

fn bounds(model: &Model) -> &'static Bounds {
    let matrix = model.plan().get("blk.0.attn_q.weight");
    let float = matrix.is_some_and(|p| ["F32", "F16", "BF16"].contains(&p.ty.as_str()));
    match (float, model.config().experts) {
        (true, _) => &FLOATS,
        (false, None) => &QUANTIZED,
        (false, Some(_)) => &QUANTIZED_EXPERTS,
    }
}

/// The largest distances over some prompts.
struct Distances {
    bounds: &'static Bounds,
    logits: f64,
    top: f64,
    kl: f64,
    perplexity: f64,
}

impl Distances {
    fn within_bounds(&self) -> bool {
        let b = self.bounds;
        self.logits <= b.logits
            && self.top >= b.top
            && self.kl <= b.kl
            && self.perplexity.abs() <= b.perplexity
    }
}

impl std::fmt::Display for Distances {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "logits {:.1e} apart, top {TOP} {:.0} % common, KL {:.1e}, perplexity {:+.2} %",
            self.logits,
            self.top * 100.0,
            self.kl,
            self.perplexity * 100.0
        )
    }
}

/// Every given file at every tier that the CPU has.
pub(crate) fn agrees(models: &Path) -> Result<Outcome, String> {
    let mut facts = Vec::new();
    let mut misses = Vec::new();
    for (model, golden) in golden::read(models)? {
        for file in golden.files(models, &model) {
            for (tier, distances) in distances(models, &file, &golden)? {
                let line = (format!("{file}, {tier}"), distances.to_string());
                if !distances.within_bounds() {
                    misses.push(format!("{}: {}", line.0, line.1));
                }
                facts.push(line);
            }
        }
    }
    match (misses.is_empty(), facts.is_empty()) {
        (true, false) => Ok(Outcome::passed(facts)),
        (true, true) => Err("there is no file to compare".to_owned()),
        (false, _) => Err(misses.join("; ")),
    }
}

fn distances(
    models: &Path,
    file: &str,
    golden: &Golden,
) -> Result<BTreeMap<Tier, Distances>, String> {
    let (_, oracle) = golden::load(models, file, Activations::Exact)?;
    let prompts: Vec<&[u32]> = golden.prompts.iter().map(|p| p.ids.as_slice()).collect();
    let wanted = prompts
        .iter()
        .map(|ids| oracle.logits(ids).map_err(|e| format!("{file}: {e}")))
        .collect::<Result<Vec<_>, _>>()?;
    let oracle_ppl = golden::perplexity(models, file, Activations::Exact, CHUNKS)?;
    let mut all = BTreeMap::new();
    for tier in Tier::ALL.into_iter().filter(|tier| tier.available()) {
        let at = |what: String| format!("{file}, {tier}: {what}");
        let load = LoadOptions {
            tier,
            ..LoadOptions::new(Source::Path(models.join(file)))
        };
        let model = Model::load(&load, &mut |_| {}).map_err(|e| at(e.to_string()))?;
        let context = Context::new(Arc::new(model), &ContextOptions::default());
        let mut ctx = context.map_err(|e| at(e.to_string()))?;
        let mut d = Distances {
            bounds: bounds(ctx.model()),
            logits: 0.0,
            top: 0.0,
            kl: 0.0,
            perplexity: perplexity_excess(oracle_ppl, engine_perplexity(&mut ctx, models)?),
        };
        for (ids, wanted) in prompts.iter().zip(&wanted) {
            let run = ctx
                .truncate(0, 0)
                .and_then(|()| ctx.decode(&Batch::prompt(0, ids)));
            let outputs = run.map_err(|e| at(e.to_string()))?;
            let got = outputs.logits(0);
            d.logits = d.logits.max(relative_l2(wanted, got));
            d.kl = d.kl.max(kl_divergence(wanted, got));
            d.top += top_k_agreement(wanted, got, TOP) / prompts.len() as f64;
        }
        all.insert(tier, d);
    }
    Ok(all)
}

/// Over the same windows as [`golden::perplexity`].
fn engine_perplexity(ctx: &mut Context, models: &Path) -> Result<f64, String> {
    let text =
        fs::read_to_string(models.join("heldout.txt")).map_err(|e| format!("heldout.txt: {e}"))?;
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let tokens = ctx.model().tokenizer().encode(&text, options);
    perplexity(ctx, &tokens, golden::WINDOW, CHUNKS, &mut |_, _, _| {})
        .map(|p| p.ppl())
        .map_err(|e| e.to_string())
}
