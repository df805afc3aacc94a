//! A part that is computed twice gives what it gives when it is kept.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use peft_torch::{Pass, checkpoint, memory, rng, vjp};
use tch::{Device, Kind, TchError, Tensor};

fn leaf(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true)
}

/// dropout(tanh(x W)) + x; x: `[rows, n]`, w: `[n, n]`.
fn block(x: &Tensor, w: &Tensor) -> Tensor {
    x.matmul(w).tanh().dropout(0.4, true) + x
}

fn kept(x: &Tensor, w: &Tensor) -> Tensor {
    let inside = w.shallow_clone();
    checkpoint(&[x], &[w], move |x, _| Ok(block(&x[0], &inside))).unwrap()
}

fn equal(a: &Tensor, b: &Tensor) -> bool {
    a.defined() == b.defined() && (!a.defined() || a.equal(b))
}

#[test]
fn gradients_have_the_same_bits_and_the_generator_goes_on() {
    let weights: Vec<Tensor> = (0..5).map(|_| leaf(&[7, 7])).collect();
    let x = Tensor::randn([3, 7], (Kind::Float, Device::Cpu));
    let run = |step: &dyn Fn(&Tensor, &Tensor) -> Tensor, wants: bool| {
        tch::manual_seed(3);
        let x = x.copy().set_requires_grad(wants);
        let mut all = Vec::new();
        for _ in 0..2 {
            let y = weights.iter().fold(x.shallow_clone(), |x, w| step(&x, w));
            y.square().sum(Kind::Float).backward();
            all.push(y.detach());
        }
        all.push(x.grad());
        for w in &weights {
            all.push(w.grad().copy());
            peft_torch::drop_grad(&mut w.shallow_clone());
        }
        all.push(rng::state(Device::Cpu).unwrap());
        all
    };
    for wants in [true, false] {
        let (plain, twice) = (run(&block, wants), run(&kept, wants));
        assert!(plain.iter().zip(&twice).all(|(a, b)| equal(a, b)));
        assert!(!plain[0].equal(&plain[1]), "there is dropout");
    }
}

#[test]
fn the_inside_is_dropped_at_once_and_computed_once_more() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = |x: &Tensor| {
        let runs = runs.clone();
        let run = move |x: &[Tensor], pass| {
            let before = runs.fetch_add(1, Ordering::SeqCst);
            assert_eq!(pass == Pass::Again, before == 1);
            Ok(x[0].exp())
        };
        checkpoint(&[x], &[], run).unwrap()
    };
    let x = leaf(&[2]);
    let y = counted(&x);
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    y.sum(Kind::Float).backward();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    let again = |x: &Tensor| {
        let before = runs.load(Ordering::SeqCst);
        let y = counted(x);
        assert_eq!(runs.load(Ordering::SeqCst), before + 1);
        y
    };
    assert!(
        !again(&x.detach()).requires_grad(),
        "nothing wants a gradient"
    );
    assert!(!tch::no_grad(|| again(&x)).requires_grad());
}

/// Of d parts of which each holds k tensors inside, 1 · d and k are held at most, not k · d.
#[test]
fn of_all_parts_but_one_the_inputs_alone_are_held() {
    const SIZE: i64 = 1 << 16; // bytes of a tensor
    let inside = |x: &Tensor| (0..16).fold(x.shallow_clone(), |x, _| x.sigmoid()); // each keeps its output
    let peak = |twice: bool, deep: usize| {
        let x = leaf(&[SIZE / 4]);
        let step = || {
            let y = (0..deep).fold(x.shallow_clone(), |x, _| match twice {
                true => checkpoint(&[&x], &[], move |x, _| Ok(inside(&x[0]))).unwrap(),
                false => inside(&x),
            });
            y.sum(Kind::Float).backward();
        };
        let ((), usage) = memory::counted(step).unwrap();
        usage.peak as i64 / SIZE
    };
    for deep in [8, 32] {
        let (plain, twice) = (peak(false, deep), peak(true, deep));
        let deep = deep as i64;
        assert!(plain >= 16 * deep, "{plain} without, of {deep}");
        assert!(twice <= deep + 16 + 6, "{twice} with, of {deep}");
    }
}

