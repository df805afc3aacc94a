//! `adapter_config.json` of an AdaLoRA: the keys of Python's `AdaLoraConfig` that apply to it, with their defaults.

use indexmap::IndexMap;
use peft_core::{Common, Config, Error, Layers, Names, Result, Selection, Unmodelled};
use serde::{Deserialize, Serialize, Serializer};

/// AdaLoRA (2303.10512), as it is configured and saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaLoraConfig {
    /// Ranks of a layer at the start.
    pub init_r: i64,
    /// Ranks of a layer at the end, on average over layers.
    pub target_r: i64,
    /// Steps before ranks are taken away.
    pub tinit: i64,
    /// Steps at the end in which no more are taken away.
    pub tfinal: i64,
    /// Steps from one mask to the next.
    #[serde(rename = "deltaT")]
    pub delta_t: i64,
    /// How slowly the importance follows, below 1.
    pub beta1: f64,
    /// How slowly the uncertainty of it follows, below 1.
    pub beta2: f64,
    /// Weight of the term that holds A and B orthogonal.
    pub orth_reg_weight: f64,
    /// Steps of the whole run; must be given.
    pub total_step: Option<i64>,
    /// Which ranks are left, by `<place>.lora_E`; of an adapter that was trained.
    pub rank_pattern: Option<IndexMap<String, Vec<bool>>>,
    /// The rank of LoRA, which means nothing here.
    pub r: i64,
    /// α; the update is scaled by α / `init_r`. 0: by 1.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Probability with which an element of the input is dropped on its way into A, in training.
    pub lora_dropout: f64,
    /// The layers: names, one expression, or `all-linear`. `None`: what fits the model's type.
    pub target_modules: Option<Names>,
    /// Layers that are left out, whatever else says.
    pub exclude_modules: Option<Names>,
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
    /// A and B begin small and E zero; otherwise all normal, for tests.
    pub init_lora_weights: bool,
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
    LoraOnly,
}

impl Default for AdaLoraConfig {
    fn default() -> AdaLoraConfig {
        AdaLoraConfig {
            init_r: 12,
            target_r: 8,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            rank_pattern: None,
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            fan_in_fan_out: false,
            bias: Bias::None,
            modules_to_save: None,
            init_lora_weights: true,
            common: Common::default(),
            rest: Unmodelled::default(),
        }
    }
}

impl AdaLoraConfig {
    /// The defaults of Python's `peft` on these targets, for a run of so many steps.
    pub fn on(targets: impl Into<Names>, total_step: i64) -> AdaLoraConfig {
        AdaLoraConfig {
            target_modules: Some(targets.into()),
            total_step: Some(total_step),
            ..AdaLoraConfig::default()
        }
    }

    /// What the update is scaled by, whatever ranks are left.
    pub fn scale(&self) -> f64 {
        let ranks = self.init_r as f64;
        let alpha = if self.lora_alpha > 0.0 {
            self.lora_alpha
        } else {
            ranks
        };
        alpha / (ranks + 1e-5)
    }

    pub(crate) fn selection(&self) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            layers: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref(),
            save: self.modules_to_save.as_deref(),
        }
    }

    pub(crate) fn fault(reason: impl Into<String>) -> Error {
        Error::Config {
            peft_type: AdaLoraConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Config for AdaLoraConfig {
    const PEFT_TYPE: &'static str = "ADALORA";
    // What other methods of LoRA's family write beside settings of theirs that are off.
    const INERT: &'static [&'static str] = &[
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "alpha_pattern",
        "use_rslora",
    ];

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        let must = |fine: bool, reason: &dyn Fn() -> String| match fine {
            true => Ok(()),
            false => Err(AdaLoraConfig::fault(reason())),
        };
        // Beyond any layer's width: a typing error, which would otherwise ask for terabytes.
        must((1..=65536).contains(&self.init_r), &|| {
            format!("init_r is {} and not in 1..=65536", self.init_r)
        })?;
        must((0..=self.init_r).contains(&self.target_r), &|| {
            format!(
                "target_r is {} and not in 0..={}, which init_r is",
                self.target_r, self.init_r
            )
        })?;
        for (key, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            must(beta > 0.0 && beta < 1.0, &|| {
                format!("{key} is {beta} and not between 0 and 1")
            })?;
        }
        must(
            self.orth_reg_weight >= 0.0 && self.orth_reg_weight.is_finite(),
            &|| {
                format!(
                    "orth_reg_weight is {} and not 0 or more",
                    self.orth_reg_weight
                )
            },
        )?;
        must((0.0..1.0).contains(&self.lora_dropout), &|| {
            format!("lora_dropout is {} and not in 0..1", self.lora_dropout)
        })?;
        must(self.lora_alpha.is_finite(), &|| {
            format!("lora_alpha is {} and not finite", self.lora_alpha)
        })?;
        let total = self.total_step.unwrap_or(0);
        must(total > 0, &|| {
            "total_step must be given: the number of steps of the run, over which ranks are taken away".to_owned()
        })?;
        must(
            self.tinit >= 0 && self.tfinal >= 0 && self.delta_t > 0,
            &|| {
                let (a, b, c) = (self.tinit, self.tfinal, self.delta_t);
                format!(
                    "tinit is {a}, tfinal {b}, deltaT {c}: the first two are 0 or more, the last 1 or more"
                )
            },
        )?;
        must(self.tinit < total - self.tfinal, &|| {
            let (tinit, tfinal) = (self.tinit, self.tfinal);
            format!(
                "tinit {tinit} and tfinal {tfinal} leave none of {total} steps (total_step) in which ranks are taken away"
            )
        })?;
        self.check_pattern()?;
        self.selection().check(AdaLoraConfig::PEFT_TYPE)
    }
}

impl AdaLoraConfig {
    fn check_pattern(&self) -> Result<()> {
        for (key, kept) in self.rank_pattern.iter().flatten() {
            if kept.len() as i64 != self.init_r {
                return Err(AdaLoraConfig::fault(format!(
                    "rank_pattern has {} entries for `{key}`, and init_r is {}",
                    kept.len(),
                    self.init_r
                )));
            }
        }
        Ok(())
    }
}

/// Whole numbers as Python's integers.
fn number<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => to.serialize_i64(*value as i64),
        false => to.serialize_f64(*value),
    }
}
