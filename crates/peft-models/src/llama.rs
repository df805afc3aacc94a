//! The Llama family (2302.13971) as one model with options: Llama, Mistral, Qwen 2, Qwen 3.
//!
//! ```text
//! x = E[ids]
//! each layer:  x += O · attention(rope(Q·n(x)), rope(K·n(x)), V·n(x))
//!              x += D · (act(G·n(x)) · U·n(x))
//! hidden = n(x)                                       n = RMSNorm
//! ```
//!
//! Qwen 2 has biases on Q, K, V; Qwen 3 a norm on each head of Q and K; Mistral and Qwen may look back
//! through a window only. Names are those of `transformers`.

use std::sync::Arc;

use peft_core::{Ctx, Embedding, Linear, Norm, PromptSlot, Result, Slot, Spec, Weights};
use peft_torch::rope;
use serde_json::Value;
use tch::Tensor;

use crate::{
    Cache, Input,
    attention::{Before, Heads, Mask, attend},
    block::{Block, Shared, kept_if_last},
    body::{Body, Visitor, rms_norm, root},
    config::LlamaConfig,
    front::Front,
    input::Sizes,
};

/// A model of the Llama family without a head.
#[derive(Debug)]
pub(crate) struct Llama {
    config: Arc<LlamaConfig>,
    prompt: PromptSlot,
    embed: Embedding,
    layers: Vec<Shared<Layer>>,
    norm: Norm,
}

#[derive(Debug)]
struct Layer {
    input_norm: Norm,
    attention: Attention,
    mlp_norm: Norm,
    mlp: Mlp,
}

#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// Norms on the heads of queries and keys.
    qk_norm: Option<(Norm, Norm)>,
}

#[derive(Debug)]
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Llama {
    /// Builds the model out of `weights`.
    pub(crate) fn build(config: LlamaConfig, weights: &mut dyn Weights) -> Result<Llama> {
        let c = &config;
        // Models that find an answer's span are saved under `transformer.`.
        let root = root(weights, &["model.", "transformer."], "embed_tokens.weight");
        let embed = weights.tensor(&format!("{root}embed_tokens.weight"), &[c.vocab, c.hidden])?;
        let layers = (0..c.layers).map(|i| Layer::build(c, &format!("{root}layers.{i}"), weights));
        let layers = layers
            .map(|it| it.map(Shared::new))
            .collect::<Result<_>>()?;
        let norm = rms_norm(weights, &format!("{root}norm"), c.hidden, c.eps)?;
        Ok(Llama {
            prompt: PromptSlot::new(&embed),
            embed: Embedding::new(embed).with_padding_idx(c.padding_idx),
            layers,
            norm,
            config: Arc::new(config),
        })
    }
}

impl Attention {
    fn forward(
        &self,
        c: &LlamaConfig,
        x: &Tensor,
        around: &Around,
        before: Before<'_>,
        ctx: Ctx,
    ) -> Tensor {
        let size = x.size();
        let split = |y: Tensor, heads: i64| y.view([size[0], size[1], heads, c.head_dim]);
        let mut q = split(self.q.forward(x, ctx), c.heads);
        let mut k = split(self.k.forward(x, ctx), c.kv_heads);
        let v = split(self.v.forward(x, ctx), c.kv_heads);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.forward(&q, ctx), k_norm.forward(&k, ctx));
        }
        let Around { cos, sin, mask } = around;
        let heads = Heads {
            scale: (c.head_dim as f64).powf(-0.5),
            dropout: c.attention_dropout,
        };
        let y = attend(
            heads,
            [rope(&q, cos, sin), rope(&k, cos, sin), v],
            mask,
            before,
            ctx,
        );
        self.o.forward(&y, ctx)
    }
}

/// Where the positions are and what they may look at.
#[derive(Debug)]
struct Around {
    /// `[batch or 1, new, head_dim / 2]`
    cos: Tensor,
    sin: Tensor,
    mask: Mask,
}

impl Layer {
    fn build(c: &LlamaConfig, at: &str, w: &mut dyn Weights) -> Result<Layer> {
        let (h, d) = (c.hidden, c.head_dim);
        let attn = |name: &str| format!("{at}.self_attn.{name}");
        let mlp = |name: &str| format!("{at}.mlp.{name}");
        let qk_norm = match c.qk_norm {
            true => Some((
                rms_norm(w, &attn("q_norm"), d, c.eps)?,
                rms_norm(w, &attn("k_norm"), d, c.eps)?,
            )),
            false => None,
        };
        Ok(Layer {
            input_norm: rms_norm(w, &format!("{at}.input_layernorm"), h, c.eps)?,
            attention: Attention {
                q: w.linear(&attn("q_proj"), (c.heads * d, h), c.qkv_bias)?,
                k: w.linear(&attn("k_proj"), (c.kv_heads * d, h), c.qkv_bias)?,
                v: w.linear(&attn("v_proj"), (c.kv_heads * d, h), c.qkv_bias)?,
                o: w.linear(&attn("o_proj"), (h, c.heads * d), c.output_bias)?,
                qk_norm,
            },
            mlp_norm: rms_norm(w, &format!("{at}.post_attention_layernorm"), h, c.eps)?,
            mlp: Mlp {
                gate: w.linear(&mlp("gate_proj"), (c.intermediate, h), c.mlp_bias)?,
                up: w.linear(&mlp("up_proj"), (c.intermediate, h), c.mlp_bias)?,
                down: w.linear(&mlp("down_proj"), (h, c.intermediate), c.mlp_bias)?,
            },
        })
    }

