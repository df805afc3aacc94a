//! The learning rate at each step, under Hugging Face's names.
//!
//! Every schedule is a factor f(step) of the peak, most of them a rise of
//! `warmup` steps and then a shape over p = (step − warmup) / (total − warmup):
//!
//! ```text
//! linear               1 − p
//! cosine               ½ (1 + cos 2π·cycles·p)        cycles = ½: half a wave down
//! cosine_with_restarts ½ (1 + cos π·(cycles·p mod 1))
//! polynomial           (1 − end)·(1 − p)^power + end
//! inverse_sqrt         1 / √((step + timescale − warmup) / timescale)
//! warmup_stable_decay  1, and a decay over the last steps
//! ```
//!
//! They are pure functions of the step, so a resumed run needs no state for
//! them. `reduce_on_plateau` is the one that looks at the run: its state is
//! [`Plateau`], which a checkpoint holds.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::settings::Settings;

/// The schedules by their names in configurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the names say it
pub enum ScheduleType {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine,
    CosineWithRestarts,
    CosineWithMinLr,
    CosineWarmupWithMinLr,
    Polynomial,
    InverseSqrt,
    WarmupStableDecay,
    #[serde(alias = "reduce_lr_on_plateau")]
    ReduceOnPlateau,
}

/// The learning rate of one run.
#[derive(Debug, Clone)]
pub struct Schedule {
    peak: f64,
    warmup: f64,
    total: f64,
    shape: Shape,
}

#[derive(Debug, Clone)]
enum Shape {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine {
        cycles: f64,
    },
    Restarts {
        cycles: f64,
    },
    MinCosine {
        cycles: f64,
        min: f64,
    },
    /// As `MinCosine`, one step ahead, with a warm-up that starts above 0.
    MinCosineAhead {
        cycles: f64,
        min: f64,
        start: Option<f64>,
    },
    Polynomial {
        end: f64,
        power: f64,
    },
    InverseSqrt {
        timescale: f64,
    },
    Stable {
        stable: f64,
        decay: f64,
        rise: Curve,
        fall: Curve,
        min: f64,
        cycles: f64,
    },
    Plateau(Plateau),
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum Curve {
    #[serde(rename = "linear")]
    Linear,
    #[serde(rename = "cosine")]
    Cosine,
    #[serde(rename = "1-sqrt")]
    Sqrt,
}

impl Schedule {
    /// The schedule of a run of `total` steps.
    pub fn new(settings: &Settings, total: usize) -> Result<Schedule> {
        let peak = settings.learning_rate;
        let warmup = settings.warmup(total);
        let mut options = Options::of(settings);
        let shape = match settings.lr_scheduler_type {
            ScheduleType::Constant => Shape::Constant,
            ScheduleType::ConstantWithWarmup => Shape::ConstantWithWarmup,
            ScheduleType::Linear => Shape::Linear,
            ScheduleType::Cosine => Shape::Cosine {
                cycles: options.number("num_cycles")?.unwrap_or(0.5),
            },
            ScheduleType::CosineWithRestarts => Shape::Restarts {
                cycles: options.number("num_cycles")?.unwrap_or(1.0),
            },
            ScheduleType::CosineWithMinLr => Shape::MinCosine {
                cycles: options.number("num_cycles")?.unwrap_or(0.5),
                min: options.least(peak)?,
            },
            ScheduleType::CosineWarmupWithMinLr => Shape::MinCosineAhead {
                cycles: options.number("num_cycles")?.unwrap_or(0.5),
                min: options.least(peak)?,
                start: options.number("warmup_lr_rate")?,
            },
            ScheduleType::Polynomial => {
                let end = options.number("lr_end")?.unwrap_or(1e-7);
                if end >= peak {
                    let reason =
                        format!("`lr_end` is {end}, it must be below learning_rate, {peak}");
                    return Err(options.fault(reason));
                }
                Shape::Polynomial {
                    end,
                    power: options.number("power")?.unwrap_or(1.0),
                }
            }
            ScheduleType::InverseSqrt => {
                let default = if warmup == 0 { 10_000.0 } else { warmup as f64 };
                let timescale = options.number("timescale")?.unwrap_or(default);
                if timescale <= 0.0 {
                    return Err(options.fault(format!("`timescale` is {timescale}, not above 0")));
                }
                Shape::InverseSqrt { timescale }
            }
            ScheduleType::WarmupStableDecay => {
                let decay = options.number("num_decay_steps")?;
                let decay = decay.unwrap_or_else(|| (total as f64 / 10.0).ceil());
                let rest = total as f64 - warmup as f64 - decay;
                Shape::Stable {
                    stable: options.number("num_stable_steps")?.unwrap_or(rest),
                    decay,
                    rise: options.curve("warmup_type")?.unwrap_or(Curve::Linear),
                    fall: options.curve("decay_type")?.unwrap_or(Curve::Cosine),
                    min: options.number("min_lr_ratio")?.unwrap_or(0.0),
                    cycles: options.number("num_cycles")?.unwrap_or(0.5),
                }
            }
            ScheduleType::ReduceOnPlateau => Shape::Plateau(Plateau::new(peak, &mut options)?),
        };
        options.finish()?;
        Ok(Schedule {
            peak,
            warmup: warmup as f64,
            total: total as f64,
            shape,
        })
    }

