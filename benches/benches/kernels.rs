//! The kernels of `peft-torch` beside the same formula in libtorch's own operations, forward and backward.

use criterion::{Criterion, criterion_group, criterion_main};
use peft_torch::{cross_entropy_, gelu_tanh, gemv, linear, rms_norm, rope, set_fast_fp32, swiglu};
use tch::{Device, Kind, Tensor};

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// Times `f`, and with it the backward pass from its output.
fn both(c: &mut Criterion, name: &str, inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor) {
    let leaves: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.detach().set_requires_grad(true))
        .collect();
    c.bench_function(name, |b| {
        b.iter(|| {
            let y = f(&leaves);
            y.backward_ones()
        });
    });
}

trait BackwardOnes {
    fn backward_ones(&self);
}
impl BackwardOnes for Tensor {
    fn backward_ones(&self) {
        peft_torch::backward(&[self], &[&self.ones_like()]).expect("a backward pass");
    }
}

fn elementwise(c: &mut Criterion) {
    for (dtype, kind) in [("fp32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let x = random(&[512, 768], kind);
        let w = random(&[768], kind);
        both(
            c,
            &format!("rms_norm/ours/{dtype}"),
            &[x.shallow_clone()],
            |t| rms_norm(&t[0], &w, 1e-5),
        );
        both(c, &format!("rms_norm/libtorch/{dtype}"), &[x], |t| {
            t[0].rms_norm([768], Some(&w), 1e-5)
        });
        let heads = random(&[4, 128, 12, 64], kind);
        let angle = random(&[1, 128, 32], Kind::Float);
        both(c, &format!("rope/ours/{dtype}"), &[heads], |t| {
            rope(&t[0], &angle.cos(), &angle.sin())
        });
        let (gate, up) = (random(&[512, 2048], kind), random(&[512, 2048], kind));
        both(
            c,
            &format!("swiglu/ours/{dtype}"),
            &[gate.shallow_clone(), up.shallow_clone()],
            |t| swiglu(&t[0], &t[1]),
        );
        both(c, &format!("swiglu/libtorch/{dtype}"), &[gate, up], |t| {
            t[0].silu() * &t[1]
        });
        let inner = random(&[512, 3072], kind);
        both(
            c,
            &format!("gelu_tanh/ours/{dtype}"),
            &[inner.shallow_clone()],
            |t| gelu_tanh(&t[0]),
        );
        both(c, &format!("gelu_tanh/libtorch/{dtype}"), &[inner], |t| {
            t[0].gelu("tanh")
        });
    }
}

fn products(c: &mut Criterion) {
    for fast in [true, false] {
        set_fast_fp32(fast);
        let way = if fast { "onednn" } else { "libtorch" };
        let (x, w) = (
            random(&[512, 768], Kind::Float),
            random(&[3072, 768], Kind::Float),
        );
        both(c, &format!("linear/512x768x3072/{way}/fp32"), &[x], |t| {
            linear(&t[0], &w, None)
        });
    }
    for (dtype, kind) in [("fp32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let (x, w) = (random(&[1, 4096], kind), random(&[4096, 4096], kind));
        c.bench_function(&format!("gemv/4096x4096/ours/{dtype}"), |b| {
            b.iter(|| gemv(&x, &w, None))
        });
        c.bench_function(&format!("gemv/4096x4096/libtorch/{dtype}"), |b| {
            b.iter(|| x.linear::<Tensor>(&w, None))
        });
    }
    let z = random(&[128, 32000], Kind::Float);
    let targets = Tensor::randint(32000, [128], (Kind::Int64, Device::Cpu));
    c.bench_function("cross_entropy/128x32000/fp32", |b| {
        b.iter_batched(
            || z.copy(),
            |mut z| cross_entropy_(&mut z, &targets),
            criterion::BatchSize::LargeInput,
        );
    });
}

criterion_group!(kernels, elementwise, products);
criterion_main!(kernels);
