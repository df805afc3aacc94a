//! LoRA on parts of a merged projection: what `loralib` calls `MergedLinear`.
//!
//! Many models keep the projections of queries, keys and values as one layer of three times the width. LoRA on all of
//! it shares A among the three; this is LoRA on some of the three, each with factors of its own, as the paper does
//! (2106.09685, section 4.2: queries and values):
//!
//! ```text
//! ⎡ΔW_q⎤       ⎡B_q A_q⎤       ⎡B_q  0 ⎤ ⎡A_q⎤
//! ⎢ 0  ⎥  = s· ⎢   0   ⎥  = s· ⎢ 0   0 ⎥ ⎣A_v⎦        s = α/r
//! ⎣ΔW_v⎦       ⎣B_v A_v⎦       ⎣ 0  B_v⎦
//! ```
//!
//! The file holds A `[r · parts that are on, in]` and B `[rows of parts that are on, r]`, as `loralib` does. The last form above is
//! a plain LoRA of rank r · parts with zeros in B, and that is how it is computed and what [`MergedLora::to_lora`] makes
//! of it.
//!
//! Python's `peft` has no such method, and its `LoraConfig` no such key. So this is a method with its own `peft_type`: a
//! reader that does not know it says so, and does not load something else.

use peft_core::{
    Adapter, Beneath, Common, Config, Ctx, Error, Injection, LinearAdapter, LinearOp, Names,
    Outline, Params, Plain, Result, Selection, Site, SiteKind, Slot, State, Tuner, Unmodelled,
    Visit, parse,
};
use peft_torch::add_low_rank;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::{
    config::{LoraConfig, number},
    factors::{Factors, leaf},
    lora::{A, B, dropped},
};

/// LoRA on parts of merged projections.
///
/// ```
/// use peft_lora::MergedLora;
/// // Queries and values of a fused projection, of which the keys stay as they are.
/// let lora = MergedLora { r: 4, lora_alpha: 8.0, ..MergedLora::on(["qkv"], [true, false, true]) };
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MergedLora {
    /// Rank of the update of each part.
    pub r: i64,
    /// α; the update is scaled by α / r.
    #[serde(serialize_with = "number")]
    pub lora_alpha: f64,
    /// Probability with which an element of the input is dropped on its way into A, in training.
    pub lora_dropout: f64,
    /// Scale by α / √r (2312.03732).
    pub use_rslora: bool,
    /// The merged layers: names or one expression.
    pub target_modules: Option<Names>,
    /// Layers that are left out, whatever else says.
    pub exclude_modules: Option<Names>,
    /// For each part of a layer, in the order of its outputs, whether it is adapted: `loralib`'s `enable_lora`.
    pub parts: Vec<bool>,
    /// How many outputs each part has. `None`: all the same. Fewer heads of keys and values than of queries make them differ.
    pub sizes: Option<Vec<i64>>,
    /// What every method's file has.
    #[serde(flatten)]
    pub common: Common,
    /// The keys that are not read.
    #[serde(flatten)]
    pub rest: Unmodelled,
}

impl Default for MergedLora {
    fn default() -> MergedLora {
        MergedLora {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            parts: Vec::new(),
            sizes: None,
            common: Common::default(),
            rest: Unmodelled::default(),
        }
    }
}

/// A run of outputs of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    rows: i64,
    on: bool,
}

impl MergedLora {
    /// On these layers, on these of their parts.
    pub fn on(targets: impl Into<Names>, parts: impl Into<Vec<bool>>) -> MergedLora {
        MergedLora {
            target_modules: Some(targets.into()),
            parts: parts.into(),
            ..MergedLora::default()
        }
    }

    /// The same function as plain LoRA of rank r · parts, for readers that know no other: Python's `peft` loads it.
    ///
    /// Nothing is lost but that zeros of B are parameters then; to go on training, keep the file of this method.
    pub fn to_lora(adapter: &Adapter) -> Result<Adapter> {
        let found = adapter.tuner.peft_type();
        if found != MergedLora::PEFT_TYPE {
            return Err(Error::UnknownMethod {
                found: found.to_owned(),
                known: vec![MergedLora::PEFT_TYPE],
            });
        }
        let config: MergedLora = parse(adapter.tuner.to_json())?;
        let mut state = State::new();
        for (key, tensor) in &adapter.state {
            let tensor = match key.ends_with(&format!(".{B}")) {
                false => tensor.shallow_clone(),
                true => {
                    let parts = config.parts_of_rows(key, &tensor.size())?;
                    tch::no_grad(|| spread(tensor, &parts))?
                }
            };
            state.insert(key.clone(), tensor);
        }
        let count = config.count();
        let more = if config.use_rslora {
            (count as f64).sqrt()
        } else {
            count as f64
        };
        let plain = LoraConfig {
            r: config.r * count,
            lora_alpha: config.lora_alpha * more,
            lora_dropout: config.lora_dropout,
            use_rslora: config.use_rslora,
            target_modules: config.target_modules,
            exclude_modules: config.exclude_modules,
            common: config.common,
            ..LoraConfig::default()
        };
        Ok(Adapter {
            tuner: Box::new(plain),
            state,
            trained: State::new(),
            source: adapter.source.clone(),
        })
    }

