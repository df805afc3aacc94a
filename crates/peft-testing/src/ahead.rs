//! The laws of virtual tokens: those of every method that apply, and their own.
//!
//! A method of virtual tokens changes no weight. So a fresh one is not the base (something stands in front
//! of the input from the first step, and Python's begins at random) and nothing can be merged. In return there is more to get
//! wrong about where the tokens stand, and what a file holds may be less than what is trained.

use peft_core::{Adapter, Ahead, Ctx, Error, Model, ModelExt, Rows};
use tch::{Kind, Tensor};

use crate::{
    agree,
    laws::{EXACT, LAWS, Law, NAME, Trial, Verdict, bits, ids, objective, out, said, shake},
    toy::Toy,
};

/// The laws of every method that do not hold here, by name: a prompt is not the base, and is no weight.
const NOT_HERE: [&str; 3] = ["fresh", "merge", "unmerge"];

/// The laws of virtual tokens alone.
pub const OWN: &[Law] = &[
    ("ahead", ahead_is_what_it_says),
    ("in front", tokens_stand_in_front),
    ("second", second_stands_behind),
    ("no merge", merge_is_refused),
    ("no mixed batch", mixed_batch_is_refused),
    ("file", file_is_enough),
    ("resumed", resumed_is_unbroken),
];

/// Every law that a method of virtual tokens keeps.
pub fn laws() -> Vec<Law> {
    let general = LAWS.iter().filter(|(name, _)| !NOT_HERE.contains(name));
    general.chain(OWN).copied().collect()
}

/// Shape and dtype are those of the model, and `tokens` counts them.
fn ahead_is_what_it_says(trial: &Trial) -> Verdict {
    let toy = trial.moved()?;
    let spec = toy.spec();
    let all: Vec<_> = toy.prompt().adapters(NAME).collect();
    let [adapter] = all.as_slice() else {
        return Err(format!("it puts {} adapters in front", all.len()));
    };
    let tokens = adapter.tokens();
    let same = |what: &str, t: &Tensor, expected: &[i64]| match t.size() == expected {
        true if t.kind() == Kind::Float => Ok(()),
        true => Err(format!("{what} are {:?} and not fp32", t.kind())),
        false => Err(format!("{what} are {:?} and not {expected:?}", t.size())),
    };
    match adapter.ahead(Ctx::EVAL) {
        Ahead::Embeds(t) => same("embeddings", &t, &[tokens, spec.hidden]),
        Ahead::Kv(layers) if layers.len() != spec.layers => Err(format!(
            "there are keys for {} layers, and the model has {}",
            layers.len(),
            spec.layers
        )),
        Ahead::Kv(layers) => layers.iter().try_for_each(|(k, v)| {
            let expected = [spec.kv_heads, tokens, spec.head_dim];
            same("keys", k, &expected)?;
            same("values", v, &expected)
        }),
    }
}

/// Every real token sees them, each row of a batch gets the same, and padding is not seen.
fn tokens_stand_in_front(trial: &Trial) -> Verdict {
    let toy = trial.moved()?;
    let (with, without) = (out(&toy), out(&trial.bare()));
    if with.size() != without.size() {
        return Err(format!(
            "the output is {:?} and not {:?}",
            with.size(),
            without.size()
        ));
    }
    let moved = (&with - &without).abs().amax([-1i64].as_slice(), false); // [batch, seq]
    if moved.min().double_value(&[]) == 0.0 {
        return Err("a token after them does not see them".to_owned());
    }
    let row = ids().narrow(0, 1, 1);
    let alone = tch::no_grad(|| toy.forward(&row, Ctx::EVAL));
    agree(
        &with.narrow(0, 1, 1),
        &alone,
        EXACT,
        "a row of a batch against the row alone",
    )?;
    let (pad, kind) = (row.full_like(3).narrow(1, 0, 2), row.kind());
    let padded = Tensor::cat(&[&pad, &row], 1);
    let mask = Tensor::cat(&[pad.zeros_like(), row.ones_like()], 1).to_kind(kind);
    let seen = tch::no_grad(|| toy.masked(&padded, &mask, Ctx::EVAL)).narrow(1, 2, row.size()[1]);
    agree(
        &seen,
        &alone,
        EXACT,
        "a padded row against the row without padding",
    )
}

/// Two that are on give the tokens of the first and then those of the second.
fn second_stands_behind(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let now = |toy: &Toy| tch::no_grad(|| flat(toy));
    let first = now(&toy);
    toy.inject("second", &*trial.tuner()?).map_err(said)?;
    shake(&mut toy, "second", 8);
    let both = now(&toy);
    toy.activate("second").map_err(said)?;
    let second = now(&toy);
    let expected = first.iter().zip(&second);
    for ((first, second), both) in expected.zip(&both) {
        bits(both, &Tensor::cat(&[first, second], 0), "both in front")?;
    }
    Ok(())
}

