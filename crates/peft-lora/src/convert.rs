//! Any adapter with a form as a weight, as plain LoRA: for runtimes that know nothing else.
//!
//! ```text
//! ΔW = W' − W          W' the layer with the adapter merged
//! ΔW = U S Vᵀ          B = Uᵣ Sᵣ   A = Vᵣᵀ   α = r
//! ```
//!
//! which is the nearest product of rank r (Eckart, Young). A fixed rank treats every layer alike; a share of the energy
//! gives each the smallest rank whose Σ S² reaches that share of the whole, and so more to those that changed more
//! than in a few directions. A layer that is LoRA already is taken over as it is, s in B, if the rank suffices, and cut
//! to size by its factors otherwise, without a decomposition of anything of the layer's size.
//!
//! W' − W is taken in fp32 whatever the base is kept in: a merged bf16 weight has lost most of a small update.
//!
//! What is no update of a layer or a table:
//!
//! - biases are carried exactly, as `bias` has them: `lora_only` where only layers with an update have a changed one, else `all`.
//!   A bias on a layer whose base has none has no such form: refused;
//! - whole modules (`modules_to_save`) stay whole;
//! - norms and virtual tokens have no form as LoRA: refused by name.

use std::path::PathBuf;

use indexmap::IndexMap;
use peft_core::{
    Adapter, BIASES, Common, Config, Conv, Embedding, Error, Linear, Model, ModelExt, Names, Norm,
    Outline, Params, Plain, Result, Slot, State, Tuner,
};
use tch::{Kind, Tensor};

use crate::{
    Bias, LoraConfig, embedding, lora,
    low_rank::{Svd, is_finite, padded},
};

/// The rank of a conversion.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rank {
    /// This one everywhere; less where a layer is LoRA of a smaller rank.
    Number(i64),
    /// For each layer the smallest that keeps this share of Σ S², above 0 and below 1.
    Energy(f64),
}

/// An adapter as LoRA, and how well.
#[derive(Debug)]
pub struct Converted {
    /// The LoRA, at scale 1.
    pub adapter: Adapter,
    /// What became of each layer, in the order of the model.
    pub layers: Vec<ConvertedLayer>,
}

/// One layer of a conversion.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvertedLayer {
    /// Its name.
    pub at: String,
    /// The rank it has got.
    pub rank: i64,
    /// ‖ΔW − BA‖ / ‖ΔW‖, by the sum of squares; 0 where ΔW is.
    pub error: f64,
}

/// The adapter called `name` as plain LoRA. The model is not touched, and nothing of it need be active.
///
/// `tuner` is the adapter's own: the base's name and the task are taken over from it.
///
/// ```
/// # use peft_core::*;
/// # use peft_lora::{LoraConfig, Rank, to_lora};
/// # use tch::{Device, Kind, Tensor};
/// # struct One(Linear);
/// # impl Model for One {
/// #     fn spec(&self) -> Spec { Spec::default() }
/// #     fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) { visit("up", Slot::Linear(&mut self.0)) }
/// # }
/// # let weight = Tensor::randn([9, 7], (Kind::Float, Device::Cpu));
/// # let mut model = One(Linear::new(Dense::new(weight, None)));
/// let dora = LoraConfig { use_dora: true, ..LoraConfig::on(["up"]) };
/// model.inject("style", &dora)?;
/// # for mut it in model.params("style") { tch::no_grad(|| { let _ = it.tensor.uniform_(0.5, 1.5); }) }
/// // … train …
/// let converted = to_lora(&mut model, "style", &dora, Rank::Energy(0.99))?;
/// for layer in &converted.layers {
///     println!("{}: rank {}, off by {:.1e}", layer.at, layer.rank, layer.error);
/// }
/// converted.adapter.save(&std::env::temp_dir().join("style-as-lora"))?;
/// # Ok::<(), Error>(())
/// ```
pub fn to_lora(
    model: &mut dyn Model,
    name: &str,
    tuner: &dyn Tuner,
    rank: Rank,
) -> Result<Converted> {
    match rank {
        Rank::Number(r) if !(1..=65536).contains(&r) => {
            let reason = format!("rank {r} of a conversion is not in 1..=65536");
            return Err(LoraConfig::fault(reason));
        }
        Rank::Energy(share) if !(share > 0.0 && share < 1.0) => {
            let reason = format!("the share {share} of a conversion is not between 0 and 1");
            return Err(LoraConfig::fault(reason));
        }
        _ => {}
    }
    model.known(name)?;
    if model.merged() {
        return Err(Error::Name {
            name: name.to_owned(),
            why: "adapters are merged into the base; unmerge first".to_owned(),
        });
    }
    let outline = model.outline();
    tch::no_grad(|| {
        let changes = Changes::read(model, name)?;
        changes.converted(name, tuner, &outline, rank)
    })
}

