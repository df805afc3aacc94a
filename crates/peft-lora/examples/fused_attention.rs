//! LoRA on the queries and values of a transformer block whose three projections are one layer.
//!
//! ```text
//! cargo run -p peft-lora --example fused_attention
//! ```
//!
//! The task is made up: repeat the symbol before the last one. A random block cannot; [`MergedLora`] trains queries and values of its
//! fused projection and leaves the keys, a plain LoRA under another name trains the table of symbols, the other way of adapting.
//! At the end the merged form becomes a plain LoRA, which Python's `peft` loads.

use std::path::Path;

use peft_core::{
    Adapter, Ctx, Embedding, Linear, Model, ModelExt, Norm, NormKind, Registry, Result, Slot, Spec,
};
use peft_lora::{LoraConfig, MergedLora};
use tch::{Device, Kind, Tensor};

const SYMBOLS: i64 = 7;
const HIDDEN: i64 = 32;
const HEADS: i64 = 4;
const LENGTH: i64 = 6;

/// A block: norm, attention, a head that reads the last position.
struct Block {
    embed: Embedding,
    places: Tensor,
    norm: Norm,
    qkv: Linear,
    out: Linear,
    head: Linear,
}

impl Block {
    /// The same weights for the same seed; plain tensors will do.
    fn new(seed: i64) -> Block {
        tch::manual_seed(seed);
        let random =
            |shape: &[i64], size: f64| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * size;
        let linear = |out, inp| {
            Linear::new(peft_core::Dense::new(
                random(&[out, inp], 0.18),
                Some(random(&[out], 0.1)),
            ))
        };
        Block {
            embed: Embedding::new(random(&[SYMBOLS, HIDDEN], 1.0)),
            places: random(&[LENGTH, HIDDEN], 1.0),
            norm: Norm::new(NormKind::Rms, random(&[HIDDEN], 0.1) + 1.0, None, 1e-6),
            qkv: linear(3 * HIDDEN, HIDDEN),
            out: linear(HIDDEN, HIDDEN),
            head: linear(SYMBOLS, HIDDEN),
        }
    }

    /// ids: `[batch, LENGTH] -> [batch, SYMBOLS]`
    fn forward(&self, ids: &Tensor, ctx: Ctx) -> Tensor {
        let x = self.embed.forward(ids, ctx) + &self.places; // [batch, length, hidden]
        let batch = x.size()[0];
        let qkv = self.qkv.forward(&self.norm.forward(&x, ctx), ctx); // [batch, length, 3 · hidden]
        let heads = |i: i64| {
            let part = qkv.narrow(-1, i * HIDDEN, HIDDEN);
            part.view([batch, LENGTH, HEADS, HIDDEN / HEADS])
                .transpose(1, 2) // [batch, heads, length, d]
        };
        let (q, k, v) = (heads(0), heads(1), heads(2));
        let scores = q.matmul(&k.transpose(-2, -1)) / ((HIDDEN / HEADS) as f64).sqrt();
        let mixed = scores.softmax(-1, Kind::Float).matmul(&v); // [batch, heads, length, d]
        let mixed = mixed.transpose(1, 2).reshape([batch, LENGTH, HIDDEN]);
        let y = x + self.out.forward(&mixed, ctx);
        self.head.forward(&y.select(1, LENGTH - 1), ctx)
    }
}

impl Model for Block {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("embed", Slot::Embedding(&mut self.embed));
        visit("norm", Slot::Norm(&mut self.norm));
        visit("attn.qkv", Slot::Linear(&mut self.qkv));
        visit("attn.out", Slot::Linear(&mut self.out));
        visit("head", Slot::Linear(&mut self.head));
    }
}

/// What a run came to.
pub(crate) struct Outcome {
    /// The loss before and after training.
    pub(crate) loss: [f64; 2],
    /// By how much the outputs of blocks with the loaded adapters differ from those of the trained one.
    pub(crate) off: f64,
}

/// Trains, saves into `folder`, loads from there.
pub(crate) fn run(folder: &Path) -> Result<Outcome> {
    tch::set_num_threads(1); // Too small to share among threads.
    let mut block = Block::new(5);
    // Queries and values of the fused projection; the keys stay. The table gets a LoRA of its own.
    let merged = MergedLora {
        r: 4,
        lora_alpha: 8.0,
        ..MergedLora::on(["qkv"], [true, false, true])
    };
    let table = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        ..LoraConfig::on(["embed", "out"])
    };
    block.inject("attention", &merged)?;
    block.inject("table", &table)?;

    let ids = Tensor::randint(SYMBOLS, [256, LENGTH], (Kind::Int64, Device::Cpu));
    let answers = ids.select(1, LENGTH - 2);
    let loss = |block: &Block| {
        block
            .forward(&ids, Ctx::TRAIN)
            .cross_entropy_for_logits(&answers)
    };
    let before = loss(&block).double_value(&[]);
    for step in 0..=200 {
        let now = loss(&block);
        if step % 50 == 0 {
            println!("step {step:3}: loss {:.4}", now.double_value(&[]));
        }
        now.backward();
        for param in ["attention", "table"]
            .iter()
            .flat_map(|it| block.trainable(it))
        {
            let mut tensor = param.tensor;
            tch::no_grad(|| tensor -= tensor.grad() * 0.1);
            tensor.zero_grad();
        }
    }
    let after = loss(&block).double_value(&[]);

    // Each adapter to its folder; the merged one also as a plain LoRA of rank 8.
    let ours = Adapter::of("attention", &merged, &mut block)?;
    ours.save(&folder.join("attention"))?;
    Adapter::of("table", &table, &mut block)?.save(&folder.join("table"))?;
    MergedLora::to_lora(&ours)?.save(&folder.join("for-python"))?;

    let y = block.forward(&ids, Ctx::EVAL);
    let methods = Registry::default()
        .with::<LoraConfig>()
        .with::<MergedLora>();
    let mut off = 0f64;
    for attention in ["attention", "for-python"] {
        let mut fresh = Block::new(5);
        Adapter::load(&folder.join(attention), &methods)?.apply("attention", &mut fresh)?;
        Adapter::load(&folder.join("table"), &methods)?.apply("table", &mut fresh)?;
        fresh.merge_and_unload()?;
        let apart = (fresh.forward(&ids, Ctx::EVAL) - &y)
            .abs()
            .max()
            .double_value(&[]);
        println!("loaded from `{attention}` and merged: outputs differ by {apart:.1e}");
        off = off.max(apart);
    }
    Ok(Outcome {
        loss: [before, after],
        off,
    })
}

#[allow(dead_code)] // The tests include this file and call `run`.
fn main() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("peft-fused-attention-{}", std::process::id()));
    let Outcome { loss, off } = run(&folder)?;
    println!(
        "loss {:.4} → {:.4}, {off:.0e} apart after loading; the adapters are in {}",
        loss[0],
        loss[1],
        folder.display()
    );
    Ok(())
}
