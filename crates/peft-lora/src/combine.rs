//! Several LoRAs made into one: what Python calls `add_weighted_adapter`, on adapters as they lie in folders.
//!
//! With ΔWᵢ = sᵢ Bᵢ Aᵢ the update of adapter i and wᵢ its weight, place by place:
//!
//! ```text
//! cat       A = [w₁s₁A₁; w₂s₂A₂; …]   B = [B₁ B₂ …]         BA = Σ wᵢ ΔWᵢ, rank Σ rᵢ
//! svd       BA = nearest of rank r to Σ wᵢ ΔWᵢ
//! …_svd     BA = nearest of rank r to merged(ΔWᵢ, wᵢ)
//! others    A = merged(Aᵢ, ±√|wᵢsᵢ|)   B = merged(Bᵢ, √|wᵢsᵢ|)   the sign of wᵢsᵢ on A alone
//! ```
//!
//! `merged` is one of [`task_vectors`]: the weighted sum (`linear`, `dare_linear`, `magnitude_prune`) or
//! the disjoint merge (`ties`, `dare_ties`), of tensors that are pruned first by magnitude (`ties`, `magnitude_prune`)
//! or by chance (`dare_…`).
//!
//! Only `cat`, and `svd` at a rank that suffices, give the sum of the updates. The types that merge A and B apart
//! are cheap and keep the rank, but their product has cross terms: for `linear`
//! BA = Σᵢ Σⱼ ±√|wᵢsᵢwⱼsⱼ| BᵢAⱼ, of which only the terms with i = j are wanted. For one adapter it is exact.
//!
//! The result is plain LoRA: α = r and no patterns, so that its scale is 1 and the factors alone say what it does. A place
//! with a smaller rank is filled up with zeros. What trains for one adapter alone (dropout, task) is taken from the first.
//!
//! # Where this differs from Python
//!
//! | Python | here | under [`Rules::Peft`] |
//! | --- | --- | --- |
//! | copies `use_rslora`, so that the result is scaled by √r | scale 1 | as Python |
//! | a single adapter is `linear`, whatever is asked for | what is asked for | as Python |
//! | up to 0.20, the `svd` family multiplies with sᵢ twice | once | once; twice under [`Rules::Peft020`] |
//! | signs of singular vectors (for `svd_clamp`) as LAPACK gives them | the largest entry of each column of U is positive | as Python |
//! | where the quantile of `svd_clamp` is negative, every entry becomes it | 0 | as Python |
//! | a block that the first adapter's `layers_to_transform` leaves out is lost | kept | kept |
//! | a trained whole module becomes the base's again | taken over, or refused | the same |
//! | DoRA, `lora_bias`, trained biases and tokens: wrong or lost | refused by name | the same |
//! | DARE draws from torch's generator | from `seed`, place by place | the same |
//!
//! Python's `svd_full_matrices` and `svd_driver` choose how the decomposition is computed, not what it is; they have no counterpart.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    str::FromStr,
};

use indexmap::IndexMap;
use peft_core::{Adapter, Error, Names, Result, State, Tuner, nearest, parse};
use tch::{Kind, Tensor};

use crate::{
    Bias, Init, LoraConfig, embedding, lora,
    low_rank::{Svd, is_finite, padded},
    task_vectors::{
        MajoritySign, disjoint_merge, elect_sign, prune_magnitude, prune_random, weighted,
        weighted_sum,
    },
};

/// How adapters are combined. [`Combination::of`] has Python's defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Combination {
    /// The type.
    pub combination_type: CombinationType,
    /// Rank of the result, for the types with a decomposition; otherwise the largest of the adapters.
    pub svd_rank: Option<i64>,
    /// Entries of both factors are cut off at ± this quantile of them (0.5 to 1), after a decomposition.
    pub svd_clamp: Option<f64>,
    /// The share of entries that stays, for the types that prune.
    pub density: Option<f64>,
    /// How the sign is elected, for the types with `ties`; otherwise `total`.
    pub majority_sign_method: Option<MajoritySign>,
    /// What DARE draws from.
    pub seed: u64,
    /// Whose mathematics.
    pub rules: Rules,
}

impl Combination {
    /// A type, and everything else as Python has it by default.
    pub fn of(combination_type: CombinationType) -> Combination {
        Combination {
            combination_type,
            svd_rank: None,
            svd_clamp: None,
            density: None,
            majority_sign_method: None,
            seed: 0,
            rules: Rules::Exact,
        }
    }

