//! Each kernel against the formula in libtorch's own operations, values and gradients, odd sizes, both dtypes.

use peft_torch::{
    AdamW, Moments, add_, cross_entropy_, drop_grad, gelu_tanh, gemv, linear, memory, rms_norm,
    rng, rope, scale, scale_, set_fast_fp32, swiglu, vjp,
};
use tch::{Device, Kind, Reduction, Tensor};

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// The largest difference relative to the largest number.
fn gap(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    ((&a - &b).abs().max() / b.abs().max()).double_value(&[])
}

/// Compares value and gradients of `ours` with those of `plain`, computed in fp32.
fn same(
    what: &str,
    inputs: &[Tensor],
    ours: impl Fn(&[Tensor]) -> Tensor,
    plain: impl Fn(&[Tensor]) -> Tensor,
) {
    for (kind, within) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1.5e-2)] {
        let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(kind)).collect();
        let run = |f: &dyn Fn(&[Tensor]) -> Tensor, kind: Kind| {
            let leaves: Vec<Tensor> = inputs
                .iter()
                .map(|t| t.to_kind(kind).detach().set_requires_grad(true))
                .collect();
            let y = f(&leaves);
            let seed = (Tensor::arange(y.numel() as i64, (Kind::Float, Device::Cpu)) * 0.7).sin();
            let seed = seed
                .view(y.size().as_slice())
                .to_kind(Kind::BFloat16)
                .to_kind(y.kind());
            let leaves: Vec<&Tensor> = leaves.iter().collect();
            let grads = vjp(&[&y], &[&seed], &leaves).expect("a backward pass");
            (y.detach(), grads)
        };
        let (y, grads) = run(&ours, kind);
        let (expected, slopes) = run(&plain, Kind::Float);
        assert_eq!(y.kind(), kind, "{what}");
        assert!(
            gap(&y, &expected) < within,
            "{what} {kind:?}: {:e}",
            gap(&y, &expected)
        );
        for (i, (g, s)) in grads.into_iter().zip(slopes).enumerate() {
            let off = gap(&g.expect("a gradient"), &s.expect("a gradient"));
            assert!(off < within, "{what} {kind:?}, gradient {i}: {off:e}");
        }
    }
}

#[test]
fn norms_turns_and_gates() {
    tch::manual_seed(1);
    for (b, s, h, d) in [(1, 4, 2, 6), (2, 5, 3, 14), (3, 7, 2, 66)] {
        let x = random(&[b, s, h, d], Kind::Float);
        let w = random(&[d], Kind::BFloat16).to_kind(Kind::Float);
        same(
            "rms_norm",
            &[x.shallow_clone(), w],
            |t| rms_norm(&t[0], &t[1], 1e-5),
            |t| {
                &t[0]
                    * (t[0]
                        .square()
                        .mean_dim([-1i64].as_slice(), true, Kind::Float)
                        + 1e-5)
                        .rsqrt()
                    * &t[1]
            },
        );
        let angle = random(&[1, s, d / 2], Kind::Float);
        let (cos, sin) = (angle.cos(), angle.sin());
        same(
            "rope",
            &[x.shallow_clone()],
            |t| rope(&t[0], &cos, &sin),
            |t| {
                let half = t[0].chunk(2, -1);
                let turned = Tensor::cat(&[-&half[1], half[0].shallow_clone()], -1);
                let wide = |t: &Tensor| Tensor::cat(&[t, t], -1).unsqueeze(2);
                &t[0] * wide(&cos) + turned * wide(&sin)
            },
        );
        same(
            "swiglu",
            &[&x * 3.0, random(&[b, s, h, d], Kind::Float)],
            |t| swiglu(&t[0], &t[1]),
            |t| t[0].silu() * &t[1],
        );
        same(
            "gelu",
            &[&x * 3.0],
            |t| gelu_tanh(&t[0]),
            |t| t[0].gelu("tanh"),
        );
    }
}

