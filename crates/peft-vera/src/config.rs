//! `adapter_config.json` of a VeRA: every key of Python's `VeraConfig`, with its default.

use peft_core::{Common, Config, Error, Layers, Names, Result, Selection, Unmodelled};
use serde::{Deserialize, Serialize};

/// VeRA (2310.11454), as it is configured and saved.
///
/// ```
/// use peft_vera::VeraConfig;
/// let vera = VeraConfig { r: 64, save_projection: false, ..VeraConfig::on(["q_proj", "v_proj"]) };
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VeraConfig {
    /// Rank of the random matrices.
    pub r: i64,
    /// From which they are drawn.
    pub projection_prng_key: u64,
    /// The file has them, too.
    pub save_projection: bool,
    /// Probability with which an element of the input is dropped on its way into A, in training.
    pub vera_dropout: f64,
    /// With what λ_d begins.
    pub d_initial: f64,
    /// The layers: names, one expression, or `all-linear`. `None`: what fits the model's type.
    pub target_modules: Option<Names>,
    /// Blocks by number; the others are left out.
    pub layers_to_transform: Option<Layers>,
    /// The name of the list of blocks, where the first number in a layer's name is not the block's.
    pub layers_pattern: Option<Names>,
    /// The targets are kept `[in, out]`. Corrected when the model is known; nothing here depends on it.
    pub fan_in_fan_out: bool,
    /// Biases of the base that are trained too.
    pub bias: Bias,
    /// Modules of which a whole copy is trained and saved.
    pub modules_to_save: Option<Vec<String>>,
    /// λ_d begins at `d_initial` and λ_b at zero; otherwise λ_d is normal and λ_b one, for tests.
    pub init_weights: bool,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

/// Which biases of the base are trained: `bias`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the target layers.
    VeraOnly,
}

impl Default for VeraConfig {
    fn default() -> VeraConfig {
        VeraConfig {
            r: 256,
            projection_prng_key: 0,
            save_projection: true,
            vera_dropout: 0.0,
            d_initial: 0.1,
            target_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            fan_in_fan_out: false,
            bias: Bias::None,
            modules_to_save: None,
            init_weights: true,
            common: Common::default(),
            rest: Unmodelled::default(),
        }
    }
}

impl VeraConfig {
    /// The defaults of Python's `peft` on these targets.
    pub fn on(targets: impl Into<Names>) -> VeraConfig {
        VeraConfig {
            target_modules: Some(targets.into()),
            ..VeraConfig::default()
        }
    }

    pub(crate) fn selection(&self) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: None,
            layers: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref(),
            save: self.modules_to_save.as_deref(),
        }
    }

    pub(crate) fn fault(reason: impl Into<String>) -> Error {
        Error::Config {
            peft_type: VeraConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Config for VeraConfig {
    const PEFT_TYPE: &'static str = "VERA";
    const INERT: &'static [&'static str] = &["runtime_config"];

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        let must = |fine: bool, reason: &dyn Fn() -> String| match fine {
            true => Ok(()),
            false => Err(VeraConfig::fault(reason())),
        };
        // Beyond any use of a random basis: a typing error, which would otherwise ask for terabytes.
        must((1..=65536).contains(&self.r), &|| {
            format!("r is {} and not in 1..=65536", self.r)
        })?;
        must((0.0..1.0).contains(&self.vera_dropout), &|| {
            format!("vera_dropout is {} and not in 0..1", self.vera_dropout)
        })?;
        must(self.d_initial.is_finite(), &|| {
            format!("d_initial is {} and not finite", self.d_initial)
        })?;
        self.selection().check(VeraConfig::PEFT_TYPE)
    }
}
