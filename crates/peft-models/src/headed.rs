//! A body with the head of a task that is not to go on with a text.

use peft_core::{Ctx, Model, Result, Slot, Spec, State};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::{
    Decoder, Input, Labels, Network, Task,
    body::Body,
    head::Head,
    input::fault,
    loss::{class_loss, head_loss, labelled_here, rows_loss, span_loss, tokens_of},
    seq2seq::Seq2Seq,
    task::Classes,
};

/// Where a model comes from and how it would be saved.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) config: Value,
    /// Tensors that were drawn at random.
    pub(crate) fresh: Vec<String>,
    /// Tensors of the checkpoint that belong to another head.
    pub(crate) aside: Vec<String>,
}

/// A body with a head.
#[derive(Debug)]
pub(crate) struct Headed {
    pub(crate) body: Box<dyn Body>,
    pub(crate) head: Head,
    /// What the names of the body begin with.
    pub(crate) root: &'static str,
    pub(crate) task: Task,
    pub(crate) classes: Option<Classes>,
    /// The last layer of a masked language model is the input embedding.
    pub(crate) tied: bool,
    pub(crate) origin: Origin,
}

impl Headed {
    fn check(&self, input: &Input) -> Result<()> {
        input.check(&self.body.sizes(), self.body.prompt().tokens())?;
        match self.head {
            Head::Last { padding: None, .. } if input.ids.size()[0] != 1 => Err(fault(
                "several rows, but no `pad_token_id` in config.json says where each of them ends"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    fn hidden(&self, input: &Input, ctx: Ctx) -> Tensor {
        self.body.hidden(input, None, ctx)
    }

    /// Scores of the beginning and of the end, each `[batch, seq]`.
    fn spans(&self, hidden: &Tensor, ctx: Ctx) -> Option<[Tensor; 2]> {
        match &self.head {
            Head::Spans { out } => {
                let scores = out.layer.forward(hidden, ctx); // [batch, seq, 2]
                Some([0, 1].map(|i| scores.select(2, i)))
            }
            _ => None,
        }
    }
}

impl Network for Headed {
    fn task(&self) -> Task {
        self.task
    }

    fn outputs(&self, input: &Input, ctx: Ctx) -> Result<State> {
        self.check(input)?;
        let hidden = self.hidden(input, ctx);
        let mut outputs = State::new();
        let mut put = |name: &str, tensor: Tensor| outputs.insert(name.to_owned(), tensor);
        if let Head::Bare { pooler } = &self.head {
            if let Some(pooler) = pooler {
                put("pooler_output", Head::pooled(&pooler.layer, &hidden, ctx));
            }
            put("last_hidden_state", hidden);
        } else if let Some([start, end]) = self.spans(&hidden, ctx) {
            put("start_logits", start);
            put("end_logits", end);
        } else if let Some(logits) = self.head.logits(&hidden, &input.ids, ctx) {
            put("logits", logits);
        }
        Ok(outputs)
    }

    fn loss(&self, input: &Input, labels: &Labels, ctx: Ctx) -> Result<(Tensor, i64)> {
        self.check(input)?;
        let classes = self.classes.as_ref();
        match &self.head {
            Head::Bare { .. } => Err(fault(format!("{} has no labels and no loss", self.task))),
            Head::Spans { .. } => {
                let (start, end) = match labels {
                    Labels::Spans { start, end } => (start, end),
                    other => return Err(wrong_sort(self.task, other)),
                };
                let scores = self.spans(&self.hidden(input, ctx), ctx);
                span_loss(&scores.expect("a head for spans"), [start, end], &input.ids)
            }
            Head::Vocabulary { out, .. } => {
                let labels = tokens_of(labels, input, self.vocab())?;
                let hidden = self.hidden(input, ctx);
                if ctx.rows.is_some() {
                    // The head must see whole rows to know whose they are.
                    let logits = self.head.logits(&hidden, &input.ids, ctx);
                    let logits = logits.expect("a head over the vocabulary");
                    let (rows, targets) = labelled_here(&logits, labels);
                    return Ok(class_loss(&rows, &targets));
                }
                let (rows, targets) = labelled_here(&hidden, labels);
                let count = targets.size()[0];
                if count == 0 {
                    return Ok((hidden.sum(Kind::Float) * 0.0, 0));
                }
                let rows = self.head.transformed(&rows, ctx);
                Ok((head_loss(&out.layer, &rows, &targets, ctx), count))
            }
            Head::Each { .. } => {
                let known = classes.map_or(0, |it| it.names.len() as i64);
                let labels = tokens_of(labels, input, known)?;
                let logits = self.head.logits(&self.hidden(input, ctx), &input.ids, ctx);
                let logits = logits.expect("a head for classes"); // [batch, seq, labels]
                let (rows, targets) = labelled_here(&logits, labels);
                Ok(class_loss(&rows, &targets))
            }
            Head::First { .. } | Head::Last { .. } => {
                let classes = classes.expect("a classifier has classes");
                let logits = || {
                    let hidden = self.hidden(input, ctx);
                    let logits = self.head.logits(&hidden, &input.ids, ctx);
                    logits.expect("a head for classes") // [batch, labels]
                };
                rows_loss(classes, labels, input.ids.size()[0], logits)
            }
        }
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
        self.classes.as_ref()
    }
    fn fresh(&self) -> &[String] {
        &self.origin.fresh
    }
    fn aside(&self) -> &[String] {
        &self.origin.aside
    }
    fn decoder(&self) -> Option<&dyn Decoder> {
        None
    }
    fn seq2seq(&self) -> Option<&dyn Seq2Seq> {
        None
    }
}

/// An error for labels that belong to another task.
pub(crate) fn wrong_sort(task: Task, labels: &Labels) -> peft_core::Error {
    fault(format!(
        "labels are {}, which {task} does not take",
        labels.sort()
    ))
}

impl Model for Headed {
    fn spec(&self) -> Spec {
        let output = match &self.head {
            Head::Vocabulary { out, .. } => Some(out.at.clone()),
            _ => None,
        };
        Spec {
            output_embedding: output,
            tied: self.tied,
            task_head: self.head.place().map(str::to_owned),
            ..self.body.spec(self.root)
        }
    }

    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        self.body.slots(self.root, visit);
        self.head.slots(visit);
    }
}
