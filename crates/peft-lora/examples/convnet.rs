//! LoRA on a small convolutional network: a classifier of shapes that were never seen learns them with its base frozen.
//!
//! ```text
//! cargo run -p peft-lora --example convnet
//! ```
//!
//! The pictures are made up: bars, either upright or lying, in noise. The network is random and stays so; LoRA on its
//! convolutions (one of them with groups) and the small head, trained whole as `modules_to_save`, do the work.

use std::path::Path;

use peft_core::{Adapter, Conv, Ctx, Linear, Model, ModelExt, Registry, Result, Slot, Spec};
use peft_lora::LoraConfig;
use tch::{Device, Kind, Tensor, nn};

/// Two convolutions and a head.
struct ConvNet {
    first: Conv,
    second: Conv,
    head: Linear,
}

impl ConvNet {
    /// From layers of `tch`. A convolution there does not tell its settings, so they are said again.
    fn new(vs: &nn::VarStore) -> Result<ConvNet> {
        let root = vs.root();
        let halve = nn::ConvConfig {
            stride: 2,
            padding: 1,
            ..Default::default()
        };
        let grouped = nn::ConvConfig { groups: 2, ..halve };
        Ok(ConvNet {
            first: Conv::of(nn::conv2d(&root / "first", 1, 8, 3, halve), &halve)?,
            second: Conv::of(nn::conv2d(&root / "second", 8, 12, 3, grouped), &grouped)?,
            head: nn::linear(&root / "head", 12, 2, Default::default()).into(),
        })
    }

    /// images: `[batch, 1, 12, 12] -> [batch, 2]`
    fn forward(&self, images: &Tensor, ctx: Ctx) -> Tensor {
        let h = self.first.forward(images, ctx).relu(); // [batch, 8, 6, 6]
        let h = self.second.forward(&h, ctx).relu(); // [batch, 12, 3, 3]
        self.head
            .forward(&h.mean_dim([2i64, 3].as_slice(), false, Kind::Float), ctx)
    }
}

impl Model for ConvNet {
    fn spec(&self) -> Spec {
        Spec::default()
    }
    fn slots(&mut self, visit: &mut dyn FnMut(&str, Slot<'_>)) {
        visit("first", Slot::Conv(&mut self.first));
        visit("second", Slot::Conv(&mut self.second));
        visit("head", Slot::Linear(&mut self.head));
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
    tch::manual_seed(3);
    let (images, labels) = bars(128);
    let vs = nn::VarStore::new(Device::Cpu);
    let mut net = ConvNet::new(&vs)?;
    let lora = LoraConfig {
        r: 4, // a multiple of the groups
        lora_alpha: 8.0,
        modules_to_save: Some(vec!["head".to_owned()]),
        ..LoraConfig::on(["first", "second"])
    };
    net.inject("default", &lora)?;

    let loss = |net: &ConvNet| {
        net.forward(&images, Ctx::TRAIN)
            .cross_entropy_for_logits(&labels)
    };
    let before = loss(&net).double_value(&[]);
    for step in 0..=200 {
        let now = loss(&net);
        if step % 50 == 0 {
            println!("step {step:3}: loss {:.4}", now.double_value(&[]));
        }
        now.backward();
        for param in net.trainable("default") {
            let mut tensor = param.tensor;
            tch::no_grad(|| tensor -= tensor.grad() * 0.3);
            tensor.zero_grad();
        }
    }
    let after = loss(&net).double_value(&[]);
    let (images, labels) = bars(256);
    let right = net.forward(&images, Ctx::EVAL).accuracy_for_logits(&labels);
    println!(
        "new pictures told apart: {:.1} %",
        right.double_value(&[]) * 100.0
    );

    Adapter::of("default", &lora, &mut net)?.save(folder)?;
    let mut same = nn::VarStore::new(Device::Cpu);
    let mut fresh = ConvNet::new(&same)?;
    same.copy(&vs)?;
    Adapter::load(folder, &Registry::default().with::<LoraConfig>())?
        .apply("default", &mut fresh)?;
    let off = (fresh.forward(&images, Ctx::EVAL) - net.forward(&images, Ctx::EVAL))
        .abs()
        .max();
    let off = off.double_value(&[]);
    println!("saved and loaded onto a fresh network: outputs differ by {off:e}");

    // A grouped convolution has no weight that its LoRA could be merged into, and says so; the network is unchanged.
    if let Err(why) = fresh.merge() {
        println!("merging is refused: {why}");
    }
    Ok(Outcome {
        loss: [before, after],
        off,
    })
}

/// Upright (0) and lying (1) bars in noise: `[n, 1, 12, 12]` and `[n]`.
fn bars(n: i64) -> (Tensor, Tensor) {
    let on = (Kind::Float, Device::Cpu);
    let place = Tensor::randint(12, [n], (Kind::Int64, Device::Cpu));
    let bar = place
        .onehot(12)
        .view([n, 1, 1, 12])
        .expand([n, 1, 12, 12], false);
    let labels = Tensor::randint(2, [n], (Kind::Int64, Device::Cpu));
    let lying = labels.view([n, 1, 1, 1]).to_kind(Kind::Bool);
    let images = bar.transpose(2, 3).where_self(&lying, &bar);
    (images + Tensor::randn([n, 1, 12, 12], on) * 0.2, labels)
}

#[allow(dead_code)] // The tests include this file and call `run`.
fn main() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("peft-convnet-{}", std::process::id()));
    let Outcome { loss, off } = run(&folder)?;
    println!(
        "loss {:.4} → {:.4}, {off:.0e} apart after loading; the adapter is in {}",
        loss[0],
        loss[1],
        folder.display()
    );
    Ok(())
}
