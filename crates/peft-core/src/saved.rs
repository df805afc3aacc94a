//! Parts of the base that are trained whole: `modules_to_save`, and `bias`.
//!
//! A saved module is a copy that stands in for the base, in the base's dtype and
//! in the layout that it has on disk, under the plain name of the module. A
//! trained bias is a new bias b'; what is added is b' − b, so that the base stays
//! as it is and the two can be told apart again. b' is kept in fp32 also over a base in bf16, where a
//! step of training would often be less than the last bit.

use peft_torch::add_row_;
use tch::{Device, Kind, Tensor};

use crate::{
    Affine, Beneath, BeneathConv, BeneathEmbedding, ConvAdapter, Ctx, DenseConv, EmbeddingAdapter,
    LinearAdapter, LinearOp, NormAdapter, Params, Plain, Slot, Visit,
};

const WEIGHT: &str = "weight";
const BIAS: &str = "bias";
/// The bias of a layer that has another adapter too.
const BIAS_BELOW: &str = "base_layer.bias";

fn copy(t: &Tensor) -> Tensor {
    let copy = tch::no_grad(|| t.detach().contiguous().copy());
    copy.set_requires_grad(true)
}

/// Whether the tensors of a copy are somebody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Here,
    /// The input embedding, whose table this head shares; the file holds them twice.
    Embedding,
}

/// A trained copy of a linear layer, an embedding (without a bias), a convolution or a norm.
#[derive(Debug)]
pub struct Saved {
    /// In the layout of the disk.
    weight: Tensor,
    bias: Option<Tensor>,
    /// `weight` is `[in, out]`.
    transposed: bool,
    owner: Owner,
}

impl Saved {
    /// A copy of a linear layer.
    pub fn linear(base: &dyn LinearOp) -> Saved {
        let (weight, transposed) = (base.weight(), base.transposed());
        Saved {
            weight: copy(&if transposed { weight.tr() } else { weight }),
            bias: base.bias().map(copy),
            transposed,
            owner: Owner::Here,
        }
    }

    /// A copy of a table, a convolution or a norm.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>) -> Saved {
        Saved {
            weight: copy(weight),
            bias: bias.map(copy),
            transposed: false,
            owner: Owner::Here,
        }
    }

    /// The head over a table that the input embedding trains.
    pub fn tied(table: &Tensor, bias: Option<&Tensor>) -> Saved {
        Saved {
            weight: table.shallow_clone(),
            bias: bias.map(Tensor::shallow_clone),
            transposed: false,
            owner: Owner::Embedding,
        }
    }

    /// The trained weight.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    fn plain(&self) -> Plain {
        Plain {
            weight: match self.transposed {
                true => self.weight.tr(),
                false => self.weight.shallow_clone(),
            },
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
        }
    }
}

impl LinearAdapter for Saved {
    fn forward(&self, x: &Tensor, _: Beneath<'_>, _: Ctx) -> Tensor {
        let Plain { weight, bias } = self.plain();
        peft_torch::linear(x, &weight, bias.as_ref())
    }

    fn merge(&self, _: Plain, _: &dyn LinearOp) -> Option<Plain> {
        Some(self.plain())
    }
}

impl EmbeddingAdapter for Saved {
    fn forward(&self, ids: &Tensor, beneath: BeneathEmbedding<'_>, _: Ctx) -> Tensor {
        beneath.look_up(&self.weight, ids)
    }

    fn merge(&self, _: Tensor, _: &Tensor) -> Option<Tensor> {
        Some(self.weight.shallow_clone())
    }
}

impl ConvAdapter for Saved {
    fn forward(&self, x: &Tensor, beneath: BeneathConv<'_>, _: Ctx) -> Tensor {
        let geometry = beneath.base().geometry();
        geometry.apply(x, &self.weight, self.bias.as_ref())
    }

    fn merge(&self, _: Plain, _: &DenseConv) -> Option<Plain> {
        Some(self.plain())
    }
}

impl NormAdapter for Saved {
    fn affine(&self, _: Affine) -> Affine {
        let Plain { weight, bias } = self.plain();
        Affine { weight, bias }
    }
}

impl Params for Saved {
    fn params(&self, visit: Visit<'_>) {
        if self.owner == Owner::Here {
            visit(WEIGHT, &self.weight);
            if let Some(bias) = &self.bias {
                visit(BIAS, bias);
            }
        }
    }

    fn derived(&self, visit: Visit<'_>) {
        if self.owner == Owner::Embedding {
            visit(WEIGHT, &self.weight);
        }
    }
}

