//! A source of weights that nobody trained: for sizes, and for measuring what a model would need.

use peft_core::{BaseFormat, Error, Result, Slot, Weights};
use std::path::Path;
use tch::{Device, Kind, Tensor};

use crate::{HeadOptions, Network, Source, Task, assemble, config::Keys, open::keys};

/// Weights of any name and shape.
#[derive(Debug)]
pub struct MadeUp {
    kind: Kind,
    /// Numbers of which weights are cut; `None`: zeros that take no memory.
    pool: Option<Tensor>,
}

impl MadeUp {
    /// Zeros that take no memory, whatever their shape. A model of these has places and sizes, and computes nothing.
    pub fn hollow(kind: Kind) -> MadeUp {
        MadeUp { kind, pool: None }
    }

    /// Numbers from N(0, 0.02²), the same ones again and again: quickly made, and in memory of their own.
    pub fn normal(kind: Kind) -> MadeUp {
        let pool = Tensor::randn([1 << 20], (Kind::Float, Device::Cpu)) * 0.02;
        MadeUp {
            kind,
            pool: Some(pool.to_kind(kind)),
        }
    }
}

impl Weights for MadeUp {
    fn tensor(&mut self, _: &str, shape: &[i64]) -> Result<Tensor> {
        let Some(pool) = &self.pool else {
            let zero = Tensor::zeros([1i64; 8][..shape.len()].to_vec(), (self.kind, Device::Cpu));
            return Ok(zero.expand(shape, false));
        };
        if let [n] = shape {
            return Ok(Tensor::ones([*n], (self.kind, Device::Cpu))); // a norm or a bias
        }
        let n: i64 = shape.iter().product();
        let whole = n / pool.numel() as i64;
        let rest = pool.narrow(0, 0, n - whole * pool.numel() as i64);
        let mut parts = vec![pool; whole as usize];
        parts.push(&rest);
        Ok(Tensor::cat(&parts, 0).view(shape))
    }

    fn stored(&mut self, key: &str) -> Result<Tensor> {
        Err(Error::Missing {
            place: "a source of made-up weights".into(),
            key: key.to_owned(),
            hint: String::new(),
        })
    }

    fn kind(&self) -> Option<Kind> {
        Some(self.kind)
    }

    fn has(&self, _: &str) -> bool {
        false // so heads are made up, too, and names have no root
    }
}

/// The names of the linear layers that the model at `source` will have, found without its weights.
pub fn linear_layers(source: &Source, task: Task) -> Result<Vec<String>> {
    let keys = keys(source)?;
    assemble::offers(&keys, task)?;
    let mut weights = MadeUp::hollow(Kind::Float);
    let built = assemble::network(&keys, &mut weights, task, &HeadOptions::default())?;
    let mut names = Vec::new();
    built.network().slots(&mut |at, slot| {
        if let Slot::Linear(_) = slot {
            names.push(at.to_owned());
        }
    });
    Ok(names)
}

/// Builds the model that a `config.json` describes out of any source, its layers in a format.
pub fn build(
    config: &Path,
    task: Task,
    weights: &mut dyn Weights,
    format: &dyn BaseFormat,
) -> Result<Box<dyn Network>> {
    let keys = Keys::new(peft_core::files::read_json(config)?, config)?;
    assemble::offers(&keys, task)?;
    let head = HeadOptions::default();
    let built = assemble::network(&keys, &mut *format.over(weights), task, &head)?;
    peft_torch::memory::give_back();
    Ok(built.network())
}
