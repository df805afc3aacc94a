//! The laws that every method keeps, whatever it does.
//!
//! Each is a function from one configuration and one toy to a complaint. They compare numbers on random
//! input after every trained tensor was moved by noise: with B = 0, or α = r, or x = 0, half of all mistakes are
//! invisible.

use peft_core::{
    Adapter, BASE, Config, Ctx, Error, Injection, Model, ModelExt, Outline, Registry,
    Result as PeftResult, Rows, Site, Slot, Tuner, parse,
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use crate::{
    agree, same_bits,
    toy::{HALF_STEP, Kit, Toy, VOCAB},
};

/// What is wrong, or nothing.
pub type Verdict = Result<(), String>;

/// A law: its name and its test.
pub type Law = (&'static str, fn(&Trial) -> Verdict);

/// Every law, in the order of its dependence.
pub const LAWS: &[Law] = &[
    ("config survives", config_survives),
    ("unknown keys", unknown_keys),
    ("fresh", fresh_is_base),
    ("base frozen", base_is_frozen),
    ("gradients arrive", gradients_arrive),
    ("gradient check", gradients_are_slopes),
    ("accumulation", window_is_big_batch),
    ("left out", gradients_read_nothing_that_is_left_out),
    ("off", off_is_base),
    ("merge", merged_is_forward),
    ("unmerge", unmerge_is_exact),
    ("switching", switching_is_free_of_traces),
    ("mixed batch", rows_are_strangers),
    ("delete", delete_restores),
    ("save", saved_is_loaded),
    ("dropout", dropout_in_training_only),
    ("failure", failure_leaves_no_trace),
];

/// One configuration on one toy.
#[derive(Debug)]
pub struct Trial {
    /// The configuration as a file holds it.
    pub json: Value,
    /// The toy.
    pub kit: Kit,
    /// How this method's file is read.
    pub(crate) parse: fn(Value) -> PeftResult<Box<dyn Tuner>>,
    pub(crate) registry: Registry,
}

pub(crate) const NAME: &str = "default";
pub(crate) const EXACT: f64 = 1e-5;

impl Trial {
    /// A trial of method `C`.
    pub fn of<C: Config>(json: &Value, kit: Kit) -> Trial {
        Trial {
            json: json.clone(),
            kit,
            parse: |json| Ok(Box::new(parse::<C>(json)?)),
            registry: Registry::default().with::<C>(),
        }
    }

    pub(crate) fn tuner(&self) -> Result<Box<dyn Tuner>, String> {
        (self.parse)(self.json.clone()).map_err(said)
    }

    pub(crate) fn bare(&self) -> Toy {
        Toy::new(self.kit, 3)
    }

    /// A toy with the adapter as it begins.
    pub(crate) fn fresh(&self) -> Result<Toy, String> {
        let mut toy = self.bare();
        toy.inject(NAME, &*self.tuner()?).map_err(said)?;
        Ok(toy)
    }

    /// A toy with the adapter as training might leave it.
    pub(crate) fn moved(&self) -> Result<Toy, String> {
        let mut toy = self.fresh()?;
        shake(&mut toy, NAME, 5);
        Ok(toy)
    }

    fn dropout(&self) -> bool {
        let keys = self.json.as_object().into_iter().flatten();
        keys.filter(|(key, _)| key.ends_with("dropout"))
            .any(|(_, p)| p.as_f64() > Some(0.0))
    }
}

pub(crate) fn said(error: impl std::fmt::Display) -> String {
    error.to_string()
}

pub(crate) fn shake(toy: &mut Toy, name: &str, seed: i64) {
    tch::manual_seed(seed);
    let _off = tch::no_grad_guard();
    for param in toy.trainable(name) {
        let mut tensor = param.tensor;
        let _ = tensor.g_add_(&(tensor.randn_like() * 0.3));
    }
}

/// Every token of the vocabulary, two rows. `[2, 12]`
pub(crate) fn ids() -> Tensor {
    (Tensor::arange(VOCAB + 1, (Kind::Int64, tch::Device::Cpu)) * 7)
        .remainder(VOCAB)
        .view([2, -1])
}

pub(crate) fn out(toy: &Toy) -> Tensor {
    tch::no_grad(|| toy.forward(&ids(), Ctx::EVAL))
}

/// A sum that weighs every output differently. A quarter of an output is where tanh still bends and does not yet saturate:
/// there its slope would be the rounding of 1 − 1.
pub(crate) fn objective(toy: &Toy, ids: &Tensor) -> Tensor {
    let y = toy.forward(ids, Ctx::EVAL);
    let weights = (Tensor::arange(VOCAB, (Kind::Float, tch::Device::Cpu)) * 1.3).sin();
    ((y / 4.0).tanh() * weights).sum(Kind::Double)
}

/// Gradients of the sum over some batches; zero where none arrives.
fn gradients(toy: &mut Toy, batches: &[Tensor]) -> Vec<(String, Tensor)> {
    for param in toy.trainable(NAME) {
        let mut tensor = param.tensor;
        tensor.zero_grad();
    }
    for ids in batches {
        objective(toy, ids).backward();
    }
    let all = toy.trainable(NAME).into_iter();
    all.map(|it| {
        let grad = it.tensor.grad();
        let grad = if grad.defined() {
            grad.copy()
        } else {
            tch::no_grad(|| it.tensor.zeros_like())
        };
        (format!("{}.{}", it.at, it.name), grad)
    })
    .collect()
}

pub(crate) fn bits(a: &Tensor, b: &Tensor, what: &str) -> Verdict {
    match same_bits(a, b) {
        true => Ok(()),
        false => agree(a, b, 0.0, what),
    }
}

fn config_survives(trial: &Trial) -> Verdict {
    let once = trial.tuner()?.to_json();
    let twice = (trial.parse)(once.clone()).map_err(said)?.to_json();
    if once != twice {
        return Err(format!("read again it is {twice}, was {once}"));
    }
    for (key, value) in trial.json.as_object().into_iter().flatten() {
        let same = once[key] == *value
            || once[key]
                .as_f64()
                .is_some_and(|it| value.as_f64() == Some(it));
        if !same {
            return Err(format!("`{key}` was {value} and is {}", once[key]));
        }
    }
    Ok(())
}

fn unknown_keys(trial: &Trial) -> Verdict {
    let with = |value: Value| {
        let mut json = trial.json.clone();
        json["frobnication_level"] = value;
        (trial.parse)(json)
    };
    for on in [json!(true), json!(1), json!("much"), json!({"a": 1})] {
        match with(on.clone()) {
            Err(error) if error.to_string().contains("frobnication_level") => {}
            Err(error) => return Err(format!("the error does not name the key: {error}")),
            Ok(_) => return Err(format!("an unknown key that is {on} is accepted")),
        }
    }
    let off = with(Value::Null).map_err(said)?.to_json();
    match off.get("frobnication_level") {
        Some(Value::Null) => Ok(()),
        _ => Err("an unknown key that is off is lost on saving".to_owned()),
    }
}

fn fresh_is_base(trial: &Trial) -> Verdict {
    agree(
        &out(&trial.fresh()?),
        &out(&trial.bare()),
        1e-6,
        "a fresh adapter against the base",
    )
}

fn base_is_frozen(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let before: Vec<Tensor> = toy.base().iter().map(Tensor::copy).collect();
    gradients(&mut toy, &[ids()]);
    for (now, before) in toy.base().iter().zip(&before) {
        if now.requires_grad() || now.grad().defined() {
            return Err("a tensor of the base takes a gradient".to_owned());
        }
        bits(now, before, "a tensor of the base")?;
    }
    let mut untouched = trial.bare();
    let pairs = untouched.base().into_iter().zip(before);
    for (bare, dressed) in pairs {
        bits(&dressed, &bare, "the base after injection")?;
    }
    Ok(())
}

fn gradients_arrive(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let all = gradients(&mut toy, &[ids()]);
    if all.is_empty() {
        return Err("nothing is trained".to_owned());
    }
    for (name, grad) in all {
        let fine = grad.isfinite().all().int64_value(&[]) == 1;
        if !fine || grad.abs().max().double_value(&[]) == 0.0 {
            return Err(format!("no gradient reaches `{name}`"));
        }
    }
    Ok(())
}

/// Central differences along a random direction of each tensor.
fn gradients_are_slopes(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let all = gradients(&mut toy, &[ids()]);
    tch::manual_seed(11);
    for ((name, grad), param) in all.into_iter().zip(toy.trainable(NAME)) {
        let mut tensor = param.tensor;
        let way = tch::no_grad(|| tensor.randn_like());
        let way = &way / way.norm();
        let mut at = |step: f64| {
            tch::no_grad(|| {
                let _ = tensor.g_add_(&(&way * step));
                let value = objective(&toy, &ids()).double_value(&[]);
                let _ = tensor.g_sub_(&(&way * step));
                value
            })
        };
        let step = 1e-3;
        let slope = (at(step) - at(-step)) / (2.0 * step);
        let found = (&grad * &way).sum(Kind::Double).double_value(&[]);
        let size = grad.norm().double_value(&[]);
        if (slope - found).abs() > 0.02 * size.max(1.0) {
            return Err(format!(
                "along a direction of `{name}` the slope is {slope:.4}, the gradient says {found:.4}"
            ));
        }
    }
    Ok(())
}

fn window_is_big_batch(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let whole = gradients(&mut toy, &[ids()]);
    let parts = gradients(&mut toy, &[ids().narrow(0, 0, 1), ids().narrow(0, 1, 1)]);
    for ((name, whole), (_, parts)) in whole.iter().zip(&parts) {
        agree(
            parts,
            whole,
            2e-5,
            &format!("gradient of `{name}` over two halves of a batch"),
        )?;
    }
    Ok(())
}

/// Of each linear layer as the last of a block that is computed again: where the adapter says that it does not read what lies
/// beneath, gradients are the same without it.
fn gradients_read_nothing_that_is_left_out(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let params = toy.trainable(NAME).into_iter();
    let mut params: Vec<Tensor> = params.map(|it| it.tensor).collect();
    let mut verdict = Ok(());
    toy.slots(&mut |at, slot| {
        let Slot::Linear(layer) = slot else { return };
        let (out, inp) = layer.base().shape();
        tch::manual_seed(13);
        let random = |n: i64| Tensor::randn([2, 3, n], (Kind::Float, layer.base().device()));
        let (x, g) = (random(inp), random(out));
        let mut gradients = |again: bool| -> Vec<Tensor> {
            tch::manual_seed(17);
            params.iter_mut().for_each(Tensor::zero_grad);
            let x = x.copy().set_requires_grad(true);
            let ctx = Ctx {
                again,
                ..Ctx::TRAIN
            };
            let y = layer.forward_last(&x, ctx);
            (y * &g).sum(Kind::Float).backward();
            let grads = params.iter().chain([&x]).map(Tensor::grad);
            grads.filter(Tensor::defined).map(|it| it.copy()).collect()
        };
        let (once, again) = (gradients(false), gradients(true));
        for (once, again) in once.iter().zip(&again) {
            let what = format!("a gradient of `{at}`, at the end of a block computed again,");
            if verdict.is_ok() {
                verdict = bits(again, once, &what);
            }
        }
    });
    verdict
}

fn off_is_base(trial: &Trial) -> Verdict {
    let base = out(&trial.bare());
    let mut toy = trial.moved()?;
    if same_bits(&out(&toy), &base) {
        return Err("the adapter does nothing even when it was trained".to_owned());
    }
    bits(
        &toy.without_adapters(|toy| out(toy)),
        &base,
        "without adapters",
    )?;
    toy.switch(NAME, false).map_err(said)?;
    bits(&out(&toy), &base, "switched off")
}

fn merged_is_forward(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let before = out(&toy);
    toy.merge().map_err(said)?;
    // A base in steps keeps a merged weight no better than its own.
    let tolerance = if trial.kit.lossy {
        20.0 * HALF_STEP
    } else {
        EXACT
    };
    agree(&out(&toy), &before, tolerance, "merged against forward")
}

fn unmerge_is_exact(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let (before, base): (_, Vec<Tensor>) =
        (out(&toy), toy.base().iter().map(Tensor::copy).collect());
    toy.merge().map_err(said)?;
    toy.unmerge();
    bits(&out(&toy), &before, "unmerged")?;
    toy.base()
        .iter()
        .zip(&base)
        .try_for_each(|(now, was)| bits(now, was, "the base after unmerging"))
}

fn switching_is_free_of_traces(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let alone = out(&toy);
    if let Err(error) = toy.inject("second", &*trial.tuner()?) {
        // A method may refuse to be there twice, and then nothing has happened.
        return match error {
            Error::Config { .. } => bits(&out(&toy), &alone, "after a refused second adapter"),
            other => Err(said(other)),
        };
    }
    shake(&mut toy, "second", 8);
    let both = out(&toy);
    toy.activate("second").map_err(said)?;
    let mut single = trial.bare();
    single.inject("second", &*trial.tuner()?).map_err(said)?;
    shake(&mut single, "second", 8);
    let same_start = toy
        .params("second")
        .iter()
        .zip(single.params("second"))
        .all(|(a, b)| same_bits(&a.tensor, &b.tensor));
    if same_start {
        bits(
            &out(&toy),
            &out(&single),
            "the second alone against a toy with it only",
        )?;
    }
    toy.activate(NAME).map_err(said)?;
    bits(&out(&toy), &alone, "back to the first")?;
    toy.switch("second", true).map_err(said)?;
    bits(&out(&toy), &both, "both again")?;
    if !trial.kit.lossy {
        match toy.merge() {
            Err(Error::NotMergeable { why, .. }) if why.contains("virtual tokens") => {}
            other => {
                other.map_err(said)?;
                agree(&out(&toy), &both, EXACT, "both merged")?;
                toy.unmerge();
            }
        }
    }
    toy.delete("second").map_err(said)?;
    bits(&out(&toy), &alone, "the second deleted")
}

/// Each row of a mixed batch is what it is alone, under its adapter or under none, whatever is switched on.
fn rows_are_strangers(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let second = match toy.inject("second", &*trial.tuner()?) {
        Ok(()) => "second",
        Err(Error::Config { .. }) => NAME, // a method may refuse to be there twice
        Err(other) => return Err(said(other)),
    };
    if second != NAME {
        shake(&mut toy, second, 8);
    }
    let names = [second, BASE, NAME, second, NAME];
    let rows = match Rows::new(&mut toy, &names) {
        Err(Error::Name { why, .. }) if why.contains("virtual tokens") => return Ok(()),
        other => other.map_err(said)?,
    };
    let ids = ids().repeat([3, 1]).narrow(0, 0, names.len() as i64);
    let mixed = tch::no_grad(|| toy.forward(&ids, Ctx::mixed(&rows)));
    for (row, name) in (0i64..).zip(names) {
        for (it, _) in toy.adapters() {
            toy.switch(&it, it == name).map_err(said)?;
        }
        let alone = tch::no_grad(|| toy.forward(&ids.narrow(0, row, 1), Ctx::EVAL));
        let what = format!("row {row} of a mixed batch, of `{name}`,");
        agree(&mixed.narrow(0, row, 1), &alone, EXACT, &what)?;
    }
    match Rows::new(&mut toy, &["nobody"]) {
        Err(Error::Name { name, .. }) if name == "nobody" => Ok(()),
        _ => Err("a mixed batch with an unknown adapter is accepted".to_owned()),
    }
}

fn delete_restores(trial: &Trial) -> Verdict {
    let base = out(&trial.bare());
    let mut toy = trial.moved()?;
    toy.delete(NAME).map_err(said)?;
    bits(&out(&toy), &base, "deleted")?;
    let mut toy = trial.moved()?;
    toy.unload();
    bits(&out(&toy), &base, "unloaded")?;
    match toy.adapters().is_empty() && toy.trainable(NAME).is_empty() {
        true => Ok(()),
        false => Err("something is left of it".to_owned()),
    }
}

fn saved_is_loaded(trial: &Trial) -> Verdict {
    let dir = tempfile::tempdir().map_err(said)?;
    let tuner = trial.tuner()?;
    let mut toy = trial.moved()?;
    let adapter = Adapter::of(NAME, &*tuner, &mut toy).map_err(said)?;
    adapter.save(dir.path()).map_err(said)?;
    for name in [NAME, "another"] {
        let mut again = trial.bare();
        let loaded = Adapter::load(dir.path(), &trial.registry).map_err(said)?;
        loaded.apply(name, &mut again).map_err(said)?;
        match tuner.saved() {
            None => bits(&out(&again), &out(&toy), "loaded again")?,
            // Another form of the same function.
            Some(_) => agree(&out(&again), &out(&toy), EXACT, "loaded again")?,
        }
    }
    Ok(())
}

fn dropout_in_training_only(trial: &Trial) -> Verdict {
    let toy = trial.moved()?;
    bits(&out(&toy), &out(&toy), "evaluated twice")?;
    let trained = tch::no_grad(|| toy.forward(&ids(), Ctx::TRAIN));
    match (trial.dropout(), same_bits(&trained, &out(&toy))) {
        (true, true) => Err("dropout does nothing in training".to_owned()),
        (false, false) => Err("training differs from evaluation without any dropout".to_owned()),
        _ => Ok(()),
    }
}

fn failure_leaves_no_trace(trial: &Trial) -> Verdict {
    let mut toy = trial.bare();
    let base = out(&toy);
    let failing = Failing(trial.tuner()?);
    if toy.inject(NAME, &failing).is_ok() {
        return Err("an error in `attach` is lost".to_owned());
    }
    if !toy.adapters().is_empty() {
        return Err("a failed injection leaves adapters".to_owned());
    }
    bits(&out(&toy), &base, "after a failed injection")?;
    let mut toy = trial.moved()?;
    let before = out(&toy);
    if toy.inject(NAME, &*trial.tuner()?).is_ok() {
        return Err("a name can be used twice".to_owned());
    }
    bits(&out(&toy), &before, "after a name was used twice")
}

/// A method that fails at the last place.
#[derive(Debug)]
struct Failing(Box<dyn Tuner>);

impl Tuner for Failing {
    fn peft_type(&self) -> &'static str {
        self.0.peft_type()
    }
    fn resolve(&self, outline: &Outline) -> PeftResult<Box<dyn Tuner>> {
        Ok(Box::new(Failing(self.0.resolve(outline)?)))
    }
    fn wants(&self, site: &Site, outline: &Outline) -> PeftResult<bool> {
        self.0.wants(site, outline)
    }
    fn attach(&self, at: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> PeftResult<()> {
        self.0.attach(at, slot, injection)?;
        let mut last = None;
        for site in &injection.outline.sites {
            if self.wants(site, injection.outline)? {
                last = Some(site.at.as_str());
            }
        }
        match last == Some(at) {
            false => Ok(()),
            true => Err(Error::Config {
                peft_type: self.peft_type().to_owned(),
                reason: "fails on purpose".to_owned(),
            }),
        }
    }
    fn to_json(&self) -> Value {
        self.0.to_json()
    }
}
