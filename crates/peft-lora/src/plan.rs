//! What a configuration does at each place of a model, decided before anything is touched.
//!
//! The order is Python's: what is excluded is out; what is saved whole is no
//! target; then the targets. A list names suffixes, a string is one expression
//! for whole names, and the number of the block counts only where a suffix of
//! a list matched.
//!
//! A setting that matches nothing is a typing error nearly always, and a
//! training run that quietly does less than it says costs hours: it is an
//! error with the nearest real name.

use peft_core::{
    BIASES, Error, Names, Outline, Pattern, Result, Selection, Site, SiteKind, Spec, closest,
    fullmatch, nearest, pattern_value, suffix_match, with_heads,
};

use crate::config::{Bias, Init, LoraConfig, Tokens};

/// Whose tensors a place uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Its own.
    Own,
    /// Those of the input embedding: the place is the head of a tied model.
    Embedding,
}

/// What is done at one place.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Share<'a> {
    /// A whole copy is trained.
    pub(crate) save: Option<Owner>,
    /// Low-rank factors.
    pub(crate) lora: Option<Owner>,
    /// Rows of a table.
    pub(crate) tokens: Option<(Owner, &'a [i64])>,
    /// The bias.
    pub(crate) bias: bool,
}

/// What input and output embedding share, under `ensure_weight_tying`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tie {
    Save,
    Target,
}

/// The names by which Python recognises embeddings when it ties them.
const EMBEDDINGS: [&str; 2] = ["embed_tokens", "lm_head"];

