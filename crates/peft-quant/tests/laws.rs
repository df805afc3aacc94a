//! What holds for every layer in few bits, whatever its shape.

use peft_core::{Ctx, Linear, LinearOp, Plain};
use peft_quant::{Block, Compat, Four, QuantisedLinear, Scheme, Type};
use peft_torch::memory;
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

fn four(kind: Type, block: usize, double_quant: bool) -> Scheme {
    Scheme::Four(Four {
        kind,
        block: Block::of(block).unwrap(),
        double_quant,
        compat: Compat::Cuda,
    })
}

fn schemes() -> impl Strategy<Value = Scheme> {
    let kind = prop_oneof![Just(Type::Nf4), Just(Type::Fp4)];
    let block = prop_oneof![Just(32usize), Just(64), Just(128), Just(4096)];
    prop_oneof![
        4 => (kind, block, any::<bool>()).prop_map(|(kind, block, double)| four(kind, block, double)),
        1 => Just(Scheme::INT8),
    ]
}

fn random(shape: &[i64], seed: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn layer(scheme: &Scheme, out: i64, inp: i64, bias: bool, kind: Kind) -> QuantisedLinear {
    let plain = Plain {
        weight: random(&[out, inp], out * 1000 + inp).to_kind(kind),
        bias: bias.then(|| random(&[out], out).to_kind(kind)),
    };
    QuantisedLinear::new(scheme, plain).unwrap()
}

fn far(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((a - &b).abs().max() / b.abs().max().clamp_min(1e-30)).double_value(&[])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Few rows and many go different ways; both are the product with the decoded weight, and so is its gradient.
    #[test]
    fn a_layer_is_the_product_with_its_decoded_weight(
        scheme in schemes(),
        (out, inp) in (1i64..80, 1i64..200),
        rows in prop_oneof![1i64..9, 9i64..40],
        bias in any::<bool>(),
    ) {
        let layer = layer(&scheme, out, inp, bias, Kind::Float);
        let x = random(&[2, rows, inp], rows).set_requires_grad(true);
        let g = random(&[2, rows, out], 7);
        let y = layer.forward(&x);
        (&y * &g).sum(Kind::Float).backward();
        let weight = layer.weight();
        let z = x.detach().matmul(&weight.tr());
        let z = match layer.bias() {
            Some(bias) => z + bias,
            None => z,
        };
        prop_assert!(far(&y, &z) < 1e-5, "{}", far(&y, &z));
        prop_assert!(far(&x.grad(), &g.matmul(&weight)) < 1e-5);
    }

    /// What was encoded decodes to what encodes to the same: files are stable.
    #[test]
    fn decoding_and_encoding_again_changes_nothing(
        kind in prop_oneof![Just(Type::Nf4), Just(Type::Fp4)],
        (out, inp) in (1i64..40, 1i64..100),
    ) {
        let first = layer(&four(kind, 64, false), out, inp, false, Kind::Float);
        let plain = Plain { weight: first.weight(), bias: None };
        let again = first.encode(plain).unwrap();
        prop_assert!(again.weight().equal(&first.weight()));
    }
}

/// A large weight is decoded past the caches, a small one is not.
#[test]
fn a_large_weight_is_what_its_rows_are() {
    let (out, inp, rows) = (1130, 2048, 100);
    let scheme = four(Type::Nf4, 64, false);
    for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
        let dense = random(&[out, inp], 9).to_kind(kind);
        let layer =
            |weight: Tensor| QuantisedLinear::new(&scheme, Plain { weight, bias: None }).unwrap();
        let parts: Vec<Tensor> = dense
            .split(rows, 0)
            .into_iter()
            .map(|it| layer(it).weight())
            .collect();
        let parts = Tensor::cat(&parts, 0);
        let whole = layer(dense);
        assert!(whole.weight().equal(&parts), "{kind:?}");
        // The product decodes into memory that is lent.
        if kind != Kind::Half {
            let one = Tensor::eye(inp, (kind, Device::Cpu));
            assert!(whole.forward(&one).equal(&parts.tr()), "{kind:?}");
        }
    }
}

