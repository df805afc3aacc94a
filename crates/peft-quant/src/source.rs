//! A source of weights whose linear layers are kept in few bits.

use peft_core::{BaseFormat, Dense, Error, Linear, Result, Weights};
use peft_torch::memory;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    config::Format,
    eight::EightBits,
    four::FourBits,
    layer::{Code, QuantisedLinear},
};

/// The layers of a source: those that it keeps in few bits as they are, others encoded while they are read.
pub struct Quantised<'a> {
    weights: &'a mut dyn Weights,
    format: &'a Format,
}

impl<'a> Quantised<'a> {
    /// `weights` through `format`.
    pub fn new(weights: &'a mut dyn Weights, format: &'a Format) -> Quantised<'a> {
        Quantised { weights, format }
    }

    /// What the source keeps in few bits under this name.
    fn kept(&mut self, at: &str, shape: &[i64]) -> Result<Option<Code>> {
        let has = |name: &str| self.weights.has(&format!("{at}.{name}"));
        let state = |kind: &str| format!("weight.quant_state.bitsandbytes__{kind}");
        let fours: Vec<&str> = ["nf4", "fp4"]
            .into_iter()
            .filter(|kind| has(&state(kind)))
            .collect();
        let (four, eight) = (fours.first().copied(), has("SCB"));
        if fours.len() + usize::from(eight) > 1 {
            let mut found: Vec<String> = fours.iter().map(|kind| state(kind)).collect();
            found.extend(eight.then(|| "SCB".into()));
            return Err(fault(at, format!("has both `{}`", found.join("` and `"))));
        }
        if four.is_none()
            && let Some(of) = IN_4_BITS.into_iter().find(|it| has(it))
        {
            let missing = [state("nf4"), state("fp4")].join("` or `");
            let reason = format!("has `{of}`, which belongs to 4 bits, and no `{missing}`");
            return Err(fault(at, reason));
        }
        if !eight && has(IN_8_BITS) {
            let reason = format!("has `{IN_8_BITS}`, which belongs to 8 bits, and no `SCB`");
            return Err(fault(at, reason));
        }
        let mut get = |name: &str| self.weights.stored(&format!("{at}.{name}"));
        Ok(match four {
            Some(kind) => Some(Code::Four(FourBits::read(
                at,
                kind,
                shape,
                self.format.compat,
                &mut get,
            )?)),
            None if eight => Some(Code::Eight(EightBits::read(at, shape, &mut get)?)),
            None => None,
        })
    }

    /// The layer from `kept`, or from a dense weight that `dense` reads as `[out, in]`.
    fn layer(
        &mut self,
        at: &str,
        (out, inp): (i64, i64),
        transposed: bool,
        bias: bool,
        dense: &dyn Fn(&mut dyn Weights) -> Result<Tensor>,
    ) -> Result<Linear> {
        let kept = self.kept(at, &[out, inp])?;
        let weight = match kept {
            Some(_) => None,
            None => Some(dense(self.weights)?),
        };
        let bias = bias.then(|| self.weights.tensor(&format!("{at}.bias"), &[out]));
        let bias = bias.transpose()?;
        let code = match (kept, weight, &self.format.scheme) {
            (Some(code), ..) => code,
            (None, Some(weight), Some(scheme)) if !self.format.keeps_dense(at) => {
                if !is_finite(&weight) {
                    let reason =
                        "has a weight that is infinite or no number, of which a code keeps nothing";
                    return Err(fault(at, reason.into()));
                }
                let code = Code::encode(scheme, &weight)?;
                drop(weight);
                memory::give_back_growth();
                code
            }
            (None, Some(weight), _) => return Ok(Linear::new(Dense::new(weight, bias))),
            (None, None, _) => unreachable!("one of the two was read"),
        };
        let kind = self.weights.kind().unwrap_or(code.kind());
        let compute = self.format.compute;
        let layer = QuantisedLinear::of(code, bias, kind, compute, transposed);
        Ok(Linear::new(layer))
    }
}

/// What files have beside a weight in 4 bits and its state, and beside one in 8 bits and its scales.
const IN_4_BITS: [&str; 4] = [
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
];
const IN_8_BITS: &str = "weight_format";

/// In one pass, without memory of its own; NaN is both the least and the most.
fn is_finite(weight: &Tensor) -> bool {
    if weight.numel() == 0 {
        return true;
    }
    let (least, most) = weight.aminmax(None, false);
    [least, most]
        .iter()
        .all(|it| it.double_value(&[]).is_finite())
}

fn fault(at: &str, reason: String) -> Error {
    Error::Config {
        peft_type: "quantization".into(),
        reason: format!("`{at}` {reason}"),
    }
}

impl Weights for Quantised<'_> {
    fn tensor(&mut self, key: &str, shape: &[i64]) -> Result<Tensor> {
        self.weights.tensor(key, shape)
    }

    fn stored(&mut self, key: &str) -> Result<Tensor> {
        self.weights.stored(key)
    }

    fn kind(&self) -> Option<Kind> {
        self.weights.kind()
    }

    fn has(&self, key: &str) -> bool {
        self.weights.has(key)
    }

    fn linear(&mut self, at: &str, (out, inp): (i64, i64), bias: bool) -> Result<Linear> {
        self.layer(at, (out, inp), false, bias, &|weights| {
            weights.tensor(&format!("{at}.weight"), &[out, inp])
        })
    }

    fn linear_transposed(&mut self, at: &str, (out, inp): (i64, i64)) -> Result<Linear> {
        self.layer(at, (out, inp), true, true, &|weights| {
            Ok(weights.tensor(&format!("{at}.weight"), &[inp, out])?.tr())
        })
    }
}

/// Every layer dense: those that the source keeps in few bits are decoded while they are read.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded(Format);

impl Decoded {
    /// Of a source in few bits.
    pub fn new() -> Decoded {
        Decoded(Format::as_stored())
    }
}

impl Default for Decoded {
    fn default() -> Decoded {
        Decoded::new()
    }
}

impl BaseFormat for Decoded {
    fn check(&self, config: &Value) -> Result<()> {
        self.0.check(config)
    }

    fn over<'a>(&'a self, weights: &'a mut dyn Weights) -> Box<dyn Weights + 'a> {
        Box::new(Dequantised(Quantised::new(weights, &self.0)))
    }
}

struct Dequantised<'a>(Quantised<'a>);

impl Weights for Dequantised<'_> {
    fn tensor(&mut self, key: &str, shape: &[i64]) -> Result<Tensor> {
        self.0.tensor(key, shape)
    }

    fn stored(&mut self, key: &str) -> Result<Tensor> {
        self.0.stored(key)
    }

    fn kind(&self) -> Option<Kind> {
        self.0.kind()
    }

    fn has(&self, key: &str) -> bool {
        self.0.has(key)
    }

    fn linear(&mut self, at: &str, shape: (i64, i64), bias: bool) -> Result<Linear> {
        let mut layer = self.0.linear(at, shape, bias)?;
        layer.decode();
        Ok(layer)
    }

    fn linear_transposed(&mut self, at: &str, shape: (i64, i64)) -> Result<Linear> {
        let mut layer = self.0.linear_transposed(at, shape)?;
        layer.decode();
        Ok(layer)
    }
}
