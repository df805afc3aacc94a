//! Full fine-tuning: the one call that lets tensors of a base take gradients.
//!
//! Everywhere else a base is frozen by construction: models hold plain tensors, which may be pages of a file, and
//! methods bring leaves of their own. [`ModelExt::thaw`](crate::ModelExt::thaw) replaces
//! the chosen tensors by trainable copies, each in its own memory and in the strides that it
//! had. A table that two places share (a tied head) stays one tensor, so it has one gradient and takes one step.

use tch::Tensor;

use crate::{Error, Model, Names, Param, Result, Slot, closest};

/// The trainable copies of one model.
#[derive(Debug, Default)]
pub(crate) struct Leaves {
    /// Old tensors, kept so that no other tensor gets their address, with their copies.
    known: Vec<(Tensor, Tensor)>,
    /// Those that were not known before, with their names.
    fresh: Vec<(&'static str, Tensor)>,
}

impl Leaves {
    /// The copy of `old` that some place has.
    pub(crate) fn copy_of(&self, old: &Tensor) -> Option<Tensor> {
        let same = |it: &&(Tensor, Tensor)| {
            it.0.data_ptr() == old.data_ptr() && it.0.size() == old.size() && old.numel() > 0
        };
        let found = self.known.iter().find(same);
        found.map(|(_, leaf)| leaf.shallow_clone())
    }

    /// The copy of `old`, a new one or that which another place has.
    pub(crate) fn take(&mut self, name: &'static str, old: &Tensor) -> Tensor {
        if let Some(leaf) = self.copy_of(old) {
            return leaf;
        }
        // `empty_like` keeps the strides of a dense tensor, so a transposed layer stays one.
        let leaf = tch::no_grad(|| {
            let mut leaf = old.empty_like();
            leaf.copy_(old);
            leaf
        });
        let leaf = leaf.set_requires_grad(true);
        self.known.push((old.shallow_clone(), leaf.shallow_clone()));
        self.fresh.push((name, leaf.shallow_clone()));
        leaf
    }
}

/// The name that parameters of the base have where an adapter's would stand.
const BASE: &str = "base";

/// See [`ModelExt::thaw`](crate::ModelExt::thaw).
pub(crate) fn thaw<M: Model + ?Sized>(model: &mut M, which: Option<&Names>) -> Result<Vec<Param>> {
    let chosen = choose(model, which)?;
    let mut leaves = Leaves::default();
    let mut all = Vec::new();
    model.slots(&mut |at, slot| {
        if !chosen.iter().any(|it| it == at) {
            return;
        }
        let norm = matches!(slot, Slot::Norm(_));
        match slot {
            Slot::Linear(it) => it.thaw(&mut leaves),
            Slot::Embedding(it) => it.thaw(&mut leaves),
            Slot::Conv(it) => it.thaw(&mut leaves),
            Slot::Norm(it) => it.thaw(&mut leaves),
            Slot::Prompt(_) => {}
        }
        all.extend(leaves.fresh.drain(..).map(|(name, tensor)| Param {
            adapter: BASE.to_owned(),
            at: at.to_owned(),
            name: name.to_owned(),
            norm,
            tensor,
        }));
    });
    // The prompt's view of the words goes last, else it would hold the whole file of the base in memory.
    model.slots(&mut |_, slot| {
        if let Slot::Prompt(it) = slot {
            it.thaw(&leaves);
        }
    });
    Ok(all)
}

/// The places to be trained; everything that can be wrong is looked at before anything changes.
fn choose<M: Model + ?Sized>(model: &mut M, which: Option<&Names>) -> Result<Vec<String>> {
    let (mut chosen, mut others, mut result) = (Vec::new(), Vec::new(), Ok(()));
    model.slots(&mut |at, slot| {
        let named = which.map_or(Ok(true), |it| it.matches(at));
        match (named, slot) {
            (Err(error), _) => result = Err(error),
            (Ok(_), Slot::Prompt(_)) => {}
            (Ok(false), _) => others.push(at.to_owned()),
            (Ok(true), Slot::Linear(it)) if !it.base().is_dense() => {
                result = Err(Error::NotTrainable {
                    at: at.to_owned(),
                    why: "its weight is not kept as plain numbers".to_owned(),
                });
            }
            (Ok(true), _) => chosen.push(at.to_owned()),
        }
    });
    result?;
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    let wanted = match which {
        Some(Names::List(list)) => format!("{list:?}"),
        Some(Names::Regex(text)) => format!("`{text}`"),
        None => "every parameter".to_owned(),
    };
    Err(Error::NoTarget {
        examples: closest(&wanted, others.iter().map(String::as_str), 4),
        what: format!("full fine-tuning of {wanted}"),
    })
}