    /// Refuses what is out of range, what is missing, and what the type would not look at.
    fn check(&self) -> Result<()> {
        let of = self.combination_type;
        let must = |fine: bool, reason: String| match fine {
            true => Ok(()),
            false => Err(LoraConfig::fault(reason)),
        };
        let unused = |there: bool, setting: &str, takers: &str| {
            let reason = format!("combination_type `{of}` has no use for {setting}; {takers} has");
            must(!there, reason)
        };
        if !of.decomposes() {
            unused(self.svd_rank.is_some(), "svd_rank", "any type with `svd`")?;
            unused(self.svd_clamp.is_some(), "svd_clamp", "any type with `svd`")?;
        }
        if !of.elects() {
            let set = self.majority_sign_method.is_some();
            unused(set, "majority_sign_method", "any type with `ties`")?;
        }
        if let Some(r) = self.svd_rank {
            let reason = format!("svd_rank {r} is not in 1..=65536");
            must((1..=65536).contains(&r), reason)?;
        }
        if let Some(clamp) = self.svd_clamp {
            let reason = format!("svd_clamp {clamp} is a quantile and not in 0.5..=1");
            must((0.5..=1.0).contains(&clamp), reason)?;
        }
        match (of.prunes(), self.density) {
            (None, density) => unused(
                density.is_some(),
                "density",
                "any type with `ties`, `dare` or `prune`",
            ),
            (Some(_), None) => must(
                false,
                format!("combination_type `{of}` wants a density, the share of entries that stays"),
            ),
            (Some(Pruning::Magnitude), Some(density)) => must(
                (0.0..=1.0).contains(&density),
                format!("density {density} is a share and not in 0..=1"),
            ),
            (Some(Pruning::Random), Some(density)) => must(
                density > 0.0 && density <= 1.0,
                format!(
                    "density {density} is not above 0 and at most 1; what stays is divided by it"
                ),
            ),
        }
    }
}

impl Default for Combination {
    fn default() -> Combination {
        Combination::of(CombinationType::Svd)
    }
}

/// Whose mathematics a combination follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rules {
    /// The result does what the formulas say, at scale 1.
    #[default]
    Exact,
    /// As Python's `peft` 0.21 computes it.
    Peft,
    /// As Python's `peft` up to 0.20 computes it.
    Peft020,
}

/// What Python calls `combination_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CombinationType {
    /// `linear`
    Linear,
    /// `cat`
    Cat,
    /// `svd`
    Svd,
    /// `ties`
    Ties,
    /// `ties_svd`
    TiesSvd,
    /// `dare_linear`
    DareLinear,
    /// `dare_linear_svd`
    DareLinearSvd,
    /// `dare_ties`
    DareTies,
    /// `dare_ties_svd`
    DareTiesSvd,
    /// `magnitude_prune`
    MagnitudePrune,
    /// `magnitude_prune_svd`
    MagnitudePruneSvd,
}

/// Which entries go before tensors are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pruning {
    Magnitude,
    Random,
}

