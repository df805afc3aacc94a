//! Which ranks are taken away, and when.
//!
//! After each step, for every entry w of A, E and B (2303.10512, equations 8 to 10 and 12):
//!
//! ```text
//! I = |w · ∂L/∂w|                      what the loss changes by, to first order, if w becomes 0
//! Ī = β₁ Ī + (1 − β₁) I                its mean over steps
//! Ū = β₂ Ū + (1 − β₂) |I − Ī|          and how unsure that is
//! s = Ī · Ū
//! Sᵢ = s(Eᵢ) + mean_j s(Aᵢⱼ) + mean_j s(Bⱼᵢ)      of triplet i
//! ```
//!
//! and the number of triplets that are left, with n layers, falls from n·init_r to n·target_r:
//!
//! ```text
//! b(t) = b_T + (b₀ − b_T)·(1 − (t − tinit)/(T − tfinal − tinit))³      tinit < t ≤ T − tfinal, every deltaT steps
//! ```
//!
//! Of all layers together those with the lowest S get E = 0. They may grow again until the next mask; the mask at
//! t = T − tfinal is the last and is put on after every step from then on.
//!
//! The term that holds A and B orthogonal is γ · mean over all of ‖A Aᵀ − 1‖ and ‖Bᵀ B − 1‖ (Frobenius).

use std::collections::BTreeMap;

use peft_core::{Param, Result, Schedule, State};
use tch::{Kind, Tensor};

use crate::{
    config::AdaLoraConfig,
    triplets::{A, B, E, MASK},
};

/// In a checkpoint: Ī and Ū.
const SENSITIVITY: &str = "sensitivity.";
const UNCERTAINTY: &str = "uncertainty.";

/// What AdaLoRA does in a training loop.
#[derive(Debug)]
pub struct Allocator {
    config: AdaLoraConfig,
    /// Ī of each tensor, by place and name.
    sensitivity: BTreeMap<String, Tensor>,
    /// Ū
    uncertainty: BTreeMap<String, Tensor>,
}

impl Allocator {
    /// At the beginning of a run.
    pub fn new(config: &AdaLoraConfig) -> Allocator {
        Allocator {
            config: config.clone(),
            sensitivity: BTreeMap::new(),
            uncertainty: BTreeMap::new(),
        }
    }

    /// How many triplets are left after step `t`, of `first` in `layers`; and whether a mask is due.
    pub fn budget(&self, t: i64, first: i64, layers: i64) -> (i64, bool) {
        let AdaLoraConfig {
            tinit,
            delta_t,
            target_r,
            ..
        } = self.config;
        let (last, end) = (self.last(), target_r * layers);
        if t <= tinit {
            return (first, false);
        }
        if t > last {
            return (end, true);
        }
        let left = 1.0 - (t - tinit) as f64 / (last - tinit) as f64;
        let budget = (first - end) as f64 * left.powf(3.0) + end as f64;
        (budget as i64, t % delta_t == 0)
    }

    /// The step of the last mask.
    fn last(&self) -> i64 {
        self.config.total_step.unwrap_or(0) - self.config.tfinal
    }

    fn observe(&mut self, params: &[Param]) {
        let (b1, b2) = (self.config.beta1, self.config.beta2);
        for param in params.iter().filter(|it| is_factor(it)) {
            let grad = param.tensor.grad();
            if !grad.defined() {
                continue; // a layer without ranks
            }
            let now = (param.tensor.detach() * grad).abs();
            let mean = self
                .sensitivity
                .entry(key(param))
                .or_insert_with(|| now.zeros_like());
            *mean = &*mean * b1 + &now * (1.0 - b1);
            let off = (now - &*mean).abs();
            let unsure = self
                .uncertainty
                .entry(key(param))
                .or_insert_with(|| off.zeros_like());
            *unsure = &*unsure * b2 + off * (1.0 - b2);
        }
    }

    /// s of a tensor; zero where nothing was observed of it.
    fn score(&self, param: &Param) -> Tensor {
        match (
            self.sensitivity.get(&key(param)),
            self.uncertainty.get(&key(param)),
        ) {
            (Some(mean), Some(unsure)) => mean * unsure,
            _ => param.tensor.zeros_like(),
        }
    }

    /// S of the triplets of a layer. `[r]`
    fn triplets(&self, layer: &Layer<'_>) -> Tensor {
        let mean = |t: Tensor, dim: i64| t.mean_dim([dim].as_slice(), false, Kind::Float);
        let (a, b) = (mean(self.score(layer.a), 1), mean(self.score(layer.b), 0));
        self.score(layer.e).view([-1]) + (a + b)
    }

