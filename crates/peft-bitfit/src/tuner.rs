//! The configuration at work: it decides for each place, then puts a shift of its bias there.

use peft_core::{
    Config, Error, Injection, Names, Outline, Result, Shift, Site, SiteKind, Slot, Spec, Tuner,
    closest, save_whole, suffix_match, train_bias, with_heads,
};
use serde_json::Value;

use crate::{config::BitfitConfig, tables};

impl Tuner for BitfitConfig {
    fn peft_type(&self) -> &'static str {
        BitfitConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let mut config = self.clone();
        if let Some(parts) = config.parts.take() {
            let text = tables::expression(&parts, &outline.spec.model_type)?;
            config.target_modules = Some(Names::Regex(text));
        }
        config.target_modules = config.target_modules.map(|it| it.expand(outline));
        config.modules_to_save = with_heads(config.modules_to_save, &config.common, outline);
        config.selection().check_saved(outline)?;
        config.check_biases(outline)?;
        Ok(Box::new(config))
    }

    fn wants(&self, site: &Site, outline: &Outline) -> Result<bool> {
        Ok(self.selection().saves(&site.at) || self.trains(site, &outline.spec)?)
    }

    fn attach(&self, at: &str, mut slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let name = injection.name;
        if self.selection().saves(at) {
            save_whole(name, slot);
            return Ok(());
        }
        match &mut slot {
            Slot::Linear(layer) if layer.base().bias().is_none() => {
                let base = layer.base();
                let added = Shift::added(base.shape().0, base.device());
                layer.attach(name, Box::new(added));
            }
            slot => train_bias(name, slot, false),
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = BitfitConfig::PEFT_TYPE.into();
        json
    }
}

impl BitfitConfig {
    /// Whether the bias of a place is trained; of a model with `parts` resolved.
    fn trains(&self, site: &Site, spec: &Spec) -> Result<bool> {
        let kind = match site.kind {
            SiteKind::Linear => site.bias || self.add_bias,
            SiteKind::Norm => site.bias,
            _ => false,
        };
        if !kind || self.selection().saves(&site.at) {
            return Ok(false);
        }
        match &self.target_modules {
            Some(_) => self.selection().targets(&site.at),
            None => Ok(
                !self.selection().excludes(&site.at)? && (site.bias || !is_head(&site.at, spec))
            ),
        }
    }

    /// That a bias is trained at all, and the reason why not.
    fn check_biases(&self, outline: &Outline) -> Result<()> {
        for site in &outline.sites {
            if self.trains(site, &outline.spec)? {
                return Ok(());
            }
        }
        let selection = self.selection();
        if self.target_modules.is_some() {
            selection.check_targets(outline, &|site| {
                matches!(site.kind, SiteKind::Linear | SiteKind::Norm)
            })?;
            let mut named = Vec::new();
            for site in &outline.sites {
                if selection.targets(&site.at)? {
                    named.push(site.at.as_str());
                }
            }
            return Err(BitfitConfig::fault(format!(
                "none of the {} targets has a bias, first `{}`; add_bias gives linear layers one",
                named.len(),
                named.first().unwrap_or(&"")
            )));
        }
        match outline.sites.iter().any(|site| site.bias) {
            false => Err(BitfitConfig::fault(
                "this model has no biases; add_bias gives its linear layers one",
            )),
            true => {
                let biased = outline.sites.iter().filter(|site| site.bias);
                Err(Error::NoTarget {
                    what: "exclude_modules and modules_to_save leave no bias: the rest".to_owned(),
                    examples: closest("", biased.map(|site| site.at.as_str()), 4),
                })
            }
        }
    }
}

/// The output embedding, or a part of the head of a task.
fn is_head(at: &str, spec: &Spec) -> bool {
    let module = |head: &str| at == head || at.starts_with(&format!("{head}."));
    let output = spec.output_embedding.as_deref();
    output.is_some_and(|it| suffix_match(at, it)) || spec.task_head.as_deref().is_some_and(module)
}