#[test]
fn in_bf16_a_batch_is_the_dense_product_to_the_bit() {
    for scheme in [four(Type::Nf4, 64, true), four(Type::Fp4, 128, false)] {
        let layer = layer(&scheme, 96, 160, true, Kind::BFloat16);
        let dense = Linear::new(peft_core::Dense::new(
            layer.weight(),
            layer.bias().map(Tensor::shallow_clone),
        ));
        let x = random(&[3, 50, 160], 1).to_kind(Kind::BFloat16);
        let (a, b) = (
            x.copy().set_requires_grad(true),
            x.copy().set_requires_grad(true),
        );
        let (y, z) = (layer.forward(&a), dense.forward(&b, Ctx::EVAL));
        assert!(y.equal(&z));
        y.sum(Kind::Float).backward();
        z.sum(Kind::Float).backward();
        assert!(a.grad().equal(&b.grad()));
    }
}

#[test]
fn few_rows_in_bf16_are_close() {
    let layer = layer(&four(Type::Nf4, 64, true), 256, 512, false, Kind::BFloat16);
    let x = random(&[2, 512], 3).to_kind(Kind::BFloat16);
    let dense = x
        .to_kind(Kind::Float)
        .matmul(&layer.weight().to_kind(Kind::Float).tr());
    // A bf16 has 8 bits, and so have the centroids; the output is rounded once.
    let off = far(&layer.forward(&x), &dense);
    assert!(off < 2f64.powi(-7), "{off}");
}

/// x lies in memory that comes back when nobody holds it.
#[test]
fn nothing_of_the_input_is_saved() {
    let layer = layer(&four(Type::Nf4, 64, true), 512, 512, false, Kind::Float);
    let x = random(&[64, 512], 1).set_requires_grad(true);
    let run = |keep: bool| {
        peft_torch::with_scratch(Kind::Float, &[64, 512], |mut inner| {
            inner.copy_(&x); // no leaf, so the graph has no reason to hold it
            let y = layer.forward(&inner);
            (y, keep.then_some(inner))
        })
    };
    let (y, _) = run(false);
    assert_eq!(peft_torch::kept().0, 2, "x and the weight came back");
    y.sum(Kind::Float).backward();
    assert_eq!(x.grad().size(), [64, 512]);
    let (_, held) = run(true);
    assert_eq!(peft_torch::kept().0, 1, "what is held does not");
    drop(held);
}

#[test]
fn no_dense_weight_survives_a_product() {
    tch::set_num_threads(1);
    let layers: Vec<QuantisedLinear> = (0..12)
        .map(|_| layer(&four(Type::Nf4, 64, true), 1024, 1024, false, Kind::Float))
        .collect();
    let x = random(&[16, 1024], 1).set_requires_grad(true);
    let before = memory::usage(Device::Cpu).map(|it| it.now);
    let y = layers
        .iter()
        .fold(x.shallow_clone(), |y, it| it.forward(&y));
    y.sum(Kind::Float).backward();
    let after = memory::usage(Device::Cpu).map(|it| it.now);
    // One weight is 4 MiB in fp32; twelve would be 48.
    if let (Some(before), Some(after)) = (before, after) {
        let grown = after.saturating_sub(before) >> 20;
        assert!(grown < 24, "{grown} MiB more than before");
    }
    let (free, bytes) = peft_torch::kept();
    assert_eq!(free, 1, "one region for all twelve");
    assert!(bytes <= 8 << 20);
}

#[test]
fn merging_decodes_adds_and_encodes() {
    for scheme in [four(Type::Nf4, 64, true), Scheme::INT8] {
        let first = layer(&scheme, 64, 96, true, Kind::Float);
        let delta = random(&[64, 96], 5) * 0.1;
        let plain = Plain {
            weight: first.weight() + &delta,
            bias: first.bias().map(Tensor::shallow_clone),
        };
        let merged = first.encode(plain).unwrap();
        let direct = QuantisedLinear::new(
            &scheme,
            Plain {
                weight: first.weight() + &delta,
                bias: None,
            },
        );
        assert!(merged.weight().equal(&direct.unwrap().weight()));
    }
}
