//! Linear layers: how a weight is kept, what methods put on it, and the place itself.
//!
//! y = x Wᵀ + b, and with adapters a₁ … aₙ stacked on it
//! yₖ = aₖ(x, yₖ₋₁): each adapter is given the layer beneath it as a thing
//! that it can run or ask for its dense form, never as a tensor it may change.

use std::fmt;

use serde_json::Value;
use tch::{Device, Kind, Tensor, nn};

use crate::{
    Ctx, Error, Params, Result, Rows,
    stack::{Attached, Stack, finite, place},
    thaw::Leaves,
};

/// A layer in dense form: a linear one, or a convolution with the shape of its weight.
#[derive(Debug)]
pub struct Plain {
    /// `[out, in]`
    pub weight: Tensor,
    /// `[out]`
    pub bias: Option<Tensor>,
}

impl Clone for Plain {
    fn clone(&self) -> Plain {
        Plain {
            weight: self.weight.shallow_clone(),
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// A weight that is not dense, as it lies in a file.
#[derive(Debug)]
pub struct Stored {
    /// Its tensors by their names below the layer (`weight`, `weight.absmax`), without the bias.
    pub tensors: Vec<(&'static str, Tensor)>,
    /// What `quantization_config` in `config.json` says of it; the same for all layers of a model.
    pub config: Value,
}

impl Stored {
    /// What a file holds of the layer called `at`, its bias included.
    pub fn named(&self, at: &str, bias: Option<&Tensor>) -> Vec<(String, Tensor)> {
        let tensors = self.tensors.iter();
        let mut all: Vec<_> = tensors
            .map(|(name, it)| (format!("{at}.{name}"), it.shallow_clone()))
            .collect();
        all.extend(bias.map(|it| (format!("{at}.bias"), it.shallow_clone())));
        all
    }
}

/// How the weight of one linear layer is kept and multiplied. Frozen.
pub trait LinearOp: fmt::Debug + Send {
    /// x: `[.., in] -> [.., out]`, bias included; differentiable in x.
    fn forward(&self, x: &Tensor) -> Tensor;
    /// The same where only the graph of the result counts: its numbers may be anything, so the product can be left out.
    fn unread(&self, x: &Tensor) -> Tensor {
        self.forward(x)
    }
    /// The weight as a dense `[out, in]` tensor, decoded if need be.
    fn weight(&self) -> Tensor;
    /// The bias `[out]`, if the layer has one.
    fn bias(&self) -> Option<&Tensor>;
    /// `(out, in)`
    fn shape(&self) -> (i64, i64);
    /// Where new parameters should live.
    fn device(&self) -> Device;
    /// The weight is kept, and on disk, `[in, out]`: GPT-2's layers.
    fn transposed(&self) -> bool {
        false
    }
    /// The weight is one tensor of numbers, which can be trained as it is.
    fn is_dense(&self) -> bool {
        false
    }
    /// What a file holds in place of a dense weight; `None`: the weight itself.
    fn stored(&self) -> Option<Stored> {
        None
    }
    /// A layer kept in the same way with another content; encodes it again if need be.
    fn encode(&self, plain: Plain) -> Result<Box<dyn LinearOp>>;
    /// The same weight with another bias. A weight that is not dense must not be encoded again for it.
    fn with_bias(&self, bias: Option<Tensor>) -> Result<Box<dyn LinearOp>> {
        let weight = self.weight();
        self.encode(Plain { weight, bias })
    }
}

/// What one method leaves on one linear layer.
pub trait LinearAdapter: Params + fmt::Debug + Send {
    /// x: `[.., in] -> [.., out]` with this adapter at work.
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor;
    /// Whether its gradients need the numbers that [`Beneath::forward`] gave, as those of a factor on them do and those of
    /// something added to them do not.
    fn reads_beneath(&self) -> bool {
        true
    }
    /// The layer with this adapter baked in, or `None` if the method has no such form.
    ///
    /// `plain` has the adapters beneath in it already; `base` has none.
    fn merge(&self, plain: Plain, base: &dyn LinearOp) -> Option<Plain>;
}

/// The layer without its topmost adapter: dense, quantised or already adapted.
#[derive(Clone, Copy)]
pub struct Beneath<'a> {
    base: &'a dyn LinearOp,
    adapters: &'a [Attached<dyn LinearAdapter>],
    ctx: Ctx<'a>,
    /// Of all adapters only those of this name are at work.
    only: Option<&'a str>,
    /// An input for which the base has given its output already.
    ready: Option<(&'a Tensor, &'a Tensor)>,
    /// Only the graph of the base's output counts.
    unread: bool,
}

impl<'a> Beneath<'a> {
    /// The layer without any adapter.
    pub fn base(self) -> &'a dyn LinearOp {
        self.base
    }

    /// x: `[.., in] -> [.., out]`. The result is fresh memory: the caller may add to it in place.
    pub fn forward(self, x: &Tensor) -> Tensor {
        let Some((top, rest)) = self.adapters.split_last() else {
            return self.of_base(x);
        };
        let beneath = Beneath {
            adapters: rest,
            ..self
        };
        if top.works(self.only) {
            top.adapter.forward(x, beneath, self.ctx)
        } else {
            beneath.forward(x)
        }
    }

    /// Each row of a mixed batch through its own adapter, the base once over all of them; x: `[rows, .., in]`.
    fn by_rows(self, x: &Tensor, rows: &Rows) -> Tensor {
        let y = self.base.forward(x);
        rows.apply([x, &y], |name, [x, y]| {
            let has = |name: &str| self.adapters.iter().any(|it| it.name == name);
            match name.filter(|name| has(name)) {
                None => y,
                Some(name) => {
                    let alone = Beneath {
                        ctx: Ctx {
                            rows: None,
                            ..self.ctx
                        },
                        only: Some(name),
                        ready: Some((&x, &y)),
                        ..self
                    };
                    alone.forward(&x)
                }
            }
        })
    }

    fn of_base(self, x: &Tensor) -> Tensor {
        match self.ready {
            Some((input, output))
                if input.data_ptr() == x.data_ptr() && input.size() == x.size() =>
            {
                output.copy()
            }
            _ if self.unread => self.base.unread(x),
            _ => self.base.forward(x),
        }
    }

    /// In dense form, with the active adapters beneath where they have a weight form.
    pub fn plain(self) -> Plain {
        let active = self.adapters.iter().filter(|it| it.works(self.only));
        active.fold(plain(self.base), |p, it| {
            it.adapter.merge(p.clone(), self.base).unwrap_or(p)
        })
    }

    /// The bias of the layer, as the active adapters beneath leave it.
    pub fn bias(self) -> Option<Tensor> {
        if self.adapters.iter().any(|it| it.works(self.only)) {
            self.plain().bias
        } else {
            self.base.bias().map(Tensor::shallow_clone)
        }
    }
}

/// A dense weight, in the dtype of the model.
///
/// The tensor is `[out, in]` with any strides: GPT-2's layers, kept `[in, out]`, are a transposed view.
#[derive(Debug)]
pub struct Dense {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Dense {
    /// A frozen layer; weight: `[out, in]`, bias: `[out]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Dense {
        Dense { weight, bias }
    }
}

impl LinearOp for Dense {
    fn forward(&self, x: &Tensor) -> Tensor {
        peft_torch::linear(x, &self.weight, self.bias.as_ref())
    }
    fn unread(&self, x: &Tensor) -> Tensor {
        peft_torch::linear_unread(x, &self.weight, self.bias.as_ref())
    }
    fn weight(&self) -> Tensor {
        self.weight.shallow_clone()
    }
    fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
    fn shape(&self) -> (i64, i64) {
        let size = self.weight.size();
        (size[0], size[1])
    }
    fn device(&self) -> Device {
        self.weight.device()
    }
    fn transposed(&self) -> bool {
        !self.weight.is_contiguous()
    }
    fn is_dense(&self) -> bool {
        true
    }
    fn encode(&self, plain: Plain) -> Result<Box<dyn LinearOp>> {
        // Keep the strides of the old weight: a transposed layer stays one.
        let weight = match self.transposed() {
            false => plain.weight.detach().contiguous(),
            true => plain.weight.detach().tr().contiguous().tr(),
        };
        let bias = plain.bias.map(|b| b.detach());
        Ok(Box::new(Dense { weight, bias }))
    }
}

/// A named place in a model. For a linear layer, models hold this and nothing else.
#[derive(Debug)]
pub struct Linear {
    base: Box<dyn LinearOp>,
    /// What `base` was before it was merged into.
    original: Option<Box<dyn LinearOp>>,
    adapters: Stack<dyn LinearAdapter>,
}

impl Linear {
    /// A layer without adapters.
    pub fn new(base: impl LinearOp + 'static) -> Linear {
        Linear::boxed(Box::new(base))
    }

    /// The same from a boxed base.
    pub fn boxed(base: Box<dyn LinearOp>) -> Linear {
        Linear {
            base,
            original: None,
            adapters: Stack::new(),
        }
    }

    /// x: `[.., in] -> [.., out]` through the base and every active adapter.
    pub fn forward(&self, x: &Tensor, ctx: Ctx) -> Tensor {
        self.run(x, ctx, false)
    }

    /// The same for the last layer of a block that adds it to something: where the block is computed again for its gradients
    /// ([`Ctx::again`]), the product of the base is left out unless an adapter needs it.
    pub fn forward_last(&self, x: &Tensor, ctx: Ctx) -> Tensor {
        let reads = self.adapters.active().any(|it| it.reads_beneath());
        self.run(x, ctx, ctx.again && !reads)
    }

    fn run(&self, x: &Tensor, ctx: Ctx, unread: bool) -> Tensor {
        // Merged adapters are in the base already.
        let adapters = match self.original {
            Some(_) => &[],
            None => self.adapters.all(),
        };
        let whole = Beneath {
            base: &*self.base,
            adapters,
            ctx,
            only: None,
            ready: None,
            unread,
        };
        match ctx.rows {
            None => whole.forward(x),
            Some(_) if adapters.is_empty() => self.base.forward(x),
            Some(rows) => whole.by_rows(x, rows),
        }
    }

    /// The frozen base; after a merge, the merged one.
    pub fn base(&self) -> &dyn LinearOp {
        &*self.base
    }

    /// Whether an adapter is at work here that is not merged into the base.
    pub fn is_adapted(&self) -> bool {
        self.original.is_none() && self.adapters.active().next().is_some()
    }

    /// Whether a backward pass gives gradients to something in here.
    pub fn is_trained(&self) -> bool {
        self.is_adapted() || self.base.is_dense() && self.base.weight().requires_grad()
    }

    /// Puts an adapter on top.
    pub fn attach(&mut self, name: &str, adapter: Box<dyn LinearAdapter>) {
        self.adapters.push(name, adapter);
    }

    /// Keeps another weight in the way of the base.
    pub fn encode(&mut self, plain: Plain) -> Result<()> {
        self.base = self.base.encode(plain)?;
        Ok(())
    }

    /// Makes the base dense, where it is not: the weight as it is decoded.
    pub fn decode(&mut self) {
        if self.base.is_dense() {
            return;
        }
        let Plain { weight, bias } = plain(&*self.base);
        let weight = match self.base.transposed() {
            false => weight,
            true => weight.tr().contiguous().tr(),
        };
        self.base = Box::new(Dense::new(weight, bias));
    }

    /// Trainable copies in place of the base's tensors; the base must be dense.
    pub(crate) fn thaw(&mut self, leaves: &mut Leaves) {
        let Plain { weight, bias } = plain(&*self.base);
        let bias = bias.map(|it| leaves.take("bias", &it));
        self.base = Box::new(Dense::new(leaves.take("weight", &weight), bias));
    }

    /// The adapters of one name, innermost first.
    pub fn adapters(&self, name: &str) -> impl Iterator<Item = &dyn LinearAdapter> {
        let all = self.adapters.all().iter();
        all.filter(move |it| it.name == name).map(|it| &*it.adapter)
    }

    /// The base with every active adapter in it.
    fn baked(&self, at: &str) -> Result<Box<dyn LinearOp>> {
        let not = |why: &str| Error::NotMergeable {
            at: at.to_owned(),
            why: why.to_owned(),
        };
        let start = plain(&*self.base);
        let weight = start.weight.data_ptr();
        let merged = self.adapters.active();
        let merged = tch::no_grad(|| {
            merged
                .into_iter()
                .try_fold(start, |p, it| it.merge(p, &*self.base))
        })
        .ok_or_else(|| not("the method has no form as a weight here"))?;
        if !finite(&merged.weight) || !merged.bias.as_ref().is_none_or(finite) {
            return Err(not("the merged weight is not finite"));
        }
        match merged.weight.data_ptr() == weight {
            true => self.base.with_bias(merged.bias),
            false => self.base.encode(merged),
        }
    }
}

place!(Linear);

/// A layer of `tch`, frozen.
impl From<nn::Linear> for Linear {
    fn from(layer: nn::Linear) -> Linear {
        let bias = layer.bs.map(|it| it.detach());
        Linear::new(Dense::new(layer.ws.detach(), bias))
    }
}

fn plain(op: &dyn LinearOp) -> Plain {
    Plain {
        weight: op.weight(),
        bias: op.bias().map(Tensor::shallow_clone),
    }
}

/// Where a model gets its layers while it is being built.
pub trait Weights {
    /// A tensor in the dtype of the model, checked against `shape`.
    fn tensor(&mut self, key: &str, shape: &[i64]) -> Result<Tensor>;

    /// A tensor as the source has it, of whatever type and shape: what layers that are not dense are kept in.
    fn stored(&mut self, key: &str) -> Result<Tensor>;

    /// The dtype of the model, if tensors are converted to one.
    fn kind(&self) -> Option<Kind>;

    /// Whether the source has this tensor.
    fn has(&self, key: &str) -> bool;

    /// The linear layer called `at` with a weight `[out, in]`, and a bias if wanted.
    fn linear(&mut self, at: &str, (out, inp): (i64, i64), bias: bool) -> Result<Linear> {
        let weight = self.tensor(&format!("{at}.weight"), &[out, inp])?;
        let bias = bias.then(|| self.tensor(&format!("{at}.bias"), &[out]));
        Ok(Linear::new(Dense::new(weight, bias.transpose()?)))
    }

    /// The same for a layer kept `[in, out]`, as GPT-2 keeps them; `shape` is `(out, in)` still.
    fn linear_transposed(&mut self, at: &str, (out, inp): (i64, i64)) -> Result<Linear> {
        let weight = self.tensor(&format!("{at}.weight"), &[inp, out])?;
        let bias = self.tensor(&format!("{at}.bias"), &[out])?;
        Ok(Linear::new(Dense::new(weight.tr(), Some(bias))))
    }
}

/// How the layers of a source become layers of a model: dense, or in fewer bits.
///
/// It stands between a source and a model that know nothing of it. A layer is encoded as soon as it is read, so
/// the dense model never exists whole.
pub trait BaseFormat: fmt::Debug {
    /// Checks that a model with this `config.json` can be read in this format.
    fn check(&self, config: &Value) -> Result<()>;
    /// The same source, whose linear layers are kept in this format.
    fn over<'a>(&'a self, weights: &'a mut dyn Weights) -> Box<dyn Weights + 'a>;
}

/// Dense, as the source has it.
#[derive(Debug, Clone, Copy)]
pub struct AsStored;

impl BaseFormat for AsStored {
    fn check(&self, config: &Value) -> Result<()> {
        match config.get("quantization_config") {
            None | Some(Value::Null) => Ok(()),
            Some(value) => Err(Error::Unsupported {
                peft_type: "model".into(),
                key: "quantization_config".into(),
                value: Box::new(value.get("quant_method").unwrap_or(value).clone()),
                hint: ": here the weights are dense, `peft-quant` reads others".into(),
            }),
        }
    }

    fn over<'a>(&'a self, weights: &'a mut dyn Weights) -> Box<dyn Weights + 'a> {
        Box::new(weights)
    }
}

impl Weights for &mut dyn Weights {
    fn tensor(&mut self, key: &str, shape: &[i64]) -> Result<Tensor> {
        (**self).tensor(key, shape)
    }
    fn stored(&mut self, key: &str) -> Result<Tensor> {
        (**self).stored(key)
    }
    fn kind(&self) -> Option<Kind> {
        (**self).kind()
    }
    fn has(&self, key: &str) -> bool {
        (**self).has(key)
    }
    fn linear(&mut self, at: &str, shape: (i64, i64), bias: bool) -> Result<Linear> {
        (**self).linear(at, shape, bias)
    }
    fn linear_transposed(&mut self, at: &str, shape: (i64, i64)) -> Result<Linear> {
        (**self).linear_transposed(at, shape)
    }
}
