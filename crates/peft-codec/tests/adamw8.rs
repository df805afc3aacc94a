//! AdamW in 8 bits: every set of instructions alike, and within what its codes allow of AdamW in f64.

use half::{bf16, f16};
use peft_codec::*;
use proptest::prelude::*;

const ADAMW: AdamW8 = AdamW8 {
    lr: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
};

#[derive(Clone)]
struct States {
    codes: [Vec<u8>; 2],
    absmax: [Vec<f32>; 2],
}

impl States {
    fn new(n: usize) -> States {
        let (codes, absmax) = (vec![0; n], vec![0.0; n.div_ceil(STATE_BLOCK)]);
        States {
            codes: [codes.clone(), codes],
            absmax: [absmax.clone(), absmax],
        }
    }

    fn step<P: Element, G: Element>(
        &mut self,
        (level, with, t): (Level, AdamW8, u64),
        params: &mut [P],
        grads: &[G],
        compat: Compat,
        scale: f32,
    ) {
        let ([c1, c2], [a1, a2]) = (&mut self.codes, &mut self.absmax);
        with.step_at(level, t, params, grads, c1, c2, a1, a2, compat, scale)
            .unwrap();
    }

    /// The states as numbers.
    fn values(&self, which: usize) -> Vec<f64> {
        let map = [Map::signed(), Map::unsigned()][which].values();
        let codes = self.codes[which].iter().enumerate();
        let value = |(i, code): (usize, &u8)| {
            f64::from(map[usize::from(*code)] * self.absmax[which][i / STATE_BLOCK])
        };
        codes.map(value).collect()
    }

    fn bits(&self) -> (Vec<Vec<u8>>, Vec<u32>) {
        let absmax = self.absmax.iter().flatten().map(|it| it.to_bits());
        (self.codes.to_vec(), absmax.collect())
    }
}

fn bits<T: Element>(values: &[T]) -> Vec<u32> {
    values.iter().map(|it| it.wide().to_bits()).collect()
}

/// Several steps at every level, all on the same gradients.
fn agree<P: Element, G: Element>(params: &[P], grads: &[Vec<G>], with: AdamW8, scale: f32) {
    for compat in [Compat::Cuda, Compat::Cpu] {
        let run = |level| {
            let (mut params, mut states) = (params.to_vec(), States::new(params.len()));
            let mut all = Vec::new();
            for (t, grads) in grads.iter().enumerate() {
                states.step(
                    (level, with, t as u64 + 1),
                    &mut params,
                    grads,
                    compat,
                    scale,
                );
                all.push((bits(&params), states.bits()));
            }
            all
        };
        let scalar = run(Level::Scalar);
        for level in Level::all() {
            assert!(run(level) == scalar, "{level:?} {compat:?}");
        }
    }
}

