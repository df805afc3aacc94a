//! A prefix that begins as what its own model remembers of a text.
//!
//! The method knows how keys and values become a prefix and the model how to compute them; here they meet.

use peft_core::{Ctx, Error, ModelExt, Result};
use peft_models::{Cache, Input, Network};
use tch::Tensor;

/// Puts a text into the prefix called `name`, which is attached and not trained yet: its first tokens, as many as the
/// prefix has virtual ones. The model then writes as if the text stood before every row, and training goes on from there.
///
/// The base alone reads the text, whatever adapters are on. Refused by name: what is no language model, a prefix that
/// is computed by a projection, a text that is too short, tokens that the model does not have.
///
/// ```
/// # use peft::{ModelExt, OpenOptions, PrefixConfig, open, begin_prefix_at};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/models/llama");
/// let mut model = open(folder, OpenOptions::default())?;
/// model.inject("default", &PrefixConfig::of(4))?;
/// begin_prefix_at(&mut *model, "default", &[3, 14, 15, 9])?;
/// # Ok::<(), peft::Error>(())
/// ```
pub fn begin_prefix_at(model: &mut (impl Network + ?Sized), name: &str, ids: &[u32]) -> Result<()> {
    model.known(name)?;
    let before = model.adapters();
    for (it, _) in &before {
        model.switch(it, false)?;
    }
    let kv = check(model, name, ids).map(|()| tch::no_grad(|| keys_and_values(model, ids)));
    for (it, was) in &before {
        model.switch(it, *was)?;
    }
    let Some(kv) = kv? else {
        let why = "only a language model remembers a text that it reads";
        return Err(fault(name, why));
    };
    peft_prefix::begin_with_kv(model, name, &kv)
}

fn check(model: &(impl Network + ?Sized), name: &str, ids: &[u32]) -> Result<()> {
    let vocab = model.vocab();
    if let Some(id) = ids.iter().find(|it| i64::from(**it) >= vocab) {
        let why = format!("token {id} to begin with is not in the vocabulary of {vocab}");
        return Err(fault(name, &why));
    }
    if ids.is_empty() {
        return Err(fault(name, "the text to begin with has no tokens"));
    }
    let most = model.max_positions();
    if model.learned_positions() && ids.len() as i64 > most {
        let why = format!(
            "the text to begin with has {} tokens, and the model {most} positions",
            ids.len()
        );
        return Err(fault(name, &why));
    }
    Ok(())
}

/// Of every layer, each `[kv_heads, positions, head_dim]`.
fn keys_and_values(model: &(impl Network + ?Sized), ids: &[u32]) -> Option<Vec<(Tensor, Tensor)>> {
    let decoder = model.decoder()?;
    let ids: Vec<i64> = ids.iter().copied().map(i64::from).collect();
    let ids = Tensor::from_slice(&ids).view([1, -1]);
    let mut cache = Cache::new();
    let input = Input::new(ids.to_device(model.device()));
    let _hidden = decoder.hidden(&input, Some(&mut cache), Ctx::EVAL);
    let of_row = |t: &Tensor| t.get(0).transpose(0, 1);
    let all = cache.keys_and_values();
    Some(all.iter().map(|(k, v)| (of_row(k), of_row(v))).collect())
}

fn fault(name: &str, why: &str) -> Error {
    Error::Name {
        name: name.to_owned(),
        why: why.to_owned(),
    }
}
