//! What turns the vectors of a body into an answer for a task.
//!
//! ```text
//! SEQ_CLS       BERT      C · drop(tanh(W x₀))          RoBERTa   O · drop(tanh(W · drop(x₀)))
//!               decoders  S x at the last token that is not padding
//! TOKEN_CLS     C · drop(x)
//! QUESTION_ANS  Q x, whose two outputs are the scores of the beginning and of the end
//! MASKED_LM     E · n(act(W x)) + b, where E is the table of the tokens
//! ```
//!
//! x₀ is the vector of the first position. A head that the checkpoint lacks is drawn from a normal distribution as
//! `transformers` does it; its names are kept, for somebody has to be told.

use peft_core::{Ctx, Dense, Linear, Norm, NormKind, Result, Slot, Weights};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use tch::{Device, Kind, Tensor};

use crate::{
    activation::Activation,
    body::{Visitor, dropout, layer_norm, output},
};

/// A layer and the name that `named_modules()` gives it.
#[derive(Debug)]
pub(crate) struct Named<T> {
    pub(crate) at: String,
    pub(crate) layer: T,
}

/// A head over `[batch, seq, hidden]`.
#[derive(Debug)]
pub(crate) enum Head {
    /// None: the vectors are the answer. BERT has a layer on the first position all the same.
    Bare { pooler: Option<Named<Linear>> },
    /// Classes from the first position.
    First {
        dense: Named<Linear>,
        out: Named<Linear>,
        /// Dropout before the first layer and not only before the second.
        twice: bool,
        dropout: f64,
    },
    /// Classes from the last token that is not `padding`.
    Last {
        score: Named<Linear>,
        padding: Option<i64>,
    },
    /// Classes for each position.
    Each { out: Named<Linear>, dropout: f64 },
    /// Where the answer begins and ends.
    Spans { out: Named<Linear> },
    /// A score for each token of the vocabulary at each position.
    Vocabulary {
        dense: Named<Linear>,
        activation: Activation,
        norm: Named<Norm>,
        out: Named<Linear>,
    },
}

impl Head {
    /// The place of the head, or the module of its places, where it is not one over the vocabulary.
    pub(crate) fn place(&self) -> Option<&str> {
        match self {
            Head::Bare { .. } | Head::Vocabulary { .. } => None,
            // RoBERTa's two layers are one module; of BERT's the first is part of the body.
            Head::First { out, .. } => out.at.split('.').next(),
            Head::Last { score: out, .. } | Head::Each { out, .. } | Head::Spans { out } => {
                Some(&out.at)
            }
        }
    }

    /// Visits every place of the head.
    pub(crate) fn slots(&mut self, visit: Visitor<'_>) {
        let mut linear = |it: &mut Named<Linear>| visit(&it.at, Slot::Linear(&mut it.layer));
        match self {
            Head::Bare { pooler } => {
                if let Some(pooler) = pooler {
                    linear(pooler);
                }
            }
            Head::First { dense, out, .. } => {
                linear(dense);
                linear(out);
            }
            Head::Last { score: out, .. } | Head::Each { out, .. } | Head::Spans { out } => {
                linear(out);
            }
            Head::Vocabulary {
                dense, norm, out, ..
            } => {
                linear(dense);
                visit(&norm.at, Slot::Norm(&mut norm.layer));
                visit(&out.at, Slot::Linear(&mut out.layer));
            }
        }
    }

    /// tanh of the pooling layer at the first position: `[batch, seq, hidden] -> [batch, hidden]`.
    pub(crate) fn pooled(dense: &Linear, hidden: &Tensor, ctx: Ctx) -> Tensor {
        dense.forward(&hidden.select(1, 0), ctx).tanh()
    }

    /// The scores of a classifier: `[batch, seq, hidden] -> [batch, labels]`, or `[batch, seq, labels]`.
    ///
    /// ids: `[batch, seq]`, for where a text ends.
    pub(crate) fn logits(&self, hidden: &Tensor, ids: &Tensor, ctx: Ctx) -> Option<Tensor> {
        Some(match self {
            Head::Bare { .. } | Head::Spans { .. } => return None,
            Head::First {
                dense,
                out,
                twice,
                dropout: p,
            } => {
                let first = hidden.select(1, 0); // [batch, hidden]
                let first = if *twice {
                    dropout(first, *p, ctx)
                } else {
                    first
                };
                let pooled = dense.layer.forward(&first, ctx).tanh();
                out.layer.forward(&dropout(pooled, *p, ctx), ctx)
            }
            Head::Last { score, padding } => {
                let last = last_token(ids, *padding, hidden.size()[1]); // [batch, 1, 1]
                let width = hidden.size()[2];
                let rows = hidden.gather(1, &last.expand([-1, -1, width], false), false);
                score.layer.forward(&rows.squeeze_dim(1), ctx)
            }
            Head::Each { out, dropout: p } => out
                .layer
                .forward(&dropout(hidden.shallow_clone(), *p, ctx), ctx),
            Head::Vocabulary { out, .. } => out.layer.forward(&self.transformed(hidden, ctx), ctx),
        })
    }

    /// The vectors of a masked language model as its last layer wants them: `[.., hidden] -> [.., hidden]`.
    pub(crate) fn transformed(&self, hidden: &Tensor, ctx: Ctx) -> Tensor {
        match self {
            Head::Vocabulary {
                dense,
                activation,
                norm,
                ..
            } => {
                let inner = activation.forward(&dense.layer.forward(hidden, ctx));
                norm.layer.forward(&inner, ctx)
            }
            _ => hidden.shallow_clone(),
        }
    }
}

