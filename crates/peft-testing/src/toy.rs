//! A model small enough to try everything on: one layer of each kind that a method may meet.
//!
//! ```text
//! h = [P; E[ids]]                                       virtual tokens, embed_tokens
//! h = h + look(h, Pₖ, Pᵥ)      attention                 plain tensors, keys and values of virtual tokens
//! h = h + k(tanh q(norm h))    LayerNorm with a bias     blocks.0.{norm, q_proj, k_proj}
//! h = h + look(h, Pₖ, Pᵥ)
//! h = h + o(tanh v(norm h))    RMSNorm                   blocks.1.{norm, v_proj, o_proj}
//! logits = h Hᵀ                at the real tokens        lm_head
//! ```
//!
//! q has a bias, k is kept transposed, v has no bias, o may lose digits as a quantised layer does. The attention is
//! causal, with two heads of queries on one of keys and values; it knows no positions.

use peft_core::{
    Ctx, Dense, Embedding, Linear, LinearOp, Model, Norm, NormKind, Plain, PromptSlot, Result,
    Slot, Spec,
};
use tch::{Device, Kind, Tensor};

/// Sizes that are odd and all different.
pub const VOCAB: i64 = 23;
const HIDDEN: i64 = 10;
const INNER: i64 = 13;
/// Heads of queries, on one of keys and values.
const HEADS: i64 = 2;
const HEAD: i64 = 3;

/// Which toy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kit {
    /// The head shares the table of the embedding.
    pub tied: bool,
    /// One layer keeps its weight in steps of 1/64.
    pub lossy: bool,
}

/// The model.
#[derive(Debug)]
pub struct Toy {
    prompt: PromptSlot,
    looks: [Look; 2],
    embed: Embedding,
    norms: [Norm; 2],
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    head: Linear,
    tied: bool,
}

impl Toy {
    /// The same weights for the same seed.
    pub fn new(kit: Kit, seed: i64) -> Toy {
        tch::manual_seed(seed);
        let random =
            |shape: &[i64], size: f64| Tensor::randn(shape, (Kind::Float, Device::Cpu)) * size;
        let near_one = || random(&[HIDDEN], 0.2) + 1.0;
        let table = random(&[VOCAB, HIDDEN], 1.0);
        let layer = |out, inp, bias: bool| {
            let bias = bias.then(|| random(&[out], 0.5));
            Dense::new(random(&[out, inp], 0.4), bias)
        };
        let norms = [
            Norm::new(
                NormKind::Layer,
                near_one(),
                Some(random(&[HIDDEN], 0.3)),
                1e-5,
            ),
            Norm::new(NormKind::Rms, near_one(), None, 1e-6),
        ];
        let k = Dense::new(
            random(&[INNER, HIDDEN], 0.4).tr(),
            Some(random(&[HIDDEN], 0.5)),
        );
        let (q, v, o) = (
            layer(INNER, HIDDEN, true),
            layer(INNER, HIDDEN, false),
            layer(HIDDEN, INNER, false),
        );
        let head = match kit.tied {
            true => Dense::new(table.shallow_clone(), None),
            false => layer(VOCAB, HIDDEN, false),
        };
        Toy {
            prompt: PromptSlot::new(&table),
            looks: [(); 2].map(|()| Look::new(&random)),
            embed: Embedding::new(table),
            norms,
            q: Linear::new(Base::plain(q)),
            k: Linear::new(Base::plain(k)),
            v: Linear::new(Base::plain(v)),
            o: match kit.lossy {
                true => Linear::new(Base::rounded(o.weight(), None)),
                false => Linear::new(Base::plain(o)),
            },
            head: Linear::new(Base::plain(head)),
            tied: kit.tied,
        }
    }

    /// ids: `[batch, seq] -> [batch, seq, vocab]`
    pub fn forward(&self, ids: &Tensor, ctx: Ctx) -> Tensor {
        self.masked(ids, &ids.ones_like(), ctx)
    }

