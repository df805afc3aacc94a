//! `adapter_config.json` of a BitFit. The tag and the keys of its own are this project's; Python's `peft` has no such method.

use peft_core::{Common, Config, Error, Names, Result, Selection, Unmodelled};
use serde::{Deserialize, Serialize};

/// BitFit (2106.10199), as it is configured and saved.
///
/// ```
/// use peft_bitfit::{BitfitConfig, Part};
/// let every_bias = BitfitConfig::default();
/// let papers_best = BitfitConfig { parts: Some(vec![Part::Query, Part::Mlp]), ..BitfitConfig::default() };
/// let on_llama = BitfitConfig { add_bias: true, ..BitfitConfig::on(["q_proj", "up_proj"]) };
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BitfitConfig {
    /// The layers and norms whose bias is trained: names, one expression, or `all-linear`. `None`: all.
    pub target_modules: Option<Names>,
    /// Those that are left out, whatever else says.
    pub exclude_modules: Option<Names>,
    /// Instead of `target_modules`: parts of a block, which are looked up by the type of the model. Filled in as an expression.
    pub parts: Option<Vec<Part>>,
    /// Linear layers without a bias get one: zero at first. Without `target_modules` and `parts`, all but the output embedding
    /// and the head of a task.
    pub add_bias: bool,
    /// Modules of which a whole copy is trained and saved.
    pub modules_to_save: Option<Vec<String>>,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

/// A part of a transformer's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Queries.
    Query,
    /// Keys. Their bias moves all scores of a query alike, so the softmax takes it out again: little to learn here.
    Key,
    /// Values.
    Value,
    /// The projection behind the attention.
    Output,
    /// The feed-forward block.
    Mlp,
    /// Norms.
    Norm,
}

impl BitfitConfig {
    /// The biases of these layers and norms.
    pub fn on(targets: impl Into<Names>) -> BitfitConfig {
        BitfitConfig {
            target_modules: Some(targets.into()),
            ..BitfitConfig::default()
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
            peft_type: BitfitConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Config for BitfitConfig {
    const PEFT_TYPE: &'static str = "BITFIT";

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        self.selection().check(BitfitConfig::PEFT_TYPE)?;
        match (&self.parts, &self.target_modules) {
            (Some(_), Some(_)) => Err(BitfitConfig::fault(
                "parts and target_modules both say which biases are trained; give one of them",
            )),
            (Some(parts), None) if parts.is_empty() => Err(BitfitConfig::fault(
                "parts names nothing; leave it out for every bias",
            )),
            _ => Ok(()),
        }
    }
}