fn gradient() -> impl Strategy<Value = f32> {
    prop_oneof![
        30 => -1.0f32..1.0,
        10 => -1e-4f32..1e-4,
        3 => -1e-9f32..1e-9,
        3 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => any::<f32>(), // NaN and infinities among it
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn all_levels_agree(
        params in prop::collection::vec(-1.0f32..1.0, 1..900),
        steps in prop::collection::vec(prop::collection::vec(gradient(), 900), 1..5),
        weight_decay in prop::sample::select(vec![0.0f32, 0.1]),
        scale in prop::sample::select(vec![1.0f32, 0.25, 1e-3]),
    ) {
        let with = AdamW8 { weight_decay, ..ADAMW };
        let steps: Vec<Vec<f32>> = steps.iter().map(|it| it[..params.len()].to_vec()).collect();
        agree(&params, &steps, with, scale);
        let brain: Vec<_> = params.iter().map(|it| bf16::from_f32(*it)).collect();
        agree(&brain, &steps, with, scale);
        let short: Vec<Vec<_>> = steps.iter().map(|it| it.iter().map(|g| bf16::from_f32(*g)).collect()).collect();
        agree(&brain, &short, with, scale);
        let half: Vec<_> = params.iter().map(|it| f16::from_f32(*it)).collect();
        agree(&half, &steps, with, scale);
    }
}

#[test]
fn zero_states_stay_zero() {
    for level in Level::all() {
        for compat in [Compat::Cuda, Compat::Cpu] {
            let with = AdamW8 {
                weight_decay: 0.0,
                ..ADAMW
            };
            let (mut params, mut states) = (vec![0.5f32; 600], States::new(600));
            for t in 1..5 {
                states.step((level, with, t), &mut params, &[0f32; 600], compat, 1.0);
            }
            assert_eq!(params, [0.5; 600]);
            for which in [0, 1] {
                assert_eq!(states.absmax[which], [0.0; 3]);
                assert!(states.values(which).iter().all(|it| *it == 0.0));
            }
        }
    }
}

#[test]
fn a_gradient_that_is_none_is_skipped_as_on_cuda() {
    for level in Level::all() {
        let (mut params, mut states) = (vec![0.5f32; 256], States::new(256));
        let mut grads = [0.1f32; 256];
        states.step((level, ADAMW, 1), &mut params, &grads, Compat::Cuda, 1.0);
        let before = params.clone();
        (grads[3], grads[200]) = (f32::NAN, f32::NEG_INFINITY);
        states.step((level, ADAMW, 2), &mut params, &grads, Compat::Cuda, 1.0);
        for i in 0..256 {
            let skipped = i == 3 || i == 200;
            assert_eq!(params[i] == before[i], skipped, "{level:?} {i}");
            assert_eq!(states.values(0)[i] == 0.0, skipped);
            assert_eq!(states.values(1)[i] == 0.0, skipped);
        }
    }
}

#[test]
fn pieces_and_all_cores_do_the_same() {
    let n = 100_003;
    let grads: Vec<f32> = (0..n).map(|i| (i as f32 * 0.77).sin() * 0.3).collect();
    let begin: Vec<f32> = (0..n).map(|i| (i as f32 * 0.13).cos()).collect();
    let (mut whole, mut states) = (begin.clone(), States::new(n));
    let (mut cores, mut others) = (begin.clone(), States::new(n));
    let (mut cut, mut third) = (begin, States::new(n));
    for t in 1..4 {
        states.step(
            (Level::best(), ADAMW, t),
            &mut whole,
            &grads,
            Compat::Cuda,
            1.0,
        );
        let ([c1, c2], [a1, a2]) = (&mut others.codes, &mut others.absmax);
        ADAMW
            .step_all(t, &mut cores, &grads, c1, c2, a1, a2, Compat::Cuda, 1.0)
            .unwrap();
        for (from, to) in [(0, 512), (512, 51_200), (51_200, n)] {
            let ([c1, c2], [a1, a2]) = (&mut third.codes, &mut third.absmax);
            let blocks = from / 256..to.div_ceil(256);
            let (c1, c2) = (&mut c1[from..to], &mut c2[from..to]);
            let (a1, a2) = (&mut a1[blocks.clone()], &mut a2[blocks]);
            let (params, grads) = (&mut cut[from..to], &grads[from..to]);
            ADAMW
                .step(t, params, grads, c1, c2, a1, a2, Compat::Cuda, 1.0)
                .unwrap();
        }
    }
    assert!(bits(&whole) == bits(&cores) && bits(&whole) == bits(&cut));
    assert!(states.bits() == others.bits() && states.bits() == third.bits());
}

/// The width of the wider of the two gaps beside each value, that is twice what rounding to it may change; with a sign that
/// is put right, all of it.
fn gaps(map: &Map) -> Vec<f64> {
    let values = map.values();
    let gap = |i: usize| {
        let below = if i > 0 {
            values[i] - values[i - 1]
        } else {
            0.0
        };
        let above = if i < 255 {
            values[i + 1] - values[i]
        } else {
            0.0
        };
        f64::from(below.max(above))
    };
    (0..256).map(gap).collect()
}

/// Each of a thousand steps from where the last one ended, and all of them beside AdamW in f64. How far the states are off is bounded step by step by the gaps of their codes:
/// E ← β E + gap · absmax. With it the difference of the updates |m'/(√v' + ε) − m/(√v + ε)| is at most E₁ / (√v' + ε) +
/// |m| |√v' − √v| / ((√v' + ε)(√v + ε)), and |√v' − √v| ≤ E₂ / (√v' + √v); the parameters are off by no more than the sum
/// of these, and rounding.
#[test]
fn a_thousand_steps_are_as_far_from_f64_as_the_codes_allow() {
    let n = 512;
    for compat in [Compat::Cuda, Compat::Cpu] {
        let with = ADAMW;
        let [lr, b1, b2, eps, decay] =
            [with.lr, with.beta1, with.beta2, with.eps, with.weight_decay].map(f64::from);
        let begin: Vec<f32> = (0..n)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0)
            .collect();
        let (mut params, mut states) = (begin.clone(), States::new(n));
        let mut exact: Vec<f64> = begin.iter().map(|it| f64::from(*it)).collect();
        let (mut m, mut v) = (vec![0f64; n], vec![0f64; n]);
        let (mut off1, mut off2, mut off) = (vec![0f64; n], vec![0f64; n], vec![0f64; n]);
        let gaps = [gaps(Map::signed()), gaps(Map::unsigned())];
        let (mut farthest, mut widest, mut moved) = (0f64, 0f64, 0f64);
        for t in 1..=1000u64 {
            // A slope towards zero and noise, the same for both.
            let noise =
                |i: usize| (((i as u64 * 7919 + t * 104_729) % 2003) as f32 / 1001.5 - 1.0) * 0.2;
            let grads: Vec<f32> = (0..n).map(|i| begin[i] * 0.3 + noise(i)).collect();
            let before = [states.values(0), states.values(1)];
            let last = params.clone();
            states.step((Level::best(), with, t), &mut params, &grads, compat, 1.0);
            let (c1, c2) = (1.0 - b1.powf(t as f64), (1.0 - b2.powf(t as f64)).sqrt());
            for i in 0..n {
                let g = f64::from(grads[i]);
                // The states that the step used, before they were encoded.
                let (m8, v8) = (
                    b1 * before[0][i] + (1.0 - b1) * g,
                    b2 * before[1][i] + (1.0 - b2) * g * g,
                );
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let rounding = 4e-7; // a few roundings of fp32, relative
                off1[i] = b1 * off1[i] + rounding * m8.abs();
                off2[i] = b2 * off2[i] + rounding * v8;
                assert!((m8 - m[i]).abs() <= off1[i] * 1.0001, "step {t}, mean {i}");
                assert!(
                    (v8 - v[i]).abs() <= off2[i] * 1.0001,
                    "step {t}, square {i}"
                );
                // One step from the states as they are: of each factor of the update at most 24 roundings (constants of f32 for
                // those of f64 among them), of the parameter three.
                let u = 2f64.powi(-24);
                let root8 = v8.sqrt() + eps * c2;
                let size = lr * c2 / c1 / root8;
                let last = f64::from(last[i]);
                let alone = match compat {
                    Compat::Cuda => (last - size * m8) * (1.0 - lr * decay),
                    Compat::Cpu => last * (1.0 - lr * decay) - size * m8,
                };
                let terms = b1 * before[0][i].abs() + (1.0 - b1) * g.abs();
                let bound = 24.0 * u * size * terms + 3.0 * u * (last.abs() + size * terms);
                assert!(
                    (f64::from(params[i]) - alone).abs() <= bound,
                    "step {t}, parameter {i}"
                );
                let (root8, root) = (v8.sqrt() + eps * c2, v[i].sqrt() + eps * c2);
                let change =
                    off1[i] / root8 + m[i].abs() * off2[i] / (root8 + root) / (root8 * root);
                let update = lr * c2 / c1 * m[i] / root;
                exact[i] = exact[i] * (1.0 - lr * decay) - update;
                off[i] = off[i] * (1.0 - lr * decay)
                    + lr * c2 / c1 * change
                    + 2e-7 * (exact[i].abs() + update.abs())
                    + lr * decay * update.abs(); // decay before or after
                let difference = (f64::from(params[i]) - exact[i]).abs();
                assert!(
                    difference <= off[i],
                    "{compat:?}, step {t}, parameter {i}: {difference:e} > {:e}",
                    off[i]
                );
                farthest = farthest.max(difference);
                widest = widest.max(off[i]);
                for (which, exact, off) in [(0, m8, &mut off1[i]), (1, v8, &mut off2[i])] {
                    let code = usize::from(states.codes[which][i]);
                    // Half a gap is what rounding changes, and bins of 2/65535 their half; the sign's repair another half gap.
                    let bins = if compat == Compat::Cpu { 2e-5 } else { 0.0 };
                    let absmax = f64::from(states.absmax[which][i / STATE_BLOCK]);
                    let half = (gaps[which][code] / 2.0 + bins) * absmax;
                    let map = [Map::signed(), Map::unsigned()][which].values();
                    let difference = (f64::from(map[code]) * absmax - exact).abs();
                    let repaired = compat == Compat::Cuda && which == 0 && code == 126;
                    let most = if repaired { 2.0 * half } else { half };
                    assert!(
                        difference <= most + 1e-6 * absmax,
                        "step {t}, state {which} of {i}"
                    );
                    *off += difference;
                }
                moved = moved.max((exact[i] - f64::from(begin[i])).abs());
            }
        }
        eprintln!("{compat:?}: moved {moved:.3}, farthest {farthest:.2e}, bound {widest:.2e}");
    }
}

