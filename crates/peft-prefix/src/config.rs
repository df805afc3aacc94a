//! `adapter_config.json` of a prefix: every key of Python's `PrefixTuningConfig`, with its default.

use peft_core::{
    Common, Config, Error, Form, Injection, Outline, Result, Site, Slot, Start, Tuner, Unmodelled,
    VirtualTokens, save_whole,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::prefix::{Prefix, Sizes};

/// Prefix tuning (2101.00190), as it is configured and saved.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixConfig {
    /// How many tokens, and the sizes of the model.
    #[serde(flatten)]
    pub tokens: VirtualTokens,
    /// How the table, or the last layer of the projection, begins. `None`: at random.
    pub init_weights: Option<InitWeights>,
    /// Width of the projection's inner layer. `None`: `token_dim`.
    pub encoder_hidden_size: Option<i64>,
    /// The table is computed from a smaller one through two layers.
    pub prefix_projection: bool,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

/// How the table begins: `init_weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitWeights {
    /// Keys and values of zero. The scores of zero keys still take their part of the softmax.
    Zero,
}

impl PrefixConfig {
    /// The defaults of Python's `peft` with this many virtual tokens.
    pub fn of(tokens: i64) -> PrefixConfig {
        PrefixConfig {
            tokens: VirtualTokens::new(tokens),
            ..PrefixConfig::default()
        }
    }

    pub(crate) fn fault(reason: impl Into<String>) -> Error {
        Error::Config {
            peft_type: PrefixConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }
}

impl Config for PrefixConfig {
    const PEFT_TYPE: &'static str = "PREFIX_TUNING";

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        self.tokens.check(PrefixConfig::PEFT_TYPE)?;
        match self.encoder_hidden_size {
            Some(size) if !(1..=65536).contains(&size) => Err(PrefixConfig::fault(format!(
                "encoder_hidden_size is {size} and not in 1..=65536"
            ))),
            _ => Ok(()),
        }
    }
}

impl Tuner for PrefixConfig {
    fn peft_type(&self) -> &'static str {
        PrefixConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let tag = PrefixConfig::PEFT_TYPE;
        let tokens = self.tokens.resolved(tag, Form::Kv, &self.common, outline)?;
        let mut resolved = self.clone();
        resolved.encoder_hidden_size = self.encoder_hidden_size.or(tokens.token_dim);
        resolved.tokens = tokens;
        Ok(Box::new(resolved))
    }

    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        Ok(self.tokens.wants(site))
    }

    fn attach(&self, _: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let Slot::Prompt(slot) = slot else {
            save_whole(injection.name, slot);
            return Ok(());
        };
        let spec = &injection.outline.spec;
        let sizes = Sizes {
            tokens: self.tokens.tokens(),
            layers: spec.layers as i64,
            heads: spec.kv_heads,
            head_dim: spec.head_dim,
            device: slot.words().device(),
        };
        let (start, zero) = (injection.start, self.init_weights.is_some());
        let prefix = match (self.prefix_projection, start) {
            // What the file of a projected prefix holds: its result, which cannot be trained on.
            (true, Start::Saved) => Prefix::table(sizes, start, zero, false)?,
            (true, _) => {
                let inner = self.encoder_hidden_size.unwrap_or(self.tokens.width());
                Prefix::projected(sizes, inner, start, zero)?
            }
            (false, _) => Prefix::table(sizes, start, zero, true)?,
        };
        let prefix = match spec.encoder_decoder {
            true => prefix.dealt_by_four(),
            false => prefix,
        };
        slot.attach(injection.name, Box::new(prefix));
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings, numbers and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = PrefixConfig::PEFT_TYPE.into();
        json
    }

    fn key(&self, at: &str, param: &str) -> String {
        VirtualTokens::key(at, param)
    }

    fn live_key(&self, at: &str, param: &str) -> String {
        VirtualTokens::live_key(at, param)
    }
}