impl CombinationType {
    /// Every type with its name.
    pub const ALL: [(&'static str, CombinationType); 11] = [
        ("linear", CombinationType::Linear),
        ("cat", CombinationType::Cat),
        ("svd", CombinationType::Svd),
        ("ties", CombinationType::Ties),
        ("ties_svd", CombinationType::TiesSvd),
        ("dare_linear", CombinationType::DareLinear),
        ("dare_linear_svd", CombinationType::DareLinearSvd),
        ("dare_ties", CombinationType::DareTies),
        ("dare_ties_svd", CombinationType::DareTiesSvd),
        ("magnitude_prune", CombinationType::MagnitudePrune),
        ("magnitude_prune_svd", CombinationType::MagnitudePruneSvd),
    ];

    fn decomposes(self) -> bool {
        use CombinationType::*;
        matches!(
            self,
            Svd | TiesSvd | DareLinearSvd | DareTiesSvd | MagnitudePruneSvd
        )
    }

    fn elects(self) -> bool {
        use CombinationType::*;
        matches!(self, Ties | TiesSvd | DareTies | DareTiesSvd)
    }

    fn prunes(self) -> Option<Pruning> {
        use CombinationType::*;
        match self {
            Linear | Cat | Svd => None,
            Ties | TiesSvd | MagnitudePrune | MagnitudePruneSvd => Some(Pruning::Magnitude),
            DareLinear | DareLinearSvd | DareTies | DareTiesSvd => Some(Pruning::Random),
        }
    }
}

impl fmt::Display for CombinationType {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = CombinationType::ALL.iter().find(|(_, it)| it == self);
        to.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for CombinationType {
    type Err = Error;

    fn from_str(word: &str) -> Result<CombinationType> {
        let names = CombinationType::ALL.map(|(name, _)| name);
        let found = CombinationType::ALL.iter().find(|(name, _)| *name == word);
        found.map(|(_, it)| *it).ok_or_else(|| {
            let hint = nearest(word, names);
            LoraConfig::fault(format!(
                "unknown combination_type `{word}`, there are {names:?}{hint}"
            ))
        })
    }
}

/// One LoRA that does what several do together, each times its weight.
///
/// The adapters must be plain LoRAs for one base; a place that only some have is theirs alone. An adapter with a whole
/// module (`modules_to_save`) gives it to the result if it is the only one and its weight is 1.
///
/// ```
/// use peft_core::{Adapter, Registry};
/// use peft_lora::{Combination, CombinationType, LoraConfig, combine};
/// # fn main() -> peft_core::Result<()> {
/// # let folder = std::env::temp_dir().join("peft-lora-combine");
/// # let lora = LoraConfig { r: 3, lora_alpha: 7.0, ..LoraConfig::on(["q_proj"]) };
/// # let state = [("lora_A", [3, 5]), ("lora_B", [4, 3])].map(|(name, size)| {
/// #     (format!("base_model.model.q_proj.{name}.weight"), tch::Tensor::randn(size, (tch::Kind::Float, tch::Device::Cpu)))
/// # });
/// # let made = Adapter { tuner: Box::new(lora), state: state.into(), trained: [].into(), source: "made".into() };
/// # for name in ["poems", "recipes"] { made.save(&folder.join(name))?; }
/// let registry = Registry::default().with::<LoraConfig>();
/// let poems = Adapter::load(&folder.join("poems"), &registry)?;
/// let recipes = Adapter::load(&folder.join("recipes"), &registry)?;
/// let both = combine(&[(&poems, 0.7), (&recipes, 0.3)], &Combination::of(CombinationType::Cat))?;
/// both.save(&folder.join("both"))?;
/// # Ok(()) }
/// ```
pub fn combine(adapters: &[(&Adapter, f64)], how: &Combination) -> Result<Adapter> {
    how.check()?;
    if adapters.is_empty() {
        return Err(LoraConfig::fault("there are no adapters to combine"));
    }
    let mut parts = Vec::new();
    for (number, (adapter, weight)) in (1..).zip(adapters) {
        parts.push(Part::read(number, adapter, *weight)?);
    }
    tch::no_grad(|| combined(&parts, how))
}

fn combined(parts: &[Part], how: &Combination) -> Result<Adapter> {
    let python = how.rules != Rules::Exact;
    let of = match python && parts.len() == 1 {
        true => CombinationType::Linear,
        false => how.combination_type,
    };
    let config = configuration(parts, python)?;
    let ranks = parts.iter().map(|it| it.rank(python));
    let rank = match (of, how.svd_rank) {
        (it, Some(r)) if it.decomposes() => r,
        (CombinationType::Cat, _) => ranks.sum(),
        _ => ranks.max().unwrap_or(1),
    };
    let places: BTreeSet<&str> = parts.iter().flat_map(Part::places).collect();
    let mut made: BTreeMap<&str, Pair> = BTreeMap::new();
    for at in places {
        let terms = terms(parts, at)?;
        let (a, b) = match of {
            CombinationType::Cat => cat(&terms),
            CombinationType::Svd => decomposed(&svd(&terms, how)?, rank, how),
            _ if of.decomposes() => {
                let whole = merged(&terms, at, of, how, &|it| it.delta(), &|it| it.again(how));
                decomposed(&directed(Svd::of(&whole)?, how), rank, how)
            }
            _ => apart(&terms, at, of, how)?,
        };
        let finite = [&a, &b].iter().all(|it| is_finite(it));
        if !finite {
            return Err(LoraConfig::fault(format!(
                "the combination at `{at}` is not finite"
            )));
        }
        made.insert(
            at,
            Pair {
                a,
                b,
                ..terms[0].pair.like()
            },
        );
    }
    let mut state = State::new();
    for (at, pair) in &made {
        pair.write(&config, at, rank, &mut state);
    }
    let turned: BTreeMap<&str, &str> = parts.iter().flat_map(Part::turned).collect();
    for (head, table) in turned {
        made[table].turned().write(&config, head, rank, &mut state);
    }
    for part in parts {
        let rest = part.whole.iter().chain(&part.copies);
        state.extend(rest.map(|(key, it)| (key.clone(), it.shallow_clone())));
    }
    Ok(Adapter {
        tuner: Box::new(LoraConfig {
            r: rank,
            lora_alpha: rank as f64,
            ..config
        }),
        state,
        trained: State::new(),
        source: PathBuf::from("the combination"),
    })
}

/// One adapter, taken apart.
#[derive(Debug)]
struct Part {
    /// For messages: `adapter 2 (folder/adapter_model.safetensors)`.
    label: String,
    weight: f64,
    config: LoraConfig,
    /// The factors by place.
    pairs: BTreeMap<String, Pair>,
    /// Heads whose factors are those of a table, turned: head, table.
    tied: BTreeMap<String, String>,
    /// Whole modules by key.
    whole: State,
    /// Copies of the base's own embeddings, which Python writes beside an adapter over one.
    copies: State,
}

impl Part {
    fn read(number: usize, adapter: &Adapter, weight: f64) -> Result<Part> {
        let label = format!("adapter {number} ({})", adapter.source.display());
        if !weight.is_finite() {
            let reason = format!("the weight {weight} of {label} is not finite");
            return Err(LoraConfig::fault(reason));
        }
        let config = plain_config(&label, adapter)?;
        let mut part = Part {
            label,
            weight,
            config,
            pairs: BTreeMap::new(),
            tied: BTreeMap::new(),
            whole: State::new(),
            copies: State::new(),
        };
        let mut found: BTreeMap<(String, Form), [Option<&Tensor>; 2]> = BTreeMap::new();
        for (key, tensor) in &adapter.state {
            if !is_finite(tensor) {
                let reason = format!("`{key}` is not finite");
                return Err(Error::file(&adapter.source, reason));
            }
            match Form::of(key) {
                Some((at, form, half)) => {
                    found.entry((at.to_owned(), form)).or_default()[half] = Some(tensor);
                }
                None => part.keep(adapter, key, tensor)?,
            }
        }
        for ((at, form), halves) in found {
            let pair = part.pair(adapter, &at, form, halves)?;
            part.pairs.insert(at, pair);
        }
        if part.pairs.is_empty() {
            return Err(Error::file(&adapter.source, "it has no factors to combine"));
        }
        part.tie();
        Ok(part)
    }

