//! T5 (1910.10683): an encoder and a decoder that know how far two tokens are apart, and not where they are.
//!
//! ```text
//! encoder:  x = E[ids];    each layer:  x += O · attention(n(x));  x += D · act(W · n(x))
//! decoder:  y = E[target]; each layer:  y += O · attention(n(y));  y += O' · attention(n(y), x);  y += D · act(W · n(y))
//! logits = H · n(y) · hidden^(−1/2)                   n = RMSNorm
//! ```
//!
//! Scores are not scaled. A bias is added to them that depends on the head and on the distance: distances fall
//! into buckets, near ones each in its own, far ones in wider and wider ones. One table serves all layers of a stack.
//! Version 1.1 gates its MLP, has a head of its own and does not scale the vectors in front of it.

use std::sync::Arc;

use peft_core::{
    Ctx, Dense, Embedding, Error, Linear, Model, Norm, PromptSlot, Result, Slot, Spec, State,
    Weights,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    Cache, Decoder, IGNORE, Input, Labels, Network, Task,
    attention::{Before, Heads, Mask, attend},
    block::{self, Shared, kept_if_last},
    body::{Visitor, dropout, rms_norm, table},
    config::T5Config,
    front::{Front, ones_before},
    headed::Origin,
    input::{Sizes, fault},
    loss::{class_loss, each_token, head_loss, in_range, labelled_here, shaped},
    seq2seq::{Encoded, Seq2Seq},
    task::Classes,
};

/// A T5 that writes a text for a text, or without a head one that gives the vectors of both.
#[derive(Debug)]
pub(crate) struct T5 {
    config: Arc<T5Config>,
    prompt: PromptSlot,
    shared: Embedding,
    encoder: Stack,
    decoder: Stack,
    head: Option<Head>,
    pub(crate) origin: Origin,
}

/// The output embedding.
#[derive(Debug)]
struct Head {
    layer: Linear,
    /// It is the input embedding.
    tied: bool,
}

#[derive(Debug)]
struct Stack {
    blocks: Vec<Shared<Block>>,
    /// `[buckets, heads]`, kept in the first block.
    bias: Embedding,
    norm: Norm,
}

#[derive(Debug)]
struct Block {
    norm: Norm,
    attention: Attention,
    /// Attention to the encoder, in a decoder.
    cross: Option<(Norm, Attention)>,
    mlp_norm: Norm,
    mlp: Mlp,
}

#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
}

#[derive(Debug)]
enum Mlp {
    Plain {
        wi: Linear,
        wo: Linear,
    },
    Gated {
        wi_0: Linear,
        wi_1: Linear,
        wo: Linear,
    },
}

impl Head {
    /// Whatever `tie_word_embeddings` says: a head of its own is one that is there and is another.
    fn build(shared: &Tensor, weights: &mut dyn Weights) -> Result<Head> {
        let key = "lm_head.weight";
        let own = match weights.has(key) {
            true => Some(weights.tensor(key, &shared.size())?).filter(|it| !it.equal(shared)),
            false => None,
        };
        let tied = own.is_none();
        let weight = own.unwrap_or_else(|| shared.shallow_clone());
        Ok(Head {
            layer: Linear::new(Dense::new(weight, None)),
            tied,
        })
    }
}

impl T5 {
    /// Builds the model out of `weights`, with a head if it is to write.
    pub(crate) fn build(config: T5Config, writes: bool, weights: &mut dyn Weights) -> Result<T5> {
        let c = &config;
        let shared = shared(c, weights)?;
        if shared.kind() == Kind::Half {
            return Err(Error::Config {
                peft_type: "model".into(),
                reason: "T5 overflows in fp16; load it in bf16 or fp32".into(),
            });
        }
        let encoder = Stack::build(c, "encoder", c.layers, weights)?;
        let decoder = Stack::build(c, "decoder", c.decoder_layers, weights)?;
        let head = match writes {
            true => Some(Head::build(&shared, weights)?),
            false => None,
        };
        let mut json = c.json.clone();
        json["scale_decoder_outputs"] = c.scaled.into();
        Ok(T5 {
            prompt: PromptSlot::new(&shared),
            shared: Embedding::new(shared),
            encoder,
            decoder,
            head,
            origin: Origin {
                config: json,
                fresh: Vec::new(),
                aside: Vec::new(),
            },
            config: Arc::new(config),
        })
    }