    /// The same with padding; ids, mask (0 where nothing is): `[batch, seq] -> [batch, seq, vocab]`
    pub fn masked(&self, ids: &Tensor, mask: &Tensor, ctx: Ctx) -> Tensor {
        let (batch, seq) = (ids.size()[0], ids.size()[1]);
        let mut h = self.embed.forward(ids, ctx);
        let mut mask = mask.to_kind(Kind::Bool);
        let (embeds, kv) = self.prompt.ahead(ctx);
        if let Some(ahead) = embeds {
            let tokens = ahead.size()[0];
            h = Tensor::cat(&[ahead.expand([batch, -1, -1], false), h], 1); // [batch, tokens + seq, hidden]
            mask = Tensor::cat(
                &[
                    mask.new_ones([batch, tokens], (Kind::Bool, mask.device())),
                    mask,
                ],
                1,
            );
        }
        let ahead = kv.unwrap_or_default();
        let h = self.looks[0].forward(&h, &mask, ahead.first());
        let up = self.q.forward(&self.norms[0].forward(&h, ctx), ctx).tanh();
        let h = h + self.k.forward(&up, ctx);
        let h = self.looks[1].forward(&h, &mask, ahead.get(1));
        let up = self.v.forward(&self.norms[1].forward(&h, ctx), ctx).tanh();
        let h = h + self.o.forward(&up, ctx);
        let real = h.narrow(1, h.size()[1] - seq, seq);
        self.head.forward(&real, ctx)
    }

    /// Where virtual tokens go.
    pub fn prompt(&self) -> &PromptSlot {
        &self.prompt
    }

    /// Every tensor of the base, merged or not.
    pub fn base(&mut self) -> Vec<Tensor> {
        let mut all = Vec::new();
        self.slots(&mut |_, slot| match slot {
            Slot::Linear(it) => {
                all.push(it.base().weight());
                all.extend(it.base().bias().map(Tensor::shallow_clone));
            }
            Slot::Embedding(it) => all.push(it.weight().shallow_clone()),
            Slot::Norm(it) => {
                all.push(it.base().weight.shallow_clone());
                all.extend(it.base().bias.as_ref().map(Tensor::shallow_clone));
            }
            Slot::Prompt(it) => all.push(it.words().shallow_clone()),
            _ => {}
        });
        all.extend(self.looks.iter().flat_map(Look::tensors));
        all
    }
}

impl Model for Toy {
    fn spec(&self) -> Spec {
        Spec {
            model_type: "llama".to_owned(),
            hidden: HIDDEN,
            layers: 2,
            heads: HEADS,
            kv_heads: 1,
            head_dim: HEAD,
            input_embedding: "embed_tokens".to_owned(),
            output_embedding: Some("lm_head".to_owned()),
            tied: self.tied,
            transposed: true,
            encoder_decoder: false,
            task_head: None,
        }
    }

    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        let [first, second] = &mut self.norms;
        visit("", Slot::Prompt(&mut self.prompt));
        visit("embed_tokens", Slot::Embedding(&mut self.embed));
        visit("blocks.0.norm", Slot::Norm(first));
        visit("blocks.0.q_proj", Slot::Linear(&mut self.q));
        visit("blocks.0.k_proj", Slot::Linear(&mut self.k));
        visit("blocks.1.norm", Slot::Norm(second));
        visit("blocks.1.v_proj", Slot::Linear(&mut self.v));
        visit("blocks.1.o_proj", Slot::Linear(&mut self.o));
        visit("lm_head", Slot::Linear(&mut self.head));
    }
}

/// Causal attention, added to its input. It has no places for adapters.
#[derive(Debug)]
struct Look {
    /// `[hidden, heads·head_dim]`
    q: Tensor,
    /// `[hidden, head_dim]`
    k: Tensor,
    /// `[hidden, head_dim]`
    v: Tensor,
    /// `[heads·head_dim, hidden]`
    o: Tensor,
}