    /// x: `[batch, new, hidden] -> [batch, new, hidden]`
    fn forward(
        &self,
        c: &LlamaConfig,
        x: &Tensor,
        around: &Around,
        before: Before<'_>,
        ctx: Ctx,
    ) -> Tensor {
        let h = self.input_norm.forward(x, ctx);
        let x = self.attention.forward(c, &h, around, before, ctx) + x;
        let h = self.mlp_norm.forward(&x, ctx);
        let (gate, up) = (self.mlp.gate.forward(&h, ctx), self.mlp.up.forward(&h, ctx));
        let inner = c.activation.gated(&gate, &up); // [batch, new, intermediate]
        self.mlp.down.forward_last(&inner, ctx) + x
    }
}

impl Block for Layer {
    fn slots(&mut self, at: &str, visit: Visitor<'_>) {
        let attn = &mut self.attention;
        for (name, linear) in [
            ("q_proj", &mut attn.q),
            ("k_proj", &mut attn.k),
            ("v_proj", &mut attn.v),
            ("o_proj", &mut attn.o),
        ] {
            visit(&format!("{at}.self_attn.{name}"), Slot::Linear(linear));
        }
        if let Some((q, k)) = &mut attn.qk_norm {
            visit(&format!("{at}.self_attn.q_norm"), Slot::Norm(q));
            visit(&format!("{at}.self_attn.k_norm"), Slot::Norm(k));
        }
        for (name, linear) in [
            ("gate_proj", &mut self.mlp.gate),
            ("up_proj", &mut self.mlp.up),
            ("down_proj", &mut self.mlp.down),
        ] {
            visit(&format!("{at}.mlp.{name}"), Slot::Linear(linear));
        }
        visit(
            &format!("{at}.input_layernorm"),
            Slot::Norm(&mut self.input_norm),
        );
        visit(
            &format!("{at}.post_attention_layernorm"),
            Slot::Norm(&mut self.mlp_norm),
        );
    }
}

impl Body for Llama {
    fn hidden(&self, input: &Input, mut cache: Option<&mut Cache>, ctx: Ctx) -> Tensor {
        let kind = self.embed.weight().kind();
        let front = Front::new(&self.prompt, input, cache.as_deref_mut(), kind, ctx);
        let mut x = front.put(self.embed.forward(&input.ids, ctx)); // [batch, new, hidden]
        let (cos, sin) = self.config.rope.tables(&front.positions(&input.ids));
        let whole = Mask::new(&front, None, &x);
        let window = self.config.windows.iter().flatten().next();
        let window = window.map(|&w| Mask::new(&front, Some(w), &x));
        for (i, layer) in self.layers.iter().enumerate() {
            let mask = match (&window, self.config.windows[i]) {
                (Some(mask), Some(_)) => mask,
                _ => &whole,
            };
            let before = Before {
                kv: front.kv(i),
                cache: cache.as_deref_mut().map(|it| (it, i)),
            };
            let (c, around) = (
                Arc::clone(&self.config),
                Around {
                    cos: cos.shallow_clone(),
                    sin: sin.shallow_clone(),
                    mask: mask.clone(),
                },
            );
            let ctx = kept_if_last(ctx, i, self.layers.len());
            x = layer.run([&x], before, ctx, move |layer, [x], before, ctx| {
                layer.forward(&c, x, &around, before, ctx)
            });
        }
        front.finish(cache);
        self.norm.forward(&x, ctx)
    }

    fn prompt(&self) -> &PromptSlot {
        &self.prompt
    }

    fn table(&self) -> &Embedding {
        &self.embed
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocab: self.config.vocab,
            positions: None,
            longest: self.config.max_positions,
            token_types: None,
        }
    }

    fn config(&self) -> &Value {
        &self.config.json
    }

    fn spec(&self, root: &str) -> Spec {
        let c = &self.config;
        Spec {
            model_type: c.model_type.clone(),
            hidden: c.hidden,
            layers: c.layers,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            input_embedding: format!("{root}embed_tokens"),
            ..Spec::default()
        }
    }

    fn slots(&mut self, root: &str, visit: Visitor<'_>) {
        visit("", Slot::Prompt(&mut self.prompt));
        visit(
            &format!("{root}embed_tokens"),
            Slot::Embedding(&mut self.embed),
        );
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(|it| it.slots(&format!("{root}layers.{i}"), visit));
        }
        visit(&format!("{root}norm"), Slot::Norm(&mut self.norm));
    }
}
