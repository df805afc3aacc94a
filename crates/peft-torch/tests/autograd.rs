//! Functions written in Rust behave as libtorch's own.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use peft_torch::{Function, apply, backward, vjp};
use tch::{Device, Kind, TchError, Tensor};

type Grads = Result<Vec<Option<Tensor>>, TchError>;

/// z = x · y, counts its drops.
struct Product {
    x: Tensor,
    y: Tensor,
    dropped: Arc<AtomicUsize>,
}

impl Function for Product {
    fn backward(&self, grads: &[Option<Tensor>], needs: &[bool]) -> Grads {
        let g = grads[0].as_ref().expect("one output");
        Ok(vec![
            needs[0].then(|| g * &self.y),
            needs[1].then(|| g * &self.x),
        ])
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

fn product(x: &Tensor, y: &Tensor, dropped: &Arc<AtomicUsize>) -> Tensor {
    let [z] = apply(&[x, y], || {
        let saved = Product {
            x: x.detach(),
            y: y.detach(),
            dropped: dropped.clone(),
        };
        ([x * y], saved)
    });
    z
}

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn leaf(shape: &[i64]) -> Tensor {
    random(shape).set_requires_grad(true)
}

fn drops() -> Arc<AtomicUsize> {
    Arc::new(AtomicUsize::new(0))
}

#[test]
fn gradients_are_libtorchs() {
    let (x, y) = (leaf(&[3, 5]), leaf(&[3, 5]));
    let loss = |z: &Tensor| z.tanh().square().sum(Kind::Float);
    let ours = vjp(
        &[&loss(&product(&x, &y, &drops()))],
        &[&Tensor::from(1f32)],
        &[&x, &y],
    );
    let theirs = vjp(&[&loss(&(&x * &y))], &[&Tensor::from(1f32)], &[&x, &y]);
    for (a, b) in ours.unwrap().into_iter().zip(theirs.unwrap()) {
        assert!(a.unwrap().allclose(&b.unwrap(), 1e-6, 1e-6, false));
    }
}

#[test]
fn nothing_is_kept_without_gradients_or_after_backward() {
    let dropped = drops();
    let (x, y) = (random(&[4]), random(&[4]));
    assert!(!product(&x, &y, &dropped).requires_grad());
    assert_eq!(
        dropped.load(Ordering::SeqCst),
        1,
        "no input wants a gradient"
    );

    let x = leaf(&[4]);
    drop(tch::no_grad(|| product(&x, &y, &dropped)));
    assert_eq!(dropped.load(Ordering::SeqCst), 2, "gradients are off");

    let z = product(&x, &y, &dropped);
    assert_eq!(dropped.load(Ordering::SeqCst), 2, "held by the graph");
    z.sum(Kind::Float).backward();
    drop(z);
    assert_eq!(
        dropped.load(Ordering::SeqCst),
        3,
        "the graph is gone, also where a function saw its output"
    );
}

#[test]
fn inputs_without_gradient_are_told() {
    struct Asks(Arc<AtomicUsize>);
    impl Function for Asks {
        fn backward(&self, grads: &[Option<Tensor>], needs: &[bool]) -> Grads {
            assert_eq!(needs, [true, false]);
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(vec![grads[0].as_ref().map(Tensor::shallow_clone), None])
        }
    }
    let (x, y, asked) = (leaf(&[2]), random(&[2]), drops());
    let [z] = apply(&[&x, &y], || ([&x + &y], Asks(asked.clone())));
    z.sum(Kind::Float).backward();
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(x.grad().sum(Kind::Float).double_value(&[]), 2.0);
}

#[test]
fn a_panic_or_an_error_in_backward_is_an_error_of_the_call() {
    struct Fails(bool);
    impl Function for Fails {
        fn backward(&self, _: &[Option<Tensor>], _: &[bool]) -> Grads {
            if self.0 {
                panic!("the sky fell");
            }
            Err(TchError::Torch("out of ideas".into()))
        }
    }
    let x = leaf(&[2]);
    for (panics, words) in [(true, "the sky fell"), (false, "out of ideas")] {
        let [z] = apply(&[&x], || ([&x * 2.0], Fails(panics)));
        let error = z.sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("Fails"), "{error}");
    }
    let y = (&x * 3.0).sum(Kind::Float);
    y.f_backward().expect("the next pass is not disturbed");
    assert!((&x * 1.0).requires_grad(), "gradients are still on");
}

#[test]
fn a_wrong_number_of_gradients_is_an_error() {
    struct Short;
    impl Function for Short {
        fn backward(&self, _: &[Option<Tensor>], _: &[bool]) -> Grads {
            Ok(vec![])
        }
    }
    let x = leaf(&[2]);
    let [z] = apply(&[&x], || ([&x * 2.0], Short));
    let error = z.sum(Kind::Float).f_backward().unwrap_err().to_string();
    assert!(error.contains("0 gradients for 1 inputs"), "{error}");
}

#[test]
fn functions_work_inside_each_other() {
    /// Recomputes x³ with libtorch inside its own backward, as activation checkpointing does.
    struct Cube(Tensor);
    impl Function for Cube {
        fn backward(&self, grads: &[Option<Tensor>], _: &[bool]) -> Grads {
            let x = self.0.detach().set_requires_grad(true);
            let y = tch::with_grad(|| product(&(&x * &x), &x, &drops()));
            vjp(&[&y], &[grads[0].as_ref().expect("one output")], &[&x])
        }
    }
    let x = leaf(&[3]);
    let [y] = apply(&[&x], || ([x.pow_tensor_scalar(3)], Cube(x.detach())));
    let [z] = apply(&[&y], || ([y.pow_tensor_scalar(3)], Cube(y.detach())));
    z.sum(Kind::Float).backward();
    let expected = x.detach().pow_tensor_scalar(8) * 9.0; // d x⁹
    assert!(x.grad().allclose(&expected, 1e-4, 1e-5, false));
}

#[test]
fn a_second_derivative_is_refused_and_says_so() {
    let (x, y) = (leaf(&[3]), leaf(&[3]));
    let z = product(&x, &y, &drops()).sum(Kind::Float);
    let once = Tensor::f_run_backward(&[&z], &[&x], true, true).expect("the first is fine");
    let twice = once[0]
        .sum(Kind::Float)
        .f_backward()
        .unwrap_err()
        .to_string();
    assert!(twice.contains("no second derivative"), "{twice}");
}

#[test]
fn outputs_that_nobody_uses_have_no_gradient() {
    struct Two;
    impl Function for Two {
        fn backward(&self, grads: &[Option<Tensor>], _: &[bool]) -> Grads {
            assert!(grads[0].is_none());
            Ok(vec![grads[1].as_ref().map(|g| g * 5.0)])
        }
    }
    let x = leaf(&[2]);
    let [_, b] = apply(&[&x], || ([&x * 1.0, &x * 5.0], Two));
    b.sum(Kind::Float).backward();
    assert_eq!(x.grad().double_value(&[0]), 5.0);
}

#[test]
fn outputs_may_be_changed_in_place() {
    let (x, y) = (leaf(&[3]), leaf(&[3]));
    let mut z = product(&x, &y, &drops());
    let _ = z.g_add_(&x);
    z.sum(Kind::Float).backward();
    assert!(x.grad().allclose(&(y.detach() + 1.0), 1e-6, 1e-6, false));
}

#[test]
fn backward_runs_on_another_thread() {
    let x = leaf(&[3]);
    let z = product(&x, &random(&[3]), &drops()).sum(Kind::Float);
    std::thread::spawn(move || z.backward())
        .join()
        .expect("no panic");
    assert!(x.grad().defined());
}

#[test]
fn backward_takes_several_outputs_with_their_gradients() {
    let x = leaf(&[2]);
    let (a, b) = (&x * 2.0, &x * 3.0);
    backward(
        &[&a, &b],
        &[
            &Tensor::from_slice(&[1f32, 0.]),
            &Tensor::from_slice(&[0f32, 1.]),
        ],
    )
    .unwrap();
    assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [2.0, 3.0]);
}
