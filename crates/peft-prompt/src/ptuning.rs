//! `adapter_config.json` of P-tuning: every key of Python's `PromptEncoderConfig`, with its default.

use peft_core::{
    Common, Config, Error, Form, Injection, Outline, Result, Site, Slot, Start, Tuner, Unmodelled,
    VirtualTokens, save_whole,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    encoder::{Encoder, Sizes},
    table::Table,
};

/// P-tuning (2103.10385), as it is configured and saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PtuningConfig {
    /// How many tokens, and the sizes of the model.
    #[serde(flatten)]
    pub tokens: VirtualTokens,
    /// What computes the rows.
    pub encoder_reparameterization_type: EncoderType,
    /// Width of its inner layers. `None`: `token_dim`.
    pub encoder_hidden_size: Option<i64>,
    /// Layers of an LSTM.
    pub encoder_num_layers: i64,
    /// Probability with which an element is dropped between the layers of an LSTM, in training.
    pub encoder_dropout: f64,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that this crate does not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

/// What computes the rows: `encoder_reparameterization_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EncoderType {
    /// Three layers, row by row.
    #[default]
    Mlp,
    /// A network over the sequence of rows in both directions, and two layers.
    Lstm,
}

/// Layers of an MLP in Python's words, and of an LSTM where nothing is said.
const LAYERS: i64 = 2;

impl Default for PtuningConfig {
    fn default() -> PtuningConfig {
        PtuningConfig {
            tokens: VirtualTokens::default(),
            encoder_reparameterization_type: EncoderType::Mlp,
            encoder_hidden_size: None,
            encoder_num_layers: LAYERS,
            encoder_dropout: 0.0,
            common: Common::default(),
            rest: Unmodelled::default(),
        }
    }
}

impl PtuningConfig {
    /// The defaults of Python's `peft` with this many virtual tokens.
    pub fn of(tokens: i64) -> PtuningConfig {
        PtuningConfig {
            tokens: VirtualTokens::new(tokens),
            ..PtuningConfig::default()
        }
    }

    fn fault(reason: impl Into<String>) -> Error {
        Error::Config {
            peft_type: PtuningConfig::PEFT_TYPE.to_owned(),
            reason: reason.into(),
        }
    }

    /// Settings that would do nothing in a training that asks for them; Python passes over them with a warning at most.
    fn check_idle(&self) -> Result<()> {
        let (layers, dropout) = (self.encoder_num_layers, self.encoder_dropout);
        match self.encoder_reparameterization_type {
            EncoderType::Mlp if layers != LAYERS => Err(PtuningConfig::fault(format!(
                "encoder_num_layers is {layers}, which an MLP does not have (leave it at {LAYERS}); encoder_reparameterization_type LSTM has it"
            ))),
            EncoderType::Mlp if dropout > 0.0 => Err(PtuningConfig::fault(format!(
                "encoder_dropout is {dropout}, which an MLP does not have; encoder_reparameterization_type LSTM has it"
            ))),
            EncoderType::Lstm if dropout > 0.0 && layers == 1 => {
                Err(PtuningConfig::fault(format!(
                    "encoder_dropout is {dropout}, which acts between the layers of an LSTM, and encoder_num_layers is 1"
                )))
            }
            _ => Ok(()),
        }
    }
}

impl Config for PtuningConfig {
    const PEFT_TYPE: &'static str = "P_TUNING";

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        self.tokens.check(PtuningConfig::PEFT_TYPE)?;
        for (key, value, most) in [
            (
                "encoder_hidden_size",
                self.encoder_hidden_size.unwrap_or(1),
                65536,
            ),
            ("encoder_num_layers", self.encoder_num_layers, 64),
        ] {
            if !(1..=most).contains(&value) {
                return Err(PtuningConfig::fault(format!(
                    "{key} is {value} and not in 1..={most}"
                )));
            }
        }
        match (0.0..1.0).contains(&self.encoder_dropout) {
            true => Ok(()),
            false => Err(PtuningConfig::fault(format!(
                "encoder_dropout is {} and not in 0..1",
                self.encoder_dropout
            ))),
        }
    }
}

impl Tuner for PtuningConfig {
    fn peft_type(&self) -> &'static str {
        PtuningConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let tag = PtuningConfig::PEFT_TYPE;
        let tokens = self
            .tokens
            .resolved(tag, Form::Embeds, &self.common, outline)?;
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
        let (tokens, device) = (&self.tokens, slot.words().device());
        if injection.start == Start::Saved {
            // What a file holds: rows whose network is gone, so they cannot be trained on.
            let shape = [tokens.rows(), tokens.width()];
            let rows = Tensor::f_zeros(shape, (Kind::Float, device))?;
            let table = Table::new(&rows, tokens.tokens(), false);
            slot.attach(injection.name, Box::new(table));
            return Ok(());
        }
        if injection.start == Start::Fresh {
            self.check_idle()?;
        }
        let sizes = Sizes {
            rows: tokens.rows(),
            tokens: tokens.tokens(),
            width: tokens.width(),
            hidden: self.encoder_hidden_size.unwrap_or(tokens.width()),
            device,
        };
        let encoder = match self.encoder_reparameterization_type {
            EncoderType::Mlp => Encoder::mlp(sizes, injection.start)?,
            EncoderType::Lstm => {
                let (layers, dropout) = (self.encoder_num_layers, self.encoder_dropout);
                Encoder::lstm(sizes, layers, dropout, injection.start)?
            }
        };
        slot.attach(injection.name, Box::new(encoder));
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings, numbers and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = PtuningConfig::PEFT_TYPE.into();
        json
    }

    fn key(&self, at: &str, param: &str) -> String {
        VirtualTokens::key(at, param)
    }

    fn live_key(&self, at: &str, param: &str) -> String {
        VirtualTokens::live_key(at, param)
    }
}
