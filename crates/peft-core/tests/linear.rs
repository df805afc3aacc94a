//! The last layer of a block that is computed again: its product is left out where nobody reads it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use peft_core::{
    Beneath, Ctx, Dense, Linear, LinearAdapter, LinearOp, Params, Plain, Result, Visit,
};
use tch::{Device, Kind, Tensor};

const AGAIN: Ctx<'static> = Ctx {
    again: true,
    ..Ctx::TRAIN
};

/// A dense layer that counts its products.
#[derive(Debug)]
struct Counted {
    dense: Dense,
    products: Arc<AtomicUsize>,
}

impl LinearOp for Counted {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.products.fetch_add(1, Ordering::SeqCst);
        self.dense.forward(x)
    }
    fn unread(&self, x: &Tensor) -> Tensor {
        self.dense.unread(x)
    }
    fn weight(&self) -> Tensor {
        self.dense.weight()
    }
    fn bias(&self) -> Option<&Tensor> {
        self.dense.bias()
    }
    fn shape(&self) -> (i64, i64) {
        self.dense.shape()
    }
    fn device(&self) -> Device {
        self.dense.device()
    }
    fn encode(&self, plain: Plain) -> Result<Box<dyn LinearOp>> {
        self.dense.encode(plain)
    }
}

/// y + v, or y · v, whose gradient needs y.
#[derive(Debug)]
struct Vector {
    v: Tensor,
    factor: bool,
}

impl LinearAdapter for Vector {
    fn forward(&self, x: &Tensor, beneath: Beneath<'_>, _: Ctx) -> Tensor {
        let y = beneath.forward(x);
        if self.factor {
            y * &self.v
        } else {
            y + &self.v
        }
    }
    fn reads_beneath(&self) -> bool {
        self.factor
    }
    fn merge(&self, _: Plain, _: &dyn LinearOp) -> Option<Plain> {
        None
    }
}

impl Params for Vector {
    fn params(&self, visit: Visit<'_>) {
        visit("v", &self.v);
    }
}

#[test]
fn the_product_is_left_out_where_no_gradient_needs_it() {
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, Device::Cpu));
    for (factors, left_out) in [
        (&[][..], true),
        (&[false], true),
        (&[false, false], true),
        (&[true], false),
        (&[false, true], false),
        (&[true, false], false),
    ] {
        let products = Arc::new(AtomicUsize::new(0));
        let mut layer = Linear::new(Counted {
            dense: Dense::new(random(&[5, 3]), Some(random(&[5]))),
            products: products.clone(),
        });
        let vectors: Vec<Tensor> = factors
            .iter()
            .map(|_| random(&[5]).set_requires_grad(true))
            .collect();
        for (v, &factor) in vectors.iter().zip(factors) {
            let v = v.shallow_clone();
            layer.attach("a", Box::new(Vector { v, factor }));
        }
        let x = random(&[2, 4, 3]).set_requires_grad(true);
        let g = random(&[2, 4, 5]);
        let grads = |ctx: Ctx| {
            let before = products.load(Ordering::SeqCst);
            let y = layer.forward_last(&x, ctx);
            assert_eq!(y.size(), [2, 4, 5]);
            let inputs: Vec<&Tensor> = std::iter::once(&x).chain(&vectors).collect();
            let grads = peft_torch::vjp(&[&y], &[&g], &inputs).unwrap();
            (grads, products.load(Ordering::SeqCst) - before)
        };
        let (once, made) = grads(Ctx::TRAIN);
        assert_eq!(made, 1);
        let (again, made) = grads(AGAIN);
        assert_eq!(made, usize::from(!left_out), "{factors:?}");
        for (a, b) in once.into_iter().zip(again) {
            assert!(a.unwrap().equal(&b.unwrap()), "{factors:?}");
        }
    }
}

#[test]
fn other_layers_are_computed_whole() {
    let products = Arc::new(AtomicUsize::new(0));
    let weight = Tensor::randn([5, 3], (Kind::Float, Device::Cpu));
    let layer = Linear::new(Counted {
        dense: Dense::new(weight.shallow_clone(), None),
        products: products.clone(),
    });
    let x = Tensor::randn([2, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let y = layer.forward(&x, AGAIN);
    assert!(y.equal(&x.linear(&weight, None::<Tensor>)));
    assert_eq!(products.load(Ordering::SeqCst), 1);
}
