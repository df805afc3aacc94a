//! A batch whose rows go through different adapters: what Python's `peft` calls `adapter_names`.
//!
//! The base, which is nearly all of the work, runs once over the whole batch; each
//! adapter then sees only its own rows, as if it were alone on the model. So a batch
//! of eight users with eight adapters costs the base once and eight small adapters on an eighth of the
//! rows each, and not eight forward passes.
//!
//! ```text
//! y = W x                           all rows
//! y[rows of a] = a(x[rows of a])    where W x[rows of a] is there already
//! ```

use tch::Tensor;

use crate::{Error, Model, ModelExt, Result, Slot, stack::Place};

/// The name that stands for "no adapter" in a list of adapter names, as in Python.
pub const BASE: &str = "__base__";

/// Which adapter each row of a batch goes through.
#[derive(Debug)]
pub struct Rows {
    groups: Vec<Group>,
    len: i64,
    /// Where the rows are once the groups stand one behind the other `[len]`; `None`: where they were.
    back: Option<Tensor>,
}

/// The rows of one adapter.
#[derive(Debug)]
struct Group {
    /// `None`: the base alone.
    name: Option<String>,
    /// Which rows `[n]`.
    at: Tensor,
    /// They follow one another, from this one on.
    from: Option<i64>,
}

impl Group {
    fn of(&self, all: &Tensor) -> Tensor {
        match self.from {
            Some(from) => all.narrow(0, from, self.at.size()[0]),
            None => all.index_select(0, &self.at.to_device(all.device())),
        }
    }
}

impl Rows {
    /// One name a row: that of an adapter on `model`, or [`BASE`].
    ///
    /// Refused: names that are not there, merged adapters, and virtual tokens, which would make rows of different lengths.
    pub fn new<M: Model + ?Sized>(model: &mut M, names: &[&str]) -> Result<Rows> {
        let fault = |name: &str, why: &str| Error::Name {
            name: name.to_owned(),
            why: why.to_owned(),
        };
        if names.is_empty() {
            return Err(fault("", "a mixed batch wants one name a row"));
        }
        if model.merged() {
            return Err(fault(
                names[0],
                "adapters are merged into the base; unmerge first",
            ));
        }
        let mut prompts = Vec::new();
        model.slots(&mut |_, slot| {
            if let Slot::Prompt(slot) = slot {
                prompts.extend(slot.names().into_iter().map(|(name, _)| name));
            }
        });
        for name in names.iter().filter(|it| **it != BASE) {
            model.known(name)?;
            if prompts.iter().any(|it| it == name) {
                let why = "it puts virtual tokens before its rows, which the other rows of a mixed batch do not have";
                return Err(fault(name, why));
            }
        }
        Ok(Rows::group(names))
    }

    fn group(names: &[&str]) -> Rows {
        let mut order: Vec<&str> = Vec::new();
        for name in names {
            if !order.contains(name) {
                order.push(name);
            }
        }
        let mut all: Vec<i64> = Vec::new();
        let groups = order.into_iter().map(|name| {
            let rows = (0i64..).zip(names).filter(|(_, it)| **it == name);
            let rows: Vec<i64> = rows.map(|(row, _)| row).collect();
            let follow = rows.windows(2).all(|pair| pair[1] == pair[0] + 1);
            all.extend(&rows);
            Group {
                name: (name != BASE).then(|| name.to_owned()),
                from: follow.then_some(rows[0]),
                at: Tensor::from_slice(&rows),
            }
        });
        let groups = groups.collect();
        let back = (!all.is_sorted()).then(|| Tensor::from_slice(&all).argsort(0, false));
        Rows {
            groups,
            len: names.len() as i64,
            back,
        }
    }

    /// How many rows the batch has.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Never: there is at least one row.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Applies `each(name, rows of inputs)` to every group and puts the results where their rows were.
    ///
    /// inputs: `[len, ..]` each. A tensor with one row for all, as positions may have, is spread first.
    pub(crate) fn apply<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        each: impl Fn(Option<&str>, [Tensor; N]) -> Tensor,
    ) -> Tensor {
        let spread = inputs.map(|it| {
            let mut size = it.size();
            match size.first() {
                Some(1) if self.len > 1 => {
                    size[0] = self.len;
                    it.expand(&size, false)
                }
                _ => it.shallow_clone(),
            }
        });
        let parts: Vec<Tensor> = self
            .groups
            .iter()
            .map(|group| {
                each(
                    group.name.as_deref(),
                    spread.each_ref().map(|it| group.of(it)),
                )
            })
            .collect();
        let all = Tensor::cat(&parts, 0);
        match &self.back {
            Some(back) => all.index_select(0, &back.to_device(all.device())),
            None => all,
        }
    }
}
