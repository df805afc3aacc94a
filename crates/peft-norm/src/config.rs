//! `adapter_config.json` of an LN tuning: every key of Python's `LNTuningConfig`, with its default.

use peft_core::{Common, Config, Error, Names, Result, Selection, Unmodelled};
use serde::{Deserialize, Serialize};

/// LN tuning (2312.11420), as it is configured and saved.
///
/// ```
/// use peft_core::{Ctx, Model, ModelExt, Norm, NormKind, Slot, Spec};
/// use peft_norm::NormConfig;
/// use tch::{Device, Kind, Tensor};
///
/// struct One(Norm);
/// impl Model for One {
///     fn spec(&self) -> Spec { Spec::default() }
///     fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) { visit("norm", Slot::Norm(&mut self.0)); }
/// }
/// let ones = Tensor::ones([7], (Kind::Float, Device::Cpu));
/// let mut model = One(Norm::new(NormKind::Rms, ones, None, 1e-6));
/// model.inject("default", &NormConfig::on(["norm"]))?;
/// assert_eq!(model.trainable("default")[0].name, "ln_tuning_layers.weight");
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NormConfig {
    /// The norms: names, or one expression. `None`: what fits the model's type.
    pub target_modules: Option<Names>,
    /// Norms that are left out, whatever else says.
    pub exclude_modules: Option<Names>,
    /// Other modules of which a whole copy is trained and saved.
    pub modules_to_save: Option<Vec<String>>,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

impl NormConfig {
    /// The defaults of Python's `peft` on these targets.
    pub fn on(targets: impl Into<Names>) -> NormConfig {
        NormConfig {
            target_modules: Some(targets.into()),
            ..NormConfig::default()
        }
    }

    pub(crate) fn selection(&self) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            save: self.modules_to_save.as_deref(),
            ..Selection::default()
        }
    }

    pub(crate) fn fault(reason: impl Into<String>) -> Error {
        Error::Config {
            peft_type: NormConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Config for NormConfig {
    const PEFT_TYPE: &'static str = "LN_TUNING";
    const INERT: &'static [&'static str] = &["runtime_config"];

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        self.selection().check(NormConfig::PEFT_TYPE)
    }
}