impl Look {
    fn new(random: &impl Fn(&[i64], f64) -> Tensor) -> Look {
        Look {
            q: random(&[HIDDEN, HEADS * HEAD], 0.4),
            k: random(&[HIDDEN, HEAD], 0.4),
            v: random(&[HIDDEN, HEAD], 0.4),
            o: random(&[HEADS * HEAD, HIDDEN], 0.15),
        }
    }

    /// h: `[batch, seq, hidden]`, mask: `[batch, seq]`, ahead: keys and values `[1, n, head_dim]` that all see.
    fn forward(&self, h: &Tensor, mask: &Tensor, ahead: Option<&(Tensor, Tensor)>) -> Tensor {
        let (batch, seq) = (h.size()[0], h.size()[1]);
        let heads = |t: Tensor| t.view([batch, seq, -1, HEAD]).transpose(1, 2); // [batch, heads, seq, head_dim]
        let q = heads(h.matmul(&self.q));
        let (mut k, mut v) = (heads(h.matmul(&self.k)), heads(h.matmul(&self.v)));
        let causal = mask.new_ones([seq, seq], (Kind::Bool, h.device())).tril(0);
        let mut seen = causal.logical_and(&mask.unsqueeze(1)); // [batch, seq, seq]
        if let Some((first_k, first_v)) = ahead {
            let join = |first: &Tensor, t: &Tensor| {
                Tensor::cat(
                    &[&first.unsqueeze(0).expand([batch, -1, -1, -1], false), t],
                    2,
                )
            };
            (k, v) = (join(first_k, &k), join(first_v, &v));
            let n = first_k.size()[1];
            seen = Tensor::cat(
                &[
                    seen.new_ones([batch, seq, n], (Kind::Bool, h.device())),
                    seen,
                ],
                2,
            );
        }
        let scores = q.matmul(&k.transpose(2, 3)) / (HEAD as f64).sqrt();
        let scores = scores.masked_fill(&seen.logical_not().unsqueeze(1), -1e9);
        let found = scores.softmax(-1, Kind::Float).matmul(&v); // [batch, heads, seq, head_dim]
        h + found
            .transpose(1, 2)
            .reshape([batch, seq, -1])
            .matmul(&self.o)
    }

    fn tensors(&self) -> [Tensor; 4] {
        [&self.q, &self.k, &self.v, &self.o].map(Tensor::shallow_clone)
    }
}

/// How far a weight can be moved by a base that rounds.
pub(crate) const HALF_STEP: f64 = 1.0 / 128.0;

/// A base: dense, or one that rounds weights to steps of 1/64. What nobody is to read is no number.
#[derive(Debug)]
struct Base {
    dense: Dense,
    rounds: bool,
}

impl Base {
    fn plain(dense: Dense) -> Base {
        Base {
            dense,
            rounds: false,
        }
    }

    fn rounded(weight: Tensor, bias: Option<Tensor>) -> Base {
        let step = 2.0 * HALF_STEP;
        Base {
            dense: Dense::new((weight / step).round() * step, bias),
            rounds: true,
        }
    }
}

impl LinearOp for Base {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.dense.forward(x)
    }
    fn unread(&self, x: &Tensor) -> Tensor {
        self.forward(x) + f64::NAN
    }
    fn weight(&self) -> Tensor {
        match self.rounds {
            true => self.dense.weight().copy(), // as a decoded weight: nobody else's memory
            false => self.dense.weight(),
        }
    }
    fn bias(&self) -> Option<&Tensor> {
        self.dense.bias()
    }
    fn shape(&self) -> (i64, i64) {
        self.dense.shape()
    }
    fn device(&self) -> Device {
        self.dense.device()
    }
    fn transposed(&self) -> bool {
        self.dense.transposed()
    }
    fn is_dense(&self) -> bool {
        !self.rounds
    }
    fn encode(&self, plain: Plain) -> Result<Box<dyn LinearOp>> {
        if !self.rounds {
            return self.dense.encode(plain);
        }
        let bias = plain.bias.map(|b| b.detach());
        Ok(Box::new(Base::rounded(plain.weight.detach(), bias)))
    }
}
