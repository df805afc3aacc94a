//! Cross-entropy over a vocabulary without holding all of its scores.
//!
//! For n positions and V tokens the scores are n × V numbers: 100 MB for 512
//! positions of GPT-2, as much again for their gradient, and most passes of a
//! training step over memory. Here the head runs only where there is a label,
//! some positions at a time, and since the gradient of the sum of losses
//! with respect to the scores is softmax(z) − onehot(y), known as soon as z is,
//! the gradient with respect to the hidden vectors is computed on the spot and
//! the scores are dropped. The products are those of an ordinary
//! forward and backward pass; only the memory is gone.
//!
//! A head whose own weight W is trained (full fine-tuning) gets its gradient in the same pass:
//! dW = Σ chunks (softmax(z) − onehot(y))ᵀ rows. A head with an adapter needs its scores in the backward pass; then
//! libtorch differentiates, chunk by chunk.

use std::sync::Mutex;

use peft_core::{Ctx, Error, Linear, Result};
use peft_torch::{Function, apply, cross_entropy_, linear, vjp};
use tch::{Kind, Reduction, TchError, Tensor};

use crate::{
    Decoder, Input, Labels,
    input::{fault, within},
    task::{Classes, Problem},
};

/// The label of a position that does not count.
pub const IGNORE: i64 = -100;

/// Positions of the head that are in memory at once.
const CHUNK: i64 = 256;

/// Sum of the losses of the labelled positions, and how many there are.
///
/// labels: `[batch, seq]`, [`IGNORE`] where nothing is to be predicted; they are shifted here: position i
/// predicts label i + 1, as `transformers` does. The sum is a scalar in fp32; divide it by the
/// number of labels of the whole window for the mean that Hugging Face reports.
pub fn causal_loss(model: &dyn Decoder, input: &Input, labels: &Tensor, ctx: Ctx) -> (Tensor, i64) {
    let hidden = model.hidden(input, None, ctx);
    let (rows, targets) = labelled(&hidden, labels);
    let count = targets.size()[0];
    if count == 0 {
        return (hidden.sum(Kind::Float) * 0.0, 0);
    }
    if ctx.rows.is_some() {
        // The head must see whole rows to know whose they are.
        let logits = model.head().forward(&hidden, ctx);
        let (rows, targets) = labelled(&logits, labels);
        let scores = rows.to_kind(Kind::Float);
        let sum = scores.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, IGNORE, 0.0);
        return (sum, count);
    }
    (head_loss(model.head(), &rows, &targets, ctx), count)
}

/// The hidden vectors that predict something `[n, hidden]`, and what they predict `[n]`.
///
/// labels: `[batch, seq]`; hidden may have more positions in front of them, the last of which predicts the first label.
pub fn labelled(hidden: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
    let labels = beside(hidden, labels);
    let (batch, seq) = (labels.size()[0], labels.size()[1]);
    let next = labels.narrow(1, 1, seq - 1); // [batch, seq - 1]
    let last = Tensor::full([batch, 1], IGNORE, (Kind::Int64, labels.device()));
    labelled_here(hidden, &Tensor::cat(&[&next, &last], 1))
}

/// The same where each position predicts its own label.
pub(crate) fn labelled_here(hidden: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
    let targets = beside(hidden, labels).reshape([-1]); // [batch · seq]
    let at = targets.ne(IGNORE).nonzero().view([-1]);
    let width = hidden.size()[2];
    let rows = hidden.reshape([-1, width]).index_select(0, &at);
    (rows, targets.index_select(0, &at))
}

/// Labels `[batch, seq]` as long as `hidden`, which may have positions in front that predict nothing of their own.
fn beside(hidden: &Tensor, labels: &Tensor) -> Tensor {
    match hidden.size()[1] - labels.size()[1] {
        0 => labels.shallow_clone(),
        ahead => labels.pad([ahead, 0], "constant", IGNORE as f64),
    }
}

/// Sum of cross-entropies of `head(rows)` against `targets`; rows: `[n, hidden]`, targets: `[n]`.
pub fn head_loss(head: &Linear, rows: &Tensor, targets: &Tensor, ctx: Ctx) -> Tensor {
    if head.is_adapted() || head.is_trained() && head.base().bias().is_some() {
        let chunks = rows
            .split(CHUNK, 0)
            .into_iter()
            .zip(targets.split(CHUNK, 0));
        let losses = chunks.map(|(rows, targets)| {
            let logits = head.forward(&rows, ctx).to_kind(Kind::Float);
            logits.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, IGNORE, 0.0)
        });
        return losses.reduce(|a, b| a + b).expect("at least one chunk");
    }
    let base = head.base();
    if base.is_dense() && base.weight().requires_grad() && base.bias().is_none() {
        return trained_head_loss(&base.weight(), rows, targets);
    }
    let wanted = rows.requires_grad();
    let [loss] = apply(&[rows], || {
        let mut sum = Tensor::zeros([0i64; 0], (Kind::Float, rows.device()));
        let mut grads = Vec::new();
        for (rows, targets) in rows.split(CHUNK, 0).iter().zip(targets.split(CHUNK, 0)) {
            let rows = rows.detach().set_requires_grad(wanted);
            let logits = tch::with_grad(|| head.forward(&rows, ctx)); // [chunk, vocab]
            let mut scores = logits.detach();
            let losses = cross_entropy_(&mut scores, &targets); // scores hold their gradient now
            sum += losses.sum(Kind::Float);
            if wanted {
                let grad = vjp(&[&logits], &[&scores], &[&rows]).expect("a product");
                grads.extend(grad.into_iter().flatten());
            }
        }
        let grad = wanted.then(|| Tensor::cat(&grads, 0));
        ([sum], HeadLoss(grad))
    });
    loss
}

