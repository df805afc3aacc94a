//! LoRA on a two-layer network of one's own, written with `tch::nn`.
//!
//! ```text
//! cargo run -p peft-lora --example mlp
//! ```
//!
//! A network learns y = sin 3x. Then it is frozen, and a LoRA of rank 2 learns y = |x| − ½ on top of it: 386 numbers
//! instead of 4,353. The base stays as it was to the bit, so taking the adapter off gives the sine again.

use std::path::Path;

use peft_core::{Adapter, Ctx, Linear, Model, ModelExt, Registry, Result, Slot, Spec};
use peft_lora::LoraConfig;
use tch::{Device, Kind, Tensor, nn};

/// The network: its layers are places, and [`Model`] gives them names. That is all a method needs.
struct Mlp {
    first: Linear,
    middle: Linear,
    last: Linear,
}

impl Mlp {
    /// Layers of `tch` as places, frozen.
    fn of(layers: [nn::Linear; 3]) -> Mlp {
        let [first, middle, last] = layers.map(Linear::from);
        Mlp {
            first,
            middle,
            last,
        }
    }

    /// x: `[batch, 1] -> [batch, 1]`
    fn forward(&self, x: &Tensor, ctx: Ctx) -> Tensor {
        let h = self.first.forward(x, ctx).tanh(); // [batch, 64]
        let h = self.middle.forward(&h, ctx).tanh();
        self.last.forward(&h, ctx)
    }
}

impl Model for Mlp {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("first", Slot::Linear(&mut self.first));
        visit("middle", Slot::Linear(&mut self.middle));
        visit("last", Slot::Linear(&mut self.last));
    }
}

/// What a run came to.
pub(crate) struct Outcome {
    /// The loss before and after training.
    pub(crate) loss: [f64; 2],
    /// By how much the outputs of a network with the loaded adapter differ from those of the trained one.
    pub(crate) off: f64,
}

/// Trains, saves into `folder`, loads from there.
pub(crate) fn run(folder: &Path) -> Result<Outcome> {
    tch::set_num_threads(1); // Too small to share among threads.
    tch::manual_seed(1);
    let x = Tensor::linspace(-1.0, 1.0, 64, (Kind::Float, Device::Cpu)).unsqueeze(1); // [64, 1]
    let error = |y: &Tensor, target: &Tensor| (y - target).square().mean(Kind::Float);

    // A pretrained network, as anybody would write it.
    let vs = nn::VarStore::new(Device::Cpu);
    pretrain(&vs, layers(&vs), &x, &(&x * 3.0).sin())?;

    // The ten lines: layers become places, LoRA goes on two of them, and any loop trains its tensors.
    let copy = || -> Result<Mlp> {
        let mut to = nn::VarStore::new(Device::Cpu);
        let layers = layers(&to);
        to.copy(&vs)?;
        Ok(Mlp::of(layers))
    };
    let mut mlp = copy()?;
    let lora = LoraConfig {
        r: 2,
        lora_alpha: 4.0,
        ..LoraConfig::on(["middle", "last"])
    };
    mlp.inject("default", &lora)?;
    let target = x.abs() - 0.5;
    let loss = |mlp: &Mlp| error(&mlp.forward(&x, Ctx::TRAIN), &target);
    let before = loss(&mlp).double_value(&[]);
    for step in 0..=400 {
        let now = loss(&mlp);
        if step % 100 == 0 {
            println!("step {step:3}: loss {:.5}", now.double_value(&[]));
        }
        now.backward();
        descend(&mut mlp, 0.1);
    }
    let after = loss(&mlp).double_value(&[]);

    let trained: usize = mlp
        .trainable("default")
        .iter()
        .map(|it| it.tensor.numel())
        .sum();
    println!("trained {trained} numbers");
    let sine = mlp.without_adapters(|mlp| error(&mlp.forward(&x, Ctx::EVAL), &(&x * 3.0).sin()));
    println!(
        "without the adapter the sine is there again: loss {:.5}",
        sine.double_value(&[])
    );

    // To a folder, as Python's `peft` writes it, and onto a fresh network.
    Adapter::of("default", &lora, &mut mlp)?.save(folder)?;
    let mut fresh = copy()?;
    Adapter::load(folder, &Registry::default().with::<LoraConfig>())?
        .apply("default", &mut fresh)?;
    let off = (fresh.forward(&x, Ctx::EVAL) - mlp.forward(&x, Ctx::EVAL))
        .abs()
        .max();
    let off = off.double_value(&[]);
    println!("saved and loaded onto a fresh network: outputs differ by {off:e}");
    Ok(Outcome {
        loss: [before, after],
        off,
    })
}

/// The layers as `tch` makes them: 1 → 64 → 64 → 1.
fn layers(vs: &nn::VarStore) -> [nn::Linear; 3] {
    let layer = |name: &str, inp, out| nn::linear(vs.root() / name, inp, out, Default::default());
    [
        layer("first", 1, 64),
        layer("middle", 64, 64),
        layer("last", 64, 1),
    ]
}

/// Trains the whole network with `tch` alone.
fn pretrain(
    vs: &nn::VarStore,
    [first, middle, last]: [nn::Linear; 3],
    x: &Tensor,
    target: &Tensor,
) -> Result<()> {
    use nn::OptimizerConfig;
    let mut adam = nn::Adam::default().build(vs, 1e-2)?;
    for _ in 0..300 {
        let h = x.apply(&first).tanh().apply(&middle).tanh();
        let loss = (h.apply(&last) - target).square().mean(Kind::Float);
        adam.backward_step(&loss);
    }
    Ok(())
}

/// One step of plain gradient descent; any optimiser over these tensors will do.
fn descend(model: &mut impl Model, rate: f64) {
    for param in model.trainable("default") {
        let mut tensor = param.tensor;
        tch::no_grad(|| tensor -= tensor.grad() * rate);
        tensor.zero_grad();
    }
}

#[allow(dead_code)] // The tests include this file and call `run`.
fn main() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("peft-mlp-{}", std::process::id()));
    let Outcome { loss, off } = run(&folder)?;
    println!(
        "loss {:.4} → {:.4}, {off:.0e} apart after loading; the adapter is in {}",
        loss[0],
        loss[1],
        folder.display()
    );
    Ok(())
}