/// What stands in front, each tensor with the tokens first.
fn flat(toy: &Toy) -> Vec<Tensor> {
    let kv = toy.prompt().kv(Ctx::EVAL).unwrap_or_default();
    let kv = kv.into_iter().flat_map(|(k, v)| [k, v]);
    let kv = kv.map(|t| t.transpose(0, 1)); // [tokens, kv_heads, head_dim]
    let embeds = toy.prompt().embeds(Ctx::EVAL).into_iter();
    embeds.chain(kv).map(|t| t.copy()).collect()
}

/// It is refused by name, and the model goes on as it was.
fn merge_is_refused(trial: &Trial) -> Verdict {
    let mut toy = trial.moved()?;
    let before = out(&toy);
    match toy.merge() {
        Err(Error::NotMergeable { why, .. }) if why.contains("virtual tokens") => {}
        Err(other) => return Err(format!("the error does not name virtual tokens: {other}")),
        Ok(()) => return Err("virtual tokens are merged into nothing".to_owned()),
    }
    if toy.merged() {
        return Err("after a refused merge something is merged".to_owned());
    }
    bits(&out(&toy), &before, "after a refused merge")
}

/// Rows of one batch cannot have different lengths.
fn mixed_batch_is_refused(trial: &Trial) -> Verdict {
    match Rows::new(&mut trial.moved()?, &[NAME]) {
        Err(Error::Name { name, .. }) if name == NAME => Ok(()),
        Err(other) => Err(format!("the error does not name the adapter: {other}")),
        Ok(_) => Err("virtual tokens are accepted in a mixed batch".to_owned()),
    }
}

/// Loaded virtual tokens are trained all or none, none where an encoder computed them; saved again they are the same file.
fn file_is_enough(trial: &Trial) -> Verdict {
    let tuner = trial.tuner()?;
    let mut toy = trial.moved()?;
    let saved = Adapter::of(NAME, &*tuner, &mut toy).map_err(said)?;
    let mut again = trial.bare();
    tch::manual_seed(17);
    saved.apply(NAME, &mut again).map_err(said)?;
    let mut loaded = again.params(NAME);
    loaded.retain(|it| it.at.is_empty());
    let trained = loaded.iter().filter(|it| it.tensor.requires_grad()).count();
    if trained != 0 && trained != loaded.len() {
        return Err("of what is loaded a part is trained".to_owned());
    }
    if trained != 0 && !saved.trained.is_empty() {
        return Err("what an encoder computed is trained without the encoder".to_owned());
    }
    let twice = Adapter::of(NAME, &*tuner, &mut again).map_err(said)?;
    if !twice.state.keys().eq(saved.state.keys()) {
        return Err("saved again the file has other keys".to_owned());
    }
    let pairs = saved.state.iter().zip(twice.state.values());
    for ((key, once), twice) in pairs {
        bits(twice, once, &format!("`{key}` saved again"))?;
    }
    Ok(())
}

/// Training that is saved, loaded and taken up is the training that was never broken off, to the bit.
fn resumed_is_unbroken(trial: &Trial) -> Verdict {
    let dir = tempfile::tempdir().map_err(said)?;
    let tuner = trial.tuner()?;
    let mut toy = trial.fresh()?;
    train(&mut toy);
    let halfway = Adapter::of(NAME, &*tuner, &mut toy).map_err(said)?;
    halfway.save(dir.path()).map_err(said)?;
    train(&mut toy);

    let mut again = trial.bare();
    tch::manual_seed(17); // What the file lacks is not what chance gave the first time.
    let loaded = Adapter::load(dir.path(), &trial.registry).map_err(said)?;
    loaded.resume(NAME, &mut again).map_err(said)?;
    train(&mut again);
    let (unbroken, resumed) = (toy.trainable(NAME), again.trainable(NAME));
    if unbroken.len() != resumed.len() {
        let (n, m) = (unbroken.len(), resumed.len());
        return Err(format!("{n} tensors were trained, {m} are when resumed"));
    }
    for (a, b) in unbroken.iter().zip(&resumed) {
        bits(&b.tensor, &a.tensor, &format!("`{}` resumed", a.name))?;
    }
    bits(&out(&again), &out(&toy), "resumed")
}

/// Three steps of gradient descent.
fn train(toy: &mut Toy) {
    for _ in 0..3 {
        for param in toy.trainable(NAME) {
            let mut tensor = param.tensor;
            tensor.zero_grad();
        }
        objective(toy, &ids()).backward();
        tch::no_grad(|| {
            for param in toy.trainable(NAME) {
                let mut tensor = param.tensor;
                let _ = tensor.g_sub_(&(tensor.grad() * 0.01));
            }
        });
    }
}
