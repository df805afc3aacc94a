//! The network of P-tuning: rows of an embedding through an MLP, or through an LSTM and an MLP.
//!
//! ```text
//! MLP    [rows, D] -> [rows, h] -> relu -> [rows, h] -> relu -> [rows, D]
//! LSTM   [rows, D] -> layers in both directions [rows, 2h] -> [rows, 2h] -> relu -> [rows, D]
//! ```
//!
//! It is computed once for a batch and not once for a row of it: the virtual tokens do not depend on the input. Parameters
//! begin as Python's do, in Python's order.

use peft_core::{Ahead, Ctx, Params, PromptAdapter, Result, Start, VirtualTokens, Visit};
use peft_torch::linear;
use tch::{Device, Kind, Tensor};

/// What the sizes of a network follow from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Rows that it computes.
    pub(crate) rows: i64,
    /// How many of them stand in front of the input.
    pub(crate) tokens: i64,
    /// D
    pub(crate) width: i64,
    /// h
    pub(crate) hidden: i64,
    pub(crate) device: Device,
}

/// A network that computes virtual tokens.
#[derive(Debug)]
pub(crate) struct Encoder {
    /// e `[rows, D]`
    embedding: Tensor,
    lstm: Option<Lstm>,
    head: Vec<Layer>,
    tokens: i64,
}

/// One linear layer of the head.
#[derive(Debug)]
struct Layer {
    /// On-disk names of weight and bias.
    names: [String; 2],
    /// `[out, in]`
    weight: Tensor,
    /// `[out]`
    bias: Tensor,
}

/// A network over a sequence, in both directions.
#[derive(Debug)]
struct Lstm {
    /// By on-disk name, in the order that libtorch wants: for each layer and direction `weight_ih` `[4h, in]`,
    /// `weight_hh` `[4h, h]`, `bias_ih` `[4h]` and `bias_hh` `[4h]`.
    params: Vec<(String, Tensor)>,
    layers: i64,
    hidden: i64,
    dropout: f64,
}

impl Encoder {
    pub(crate) fn mlp(sizes: Sizes, start: Start) -> Result<Encoder> {
        let Sizes { width, hidden, .. } = sizes;
        Ok(Encoder {
            embedding: embedding(sizes, start)?,
            lstm: None,
            head: head(&[width, hidden, hidden, width], start, sizes.device)?,
            tokens: sizes.tokens,
        })
    }

    pub(crate) fn lstm(sizes: Sizes, layers: i64, dropout: f64, start: Start) -> Result<Encoder> {
        let Sizes { width, hidden, .. } = sizes;
        Ok(Encoder {
            embedding: embedding(sizes, start)?,
            lstm: Some(Lstm::new(sizes, layers, dropout, start)?),
            head: head(&[2 * hidden, 2 * hidden, width], start, sizes.device)?,
            tokens: sizes.tokens,
        })
    }

    /// P `[rows, D]`
    fn rows(&self, ctx: Ctx<'_>) -> Tensor {
        let mut x = match &self.lstm {
            None => self.embedding.shallow_clone(),
            Some(lstm) => lstm.forward(&self.embedding, ctx),
        };
        for (i, layer) in self.head.iter().enumerate() {
            if i > 0 {
                x = x.relu();
            }
            x = linear(&x, &layer.weight, Some(&layer.bias));
        }
        x
    }
}

impl PromptAdapter for Encoder {
    fn ahead(&self, ctx: Ctx<'_>) -> Ahead {
        Ahead::Embeds(self.rows(ctx).narrow(0, 0, self.tokens))
    }

    fn tokens(&self) -> i64 {
        self.tokens
    }
}

impl Params for Encoder {
    fn params(&self, visit: Visit<'_>) {
        visit("embedding.weight", &self.embedding);
        for (name, param) in self.lstm.iter().flat_map(|it| &it.params) {
            visit(name, param);
        }
        for layer in &self.head {
            visit(&layer.names[0], &layer.weight);
            visit(&layer.names[1], &layer.bias);
        }
    }

    fn saved(&self, visit: Visit<'_>) {
        visit(VirtualTokens::TABLE, &self.rows(Ctx::EVAL));
    }
}

impl Lstm {
    fn new(sizes: Sizes, layers: i64, dropout: f64, start: Start) -> Result<Lstm> {
        let (h, device) = (sizes.hidden, sizes.device);
        let mut params = Vec::new();
        for layer in 0..layers {
            let inputs = if layer == 0 { sizes.width } else { 2 * h };
            for way in ["", "_reverse"] {
                for (name, shape) in [
                    ("weight_ih", &[4 * h, inputs][..]),
                    ("weight_hh", &[4 * h, h]),
                    ("bias_ih", &[4 * h]),
                    ("bias_hh", &[4 * h]),
                ] {
                    let param = uniform(shape, h, start, device)?;
                    params.push((format!("lstm_head.{name}_l{layer}{way}"), param));
                }
            }
        }
        Ok(Lstm {
            params,
            layers,
            hidden: h,
            dropout,
        })
    }

    /// x: `[rows, in] -> [rows, 2h]`
    fn forward(&self, x: &Tensor, ctx: Ctx<'_>) -> Tensor {
        let zero = Tensor::zeros([2 * self.layers, 1, self.hidden], (x.kind(), x.device()));
        let params: Vec<&Tensor> = self.params.iter().map(|it| &it.1).collect();
        let (biases, both_ways, batch_first) = (true, true, true);
        let (y, _, _) = x.unsqueeze(0).lstm(
            &[&zero, &zero],
            &params,
            biases,
            self.layers,
            self.dropout,
            ctx.train,
            both_ways,
            batch_first,
        );
        y.squeeze_dim(0)
    }
}

/// e `[rows, D]`
fn embedding(sizes: Sizes, start: Start) -> Result<Tensor> {
    let (shape, on) = ([sizes.rows, sizes.width], (Kind::Float, sizes.device));
    let values = match start {
        Start::Fresh => Tensor::f_randn(shape, on)?,
        Start::Saved | Start::Resumed => Tensor::f_zeros(shape, on)?,
    };
    Ok(values.set_requires_grad(true))
}

/// Linear layers between these widths. Between two of them is a `ReLU`, which has a number of its own in their names.
fn head(widths: &[i64], start: Start, device: Device) -> Result<Vec<Layer>> {
    let pairs = widths.windows(2).enumerate();
    pairs
        .map(|(i, pair)| {
            let (inputs, out) = (pair[0], pair[1]);
            let name = |what: &str| format!("mlp_head.{}.{what}", 2 * i);
            Ok(Layer {
                names: [name("weight"), name("bias")],
                weight: uniform(&[out, inputs], inputs, start, device)?,
                bias: uniform(&[out], inputs, start, device)?,
            })
        })
        .collect()
}

/// A leaf in ±1/√inputs, as fresh layers begin; zero where it is filled from a file.
fn uniform(shape: &[i64], inputs: i64, start: Start, device: Device) -> Result<Tensor> {
    let mut values = Tensor::f_zeros(shape, (Kind::Float, device))?;
    if start == Start::Fresh {
        let bound = 1.0 / (inputs as f64).sqrt();
        values = values.f_uniform_(-bound, bound)?;
    }
    Ok(values.set_requires_grad(true))
}