    /// How many parts are on.
    fn count(&self) -> i64 {
        self.parts.iter().filter(|it| **it).count() as i64
    }

    fn scale(&self) -> f64 {
        match self.use_rslora {
            true => self.lora_alpha / (self.r as f64).sqrt(),
            false => self.lora_alpha / self.r as f64,
        }
    }

    fn selection(&self) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            ..Selection::default()
        }
    }

    /// The parts of a layer with `out` outputs.
    fn parts_of(&self, at: &str, out: i64) -> Result<Vec<Part>> {
        let count = self.parts.len() as i64;
        let sizes = match &self.sizes {
            Some(sizes) if sizes.iter().sum::<i64>() == out => sizes.clone(),
            Some(sizes) => {
                return Err(fault(format!(
                    "sizes {sizes:?} make {} outputs, and `{at}` has {out}",
                    sizes.iter().sum::<i64>()
                )));
            }
            None if out % count.max(1) == 0 => vec![out / count.max(1); self.parts.len()],
            None => {
                return Err(fault(format!(
                    "the {out} outputs of `{at}` are not {count} equal parts; set sizes"
                )));
            }
        };
        let parts = sizes.into_iter().zip(&self.parts);
        Ok(parts.map(|(rows, &on)| Part { rows, on }).collect())
    }

    /// The parts of a layer whose B in a file is of this size.
    fn parts_of_rows(&self, key: &str, size: &[i64]) -> Result<Vec<Part>> {
        let rows = size.first().copied().unwrap_or_default();
        let each = rows / self.count().max(1);
        let sizes = match &self.sizes {
            Some(sizes) => sizes.clone(),
            None => vec![each; self.parts.len()],
        };
        let parts = sizes.into_iter().zip(&self.parts);
        let parts: Vec<Part> = parts.map(|(rows, &on)| Part { rows, on }).collect();
        let expected = vec![rows_on(&parts), self.r];
        match size == expected {
            true => Ok(parts),
            false => Err(Error::Shape {
                key: key.to_owned(),
                expected,
                got: size.to_owned(),
            }),
        }
    }
}

fn rows_on(parts: &[Part]) -> i64 {
    parts.iter().filter(|it| it.on).map(|it| it.rows).sum()
}

fn fault(reason: impl Into<String>) -> Error {
    Error::Config {
        peft_type: MergedLora::PEFT_TYPE.to_owned(),
        reason: reason.into(),
    }
}

impl Config for MergedLora {
    const PEFT_TYPE: &'static str = "MERGED_LORA";

    fn unmodelled(&self) -> &Unmodelled {
        &self.rest
    }

    fn check(&self) -> Result<()> {
        let must = |fine: bool, reason: &dyn Fn() -> String| match fine {
            true => Ok(()),
            false => Err(fault(reason())),
        };
        must((1..=65536).contains(&self.r), &|| {
            format!("rank r = {} is not in 1..=65536", self.r)
        })?;
        must(self.lora_alpha.is_finite(), &|| {
            format!("lora_alpha {} is not finite", self.lora_alpha)
        })?;
        must((0.0..1.0).contains(&self.lora_dropout), &|| {
            format!("lora_dropout is {} and not in 0..1", self.lora_dropout)
        })?;
        must((1..=1024).contains(&self.parts.len()), &|| {
            format!(
                "parts has {} entries and not 1 to 1024, one for each projection that the layer merges",
                self.parts.len()
            )
        })?;
        must(self.count() > 0, &|| {
            format!("parts {:?} adapts none", self.parts)
        })?;
        must(self.r * self.count() <= 65536, &|| {
            format!(
                "rank {} of {} parts is above 65536 together",
                self.r,
                self.count()
            )
        })?;
        if let Some(sizes) = &self.sizes {
            must(sizes.len() == self.parts.len(), &|| {
                format!(
                    "sizes {sizes:?} are not one for each of the {} parts",
                    self.parts.len()
                )
            })?;
            must(sizes.iter().all(|it| (1..=1 << 24).contains(it)), &|| {
                format!("sizes {sizes:?} are not all in 1..=16777216")
            })?;
        }
        self.selection().check(MergedLora::PEFT_TYPE)
    }
}