    /// The learning rate of the step after `done` steps.
    pub fn learning_rate(&self, done: usize) -> f64 {
        match &self.shape {
            Shape::Plateau(plateau) => plateau.learning_rate,
            _ => self.peak * self.factor(done as f64),
        }
    }

    fn factor(&self, step: f64) -> f64 {
        let rising = step < self.warmup;
        let rise = step / self.warmup.max(1.0);
        let progress = (step - self.warmup) / (self.total - self.warmup).max(1.0);
        let wave = |cycles: f64, at: f64| 0.5 * (1.0 + (PI * cycles * 2.0 * at).cos());
        match self.shape {
            Shape::Constant | Shape::Plateau(_) => 1.0,
            Shape::MinCosineAhead { start, .. } if rising => match start {
                None => (step + 1.0) / self.warmup.max(1.0),
                Some(start) => start + (1.0 - start) * step / (self.warmup - 1.0).max(1.0),
            },
            Shape::Stable {
                rise: curve, min, ..
            } if rising => {
                let factor = match curve {
                    Curve::Linear => rise,
                    Curve::Cosine => 0.5 * (1.0 - (PI * rise).cos()),
                    Curve::Sqrt => 1.0 - (1.0 - rise).sqrt(),
                };
                (factor * (1.0 - min) + min).max(0.0)
            }
            _ if rising => rise,
            Shape::ConstantWithWarmup => 1.0,
            Shape::Linear => ((self.total - step) / (self.total - self.warmup).max(1.0)).max(0.0),
            Shape::Cosine { cycles } => wave(cycles, progress).max(0.0),
            Shape::Restarts { .. } if progress >= 1.0 => 0.0,
            Shape::Restarts { cycles } => {
                (0.5 * (1.0 + (PI * ((cycles * progress) % 1.0)).cos())).max(0.0)
            }
            Shape::MinCosine { cycles, min } => {
                (wave(cycles, progress) * (1.0 - min) + min).max(0.0)
            }
            Shape::MinCosineAhead { cycles, min, .. } => {
                let progress = (step - self.warmup + 1.0) / (self.total - self.warmup).max(1.0);
                (wave(cycles, progress) * (1.0 - min) + min).max(0.0)
            }
            Shape::Polynomial { end, .. } if step > self.total || self.total <= self.warmup => {
                end / self.peak
            }
            Shape::Polynomial { end, power } => {
                let left = 1.0 - (step - self.warmup) / (self.total - self.warmup);
                ((self.peak - end) * left.powf(power) + end) / self.peak
            }
            Shape::InverseSqrt { timescale } => {
                1.0 / ((step + (timescale - self.warmup)) / timescale).sqrt()
            }
            Shape::Stable { stable, .. } if step < self.warmup + stable => 1.0,
            Shape::Stable {
                stable,
                decay,
                fall,
                min,
                cycles,
                ..
            } if step < self.warmup + stable + decay => {
                let progress = (step - self.warmup - stable) / decay.max(1.0);
                let factor = match fall {
                    Curve::Linear => 1.0 - progress,
                    Curve::Cosine => wave(cycles, progress),
                    Curve::Sqrt => 1.0 - progress.sqrt(),
                };
                (factor * (1.0 - min) + min).max(0.0)
            }
            Shape::Stable { min, .. } => min,
        }
    }