#[test]
fn depth_takes_no_stack() {
    let small = std::thread::Builder::new().stack_size(1 << 20);
    let deep = small.spawn(|| {
        let w = leaf(&[3, 3]);
        let x = leaf(&[2, 3]);
        let scaled = |x: &[Tensor], w: &Tensor| Ok(x[0].matmul(w).tanh() + &x[0]);
        let y = (0..2000).fold(x.shallow_clone(), |x, _| {
            let inside = w.shallow_clone();
            checkpoint(&[&x], &[&w], move |x, _| scaled(x, &inside)).unwrap()
        });
        y.sum(Kind::Float).backward();
        assert!(w.grad().defined() && x.grad().defined());
    });
    deep.unwrap().join().expect("no overflow");
}

#[test]
fn parts_may_lie_in_parts() {
    let (x, w) = (leaf(&[3, 5]), leaf(&[5, 5]));
    let nested = |x: &Tensor, w: &Tensor| {
        let inside = w.shallow_clone();
        let run = move |x: &[Tensor], _| Ok(kept(&kept(&x[0], &inside), &inside));
        checkpoint(&[x], &[w], run).unwrap()
    };
    let grads = |run: &dyn Fn() -> Tensor| {
        tch::manual_seed(5);
        let y = run().square().sum(Kind::Float);
        vjp(&[&y], &[&Tensor::from(1f32)], &[&x, &w]).unwrap()
    };
    let plain = grads(&|| block(&block(&x, &w), &w));
    let twice = grads(&|| nested(&x, &w));
    for (a, b) in plain.into_iter().zip(twice) {
        assert!(equal(&a.unwrap(), &b.unwrap()));
    }
}

#[test]
fn a_parameter_named_twice_counts_once() {
    let w = leaf(&[3]);
    let inside = w.shallow_clone();
    let run = move |_: &[Tensor], _| Ok(inside.square());
    let y = checkpoint(&[], &[&w, &w.shallow_clone()], run).unwrap();
    y.sum(Kind::Float).backward();
    assert!(equal(&w.grad(), &(w.detach() * 2.0)));
}

#[test]
fn what_is_not_used_has_no_gradient() {
    let (x, w, unused) = (leaf(&[3]), leaf(&[3]), leaf(&[3]));
    let inside = w.shallow_clone();
    let run = move |x: &[Tensor], _| Ok(&x[0] * &inside);
    let y = checkpoint(&[&x], &[&w, &unused], run).unwrap();
    y.sum(Kind::Float).backward();
    assert!(w.grad().defined() && !unused.grad().defined());
    // And where nothing at all is.
    let run = |x: &[Tensor], _| Ok(x[0].detach() * 2.0);
    let y = checkpoint(&[&x], &[], run).unwrap();
    (y.sum(Kind::Float) + unused.sum(Kind::Float)).backward();
    assert!(equal(&x.grad(), &w.detach()), "as it was");
}

#[test]
fn an_error_or_a_panic_of_the_second_run_is_an_error_of_the_call() {
    for panics in [false, true] {
        let x = leaf(&[2]);
        let runs = AtomicUsize::new(0);
        let run = move |x: &[Tensor], _| match (runs.fetch_add(1, Ordering::SeqCst), panics) {
            (0, _) => Ok(&x[0] * 2.0),
            (_, true) => panic!("changed its mind"),
            (_, false) => Err(TchError::Torch("changed its mind".into())),
        };
        let y = checkpoint(&[&x], &[], run).unwrap();
        let error = y.sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("changed its mind"), "{error}");
        assert!((&x * 1.0).requires_grad(), "gradients are still on");
    }
}

#[test]
fn it_runs_on_another_thread() {
    let (x, w) = (leaf(&[3, 4]), leaf(&[4, 4]));
    let loss = kept(&x, &w).sum(Kind::Float);
    let thread = std::thread::spawn(move || loss.backward());
    thread.join().expect("no panic");
    assert!(x.grad().defined() && w.grad().defined());
}

#[test]
fn bytes_are_counted() {
    let body = || {
        drop(Tensor::zeros([1000], (Kind::Float, Device::Cpu)));
        Tensor::zeros([100], (Kind::Float, Device::Cpu))
    };
    let (held, usage) = memory::counted(body).unwrap();
    assert_eq!((usage.now, usage.peak), (400, 4000));
    drop(held);
    let ((), none) = memory::counted(|| ()).unwrap();
    assert_eq!(none.peak, 0);
}