    /// What is no factor.
    fn keep(&mut self, adapter: &Adapter, key: &str, tensor: &Tensor) -> Result<()> {
        let at = key.strip_prefix(PREFIX).and_then(|it| it.rsplit_once('.'));
        let tables = || adapter.state.keys().any(|key| key.ends_with(embedding::A));
        let to = match at {
            Some((at, _)) if self.config.selection().saves(at) => &mut self.whole,
            Some((_, "weight")) if tables() => &mut self.copies,
            _ => {
                return Err(Error::Unexpected {
                    place: self.label.clone(),
                    count: 1,
                    key: key.to_owned(),
                    hint: String::new(),
                });
            }
        };
        to.insert(key.to_owned(), tensor.shallow_clone());
        Ok(())
    }

    fn pair(
        &self,
        adapter: &Adapter,
        at: &str,
        form: Form,
        halves: [Option<&Tensor>; 2],
    ) -> Result<Pair> {
        let keys = form.names().map(|name| self.config.key(at, name));
        let half = |i: usize| {
            halves[i].ok_or_else(|| Error::Missing {
                place: self.label.clone(),
                key: keys[i].clone(),
                hint: nearest(&keys[i], adapter.state.keys().map(String::as_str)),
            })
        };
        let (a, b) = (half(0)?, half(1)?);
        let (r, scale) = self.config.rank_and_scale(at)?;
        if let &[_, share, _, ..] = b.size().as_slice()
            && share > 0
            && share < r
            && r % share == 0
        {
            return Err(LoraConfig::fault(format!(
                "`{at}` in {} is a convolution of {} groups; its factors are no product, and cannot be combined",
                self.label,
                r / share
            )));
        }
        let fits = |i: usize, t: &Tensor, dim: usize| {
            let mut expected = t.size();
            if expected.len() < 2 {
                expected = vec![0, 0];
            }
            expected[dim] = r;
            match t.size() == expected {
                true => Ok(()),
                false => Err(Error::Shape {
                    key: format!("{} of {}", keys[i], self.label),
                    expected,
                    got: t.size(),
                }),
            }
        };
        fits(0, a, 0)?;
        fits(1, b, 1)?;
        Ok(Pair {
            a: a.to_kind(Kind::Double).flatten(1, -1),
            b: b.to_kind(Kind::Double).flatten(1, -1),
            scale,
            form,
            inner: a.size()[1..].to_vec(),
            outer: b.size()[2..].to_vec(),
        })
    }