    /// Tells the schedule the loss of an evaluation. Only `reduce_on_plateau` listens.
    pub fn observe(&mut self, loss: f64) {
        if let Shape::Plateau(plateau) = &mut self.shape {
            plateau.observe(loss);
        }
    }

    /// What a checkpoint must hold besides the step.
    pub fn plateau(&self) -> Option<&Plateau> {
        match &self.shape {
            Shape::Plateau(plateau) => Some(plateau),
            _ => None,
        }
    }

    /// Goes on from a state that [`Schedule::plateau`] gave.
    pub fn restore(&mut self, state: Option<Plateau>) {
        if let (Shape::Plateau(plateau), Some(state)) = (&mut self.shape, state) {
            *plateau = state;
        }
    }
}

/// `reduce_on_plateau`: the learning rate falls when evaluations stop getting better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    learning_rate: f64,
    factor: f64,
    patience: u64,
    threshold: f64,
    relative: bool,
    cooldown: u64,
    min_lr: f64,
    eps: f64,
    /// The best loss; nothing before the first evaluation.
    best: Option<f64>,
    bad: u64,
    cooling: u64,
}

impl Plateau {
    fn new(learning_rate: f64, options: &mut Options<'_>) -> Result<Plateau> {
        let factor = options.number("factor")?.unwrap_or(0.1);
        if factor >= 1.0 {
            return Err(options.fault(format!("`factor` is {factor}, it must be below 1")));
        }
        let mode = options.text("mode")?;
        if mode.is_some_and(|mode| mode != "min") {
            return Err(options.fault("`mode` can only be `min`: what is watched is a loss"));
        }
        let relative = match options.text("threshold_mode")? {
            None | Some("rel") => true,
            Some("abs") => false,
            Some(other) => {
                let reason = format!("`threshold_mode` is `{other}`, it can be `rel` or `abs`");
                return Err(options.fault(reason));
            }
        };
        Ok(Plateau {
            learning_rate,
            factor,
            patience: options.number("patience")?.unwrap_or(10.0) as u64,
            threshold: options.number("threshold")?.unwrap_or(1e-4),
            relative,
            cooldown: options.number("cooldown")?.unwrap_or(0.0) as u64,
            min_lr: options.number("min_lr")?.unwrap_or(0.0),
            eps: options.number("eps")?.unwrap_or(1e-8),
            best: None,
            bad: 0,
            cooling: 0,
        })
    }

    fn observe(&mut self, loss: f64) {
        let below = self.best.is_none_or(|best| {
            let bound = if self.relative {
                best * (1.0 - self.threshold)
            } else {
                best - self.threshold
            };
            loss < bound
        });
        if below && loss.is_finite() {
            self.best = Some(loss);
            self.bad = 0;
        } else {
            self.bad += 1;
        }
        if self.cooling > 0 {
            self.cooling -= 1;
            self.bad = 0;
        }
        if self.bad > self.patience {
            let lower = (self.learning_rate * self.factor).max(self.min_lr);
            if self.learning_rate - lower > self.eps {
                self.learning_rate = lower;
            }
            self.cooling = self.cooldown;
            self.bad = 0;
        }
    }
}

/// `lr_scheduler_kwargs` on its way into a shape: what nobody asked for is an error.
struct Options<'a> {
    map: &'a Map<String, Value>,
    schedule: ScheduleType,
    asked: Vec<&'static str>,
}

impl<'a> Options<'a> {
    fn of(settings: &'a Settings) -> Options<'a> {
        Options {
            map: &settings.lr_scheduler_kwargs,
            schedule: settings.lr_scheduler_type,
            asked: Vec::new(),
        }
    }

    fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.asked.push(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn number(&mut self, key: &'static str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64().filter(|x| x.is_finite() && *x >= 0.0) {
            Some(number) => Ok(Some(number)),
            None => Err(self.fault(format!("`{key}` is {value}, not a number from 0 on"))),
        }
    }

    fn text(&mut self, key: &'static str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.fault(format!("`{key}` is {value}, not a text"))),
        }
    }

