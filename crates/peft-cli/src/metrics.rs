//! How good a model is at its task, beyond the loss: what its answers are worth.
//!
//! | task | figures |
//! | --- | --- |
//! | classes | accuracy, F1 (mean over classes), a table of what was taken for what |
//! | several classes | F1 (all marks together), rows that are right as a whole |
//! | numbers | mean squared and absolute error, correlation |
//! | classes of tokens | accuracy, F1 of entities where tags are in IOB form |
//! | answers in a text | exact match and F1 of words, as SQuAD has them |
//! | hidden words | perplexity, which is e to the power of the loss |
//! | texts for texts | the same; `peft eval` writes them, too, and measures BLEU and ROUGE |

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use peft::{
    Ctx,
    data::{IGNORED, Pass, Problem, Target, TaskDataset},
    metrics::{
        Confusion, Flags, Numbers, answer_f1, entities, exact_match, perplexity, token_accuracy,
    },
    models::{Network, Task},
    train::{Evaluation, Rows, evaluate, loss, task_tensors},
};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

/// What was found.
#[derive(Debug)]
pub(crate) struct Judged {
    /// The loss.
    pub(crate) loss: Evaluation,
    /// Figures by name.
    pub(crate) figures: Map<String, Value>,
    /// What was taken for what, for single classes.
    pub(crate) confusion: Option<Confusion>,
    /// A table in words: a line a class.
    pub(crate) report: Option<String>,
}

impl Judged {
    /// The figures on a line.
    pub(crate) fn line(&self) -> String {
        let all = self
            .figures
            .iter()
            .map(|(name, value)| match value.as_f64() {
                Some(number) => format!("{name} {number:.4}"),
                None => format!("{name} {value}"),
            });
        all.collect::<Vec<_>>().join(" · ")
    }
}

/// Judges a model by some rows of its task.
pub(crate) fn judge(
    model: &dyn Network,
    data: &TaskDataset,
    rows: &[usize],
    size: usize,
) -> Result<Judged> {
    let _off = tch::no_grad_guard();
    let all = Rows::of_task(data, rows.to_vec())?;
    let mut sum = |batch: &peft::train::Batch| loss(model, batch, Ctx::EVAL);
    let loss = evaluate(&mut sum, &all, size, &mut |_, _| ())?;
    let mut judged = answers(model, data, rows, size)?;
    if judged.figures.is_empty() {
        let value = perplexity(loss.loss());
        judged.figures.insert("perplexity".into(), json!(value));
    }
    judged.loss = loss;
    Ok(judged)
}

/// The figures alone that are more than the loss in other words.
pub(crate) fn figures(
    model: &dyn Network,
    data: &TaskDataset,
    rows: &[usize],
    size: usize,
) -> Result<BTreeMap<String, f64>> {
    let _off = tch::no_grad_guard();
    let all = answers(model, data, rows, size)?.figures.into_iter();
    Ok(all
        .filter_map(|(name, value)| Some((name, value.as_f64()?)))
        .collect())
}

/// Everything but the loss.
fn answers(model: &dyn Network, data: &TaskDataset, rows: &[usize], size: usize) -> Result<Judged> {
    let mut judged = Judged {
        loss: Evaluation::default(),
        figures: Map::new(),
        confusion: None,
        report: None,
    };
    match model.task() {
        Task::SeqCls => of_rows(model, data, rows, size, &mut judged)?,
        Task::TokenCls => of_tokens(model, data, rows, size, &mut judged)?,
        Task::QuestionAns => of_answers(model, data, rows, size, &mut judged)?,
        _ => {}
    }
    Ok(judged)
}

/// `each(rows, outputs by name)` for every batch.
fn outputs(
    model: &dyn Network,
    data: &TaskDataset,
    rows: &[usize],
    size: usize,
    each: &mut dyn FnMut(&[usize], &peft::core::State) -> Result<()>,
) -> Result<()> {
    for rows in rows.chunks(size.max(1)) {
        let batch = data.batch(rows, Pass::Eval, 8)?;
        let (input, _) = task_tensors(&batch, model.device())?;
        each(rows, &model.outputs(&input, Ctx::EVAL)?)?;
    }
    Ok(())
}

fn named<'a>(state: &'a peft::core::State, name: &str) -> Result<&'a Tensor> {
    state
        .get(name)
        .with_context(|| format!("the model gives no `{name}`"))
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    let flat = tensor.to_kind(Kind::Float).contiguous().view([-1]);
    Ok(Vec::<f32>::try_from(flat)?)
}

