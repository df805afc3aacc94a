//! The optimiser's side of a run: which tensors decay, how gradients are clipped, what is remembered.
//!
//! Weight decay pulls a weight towards zero, which makes no sense for a bias or
//! the scale of a norm; Hugging Face tells them apart by name, and so does
//! [`decays`]. Clipping follows `torch.nn.utils.clip_grad_norm_`: with the norm
//! n of all gradients together, g ← g · min(1, max / (n + 1e-6)).

use peft_codec::AdamW8;
use peft_core::Param;
use peft_torch::{AdamW, Moments, drop_grad};
use tch::{Device, Kind, Tensor};

use crate::eight_bits::{self, Moments8};
use crate::error::{Error, Result};
use crate::ffi::paged_zeros;
use crate::settings::{Keep, Optim, Settings};

/// AdamW over everything that is trained.
#[derive(Debug)]
pub struct Optimizer {
    adam: AdamW,
    weight_decay: f64,
    max_norm: f64,
    entries: Vec<Entry>,
}

/// One trained tensor with what the optimiser knows of it.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) tensor: Tensor,
    pub(crate) moments: Remembered,
    decays: bool,
    /// A copy in main memory, which is what is stepped.
    offloaded: Option<Tensor>,
}

/// What AdamW remembers of one tensor.
#[derive(Debug)]
pub(crate) enum Remembered {
    /// In the dtype of the tensor.
    Whole(Moments),
    /// In 8 bits.
    Eight(Moments8),
}

impl Remembered {
    fn of(param: &Tensor, optim: Optim) -> Result<Remembered> {
        let eight = match optim.in_8_bits() {
            false => None,
            true => Moments8::of(param, optim.keep())?,
        };
        Ok(match eight {
            Some(it) => Remembered::Eight(it),
            // libtorch steps moments whose strides are the parameter's.
            None if optim.keep().pages(param) && param.is_contiguous() => {
                let zeros = || paged_zeros(&param.size(), param.kind(), param.device());
                let (m, v) = (zeros()?, zeros()?);
                let step = Tensor::zeros([0i64; 0], (Kind::Float, param.device()));
                Remembered::Whole(Moments { m, v, step })
            }
            None => Remembered::Whole(Moments::new(param)),
        })
    }

    /// Its tensors, by their names in a checkpoint.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Remembered::Whole(it) => vec![("m", &it.m), ("v", &it.v), ("step", &it.step)],
            Remembered::Eight(it) => vec![
                ("state1", &it.state1),
                ("state2", &it.state2),
                ("absmax1", &it.absmax1),
                ("absmax2", &it.absmax2),
                ("step", &it.step),
            ],
        }
    }
}

impl Entry {
    fn new(param: &Param, optim: Optim) -> Result<Entry> {
        let tensor = param.tensor.shallow_clone();
        let away = optim.keep() == Keep::MainMemory && tensor.device() != Device::Cpu;
        let offloaded = away.then(|| tensor.detach().to_device(Device::Cpu));
        Ok(Entry {
            key: key(param),
            moments: Remembered::of(offloaded.as_ref().unwrap_or(&tensor), optim)?,
            decays: !param.norm && decays(&key(param)),
            tensor,
            offloaded,
        })
    }

    /// What is stepped, with its gradient, if there is one.
    fn pair(&mut self) -> Option<(Tensor, Tensor)> {
        let grad = self.tensor.grad();
        grad.defined().then(|| match &mut self.offloaded {
            None => (self.tensor.shallow_clone(), grad),
            Some(copy) => {
                copy.copy_(&self.tensor.detach()); // methods change what they train, too
                (copy.shallow_clone(), grad.to_device(Device::Cpu))
            }
        })
    }

    /// After a step, brings its result to where the tensor is.
    fn bring_back(&mut self) {
        if let Some(copy) = &self.offloaded
            && self.tensor.grad().defined()
        {
            tch::no_grad(|| self.tensor.copy_(copy));
        }
    }
}

impl Optimizer {
    /// For the tensors of `params` that require a gradient; one that is reached by two names is taken once.
    pub fn new(params: &[Param], settings: &Settings) -> Result<Optimizer> {
        let mut entries: Vec<Entry> = Vec::new();
        for param in params.iter().filter(|it| it.tensor.requires_grad()) {
            if entries.iter().any(|it| same(&it.tensor, &param.tensor)) {
                continue;
            }
            entries.push(Entry::new(param, settings.optim)?);
        }
        if entries.is_empty() {
            return Err(Error::Nothing(
                "nothing to train: no tensor requires a gradient".into(),
            ));
        }
        Ok(Optimizer {
            adam: AdamW {
                betas: (settings.adam_beta1, settings.adam_beta2),
                eps: settings.adam_epsilon,
            },
            weight_decay: settings.weight_decay,
            max_norm: settings.max_grad_norm,
            entries,
        })
    }

