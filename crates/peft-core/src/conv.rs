//! Convolutions over one, two or three dimensions: the layer, what methods put on it, and the place itself.
//!
//! ```text
//! y[o, p] = b[o] + Σ W[o, i, q] · x[i, stride·p + dilation·q − padding]      sum over i of o's group, and over q
//! ```
//!
//! One type for all three: they differ in the number of axes after the channels and in nothing else, and a method that
//! treats them alike (all do) should not be written three times. As with [`Linear`](crate::Linear) an adapter gets
//! the layer beneath it as a thing that it can run or ask for its dense form.

use std::fmt;

use tch::{Device, Tensor, nn};

use crate::{
    Ctx, Error, Params, Plain, Result, Rows,
    stack::{Attached, Stack, finite, place},
    thaw::Leaves,
};

/// How the kernel of a convolution moves over its input; one number for each axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Steps of the kernel.
    pub stride: Vec<i64>,
    /// Zeros put around the input, on both sides.
    pub padding: Vec<i64>,
    /// Distance of the kernel's points.
    pub dilation: Vec<i64>,
    /// Channels in this many groups that do not see each other.
    pub groups: i64,
}

impl Geometry {
    /// Every point of the input, no padding, one group; over `axes` axes.
    pub fn plain(axes: usize) -> Geometry {
        Geometry {
            stride: vec![1; axes],
            padding: vec![0; axes],
            dilation: vec![1; axes],
            groups: 1,
        }
    }

    /// x: `[batch, in, …] -> [batch, out, …]` with a weight `[out, in / groups, kernel…]` and a bias `[out]`.
    ///
    /// A batch of one may leave its axis out.
    pub fn apply(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let Geometry {
            stride,
            padding,
            dilation,
            groups,
        } = self;
        let (stride, padding, dilation) =
            (stride.as_slice(), padding.as_slice(), dilation.as_slice());
        match stride.len() {
            1 => x.conv1d(weight, bias, stride, padding, dilation, *groups),
            2 => x.conv2d(weight, bias, stride, padding, dilation, *groups),
            _ => x.conv3d(weight, bias, stride, padding, dilation, *groups),
        }
    }

    /// What does not go together, for a weight of this size.
    fn fault(&self, weight: &[i64], bias: Option<&Tensor>) -> Option<String> {
        let axes = weight.len().saturating_sub(2);
        if !(1..=3).contains(&axes) {
            return Some(format!(
                "a weight {weight:?} has {axes} axes beside its channels; there can be 1 to 3"
            ));
        }
        for (name, values, least) in [
            ("stride", &self.stride, 1),
            ("padding", &self.padding, 0),
            ("dilation", &self.dilation, 1),
        ] {
            if values.len() != axes || values.iter().any(|it| *it < least) {
                return Some(format!(
                    "{name} {values:?} wants {axes} numbers from {least} on"
                ));
            }
        }
        let (out, groups) = (weight[0], self.groups);
        if groups < 1 || out % groups != 0 {
            return Some(format!("{out} channels do not part into {groups} groups"));
        }
        let size = bias.map(Tensor::size)?;
        (size != [out]).then(|| format!("a bias {size:?} for {out} channels"))
    }
}

/// A frozen convolution.
#[derive(Debug)]
pub struct DenseConv {
    plain: Plain,
    geometry: Geometry,
}

impl DenseConv {
    /// x: `[batch, in, …] -> [batch, out, …]`, bias included; differentiable in x.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let Plain { weight, bias } = &self.plain;
        self.geometry.apply(x, weight, bias.as_ref())
    }

    /// `[out, in / groups, kernel…]`
    pub fn weight(&self) -> &Tensor {
        &self.plain.weight
    }

    /// `[out]`
    pub fn bias(&self) -> Option<&Tensor> {
        self.plain.bias.as_ref()
    }

    /// How the kernel moves.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// `(out, in)`: channels, of the input those of all groups.
    pub fn channels(&self) -> (i64, i64) {
        let size = self.plain.weight.size();
        (size[0], size[1] * self.geometry.groups)
    }

    /// Where new parameters should live.
    pub fn device(&self) -> Device {
        self.plain.weight.device()
    }
}

/// What one method leaves on one convolution.
pub trait ConvAdapter: Params + fmt::Debug + Send {
    /// x: `[batch, in, …] -> [batch, out, …]` with this adapter at work.
    fn forward(&self, x: &Tensor, beneath: BeneathConv<'_>, ctx: Ctx) -> Tensor;
    /// The layer with this adapter baked in, or `None` if the method has no such form here.
    ///
    /// `plain` (weight `[out, in / groups, kernel…]`) has the adapters beneath in it already; `base` has none.
    fn merge(&self, plain: Plain, base: &DenseConv) -> Option<Plain>;
}

/// The convolution without its topmost adapter.
#[derive(Clone, Copy)]
pub struct BeneathConv<'a> {
    base: &'a DenseConv,
    adapters: &'a [Attached<dyn ConvAdapter>],
    ctx: Ctx<'a>,
    /// Of all adapters only those of this name are at work.
    only: Option<&'a str>,
    /// An input for which the base has given its output already.
    ready: Option<(&'a Tensor, &'a Tensor)>,
}

