//! GPT-2.
//!
//! ```text
//! x = E[ids] + P[positions]
//! each layer:  x += c_proj · attention(c_attn · n(x))
//!              x += c_proj · act(c_fc · n(x))
//! hidden = n(x)                                       n = LayerNorm
//! ```
//!
//! Its linear layers are kept `[in, out]` on disk (`Conv1D` in `transformers`) and are transposed views here:
//! everything else sees `[out, in]`.

use std::sync::Arc;

use peft_core::{Ctx, Embedding, Linear, Norm, PromptSlot, Result, Slot, Spec, Weights};
use serde_json::Value;
use tch::Tensor;

use crate::{
    Cache, Input,
    attention::{Before, Heads, Mask, attend},
    block::{self, Shared, kept_if_last},
    body::{Body, Visitor, dropout, layer_norm, root},
    config::Gpt2Config,
    front::Front,
    input::Sizes,
};

/// A GPT-2 without a head.
#[derive(Debug)]
pub(crate) struct Gpt2 {
    config: Arc<Gpt2Config>,
    prompt: PromptSlot,
    tokens: Embedding,
    places: Embedding,
    blocks: Vec<Shared<Block>>,
    norm: Norm,
}

#[derive(Debug)]
struct Block {
    norm1: Norm,
    qkv: Linear,
    out: Linear,
    norm2: Norm,
    fc: Linear,
    proj: Linear,
}

impl Gpt2 {
    /// Builds the model out of `weights`.
    pub(crate) fn build(config: Gpt2Config, weights: &mut dyn Weights) -> Result<Gpt2> {
        let c = &config;
        let root = root(weights, &["transformer."], "wte.weight");
        let tokens = weights.tensor(&format!("{root}wte.weight"), &[c.vocab, c.hidden])?;
        let places = weights.tensor(&format!("{root}wpe.weight"), &[c.max_positions, c.hidden])?;
        let blocks = (0..c.layers).map(|i| Block::build(c, &format!("{root}h.{i}"), weights));
        let blocks = blocks
            .map(|it| it.map(Shared::new))
            .collect::<Result<_>>()?;
        let norm = layer_norm(weights, &format!("{root}ln_f"), c.hidden, c.eps)?;
        Ok(Gpt2 {
            prompt: PromptSlot::new(&tokens),
            tokens: Embedding::new(tokens),
            places: Embedding::new(places),
            blocks,
            norm,
            config: Arc::new(config),
        })
    }

    fn heads(&self, layer: usize) -> Heads {
        let c = &self.config;
        let width = ((c.hidden / c.heads) as f64).powf(-0.5);
        let scale = if c.scale_by_width { width } else { 1.0 };
        Heads {
            scale: if c.scale_by_layer {
                scale / (layer + 1) as f64
            } else {
                scale
            },
            dropout: c.attn_dropout,
        }
    }
}

impl Block {
    fn build(c: &Gpt2Config, at: &str, w: &mut dyn Weights) -> Result<Block> {
        let h = c.hidden;
        Ok(Block {
            norm1: layer_norm(w, &format!("{at}.ln_1"), h, c.eps)?,
            qkv: w.linear_transposed(&format!("{at}.attn.c_attn"), (3 * h, h))?,
            out: w.linear_transposed(&format!("{at}.attn.c_proj"), (h, h))?,
            norm2: layer_norm(w, &format!("{at}.ln_2"), h, c.eps)?,
            fc: w.linear_transposed(&format!("{at}.mlp.c_fc"), (c.inner, h))?,
            proj: w.linear_transposed(&format!("{at}.mlp.c_proj"), (h, c.inner))?,
        })
    }

