//! LoRA that begins with what quantisation took away.
//!
//! ```text
//! W ≈ Q + s·B·A        s = α / r, for any α
//!
//! LoftQ (2310.08659)   repeat:  Q = 4 bits of R     B·A = the r largest directions of (W − Q) / s     R = W − s·B·A
//! QPiSSA (2404.02948)  B·A = the r largest directions of W / s         Q = 4 bits of W − s·B·A
//! ```
//!
//! The method knows factors and the base format knows bits; here they meet. Python's LoftQ leaves s out, and is right for α = r
//! alone. The adapter means nothing but on that base: with one round of LoftQ it is the one that would have been there anyway; with
//! more, and with QPiSSA, it is another.

use std::collections::BTreeMap;

use peft_core::{Error, LinearOp, Model, ModelExt, Plain, Result, Slot};
use peft_lora::LoraConfig;
use tch::{Kind, Tensor};

/// What the factors begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// What quantisation took away, in so many rounds; at least one.
    Loftq {
        /// Of quantising and decomposing.
        rounds: usize,
    },
    /// The largest directions of the weight; what is left is quantised.
    Pissa,
}

/// Lets the LoRA called `name`, which is attached and not trained yet, begin so; `dense` is the same model with the weights that
/// were quantised. Says whether the base is another one now.
///
/// Places whose base is dense are left as they are. Refused: a place that `dense` lacks, an adapter that is no plain LoRA.
pub fn begin_at_residual(
    model: &mut (impl Model + ?Sized),
    name: &str,
    lora: &LoraConfig,
    dense: &mut (impl Model + ?Sized),
    how: Residual,
) -> Result<bool> {
    let fault = |why: String| Error::Name {
        name: name.to_owned(),
        why,
    };
    model.known(name)?;
    let mut weights = BTreeMap::new();
    dense.slots(&mut |at, slot| {
        if let Slot::Linear(it) = slot {
            weights.insert(at.to_owned(), it.base().weight());
        }
    });
    let mut factors: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    for param in model.trainable(name) {
        let which = match param.name.as_str() {
            "lora_A.weight" => 0,
            "lora_B.weight" => 1,
            _ => continue,
        };
        factors.entry(param.at).or_default()[which] = Some(param.tensor);
    }
    let (mut result, mut places): (Result<()>, usize) = (Ok(()), 0);
    model.slots(&mut |at, slot| {
        let (Slot::Linear(it), Some([Some(a), Some(b)])) = (slot, factors.get(at)) else {
            return;
        };
        if it.base().is_dense() || result.is_err() {
            return;
        }
        result = (|| {
            let weight = weights
                .get(at)
                .ok_or_else(|| fault(format!("`{at}` is not in the dense model to begin with")))?;
            let (r, scale) = lora.rank_and_scale(at)?;
            let begin = Begin::of(it.base(), weight, r, how)?;
            if let Some(plain) = begin.base {
                it.encode(plain)?;
            }
            // s·B·A is the product: each factor takes its share.
            let share = scale.abs().sqrt();
            let (mut a, mut b) = (a.shallow_clone(), b.shallow_clone());
            tch::no_grad(|| {
                a.copy_(&(begin.a * (scale.signum() / share)));
                b.copy_(&(begin.b / share));
            });
            places += 1;
            Ok(())
        })();
    });
    result?;
    if places == 0 {
        return Err(fault(
            "there is no LoRA on a base in few bits to begin so".to_owned(),
        ));
    }
    Ok(how != Residual::Loftq { rounds: 1 })
}

/// Where one place begins.
struct Begin {
    /// `[r, in]`
    a: Tensor,
    /// `[out, r]`
    b: Tensor,
    /// What is to be encoded, if the base becomes another.
    base: Option<Plain>,
}

impl Begin {
    fn of(op: &dyn LinearOp, weight: &Tensor, r: i64, how: Residual) -> Result<Begin> {
        let bias = || op.bias().map(Tensor::shallow_clone);
        let kind = weight.kind();
        let wide = weight.to_kind(Kind::Float);
        let quantised = |rest: &Tensor| -> Result<Tensor> {
            let plain = Plain {
                weight: rest.to_kind(kind),
                bias: None,
            };
            Ok(op.encode(plain)?.weight().to_kind(Kind::Float))
        };
        let rounds = match how {
            Residual::Pissa => {
                let [b, a] = largest(&wide, r)?;
                let rest = (&wide - b.matmul(&a)).to_kind(kind);
                let base = Some(Plain {
                    weight: rest,
                    bias: bias(),
                });
                return Ok(Begin { a, b, base });
            }
            Residual::Loftq { rounds } => rounds.max(1),
        };
        let mut rest = wide.shallow_clone();
        let mut found = largest(&(&wide - quantised(&rest)?), r)?;
        for _ in 1..rounds {
            let [b, a] = &found;
            rest = &wide - b.matmul(a);
            found = largest(&(&wide - quantised(&rest)?), r)?;
        }
        let base = (rounds > 1).then(|| Plain {
            weight: rest.to_kind(kind),
            bias: bias(),
        });
        let [b, a] = found;
        Ok(Begin { a, b, base })
    }
}