#[test]
fn slices_that_do_not_fit_are_refused() {
    let mut p = [0f32; 300];
    let mut try_with = |g: usize, c1: usize, c2: usize, a1: usize, a2: usize, t| {
        let (mut c1, mut c2) = (vec![0; c1], vec![0; c2]);
        let (mut a1, mut a2) = (vec![0.0; a1], vec![0.0; a2]);
        let (c1, c2, a1, a2) = (&mut c1, &mut c2, &mut a1, &mut a2);
        let g = &vec![0f32; g];
        let one = ADAMW.step(t, &mut p, g, c1, c2, a1, a2, Compat::Cuda, 1.0);
        let all = ADAMW.step_all(t, &mut p, g, c1, c2, a1, a2, Compat::Cuda, 1.0);
        assert_eq!(one.is_ok(), all.is_ok());
        one.is_ok()
    };
    assert!(try_with(300, 300, 300, 2, 2, 1));
    assert!(!try_with(300, 300, 300, 2, 2, 0));
    assert!(!try_with(299, 300, 300, 2, 2, 1));
    assert!(!try_with(300, 301, 300, 2, 2, 1));
    assert!(!try_with(300, 300, 256, 2, 2, 1));
    assert!(!try_with(300, 300, 300, 1, 2, 1));
    assert!(!try_with(300, 300, 300, 2, 3, 1));
}