    /// Sets the heads aside that only repeat the factors of a table, as `ensure_weight_tying` writes them.
    fn tie(&mut self) {
        if !self.config.ensure_weight_tying {
            return;
        }
        let tables = self.pairs.iter().filter(|(_, it)| it.form == Form::Table);
        let turned: Vec<(String, Pair)> =
            tables.map(|(at, it)| (at.clone(), it.turned())).collect();
        for (table, turned) in turned {
            let same = |it: &Pair| {
                it.form == Form::Layer
                    && it.a.size() == turned.a.size()
                    && it.b.size() == turned.b.size()
                    && it.a.equal(&turned.a)
                    && it.b.equal(&turned.b)
            };
            let heads = self.pairs.iter().filter(|(_, it)| same(it));
            let heads: Vec<String> = heads.map(|(at, _)| at.clone()).collect();
            for head in heads {
                self.pairs.remove(&head);
                self.tied.insert(head, table.clone());
            }
        }
    }

    fn places(&self) -> impl Iterator<Item = &str> {
        self.pairs.keys().map(String::as_str)
    }

    fn turned(&self) -> impl Iterator<Item = (&str, &str)> {
        self.tied.iter().map(|(a, b)| (a.as_str(), b.as_str()))
    }

    /// The largest rank that occurs; for Python, the largest that the configuration names.
    fn rank(&self, python: bool) -> i64 {
        let named = self.config.rank_pattern.values().copied().max();
        let there = self.pairs.values().map(|it| it.a.size()[0]).max();
        match python {
            true => named.unwrap_or(0).max(self.config.r),
            false => there.unwrap_or(1),
        }
    }
}

/// The configuration of an adapter that has nothing but factors and whole modules, or an error that names what it has.
fn plain_config(label: &str, adapter: &Adapter) -> Result<LoraConfig> {
    let tag = adapter.tuner.peft_type();
    let fault = |reason: String| Err(LoraConfig::fault(format!("{label} {reason}")));
    if tag != adapter_type() {
        return fault(format!(
            "is of peft_type `{tag}`; only LoRAs can be combined"
        ));
    }
    let config: LoraConfig = parse(adapter.tuner.to_json())?;
    let refused = |setting: &str, why: &str| fault(format!("sets {setting}, and {why}"));
    if config.use_dora {
        return refused(
            "use_dora",
            "magnitudes have no weighted sum; merge it, or convert it to plain LoRA",
        );
    }
    if config.lora_bias {
        return refused("lora_bias", "the biases of B have no place in the result");
    }
    if config.bias != Bias::None {
        return refused(
            "bias",
            "a trained bias has no weighted sum without the base",
        );
    }
    if config.trainable_token_indices.is_some() {
        let why = "trained rows have no weighted sum without the base";
        return refused("trainable_token_indices", why);
    }
    if matches!(
        config.init_lora_weights,
        Init::Pissa | Init::PissaFast(_) | Init::Olora
    ) {
        let why = "its factors mean something beside a changed base only; load it onto its base and save it again, which makes it plain LoRA";
        return refused("init_lora_weights to one that takes from the base", why);
    }
    Ok(config)
}

fn adapter_type() -> &'static str {
    <LoraConfig as peft_core::Config>::PEFT_TYPE
}

/// What Python puts before the name of every place.
const PREFIX: &str = "base_model.model.";

/// Which of the two kinds of place factors belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Form {
    /// A layer.
    Layer,
    /// An embedding table.
    Table,
}

impl Form {
    /// The names of A and B below a place.
    fn names(self) -> [&'static str; 2] {
        match self {
            Form::Layer => [lora::A, lora::B],
            Form::Table => [embedding::A, embedding::B],
        }
    }

    /// The place that a key belongs to, and whether it is A (0) or B (1).
    fn of(key: &str) -> Option<(&str, Form, usize)> {
        let key = key.strip_prefix(PREFIX)?;
        let forms = [Form::Layer, Form::Table].into_iter();
        let mut names =
            forms.flat_map(|form| (0..).zip(form.names()).map(move |(i, it)| (form, i, it)));
        names.find_map(|(form, half, name)| {
            let at = key.strip_suffix(name)?.strip_suffix('.')?;
            Some((at, form, half))
        })
    }
}

/// The factors of one place, in double precision.
#[derive(Debug)]
struct Pair {
    /// `[r, n]`
    a: Tensor,
    /// `[m, r]`
    b: Tensor,
    /// s
    scale: f64,
    form: Form,
    /// A without its first dimension, on disk: more than one for a convolution, whose kernel is flattened here.
    inner: Vec<i64>,
    /// What follows the first two dimensions of B on disk.
    outer: Vec<i64>,
}

