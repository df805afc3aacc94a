//! A model as methods see it: named places, a description, and what can be done with adapters on it.
//!
//! A model implements two methods ([`Model`]); injecting, switching, merging and the rest follow from them
//! ([`ModelExt`]) and are the same for a language model and for three layers of one's own.

use std::collections::BTreeSet;

use tch::Tensor;

use crate::{
    Conv, Embedding, Error, Injection, Linear, Names, Norm, Outline, Param, PromptSlot, Result,
    Site, SiteKind, Start, State, Tuner, Visit, nearest, stack::Place, thaw::thaw,
};

/// What a method may need to know of a model besides its places.
///
/// The default is a network of one's own that has nothing of the kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spec {
    /// `model_type` of `config.json`: chooses default targets.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Number of blocks; of the decoder, where there is an encoder too.
    pub layers: usize,
    /// Heads of queries.
    pub heads: i64,
    /// Heads of keys and values.
    pub kv_heads: i64,
    /// Width of one head.
    pub head_dim: i64,
    /// The place of the input embedding.
    pub input_embedding: String,
    /// The place of the output embedding, if the model has one.
    pub output_embedding: Option<String>,
    /// Both share one table.
    pub tied: bool,
    /// Linear layers are kept `[in, out]`: what `fan_in_fan_out` says on disk.
    pub transposed: bool,
    /// An encoder reads, a decoder writes.
    pub encoder_decoder: bool,
    /// The place, or the module of several places, of the head for a task other than language modelling.
    pub task_head: Option<String>,
}

