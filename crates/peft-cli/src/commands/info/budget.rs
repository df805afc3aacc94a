//! What one training step holds in memory, by arithmetic.
//!
//! ```text
//! weights   4 bits each, or those of their format        scales    8 + 32/256 bits a block, or 32
//! adapter   + gradients + two moments, as large or 8 bits scratch   the largest layer, decoded
//! activations = layers · T·h  +  one block  +  the head       T = batch · seq, with blocks computed again
//! ```
//!
//! A block keeps its normed inputs, queries, keys, values, scores, their attention, and the three vectors of its MLP; the backward pass
//! needs about as much of the widest of them again.

use std::path::Path;

use anyhow::Result;
use peft::{
    core::{ModelExt, Outline, Site, SiteKind, Tuner},
    models::{MadeUp, Network, Task, build},
    quant::Format,
    train::Optim,
};
use tch::Kind;

use crate::{
    quantization::{Bits, Quantization},
    terminal::bytes,
};

/// For which step.
#[derive(Debug)]
pub(crate) struct Step {
    /// Rows.
    pub(crate) batch: u64,
    /// Tokens in each.
    pub(crate) seq: u64,
    /// The format of products.
    pub(crate) compute: Kind,
    /// The format of what is not quantised, and of the vectors between layers.
    pub(crate) rest: Kind,
    /// How linear layers are kept.
    pub(crate) quantization: Option<Quantization>,
    /// Blocks are computed again in the backward pass.
    pub(crate) checkpoint: bool,
    /// Who keeps the moments.
    pub(crate) optim: Optim,
}

/// Bytes of each part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Linear layers, without their scales.
    pub(crate) weights: u64,
    /// Scales of blocks or rows.
    pub(crate) scales: u64,
    /// Tables, norms, and heads that are not quantised.
    pub(crate) rest: u64,
    /// What is trained.
    pub(crate) adapter: u64,
    /// Its gradients.
    pub(crate) gradients: u64,
    /// Its moments.
    pub(crate) optimiser: u64,
    /// What the backward pass needs.
    pub(crate) activations: u64,
    /// A decoded layer.
    pub(crate) scratch: u64,
    /// The program with libtorch, which is there before any model.
    pub(crate) program: u64,
}

/// Resident memory of the program itself, as measured on Linux with libtorch 2.11: 120 MiB before it has loaded anything,
/// and 90 more for what of libtorch a training step calls.
const PROGRAM: u64 = 210 << 20;

/// Scores of attention that are kept between the passes, see `peft_torch::attention`; of longer rows they are not.
const SCORES: u64 = 32 << 20;

/// Scores of so many positions are held at a time, see `head_loss`.
const CHUNK: u64 = 256;

impl Budget {
    /// Of a step with `tuner` on the model that a `config.json` describes. No weights are needed.
    pub(crate) fn of(config: &Path, task: Task, tuner: &dyn Tuner, step: &Step) -> Result<Budget> {
        let format = Format::as_stored();
        let mut model = build(config, task, &mut MadeUp::hollow(step.rest), &format)?;
        let outline = model.outline();
        model.inject("default", tuner)?;
        let (mut adapter, mut optimiser) = (0, 0);
        for it in model.trainable("default") {
            let (numbers, size) = (it.tensor.numel(), it.tensor.kind().elt_size_in_bytes());
            adapter += (numbers * size) as u64;
            optimiser += step.optim.moments(numbers, size) as u64;
        }
        let mut budget = Budget {
            weights: 0,
            scales: 0,
            rest: 0,
            adapter,
            gradients: adapter,
            optimiser,
            activations: activations(&*model, &outline, step),
            scratch: 0,
            program: PROGRAM,
        };
        for site in &outline.sites {
            budget.add(site, &outline, step)?;
        }
        Ok(budget)
    }

    fn add(&mut self, site: &Site, outline: &Outline, step: &Step) -> Result<()> {
        let n: u64 = site.shape.iter().map(|d| d.unsigned_abs()).product();
        let tied = outline.spec.tied && outline.spec.output_embedding.as_deref() == Some(&site.at);
        match &step.quantization {
            _ if site.kind == SiteKind::Prompt || tied => {}
            Some(wish)
                if site.kind == SiteKind::Linear && !wish.format()?.keeps_dense(&site.at) =>
            {
                let blocks = n.div_ceil(wish.block_size as u64);
                let (weights, scales) = match wish.bits {
                    Bits::Int8 => (n, 4 * site.shape[0].unsigned_abs()),
                    _ if wish.double_quant => {
                        (n.div_ceil(2), blocks + 4 * blocks.div_ceil(256) + 1024)
                    }
                    _ => (n.div_ceil(2), 4 * blocks),
                };
                self.weights += weights;
                self.scales += scales;
                self.scratch = self.scratch.max(n * size(step.compute));
            }
            None if site.kind == SiteKind::Linear => self.weights += n * size(step.rest),
            _ => self.rest += n * size(step.rest),
        }
        Ok(())
    }