impl Pair {
    /// Of the same place, with nothing in it.
    fn like(&self) -> Pair {
        Pair {
            a: Tensor::new(),
            b: Tensor::new(),
            scale: 1.0,
            form: self.form,
            inner: self.inner.clone(),
            outer: self.outer.clone(),
        }
    }

    /// The factors of a head that shares the table: its A is Bᵀ, its B Aᵀ.
    fn turned(&self) -> Pair {
        Pair {
            a: self.b.tr(),
            b: self.a.tr(),
            form: Form::Layer,
            inner: vec![self.b.size()[0]],
            outer: Vec::new(),
            scale: self.scale,
        }
    }

    /// Adds the factors to a file, as fp32 and filled up to rank r.
    fn write(&self, config: &LoraConfig, at: &str, r: i64, to: &mut State) {
        let (a, b) = padded(&self.a, &self.b, r);
        let shapes = [
            [&[r][..], &self.inner].concat(),
            [&[b.size()[0], r][..], &self.outer].concat(),
        ];
        for ((name, tensor), shape) in self.form.names().iter().zip([a, b]).zip(shapes) {
            let tensor = tensor.to_kind(Kind::Float).reshape(shape).contiguous();
            to.insert(config.key(at, name), tensor);
        }
    }
}

/// One adapter's share at one place.
#[derive(Debug)]
struct Term<'a> {
    pair: &'a Pair,
    /// Which adapter, for the draws of DARE.
    number: u64,
    /// wᵢ
    weight: f64,
}

impl Term<'_> {
    /// wᵢ sᵢ
    fn scaled(&self) -> f64 {
        self.weight * self.pair.scale
    }

    /// The weight of ΔWᵢ.
    fn again(&self, how: &Combination) -> f64 {
        match how.rules {
            Rules::Peft020 => self.scaled(),
            Rules::Exact | Rules::Peft => self.weight,
        }
    }

    /// ΔWᵢ `[m, n]`
    fn delta(&self) -> Tensor {
        self.pair.b.matmul(&self.pair.a) * self.pair.scale
    }
}

/// The adapters that have this place, of one width and one kind.
fn terms<'a>(parts: &'a [Part], at: &str) -> Result<Vec<Term<'a>>> {
    let there = (0..).zip(parts).filter_map(|(number, part)| {
        let pair = part.pairs.get(at)?;
        Some((
            part,
            Term {
                pair,
                number,
                weight: part.weight,
            },
        ))
    });
    let mut terms: Vec<Term> = Vec::new();
    let mut first: Option<&Part> = None;
    for (part, term) in there {
        let (known, pair) = (terms.first().map_or(term.pair, |it| it.pair), term.pair);
        let label = first.get_or_insert(part);
        if known.form != pair.form {
            return Err(LoraConfig::fault(format!(
                "`{at}` is a table for one of {} and {} and a layer for the other",
                label.label, part.label
            )));
        }
        let keys = pair.form.names().map(|name| part.config.key(at, name));
        let against = |key: &str, expected: Vec<i64>, got: Vec<i64>| match expected == got {
            true => Ok(()),
            false => Err(Error::Shape {
                key: format!(
                    "{key} of {}, of the width that {} has",
                    part.label, label.label
                ),
                expected,
                got,
            }),
        };
        let r = pair.a.size()[0];
        let shape_a = |inner: &[i64]| [&[r][..], inner].concat();
        let shape_b = |it: &Pair| [&[it.b.size()[0], r][..], &it.outer].concat();
        against(&keys[0], shape_a(&known.inner), shape_a(&pair.inner))?;
        against(&keys[1], shape_b(known), shape_b(pair))?;
        terms.push(term);
    }
    Ok(terms)
}

/// A = [c₁A₁; c₂A₂; …] and B = [B₁ B₂ …] with c = ws.
fn cat(terms: &[Term]) -> (Tensor, Tensor) {
    stacked(terms, &|it| it.scaled())
}

fn stacked(terms: &[Term], scale: &dyn Fn(&Term) -> f64) -> (Tensor, Tensor) {
    let a: Vec<Tensor> = terms.iter().map(|it| &it.pair.a * scale(it)).collect();
    let b: Vec<&Tensor> = terms.iter().map(|it| &it.pair.b).collect();
    (Tensor::cat(&a, 0), Tensor::cat(&b, 1))
}