impl Tuner for MergedLora {
    fn peft_type(&self) -> &'static str {
        MergedLora::PEFT_TYPE
    }

    fn resolve(&self, outline: &Outline) -> Result<Box<dyn Tuner>> {
        self.check()?;
        let mut config = self.clone();
        config.target_modules = config.target_modules.map(|it| it.expand(outline));
        if config.target_modules.is_none() {
            return Err(fault(
                "no layer has merged projections by default; set target_modules",
            ));
        }
        let linear = |site: &Site| site.kind == SiteKind::Linear;
        config.selection().check_targets(outline, &linear)?;
        for site in &outline.sites {
            config.wants(site, outline)?;
        }
        Ok(Box::new(config))
    }

    fn wants(&self, site: &Site, _: &Outline) -> Result<bool> {
        if site.at.is_empty() || !self.selection().targets(&site.at)? {
            return Ok(false);
        }
        if site.kind != SiteKind::Linear {
            let at = &site.at;
            return Err(fault(format!(
                "target_modules names `{at}`, which is no linear layer"
            )));
        }
        self.parts_of(&site.at, site.shape[0]).map(|_| true)
    }

    fn attach(&self, at: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let Slot::Linear(linear) = slot else {
            return Err(fault(format!("`{at}` is no linear layer")));
        };
        let (out, inp) = linear.base().shape();
        let parts = self.parts_of(at, out)?;
        let on = (Kind::Float, linear.base().device());
        let bound = 1.0 / (inp.max(1) as f64).sqrt();
        let a = Tensor::f_empty([self.r * self.count(), inp], on)?.f_uniform_(-bound, bound)?;
        let b = Tensor::f_zeros([rows_on(&parts), self.r], on)?;
        let adapter = Merged {
            a: leaf(&a),
            b: leaf(&b),
            parts,
            scale: self.scale(),
            dropout: self.lora_dropout,
        };
        linear.attach(injection.name, Box::new(adapter));
        Ok(())
    }

    fn to_json(&self) -> Value {
        // Strings, numbers and lists of them: there is nothing that could fail to be written.
        let mut json = serde_json::to_value(self).unwrap_or_default();
        json["peft_type"] = MergedLora::PEFT_TYPE.into();
        json
    }
}

/// What it leaves on one layer.
#[derive(Debug)]
struct Merged {
    /// `[r · parts that are on, in]`
    a: Tensor,
    /// `[rows of parts that are on, r]`
    b: Tensor,
    parts: Vec<Part>,
    scale: f64,
    dropout: f64,
}

impl Merged {
    /// B of the whole layer `[out, r · parts that are on]`.
    fn wide(&self) -> Tensor {
        spread(&self.b, &self.parts).expect("a matrix of the layer's height, which fits in memory")
    }
}

impl LinearAdapter for Merged {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let y = beneath.forward(x);
        let x = dropped(x, self.dropout, ctx);
        let b = self.wide();
        add_low_rank(y, &x, &self.a, &b, None, self.scale)
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        let factors = Factors {
            a: self.a.shallow_clone(),
            b: self.wide(),
            first: None,
            scale: self.scale,
        };
        Some(Plain {
            weight: factors.onto(&plain.weight),
            bias: plain.bias,
        })
    }
}

impl Params for Merged {
    fn params(&self, visit: Visit<'_>) {
        visit(A, &self.a);
        visit(B, &self.b);
    }
}

/// The factors of the parts that are on `[rows, r]` on the diagonal of one B for the whole layer `[out, r · parts that are on]`.
fn spread(b: &Tensor, parts: &[Part]) -> Result<Tensor> {
    let r = b.size()[1];
    let columns = r * parts.iter().filter(|it| it.on).count() as i64;
    let (mut row, mut column) = (0, 0);
    let mut blocks = Vec::new();
    for part in parts {
        if !part.on {
            blocks.push(b.f_new_zeros([part.rows, columns], (b.kind(), b.device()))?);
            continue;
        }
        let own = b.f_narrow(0, row, part.rows)?;
        blocks.push(own.f_constant_pad_nd([column, columns - column - r])?); // [rows, columns]
        row += part.rows;
        column += r;
    }
    Ok(Tensor::f_cat(&blocks, 0)?)
}