    /// Leaves the `budget` triplets that matter most, of all layers together.
    fn mask(&self, params: &[Param], first: i64, budget: i64, step: i64) -> Result<()> {
        let layers = layers(params);
        if self.sensitivity.is_empty() {
            return Err(AdaLoraConfig::fault(format!(
                "at step {step} ranks are to be taken away and no step before was seen; total_step {} is too small",
                self.config.total_step.unwrap_or(0)
            )));
        }
        let scores: Vec<Tensor> = layers.iter().map(|layer| self.triplets(layer)).collect();
        let fewer = first - budget;
        let threshold = match fewer > 0 {
            true => Tensor::cat(&scores, 0)
                .kthvalue(fewer, 0, false)
                .0
                .double_value(&[]),
            false => f64::NEG_INFINITY,
        };
        for (layer, score) in layers.iter().zip(scores) {
            let left = score.le(threshold).logical_not();
            layer.mask.shallow_clone().copy_(&left);
            layer.apply_mask();
        }
        Ok(())
    }
}

impl Schedule for Allocator {
    fn penalty(&self, params: &[Param]) -> Option<Tensor> {
        let mut terms = Vec::new();
        for param in params
            .iter()
            .filter(|it| self.config.orth_reg_weight > 0.0 && is_factor(it))
        {
            let t = &param.tensor;
            let product = match param.name.as_str() {
                A => t.matmul(&t.tr()),
                B => t.tr().matmul(t),
                _ => continue,
            };
            let one = Tensor::eye(product.size()[0], (product.kind(), product.device()));
            terms.push((product - one).norm());
        }
        let count = terms.len() as f64;
        let sum = terms.into_iter().reduce(|a, b| a + b)?;
        Some(sum / count * self.config.orth_reg_weight)
    }

    fn after_step(&mut self, params: &[Param], step: usize) -> Result<()> {
        let _off = tch::no_grad_guard();
        let (step, last) = (step as i64, self.last());
        let all = layers(params);
        let first: i64 = all.iter().map(|it| it.a.tensor.size()[0]).sum();
        let (budget, due) = self.budget(step, first, all.len() as i64);
        if step < last {
            self.observe(params);
            if due {
                self.mask(params, first, budget, step)?;
            }
        } else if step == last {
            self.mask(params, first, budget, step)?;
            self.sensitivity.clear();
            self.uncertainty.clear();
        } else {
            all.iter().for_each(Layer::apply_mask);
        }
        Ok(())
    }

    fn state(&self) -> State {
        let named = |part: &'static str, all: &BTreeMap<String, Tensor>| {
            let all = all.iter();
            all.map(move |(key, t)| (format!("{part}{key}"), t.shallow_clone()))
                .collect::<Vec<_>>()
        };
        let mut state: State = named(SENSITIVITY, &self.sensitivity).into_iter().collect();
        state.extend(named(UNCERTAINTY, &self.uncertainty));
        state
    }

    fn restore(&mut self, state: State) -> Result<()> {
        for (key, tensor) in state {
            if let Some(name) = key.strip_prefix(SENSITIVITY) {
                self.sensitivity.insert(name.to_owned(), tensor);
            } else if let Some(name) = key.strip_prefix(UNCERTAINTY) {
                self.uncertainty.insert(name.to_owned(), tensor);
            } else {
                return Err(AdaLoraConfig::fault(format!(
                    "`{key}` is nothing that a schedule of ranks remembers"
                )));
            }
        }
        Ok(())
    }
}

/// The tensors of one layer.
struct Layer<'a> {
    a: &'a Param,
    b: &'a Param,
    e: &'a Param,
    mask: &'a Tensor,
}

impl Layer<'_> {
    fn apply_mask(&self) {
        let gone = self.mask.eq(0.0).unsqueeze(1); // [r, 1]
        let _ = self.e.tensor.shallow_clone().masked_fill_(&gone, 0.0);
    }
}

fn layers(params: &[Param]) -> Vec<Layer<'_>> {
    let masks = params.iter().filter(|it| it.name == MASK);
    masks
        .filter_map(|mask| {
            let of = |name: &str| params.iter().find(|it| it.at == mask.at && it.name == name);
            Some(Layer {
                a: of(A)?,
                b: of(B)?,
                e: of(E)?,
                mask: &mask.tensor,
            })
        })
        .collect()
}

fn is_factor(param: &Param) -> bool {
    [A, B, E].contains(&param.name.as_str())
}

fn key(param: &Param) -> String {
    format!("{}.{}", param.at, param.name)
}