/// Σ wᵢ ΔWᵢ, decomposed.
fn svd(terms: &[Term], how: &Combination) -> Result<Svd> {
    let (a, b) = stacked(terms, &|it| it.again(how) * it.pair.scale);
    match how.rules {
        Rules::Exact => Ok(Svd::of_product(&b, &a)?.upright()),
        Rules::Peft | Rules::Peft020 => Svd::of(&b.matmul(&a)),
    }
}

fn directed(svd: Svd, how: &Combination) -> Svd {
    match how.rules {
        Rules::Exact => svd.upright(),
        Rules::Peft | Rules::Peft020 => svd,
    }
}

/// A = Vᵣᵀ and B = Uᵣ Sᵣ, clamped if asked for; what fills them up to rank r is nothing that a quantile counts.
fn decomposed(svd: &Svd, r: i64, how: &Combination) -> (Tensor, Tensor) {
    let (a, b) = svd.largest(r);
    let (a, b) = match how.svd_clamp {
        None => (a, b),
        Some(q) => {
            let bound = quantile(&Tensor::cat(&[a.flatten(0, -1), b.flatten(0, -1)], 0), q);
            let bound = match how.rules {
                Rules::Exact => bound.max(0.0),
                Rules::Peft | Rules::Peft020 => bound,
            };
            (a.clamp(-bound, bound), b.clamp(-bound, bound))
        }
    };
    padded(&a, &b, r)
}

/// The q-quantile, between two numbers in proportion.
fn quantile(numbers: &Tensor, q: f64) -> f64 {
    let (sorted, _) = numbers.sort(0, false);
    let at = q * (sorted.numel() - 1) as f64;
    let [low, high] = [at.floor(), at.ceil()].map(|i| sorted.double_value(&[i as i64]));
    low + (high - low) * (at - at.floor())
}

/// A and B merged each for itself.
fn apart(
    terms: &[Term],
    at: &str,
    of: CombinationType,
    how: &Combination,
) -> Result<(Tensor, Tensor)> {
    let root = |it: &Term| it.scaled().abs().sqrt();
    let signed = |it: &Term| match it.scaled() >= 0.0 {
        true => root(it),
        false => -root(it),
    };
    let ranks: Vec<i64> = terms.iter().map(|it| it.pair.a.size()[0]).collect();
    if ranks.iter().any(|r| *r != ranks[0]) {
        return Err(LoraConfig::fault(format!(
            "combination_type `{of}` wants equal ranks and at `{at}` they are {ranks:?}; `cat` and the types with `svd` take any"
        )));
    }
    let a = merged(
        terms,
        &format!("{at} A"),
        of,
        how,
        &|it| it.pair.a.shallow_clone(),
        &signed,
    );
    let b = merged(
        terms,
        &format!("{at} B"),
        of,
        how,
        &|it| it.pair.b.shallow_clone(),
        &root,
    );
    Ok((a, b))
}

/// The tensors of all terms pruned and merged as the type says.
fn merged(
    terms: &[Term],
    what: &str,
    of: CombinationType,
    how: &Combination,
    tensor: &dyn Fn(&Term) -> Tensor,
    weight: &dyn Fn(&Term) -> f64,
) -> Tensor {
    let density = how.density.unwrap_or(1.0);
    let pruned = |it: &Term| match of.prunes() {
        None => tensor(it),
        Some(Pruning::Magnitude) => prune_magnitude(&tensor(it), density),
        Some(Pruning::Random) => {
            prune_random(&tensor(it), density, seed(how.seed, what, it.number))
        }
    };
    let tasks: Vec<Tensor> = terms.iter().map(pruned).collect();
    let weights: Vec<f64> = terms.iter().map(weight).collect();
    match of.elects() {
        false => weighted_sum(&tasks, &weights),
        true => {
            let method = how.majority_sign_method.unwrap_or_default();
            let mask = elect_sign(&Tensor::stack(&tasks, 0), method);
            disjoint_merge(&weighted(&tasks, &weights), &mask)
        }
    }
}