/// What an adapter does to a model, by place, in the order of the model.
#[derive(Debug, Default)]
struct Changes {
    updates: IndexMap<String, Update>,
    /// Every bias, as it is with the adapter.
    biases: IndexMap<String, NewBias>,
    /// Whole modules: place, name below it, value.
    whole: Vec<(String, &'static str, Tensor)>,
}

#[derive(Debug)]
struct NewBias {
    value: Tensor,
    changed: bool,
}

/// ΔW of one place `[m, n]`: `[out, in]` of a layer, `[out, in · kernel]` of a convolution, `[hidden, vocab]` of a table.
#[derive(Debug)]
struct Update {
    names: [&'static str; 2],
    size: (i64, i64),
    /// What A is behind its rank, on disk: more than one for a convolution, whose kernel is flattened here.
    inner: Vec<i64>,
    delta: Delta,
}

#[derive(Debug)]
enum Delta {
    /// A `[r, n]` and B `[m, r]`, the scale in B.
    Factors(Tensor, Tensor),
    Dense(Tensor),
    Zero,
}

const LAYER: [&str; 2] = [lora::A, lora::B];
const TABLE: [&str; 2] = [embedding::A, embedding::B];
/// The names of a module that is saved whole.
const WHOLE: [&str; 2] = ["weight", BIASES[0]];

impl Changes {
    fn read(model: &mut dyn Model, name: &str) -> Result<Changes> {
        let mut changes = Changes::default();
        let mut result = Ok(());
        model.slots(&mut |at, slot| {
            if result.is_ok() {
                result = match slot {
                    Slot::Linear(it) => changes.linear(at, it, name),
                    Slot::Embedding(it) => changes.embedding(at, it, name),
                    Slot::Conv(it) => changes.conv(at, it, name),
                    Slot::Norm(it) => changes.norm(at, it, name),
                    Slot::Prompt(it) => match it.adapters(name).next() {
                        Some(_) => Err(not("the input", "virtual tokens have no form as a weight")),
                        None => Ok(()),
                    },
                    _ => Err(not(at, "this kind of place is not known here")),
                };
            }
        });
        result.map(|()| changes)
    }

    fn linear(&mut self, at: &str, it: &Linear, name: &str) -> Result<()> {
        let base = it.base();
        let before = Plain {
            weight: base.weight(),
            bias: base.bias().map(Tensor::shallow_clone),
        };
        let held: Vec<State> = it.adapters(name).map(tensors).collect();
        self.layer(at, before, base.transposed(), &held, |start| {
            let mut all = it.adapters(name);
            all.try_fold(start, |p, it| it.merge(p, base))
        })
    }

    fn conv(&mut self, at: &str, it: &Conv, name: &str) -> Result<()> {
        let base = it.base();
        let before = Plain {
            weight: base.weight().shallow_clone(),
            bias: base.bias().map(Tensor::shallow_clone),
        };
        let held: Vec<State> = it.adapters(name).map(tensors).collect();
        self.layer(at, before, false, &held, |start| {
            let mut all = it.adapters(name);
            all.try_fold(start, |p, it| it.merge(p, base))
        })
    }

    /// A layer with a weight `[out, in, kernel…]`; `transposed`: on disk it is `[in, out]`.
    fn layer(
        &mut self,
        at: &str,
        base: Plain,
        transposed: bool,
        held: &[State],
        merge: impl Fn(Plain) -> Option<Plain>,
    ) -> Result<()> {
        if held.is_empty() {
            return self.bias(at, base.bias.as_ref(), base.bias.as_ref());
        }
        let after = |start: Plain| {
            let none = || not(at, "the method has no form as a weight here");
            merge(start).ok_or_else(none)
        };
        if held.iter().any(|it| it.contains_key(WHOLE[0])) {
            let Plain { weight, bias } = after(base)?;
            let weight = if transposed { weight.tr() } else { weight };
            self.whole.push((at.to_owned(), WHOLE[0], weight));
            let bias = bias.map(|it| (at.to_owned(), WHOLE[1], it));
            self.whole.extend(bias);
            return Ok(());
        }
        let before = Plain {
            weight: base.weight.to_kind(Kind::Float),
            bias: base.bias.as_ref().map(|it| it.to_kind(Kind::Float)),
        };
        let merged = after(before.clone())?;
        self.bias(at, base.bias.as_ref(), merged.bias.as_ref())?;
        let delta = merged.weight - &before.weight;
        let alone = || {
            let nothing = Plain {
                weight: before.weight.zeros_like(),
                bias: before.bias.as_ref().map(Tensor::zeros_like),
            };
            after(nothing).map(|it| it.weight)
        };
        self.update(at, LAYER, delta, held, alone)
    }