/// [`head_loss`] for a weight `[vocab, hidden]` that is trained itself.
fn trained_head_loss(weight: &Tensor, rows: &Tensor, targets: &Tensor) -> Tensor {
    let wanted = rows.requires_grad();
    let [loss] = apply(&[rows, weight], || {
        let (rows, weight) = (rows.detach(), weight.detach());
        let mut sum = Tensor::zeros([0i64; 0], (Kind::Float, rows.device()));
        let mut of_rows = Vec::new();
        let mut of_weight: Option<Tensor> = None;
        for (rows, targets) in rows.split(CHUNK, 0).iter().zip(targets.split(CHUNK, 0)) {
            let mut scores = linear(rows, &weight, None); // [chunk, vocab]
            let losses = cross_entropy_(&mut scores, &targets); // scores hold their gradient now
            sum += losses.sum(Kind::Float);
            if wanted {
                of_rows.push(linear(&scores, &weight.tr(), None));
            }
            let part = linear(&scores.tr(), &rows.tr(), None); // [vocab, hidden]
            of_weight = Some(match of_weight {
                None => part,
                Some(mut sum) => sum.g_add_(&part),
            });
        }
        let of_rows = wanted.then(|| Tensor::cat(&of_rows, 0));
        (
            [sum],
            TrainedHeadLoss(Mutex::new(Some([of_rows, of_weight]))),
        )
    });
    loss
}

/// Holds the gradients of the sum with respect to the rows and the weight until they are given away: the second is as large as
/// the head, and a copy of it would be the peak of a step.
struct TrainedHeadLoss(Mutex<Option<[Option<Tensor>; 2]>>);

impl Function for TrainedHeadLoss {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let Some(g) = &grads[0] else {
            return Ok(vec![None, None]);
        };
        let held = self.0.lock().map_or(None, |mut it| it.take());
        let Some(all) = held else {
            let why = "a second backward pass through the loss of a trained head, whose gradients are given away";
            return Err(TchError::Torch(why.to_owned()));
        };
        let scaled = |mut t: Tensor| t.g_mul_(&g.to_kind(t.kind()));
        Ok(all.map(|it| it.map(scaled)).into())
    }
}

/// Holds the gradient of the sum with respect to the rows.
struct HeadLoss(Option<Tensor>);

impl Function for HeadLoss {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let both = grads[0].as_ref().zip(self.0.as_ref());
        Ok(vec![both.map(|(g, rows)| rows * g.to_kind(rows.kind()))])
    }
}

/// Sum of cross-entropies of scores `[n, classes]` against targets `[n]`, and how many of these count.
pub(crate) fn class_loss(logits: &Tensor, targets: &Tensor) -> (Tensor, i64) {
    let logits = logits.to_kind(Kind::Float);
    let sum = logits.cross_entropy_loss::<Tensor>(targets, None, Reduction::Sum, IGNORE, 0.0);
    (sum, targets.ne(IGNORE).sum(Kind::Int64).int64_value(&[]))
}