    /// x: `[batch, new, hidden] -> [batch, new, hidden]`
    fn forward(
        &self,
        (c, heads): (&Gpt2Config, Heads),
        x: &Tensor,
        mask: &Mask,
        before: Before<'_>,
        ctx: Ctx,
    ) -> Tensor {
        let size = x.size();
        let qkv = self.qkv.forward(&self.norm1.forward(x, ctx), ctx); // [batch, new, 3 · hidden]
        let qkv = qkv.view([size[0], size[1], 3 * c.heads, c.hidden / c.heads]);
        let mut parts = qkv.split(c.heads, 2).into_iter();
        let parts = [(); 3].map(|()| parts.next().expect("three parts"));
        let y = attend(heads, parts, mask, before, ctx);
        let x = dropout(self.out.forward(&y, ctx), c.resid_dropout, ctx) + x;
        let inner = self.fc.forward(&self.norm2.forward(&x, ctx), ctx); // [batch, new, inner]
        let inner = c.activation.forward(&inner);
        dropout(self.proj.forward_last(&inner, ctx), c.resid_dropout, ctx) + x
    }
}

impl block::Block for Block {
    fn slots(&mut self, at: &str, visit: Visitor<'_>) {
        visit(&format!("{at}.ln_1"), Slot::Norm(&mut self.norm1));
        visit(&format!("{at}.attn.c_attn"), Slot::Linear(&mut self.qkv));
        visit(&format!("{at}.attn.c_proj"), Slot::Linear(&mut self.out));
        visit(&format!("{at}.ln_2"), Slot::Norm(&mut self.norm2));
        visit(&format!("{at}.mlp.c_fc"), Slot::Linear(&mut self.fc));
        visit(&format!("{at}.mlp.c_proj"), Slot::Linear(&mut self.proj));
    }
}

impl Body for Gpt2 {
    fn hidden(&self, input: &Input, mut cache: Option<&mut Cache>, ctx: Ctx) -> Tensor {
        let c = &self.config;
        let kind = self.tokens.weight().kind();
        let front = Front::new(&self.prompt, input, cache.as_deref_mut(), kind, ctx);
        let x = front.put(self.tokens.forward(&input.ids, ctx)); // [batch, new, hidden]
        let mut x = x + self.places.forward(&front.positions(&input.ids), ctx);
        x = dropout(x, c.embd_dropout, ctx);
        let mask = Mask::new(&front, None, &x);
        for (i, block) in self.blocks.iter().enumerate() {
            let before = Before {
                kv: front.kv(i),
                cache: cache.as_deref_mut().map(|it| (it, i)),
            };
            let (c, heads, mask) = (Arc::clone(c), self.heads(i), mask.clone());
            let ctx = kept_if_last(ctx, i, self.blocks.len());
            x = block.run([&x], before, ctx, move |block, [x], before, ctx| {
                block.forward((&c, heads), x, &mask, before, ctx)
            });
        }
        front.finish(cache);
        self.norm.forward(&x, ctx)
    }

    fn prompt(&self) -> &PromptSlot {
        &self.prompt
    }

    fn table(&self) -> &Embedding {
        &self.tokens
    }

    fn sizes(&self) -> Sizes {
        let c = &self.config;
        Sizes {
            vocab: c.vocab,
            positions: Some(c.max_positions),
            longest: c.max_positions,
            token_types: None,
        }
    }

    fn config(&self) -> &Value {
        &self.config.json
    }

    fn spec(&self, root: &str) -> Spec {
        let c = &self.config;
        Spec {
            model_type: "gpt2".into(),
            hidden: c.hidden,
            layers: c.layers,
            heads: c.heads,
            kv_heads: c.heads,
            head_dim: c.hidden / c.heads,
            input_embedding: format!("{root}wte"),
            transposed: true,
            ..Spec::default()
        }
    }

    fn slots(&mut self, root: &str, visit: Visitor<'_>) {
        visit("", Slot::Prompt(&mut self.prompt));
        visit(&format!("{root}wte"), Slot::Embedding(&mut self.tokens));
        visit(&format!("{root}wpe"), Slot::Embedding(&mut self.places));
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.visit(|it| block::Block::slots(it, &format!("{root}h.{i}"), visit));
        }
        visit(&format!("{root}ln_f"), Slot::Norm(&mut self.norm));
    }
}