    fn curve(&mut self, key: &'static str) -> Result<Option<Curve>> {
        match self.text(key)? {
            None => Ok(None),
            Some("linear") => Ok(Some(Curve::Linear)),
            Some("cosine") => Ok(Some(Curve::Cosine)),
            Some("1-sqrt") => Ok(Some(Curve::Sqrt)),
            Some(other) => Err(self.fault(format!(
                "`{key}` is `{other}`, it can be `linear`, `cosine` or `1-sqrt`"
            ))),
        }
    }

    /// `min_lr`, or `min_lr_rate` as a part of the peak; a tenth if neither is given.
    fn least(&mut self, peak: f64) -> Result<f64> {
        match (self.number("min_lr")?, self.number("min_lr_rate")?) {
            (Some(_), Some(_)) => Err(self.fault("give `min_lr` or `min_lr_rate`, not both")),
            (Some(least), None) => Ok(least / peak),
            (None, rate) => Ok(rate.unwrap_or(0.1)),
        }
    }

    fn fault(&self, reason: impl Into<String>) -> Error {
        Error::setting("lr_scheduler_kwargs", reason)
    }

    fn finish(self) -> Result<()> {
        let Some(key) = self
            .map
            .keys()
            .find(|key| !self.asked.contains(&key.as_str()))
        else {
            return Ok(());
        };
        let hint = peft_core::nearest(key, self.asked.iter().copied());
        let schedule = serde_json::to_value(self.schedule).unwrap_or_default();
        let known = self.asked.join("`, `");
        let known = if known.is_empty() {
            "which takes none".to_owned()
        } else {
            format!("which takes `{known}`{hint}")
        };
        Err(self.fault(format!(
            "`{key}` is no setting of the schedule {schedule}, {known}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every schedule of the fixtures against Python's learning rates.
    #[test]
    fn schedules_are_pythons() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/schedules.json");
        let cases: Vec<Value> =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(cases.len() > 30);
        for case in cases {
            let settings = Settings {
                learning_rate: case["base_lr"].as_f64().unwrap(),
                lr_scheduler_type: serde_json::from_value(case["name"].clone()).unwrap(),
                lr_scheduler_kwargs: case["options"].as_object().unwrap().clone(),
                warmup_steps: case["warmup_steps"].as_f64(),
                ..Settings::default()
            };
            let total = case["steps"].as_u64().unwrap() as usize;
            let mut schedule = Schedule::new(&settings, total).unwrap();
            for (step, wanted) in case["factors"].as_array().unwrap().iter().enumerate() {
                let got = schedule.learning_rate(step) / settings.learning_rate;
                let error = (got - wanted.as_f64().unwrap()).abs();
                assert!(
                    error < 1e-12,
                    "{} {} at {step}: {got} for {wanted}",
                    case["name"],
                    case["options"]
                );
                if let Some(loss) = case["metric"].get(step).and_then(Value::as_f64) {
                    schedule.observe(loss);
                }
            }
        }
    }

    #[test]
    fn a_plateau_goes_on_from_its_state() {
        let settings = Settings {
            lr_scheduler_type: ScheduleType::ReduceOnPlateau,
            lr_scheduler_kwargs: serde_json::from_str(r#"{"patience": 1}"#).unwrap(),
            ..Settings::default()
        };
        let mut whole = Schedule::new(&settings, 10).unwrap();
        let mut first = whole.clone();
        let mut second = whole.clone();
        for loss in [3.0, 2.0, 2.0, 2.0, 2.0] {
            whole.observe(loss);
        }
        for loss in [3.0, 2.0, 2.0] {
            first.observe(loss);
        }
        let json = serde_json::to_string(&first.plateau()).unwrap();
        second.restore(serde_json::from_str(&json).unwrap());
        for loss in [2.0, 2.0] {
            second.observe(loss);
        }
        assert_eq!(second.learning_rate(5), whole.learning_rate(5));
        assert!(whole.learning_rate(5) < settings.learning_rate / 5.0);
    }
}