    fn embedding(&mut self, at: &str, it: &Embedding, name: &str) -> Result<()> {
        let base = it.weight();
        let held: Vec<State> = it.adapters(name).map(tensors).collect();
        if held.is_empty() {
            return Ok(());
        }
        let after = |start: Tensor| {
            let mut all = it.adapters(name);
            all.try_fold(start, |w, it| it.merge(w, base))
                .ok_or_else(|| not(at, "the method has no form as a table here"))
        };
        if held.iter().any(|it| it.contains_key(WHOLE[0])) {
            let table = after(base.shallow_clone())?;
            self.whole.push((at.to_owned(), WHOLE[0], table));
            return Ok(());
        }
        let before = base.to_kind(Kind::Float);
        let delta = after(before.shallow_clone())? - &before;
        let alone = || after(before.zeros_like()).map(|it| it.tr());
        self.update(at, TABLE, delta.tr(), &held, alone)
    }

    fn norm(&mut self, at: &str, it: &Norm, name: &str) -> Result<()> {
        let base = it.base();
        let after = it.adapters(name).fold(base.clone(), |a, it| it.affine(a));
        let wide = |it: &Tensor| it.to_kind(Kind::Float);
        if !wide(&after.weight).equal(&wide(&base.weight)) {
            return Err(not_lora(at, "is a norm whose weight the adapter changes"));
        }
        self.bias(at, base.bias.as_ref(), after.bias.as_ref())
    }

    fn bias(&mut self, at: &str, before: Option<&Tensor>, after: Option<&Tensor>) -> Result<()> {
        let (value, changed) = match (before, after) {
            (Some(before), Some(after)) => {
                let after = after.to_kind(before.kind());
                let changed = !after.equal(before);
                (after, changed)
            }
            (None, Some(after)) if after.count_nonzero(None).int64_value(&[]) != 0 => {
                return Err(not_lora(
                    at,
                    "gets a bias from the adapter, which its base does not have",
                ));
            }
            _ => return Ok(()),
        };
        self.biases
            .insert(at.to_owned(), NewBias { value, changed });
        Ok(())
    }