impl LoraConfig {
    /// What is done at `site`.
    pub(crate) fn share(&self, site: &Site, outline: &Outline) -> Result<Share<'_>> {
        let spec = &outline.spec;
        let tie = self.tie(spec)?;
        let head = spec.tied && spec.output_embedding.as_deref() == Some(site.at.as_str());
        let save = match tie {
            Some(Tie::Save) if head => Some(Owner::Embedding),
            _ => self.selection().saves(&site.at).then_some(Owner::Own),
        };
        let lora = match tie {
            _ if save.is_some() || !fits(site) => None,
            Some(Tie::Target) if head => Some(Owner::Embedding),
            _ => self.selection().targets(&site.at)?.then_some(Owner::Own),
        };
        let bias = match self.bias {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => lora == Some(Owner::Own),
        };
        Ok(Share {
            save,
            lora,
            tokens: self.tokens(&site.at, spec),
            bias: bias && site.bias && save.is_none(),
        })
    }

    /// Rank and scale at a place.
    pub fn rank_and_scale(&self, at: &str) -> Result<(i64, f64)> {
        let r = pattern_value(&self.rank_pattern, at)?.unwrap_or(self.r);
        let alpha = pattern_value(&self.alpha_pattern, at)?.unwrap_or(self.lora_alpha);
        Ok((r, self.scale(r, alpha)))
    }

    /// Which places, by Python's rules.
    pub(crate) fn selection(&self) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            layers: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref(),
            save: self.modules_to_save.as_deref(),
        }
    }

    /// The trained rows of a place, as it is named; a tied head follows the input embedding.
    fn tokens(&self, at: &str, spec: &Spec) -> Option<(Owner, &[i64])> {
        let named = |at: &str| match self.trainable_token_indices.as_ref()? {
            Tokens::Input(rows) => (at == spec.input_embedding).then_some(rows.as_slice()),
            Tokens::At(places) => {
                let found = places.iter().find(|(name, _)| at.ends_with(name.as_str()));
                found.map(|(_, rows)| rows.as_slice())
            }
        };
        let own = named(at);
        let head = spec.tied && spec.output_embedding.as_deref() == Some(at);
        match named(&spec.input_embedding) {
            Some(rows) if head && own.is_none_or(|it| it == rows) => Some((Owner::Embedding, rows)),
            _ => own.map(|rows| (Owner::Own, rows)),
        }
    }

    fn tie(&self, spec: &Spec) -> Result<Option<Tie>> {
        if !(self.ensure_weight_tying && spec.tied && spec.output_embedding.is_some()) {
            return Ok(None);
        }
        let known =
            |entry: &String| EMBEDDINGS.contains(&entry.rsplit('.').next().unwrap_or(entry));
        if self.modules_to_save.iter().flatten().any(known) {
            return Ok(Some(Tie::Save));
        }
        let targeted = match &self.target_modules {
            Some(Names::List(list)) => list.iter().any(known),
            Some(Names::Regex(pattern)) => {
                let hits: Result<Vec<bool>> =
                    EMBEDDINGS.iter().map(|it| fullmatch(pattern, it)).collect();
                hits?.contains(&true)
            }
            None => false,
        };
        Ok(targeted.then_some(Tie::Target))
    }

    /// The names under which tied embeddings are saved: the input embedding stands for both.
    ///
    /// Python then takes the head out of the list. Where the input embedding has a name by which Python does not
    /// recognise it again (`wte`) the head stays, or the next reader would not tie them.
    fn name_tied(&mut self, spec: &Spec) -> Result<()> {
        let (Some(tie), Some(head)) = (self.tie(spec)?, &spec.output_embedding) else {
            return Ok(());
        };
        let input = &spec.input_embedding;
        let list = match tie {
            Tie::Save => self.modules_to_save.get_or_insert_default(),
            Tie::Target => match &mut self.target_modules {
                Some(Names::List(list)) => list,
                Some(Names::Regex(pattern)) => {
                    if !fullmatch(pattern, input)? {
                        *pattern = format!("(?:{pattern}|^{}$)", input.replace('.', r"\."));
                    }
                    return Ok(());
                }
                None => return Ok(()),
            },
        };
        if !list.contains(input) {
            list.push(input.clone());
        }
        if EMBEDDINGS.iter().any(|name| suffix_match(input, name)) {
            list.retain(|entry| !suffix_match(head, entry));
        }
        Ok(())
    }

    /// Everything filled in that only the model knows, and checked against it.
    pub(crate) fn resolved(&self, outline: &Outline) -> Result<LoraConfig> {
        let mut config = self.clone();
        if config.target_modules.is_none() {
            let kind = &outline.spec.model_type;
            let names = crate::tables::default_targets(kind).ok_or_else(|| {
                LoraConfig::fault(format!(
                    "there are no default targets for models of type `{kind}`; set target_modules"
                ))
            })?;
            config.target_modules =
                Some(Names::List(names.iter().map(|&it| it.to_owned()).collect()));
        }
        config.modules_to_save = with_heads(config.modules_to_save, &config.common, outline);
        config.name_tied(&outline.spec)?;
        config.target_modules = config.target_modules.map(|it| it.expand(outline));
        config.check_against(outline)?;
        let mut transposed = Vec::new();
        for site in &outline.sites {
            if site.kind == SiteKind::Linear && config.share(site, outline)?.lora.is_some() {
                transposed.push(site.transposed);
            }
        }
        if !transposed.is_empty() {
            config.fan_in_fan_out = transposed.contains(&true);
        }
        Ok(config)
    }

    fn check_against(&self, outline: &Outline) -> Result<()> {
        self.check_targets(outline)?;
        self.selection().check_saved(outline)?;
        self.check_tokens(outline)?;
        for site in &outline.sites {
            let share = self.share(site, outline)?;
            if share.lora.is_some() {
                self.check_target(site, &share)?;
            }
            if share.save.is_some() && share.tokens.is_some() {
                return Err(LoraConfig::fault(format!(
                    "`{}` is in modules_to_save and in trainable_token_indices; it can be trained whole or by rows",
                    site.at
                )));
            }
        }
        Ok(())
    }

    /// Only one adapter can train a bias: as Python has it.
    pub(crate) fn check_bias(&self, site: &Site, share: &Share<'_>) -> Result<()> {
        let taken = site.held.iter().any(|held| BIASES.contains(&held.as_str()));
        if share.bias && taken {
            return Err(LoraConfig::fault(format!(
                "bias is not `none`, but another adapter trains the bias of `{}` already; only one can",
                site.at
            )));
        }
        Ok(())
    }

    fn check_target(&self, site: &Site, share: &Share<'_>) -> Result<()> {
        let at = &site.at;
        if site.kind == SiteKind::Embedding && self.lora_bias {
            return Err(LoraConfig::fault(format!(
                "lora_bias does not go with an embedding such as `{at}`"
            )));
        }
        if share.lora == Some(Owner::Embedding) && self.use_dora {
            let reason = "use_dora does not go with target embeddings that ensure_weight_tying ties: their norms differ";
            return Err(LoraConfig::fault(reason));
        }
        let (r, _) = self.rank_and_scale(at)?;
        if site.kind == SiteKind::Conv {
            return self.check_conv(site, r);
        }
        let limit = site.shape.iter().copied().min().unwrap_or(0);
        let of_base = matches!(
            self.init_lora_weights,
            Init::Pissa | Init::PissaFast(_) | Init::Olora
        );
        if of_base && site.kind == SiteKind::Linear && r > limit {
            return Err(LoraConfig::fault(format!(
                "rank {r} at `{at}` is above {limit}, all that the singular directions of a weight {:?} can fill",
                site.shape
            )));
        }
        Ok(())
    }

    fn check_conv(&self, site: &Site, r: i64) -> Result<()> {
        let (at, groups) = (&site.at, site.groups);
        let init = self.init_lora_weights;
        if !matches!(init, Init::Kaiming | Init::Random | Init::Gaussian) {
            let init = serde_json::to_value(init).unwrap_or_default();
            return Err(LoraConfig::fault(format!(
                "init_lora_weights {init} does not go with a convolution such as `{at}`; true, false and `gaussian` do"
            )));
        }
        if r % groups != 0 {
            return Err(LoraConfig::fault(format!(
                "rank {r} at `{at}` is no multiple of the {groups} groups of this convolution; rank_pattern can give it another"
            )));
        }
        if self.use_dora && groups > 1 {
            return Err(LoraConfig::fault(format!(
                "use_dora does not go with the {groups} groups of the convolution `{at}`: its update has no norm as a weight"
            )));
        }
        Ok(())
    }

    fn check_targets(&self, outline: &Outline) -> Result<()> {
        let selection = self.selection();
        for site in &outline.sites {
            let norm = site.kind == SiteKind::Norm && !selection.saves(&site.at);
            if norm && selection.targets(&site.at)? {
                let reason = "is a norm; LoRA goes on linear layers, convolutions and embeddings, norms into modules_to_save";
                return Err(LoraConfig::fault(format!(
                    "target_modules names `{}`, which {reason}",
                    site.at
                )));
            }
        }
        // A tied head may be adapted without being a target.
        for site in &outline.sites {
            if self.share(site, outline)?.lora.is_some() {
                return Ok(());
            }
        }
        selection.check_targets(outline, &fits)
    }

    fn check_tokens(&self, outline: &Outline) -> Result<()> {
        if let Some(Tokens::At(places)) = &self.trainable_token_indices {
            for name in places.keys() {
                if !outline
                    .sites
                    .iter()
                    .any(|site| site.at.ends_with(name.as_str()))
                {
                    return Err(Error::NoTarget {
                        what: format!("trainable_token_indices `{name}`"),
                        examples: closest(name, outline.sites.iter().map(|it| it.at.as_str()), 4),
                    });
                }
            }
        }
        for site in &outline.sites {
            let Some((owner, rows)) = self.tokens(&site.at, &outline.spec) else {
                continue;
            };
            let fault = |why: String| {
                let at = &site.at;
                Err(LoraConfig::fault(format!(
                    "trainable_token_indices at `{at}`: {why}"
                )))
            };
            if !matches!(site.kind, SiteKind::Linear | SiteKind::Embedding) {
                return fault("it is no table and has no rows".to_owned());
            }
            let vocab = site.shape[0];
            if let Some(row) = rows.iter().find(|row| !(0..vocab).contains(*row)) {
                return fault(format!("{row} is not a token; it has 0 to {}", vocab - 1));
            }
            let mut sorted = rows.to_vec();
            sorted.sort_unstable();
            if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
                return fault(format!("{} is there twice", twice[0]));
            }
            if rows.is_empty() {
                return fault("no rows are named".to_owned());
            }
            let head = outline.spec.output_embedding.as_deref() == Some(site.at.as_str());
            if head && outline.spec.tied && owner == Owner::Own && self.ensure_weight_tying {
                let shared = self.tokens(&outline.spec.input_embedding, &outline.spec);
                if shared.is_some() {
                    return fault("other rows than those of the input embedding, which ensure_weight_tying ties it to".to_owned());
                }
            }
        }
        Ok(())
    }

    /// That each pattern gives a target its rank or its alpha. Python takes one that does not for nothing.
    pub(crate) fn check_patterns(&self, outline: &Outline) -> Result<()> {
        let mut targets = Vec::new();
        for site in &outline.sites {
            if self.share(site, outline)?.lora.is_some() {
                targets.push(site.at.as_str());
            }
        }
        let ranks = self.rank_pattern.keys().map(|key| ("rank_pattern", key));
        let alphas = self.alpha_pattern.keys().map(|key| ("alpha_pattern", key));
        for (setting, key) in ranks.chain(alphas) {
            let pattern = Pattern::new(&format!(r"\A(?:.*\.)?(?:{key})\z"), key)?;
            let hits: Result<Vec<bool>> = targets.iter().map(|at| pattern.is_match(at)).collect();
            if !hits?.contains(&true) {
                return Err(LoraConfig::fault(format!(
                    "{setting} `{key}` matches none of the {} targets{}",
                    targets.len(),
                    nearest(key, targets.iter().copied())
                )));
            }
        }
        Ok(())
    }
}

/// Whether LoRA can go on a place.
fn fits(site: &Site) -> bool {
    matches!(
        site.kind,
        SiteKind::Linear | SiteKind::Embedding | SiteKind::Conv
    )
}
