//! What a test has to read and to multiply at least: the roofline's two axes.

use crate::bench::Test;
use serde::{Deserialize, Serialize};
use tegula_engine::{ContextOptions, Model, ModelConfig, plan::MatrixSizes};
use tegula_kernels::kv::{KV_PAGE, KvShape};

/// Bytes and operations of a whole test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Weights and cache, each read once per batch that runs through the layers.
    pub bytes: f64,
    /// Multiplications and additions.
    pub operations: f64,
}

impl Cost {
    /// Of a test of this model.
    pub fn of(model: &Model, test: Test, context: &ContextOptions) -> Cost {
        Cost::from(model.config(), &model.plan().matrices(), test, context)
    }

    fn from(
        config: &ModelConfig,
        sizes: &MatrixSizes,
        test: Test,
        context: &ContextOptions,
    ) -> Cost {
        let mut cost = Cost::default();
        let mut position = test.depth;
        let ubatch = context.ubatch.clamp(1, context.batch.max(1));
        let mut run = |tokens: usize, logits: usize| {
            cost.add(config, sizes, context, position, tokens, logits);
            position += tokens;
        };
        let mut left = test.prompt;
        while left > 0 {
            let submitted = left.min(context.batch.max(1));
            let mut inner = submitted;
            while inner > 0 {
                let tokens = inner.min(ubatch);
                inner -= tokens;
                // Logits are wanted behind the last token of what was submitted.
                run(tokens, usize::from(inner == 0));
            }
            left -= submitted;
        }
        for _ in 0..test.generate {
            run(1, 1);
        }
        cost
    }

    /// A batch of `tokens` behind `position` others.
    fn add(
        &mut self,
        config: &ModelConfig,
        sizes: &MatrixSizes,
        context: &ContextOptions,
        position: usize,
        tokens: usize,
        logits: usize,
    ) {
        let m = tokens as f64;
        let (share, touched) = match config.experts {
            None => (0.0, 0.0),
            Some(e) => {
                let share = e.used as f64 / e.count as f64;
                // Experts that at least one token takes, were the choice random.
                (share, 1.0 - (1.0 - share).powf(m))
            }
        };
        self.bytes += sizes.dense.bytes as f64 + touched * sizes.experts.bytes as f64;
        let weights = sizes.dense.weights as f64 + share * sizes.experts.weights as f64;
        self.operations += 2.0 * m * weights;
        if logits > 0 {
            self.bytes += sizes.output.bytes as f64;
            self.operations += 2.0 * logits as f64 * sizes.output.weights as f64;
        }
        let shape = KvShape {
            layers: config.layers,
            heads: config.kv_heads,
            dim: config.head_dim,
            k: context.k_type,
            v: context.v_type,
        };
        let end = (position + tokens) as f64;
        let dense = shape.bytes(1);
        let page = context
            .sparsity
            .map_or(Ok(dense), |s| shape.pruned_bytes(s, 1));
        // What can't be pruned isn't run.
        self.bytes += page.unwrap_or(dense) as f64 / KV_PAGE as f64 * end;
        // Each token sees all before it and itself.
        let seen = m * (position as f64 + (m + 1.0) / 2.0);
        let heads = (config.layers * config.heads * config.head_dim) as f64;
        self.operations += 4.0 * heads * seen;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tegula_engine::{LoadOptions, Source};

    fn cost(prompt: usize, generate: usize, depth: usize, context: &ContextOptions) -> Cost {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../crates/tegula/assets/ferrous-moe-21m-Q4_0.gguf"
        );
        let load = LoadOptions {
            threads: 1,
            ..LoadOptions::new(Source::Path(path.into()))
        };
        let model = Model::load(&load, &mut |_| {}).unwrap();
        let test = Test {
            prompt,
            generate,
            depth,
        };
        Cost::of(&model, test, context)
    }

    #[test]
    fn a_token_reads_its_experts_and_a_prompt_all() {
        let context = ContextOptions::default();
        let one = cost(0, 1, 0, &context);
        let file = 12e6;
        // 4 of 16 experts hold most of the weights.
        assert!(one.bytes > 0.2 * file && one.bytes < 0.8 * file, "{one:?}");
        let prompt = cost(512, 0, 0, &context);
        assert!(prompt.bytes > 1.5 * one.bytes && prompt.bytes < 2.0 * file);
        assert!(prompt.operations > 300.0 * one.operations, "{prompt:?}");
        // Twice the passes read the weights twice.
        let halves = ContextOptions {
            ubatch: 256,
            ..context
        };
        let twice = cost(512, 0, 0, &halves);
        assert!((1.7..2.1).contains(&(twice.bytes / prompt.bytes)));
        assert_eq!(twice.operations, prompt.operations);
    }

    #[test]
    fn depth_is_read_again_for_every_token() {
        let context = ContextOptions::default();
        let (near, deep) = (cost(0, 2, 0, &context), cost(0, 2, 1000, &context));
        let small = ContextOptions {
            k_type: tegula_kernels::kv::KvType::Q8_0,
            v_type: tegula_kernels::kv::KvType::Q8_0,
            ..context
        };
        let (near8, deep8) = (cost(0, 2, 0, &small), cost(0, 2, 1000, &small));
        let ratio = (deep8.bytes - near8.bytes) / (deep.bytes - near.bytes);
        assert!((0.5..0.6).contains(&ratio), "{ratio}");
        assert!(deep.operations > near.operations);
    }
}