    /// The vectors of a target, `[batch, target, hidden]`, as the decoder leaves them.
    fn decoded(
        &self,
        ids: &Tensor,
        mask: Option<&Tensor>,
        source: &Encoded,
        mut cache: Option<&mut Cache>,
        ctx: Ctx,
    ) -> Tensor {
        let (c, stack) = (&self.config, &self.decoder);
        // Of virtual tokens, embeddings are the encoder's, keys and values the decoder's.
        let kind = self.shared.weight().kind();
        let front = Front::keys(&self.prompt, (ids, mask), cache.as_deref_mut(), kind, ctx);
        let mut x = dropout(self.shared.forward(ids, ctx), c.dropout, ctx); // [batch, target, hidden]
        let new = front.new;
        let bias = stack.distances(c, (new, front.past), false, ctx);
        let seen = Mask::biased(&bias, front.past, front.mask.as_ref());
        let cross_mask = Mask::padding(source.mask.as_ref(), new, kind);
        for (i, block) in stack.blocks.iter().enumerate() {
            let before = Before {
                kv: front.kv(i),
                cache: cache.as_deref_mut().map(|it| (it, i)),
            };
            let (c, mask, cross_mask) = (Arc::clone(c), seen.clone(), cross_mask.clone());
            let inputs = [&x, &seen.scores, &source.states];
            let ctx = kept_if_last(ctx, i, stack.blocks.len());
            x = block.run(inputs, before, ctx, move |block, inputs, before, ctx| {
                let [x, scores, states] = inputs;
                let source = Some((states, &cross_mask));
                block.forward(&c, x, &mask.with(scores), source, before, ctx)
            });
        }
        front.finish(cache);
        dropout(stack.norm.forward(&x, ctx), c.dropout, ctx)
    }

    /// The vectors in front of the head, `[batch, target, hidden]`.
    fn target(&self, input: &Input, ids: &Tensor, ctx: Ctx) -> Tensor {
        let source = self.encode(input, ctx);
        self.decode(ids, input.decoder_mask.as_ref(), &source, None, ctx)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            vocab: self.config.vocab,
            positions: None,
            longest: i64::MAX,
            token_types: None,
        }
    }
}

/// The table of both stacks, which may be there under three names.
fn shared(c: &T5Config, weights: &mut dyn Weights) -> Result<Tensor> {
    let names = ["shared", "encoder.embed_tokens", "decoder.embed_tokens"];
    let keys = names.map(|it| format!("{it}.weight"));
    let there: Vec<&String> = keys.iter().filter(|it| weights.has(it)).collect();
    let first = there.first().copied().unwrap_or(&keys[0]);
    let table = weights.tensor(first, &[c.vocab, c.hidden])?;
    for key in there.iter().skip(1) {
        if !weights.tensor(key, &[c.vocab, c.hidden])?.equal(&table) {
            return Err(Error::Config {
                peft_type: "model".into(),
                reason: format!("`{key}` differs from `{first}`, but both stacks share one table"),
            });
        }
    }
    Ok(table)
}

impl Stack {
    fn build(c: &T5Config, at: &str, layers: usize, w: &mut dyn Weights) -> Result<Stack> {
        let bias = format!("{at}.block.0.layer.0.SelfAttention.relative_attention_bias");
        let blocks = (0..layers)
            .map(|i| Block::build(c, &format!("{at}.block.{i}"), at == "decoder", w))
            .map(|it| it.map(Shared::new))
            .collect::<Result<_>>()?;
        Ok(Stack {
            blocks,
            bias: table(w, &bias, c.buckets, c.heads)?,
            norm: rms_norm(w, &format!("{at}.final_layer_norm"), c.hidden, c.eps)?,
        })
    }