/// The loss of one answer a row; `logits` gives `[batch, labels]`, once the labels are known to fit.
pub(crate) fn rows_loss(
    classes: &Classes,
    labels: &Labels,
    batch: i64,
    logits: impl FnOnce() -> Tensor,
) -> Result<(Tensor, i64)> {
    let outputs = classes.names.len() as i64;
    let wide = [batch, outputs];
    if matches!(labels, Labels::Tokens(_) | Labels::Spans { .. }) {
        let sort = labels.sort();
        return Err(fault(format!(
            "labels are {sort}, expected an answer for each row"
        )));
    }
    match (labels, problem(classes, labels)?) {
        (Labels::Classes(targets), Problem::SingleLabel) => {
            shaped(targets, &[batch])?;
            in_range(targets, outputs)?;
            Ok(class_loss(&logits(), targets))
        }
        (Labels::MultiLabel(marks), Problem::MultiLabel) => {
            shaped(marks, &wide)?;
            let marks = marks.to_kind(Kind::Float);
            let fits = marks.ge(0.0).logical_and(&marks.le(1.0)).all();
            if fits.int64_value(&[]) == 0 {
                return Err(fault("labels of several classes are 0 or 1".to_owned()));
            }
            let scores = logits().to_kind(Kind::Float);
            let none = None::<Tensor>;
            let sum = scores.binary_cross_entropy_with_logits(
                &marks,
                none.as_ref(),
                none.as_ref(),
                Reduction::Sum,
            );
            Ok((sum, batch * outputs))
        }
        (Labels::Values(values), Problem::Regression) => {
            let one = outputs == 1 && values.size() == [batch];
            if !one {
                shaped(values, &wide)?;
            }
            let values = values.to_kind(Kind::Float).reshape(wide);
            if values.isfinite().all().int64_value(&[]) == 0 {
                return Err(fault("labels are not finite".to_owned()));
            }
            let sum = logits()
                .to_kind(Kind::Float)
                .mse_loss(&values, Reduction::Sum);
            Ok((sum, batch * outputs))
        }
        (labels, problem) => Err(fault(format!(
            "labels are {}, but the head is for {}",
            labels.sort(),
            problem.name()
        ))),
    }
}

/// What the outputs mean: as the configuration says, or as the labels look.
fn problem(classes: &Classes, labels: &Labels) -> Result<Problem> {
    if let Some(problem) = classes.problem {
        return Ok(problem);
    }
    match (classes.names.len(), labels) {
        (1, _) => Ok(Problem::Regression),
        (_, Labels::Classes(_)) => Ok(Problem::SingleLabel),
        (_, Labels::MultiLabel(_)) => Ok(Problem::MultiLabel),
        // Python would take them for marks of several classes.
        (n, _) => Err(fault(format!(
            "labels are {}, but the head has {n} outputs and no `problem_type`; known are {:?}",
            labels.sort(),
            Problem::NAMES.map(|(name, _)| name)
        ))),
    }
}

/// Half the sum of the losses of the beginnings and the ends; scores: `[batch, seq]` each, labels: `[batch]` each.
///
/// A label that lies outside of the text counts for nothing, and so the two means may go over different numbers of rows:
/// the sum is then scaled to the larger.
/// Scores may have more positions in front of those of the text.
///
/// Padding takes part in the softmax, as in `transformers`: how wide a batch is shows in its loss.
pub(crate) fn span_loss(
    scores: &[Tensor; 2],
    labels: [&Tensor; 2],
    ids: &Tensor,
) -> Result<(Tensor, i64)> {
    let (batch, seq) = (ids.size()[0], ids.size()[1]);
    let ahead = scores[0].size()[1] - seq;
    let mut parts = Vec::new();
    for (scores, labels) in scores.iter().zip(labels) {
        shaped(labels, &[batch])?;
        whole(labels)?;
        let targets = labels.clamp(0, seq);
        let targets = (&targets + ahead).masked_fill(&targets.eq(seq), IGNORE);
        parts.push(class_loss(scores, &targets));
    }
    let count = parts.iter().map(|it| it.1).max().unwrap_or(0);
    let scaled = parts.iter().map(|(sum, n)| match n {
        0 => sum * 0.0,
        n => sum * (count as f64 / *n as f64),
    });
    let sum = scaled.reduce(|a, b| a + b).expect("two parts");
    Ok((sum / 2.0, count))
}

/// Labels for each token `[batch, seq]` below `known`, or [`IGNORE`].
pub(crate) fn tokens_of<'a>(labels: &'a Labels, input: &Input, known: i64) -> Result<&'a Tensor> {
    let tokens = each_token(labels)?;
    shaped(tokens, &input.ids.size())?;
    in_range(tokens, known)?;
    Ok(tokens)
}

/// Labels that are one for each token.
pub(crate) fn each_token(labels: &Labels) -> Result<&Tensor> {
    match labels {
        Labels::Tokens(tokens) => Ok(tokens),
        other => Err(fault(format!(
            "labels are {}, expected one for each token",
            other.sort()
        ))),
    }
}

/// Checks labels that are numbers of classes.
pub(crate) fn in_range(labels: &Tensor, known: i64) -> Result<()> {
    whole(labels)?;
    let counted = labels.masked_fill(&labels.eq(IGNORE), 0);
    within("labels", &counted, known)
}

fn whole(labels: &Tensor) -> Result<()> {
    match labels.kind() {
        Kind::Int64 => Ok(()),
        kind => Err(fault(format!(
            "labels are of type {kind:?}, expected Int64"
        ))),
    }
}

pub(crate) fn shaped(labels: &Tensor, expected: &[i64]) -> Result<()> {
    match labels.size() {
        size if size == expected => Ok(()),
        got => Err(Error::Shape {
            key: "labels".to_owned(),
            expected: expected.to_vec(),
            got,
        }),
    }
}