    /// All of it.
    pub(crate) fn total(&self) -> u64 {
        self.parts()
            .iter()
            .fold(0, |sum, (_, n)| u64::saturating_add(sum, *n))
    }

    fn parts(&self) -> [(&'static str, u64); 9] {
        [
            ("weights", self.weights),
            ("scales", self.scales),
            ("rest", self.rest),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimiser", self.optimiser),
            ("activations", self.activations),
            ("scratch", self.scratch),
            ("program", self.program),
        ]
    }

    /// A line for each part.
    pub(crate) fn print(&self, step: &Step) {
        println!("\nMemory of a step of {} x {} tokens", step.batch, step.seq);
        for (name, n) in self.parts() {
            println!("  {name:<12}{:>10}", bytes(n));
        }
        println!("  {:<12}{:>10}", "in all", bytes(self.total()));
    }
}

fn size(kind: Kind) -> u64 {
    kind.elt_size_in_bytes() as u64
}

/// What is kept between the forward and the backward pass, at the moment when that is most.
fn activations(model: &dyn Network, outline: &Outline, step: &Step) -> u64 {
    let spec = &outline.spec;
    // In 128 bits: rows and lengths that nobody could train are still flags that somebody can type.
    let tokens = u128::from(step.batch) * u128::from(step.seq);
    let wide = |n: i64| u128::from(n.unsigned_abs());
    let (hidden, layers) = (wide(spec.hidden), spec.layers as u128);
    let (q, kv) = (
        wide(spec.heads * spec.head_dim),
        wide(spec.kv_heads * spec.head_dim),
    );
    let is_head = |at: &str| spec.output_embedding.as_deref() == Some(at);
    let linear = outline
        .sites
        .iter()
        .filter(|it| it.kind == SiteKind::Linear);
    let inner = linear
        .filter(|it| !is_head(&it.at))
        .filter_map(|it| it.shape.first())
        .max();
    let inner = inner.map_or(hidden, |&n| wide(n));
    let between = u128::from(size(step.rest));
    let scores = tokens * u128::from(step.seq) * wide(spec.heads) * 4;
    let scores = if scores <= u128::from(SCORES) {
        scores
    } else {
        0
    };
    let kept = tokens * between * (3 * hidden + 2 * q + 2 * kv + 3 * inner) + scores;
    // Gradients of the widest vectors, and copies in the format of products where that is another.
    let copies = if step.rest == step.compute { 0 } else { 1 };
    let passing = tokens
        * (between * (2 * hidden + 3 * inner) + copies * u128::from(size(step.compute)) * inner);
    let blocks = match step.checkpoint {
        true => layers * tokens * hidden * between + kept,
        false => layers * kept,
    };
    let of_vocabulary = u128::from(CHUNK).min(tokens) * wide(model.vocab()) * between * 2;
    u64::try_from(blocks + passing.max(of_vocabulary)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft::LoraConfig;
    use serde_json::json;

    /// The first column of table 6 in the QLoRA paper: LLaMA 7B has 6.5 G weights in linear layers.
    #[test]
    fn seven_billion_in_four_bits() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config.json");
        let json = json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
            "tie_word_embeddings": false, "hidden_act": "silu"});
        std::fs::write(&config, json.to_string()).unwrap();
        let step = Step {
            batch: 1,
            seq: 512,
            compute: Kind::BFloat16,
            rest: Kind::BFloat16,
            quantization: Some(Quantization::default()),
            checkpoint: true,
            optim: Optim::AdamwTorch,
        };
        let lora = LoraConfig {
            r: 16,
            ..LoraConfig::on(["q_proj"])
        };
        let budget = Budget::of(&config, Task::CausalLm, &lora, &step).unwrap();
        let linear = 32u64 * (4 * 4096 * 4096 + 3 * 4096 * 11008);
        assert_eq!(budget.weights, linear / 2);
        let blocks = linear / 64;
        assert_eq!(budget.scales, blocks + blocks / 64 + 224 * 1024);
        let norms = (2 * 32 + 1) * 4096;
        assert_eq!(budget.rest, 2 * (2 * 32000 * 4096 + norms));
        assert_eq!(budget.optimiser, 2 * budget.adapter);
        // Each of its 64 tensors has 16 * 4096 numbers: a byte and a scale for 256 of them, twice.
        let step = Step {
            optim: Optim::Adamw8bit,
            ..step
        };
        let eight = Budget::of(&config, Task::CausalLm, &lora, &step).unwrap();
        assert_eq!(eight.optimiser, 64 * 2 * (16 * 4096 + 4 * 256));
        assert_eq!(
            eight.total() + budget.optimiser,
            budget.total() + eight.optimiser
        );
        assert_eq!(
            budget.total(),
            budget.parts().iter().map(|it| it.1).sum::<u64>()
        );
    }
}