/// Widths around the edges of a block of columns, rows around its height; the factors stay in fp32.
#[test]
fn columns_are_scaled() {
    tch::manual_seed(8);
    for (m, n) in [(1, 1), (3, 5), (63, 127), (65, 129), (130, 300)] {
        let s = random(&[n], Kind::Float).set_requires_grad(true);
        for (kind, within) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
            let x = random(&[2, m, n], kind).set_requires_grad(true);
            let g = random(&[2, m, n], kind);
            let wide = |t: &Tensor| t.detach().to_kind(Kind::Double);
            let y = scale(&x, &s);
            assert_eq!(y.kind(), kind);
            assert!(gap(&y, &(wide(&x) * wide(&s))) < within);
            let grads = vjp(&[&y], &[&g], &[&x, &s]).expect("a backward pass");
            let [dx, ds] = [0, 1].map(|i| grads[i].as_ref().expect("a gradient"));
            assert!(gap(dx, &(wide(&g) * wide(&s))) < within);
            let sum =
                (wide(&g) * wide(&x)).sum_dim_intlist([0i64, 1].as_slice(), false, Kind::Double);
            assert!(
                gap(ds, &sum) < 1e-5,
                "{m} × {n} {kind:?}: {:e}",
                gap(ds, &sum)
            );
            assert_eq!(ds.kind(), Kind::Float);

            // In place where the factors are constant: the same bits, and a gradient for x all the same.
            let fresh = &x + 0.0;
            let at = fresh.data_ptr();
            let same = scale_(fresh, &s.detach());
            assert!(same.equal(&y) && same.data_ptr() == at);
            let again = vjp(&[&same], &[&g], &[&x]).expect("a backward pass");
            assert!(again[0].as_ref().expect("a gradient").equal(dx));
        }
    }
}

#[test]
fn extreme_values_stay_finite_where_they_should() {
    let x = Tensor::from_slice(&[-1e4f32, -90., -20., -0., 0., 20., 90., 1e4]);
    let ones = x.ones_like();
    for (got, expected) in [
        (swiglu(&x, &ones), x.silu()),
        (gelu_tanh(&x), x.gelu("tanh")),
    ] {
        assert!(
            got.allclose(&expected, 1e-5, 1e-6, false),
            "{got} {expected}"
        );
    }
    let nan = Tensor::from_slice(&[f32::NAN, f32::INFINITY]);
    let y = swiglu(&nan, &nan.ones_like());
    assert!(y.double_value(&[0]).is_nan() && y.double_value(&[1]).is_infinite());
}

#[test]
fn part_of_a_head_can_turn() {
    let x = random(&[2, 3, 2, 10], Kind::Float);
    let angle = random(&[2, 3, 3], Kind::Float);
    let y = rope(&x, &angle.cos(), &angle.sin());
    assert!(y.narrow(-1, 6, 4).equal(&x.narrow(-1, 6, 4)));
    let whole = rope(&x.narrow(-1, 0, 6), &angle.cos(), &angle.sin());
    assert!(y.narrow(-1, 0, 6).allclose(&whole, 1e-6, 1e-6, false));
}

#[test]
fn cross_entropy_leaves_its_gradient() {
    for (kind, within) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
        let z = (random(&[9, 131], Kind::Float) * 5.0).to_kind(kind);
        let targets = Tensor::randint(131, [9], (Kind::Int64, Device::Cpu));
        let exact = z.to_kind(Kind::Float).set_requires_grad(true);
        let loss = exact.cross_entropy_loss::<Tensor>(&targets, None, Reduction::None, -100, 0.0);
        let slope = vjp(&[&loss], &[&loss.ones_like()], &[&exact])
            .unwrap()
            .remove(0)
            .unwrap();
        let mut scores = z.copy();
        let losses = cross_entropy_(&mut scores, &targets);
        assert!(gap(&losses, &loss.detach()) < 2e-6);
        assert!(gap(&scores, &slope) < within);
    }
}

#[test]
fn a_target_beyond_the_vocabulary_does_not_read_beyond_the_row() {
    let mut z = random(&[2, 3], Kind::Float);
    let bad = Tensor::from_slice(&[0i64, 3]);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cross_entropy_(&mut z, &bad)
    }));
    assert!(caught.is_err());
}

#[test]
fn products_and_their_gradients() {
    for fast in [false, true] {
        set_fast_fp32(fast);
        for (rows, inp, out) in [(1, 7, 5), (3, 130, 200), (33, 31, 17), (64, 96, 128)] {
            let (x, w, b) = (
                random(&[2, rows, inp], Kind::Float),
                random(&[out, inp], Kind::Float),
                random(&[out], Kind::Float),
            );
            same(
                "linear",
                &[x.shallow_clone(), w.shallow_clone(), b.shallow_clone()],
                |t| linear(&t[0], &t[1], Some(&t[2])),
                |t| t[0].matmul(&t[1].tr()) + &t[2],
            );
            // A weight that is kept [in, out].
            same(
                "transposed",
                &[x.shallow_clone()],
                |t| linear(&t[0], &w.tr().contiguous().tr().to_kind(t[0].kind()), None),
                |t| t[0].matmul(&w.tr()),
            );
            same(
                "transposed and trained",
                &[x.shallow_clone(), w.tr().contiguous()],
                |t| linear(&t[0], &t[1].tr(), None),
                |t| t[0].matmul(&t[1]),
            );
        }
    }
}

