//! The configuration at work: it decides for each place, then puts factors there.

use peft_core::{
    Config, Error, Injection, Names, Outline, Result, Site, SiteKind, Slot, Tuner, default_targets,
    save_whole, with_heads,
};
use serde_json::Value;

use crate::{config::Ia3Config, factors::Factors, tables};

impl Tuner for Ia3Config {
    fn peft_type(&self) -> &'static str {
        Ia3Config::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let mut config = self.clone();
        config.fill_targets(outline)?;
        config.modules_to_save = with_heads(config.modules_to_save, &config.common, outline);
        let targets = config
            .selection()
            .linear_targets(Ia3Config::PEFT_TYPE, outline)?;
        config.selection().check_saved(outline)?;
        let transposed = targets.iter().any(|site| site.transposed);
        config.fill_feedforward(&targets, outline)?;
        config.fan_in_fan_out = transposed;
        Ok(Box::new(config))
    }

    fn check_settings(&self, outline: &Outline) -> Result<()> {
        let targets = self
            .selection()
            .linear_targets(Ia3Config::PEFT_TYPE, outline)?;
        self.check_feedforward(&targets, outline)
    }

    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        let target = site.kind == SiteKind::Linear && self.selection().targets(&site.at)?;
        Ok(target || self.selection().saves(&site.at))
    }

    fn attach(&self, at: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        if self.selection().saves(at) {
            save_whole(injection.name, slot);
            return Ok(());
        }
        let Slot::Linear(layer) = slot else {
            return Err(Ia3Config::fault(format!("`{at}` is no linear layer")));
        };
        let (base, random) = (layer.base(), !self.init_ia3_weights);
        let factors = Factors::new(base.shape(), self.scales_input(at)?, random, base.device());
        layer.attach(injection.name, Box::new(factors));
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = Ia3Config::PEFT_TYPE.into();
        json
    }
}

impl Ia3Config {
    /// Default targets, and `all-linear` spelt out.
    fn fill_targets(&mut self, outline: &Outline) -> Result<()> {
        let kind = &outline.spec.model_type;
        let asked = self.target_modules.take();
        let targets = asked.or_else(|| default_targets(tables::TARGETS, kind));
        let missing = || {
            let why = "there are no default targets for models of type";
            Ia3Config::fault(format!("{why} `{kind}`; set target_modules"))
        };
        self.target_modules = Some(targets.ok_or_else(missing)?.expand(outline));
        Ok(())
    }

    /// Default feed-forward layers.
    fn fill_feedforward(&mut self, targets: &[&Site], outline: &Outline) -> Result<()> {
        if self.feedforward_modules.is_some() {
            return Ok(());
        }
        let model_type = &outline.spec.model_type;
        let Some(Names::List(names)) = default_targets(tables::FEEDFORWARD, model_type) else {
            return Err(Ia3Config::fault(format!(
                "there is no default for models of type `{model_type}`; set feedforward_modules, to [] if no layer's input is to be scaled"
            )));
        };
        let listed = |it: &String| match &self.target_modules {
            Some(Names::List(list)) => list.contains(it),
            _ => true,
        };
        let used = |it: &&String| targets.iter().any(|site| site.at.ends_with(it.as_str()));
        // A list must be part of target_modules, or Python refuses the file. An expression may say the same.
        self.feedforward_modules = Some(match names.iter().all(listed) {
            true => Names::List(names),
            false if !names.iter().any(|it| used(&it)) => Names::List(Vec::new()),
            false => {
                let escaped = names.iter().map(|it| it.replace('.', r"\."));
                Names::Regex(format!(".*(?:{})", escaped.collect::<Vec<_>>().join("|")))
            }
        });
        Ok(())
    }

    /// That an expression names a target, and an entry of a list a layer at least: a list may hold defaults of the model's
    /// type that are no targets. Beside a list of targets it is part of that, which [`Config::check`] has seen to.
    fn check_feedforward(&self, targets: &[&Site], outline: &Outline) -> Result<()> {
        let missed = |what: String| {
            let examples = targets.iter().take(4).map(|it| it.at.clone()).collect();
            Err(Error::NoTarget { what, examples })
        };
        match (&self.feedforward_modules, &self.target_modules) {
            (Some(Names::Regex(text)), _) => {
                for site in targets {
                    if self.scales_input(&site.at)? {
                        return Ok(());
                    }
                }
                missed(format!("feedforward_modules `{text}`, among the targets,"))
            }
            (Some(Names::List(list)), Some(Names::Regex(_))) => {
                let there = |it: &str| outline.sites.iter().any(|site| site.at.ends_with(it));
                match list.iter().find(|it| !there(it)) {
                    Some(entry) => missed(format!("feedforward_modules `{entry}`")),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}
