//! A row as the model sees it, with what it is to say.
//!
//! Tokens are shown as they stand in the vocabulary (`##ing`, `▁the`), since how
//! a word was cut is what one wants to see here. Byte-level vocabularies write
//! bytes as other letters, so theirs are shown as text where they are any.

use super::Targets;
use super::dataset::{Pass, Target, TaskDataset};
use crate::batch::IGNORED;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// One token of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskPiece {
    /// Its id.
    pub id: u32,
    /// As it stands in the vocabulary.
    pub token: String,
    /// Which text of a pair it is of; 0 where the tokenizer does not say.
    pub segment: u8,
    /// What the model is to say of this token, where it is asked token by token: a class, or the
    /// token that is hidden.
    pub label: Option<String>,
}

/// A row and its label, to be printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The tokens.
    pub pieces: Vec<TaskPiece>,
    /// What the model is to say of the whole row: a class, classes, numbers, an answer.
    pub label: Option<String>,
    /// The tokens of the target, where that is another text.
    pub target: Vec<TaskPiece>,
}

impl TaskDataset {
    /// Row `at` with its label, or nothing beyond the end; hidden tokens as in evaluation.
    pub fn show(&self, tokenizer: &Tokenizer, at: usize) -> Result<Shown> {
        let Some(row) = self.get(at) else {
            return Err(Error::Option(format!(
                "no row {at}, there are {}",
                self.len()
            )));
        };
        let mut ids = row.ids.to_vec();
        let mut labels: Vec<Option<String>> = vec![None; ids.len()];
        let mut label = None;
        let mut target = Vec::new();
        let class = |id: usize| self.classes().get(id).cloned().unwrap_or_default();
        match row.target {
            Target::None => {}
            Target::Class(id) => label = Some(class(id)),
            Target::Flags(flags) => {
                let set = flags.iter().enumerate().filter(|(_, flag)| **flag == 1.0);
                label = Some(join(set.map(|(id, _)| class(id))));
            }
            Target::Numbers(values) => label = Some(join(values.iter().map(f32::to_string))),
            Target::Tokens(classes) => {
                for (label, id) in labels.iter_mut().zip(classes) {
                    *label = usize::try_from(*id).ok().map(class);
                }
            }
            Target::Span(start, end) => {
                for label in labels.iter_mut().take(end + 1).skip(start) {
                    *label = Some("answer".into());
                }
                let answers = self.example_of(at).and_then(|it| self.questions().get(it));
                label =
                    Some(answers.map_or_else(String::new, |it| join(it.answers.iter().cloned())));
            }
            Target::Sequence(ids) => {
                target = ids
                    .iter()
                    .map(|id| piece(tokenizer, *id, 0, None))
                    .collect::<Result<_>>()?;
            }
            Target::Hidden => {
                let batch = self.batch(&[at], Pass::Eval, 1)?;
                if let Targets::Hidden(hidden) = &batch.targets {
                    for ((id, label), (seen, was)) in ids
                        .iter_mut()
                        .zip(&mut labels)
                        .zip(batch.input_ids.iter().zip(hidden))
                    {
                        *id = u32::try_from(*seen).unwrap_or(*id);
                        if *was != IGNORED {
                            let was = u32::try_from(*was).unwrap_or_default();
                            *label = Some(token(tokenizer, was)?);
                        }
                    }
                }
            }
        }
        let pieces = ids.iter().zip(labels).enumerate().map(|(at, (id, label))| {
            let segment = row.segments.get(at).copied().unwrap_or(0);
            piece(tokenizer, *id, segment, label)
        });
        Ok(Shown {
            pieces: pieces.collect::<Result<_>>()?,
            label,
            target,
        })
    }
}

fn piece(tokenizer: &Tokenizer, id: u32, segment: u8, label: Option<String>) -> Result<TaskPiece> {
    Ok(TaskPiece {
        id,
        token: token(tokenizer, id)?,
        segment,
        label,
    })
}

/// A token as a person can read it.
fn token(tokenizer: &Tokenizer, id: u32) -> Result<String> {
    let raw = tokenizer.token(id).unwrap_or_default();
    // Only byte-level vocabularies have these letters for a blank and a line break.
    if raw.is_ascii() || !tokenizer.is_byte_level() {
        return Ok(raw);
    }
    let text = tokenizer.decode(&[id], false)?;
    Ok(match text.contains(char::REPLACEMENT_CHARACTER) {
        true => raw,
        false => text,
    })
}

fn join(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(", ")
}
