//! BERT (1810.04805) and RoBERTa (1907.11692): every position sees every other.
//!
//! ```text
//! x = n(E[ids] + T[types] + P[positions])
//! each layer:  x = n(x + O · attention(Q x, K x, V x))
//!              x = n(x + D · act(U x))
//! hidden = x                                          n = LayerNorm
//! ```
//!
//! RoBERTa is the same but for where its positions begin: behind the number of its padding token, counted over
//! what is not padding.

use std::sync::Arc;

use peft_core::{Ctx, Embedding, Linear, Norm, PromptSlot, Result, Slot, Spec, Weights};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    Cache, Input,
    attention::{Before, Heads, Mask, attend, counted},
    block::{Block, Shared, kept_if_last},
    body::{Body, Visitor, dropout, layer_norm, root, table},
    config::BertConfig,
    front::Front,
    input::Sizes,
};

/// A BERT or RoBERTa without a head.
#[derive(Debug)]
pub(crate) struct Bert {
    config: Arc<BertConfig>,
    prompt: PromptSlot,
    tokens: Embedding,
    places: Embedding,
    types: Embedding,
    norm: Norm,
    layers: Vec<Shared<Layer>>,
}

#[derive(Debug)]
struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    norm: Norm,
}

/// With what the names of the body begin in this checkpoint.
pub(crate) fn disk_root(weights: &dyn Weights) -> &'static str {
    let probe = "embeddings.word_embeddings.weight";
    root(weights, &["bert.", "roberta."], probe)
}

impl Bert {
    /// Builds the body out of `weights`.
    pub(crate) fn build(config: BertConfig, weights: &mut dyn Weights) -> Result<Bert> {
        let (c, root) = (&config, disk_root(weights));
        let at = |name: &str| format!("{root}embeddings.{name}");
        let tokens = table(weights, &at("word_embeddings"), c.vocab, c.hidden)?;
        let tokens = tokens.with_padding_idx(c.padding_idx);
        let places = table(weights, &at("position_embeddings"), c.positions, c.hidden)?;
        let places = places.with_padding_idx(c.padding);
        let types = table(
            weights,
            &at("token_type_embeddings"),
            c.token_types,
            c.hidden,
        )?;
        let norm = layer_norm(weights, &at("LayerNorm"), c.hidden, c.eps)?;
        let layers =
            (0..c.layers).map(|i| Layer::build(c, &format!("{root}encoder.layer.{i}"), weights));
        Ok(Bert {
            prompt: PromptSlot::new(tokens.weight()),
            tokens,
            places,
            types,
            norm,
            layers: layers
                .map(|it| it.map(Shared::new))
                .collect::<Result<_>>()?,
            config: Arc::new(config),
        })
    }

    /// `[batch or 1, new]`
    fn positions(&self, input: &Input, front: &Front) -> Tensor {
        let Some(padding) = self.config.padding else {
            return front.positions(&input.ids);
        };
        if let Some(given) = front.given() {
            return given;
        }
        if front.has_embeds() {
            // What is padding cannot be told from embeddings, and is counted too.
            return counted(front.past + padding + 1, front.new, input.ids.device());
        }
        let real = input.ids.ne(padding).to_kind(Kind::Int64);
        (real.cumsum(1, Kind::Int64) + front.past) * real + padding
    }

    /// `[batch, seq] -> [batch, new, hidden]`
    fn embed(&self, input: &Input, front: &Front, ctx: Ctx) -> Tensor {
        let types = match &input.token_type_ids {
            Some(types) => front.zeros_before(types),
            None => Tensor::zeros([1, 1], (Kind::Int64, input.ids.device())),
        };
        let x = front.put(self.tokens.forward(&input.ids, ctx))
            + self.types.forward(&types, ctx)
            + self.places.forward(&self.positions(input, front), ctx);
        dropout(self.norm.forward(&x, ctx), self.config.hidden_dropout, ctx)
    }
}

impl Layer {
    fn build(c: &BertConfig, at: &str, w: &mut dyn Weights) -> Result<Layer> {
        let h = c.hidden;
        let own = |name: &str| format!("{at}.attention.self.{name}");
        Ok(Layer {
            query: w.linear(&own("query"), (h, h), true)?,
            key: w.linear(&own("key"), (h, h), true)?,
            value: w.linear(&own("value"), (h, h), true)?,
            out: w.linear(&format!("{at}.attention.output.dense"), (h, h), true)?,
            attention_norm: layer_norm(w, &format!("{at}.attention.output.LayerNorm"), h, c.eps)?,
            up: w.linear(
                &format!("{at}.intermediate.dense"),
                (c.intermediate, h),
                true,
            )?,
            down: w.linear(&format!("{at}.output.dense"), (h, c.intermediate), true)?,
            norm: layer_norm(w, &format!("{at}.output.LayerNorm"), h, c.eps)?,
        })
    }