#[test]
fn few_rows_are_the_same_product() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (m, n, k) in [(1, 300, 130), (3, 257, 65), (4, 128, 1024)] {
            let (x, w, b) = (
                random(&[m, k], kind),
                random(&[n, k], kind),
                random(&[n], kind),
            );
            let exact = x
                .to_kind(Kind::Double)
                .matmul(&w.to_kind(Kind::Double).tr())
                + &b;
            let within = if kind == Kind::Float { 1e-6 } else { 1e-2 };
            assert!(gap(&gemv(&x, &w, Some(&b)), &exact) < within);
        }
    }
}

#[test]
fn adamw_is_the_papers() {
    let start = [random(&[5, 3], Kind::Float), random(&[7], Kind::Float)];
    let adam = AdamW {
        betas: (0.8, 0.95),
        eps: 1e-6,
    };
    let (lr, decay) = (0.01, 0.1);
    let mut fused: Vec<Tensor> = start
        .iter()
        .map(|t| t.copy().set_requires_grad(true))
        .collect();
    let mut moments: Vec<Moments> = fused.iter().map(Moments::new).collect();
    let mut plain: Vec<(Tensor, Tensor, Tensor)> = start
        .iter()
        .map(|t| (t.copy(), t.zeros_like(), t.zeros_like()))
        .collect();
    for step in 1..=4 {
        let slope = |t: &Tensor| (t * step as f64).sin();
        for p in &mut fused {
            drop_grad(p);
            assert!(!p.grad().defined());
            let g = slope(&p.detach());
            (&*p * g).sum(Kind::Float).backward();
        }
        let mut pairs: Vec<_> = fused.iter_mut().zip(&mut moments).collect();
        adam.step(&mut pairs, lr, decay).unwrap();
        for (p, m, v) in &mut plain {
            let g = slope(p);
            *m = &*m * 0.8 + &g * 0.2;
            *v = &*v * 0.95 + g.square() * 0.05;
            let (c1, c2) = (1.0 - 0.8f64.powi(step), 1.0 - 0.95f64.powi(step));
            *p = &*p * (1.0 - lr * decay) - (&*m / c1) / ((&*v / c2).sqrt() + 1e-6) * lr;
        }
    }
    for (a, (b, ..)) in fused.iter().zip(&plain) {
        let off = gap(&a.detach(), b);
        assert!(off < 1e-6, "{off:e}");
    }
}

#[test]
fn a_random_state_comes_back() {
    tch::manual_seed(7);
    let _ = random(&[3], Kind::Float);
    let state = rng::state(Device::Cpu).unwrap();
    let first = random(&[40], Kind::Float);
    rng::set_state(Device::Cpu, &state).unwrap();
    assert!(first.equal(&random(&[40], Kind::Float)));
    assert!(rng::set_state(Device::Cpu, &Tensor::from_slice(&[1u8, 2])).is_err());
    assert!(rng::state(Device::Cuda(0)).is_err() || tch::Cuda::is_available());
}

#[test]
fn memory_in_use_is_told() {
    let before = memory::usage(Device::Cpu).expect("this system tells");
    let held = Tensor::ones([16 << 20], (Kind::Float, Device::Cpu));
    let now = memory::usage(Device::Cpu).expect("this system tells");
    assert!(now.now >= before.now + (48 << 20), "{before:?} {now:?}");
    assert!(now.peak >= now.now);
    drop(held);
}

#[test]
fn borrowed_memory_is_held_and_checked() {
    let bytes: std::sync::Arc<[u32]> = vec![0x3f80_0000u32; 6].into(); // 1.0
    // SAFETY: six words that the Arc keeps.
    let raw = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<u8>(), 24) };
    // SAFETY: the owner keeps the bytes, and nobody writes.
    let t = unsafe { memory::borrow(raw, &[2, 3], Kind::Float, bytes.clone()) }.unwrap();
    let view = t.narrow(0, 1, 1);
    drop(t);
    assert_eq!(std::sync::Arc::strong_count(&bytes), 2);
    assert_eq!(view.sum(Kind::Float).double_value(&[]), 3.0);
    drop(view);
    assert_eq!(std::sync::Arc::strong_count(&bytes), 1);
    for (shape, part) in [([2, 4], 0..24), ([1, 5], 1..21), ([i64::MAX, 2], 0..24)] {
        // SAFETY: refused before anything is read.
        assert!(unsafe { memory::borrow(&raw[part], &shape, Kind::Float, bytes.clone()) }.is_err());
    }
}