/// The place in `0..len` of each row's last token that is not padding, `[batch, 1, 1]`.
///
/// Where there is more than the tokens (a prompt in front of them), the place is behind it. Without a padding token it
/// is the last place, and there is one row.
fn last_token(ids: &Tensor, padding: Option<i64>, len: i64) -> Tensor {
    let (size, device) = (ids.size(), ids.device());
    let last = match padding {
        None => Tensor::full([size[0]], size[1] - 1, (Kind::Int64, device)),
        Some(padding) => {
            let places = Tensor::arange(size[1], (Kind::Int64, device));
            (ids.ne(padding).to_kind(Kind::Int64) * places).argmax(1, false)
        }
    };
    (last + (len - size[1])).view([-1, 1, 1])
}

/// Makes the layers of a head: out of the checkpoint, or at random where it has none.
pub(crate) struct Maker<'a> {
    pub(crate) weights: &'a mut dyn Weights,
    pub(crate) kind: Kind,
    pub(crate) device: Device,
    /// The width of the normal distribution.
    pub(crate) std: f64,
    pub(crate) random: ChaCha8Rng,
    /// What was made at random.
    pub(crate) fresh: Vec<String>,
}

impl<'a> Maker<'a> {
    pub(crate) fn new(
        weights: &'a mut dyn Weights,
        like: &Tensor,
        std: f64,
        seed: u64,
    ) -> Maker<'a> {
        Maker {
            weights,
            kind: like.kind(),
            device: like.device(),
            std,
            random: ChaCha8Rng::seed_from_u64(seed),
            fresh: Vec::new(),
        }
    }

    /// The layer called `at` in the model and `disk` in the checkpoint.
    pub(crate) fn linear(
        &mut self,
        (at, disk): (&str, &str),
        (out, inp): (i64, i64),
        bias: bool,
    ) -> Result<Named<Linear>> {
        let layer = if self.weights.has(&format!("{disk}.weight")) {
            self.weights.linear(disk, (out, inp), bias)?
        } else {
            self.fresh.push(format!("{at}.weight"));
            let weight = self.normal(out, inp);
            let bias = bias.then(|| self.zeros(&format!("{at}.bias"), out));
            Linear::new(Dense::new(weight, bias))
        };
        Ok(Named {
            at: at.to_owned(),
            layer,
        })
    }

    /// A LayerNorm; a fresh one does nothing but normalise.
    pub(crate) fn norm(&mut self, at: &str, width: i64, eps: f64) -> Result<Named<Norm>> {
        let there = ["weight", "gamma"].map(|it| self.weights.has(&format!("{at}.{it}")));
        let layer = if there.contains(&true) {
            layer_norm(self.weights, at, width, eps)?
        } else {
            self.fresh.push(format!("{at}.weight"));
            let weight = Tensor::ones([width], (self.kind, self.device));
            let bias = self.zeros(&format!("{at}.bias"), width);
            Norm::new(NormKind::Layer, weight, Some(bias), eps)
        };
        Ok(Named {
            at: at.to_owned(),
            layer,
        })
    }

    /// The last layer of a masked language model, whose bias is kept one level up in most checkpoints.
    pub(crate) fn vocabulary(
        &mut self,
        at: &str,
        embed: &Tensor,
        tied: bool,
    ) -> Result<Named<Linear>> {
        let (vocab, width) = (embed.size()[0], embed.size()[1]);
        // An untied model has two, of which the first is added and the second only kept.
        let keys = [format!("{at}.bias"), bias_key(at)];
        let mut bias = None;
        for key in &keys {
            if self.weights.has(key) {
                let found = self.weights.tensor(key, &[vocab])?;
                bias.get_or_insert(found);
            }
        }
        let bias = bias.unwrap_or_else(|| self.zeros(&keys[1], vocab));
        let own = format!("{at}.weight");
        let layer = if tied || self.weights.has(&own) {
            output(self.weights, at, embed, tied, Some(bias))?
        } else {
            self.fresh.push(own);
            Linear::new(Dense::new(self.normal(vocab, width), Some(bias)))
        };
        Ok(Named {
            at: at.to_owned(),
            layer,
        })
    }

    fn zeros(&mut self, key: &str, width: i64) -> Tensor {
        self.fresh.push(key.to_owned());
        Tensor::zeros([width], (self.kind, self.device))
    }

    /// `[out, in]`, from a generator of our own: libtorch's stays where it is.
    fn normal(&mut self, out: i64, inp: i64) -> Tensor {
        let pairs = (out * inp + 1) / 2;
        let uniform = |it: &mut ChaCha8Rng| (it.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut values = Vec::with_capacity(2 * pairs as usize);
        for _ in 0..pairs {
            // Box and Muller; 1 − u is above zero.
            let (u, v) = (uniform(&mut self.random), uniform(&mut self.random));
            let radius = self.std * (-2.0 * (1.0 - u).ln()).sqrt();
            let angle = 2.0 * std::f64::consts::PI * v;
            values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
        }
        values.truncate((out * inp) as usize);
        let weight = Tensor::from_slice(&values).view([out, inp]);
        weight.to_kind(self.kind).to_device(self.device)
    }
}

/// On-disk name of the bias of the last layer `at` of a masked language model: `cls.predictions.bias`, `lm_head.bias`.
pub(crate) fn bias_key(at: &str) -> String {
    format!("{}.bias", at.strip_suffix(".decoder").unwrap_or(at))
}