impl<'a> BeneathConv<'a> {
    /// The layer without any adapter.
    pub fn base(self) -> &'a DenseConv {
        self.base
    }

    /// x: `[batch, in, …] -> [batch, out, …]`. The result is fresh memory: the caller may add to it in place.
    pub fn forward(self, x: &Tensor) -> Tensor {
        let Some((top, rest)) = self.adapters.split_last() else {
            return self.of_base(x);
        };
        let beneath = BeneathConv {
            adapters: rest,
            ..self
        };
        if top.works(self.only) {
            top.adapter.forward(x, beneath, self.ctx)
        } else {
            beneath.forward(x)
        }
    }

    /// Each row of a mixed batch through its own adapter, the base once over all of them; x: `[rows, in, …]`.
    fn by_rows(self, x: &Tensor, rows: &Rows) -> Tensor {
        let y = self.base.forward(x);
        rows.apply([x, &y], |name, [x, y]| {
            let has = |name: &str| self.adapters.iter().any(|it| it.name == name);
            match name.filter(|name| has(name)) {
                None => y,
                Some(name) => {
                    let alone = BeneathConv {
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
            _ => self.base.forward(x),
        }
    }

    /// In dense form, with the active adapters beneath where they have a weight form.
    pub fn plain(self) -> Plain {
        let active = self.adapters.iter().filter(|it| it.works(self.only));
        active.fold(self.base.plain.clone(), |p, it| {
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

/// A named convolution in a model, over one, two or three axes.
///
/// ```
/// # use peft_core::*;
/// # use tch::{Tensor, Kind, Device};
/// let weight = Tensor::randn([8, 3, 5, 5], (Kind::Float, Device::Cpu));
/// let geometry = Geometry { stride: vec![2, 2], padding: vec![2, 2], ..Geometry::plain(2) };
/// let conv = Conv::new(weight, None, geometry)?;
/// let y = conv.forward(&Tensor::randn([4, 3, 16, 16], (Kind::Float, Device::Cpu)), Ctx::EVAL);
/// assert_eq!(y.size(), [4, 8, 8, 8]);
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug)]
pub struct Conv {
    base: DenseConv,
    /// What `base` was before it was merged into.
    original: Option<DenseConv>,
    adapters: Stack<dyn ConvAdapter>,
}

impl Conv {
    /// A frozen convolution without adapters; weight: `[out, in / groups, kernel…]`, bias: `[out]`.
    ///
    /// The number of axes is that of the weight. An error where weight, bias and geometry do not go together.
    pub fn new(weight: Tensor, bias: Option<Tensor>, geometry: Geometry) -> Result<Conv> {
        if let Some(reason) = geometry.fault(&weight.size(), bias.as_ref()) {
            return Err(Error::Geometry(reason));
        }
        let plain = Plain {
            weight: weight.detach(),
            bias: bias.map(|it| it.detach()),
        };
        Ok(Conv {
            base: DenseConv { plain, geometry },
            original: None,
            adapters: Stack::new(),
        })
    }

    /// A layer of `tch`, frozen, with the configuration that it was made with (`tch` does not tell it again).
    ///
    /// ```
    /// # use peft_core::*;
    /// # use tch::{nn, Device};
    /// let vs = nn::VarStore::new(Device::Cpu);
    /// let config = nn::ConvConfig { stride: 2, padding: 1, ..Default::default() };
    /// let conv = Conv::of(nn::conv2d(vs.root(), 3, 8, 3, config), &config)?;
    /// assert_eq!(conv.base().geometry().stride, [2, 2]);
    /// # Ok::<(), Error>(())
    /// ```
    pub fn of<ND, C: Axes>(layer: nn::Conv<ND>, config: &nn::ConvConfigND<C>) -> Result<Conv> {
        if !matches!(config.padding_mode, nn::PaddingMode::Zeros) {
            return Err(Error::Geometry(format!(
                "padding mode {:?}; a place for adapters pads with zeros, pad in front of it instead",
                config.padding_mode
            )));
        }
        let axes = layer.ws.dim().saturating_sub(2);
        let geometry = Geometry {
            stride: config.stride.each(axes),
            padding: config.padding.each(axes),
            dilation: config.dilation.each(axes),
            groups: config.groups,
        };
        Conv::new(layer.ws, layer.bs, geometry)
    }

    /// x: `[batch, in, …] -> [batch, out, …]` through the base and every active adapter.
    pub fn forward(&self, x: &Tensor, ctx: Ctx) -> Tensor {
        // Merged adapters are in the base already.
        let adapters = match self.original {
            Some(_) => &[],
            None => self.adapters.all(),
        };
        let whole = BeneathConv {
            base: &self.base,
            adapters,
            ctx,
            only: None,
            ready: None,
        };
        match ctx.rows {
            None => whole.forward(x),
            Some(_) if adapters.is_empty() => self.base.forward(x),
            Some(rows) => whole.by_rows(x, rows),
        }
    }

    /// The frozen layer; after a merge, the merged one.
    pub fn base(&self) -> &DenseConv {
        &self.base
    }

    /// Puts an adapter on top.
    pub fn attach(&mut self, name: &str, adapter: Box<dyn ConvAdapter>) {
        self.adapters.push(name, adapter);
    }

    /// The adapters of one name, innermost first.
    pub fn adapters(&self, name: &str) -> impl Iterator<Item = &dyn ConvAdapter> {
        let all = self.adapters.all().iter();
        all.filter(move |it| it.name == name).map(|it| &*it.adapter)
    }

    pub(crate) fn thaw(&mut self, leaves: &mut Leaves) {
        let Plain { weight, bias } = &self.base.plain;
        self.base.plain = Plain {
            weight: leaves.take("weight", weight),
            bias: bias.as_ref().map(|it| leaves.take("bias", it)),
        };
    }

    /// The base with every active adapter in it.
    fn baked(&self, at: &str) -> Result<DenseConv> {
        let not = |why: &str| Error::NotMergeable {
            at: at.to_owned(),
            why: why.to_owned(),
        };
        let start = self.base.plain.clone();
        let active = self.adapters.active();
        let merged = tch::no_grad(|| {
            active
                .into_iter()
                .try_fold(start, |p, it| it.merge(p, &self.base))
        })
        .ok_or_else(|| match self.base.geometry.groups {
            1 => not("the method has no form as a weight here"),
            groups => not(&format!(
                "what the method adds has no form as a weight of {groups} groups"
            )),
        })?;
        if !finite(&merged.weight) || !merged.bias.as_ref().is_none_or(finite) {
            return Err(not("the merged weight is not finite"));
        }
        let plain = Plain {
            weight: merged.weight.detach().contiguous(),
            bias: merged.bias.map(|it| it.detach()),
        };
        let geometry = self.base.geometry.clone();
        Ok(DenseConv { plain, geometry })
    }
}

place!(Conv);

/// A setting of a convolution of `tch`: one number for all axes, or one for each.
pub trait Axes: fmt::Debug {
    /// One number for each of `axes` axes.
    fn each(&self, axes: usize) -> Vec<i64>;
}

impl Axes for i64 {
    fn each(&self, axes: usize) -> Vec<i64> {
        vec![*self; axes]
    }
}

impl<const N: usize> Axes for [i64; N] {
    fn each(&self, _: usize) -> Vec<i64> {
        self.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn refused(size: &[i64], bias: Option<i64>, geometry: Geometry, words: &str) {
        let bias = bias.map(|n| Tensor::zeros([n], CPU));
        let result = Conv::new(Tensor::zeros(size, CPU), bias, geometry);
        let message = result.expect_err("accepted").to_string();
        assert!(message.contains(words), "`{message}` lacks `{words}`");
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let plain = Geometry::plain;
        refused(&[4, 3], None, plain(1), "[4, 3]");
        refused(&[4, 3, 1, 1, 1, 1], None, plain(4), "4 axes");
        refused(&[4, 3, 3, 3], None, plain(1), "stride [1] wants 2");
        let still = Geometry {
            stride: vec![0],
            ..plain(1)
        };
        refused(&[4, 3, 3], None, still, "stride [0]");
        let groups = Geometry {
            groups: 3,
            ..plain(1)
        };
        refused(&[4, 3, 3], None, groups, "3 groups");
        refused(&[4, 3, 3], Some(5), plain(1), "bias [5] for 4");
    }

    #[test]
    fn layers_of_tch_compute_what_they_did() {
        use nn::Module;
        let vs = nn::VarStore::new(Device::Cpu);
        let config = nn::ConvConfig {
            stride: 2,
            padding: 1,
            dilation: 2,
            groups: 2,
            ..Default::default()
        };
        let layer = || nn::conv2d(vs.root(), 4, 6, 3, config);
        let x = Tensor::randn([2, 4, 9, 8], CPU);
        let (first, again) = (layer(), layer());
        let y = first.forward(&x);
        let conv = Conv::of(first, &config).expect("they fit");
        assert!(conv.forward(&x, Ctx::EVAL).equal(&y));
        assert!(!conv.base().weight().requires_grad());
        let circular = nn::ConvConfig {
            padding_mode: nn::PaddingMode::Circular,
            ..config
        };
        let error = Conv::of(again, &circular).expect_err("accepted");
        assert!(error.to_string().contains("Circular"), "{error}");
    }
}
