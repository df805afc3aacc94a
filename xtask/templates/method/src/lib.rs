//! Scale: one learned factor for each output of a linear layer.
//!
//! y = s ⊙ (W x + b)    with s ∈ ℝᵒᵘᵗ, and s = 1 at the start
//!
//! This is the smallest method that is a whole one, written by `cargo xtask new-method` to be changed: it
//! starts as the identity, learns, merges into the weight, is saved and read back. Replace the mathematics
//! in [`Scale`] and the settings in [`ScaleConfig`]; the conformance suite in `tests/` says when the laws hold.

use peft_core::{
    Beneath, Common, Config, Ctx, Error, Injection, LinearAdapter, LinearOp, Names, Outline, Params,
    Plain, Result, Site, SiteKind, Slot, Tuner, Unmodelled, Visit,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// The settings, as `adapter_config.json` holds them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ScaleConfig {
    /// Where to act: suffixes of names, one regular expression, or `all-linear`.
    pub target_modules: Option<Names>,
    /// The keys that every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// Keys that this method does not read, kept for saving.
    #[serde(flatten)]
    pub unmodelled: Unmodelled,
}

impl ScaleConfig {
    /// The method on the layers whose names end so.
    pub fn on<const N: usize>(targets: [&str; N]) -> ScaleConfig {
        ScaleConfig {
            target_modules: Some(targets.into()),
            ..ScaleConfig::default()
        }
    }

    fn targets(&self) -> Result<&Names> {
        let missing = || {
            Error::Config {
            peft_type: Self::PEFT_TYPE.to_owned(),
            reason: "`target_modules` is not set; give names such as [\"q_proj\", \"v_proj\"], or \"all-linear\"".to_owned(),
        }
        };
        self.target_modules.as_ref().ok_or_else(missing)
    }
}

impl Config for ScaleConfig {
    const PEFT_TYPE: &'static str = "SCALE";

    fn unmodelled(&self) -> &Unmodelled {
        &self.unmodelled
    }
}

impl Tuner for ScaleConfig {
    fn peft_type(&self) -> &'static str {
        Self::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        let target_modules = Some(self.targets()?.expand(outline));
        Ok(Box::new(ScaleConfig {
            target_modules,
            ..self.clone()
        }))
    }

    fn wants(&self, site: &Site, _outline: &Outline) -> Result<bool> {
        Ok(self.targets()?.matches(&site.at)? && site.kind == SiteKind::Linear)
    }

    fn attach(&self, at: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let Slot::Linear(layer) = slot else {
            let reason = format!("`{at}` is not a linear layer");
            return Err(Error::Config {
                peft_type: Self::PEFT_TYPE.to_owned(),
                reason,
            });
        };
        let (out, _) = layer.base().shape();
        let adapter = Scale::new(out, layer.base().device());
        layer.attach(injection.name, Box::new(adapter));
        Ok(())
    }

    fn to_json(&self) -> Value {
        let mut json = json!(self);
        json["peft_type"] = Self::PEFT_TYPE.into();
        json
    }
}

/// What the method leaves on one linear layer.
#[derive(Debug)]
pub struct Scale {
    /// `[out]`, in fp32 whatever the base is in.
    s: Tensor,
}

impl Scale {
    /// The identity on a layer with `out` outputs.
    pub fn new(out: i64, device: Device) -> Scale {
        let s = Tensor::ones([out], (Kind::Float, device));
        Scale {
            s: s.set_requires_grad(true),
        }
    }
}

impl Params for Scale {
    fn params(&self, visit: Visit<'_>) {
        visit("scale", &self.s);
    }
}

impl LinearAdapter for Scale {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _ctx: Ctx) -> Tensor {
        let y = beneath.forward(x); // [.., out]
        let kind = y.kind();
        (y * &self.s).to_kind(kind)
    }

    fn merge(&self, plain: Plain, _base: &dyn LinearOp) -> Option<Plain> {
        let kind = plain.weight.kind();
        let weight = (plain.weight * self.s.unsqueeze(1)).to_kind(kind); // [out, in]
        let bias = plain.bias.map(|b| (b * &self.s).to_kind(kind)); // [out]
        Some(Plain { weight, bias })
    }
}