/// A named place where a method can act.
#[derive(Debug)]
#[non_exhaustive]
pub enum Slot<'a> {
    /// A linear layer.
    Linear(&'a mut Linear),
    /// An embedding table.
    Embedding(&'a mut Embedding),
    /// A convolution over one, two or three axes.
    Conv(&'a mut Conv),
    /// A norm.
    Norm(&'a mut Norm),
    /// Where virtual tokens go.
    Prompt(&'a mut PromptSlot),
}

impl Slot<'_> {
    /// Visits the tensors in here that take gradients: of every adapter, at work or not, and of a thawed base.
    pub fn leaves(&mut self, visit: &mut dyn FnMut(&Tensor)) {
        let mut wanted = |it: &Tensor| {
            if it.requires_grad() {
                visit(it);
            }
        };
        match self {
            Slot::Linear(it) => {
                let base = it.base();
                base.bias().into_iter().for_each(&mut wanted);
                if base.is_dense() {
                    wanted(&base.weight());
                }
            }
            Slot::Embedding(it) => wanted(it.weight()),
            Slot::Conv(it) => {
                wanted(it.base().weight());
                it.base().bias().into_iter().for_each(&mut wanted);
            }
            Slot::Norm(it) => {
                wanted(&it.base().weight);
                it.base().bias.iter().for_each(&mut wanted);
            }
            Slot::Prompt(_) => {}
        }
        let place = self.place();
        let mut names: Vec<String> = place.names().into_iter().map(|it| it.0).collect();
        names.dedup();
        for name in names {
            place.params(&name, &mut |_, it| wanted(it));
        }
    }

    /// The adapters at work in here, and whether they are merged: all that decides what a place computes, but for numbers.
    pub fn worn(&mut self) -> (Vec<String>, bool) {
        let place = self.place();
        let on = place.names().into_iter().filter(|it| it.1).map(|it| it.0);
        (on.collect(), place.merged())
    }

    fn place(&mut self) -> &mut dyn Place {
        match self {
            Slot::Linear(it) => *it,
            Slot::Embedding(it) => *it,
            Slot::Conv(it) => *it,
            Slot::Norm(it) => *it,
            Slot::Prompt(it) => *it,
        }
    }

    fn site(&mut self, at: &str) -> Site {
        let mut groups = 1;
        let (kind, shape, bias, transposed) = match self {
            Slot::Linear(it) => {
                let (base, kind) = (it.base(), SiteKind::Linear);
                let (out, inp) = base.shape();
                (
                    kind,
                    vec![out, inp],
                    base.bias().is_some(),
                    base.transposed(),
                )
            }
            Slot::Embedding(it) => (SiteKind::Embedding, it.weight().size(), false, false),
            Slot::Conv(it) => {
                let base = it.base();
                groups = base.geometry().groups;
                (
                    SiteKind::Conv,
                    base.weight().size(),
                    base.bias().is_some(),
                    false,
                )
            }
            Slot::Norm(it) => {
                let affine = it.base();
                (
                    SiteKind::Norm,
                    affine.weight.size(),
                    affine.bias.is_some(),
                    false,
                )
            }
            Slot::Prompt(it) => (SiteKind::Prompt, it.words().size(), false, false),
        };
        let mut held = Vec::new();
        for (name, _) in self.place().names() {
            self.place()
                .params(&name, &mut |param, _| held.push(param.to_owned()));
        }
        Site {
            at: at.to_owned(),
            kind,
            shape,
            bias,
            transposed,
            groups,
            held,
        }
    }
}

/// A base model: named places and a description.
pub trait Model: Send {
    /// What methods may decide by.
    fn spec(&self) -> Spec;
    /// Visits every place with the name that `named_modules()` gives it in Python, in that order: the place of virtual
    /// tokens first, whose name is empty, then the input embedding.
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>));
}

/// What every model can do with adapters.
pub trait ModelExt: Model {
    /// The model, described.
    fn outline(&mut self) -> Outline {
        let spec = self.spec();
        let mut sites = Vec::new();
        self.slots(&mut |at, mut slot| sites.push(slot.site(at)));
        Outline { spec, sites }
    }

    /// The places that a method would act on. An error where it would act on none.
    fn plan(&mut self, tuner: &dyn Tuner) -> Result<Vec<Site>> {
        let outline = self.outline();
        let tuner = tuner.resolve(&outline)?;
        tuner.check_settings(&outline)?;
        plan(&outline, &*tuner)
    }

    /// Dresses the model with a configured method under a name. An error leaves the model as it was.
    fn inject(&mut self, name: &str, tuner: &dyn Tuner) -> Result<()> {
        self.dress(name, tuner, Start::Fresh)
    }

    /// [`ModelExt::inject`], with parameters that begin as `start` says.
    fn dress(&mut self, name: &str, tuner: &dyn Tuner, start: Start) -> Result<()> {
        let fault = |why: &str| Error::Name {
            name: name.to_owned(),
            why: why.to_owned(),
        };
        if name.is_empty() || name.contains('.') {
            return Err(fault("a name may not be empty or contain a dot"));
        }
        if self.adapters().iter().any(|(it, _)| it == name) {
            return Err(fault("the model has an adapter of this name already"));
        }
        if self.merged() {
            return Err(fault("adapters are merged into the base; unmerge first"));
        }
        let outline = self.outline();
        let tuner = tuner.resolve(&outline)?;
        if start == Start::Fresh {
            tuner.check_settings(&outline)?;
        }
        let chosen: BTreeSet<String> = plan(&outline, &*tuner)?
            .into_iter()
            .map(|site| site.at)
            .collect();
        let mut injection = Injection {
            name,
            outline: &outline,
            shared: State::new(),
            start,
        };
        let mut result = Ok(());
        self.slots(&mut |at, slot| {
            if result.is_ok() && chosen.contains(at) {
                result = tuner.attach(at, slot, &mut injection);
            }
        });
        if result.is_err() {
            each(self, &mut |_, place| place.delete(name));
        }
        result
    }

    /// The adapters on the model and whether they are switched on, in the order of their first place.
    fn adapters(&mut self) -> Vec<(String, bool)> {
        let mut all: Vec<(String, bool)> = Vec::new();
        each(self, &mut |_, place| {
            for (name, on) in place.names() {
                if !all.iter().any(|(it, _)| *it == name) {
                    all.push((name, on));
                }
            }
        });
        all
    }

    /// An error that names the nearest where there is no adapter of this name.
    fn known(&mut self, name: &str) -> Result<()> {
        let all = self.adapters();
        if all.iter().any(|(it, _)| it == name) {
            return Ok(());
        }
        let hint = nearest(name, all.iter().map(|(it, _)| it.as_str()));
        let names: Vec<&String> = all.iter().map(|(it, _)| it).collect();
        Err(Error::Name {
            name: name.to_owned(),
            why: format!("not on this model, which has {names:?}{hint}"),
        })
    }

    /// Switches an adapter on or off. Any number may be on: their effects add up.
    fn switch(&mut self, name: &str, on: bool) -> Result<()> {
        self.known(name)?;
        each(self, &mut |_, place| place.switch(name, on));
        Ok(())
    }

    /// Switches one adapter on and all others off.
    fn activate(&mut self, name: &str) -> Result<()> {
        self.known(name)?;
        each(self, &mut |_, place| {
            for (it, _) in place.names() {
                place.switch(&it, it == name);
            }
        });
        Ok(())
    }

    /// Runs `body` with every adapter off, then restores the switches.
    fn without_adapters<T>(&mut self, body: impl FnOnce(&mut Self) -> T) -> T
    where
        Self: Sized,
    {
        let before = self.adapters();
        let set = |model: &mut Self, on: &dyn Fn(bool) -> bool| {
            for (name, was) in &before {
                each(model, &mut |_, place| place.switch(name, on(*was)));
            }
        };
        set(self, &|_| false);
        let result = body(self);
        set(self, &|was| was);
        result
    }

    /// Removes an adapter.
    fn delete(&mut self, name: &str) -> Result<()> {
        self.known(name)?;
        if self.merged() {
            return Err(Error::Name {
                name: name.to_owned(),
                why: "it is merged into the base; unmerge first".to_owned(),
            });
        }
        each(self, &mut |_, place| place.delete(name));
        Ok(())
    }

    /// Whether adapters are merged into the base.
    fn merged(&mut self) -> bool {
        let mut any = false;
        each(self, &mut |_, place| any |= place.merged());
        any
    }

    /// Bakes the active adapters into the base. [`ModelExt::unmerge`] gives back the very bits.
    ///
    /// An error (a method without a weight form, a weight that is not finite) leaves the model unmerged.
    fn merge(&mut self) -> Result<()> {
        let mut result = Ok(());
        each(self, &mut |at, place| {
            if result.is_ok() {
                result = place.merge(at);
            }
        });
        if result.is_err() {
            self.unmerge();
        }
        result
    }

    /// Takes merged adapters out again.
    fn unmerge(&mut self) {
        each(self, &mut |_, place| place.unmerge());
    }

    /// Bakes the active adapters into the base and drops all adapters, place by place, so that no
    /// second copy of the base is held. After an error some places are merged: the model is to be dropped.
    fn merge_and_unload(&mut self) -> Result<()> {
        let mut result = Ok(());
        each(self, &mut |at, place| {
            if result.is_ok() {
                result = place.merge(at);
                place.bare();
            }
        });
        result
    }

    /// Drops every adapter; the base is what it was.
    fn unload(&mut self) {
        self.unmerge();
        each(self, &mut |_, place| place.bare());
    }

    /// Every tensor that an adapter owns, trained or not.
    fn params(&mut self, adapter: &str) -> Vec<Param> {
        collect(self, adapter, |place, visit| place.params(adapter, visit))
    }

    /// Further tensors of an adapter's file, computed from parameters: place, name, value.
    fn derived(&mut self, adapter: &str) -> Vec<Param> {
        collect(self, adapter, |place, visit| place.derived(adapter, visit))
    }

    /// The tensors of an adapter's file.
    fn saved(&mut self, adapter: &str) -> Vec<Param> {
        collect(self, adapter, |place, visit| place.saved(adapter, visit))
    }

    /// The tensors of an adapter that training changes.
    fn trainable(&mut self, adapter: &str) -> Vec<Param> {
        let mut all = self.params(adapter);
        all.retain(|it| it.tensor.requires_grad());
        all
    }

    /// Full fine-tuning: lets tensors of the base itself take gradients, all of them or those of the places that `which`
    /// names, and gives them. They are trained copies; the file that the model was read from is not touched.
    ///
    /// The only call that does so. Refused where a weight is not kept as plain numbers, where nothing matches, and on a
    /// model that wears adapters, which would be trained against a moving base. An error leaves the model as it was.
    fn thaw(&mut self, which: Option<&Names>) -> Result<Vec<Param>> {
        if let Some((name, _)) = self.adapters().into_iter().next() {
            return Err(Error::Name {
                name,
                why: "is on this model; full fine-tuning trains the base itself: merge or delete it first".to_owned(),
            });
        }
        thaw(self, which)
    }

    /// Lets an adapter's tensors take no gradient any more, for inference.
    fn freeze(&mut self, adapter: &str) {
        for param in self.params(adapter) {
            let _ = param.tensor.set_requires_grad(false);
        }
    }
}

impl<M: Model + ?Sized> ModelExt for M {}

/// Sets the adapters of one name aside, at every place, while others come in their place.
pub(crate) fn set_aside(model: &mut dyn Model, name: &str) {
    each(model, &mut |_, place| place.set_aside(name));
}

/// Puts what was set aside back to where it stood.
pub(crate) fn put_back(model: &mut dyn Model) {
    each(model, &mut |_, place| place.put_back());
}

/// Moves the adapters of one name to where those set aside stood, which are dropped.
pub(crate) fn settle(model: &mut dyn Model, name: &str) {
    each(model, &mut |_, place| place.settle(name));
}

fn each<M: Model + ?Sized>(model: &mut M, visit: &mut dyn FnMut(&str, &mut dyn Place)) {
    model.slots(&mut |at, mut slot| visit(at, slot.place()));
}

fn collect<M: Model + ?Sized>(
    model: &mut M,
    adapter: &str,
    each: impl Fn(&dyn Place, Visit<'_>),
) -> Vec<Param> {
    let mut all = Vec::new();
    model.slots(&mut |at, mut slot| {
        let norm = matches!(slot, Slot::Norm(_));
        each(slot.place(), &mut |name, tensor| {
            all.push(Param {
                adapter: adapter.to_owned(),
                at: at.to_owned(),
                name: name.to_owned(),
                norm,
                tensor: tensor.shallow_clone(),
            });
        });
    });
    all
}

fn plan(outline: &Outline, tuner: &dyn Tuner) -> Result<Vec<Site>> {
    let mut chosen = Vec::new();
    for site in &outline.sites {
        if tuner.wants(site, outline)? {
            chosen.push(site.clone());
        }
    }
    if chosen.is_empty() {
        let named = outline.sites.iter().filter(|site| !site.at.is_empty());
        let names = named.map(|site| site.at.clone());
        return Err(Error::NoTarget {
            what: format!("the {} configuration", tuner.peft_type()),
            examples: names.take(4).collect(),
        });
    }
    Ok(chosen)
}
