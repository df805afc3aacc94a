//! The configuration at work: it decides for each place, then puts a copy there.

use peft_core::{
    Config, Injection, Outline, Result, Saved, Site, SiteKind, Slot, Tuner, default_targets,
    save_whole, with_heads,
};
use serde_json::Value;

use crate::{
    config::NormConfig,
    tables,
    tuned::{Tuned, Whole},
};

impl Tuner for NormConfig {
    fn peft_type(&self) -> &'static str {
        NormConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let mut config = self.clone();
        let kind = &outline.spec.model_type;
        let asked = config.target_modules.take();
        let targets = asked.or_else(|| default_targets(tables::TARGETS, kind));
        let missing = || {
            let why = "there are no default targets for models of type";
            NormConfig::fault(format!("{why} `{kind}`; set target_modules"))
        };
        config.target_modules = Some(targets.ok_or_else(missing)?.expand(outline));
        config.modules_to_save = with_heads(config.modules_to_save, &config.common, outline);
        let any = |site: &Site| site.kind != SiteKind::Prompt;
        config.selection().check_targets(outline, &any)?;
        config.selection().check_saved(outline)?;
        Ok(Box::new(config))
    }

    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        let selection = self.selection();
        let target = site.kind != SiteKind::Prompt && selection.targets(&site.at)?;
        Ok(target || selection.saves(&site.at))
    }

    fn attach(&self, at: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let name = injection.name;
        if self.selection().saves(at) {
            save_whole(name, slot);
            return Ok(());
        }
        match slot {
            Slot::Norm(norm) => {
                let tuned = Tuned::new(norm.base());
                norm.attach(name, Box::new(tuned));
            }
            Slot::Linear(layer) => {
                let whole = Whole(Saved::linear(layer.base()));
                layer.attach(name, Box::new(whole));
            }
            Slot::Embedding(table) => {
                let whole = Whole(Saved::new(table.weight(), None));
                table.attach(name, Box::new(whole));
            }
            _ => {
                return Err(NormConfig::fault(format!(
                    "`{at}` is of a kind that LN tuning does not go on"
                )));
            }
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = NormConfig::PEFT_TYPE.into();
        json
    }
}
