//! The configuration at work: it decides for each place, and lets all share what the first has drawn.

use peft_core::{
    BIASES, Config, Injection, Outline, Result, Site, SiteKind, Slot, Tuner, default_targets,
    save_whole, train_bias, with_heads,
};
use serde_json::Value;
use tch::{Device, Tensor};

use crate::{
    config::{Bias, VeraConfig},
    scaled::{A, B, Projection, Role, Scaled},
    tables,
};

impl Tuner for VeraConfig {
    fn peft_type(&self) -> &'static str {
        VeraConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let mut config = self.clone();
        let kind = &outline.spec.model_type;
        let asked = config.target_modules.take();
        let targets = asked.or_else(|| default_targets(tables::TARGETS, kind));
        let missing = || {
            let why = "there are no default targets for models of type";
            VeraConfig::fault(format!("{why} `{kind}`; set target_modules"))
        };
        config.target_modules = Some(targets.ok_or_else(missing)?.expand(outline));
        config.modules_to_save = with_heads(config.modules_to_save, &config.common, outline);
        let selection = config.selection();
        let targets = selection.linear_targets(VeraConfig::PEFT_TYPE, outline)?;
        selection.check_saved(outline)?;
        config.fan_in_fan_out = targets.iter().any(|site| site.transposed);
        Ok(Box::new(config))
    }

    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        let (selection, target) = (self.selection(), self.acts_on(site)?);
        let bias = !selection.saves(&site.at) && self.trains_bias(site.bias, target);
        if bias && site.held.iter().any(|held| BIASES.contains(&held.as_str())) {
            return Err(VeraConfig::fault(format!(
                "bias is not `none`, but another adapter trains the bias of `{}` already; only one can",
                site.at
            )));
        }
        Ok(target || bias || selection.saves(&site.at))
    }

    fn attach(&self, at: &str, mut slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let name = injection.name;
        if self.selection().saves(at) {
            save_whole(name, slot);
            return Ok(());
        }
        let site = injection.outline.site(at);
        let target = site.map_or(Ok(false), |site| self.acts_on(site))?;
        if self.trains_bias(true, target) {
            train_bias(name, &mut slot, target);
        }
        let Slot::Linear(layer) = slot else {
            return Ok(());
        };
        if target {
            let ((out, _), device) = (layer.base().shape(), layer.base().device());
            let (projection, role) = self.projection(injection, device)?;
            let initial = self.init_weights.then_some(self.d_initial);
            let scaled = Scaled::new(out, projection, role, initial, self.vera_dropout);
            layer.attach(name, Box::new(scaled));
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings, numbers and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = VeraConfig::PEFT_TYPE.into();
        json
    }

    /// The matrices belong to the model and not to the place that shows them.
    fn key(&self, at: &str, param: &str) -> String {
        match param {
            A | B => format!("base_model.{param}"),
            _ => format!("base_model.model.{at}.{param}"),
        }
    }
}

impl VeraConfig {
    fn acts_on(&self, site: &Site) -> Result<bool> {
        let target = site.kind == SiteKind::Linear && self.selection().targets(&site.at)?;
        Ok(target && !self.selection().saves(&site.at))
    }

    fn trains_bias(&self, has: bool, target: bool) -> bool {
        has && match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::VeraOnly => target,
        }
    }

    /// What the first place of an injection draws, and the others take over.
    fn projection(
        &self,
        injection: &mut Injection<'_>,
        device: Device,
    ) -> Result<(Projection, Role)> {
        let shared = &mut injection.shared;
        if let (Some(a), Some(b)) = (shared.get(A), shared.get(B)) {
            let [a, b] = [a, b].map(Tensor::shallow_clone);
            return Ok((Projection { a, b }, Role::Guest));
        }
        let selection = self.selection();
        let targets = selection.linear_targets(VeraConfig::PEFT_TYPE, injection.outline)?;
        let widest = |i: usize| targets.iter().map(|site| site.shape[i]).max().unwrap_or(0);
        let size = (widest(0), widest(1));
        let projection = Projection::draw(self.projection_prng_key, self.r, size, device)?;
        let Projection { a, b } = projection.share();
        shared.extend([(A.to_owned(), a), (B.to_owned(), b)]);
        let saved = self.save_projection;
        Ok((projection, Role::Owner { saved }))
    }
}
