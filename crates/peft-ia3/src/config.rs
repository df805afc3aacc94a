//! `adapter_config.json` of an (IA)³: every key of Python's `IA3Config`, with its default.

use peft_core::{Common, Config, Error, Names, Result, Selection, Unmodelled, nearest};
use serde::{Deserialize, Serialize};

/// (IA)³ (2205.05638), as it is configured and saved.
///
/// ```
/// use peft_ia3::Ia3Config;
/// let ia3 = Ia3Config {
///     feedforward_modules: Some(["down_proj"].into()),
///     ..Ia3Config::on(["k_proj", "v_proj", "down_proj"])
/// };
/// assert!(ia3.scales_input("model.layers.0.mlp.down_proj")?);
/// # Ok::<(), peft_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3Config {
    /// The layers: names, one expression, or `all-linear`. `None`: what fits the model's type.
    pub target_modules: Option<Names>,
    /// Layers that are left out, whatever else says.
    pub exclude_modules: Option<Names>,
    /// Those of the targets whose input is scaled instead of their output. `None`: what fits the model's type.
    pub feedforward_modules: Option<Names>,
    /// The targets are kept `[in, out]`. Corrected when the model is known; nothing here depends on it.
    pub fan_in_fan_out: bool,
    /// Modules of which a whole copy is trained and saved.
    pub modules_to_save: Option<Vec<String>>,
    /// Factors begin at one; otherwise normal, for tests.
    pub init_ia3_weights: bool,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

impl Default for Ia3Config {
    fn default() -> Ia3Config {
        Ia3Config {
            target_modules: None,
            exclude_modules: None,
            feedforward_modules: None,
            fan_in_fan_out: false,
            modules_to_save: None,
            init_ia3_weights: true,
            common: Common::default(),
            rest: Unmodelled::default(),
        }
    }
}

impl Ia3Config {
    /// The defaults of Python's `peft` on these targets.
    pub fn on(targets: impl Into<Names>) -> Ia3Config {
        Ia3Config {
            target_modules: Some(targets.into()),
            ..Ia3Config::default()
        }
    }

    /// Whether the input of the target called `at` is scaled, and not its output.
    ///
    /// As Python has it, an entry of a list counts wherever a name ends with it, also in the middle of a word.
    pub fn scales_input(&self, at: &str) -> Result<bool> {
        match &self.feedforward_modules {
            None => Ok(false),
            Some(Names::List(list)) => Ok(list.iter().any(|entry| at.ends_with(entry.as_str()))),
            Some(pattern @ Names::Regex(_)) => pattern.matches(at),
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
            peft_type: Ia3Config::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Config for Ia3Config {
    const PEFT_TYPE: &'static str = "IA3";
    const INERT: &'static [&'static str] = &["runtime_config"];

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        self.selection().check(Ia3Config::PEFT_TYPE)?;
        let (Some(Names::List(targets)), Some(Names::List(inner))) =
            (&self.target_modules, &self.feedforward_modules)
        else {
            return self.scales_input("").map(drop); // compiles the expression
        };
        match inner.iter().find(|it| !targets.contains(it)) {
            None => Ok(()),
            Some(entry) => Err(Ia3Config::fault(format!(
                "feedforward_modules names `{entry}`, which is not in target_modules {targets:?}{}",
                nearest(entry, targets.iter().map(String::as_str))
            ))),
        }
    }
}
