//! The configuration at work: it decides for each place, puts triplets there, and says what ranks are left.

use indexmap::IndexMap;
use peft_core::{
    BIASES, Config, Injection, Outline, Param, Result, Schedule, Site, SiteKind, Slot, Start,
    Tuner, default_targets, nearest, save_whole, train_bias, with_heads,
};
use serde_json::Value;

use crate::{
    config::{AdaLoraConfig, Bias},
    schedule::Allocator,
    tables,
    triplets::{E, MASK, Size, Triplets},
};

impl Tuner for AdaLoraConfig {
    fn peft_type(&self) -> &'static str {
        AdaLoraConfig::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let mut config = self.clone();
        let kind = &outline.spec.model_type;
        let asked = config.target_modules.take();
        let targets = asked.or_else(|| default_targets(tables::TARGETS, kind));
        let missing = || {
            let why = "there are no default targets for models of type";
            AdaLoraConfig::fault(format!("{why} `{kind}`; set target_modules"))
        };
        config.target_modules = Some(targets.ok_or_else(missing)?.expand(outline));
        config.modules_to_save = with_heads(config.modules_to_save, &config.common, outline);
        let selection = config.selection();
        let targets = selection.linear_targets(AdaLoraConfig::PEFT_TYPE, outline)?;
        selection.check_saved(outline)?;
        config.check_pattern_of(&targets)?;
        config.fan_in_fan_out = targets.iter().any(|site| site.transposed);
        Ok(Box::new(config))
    }

    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        let (selection, target) = (self.selection(), self.acts_on(site)?);
        let bias = !selection.saves(&site.at) && self.trains_bias(site.bias, target);
        if bias && site.held.iter().any(|held| BIASES.contains(&held.as_str())) {
            return Err(AdaLoraConfig::fault(format!(
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
            let ((out, inp), device) = (layer.base().shape(), layer.base().device());
            let ranks = match injection.start {
                Start::Fresh => self.init_r,
                Start::Saved | Start::Resumed => self.ranks_left(at),
            };
            let size = Size {
                ranks,
                out,
                inp,
                device,
            };
            let triplets = Triplets::new(
                size,
                self.init_lora_weights,
                self.scale(),
                self.lora_dropout,
            );
            layer.attach(name, Box::new(triplets));
        }
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings, numbers and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = AdaLoraConfig::PEFT_TYPE.into();
        json
    }

    /// With the ranks that are left: those that a file keeps, of those that there were when training began.
    fn completed(&self, params: &[Param]) -> Option<Box<dyn Tuner>> {
        let _off = tch::no_grad_guard();
        let masks = params.iter().filter(|it| it.name == MASK);
        let mut pattern = IndexMap::new();
        let mut masked = false;
        for mask in masks {
            let e = params.iter().find(|it| it.at == mask.at && it.name == E)?;
            masked |= mask.tensor.ge(0.0).any().int64_value(&[]) != 0;
            let gone = mask
                .tensor
                .eq(0.0)
                .logical_and(&e.tensor.view([-1]).eq(0.0));
            let left = Vec::<bool>::try_from(gone.logical_not()).ok()?;
            let key = format!("{}.{E}", mask.at);
            let whole = self.rank_pattern.as_ref().and_then(|it| it.get(&key));
            let own = self.again(whole, &left);
            pattern.insert(key, own);
        }
        let pattern = match masked || self.rank_pattern.is_some() {
            true => Some(pattern),
            false => None,
        };
        Some(Box::new(AdaLoraConfig {
            rank_pattern: pattern,
            ..self.clone()
        }))
    }

    fn schedule(&self) -> Option<Box<dyn Schedule>> {
        Some(Box::new(Allocator::new(self)))
    }
}

impl AdaLoraConfig {
    fn acts_on(&self, site: &Site) -> Result<bool> {
        let target = site.kind == SiteKind::Linear && self.selection().targets(&site.at)?;
        Ok(target && !self.selection().saves(&site.at))
    }

    fn trains_bias(&self, has: bool, target: bool) -> bool {
        has && match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => target,
        }
    }

    /// How many ranks the file has of a layer.
    fn ranks_left(&self, at: &str) -> i64 {
        let pattern = self.rank_pattern.as_ref();
        let kept = pattern.and_then(|it| it.get(&format!("{at}.{E}")));
        kept.map_or(self.init_r, |kept| {
            kept.iter().filter(|it| **it).count() as i64
        })
    }

    /// `left` of the ranks that `whole` has left, as a choice among all that there were at first.
    fn again(&self, whole: Option<&Vec<bool>>, left: &[bool]) -> Vec<bool> {
        let all = vec![true; self.init_r as usize];
        let whole = whole.unwrap_or(&all);
        if whole.iter().filter(|it| **it).count() != left.len() {
            return left.to_vec(); // begun afresh: the pattern of the configuration was not that of this model
        }
        let mut left = left.iter();
        let keep = |was: &bool| *was && left.next().copied().unwrap_or(false);
        whole.iter().map(keep).collect()
    }

    /// That a pattern and the targets are the same layers.
    fn check_pattern_of(&self, targets: &[&Site]) -> Result<()> {
        let Some(pattern) = &self.rank_pattern else {
            return Ok(());
        };
        let known: Vec<String> = targets
            .iter()
            .map(|site| format!("{}.{E}", site.at))
            .collect();
        match pattern.keys().find(|key| !known.contains(key)) {
            None => Ok(()),
            Some(key) => Err(AdaLoraConfig::fault(format!(
                "rank_pattern names `{key}`, which is no target{}",
                nearest(key, known.iter().map(String::as_str))
            ))),
        }
    }
}