#[test]
fn attention_is_softmax_of_products() {
    for (b, n, heads, kv, d, causal, masked) in [
        (2, 7, 4, 4, 6, true, false),
        (2, 67, 4, 4, 6, true, false),
        (1, 130, 6, 2, 10, true, false),
        (2, 65, 4, 1, 8, false, true),
        (3, 5, 2, 2, 4, false, true),
        (3, 77, 2, 2, 4, false, false),
    ] {
        let q = random(&[b, n, heads, d], Kind::Float);
        let (k, v) = (
            random(&[b, n, kv, d], Kind::Float),
            random(&[b, n, kv, d], Kind::Float),
        );
        let mask = masked.then(|| {
            let hidden = Tensor::rand([b, 1, n, n], (Kind::Float, Device::Cpu)).gt(0.6);
            let own = Tensor::eye(n, (Kind::Bool, Device::Cpu));
            let hidden = hidden.logical_and(&own.logical_not());
            Tensor::zeros([b, 1, n, n], (Kind::Float, Device::Cpu))
                .masked_fill(&hidden, f64::NEG_INFINITY)
        });
        let plain = |t: &[Tensor]| {
            let heads_first = |t: &Tensor, groups: i64| {
                t.transpose(1, 2)
                    .repeat_interleave_self_int(groups, 1, None)
            };
            let (q, k, v) = (
                heads_first(&t[0], 1),
                heads_first(&t[1], heads / kv),
                heads_first(&t[2], heads / kv),
            );
            let mut z = q.matmul(&k.transpose(2, 3)) * 0.3;
            if causal {
                let later = Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).triu(1);
                z = z.masked_fill(&later, f64::NEG_INFINITY);
            }
            if let Some(mask) = &mask {
                z += mask;
            }
            z.softmax(-1, Kind::Float).matmul(&v).transpose(1, 2)
        };
        // Through oneDNN it is fp32 as well, also where a processor would rather have bf16.
        for fast in [false, true] {
            set_fast_fp32(fast);
            same(
                "attention",
                &[q.shallow_clone(), k.shallow_clone(), v.shallow_clone()],
                |t| peft_torch::attention([&t[0], &t[1], &t[2]], 0.3, causal, mask.as_ref(), 0.0),
                plain,
            );
        }
    }
}

#[test]
fn numbers_of_a_seed_leave_no_trace() {
    let draw = || random(&[5], Kind::Float);
    tch::manual_seed(3);
    let (first, second) = (draw(), draw());
    tch::manual_seed(3);
    let same = draw();
    let of_seed = rng::with_seed(3, draw).expect("a state to put back");
    assert!(first.equal(&same) && first.equal(&of_seed));
    assert!(second.equal(&draw()));
}

#[test]
fn a_mask_may_differ_from_head_to_head_and_be_trained() {
    // Short and long, so that each way of computing it is taken.
    for (b, n, heads, rows) in [(2, 7, 3, 1), (2, 67, 3, 1), (3, 66, 2, 3)] {
        let [q, k, v] = [0; 3].map(|_| random(&[b, n, heads, 5], Kind::Float));
        let hidden = Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).triu(1);
        let bias = random(&[rows, heads, n, n], Kind::Float);
        let masked = |bias: &Tensor| bias.masked_fill(&hidden, f64::NEG_INFINITY);
        let plain = |t: &[Tensor]| {
            let [q, k, v] = [0, 1, 2].map(|i: usize| t[i].transpose(1, 2));
            let bias = t.get(3).unwrap_or(&bias);
            let z = q.matmul(&k.transpose(2, 3)) * 0.7 + masked(bias);
            z.softmax(-1, Kind::Float).matmul(&v).transpose(1, 2)
        };
        same(
            "attention with a bias",
            &[q.copy(), k.copy(), v.copy()],
            |t| peft_torch::attention([&t[0], &t[1], &t[2]], 0.7, false, Some(&masked(&bias)), 0.0),
            plain,
        );
        same(
            "attention with a trained bias",
            &[q, k, v, bias.copy()],
            |t| peft_torch::attention([&t[0], &t[1], &t[2]], 0.7, false, Some(&masked(&t[3])), 0.0),
            plain,
        );
    }
}

#[test]
fn a_sum_in_place_has_both_gradients() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let leaf = |kind| random(&[3, 5], kind).set_requires_grad(true);
        let (x, delta, g) = (leaf(kind), leaf(Kind::Float), random(&[3, 5], kind));
        let y = &x * 2.0;
        let at = y.data_ptr();
        let sum = add_(y, &delta);
        assert!(sum.data_ptr() == at && sum.kind() == kind);
        let exact = (x.detach() * 2.0).to_kind(Kind::Float) + delta.detach();
        assert!(sum.equal(&exact.to_kind(kind)));
        let grads = vjp(&[&sum], &[&g], &[&x, &delta]).expect("a backward pass");
        assert!(grads[0].as_ref().expect("a gradient").equal(&(&g * 2.0)));
        assert!(
            grads[1]
                .as_ref()
                .expect("a gradient")
                .equal(&g.to_kind(Kind::Float))
        );
    }
}
