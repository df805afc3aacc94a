//! A configured method, and what it is told of a model before it may touch it.
//!
//! Injection has three steps, so that an error leaves nothing half done: `resolve` (fill in what only the model
//! knows), `wants` (asked of every place), `attach` (only where wanted).

use std::fmt;

use serde_json::Value;

use crate::{Param, Result, Schedule, Slot, Spec, State};

/// What kind of place a [`Site`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SiteKind {
    /// [`Slot::Linear`]
    Linear,
    /// [`Slot::Embedding`]
    Embedding,
    /// [`Slot::Conv`]
    Conv,
    /// [`Slot::Norm`]
    Norm,
    /// [`Slot::Prompt`]
    Prompt,
}

impl fmt::Display for SiteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SiteKind::Linear => "a linear layer",
            SiteKind::Embedding => "an embedding",
            SiteKind::Norm => "a norm",
            SiteKind::Conv => "a convolution",
            SiteKind::Prompt => "the place of virtual tokens",
        })
    }
}

/// One place of a model, described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Site {
    /// Its name: `model.layers.0.self_attn.q_proj`.
    pub at: String,
    /// What it is.
    pub kind: SiteKind,
    /// Linear: `[out, in]`; embedding: `[vocab, hidden]`; convolution: `[out, in / groups, kernel…]`; norm: `[hidden]`; virtual tokens: the input embedding's.
    pub shape: Vec<i64>,
    /// It has a bias.
    pub bias: bool,
    /// Its weight is kept `[in, out]`, in memory and on disk.
    pub transposed: bool,
    /// Groups of channels of a convolution; 1 elsewhere.
    pub groups: i64,
    /// What adapters here own already, by name on disk below the place.
    pub held: Vec<String>,
}

/// A model described: all that a method may decide by, before it touches anything.
#[derive(Debug, Clone)]
pub struct Outline {
    /// Sizes and names.
    pub spec: Spec,
    /// Every place, in the order of the model.
    pub sites: Vec<Site>,
}

impl Outline {
    /// The place called `at`.
    pub fn site(&self, at: &str) -> Option<&Site> {
        self.sites.iter().find(|site| site.at == at)
    }
}

/// With what the parameters of an adapter begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the method's own initialisation.
    Fresh,
    /// With the tensors of an adapter file, which are put in next. A method whose file holds less than what it trains
    /// (virtual tokens that an encoder computes) attaches what the file can fill.
    Saved,
    /// With everything that it trains, which is put in next: training goes on.
    Resumed,
}

/// One injection under way: shared by all the places that one method attaches to.
#[derive(Debug)]
pub struct Injection<'a> {
    /// The name of the adapter.
    pub name: &'a str,
    /// The model.
    pub outline: &'a Outline,
    /// Tensors that several places share, by a name of the method's own.
    pub shared: State,
    /// With what the parameters begin.
    pub start: Start,
}

/// A configured method, ready to dress a model.
pub trait Tuner: fmt::Debug + Send {
    /// The value of `peft_type`.
    fn peft_type(&self) -> &'static str;

    /// The same method with everything filled in that only the model knows (default targets,
    /// `all-linear`): what `adapter_config.json` then says. Checks what can be checked.
    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>>;

    /// What whoever sets the method up should hear of, though it changes no number: a pattern that matches nothing is a typing
    /// error. Not asked of a file, which works as it is. The configuration is a resolved one.
    fn check_settings(&self, _outline: &Outline) -> Result<()> {
        Ok(())
    }

    /// Whether this method acts on `site`. Asked everywhere before anything is attached.
    fn wants(&self, site: &Site, outline: &Outline) -> Result<bool>;

    /// Acts on a place it wants. After an error all places are undressed again.
    fn attach(&self, at: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()>;

    /// The content of `adapter_config.json`.
    fn to_json(&self) -> Value;

    /// The configuration that goes with what [`Params::saved`](crate::Params::saved) writes, where it is another than this one.
    fn saved(&self) -> Option<Box<dyn Tuner>> {
        None
    }

    /// The configuration with what only the trained tensors know (which ranks are left), where there is such a thing.
    fn completed(&self, _params: &[Param]) -> Option<Box<dyn Tuner>> {
        None
    }

    /// What it does while it is trained, besides its forward pass.
    fn schedule(&self) -> Option<Box<dyn Schedule>> {
        None
    }

    /// The key of a parameter on disk. The default is what Python's `peft` writes for weight-space methods.
    fn key(&self, at: &str, param: &str) -> String {
        format!("base_model.model.{at}.{param}")
    }

    /// The name of a parameter in Python's live model, without the adapter's name: `prompt_encoder.embedding.weight`.
    fn live_key(&self, at: &str, param: &str) -> String {
        self.key(at, param)
    }
}