fn of_rows(
    model: &dyn Network,
    data: &TaskDataset,
    rows: &[usize],
    size: usize,
    judged: &mut Judged,
) -> Result<()> {
    let (mut scores, mut width) = (Vec::new(), 1);
    outputs(model, data, rows, size, &mut |_, state| {
        let logits = named(state, "logits")?;
        width = usize::try_from(*logits.size().last().unwrap_or(&1))?;
        scores.extend(floats(logits)?);
        Ok(())
    })?;
    let target = |at: &usize| data.get(*at).map(|row| row.target);
    match data.problem() {
        Some(Problem::SingleLabel) => {
            let said: Vec<usize> = scores.chunks(width).map(largest).collect();
            let truth: Vec<usize> = rows
                .iter()
                .filter_map(|at| match target(at) {
                    Some(Target::Class(class)) => Some(class),
                    _ => None,
                })
                .collect();
            let confusion = Confusion::of(data.classes(), &truth, &said)?;
            judged
                .figures
                .insert("accuracy".into(), json!(confusion.accuracy()));
            judged
                .figures
                .insert("f1".into(), json!(confusion.macro_mean().f1));
            judged.report = Some(confusion.report());
            judged.confusion = Some(confusion);
        }
        Some(Problem::MultiLabel) => {
            let said: Vec<bool> = scores.iter().map(|score| *score > 0.0).collect();
            let mut truth = Vec::new();
            for at in rows {
                if let Some(Target::Flags(flags)) = target(at) {
                    truth.extend(flags.iter().map(|flag| *flag > 0.5));
                }
            }
            let flags = Flags::of(data.classes(), &truth, &said)?;
            judged.figures.insert("f1".into(), json!(flags.micro().f1));
            judged.figures.insert("exact".into(), json!(flags.exact()));
            judged.report = Some(flags.report());
        }
        _ => {
            let mut truth: Vec<f64> = Vec::new();
            for at in rows {
                if let Some(Target::Numbers(numbers)) = target(at) {
                    truth.extend(numbers.iter().map(|it| f64::from(*it)));
                }
            }
            let said: Vec<f64> = scores.iter().map(|it| f64::from(*it)).collect();
            let numbers = Numbers::of(&truth, &said)?;
            judged.figures.insert("mse".into(), json!(numbers.mse));
            judged.figures.insert("mae".into(), json!(numbers.mae));
            judged
                .figures
                .insert("pearson".into(), json!(numbers.pearson));
        }
    }
    Ok(())
}

fn of_tokens(
    model: &dyn Network,
    data: &TaskDataset,
    rows: &[usize],
    size: usize,
    judged: &mut Judged,
) -> Result<()> {
    let classes = data.classes();
    let name = |class: usize| classes.get(class).cloned().unwrap_or_default();
    let (mut truth, mut said): (Vec<Vec<String>>, Vec<Vec<String>>) = Default::default();
    outputs(model, data, rows, size, &mut |rows, state| {
        let logits = named(state, "logits")?;
        // Virtual tokens stand in front and have no label.
        let cols = logits.size()[1];
        for (i, at) in (0i64..).zip(rows) {
            let Some(Target::Tokens(labels)) = data.get(*at).map(|row| row.target) else {
                continue;
            };
            let width = data.batch(rows, Pass::Eval, 8)?.cols as i64;
            let best = logits
                .get(i)
                .narrow(0, cols - width, width)
                .argmax(-1, false);
            let best = Vec::<i64>::try_from(best)?;
            let pairs = labels
                .iter()
                .zip(&best)
                .filter(|(label, _)| **label != IGNORED);
            let (t, s): (Vec<String>, Vec<String>) = pairs
                .map(|(label, best)| {
                    let at = |it: i64| usize::try_from(it).unwrap_or(usize::MAX);
                    (name(at(*label)), name(at(*best)))
                })
                .unzip();
            truth.push(t);
            said.push(s);
        }
        Ok(())
    })?;
    judged
        .figures
        .insert("accuracy".into(), json!(token_accuracy(&truth, &said)?));
    if classes.iter().any(|it| it.starts_with("B-")) {
        let found = entities(&truth, &said)?;
        judged
            .figures
            .insert("entity_f1".into(), json!(found.micro.f1));
        judged.report = Some(found.report());
    }
    Ok(())
}

fn of_answers(
    model: &dyn Network,
    data: &TaskDataset,
    rows: &[usize],
    size: usize,
    judged: &mut Judged,
) -> Result<()> {
    let mut scores: std::collections::BTreeMap<usize, (Vec<f32>, Vec<f32>)> = Default::default();
    outputs(model, data, rows, size, &mut |rows, state| {
        let (starts, ends) = (named(state, "start_logits")?, named(state, "end_logits")?);
        let width = data.batch(rows, Pass::Eval, 8)?.cols as i64;
        let real = |t: &Tensor, i: i64| {
            let row = t.get(i);
            floats(&row.narrow(0, row.size()[0] - width, width))
        };
        for (i, at) in (0i64..).zip(rows) {
            let length = data.get(*at).map_or(0, |row| row.ids.len());
            let cut = |mut it: Vec<f32>| {
                it.truncate(length);
                it
            };
            scores.insert(*at, (cut(real(starts, i)?), cut(real(ends, i)?)));
        }
        Ok(())
    })?;
    let mut examples: Vec<usize> = rows.iter().filter_map(|at| data.example_of(*at)).collect();
    examples.sort_unstable();
    examples.dedup();
    let (mut exact, mut f1, mut count) = (0.0, 0.0, 0.0);
    let none: &[f32] = &[];
    for example in examples {
        let found = data.answer(
            example,
            |row| {
                scores
                    .get(&row)
                    .map_or((none, none), |it| (it.0.as_slice(), it.1.as_slice()))
            },
            &peft::data::Search::default(),
        )?;
        let right = &data.questions()[example].answers;
        exact += exact_match(right, &found.text);
        f1 += answer_f1(right, &found.text);
        count += 1.0;
    }
    if count > 0.0 {
        judged
            .figures
            .insert("exact_match".into(), json!(exact / count));
        judged.figures.insert("f1".into(), json!(f1 / count));
    }
    Ok(())
}

/// Where the largest score is; of equal ones the first, as `argmax` has it.
fn largest(scores: &[f32]) -> usize {
    let order = |a: &(usize, &f32), b: &(usize, &f32)| a.1.total_cmp(b.1).then(b.0.cmp(&a.0));
    let best = scores.iter().enumerate().max_by(order);
    best.map_or(0, |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_scores_the_first_is_the_largest() {
        for (scores, at) in [
            (&[1.0, 3.0, 3.0][..], 1),
            (&[0.0; 4], 0),
            (&[-2.0, -1.0], 1),
            (&[], 0),
        ] {
            assert_eq!(largest(scores), at, "{scores:?}");
        }
    }
}
