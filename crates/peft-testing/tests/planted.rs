//! The suite at work: a small correct method passes it, and with one mistake planted it does not.

use peft_core::{
    Beneath, Common, Config, Ctx, Injection, LinearAdapter, LinearOp, Outline, Params, Plain,
    Result, Site, SiteKind, Slot, Tuner, Unmodelled, Visit,
};
use peft_testing::{broken, conforms};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

/// Low rank on every linear layer but the head, with a mistake by name.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Planted {
    bug: String,
    scale: f64,
    dropout: f64,
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    rest: Unmodelled,
    #[serde(skip)]
    none: Unmodelled,
}

impl Planted {
    fn has(&self, bug: &str) -> bool {
        self.bug == bug
    }
}

impl Config for Planted {
    const PEFT_TYPE: &'static str = "PLANTED";
    fn unmodelled(&self) -> &Unmodelled {
        if self.has("unknown keys are ignored") {
            &self.none
        } else {
            &self.rest
        }
    }
}

impl Tuner for Planted {
    fn peft_type(&self) -> &'static str {
        Planted::PEFT_TYPE
    }
    fn resolve(&self, _: &Outline) -> Result<Box<dyn Tuner>> {
        Ok(Box::new(self.clone()))
    }
    fn wants(&self, site: &Site, outline: &Outline) -> Result<bool> {
        let head = outline.spec.output_embedding.as_deref() == Some(site.at.as_str());
        Ok(site.kind == SiteKind::Linear && !head)
    }
    fn attach(&self, _: &str, slot: Slot<'_>, injection: &mut Injection<'_>) -> Result<()> {
        let Slot::Linear(linear) = slot else {
            return Ok(());
        };
        let weight = linear.base().weight();
        if self.has("the base takes a gradient") {
            let _ = weight.set_requires_grad(true);
        }
        if self.has("the base is changed in place") {
            let _ = weight.shallow_clone().g_add_scalar_(0.1);
        }
        let (out, inp) = linear.base().shape();
        let on = (Kind::Float, linear.base().device());
        let adapter = LowRank {
            config: self.clone(),
            a: (Tensor::randn([2, inp], on) * 0.5).set_requires_grad(true),
            b: Tensor::zeros([out, 2], on).set_requires_grad(true),
        };
        linear.attach(injection.name, Box::new(adapter));
        Ok(())
    }
    fn to_json(&self) -> Value {
        let mut json = serde_json::to_value(self).unwrap();
        json["peft_type"] = Planted::PEFT_TYPE.into();
        if self.has("a key is lost") {
            json["scale"] = Value::from(1.0);
        }
        json
    }
}

#[derive(Debug)]
struct LowRank {
    config: Planted,
    a: Tensor,
    b: Tensor,
}

/// `value` with the gradient of `t` times `factor`.
fn with_gradient(value: &Tensor, t: &Tensor, factor: f64) -> Tensor {
    t * factor + (value - t * factor).detach()
}

impl LinearAdapter for LowRank {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, ctx: Ctx) -> Tensor {
        let has = |bug| self.config.has(bug);
        let (s, p) = (self.config.scale, self.config.dropout);
        let mut y = beneath.forward(x);
        if has("the scale is applied to the base too") {
            y *= s;
        }
        let on = ctx.train || has("dropout in evaluation");
        let x = if on && p > 0.0 {
            x.dropout(p, true)
        } else {
            x.shallow_clone()
        };
        let a = match has("the gradient is a mean over the batch") {
            true => with_gradient(&self.a, &self.a, 1.0 / x.size()[0] as f64),
            false => self.a.shallow_clone(),
        };
        let b = match &self.config.bug[..] {
            "a factor is cut off" => self.b.detach() * s,
            "a gradient is not scaled" => with_gradient(&(&self.b * s), &self.b, 1.0),
            _ => &self.b * s,
        };
        if has("the numbers beneath are read and it says no") {
            return &y + (&y * &y * s).tanh() * self.b.select(1, 0);
        }
        y + x.matmul(&a.tr()).matmul(&b.tr())
    }

    fn reads_beneath(&self) -> bool {
        false
    }

    fn merge(&self, plain: Plain, _: &dyn LinearOp) -> Option<Plain> {
        let s = match &self.config.bug[..] {
            "the scale is forgotten in the merge" => 1.0,
            "the merge subtracts" => -self.config.scale,
            _ => self.config.scale,
        };
        Some(Plain {
            weight: plain.weight + self.b.matmul(&self.a) * s,
            bias: plain
                .bias
                .filter(|_| !self.config.has("the merge drops the bias")),
        })
    }
}

impl Params for LowRank {
    fn params(&self, visit: Visit<'_>) {
        visit("a", &self.a);
        visit("b", &self.b);
    }
    fn saved(&self, visit: Visit<'_>) {
        visit("a", &self.a);
        match &self.config.bug[..] {
            "a tensor is not saved" => {}
            "a tensor is saved in bf16" => visit("b", &self.b.to_kind(Kind::BFloat16)),
            _ => visit("b", &self.b),
        }
    }
}

fn config(bug: &str, dropout: f64) -> Value {
    json!({"peft_type": "PLANTED", "scale": 1.75, "dropout": dropout, "bug": bug})
}

#[test]
fn without_a_mistake_it_passes() {
    conforms::<Planted>(&[config("", 0.0), config("", 0.3)]);
}

#[test]
fn every_mistake_is_caught() {
    for (bug, law) in [
        ("the scale is applied to the base too", "fresh"),
        ("the scale is forgotten in the merge", "merge"),
        ("the merge subtracts", "merge"),
        ("the merge drops the bias", "merge"),
        ("dropout in evaluation", "dropout"),
        ("the base takes a gradient", "base frozen"),
        ("the base is changed in place", "off"),
        ("a factor is cut off", "gradients arrive"),
        ("a gradient is not scaled", "gradient check"),
        ("the gradient is a mean over the batch", "accumulation"),
        ("the numbers beneath are read and it says no", "left out"),
        ("a tensor is not saved", "save"),
        ("a tensor is saved in bf16", "save"),
        ("a key is lost", "config survives"),
        ("unknown keys are ignored", "unknown keys"),
    ] {
        let dropout = if bug.contains("dropout") { 0.3 } else { 0.0 };
        let found = broken::<Planted>(&config(bug, dropout));
        let laws: Vec<&str> = found.iter().map(|(law, _)| *law).collect();
        assert!(
            laws.contains(&law),
            "`{bug}` should break `{law}`, breaks {laws:?}"
        );
    }
}