    /// How many numbers are trained.
    pub fn numel(&self) -> usize {
        self.entries.iter().map(|it| it.tensor.numel()).sum()
    }

    /// Forgets all gradients.
    pub fn zero_grad(&mut self) {
        for entry in &mut self.entries {
            drop_grad(&mut entry.tensor);
        }
    }

    /// The norm of all gradients together: a scalar in fp32, computed where the gradients are.
    pub fn grad_norm(&self) -> Tensor {
        let norms: Vec<Tensor> = self
            .grads()
            .map(|grad| grad.norm().to_kind(Kind::Float))
            .collect();
        match norms.is_empty() {
            true => Tensor::from(0f32),
            false => Tensor::stack(&norms, 0).norm(),
        }
    }

    /// Scales gradients down where their `norm` is above `max_grad_norm`.
    pub fn clip(&self, norm: f64) {
        let scale = (self.max_norm / (norm + 1e-6)).min(1.0);
        if self.max_norm > 0.0 && scale < 1.0 {
            self.grads()
                .for_each(|mut grad| drop(grad.g_mul_scalar_(scale)));
        }
    }

    /// One step with the gradients that are there.
    pub fn step(&mut self, learning_rate: f64) -> Result<()> {
        for (group, decay) in [(true, self.weight_decay), (false, 0.0)] {
            let eight = AdamW8 {
                lr: learning_rate as f32,
                beta1: self.adam.betas.0 as f32,
                beta2: self.adam.betas.1 as f32,
                eps: self.adam.eps as f32,
                weight_decay: decay as f32,
            };
            let (mut whole, mut eights) = (Vec::new(), Vec::new());
            for entry in self.entries.iter_mut().filter(|it| it.decays == group) {
                let Some((param, grad)) = entry.pair() else {
                    continue;
                };
                match &mut entry.moments {
                    Remembered::Whole(moments) => whole.push((param, grad, moments)),
                    Remembered::Eight(moments) => eights.push((param, grad, moments)),
                }
            }
            self.adam.step_with(&mut whole, learning_rate, decay)?;
            eight_bits::step(eight, &mut eights)?;
        }
        for entry in &mut self.entries {
            entry.bring_back();
        }
        Ok(())
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn grads(&self) -> impl Iterator<Item = Tensor> {
        self.entries
            .iter()
            .map(|it| it.tensor.grad())
            .filter(Tensor::defined)
    }
}

/// The name of a parameter within a checkpoint.
pub(crate) fn key(param: &Param) -> String {
    format!("{}.{}", param.at, param.name)
}

/// Whether two handles are of one tensor, so that they share a gradient.
fn same(a: &Tensor, b: &Tensor) -> bool {
    if a.data_ptr() != b.data_ptr() || a.size() != b.size() || a.numel() == 0 {
        return false;
    }
    // Views of the same numbers have switches of their own; handles share one.
    let _ = a.set_requires_grad(false);
    let one = !b.requires_grad();
    let _ = a.set_requires_grad(true);
    one
}

/// Whether Hugging Face's `Trainer` lets weight decay act on a parameter of this name.
///
/// Not where the name in lower case contains `bias`, `layernorm` or `rmsnorm`,
/// or where a part between dots is `norm` or ends in `_norm`.
///
/// ```
/// assert!(peft_train::decays("model.layers.0.self_attn.q_proj.lora_A.weight"));
/// assert!(!peft_train::decays("transformer.h.0.attn.c_attn.bias"));
/// assert!(!peft_train::decays("model.layers.0.self_attn.q_norm.weight"));
/// ```
pub fn decays(name: &str) -> bool {
    let name = name.to_lowercase();
    let anywhere = ["bias", "layernorm", "rmsnorm"]
        .iter()
        .any(|it| name.contains(it));
    let part = name
        .split('.')
        .any(|part| part == "norm" || part.ends_with("_norm"));
    !anywhere && !part
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(at: &str, tensor: &Tensor) -> Param {
        Param {
            adapter: "default".into(),
            at: at.into(),
            name: "weight".into(),
            norm: at.starts_with("transformer.") && at.contains("ln_"),
            tensor: tensor.shallow_clone(),
        }
    }

    #[test]
    fn decay_groups_are_hugging_faces() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/decay.json");
        let json: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let models = json.as_object().unwrap();
        assert!(models.len() > 5);
        for (model, groups) in models {
            let names = |group: &str| groups[group].as_array().unwrap().clone();
            for name in names("decay") {
                assert!(decays(name.as_str().unwrap()), "{model} {name}");
            }
            for name in names("no_decay") {
                let name = name.as_str().unwrap();
                // GPT-2's norms are known by their kind and not by their names.
                assert!(!decays(name) || name.contains("ln_"), "{model} {name}");
            }
        }
    }