    /// x: `[batch, new, hidden] -> [batch, new, hidden]`
    fn forward(
        &self,
        c: &BertConfig,
        x: &Tensor,
        mask: &Mask,
        before: Before<'_>,
        ctx: Ctx,
    ) -> Tensor {
        let (size, width) = (x.size(), c.hidden / c.heads);
        let heads = Heads {
            scale: (width as f64).powf(-0.5),
            dropout: c.attention_dropout,
        };
        let parts = [&self.query, &self.key, &self.value]
            .map(|it| it.forward(x, ctx).view([size[0], size[1], c.heads, width]));
        let y = attend(heads, parts, mask, before, ctx);
        let y = dropout(self.out.forward(&y, ctx), c.hidden_dropout, ctx);
        let x = self.attention_norm.forward(&(y + x), ctx);
        let inner = c.activation.forward(&self.up.forward(&x, ctx)); // [batch, new, intermediate]
        let y = dropout(self.down.forward(&inner, ctx), c.hidden_dropout, ctx);
        self.norm.forward(&(y + x), ctx)
    }
}

impl Block for Layer {
    fn slots(&mut self, at: &str, visit: Visitor<'_>) {
        let at = |name: &str| format!("{at}.{name}");
        for (name, linear) in [
            ("attention.self.query", &mut self.query),
            ("attention.self.key", &mut self.key),
            ("attention.self.value", &mut self.value),
            ("attention.output.dense", &mut self.out),
        ] {
            visit(&at(name), Slot::Linear(linear));
        }
        visit(
            &at("attention.output.LayerNorm"),
            Slot::Norm(&mut self.attention_norm),
        );
        visit(&at("intermediate.dense"), Slot::Linear(&mut self.up));
        visit(&at("output.dense"), Slot::Linear(&mut self.down));
        visit(&at("output.LayerNorm"), Slot::Norm(&mut self.norm));
    }
}

impl Body for Bert {
    /// There is nothing to be cached where every position sees every other.
    fn hidden(&self, input: &Input, _: Option<&mut Cache>, ctx: Ctx) -> Tensor {
        let kind = self.tokens.weight().kind();
        let front = Front::new(&self.prompt, input, None, kind, ctx);
        let mut x = self.embed(input, &front, ctx); // [batch, new, hidden]
        let mask = Mask::padding(front.mask.as_ref(), front.new, kind);
        for (i, layer) in self.layers.iter().enumerate() {
            let before = Before {
                kv: front.kv(i),
                cache: None,
            };
            let (c, mask) = (Arc::clone(&self.config), mask.clone());
            let ctx = kept_if_last(ctx, i, self.layers.len());
            x = layer.run([&x], before, ctx, move |layer, [x], before, ctx| {
                layer.forward(&c, x, &mask, before, ctx)
            });
        }
        x
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
            positions: Some(c.positions),
            longest: c.positions - c.padding.map_or(0, |it| it + 1),
            token_types: Some(c.token_types),
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
            kv_heads: c.heads,
            head_dim: c.hidden / c.heads,
            input_embedding: format!("{root}embeddings.word_embeddings"),
            ..Spec::default()
        }
    }

    fn slots(&mut self, root: &str, visit: Visitor<'_>) {
        let at = |name: &str| format!("{root}embeddings.{name}");
        visit("", Slot::Prompt(&mut self.prompt));
        visit(&at("word_embeddings"), Slot::Embedding(&mut self.tokens));
        // RoBERTa makes its table of positions last.
        let roberta = self.config.padding.is_some();
        let places = at("position_embeddings");
        if !roberta {
            visit(&places, Slot::Embedding(&mut self.places));
        }
        visit(
            &at("token_type_embeddings"),
            Slot::Embedding(&mut self.types),
        );
        visit(&at("LayerNorm"), Slot::Norm(&mut self.norm));
        if roberta {
            visit(&places, Slot::Embedding(&mut self.places));
        }
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(|it| it.slots(&format!("{root}encoder.layer.{i}"), visit));
        }
    }
}
