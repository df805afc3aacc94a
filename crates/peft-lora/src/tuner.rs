//! The configuration at work: it decides for each place, then puts adapters there.

use peft_core::{
    Config, Conv, Embedding, Injection, Linear, Norm, Outline, Result, Saved, Shift, Site, Slot,
    State, Tuner,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    config::{Init, LoraConfig},
    conv::ConvLora,
    dora::Dora,
    embedding::EmbeddingLora,
    factors::{Factors, leaf},
    init,
    lora::{Lora, TiedHead},
    plan::{Owner, Share},
    tokens::Tokens,
};

/// Names of tensors that a tied head takes over from the input embedding.
const TABLE: &str = "table";
const ROWS: &str = "rows";

impl Tuner for LoraConfig {
    fn peft_type(&self) -> &'static str {
        LoraConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        Ok(Box::new(self.resolved(outline)?))
    }

    fn wants(&self, site: &Site, outline: &Outline) -> Result<bool> {
        let share = self.share(site, outline)?;
        self.check_bias(site, &share)?;
        Ok(share != Share::default())
    }

    fn check_settings(&self, outline: &Outline) -> Result<()> {
        self.check_patterns(outline)
    }

    fn attach(&self, at: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let outline = injection.outline;
        let Some(site) = outline.site(at) else {
            return Err(LoraConfig::fault(format!(
                "`{at}` is no place of this model"
            )));
        };
        let share = self.share(site, outline)?;
        let work = Attach {
            config: self,
            at,
            input: &outline.spec.input_embedding,
            name: injection.name,
            share,
        };
        match slot {
            Slot::Linear(linear) => work.linear(linear, &mut injection.shared),
            Slot::Embedding(table) => work.embedding(table, &mut injection.shared),
            Slot::Conv(conv) => work.conv(conv),
            Slot::Norm(norm) => {
                work.norm(norm);
                Ok(())
            }
            _ => Err(LoraConfig::fault(format!(
                "`{at}` is of a kind that LoRA does not go on"
            ))),
        }
    }

    fn to_json(&self) -> Value {
        // Strings, numbers and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = LoraConfig::PEFT_TYPE.into();
        json
    }

    fn saved(&self) -> Option<Box<dyn Tuner>> {
        let of_base = self.init_lora_weights.takes_from_base();
        of_base.then(|| Box::new(self.converted()) as Box<dyn Tuner>)
    }
}

impl Init {
    /// The first factors are parts of the base, so their product is to be subtracted from it.
    fn takes_from_base(self) -> bool {
        matches!(self, Init::Pissa | Init::PissaFast(_) | Init::Olora)
    }
}

impl LoraConfig {
    /// The plain LoRA of twice the rank that a PiSSA or OLoRA is, once it is told apart from its base.
    ///
    /// The scale stays: α / r for twice of both, α / √r for √2 α.
    fn converted(&self) -> LoraConfig {
        let more = if self.use_rslora { 2f64.sqrt() } else { 2.0 };
        let mut plain = self.clone();
        plain.init_lora_weights = Init::Kaiming;
        plain.r *= 2;
        plain.lora_alpha *= more;
        plain.rank_pattern.values_mut().for_each(|r| *r *= 2);
        plain
            .alpha_pattern
            .values_mut()
            .for_each(|alpha| *alpha *= more);
        plain
    }
}

/// One place of one injection.
struct Attach<'a> {
    config: &'a LoraConfig,
    at: &'a str,
    /// The place of the input embedding.
    input: &'a str,
    name: &'a str,
    share: Share<'a>,
}