/// The product of rank r nearest to a matrix, as B `[out, r]` and A `[r, in]` of like size.
///
/// ```text
/// M = U S Vᵀ        M Mᵀ = U S² Uᵀ        B = U √S        A = √S Vᵀ = (√S)⁻¹ Uᵀ M
/// ```
///
/// The eigenvectors of the smaller of M Mᵀ and Mᵀ M, in fp64, are found several times sooner than all of the decomposition; the
/// squares cost half of fp64's digits, which leaves those of fp32.
fn largest(matrix: &Tensor, r: i64) -> Result<[Tensor; 2]> {
    let (out, inp) = matrix.size2()?;
    if out > inp {
        let [a, b] = largest(&matrix.tr(), r)?;
        return Ok([b.tr(), a.tr()]);
    }
    let wide = matrix.to_kind(Kind::Double);
    let (squares, vectors) = Tensor::f_linalg_eigh(&wide.matmul(&wide.tr()), "L")?; // rising
    let all = r.min(out);
    let top = |t: Tensor, axis: i64| t.narrow(axis, out - all, all).flip([axis]);
    let (s, u) = (top(squares, 0).clamp_min(0.0).sqrt(), top(vectors, 1));
    // Directions below what fp64 tells from none: nothing is there.
    let there = s.gt_tensor(&(s.max() * 1e-7));
    let inverse = s.rsqrt().where_scalarother(&there, 0.0);
    let b = &u * (&s * &inverse);
    let a = u.tr().matmul(&wide) * inverse.unsqueeze(1);
    // A rank above that of any matrix of this shape: what is beyond is zero.
    let beyond = r - all;
    Ok([
        b.constant_pad_nd([0, beyond]).to_kind(matrix.kind()),
        a.constant_pad_nd([0, 0, 0, beyond]).to_kind(matrix.kind()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_codec::{Block, Compat, Type};
    use peft_core::tensors;
    use peft_quant::{Four, QuantisedLinear, Scheme};
    use peft_testing::{agree, fixtures::root};

    fn layer(weight: &Tensor) -> QuantisedLinear {
        let scheme = Scheme::Four(Four {
            kind: Type::Nf4,
            block: Block::USUAL,
            double_quant: false,
            compat: Compat::Cpu,
        });
        let plain = Plain {
            weight: weight.copy(),
            bias: None,
        };
        QuantisedLinear::new(&scheme, plain).unwrap()
    }

    #[test]
    fn loftq_is_pythons_where_pythons_is_exact() {
        let all = tensors::read(&root().join("quant/loftq.safetensors")).unwrap();
        for (case, r) in [("square", 4), ("wide", 7)] {
            let weight = &all[&format!("{case}.weight")];
            let op = layer(weight);
            for rounds in [1usize, 3] {
                let begin = Begin::of(&op, weight, r, Residual::Loftq { rounds }).unwrap();
                let key = format!("{case}.{rounds}");
                let product = begin.b.matmul(&begin.a);
                agree(&product, &all[&format!("{key}.product")], 1e-5, &key).unwrap();
                let quantised = match begin.base {
                    Some(plain) => op.encode(plain).unwrap().weight(),
                    None => op.weight(),
                };
                agree(&quantised, &all[&format!("{key}.quantised")], 1e-6, &key).unwrap();
            }
        }
    }

    #[test]
    fn the_largest_directions_are_those_of_the_whole_decomposition() {
        tch::manual_seed(5);
        let random = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, tch::Device::Cpu));
        let low = random([40, 3]).matmul(&random([3, 30]));
        for (matrix, r) in [
            (random([40, 30]), 4),
            (random([30, 40]), 7),
            (random([5, 60]), 9),
            (random([1, 1]), 2),
            (low, 8),
            (random([6, 6]) * 0.0, 2),
        ] {
            let [b, a] = largest(&matrix, r).unwrap();
            let (out, inp) = matrix.size2().unwrap();
            assert_eq!((b.size(), a.size()), (vec![out, r], vec![r, inp]));
            let (u, s, v) = matrix.to_kind(Kind::Double).svd(true, true);
            let all = r.min(s.size()[0]);
            let expected =
                (u.narrow(1, 0, all) * s.narrow(0, 0, all)).matmul(&v.narrow(1, 0, all).tr());
            let far = (b.matmul(&a) - &expected).abs().max().double_value(&[]);
            assert!(far < 1e-5, "[{out}, {inp}] of rank {r}: {far:e}");
            // Of like size: neither factor takes all of it.
            let [b, a] = [b, a].map(|it| it.norm().double_value(&[]));
            assert!((b - a).abs() <= 1e-4 * a, "{b} {a}");
        }
    }

    #[test]
    fn each_begins_nearer_to_the_weight_than_quantisation_alone() {
        tch::manual_seed(3);
        let weight = Tensor::randn([96, 128], (Kind::Float, tch::Device::Cpu));
        let op = layer(&weight);
        let far = |it: &Tensor| (it - &weight).square().sum(Kind::Float).double_value(&[]);
        let alone = far(&op.weight());
        let with = |how| {
            let begin = Begin::of(&op, &weight, 8, how).unwrap();
            let base = match begin.base {
                Some(plain) => op.encode(plain).unwrap().weight(),
                None => op.weight(),
            };
            far(&(base + begin.b.matmul(&begin.a)))
        };
        let (one, three) = (
            with(Residual::Loftq { rounds: 1 }),
            with(Residual::Loftq { rounds: 3 }),
        );
        assert!(one < alone && three <= one, "{alone} {one} {three}");
        assert!(with(Residual::Pissa) < alone);
    }
}