    /// What the distances add to the scores of `new` positions behind `past` others: `[1, heads, new, past + new]`, or
    /// with a first dimension of the batch.
    fn distances(
        &self,
        c: &T5Config,
        (new, past): (i64, i64),
        both_ways: bool,
        ctx: Ctx,
    ) -> Tensor {
        let line =
            |from: i64| Tensor::arange_start(from, past + new, (Kind::Int64, self.bias.device()));
        let apart = line(0).unsqueeze(0) - line(past).unsqueeze(1); // [new, past + new]
        let buckets = buckets(&apart, both_ways, c.buckets, c.max_distance);
        // One row for the whole batch, which a mixed batch makes one for each.
        let bias = self.bias.forward(&buckets.unsqueeze(0), ctx); // [1, new, past + new, heads]
        bias.permute([0, 3, 1, 2])
    }

    fn slots(&mut self, at: &str, visit: Visitor<'_>) {
        let mut bias = Some(&mut self.bias);
        for (i, block) in self.blocks.iter_mut().enumerate() {
            let at = format!("{at}.block.{i}");
            block.visit(|it| it.slots_with(&at, bias.take(), visit));
        }
        visit(
            &format!("{at}.final_layer_norm"),
            Slot::Norm(&mut self.norm),
        );
    }
}

/// The bucket of each distance (key − query): half for exact distances, half for wider and wider ranges.
///
/// Computed with libtorch's logarithm, since a distance on the border of two ranges falls where its rounding says.
fn buckets(apart: &Tensor, both_ways: bool, buckets: i64, max_distance: i64) -> Tensor {
    let (count, side, distance) = match both_ways {
        true => {
            let half = buckets / 2;
            (half, apart.gt(0).to_kind(Kind::Int64) * half, apart.abs())
        }
        false => (buckets, apart.zeros_like(), -apart.clamp_max(0)),
    };
    let exact = count / 2;
    let range = (max_distance as f64 / exact as f64).ln();
    let far = (distance.to_kind(Kind::Float) / exact as f64).log() / range * (count - exact) as f64;
    let far = (far.to_kind(Kind::Int64) + exact).clamp_max(count - 1);
    side + distance.where_self(&distance.lt(exact), &far)
}

impl Block {
    fn build(c: &T5Config, at: &str, decoder: bool, w: &mut dyn Weights) -> Result<Block> {
        let (h, eps) = (c.hidden, c.eps);
        let layer = |i: i64, name: &str| format!("{at}.layer.{i}.{name}");
        let norm = rms_norm(w, &layer(0, "layer_norm"), h, eps)?;
        let attention = Attention::build(c, &layer(0, "SelfAttention"), w)?;
        let cross = match decoder {
            true => Some((
                rms_norm(w, &layer(1, "layer_norm"), h, eps)?,
                Attention::build(c, &layer(1, "EncDecAttention"), w)?,
            )),
            false => None,
        };
        let last = if decoder { 2 } else { 1 };
        Ok(Block {
            norm,
            attention,
            cross,
            mlp_norm: rms_norm(w, &layer(last, "layer_norm"), h, eps)?,
            mlp: Mlp::build(c, &layer(last, "DenseReluDense"), w)?,
        })
    }

    /// x: `[batch, new, hidden] -> [batch, new, hidden]`; source: the encoder's output for a decoder, and its mask.
    fn forward(
        &self,
        c: &T5Config,
        x: &Tensor,
        mask: &Mask,
        source: Option<(&Tensor, &Mask)>,
        before: Before<'_>,
        ctx: Ctx,
    ) -> Tensor {
        let Before { kv, mut cache } = before;
        let before = Before {
            kv,
            cache: cache.as_mut().map(|(it, layer)| (&mut **it, *layer)),
        };
        let h = self.norm.forward(x, ctx);
        let keys = self.attention.keys(c, &h, ctx);
        let y = self.attention.forward(c, &h, keys, mask, before, ctx);
        let mut x = dropout(y, c.dropout, ctx) + x;
        if let (Some((norm, cross)), Some((states, mask))) = (&self.cross, source) {
            // A handle of this block's own: so gradients of the encoder's output are summed block by block, as they
            // are where blocks are computed again.
            let make = || cross.keys(c, &states.alias(), ctx);
            let keys = match cache {
                Some((cache, layer)) => cache.crossed(layer, make),
                None => make(),
            };
            let h = norm.forward(&x, ctx);
            let y = cross.forward(c, &h, keys, mask, Before::default(), ctx);
            x = dropout(y, c.dropout, ctx) + x;
        }
        let y = self.mlp.forward(c, &self.mlp_norm.forward(&x, ctx), ctx);
        dropout(y, c.dropout, ctx) + x
    }