/// A seed of its own for each tensor (FNV-1a), so that no draw depends on what else is combined.
fn seed(seed: u64, what: &str, number: u64) -> u64 {
    let bytes = [
        &seed.to_le_bytes()[..],
        what.as_bytes(),
        &number.to_le_bytes()[..],
    ]
    .concat();
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// The configuration of the result, but for its rank.
fn configuration(parts: &[Part], python: bool) -> Result<LoraConfig> {
    let first = &parts[0];
    let ties = |it: &Part| it.config.ensure_weight_tying;
    if let Some(other) = parts.iter().find(|it| ties(it) != ties(first)) {
        return Err(LoraConfig::fault(format!(
            "ensure_weight_tying is {} in {} and {} in {}; it must be the same",
            ties(first),
            first.label,
            ties(other),
            other.label
        )));
    }
    let mut config = LoraConfig {
        rank_pattern: IndexMap::new(),
        alpha_pattern: IndexMap::new(),
        use_rslora: python && first.config.use_rslora,
        init_lora_weights: Init::Kaiming,
        modules_to_save: whole_modules(parts)?,
        target_modules: Some(targets(parts)?),
        ..first.config.clone()
    };
    for part in parts {
        if let Some(at) = part.places().find(|at| config.selection().saves(at)) {
            return Err(LoraConfig::fault(format!(
                "`{at}` has factors in {}, and another adapter has it whole, in modules_to_save; the two cannot be combined",
                part.label
            )));
        }
    }
    // The first adapter's choice of blocks may leave out what another one has.
    let filters = |it: &Part| {
        let it = &it.config;
        (
            it.exclude_modules.clone(),
            it.layers_to_transform.clone(),
            it.layers_pattern.clone(),
        )
    };
    let mut same = parts.iter().all(|it| filters(it) == filters(first));
    for at in parts.iter().flat_map(Part::places) {
        same = same && config.selection().targets(at)?;
    }
    if !same {
        let places: BTreeSet<&str> = parts.iter().flat_map(Part::places).collect();
        config.target_modules = Some(Names::List(places.into_iter().map(str::to_owned).collect()));
        (
            config.exclude_modules,
            config.layers_to_transform,
            config.layers_pattern,
        ) = (None, None, None);
    }
    Ok(config)
}

/// The targets of all: lists put together, expressions as alternatives. A mix is refused, as in Python.
fn targets(parts: &[Part]) -> Result<Names> {
    let mut list: Vec<String> = Vec::new();
    let mut expressions: Vec<&str> = Vec::new();
    for part in parts {
        match &part.config.target_modules {
            Some(Names::List(names)) => {
                let fresh = names.iter().filter(|it| !list.contains(it));
                let fresh: Vec<String> = fresh.cloned().collect();
                list.extend(fresh);
            }
            Some(Names::Regex(text)) if expressions.contains(&text.as_str()) => {}
            Some(Names::Regex(text)) => expressions.push(text),
            None => {
                let reason = format!("{} does not say its target_modules", part.label);
                return Err(LoraConfig::fault(reason));
            }
        }
    }
    match (list.is_empty(), expressions.as_slice()) {
        (true, [one]) => Ok(Names::Regex((*one).to_owned())),
        (true, all) => {
            let all: Vec<String> = all.iter().map(|it| format!("({it})")).collect();
            Ok(Names::Regex(all.join("|")))
        }
        (false, []) => Ok(Names::List(list)),
        (false, [one, ..]) => Err(LoraConfig::fault(format!(
            "target_modules is a list in one adapter and the expression `{one}` in another; they cannot be combined"
        ))),
    }
}

/// The `modules_to_save` of all, of which each module may be in one adapter only.
fn whole_modules(parts: &[Part]) -> Result<Option<Vec<String>>> {
    let mut names: Option<Vec<String>> = None;
    let mut owners: BTreeMap<&str, &Part> = BTreeMap::new();
    let mut copies: BTreeMap<&str, (&Part, &Tensor)> = BTreeMap::new();
    for part in parts {
        for key in part.whole.keys() {
            let at = key.strip_prefix(PREFIX).unwrap_or(key);
            if let Some(other) = owners.insert(key, part) {
                return Err(LoraConfig::fault(format!(
                    "`{at}` is in modules_to_save of {} and of {}; whole modules cannot be combined",
                    other.label, part.label
                )));
            }
            if part.weight != 1.0 {
                return Err(LoraConfig::fault(format!(
                    "`{at}` is in modules_to_save of {}, whose weight is {}; a whole module can only be taken over as it is, with weight 1",
                    part.label, part.weight
                )));
            }
        }
        for (key, copy) in &part.copies {
            let (other, known) = *copies.entry(key).or_insert((part, copy));
            if known.size() != copy.size() || !known.equal(&copy.to_kind(known.kind())) {
                return Err(LoraConfig::fault(format!(
                    "`{key}` differs in {} and {}: they are for different bases",
                    other.label, part.label
                )));
            }
        }
        for name in part.config.modules_to_save.iter().flatten() {
            let names = names.get_or_insert_default();
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    Ok(names)
}
