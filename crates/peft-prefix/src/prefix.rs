//! The table at work: keys and values for every layer.
//!
//! ```text
//! E [n, L·2·D] -> view [n, 2L, kv_heads, head_dim] -> permute [2L, kv_heads, n, head_dim] -> 2L slots
//! ```
//!
//! The slots are taken by one `unbind` and not one by one: its gradient is one stack, where the gradient of
//! 2L selections is 2L tensors of the size of the table.

use peft_core::{Ahead, Ctx, Params, PromptAdapter, Result, Start, VirtualTokens, Visit};
use peft_torch::linear;
use tch::{Device, Kind, Tensor};

/// What the sizes of a table follow from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) tokens: i64,
    /// Layers that the table is made for.
    pub(crate) layers: i64,
    /// Heads of keys and values.
    pub(crate) heads: i64,
    pub(crate) head_dim: i64,
    pub(crate) device: Device,
}

impl Sizes {
    /// D: a key of one layer.
    fn width(self) -> i64 {
        self.heads * self.head_dim
    }

    /// Length of a row: all keys and values of a token.
    fn row(self) -> i64 {
        self.layers * 2 * self.width()
    }
}

/// Keys and values before those of every layer.
#[derive(Debug)]
pub(crate) struct Prefix {
    source: Source,
    sizes: Sizes,
    /// Layer i of the model reads layer `stride`·i mod L of the table.
    stride: i64,
}

/// Where the table comes from.
#[derive(Debug)]
enum Source {
    /// E `[n, L·2·D]`
    Table(Tensor),
    /// E = W₂ tanh(W₁ e + b₁) + b₂
    Projected(Projected),
}

/// The table's encoder.
#[derive(Debug)]
struct Projected {
    /// e `[n, D]`
    embedding: Tensor,
    /// W₁ `[h, D]`, b₁ `[h]`
    inner: (Tensor, Tensor),
    /// W₂ `[L·2·D, h]`, b₂ `[L·2·D]`
    outer: (Tensor, Tensor),
}

impl Prefix {
    /// A table of its own; trained or not.
    pub(crate) fn table(sizes: Sizes, start: Start, zero: bool, trained: bool) -> Result<Prefix> {
        let shape = [sizes.tokens, sizes.row()];
        let table = match zero {
            true => zeros(&shape, sizes.device)?,
            false => normal(&shape, start, sizes.device)?,
        };
        Ok(Prefix {
            source: Source::Table(table.set_requires_grad(trained)),
            sizes,
            stride: 1,
        })
    }

    /// A table that is computed through an inner layer of this width.
    pub(crate) fn projected(sizes: Sizes, inner: i64, start: Start, zero: bool) -> Result<Prefix> {
        let (width, row) = (sizes.width(), sizes.row());
        let leaf = |t: Tensor| t.set_requires_grad(true);
        let layer = |out, inp, start| -> Result<(Tensor, Tensor)> {
            let weight = uniform(&[out, inp], inp, start, sizes.device)?;
            Ok((
                leaf(weight),
                leaf(uniform(&[out], inp, start, sizes.device)?),
            ))
        };
        let embedding = leaf(normal(&[sizes.tokens, width], start, sizes.device)?);
        let projected = Projected {
            embedding,
            inner: layer(inner, width, start)?,
            outer: match zero {
                true => (
                    leaf(zeros(&[row, inner], sizes.device)?),
                    leaf(zeros(&[row], sizes.device)?),
                ),
                false => layer(row, inner, start)?,
            },
        };
        Ok(Prefix {
            source: Source::Projected(projected),
            sizes,
            stride: 1,
        })
    }

    /// As Python deals the slots out to the layers of a decoder behind an encoder: see the crate's documentation.
    pub(crate) fn dealt_by_four(self) -> Prefix {
        Prefix { stride: 2, ..self }
    }

    /// E `[n, L·2·D]`
    fn rows(&self) -> Tensor {
        match &self.source {
            Source::Table(table) => table.shallow_clone(),
            Source::Projected(it) => {
                let (w, b) = &it.inner;
                let inner = linear(&it.embedding, w, Some(b)).tanh(); // [n, h]
                let (w, b) = &it.outer;
                linear(&inner, w, Some(b))
            }
        }
    }
}

impl PromptAdapter for Prefix {
    fn ahead(&self, _: Ctx<'_>) -> Ahead {
        let Sizes {
            tokens,
            layers,
            heads,
            head_dim,
            ..
        } = self.sizes;
        let slots = self
            .rows()
            .view([tokens, 2 * layers, heads, head_dim])
            .permute([1, 2, 0, 3]) // [2L, kv_heads, n, head_dim]
            .unbind(0);
        let pair = |layer: i64| {
            let at = 2 * (self.stride * layer % layers) as usize;
            (slots[at].shallow_clone(), slots[at + 1].shallow_clone())
        };
        Ahead::Kv((0..layers).map(pair).collect())
    }

    fn tokens(&self) -> i64 {
        self.sizes.tokens
    }
}

impl Params for Prefix {
    fn params(&self, visit: Visit<'_>) {
        match &self.source {
            Source::Table(table) => visit(VirtualTokens::TABLE, table),
            Source::Projected(it) => {
                visit("embedding.weight", &it.embedding);
                visit("transform.0.weight", &it.inner.0);
                visit("transform.0.bias", &it.inner.1);
                visit("transform.2.weight", &it.outer.0);
                visit("transform.2.bias", &it.outer.1);
            }
        }
    }

    fn saved(&self, visit: Visit<'_>) {
        visit(VirtualTokens::TABLE, &self.rows());
    }
}

fn zeros(shape: &[i64], device: Device) -> Result<Tensor> {
    Ok(Tensor::f_zeros(shape, (Kind::Float, device))?)
}

/// As a fresh table begins; zero where it is filled from a file.
fn normal(shape: &[i64], start: Start, device: Device) -> Result<Tensor> {
    match start {
        Start::Fresh => Ok(Tensor::f_randn(shape, (Kind::Float, device))?),
        Start::Saved | Start::Resumed => zeros(shape, device),
    }
}

/// As a fresh linear layer with this many inputs begins; zero where it is filled from a file.
fn uniform(shape: &[i64], inputs: i64, start: Start, device: Device) -> Result<Tensor> {
    let mut tensor = zeros(shape, device)?;
    if start == Start::Fresh {
        let bound = 1.0 / (inputs as f64).sqrt();
        tensor = tensor.f_uniform_(-bound, bound)?;
    }
    Ok(tensor)
}
