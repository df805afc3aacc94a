//! A body that scores the next token: logits = H · hidden.
//!
//! The head may share the table of the input embedding; it is a place of its own all the same.

use peft_core::{Ctx, Linear, Model, Result, Slot, Spec, State};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    Cache, Decoder, Input, Labels, Network, Task,
    body::Body,
    headed::Origin,
    loss::{causal_loss, tokens_of},
    seq2seq::Seq2Seq,
    task::Classes,
};

/// The name of the head in every decoder.
pub(crate) const HEAD: &str = "lm_head";

/// A decoder with its head.
#[derive(Debug)]
pub(crate) struct LanguageModel {
    pub(crate) body: Box<dyn Body>,
    pub(crate) head: Linear,
    /// What the names of the body begin with.
    pub(crate) root: &'static str,
    /// The configuration says that the head is the input embedding.
    pub(crate) tied: bool,
    pub(crate) origin: Origin,
}

impl Decoder for LanguageModel {
    fn hidden(&self, input: &Input, cache: Option<&mut Cache>, ctx: Ctx) -> Tensor {
        self.body.hidden(input, cache, ctx)
    }

    fn head(&self) -> &Linear {
        &self.head
    }
}

impl Network for LanguageModel {
    fn task(&self) -> Task {
        Task::CausalLm
    }

    fn outputs(&self, input: &Input, ctx: Ctx) -> Result<State> {
        input.check(&self.body.sizes(), self.body.prompt().tokens())?;
        let logits = self.forward(input, ctx);
        Ok(State::from([("logits".to_owned(), logits)]))
    }

    fn loss(&self, input: &Input, labels: &Labels, ctx: Ctx) -> Result<(Tensor, i64)> {
        input.check(&self.body.sizes(), self.body.prompt().tokens())?;
        let labels = tokens_of(labels, input, self.vocab())?;
        Ok(causal_loss(self, input, labels, ctx))
    }

    fn vocab(&self) -> i64 {
        self.body.sizes().vocab
    }
    fn device(&self) -> Device {
        self.body.table().device()
    }
    fn kind(&self) -> Kind {
        self.body.table().weight().kind()
    }
    fn max_positions(&self) -> i64 {
        self.body.longest()
    }
    fn learned_positions(&self) -> bool {
        self.body.sizes().positions.is_some()
    }
    fn config(&self) -> &Value {
        &self.origin.config
    }
    fn classes(&self) -> Option<&Classes> {
        None
    }
    fn fresh(&self) -> &[String] {
        &self.origin.fresh
    }
    fn aside(&self) -> &[String] {
        &self.origin.aside
    }
    fn decoder(&self) -> Option<&dyn Decoder> {
        Some(self)
    }
    fn seq2seq(&self) -> Option<&dyn Seq2Seq> {
        None
    }
}

impl Model for LanguageModel {
    fn spec(&self) -> Spec {
        Spec {
            output_embedding: Some(HEAD.into()),
            tied: self.tied,
            ..self.body.spec(self.root)
        }
    }

    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        self.body.slots(self.root, visit);
        visit(HEAD, Slot::Linear(&mut self.head));
    }
}