/// A trained bias of a linear layer, a convolution or a norm.
#[derive(Debug)]
pub struct Shift {
    /// b of the base `[out]`; `None`: the layer has no bias.
    base: Option<Tensor>,
    /// b' `[out]` in fp32
    bias: Tensor,
    name: &'static str,
}

impl Shift {
    /// Beginning at the base's bias; `below`: the layer has another adapter too, and Python's names say so.
    pub fn new(base: &Tensor, below: bool) -> Shift {
        Shift {
            base: Some(base.detach()),
            bias: copy(&base.to_kind(Kind::Float)),
            name: if below { BIAS_BELOW } else { BIAS },
        }
    }

    /// A bias of zero for a layer of `out` outputs that has none.
    pub fn added(out: i64, device: Device) -> Shift {
        Shift {
            base: None,
            bias: Tensor::zeros([out], (Kind::Float, device)).set_requires_grad(true),
            name: BIAS,
        }
    }

    /// b' − b in fp32.
    fn shift(&self) -> Tensor {
        match &self.base {
            Some(base) => &self.bias - base,
            None => self.bias.shallow_clone(),
        }
    }

    /// `bias` of what lies beneath, moved; rounded once to the dtype of the layer.
    fn moved(&self, beneath: Option<Tensor>, kind: Kind) -> Option<Tensor> {
        let moved = match beneath {
            Some(bias) => bias + self.shift(),
            None => self.shift(),
        };
        Some(moved.to_kind(kind))
    }
}

impl LinearAdapter for Shift {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _: Ctx) -> Tensor {
        add_row_(beneath.forward(x), &self.shift())
    }

    fn reads_beneath(&self) -> bool {
        false
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        let kind = plain.weight.kind();
        Some(Plain {
            weight: plain.weight,
            bias: self.moved(plain.bias, kind),
        })
    }
}

impl ConvAdapter for Shift {
    fn forward(&self, x: &Tensor, beneath: BeneathConv<'_>, _: Ctx) -> Tensor {
        let mut by_channel = vec![-1];
        by_channel.resize(beneath.base().weight().dim() - 1, 1);
        let y = beneath.forward(x);
        let shift = self.shift().view(by_channel.as_slice());
        (&y + shift).to_kind(y.kind())
    }

    fn merge(&self, plain: Plain, _: &DenseConv) -> Option<Plain> {
        let kind = plain.weight.kind();
        Some(Plain {
            weight: plain.weight,
            bias: self.moved(plain.bias, kind),
        })
    }
}

impl NormAdapter for Shift {
    fn affine(&self, beneath: Affine) -> Affine {
        let kind = beneath.weight.kind();
        Affine {
            weight: beneath.weight,
            bias: self.moved(beneath.bias, kind),
        }
    }
}

impl Params for Shift {
    fn params(&self, visit: Visit<'_>) {
        visit(self.name, &self.bias);
    }
}

/// The names under which [`Shift`] and [`Saved`] keep a bias.
pub const BIASES: [&str; 2] = [BIAS, BIAS_BELOW];

/// Lets the bias of a linear layer or a norm be trained, if it has one; `below`: as in [`Shift::new`].
pub fn train_bias(name: &str, slot: &mut Slot<'_>, below: bool) {
    match slot {
        Slot::Linear(it) => {
            if let Some(shift) = it.base().bias().map(|bias| Shift::new(bias, below)) {
                it.attach(name, Box::new(shift));
            }
        }
        Slot::Norm(it) => {
            if let Some(shift) = it.base().bias.as_ref().map(|bias| Shift::new(bias, below)) {
                it.attach(name, Box::new(shift));
            }
        }
        _ => {}
    }
}

/// Puts a trained copy on a place that `modules_to_save` names. Virtual tokens have none: false.
pub fn save_whole(name: &str, slot: Slot<'_>) -> bool {
    match slot {
        Slot::Linear(it) => {
            let saved = Saved::linear(it.base());
            it.attach(name, Box::new(saved));
        }
        Slot::Embedding(it) => {
            let saved = Saved::new(it.weight(), None);
            it.attach(name, Box::new(saved));
        }
        Slot::Conv(it) => {
            let saved = Saved::new(it.base().weight(), it.base().bias());
            it.attach(name, Box::new(saved));
        }
        Slot::Norm(it) => {
            let saved = Saved::new(&it.base().weight, it.base().bias.as_ref());
            it.attach(name, Box::new(saved));
        }
        Slot::Prompt(_) => return false,
    }
    true
}