    /// Visits every place, in the first block of a stack with the table of distances.
    fn slots_with(&mut self, at: &str, bias: Option<&mut Embedding>, visit: Visitor<'_>) {
        let at = |i: i64, name: &str| format!("{at}.layer.{i}.{name}");
        self.attention.slots(&at(0, "SelfAttention"), visit);
        if let Some(bias) = bias {
            let name = at(0, "SelfAttention.relative_attention_bias");
            visit(&name, Slot::Embedding(bias));
        }
        visit(&at(0, "layer_norm"), Slot::Norm(&mut self.norm));
        let mut last = 1;
        if let Some((norm, cross)) = &mut self.cross {
            cross.slots(&at(1, "EncDecAttention"), visit);
            visit(&at(1, "layer_norm"), Slot::Norm(norm));
            last = 2;
        }
        self.mlp.slots(&at(last, "DenseReluDense"), visit);
        visit(&at(last, "layer_norm"), Slot::Norm(&mut self.mlp_norm));
    }
}

impl block::Block for Block {
    fn slots(&mut self, at: &str, visit: Visitor<'_>) {
        self.slots_with(at, None, visit);
    }
}

impl Attention {
    fn build(c: &T5Config, at: &str, w: &mut dyn Weights) -> Result<Attention> {
        let (h, inner) = (c.hidden, c.heads * c.head_dim);
        Ok(Attention {
            q: w.linear(&format!("{at}.q"), (inner, h), false)?,
            k: w.linear(&format!("{at}.k"), (inner, h), false)?,
            v: w.linear(&format!("{at}.v"), (inner, h), false)?,
            o: w.linear(&format!("{at}.o"), (h, inner), false)?,
        })
    }

    fn split(c: &T5Config, layer: &Linear, x: &Tensor, ctx: Ctx) -> Tensor {
        let y = layer.forward(x, ctx);
        let size = y.size();
        y.view([size[0], size[1], c.heads, c.head_dim])
    }

    fn keys(&self, c: &T5Config, x: &Tensor, ctx: Ctx) -> (Tensor, Tensor) {
        let split = |layer| Attention::split(c, layer, x, ctx);
        (split(&self.k), split(&self.v))
    }

    /// x: `[batch, new, hidden] -> [batch, new, hidden]`, looking at keys and values `[batch, n, heads, head_dim]`.
    fn forward(
        &self,
        c: &T5Config,
        x: &Tensor,
        (key, value): (Tensor, Tensor),
        mask: &Mask,
        before: Before<'_>,
        ctx: Ctx,
    ) -> Tensor {
        let heads = Heads {
            scale: 1.0,
            dropout: c.dropout,
        };
        let query = Attention::split(c, &self.q, x, ctx);
        let y = attend(heads, [query, key, value], mask, before, ctx);
        self.o.forward(&y, ctx)
    }

    fn slots(&mut self, at: &str, visit: Visitor<'_>) {
        for (name, linear) in [
            ("q", &mut self.q),
            ("k", &mut self.k),
            ("v", &mut self.v),
            ("o", &mut self.o),
        ] {
            visit(&format!("{at}.{name}"), Slot::Linear(linear));
        }
    }
}