    /// delta: `[m, n, kernel…]`; `alone`: the same from adapters that are on nothing.
    fn update(
        &mut self,
        at: &str,
        names: [&'static str; 2],
        delta: Tensor,
        held: &[State],
        alone: impl Fn() -> Result<Tensor>,
    ) -> Result<()> {
        if !is_finite(&delta) {
            return Err(not(at, "the merged weight is not finite"));
        }
        let inner = delta.size()[1..].to_vec();
        let delta = delta.flatten(1, -1);
        let size = (delta.size()[0], delta.size()[1]);
        let delta = match factors(names, size, held, || Ok(alone()?.flatten(1, -1)))? {
            Some((a, b)) => Delta::Factors(a, b),
            None if delta.count_nonzero(None).int64_value(&[]) == 0 => Delta::Zero,
            None => Delta::Dense(delta),
        };
        let update = Update {
            names,
            size,
            inner,
            delta,
        };
        self.updates.insert(at.to_owned(), update);
        Ok(())
    }

    fn converted(
        mut self,
        name: &str,
        tuner: &dyn Tuner,
        outline: &Outline,
        rank: Rank,
    ) -> Result<Converted> {
        self.choose_targets();
        if self.updates.is_empty() {
            return Err(Error::Name {
                name: name.to_owned(),
                why: "it changes no layer, so that there is nothing for a LoRA to do".to_owned(),
            });
        }
        let mut config = self.configuration(tuner, outline)?;
        let mut state = self.parts_of_the_base(&config);
        let mut layers = Vec::new();
        for (at, update) in &self.updates {
            let (a, b) = update.factors(at, rank)?;
            let [a, b] = [a, b].map(|it| it.to_kind(Kind::Float).contiguous());
            layers.push(ConvertedLayer {
                at: at.clone(),
                rank: a.size()[0],
                error: update.error(&a, &b),
            });
            for (name, tensor) in update.names.iter().zip(update.shaped(a, b)) {
                state.insert(config.key(at, name), tensor);
            }
        }
        config.r = match rank {
            Rank::Number(r) => r,
            Rank::Energy(_) => layers.iter().map(|it| it.rank).max().unwrap_or(1),
        };
        config.lora_alpha = config.r as f64;
        for layer in layers.iter().filter(|it| it.rank != config.r) {
            // As a whole name: a bare one would also match where it is the end of another.
            let pattern = format!("^{}", layer.at.replace('.', r"\."));
            config.rank_pattern.insert(pattern.clone(), layer.rank);
            config.alpha_pattern.insert(pattern, layer.rank as f64);
        }
        let adapter = Adapter {
            tuner: config.resolve(outline)?,
            state,
            trained: State::new(),
            source: PathBuf::from(format!("`{name}` as LoRA")),
        };
        Ok(Converted { adapter, layers })
    }

    /// Leaves out what has no update. Where only biases change, the first carries them with an update of zero,
    /// for there is no LoRA without a target.
    fn choose_targets(&mut self) {
        let zero = |it: &Update| matches!(it.delta, Delta::Zero);
        let changed = |at: &str| self.biases.get(at).is_some_and(|it| it.changed);
        let carrier = match self.updates.values().all(zero) {
            true => self.updates.keys().find(|at| changed(at)).cloned(),
            false => None,
        };
        self.updates
            .retain(|at, it| !zero(it) || Some(at) == carrier.as_ref());
    }

    /// All but the ranks.
    fn configuration(&self, tuner: &dyn Tuner, outline: &Outline) -> Result<LoraConfig> {
        let common: Common = serde_json::from_value(tuner.to_json())
            .map_err(|error| LoraConfig::fault(error.to_string()))?;
        let changed = || self.biases.iter().filter(|(_, it)| it.changed);
        let mut whole: Vec<String> = self.whole.iter().map(|(at, ..)| at.clone()).collect();
        whole.dedup();
        let config = LoraConfig {
            target_modules: Some(Names::List(self.names(outline))),
            modules_to_save: (!whole.is_empty()).then_some(whole),
            bias: match () {
                () if changed().next().is_none() => Bias::None,
                () if changed().all(|(at, _)| self.updates.contains_key(at)) => Bias::LoraOnly,
                () => Bias::All,
            },
            common,
            ..LoraConfig::default()
        };
        for site in &outline.sites {
            let share = config.share(site, outline)?;
            let whole = self.whole.iter().any(|(at, ..)| *at == site.at);
            if share.lora.is_some() != self.updates.contains_key(&site.at)
                || share.save.is_some() != whole
            {
                return Err(LoraConfig::fault(format!(
                    "`{}` cannot be told apart from other places by names that end like it",
                    site.at
                )));
            }
        }
        config.check()?;
        Ok(config)
    }

    /// The targets, by the last part of their names where everything of that name is one.
    fn names(&self, outline: &Outline) -> Vec<String> {
        let last = |at: &str| at.rsplit('.').next().unwrap_or_default().to_owned();
        let mut names = Vec::new();
        for at in self.updates.keys() {
            let alike = outline.sites.iter().filter(|it| last(&it.at) == last(at));
            let all = alike
                .into_iter()
                .all(|it| self.updates.contains_key(&it.at));
            let entry = if all { last(at) } else { at.clone() };
            if !names.contains(&entry) {
                names.push(entry);
            }
        }
        names
    }

    /// Whole modules and biases.
    fn parts_of_the_base(&self, config: &LoraConfig) -> State {
        let mut state = State::new();
        for (at, name, value) in &self.whole {
            state.insert(config.key(at, name), value.contiguous());
        }
        for (at, bias) in &self.biases {
            let target = self.updates.contains_key(at);
            let name = match (config.bias, target) {
                (Bias::None, _) | (Bias::LoraOnly, false) => continue,
                (_, true) => BIASES[1],
                (Bias::All, false) => BIASES[0],
            };
            state.insert(config.key(at, name), bias.value.contiguous());
        }
        state
    }
}

impl Update {
    /// A `[r, n]` and B `[m, r]` of the wanted rank.
    fn factors(&self, at: &str, rank: Rank) -> Result<(Tensor, Tensor)> {
        let svd = match (&self.delta, rank) {
            (Delta::Factors(a, b), Rank::Number(r)) if a.size()[0] <= r => {
                return Ok((a.shallow_clone(), b.shallow_clone()));
            }
            (Delta::Zero, _) => {
                let none = |shape| Tensor::zeros(shape, (Kind::Double, tch::Device::Cpu));
                return Ok(padded(&none([0, self.size.1]), &none([self.size.0, 0]), 1));
            }
            (Delta::Factors(a, b), _) => Svd::of_product(b, a)?,
            (Delta::Dense(delta), _) => Svd::of(delta)?,
        };
        let r = match rank {
            Rank::Number(r) => r,
            Rank::Energy(share) => svd.rank_for(share),
        };
        let (m, n) = self.size;
        if r > m.min(n) {
            return Err(LoraConfig::fault(format!(
                "rank {r} at `{at}` is above {}, the most that an update {:?} can have",
                m.min(n),
                [m, n]
            )));
        }
        Ok(svd.upright().factors(r))
    }