    #[test]
    fn clipping_gives_the_largest_norm() {
        tch::manual_seed(1);
        let like = (Kind::Float, Device::Cpu);
        let a = Tensor::randn([3, 5], like).set_requires_grad(true);
        let b = Tensor::randn([7], like).set_requires_grad(true);
        ((&a * &a).sum(Kind::Float) + b.sum(Kind::Float)).backward();
        let optimizer =
            Optimizer::new(&[param("a", &a), param("b", &b)], &Settings::default()).unwrap();
        let norm = optimizer.grad_norm().double_value(&[]);
        let squares = (&a * &a).sum(Kind::Double).double_value(&[]);
        let by_hand = (4.0 * squares + 7.0f64).sqrt();
        assert!((norm - by_hand).abs() < 1e-5);
        optimizer.clip(norm);
        assert!((optimizer.grad_norm().double_value(&[]) - 1.0).abs() < 1e-5);
        optimizer.clip(0.5);
        assert!((optimizer.grad_norm().double_value(&[]) - 1.0).abs() < 1e-5);
    }

    /// A copy is stepped in the tensor's place: as if the tensor were on a GPU.
    #[test]
    fn offloaded_steps_are_steps() {
        for (optim, offloaded) in [
            (Optim::AdamwTorch, Optim::OffloadedAdamw32bit),
            (Optim::Adamw8bit, Optim::OffloadedAdamw8bit),
        ] {
            tch::manual_seed(1);
            let random = || Tensor::randn([70, 80], (Kind::Float, Device::Cpu));
            let (start, target) = (random(), random());
            let [mut plain, mut away] = [optim, offloaded].map(|optim| {
                let tensor = start.copy().set_requires_grad(true);
                let settings = Settings {
                    optim,
                    weight_decay: 0.1,
                    ..Settings::default()
                };
                Optimizer::new(&[param("a", &tensor)], &settings).unwrap()
            });
            let entry = &mut away.entries[0];
            entry.offloaded = Some(entry.tensor.detach().copy());
            for _ in 0..5 {
                for it in [&mut plain, &mut away] {
                    it.zero_grad();
                    let loss = (&it.entries[0].tensor - &target).square().sum(Kind::Float);
                    loss.backward();
                    it.step(1e-2).unwrap();
                }
                // A method changes its tensors besides.
                for it in [&plain, &away] {
                    let _ = tch::no_grad(|| it.entries[0].tensor.get(3).zero_());
                }
            }
            let [plain, away] = [plain, away].map(|it| it.entries[0].tensor.detach());
            assert!(plain.equal(&away), "{offloaded:?}");
            assert!(!plain.equal(&start));
        }
    }

    /// Pages of a GPU are for tensors on a GPU that are worth it; a name of Hugging Face's is read as it is there.
    #[test]
    fn in_main_memory_paged_is_plain() {
        let like = (Kind::Float, Device::Cpu);
        let start = Tensor::randn([400, 300], like);
        let step = |name: &str| {
            let optim: Optim = serde_json::from_value(name.into()).unwrap();
            let tensor = start.copy().set_requires_grad(true);
            let settings = Settings {
                optim,
                ..Settings::default()
            };
            let mut it = Optimizer::new(&[param("a", &tensor)], &settings).unwrap();
            tensor.square().sum(Kind::Float).backward();
            it.step(1e-2).unwrap();
            assert!(it.entries[0].offloaded.is_none());
            (tensor.detach(), it.entries[0].moments.tensors()[0].0)
        };
        for (plain, others) in [
            (
                "adamw_torch",
                ["paged_adamw", "paged_adamw_32bit", "offloaded_adamw_32bit"],
            ),
            (
                "adamw_8bit",
                ["adamw_bnb_8bit", "paged_adamw_8bit", "offloaded_adamw_8bit"],
            ),
        ] {
            let (stepped, kept) = step(plain);
            for other in others {
                let (it, its) = step(other);
                assert!(it.equal(&stepped) && its == kept, "{other}");
            }
        }
    }

    #[test]
    fn a_tensor_with_two_names_is_stepped_once_and_its_views_each() {
        let a = Tensor::zeros([4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let view = a.detach().set_requires_grad(true);
        let params = [param("one", &a), param("two", &a), param("three", &view)];
        let optimizer = Optimizer::new(&params, &Settings::default()).unwrap();
        let keys: Vec<_> = optimizer
            .entries()
            .iter()
            .map(|it| it.key.as_str())
            .collect();
        assert_eq!(keys, ["one.weight", "three.weight"]);
        assert!(a.requires_grad() && view.requires_grad());
    }
}