impl Mlp {
    fn build(c: &T5Config, at: &str, w: &mut dyn Weights) -> Result<Mlp> {
        let (up, down) = ((c.inner, c.hidden), (c.hidden, c.inner));
        Ok(match c.gated {
            false => Mlp::Plain {
                wi: w.linear(&format!("{at}.wi"), up, false)?,
                wo: w.linear(&format!("{at}.wo"), down, false)?,
            },
            true => Mlp::Gated {
                wi_0: w.linear(&format!("{at}.wi_0"), up, false)?,
                wi_1: w.linear(&format!("{at}.wi_1"), up, false)?,
                wo: w.linear(&format!("{at}.wo"), down, false)?,
            },
        })
    }

    fn forward(&self, c: &T5Config, x: &Tensor, ctx: Ctx) -> Tensor {
        let (inner, wo) = match self {
            Mlp::Plain { wi, wo } => (c.activation.forward(&wi.forward(x, ctx)), wo),
            Mlp::Gated { wi_0, wi_1, wo } => {
                let (gate, up) = (wi_0.forward(x, ctx), wi_1.forward(x, ctx));
                (c.activation.gated(&gate, &up), wo)
            }
        };
        wo.forward_last(&dropout(inner, c.dropout, ctx), ctx)
    }

    fn slots(&mut self, at: &str, visit: Visitor<'_>) {
        let mut linear = |name: &str, it| visit(&format!("{at}.{name}"), Slot::Linear(it));
        match self {
            Mlp::Plain { wi, wo } => {
                linear("wi", wi);
                linear("wo", wo);
            }
            Mlp::Gated { wi_0, wi_1, wo } => {
                linear("wi_0", wi_0);
                linear("wi_1", wi_1);
                linear("wo", wo);
            }
        }
    }
}

impl Seq2Seq for T5 {
    fn encode(&self, input: &Input, ctx: Ctx) -> Encoded {
        let (c, stack) = (&self.config, &self.encoder);
        let x = self.shared.forward(&input.ids, ctx);
        let (x, mask) = match self.prompt.embeds(ctx) {
            None => (x, input.attention_mask.as_ref().map(Tensor::shallow_clone)),
            Some(embeds) => {
                let (n, rows) = (embeds.size()[0], x.size()[0]);
                let embeds = embeds.to_kind(x.kind()).expand([rows, -1, -1], false);
                let mask = input.attention_mask.as_ref().map(|it| ones_before(it, n));
                (Tensor::cat(&[&embeds, &x], 1), mask)
            }
        };
        let mut x = dropout(x, c.dropout, ctx); // [batch, source, hidden]
        let source = x.size()[1];
        let bias = stack.distances(c, (source, 0), true, ctx);
        let seen = Mask::padding(mask.as_ref(), source, x.kind()).and(&bias);
        for block in &stack.blocks {
            let (c, mask, inputs) = (Arc::clone(c), seen.clone(), [&x, &seen.scores]);
            x = block.run(
                inputs,
                Before::default(),
                ctx,
                move |block, inputs, before, ctx| {
                    let [x, scores] = inputs;
                    block.forward(&c, x, &mask.with(scores), None, before, ctx)
                },
            );
        }
        Encoded {
            states: dropout(stack.norm.forward(&x, ctx), c.dropout, ctx),
            mask,
        }
    }

    fn decode(
        &self,
        ids: &Tensor,
        mask: Option<&Tensor>,
        source: &Encoded,
        cache: Option<&mut Cache>,
        ctx: Ctx,
    ) -> Tensor {
        let x = self.decoded(ids, mask, source, cache, ctx);
        if self.config.scaled {
            x * (self.config.hidden as f64).powf(-0.5)
        } else {
            x
        }
    }

    fn head(&self) -> &Linear {
        &self
            .head
            .as_ref()
            .expect("a model that writes has a head")
            .layer
    }

    fn start(&self) -> i64 {
        self.config.start
    }

    fn shifted(&self, labels: &Tensor) -> Tensor {
        let size = labels.size();
        let start = Tensor::full(
            [size[0], 1],
            self.config.start,
            (Kind::Int64, labels.device()),
        );
        let ids = Tensor::cat(&[&start, &labels.narrow(1, 0, size[1] - 1)], 1);
        ids.masked_fill(&ids.eq(IGNORE), self.config.pad)
    }
}