    /// A and B as they are on disk: `[r, n]` and `[m, r]`, or for a convolution `[r, in, kernel…]` and `[m, r, 1…]`.
    fn shaped(&self, a: Tensor, b: Tensor) -> [Tensor; 2] {
        let r = a.size()[0];
        let ones = vec![1; self.inner.len() - 1];
        [
            a.reshape([&[r][..], &self.inner].concat()),
            b.reshape([&[self.size.0, r][..], &ones].concat()),
        ]
    }

    fn error(&self, a: &Tensor, b: &Tensor) -> f64 {
        let product =
            |a: &Tensor, b: &Tensor| b.to_kind(Kind::Double).matmul(&a.to_kind(Kind::Double));
        let delta = match &self.delta {
            Delta::Factors(a, b) => product(a, b),
            Delta::Dense(delta) => delta.to_kind(Kind::Double),
            Delta::Zero => return 0.0,
        };
        let norm = |t: &Tensor| t.norm().double_value(&[]);
        match norm(&delta) {
            0.0 => 0.0,
            whole => norm(&(delta - product(a, b))) / whole,
        }
    }
}

/// What an adapter writes into its file, by the name below its place.
fn tensors(adapter: &(impl Params + ?Sized)) -> State {
    let mut all = State::new();
    adapter.saved(&mut |name, tensor| {
        all.insert(name.to_owned(), tensor.detach());
    });
    all
}

/// A and B with the scale in it, where the update is their product and nothing else.
///
/// The scale is no tensor; it is what the update of nothing is of BA.
fn factors(
    names: [&str; 2],
    (m, n): (i64, i64),
    held: &[State],
    alone: impl Fn() -> Result<Tensor>,
) -> Result<Option<(Tensor, Tensor)>> {
    let biases = |it: &State| it.keys().all(|name| BIASES.contains(&name.as_str()));
    let mut rest = held.iter().filter(|it| !biases(it));
    let (Some(one), None) = (rest.next(), rest.next()) else {
        return Ok(None);
    };
    let known = |name: &String| names.contains(&name.as_str()) || name == lora::BIAS;
    let [Some(a), Some(b)] = names.map(|name| one.get(name)) else {
        return Ok(None);
    };
    if !one.keys().all(known) || a.dim() < 2 || b.dim() < 2 {
        return Ok(None);
    }
    let [a, b] = [a, b].map(|it| it.to_kind(Kind::Double).flatten(1, -1));
    let r = a.size()[0];
    if a.size() != [r, n] || b.size() != [m, r] {
        return Ok(None);
    }
    let (product, update) = (b.matmul(&a), alone()?.to_kind(Kind::Double));
    let dot = |x: &Tensor, y: &Tensor| (x * y).sum(Kind::Double).double_value(&[]);
    let scale = match dot(&product, &product) {
        0.0 => 1.0,
        square => dot(&update, &product) / square,
    };
    let off = (&update - product * scale).norm().double_value(&[]);
    let fits = off <= 1e-5 * update.norm().double_value(&[]);
    Ok(fits.then(|| (a, b * scale)))
}

fn not(at: &str, why: &str) -> Error {
    Error::NotMergeable {
        at: at.to_owned(),
        why: why.to_owned(),
    }
}

fn not_lora(at: &str, why: &str) -> Error {
    LoraConfig::fault(format!("`{at}` {why}; plain LoRA has no form for that"))
}