impl Attach<'_> {
    fn linear(self, linear: &mut Linear, shared: &mut State) -> Result<()> {
        if let Some(owner) = self.share.save {
            let base = linear.base();
            let saved = match owner {
                Owner::Own => Saved::linear(base),
                Owner::Embedding => Saved::tied(lent(shared, TABLE)?, base.bias()),
            };
            linear.attach(self.name, Box::new(saved));
            return Ok(());
        }
        if let Some(bias) = linear.base().bias().filter(|_| self.share.bias) {
            let shift = Shift::new(bias, self.share.lora.is_some());
            linear.attach(self.name, Box::new(shift));
        }
        if let Some((owner, rows)) = self.share.tokens {
            let tokens = match owner {
                Owner::Own => Tokens::new(&linear.base().weight(), rows),
                Owner::Embedding => Tokens::borrowed(lent(shared, ROWS)?, rows),
            };
            linear.attach(self.name, Box::new(tokens));
        }
        match self.share.lora {
            None => {}
            Some(Owner::Embedding) => {
                let (_, scale) = self.config.rank_and_scale(self.input)?;
                let head = TiedHead {
                    factors: Factors::lent(shared, scale, lent)?,
                    dropout: self.config.lora_dropout,
                };
                linear.attach(self.name, Box::new(head));
            }
            Some(Owner::Own) => self.factors_on(linear)?,
        }
        Ok(())
    }

    fn factors_on(&self, linear: &mut Linear) -> Result<()> {
        let (config, base) = (self.config, linear.base());
        let (r, scale) = config.rank_and_scale(self.at)?;
        let how = config.init_lora_weights;
        let (shape, device) = (base.shape(), base.device());
        let _off = tch::no_grad_guard();
        let (a, b) = init::linear(how, || base.weight(), shape, r, scale, device)?;
        let factors = Factors::new(&a, &b, scale, how.takes_from_base());
        if config.use_dora {
            let dora = Dora::new(factors, base, config.lora_dropout);
            linear.attach(self.name, Box::new(dora));
        } else {
            let lora = Lora {
                bias: config.lora_bias.then(|| bias_of_b(how, shape.0, r, device)),
                dropout: config.lora_dropout,
                factors,
            };
            linear.attach(self.name, Box::new(lora));
        }
        Ok(())
    }

    fn embedding(self, table: &mut Embedding, shared: &mut State) -> Result<()> {
        let config = self.config;
        let first = self.at == self.input;
        if self.share.save.is_some() {
            let saved = Saved::new(table.weight(), None);
            if first {
                shared.insert(TABLE.to_owned(), saved.weight().shallow_clone());
            }
            table.attach(self.name, Box::new(saved));
        }
        if let Some((_, rows)) = self.share.tokens {
            let tokens = Tokens::of_table(table.weight(), rows);
            if first {
                shared.insert(ROWS.to_owned(), tokens.rows().shallow_clone());
            }
            table.attach(self.name, Box::new(tokens));
        }
        if self.share.lora.is_some() {
            let size = table.weight().size();
            let (r, scale) = config.rank_and_scale(self.at)?;
            let how = config.init_lora_weights;
            let (a, b) = init::embedding(how, (size[0], size[1]), r, table.device())?;
            let factors = Factors::new(&a, &b, scale, how.takes_from_base());
            if first {
                factors.lend(shared);
            }
            let adapter = match config.use_dora {
                true => EmbeddingLora::dora(factors, table.weight()),
                false => EmbeddingLora::new(factors),
            };
            table.attach(self.name, Box::new(adapter));
        }
        Ok(())
    }

    fn conv(self, conv: &mut Conv) -> Result<()> {
        if self.share.save.is_some() {
            let saved = Saved::new(conv.base().weight(), conv.base().bias());
            conv.attach(self.name, Box::new(saved));
            return Ok(());
        }
        if let Some(bias) = conv.base().bias().filter(|_| self.share.bias) {
            let shift = Shift::new(bias, self.share.lora.is_some());
            conv.attach(self.name, Box::new(shift));
        }
        if self.share.lora.is_some() {
            let (config, base) = (self.config, conv.base());
            let (r, scale) = config.rank_and_scale(self.at)?;
            let (how, size, device) = (
                config.init_lora_weights,
                base.weight().size(),
                base.device(),
            );
            let groups = base.geometry().groups;
            let (a, b) = init::conv(how, &size, groups, r, device)?;
            let mut adapter = ConvLora::new(&a, &b, scale, config.lora_dropout);
            if config.lora_bias {
                adapter = adapter.with_bias(&bias_of_b(how, size[0], r / groups, device));
            }
            if config.use_dora {
                adapter = adapter.dora(base);
            }
            conv.attach(self.name, Box::new(adapter));
        }
        Ok(())
    }

    fn norm(self, norm: &mut Norm) {
        let base = norm.base();
        if self.share.save.is_some() {
            let saved = Saved::new(&base.weight, base.bias.as_ref());
            norm.attach(self.name, Box::new(saved));
        } else if let Some(bias) = base.bias.as_ref().filter(|_| self.share.bias) {
            let shift = Shift::new(bias, false);
            norm.attach(self.name, Box::new(shift));
        }
    }
}

/// The bias of B `[out]`: zero, or as a fresh layer that sums up r numbers has it.
fn bias_of_b(how: Init, out: i64, r: i64, device: Device) -> Tensor {
    let zero = Tensor::zeros([out], (Kind::Float, device));
    let bound = 1.0 / (r as f64).sqrt();
    leaf(&match how {
        Init::Random => zero.uniform(-bound, bound),
        _ => zero,
    })
}

/// A tensor that the input embedding has left for the head.
fn lent<'a>(shared: &'a State, key: &str) -> Result<&'a Tensor> {
    shared.get(key).ok_or_else(|| {
        LoraConfig::fault("the output embedding is tied to an input embedding that this configuration leaves out, or that the model shows later")
    })
}