impl Network for T5 {
    fn task(&self) -> Task {
        match self.head {
            Some(_) => Task::Seq2SeqLm,
            None => Task::FeatureExtraction,
        }
    }

    fn outputs(&self, input: &Input, ctx: Ctx) -> Result<State> {
        input.check(&self.sizes(), 0)?;
        let ids = input.decoder_ids.as_ref();
        let ids = ids.ok_or_else(|| fault("there are no decoder_ids to score".to_owned()))?;
        let outputs = match &self.head {
            Some(head) => {
                let logits = head.layer.forward(&self.target(input, ids, ctx), ctx);
                vec![("logits", logits)]
            }
            None => {
                let source = self.encode(input, ctx);
                let mask = input.decoder_mask.as_ref();
                vec![
                    (
                        "last_hidden_state",
                        self.decoded(ids, mask, &source, None, ctx),
                    ),
                    ("encoder_last_hidden_state", source.states),
                ]
            }
        };
        let named = outputs.into_iter().map(|(name, it)| (name.to_owned(), it));
        Ok(named.collect())
    }

    fn loss(&self, input: &Input, labels: &Labels, ctx: Ctx) -> Result<(Tensor, i64)> {
        input.check(&self.sizes(), 0)?;
        let Some(Head { layer: head, .. }) = &self.head else {
            return Err(fault(format!("{} has no labels and no loss", self.task())));
        };
        let labels = each_token(labels)?;
        let target = labels.size().get(1).copied().unwrap_or(0);
        shaped(labels, &[input.ids.size()[0], target.max(1)])?;
        in_range(labels, self.config.vocab)?;
        let ids = match &input.decoder_ids {
            Some(ids) => {
                shaped(labels, &ids.size())?;
                ids.shallow_clone()
            }
            None => self.shifted(labels),
        };
        let hidden = self.target(input, &ids, ctx);
        if ctx.rows.is_some() {
            // The head must see whole rows to know whose they are.
            let (rows, targets) = labelled_here(&head.forward(&hidden, ctx), labels);
            return Ok(class_loss(&rows, &targets));
        }
        let (rows, targets) = labelled_here(&hidden, labels);
        match targets.size()[0] {
            0 => Ok((hidden.sum(Kind::Float) * 0.0, 0)),
            count => Ok((head_loss(head, &rows, &targets, ctx), count)),
        }
    }

    fn vocab(&self) -> i64 {
        self.config.vocab
    }
    fn device(&self) -> Device {
        self.shared.device()
    }
    fn kind(&self) -> Kind {
        self.shared.weight().kind()
    }
    fn max_positions(&self) -> i64 {
        i64::MAX
    }
    fn learned_positions(&self) -> bool {
        false
    }
    fn config(&self) -> &Value {
        &self.origin.config
    }
    fn classes(&self) -> Option<&Classes> {
        None
    }
    fn fresh(&self) -> &[String] {
        &self.origin.fresh
    }
    fn aside(&self) -> &[String] {
        &self.origin.aside
    }
    fn decoder(&self) -> Option<&dyn Decoder> {
        None
    }
    fn seq2seq(&self) -> Option<&dyn Seq2Seq> {
        self.head.is_some().then_some(self)
    }
}

impl Model for T5 {
    fn spec(&self) -> Spec {
        let c = &self.config;
        Spec {
            model_type: "t5".into(),
            hidden: c.hidden,
            layers: c.decoder_layers,
            heads: c.heads,
            kv_heads: c.heads,
            head_dim: c.head_dim,
            input_embedding: "shared".into(),
            output_embedding: self.head.as_ref().map(|_| "lm_head".into()),
            tied: self.head.as_ref().is_some_and(|it| it.tied),
            encoder_decoder: true,
            ..Spec::default()
        }
    }

    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("", Slot::Prompt(&mut self.prompt));
        visit("shared", Slot::Embedding(&mut self.shared));
        self.encoder.slots("encoder", visit);
        self.decoder.slots("decoder", visit);
        if let Some(head) = &mut self.head {
            visit("lm_head", Slot::Linear(&mut head.layer));
        }
    }
}
