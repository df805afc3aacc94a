//! A linear layer whose weight is decoded for each product.

use peft_core::{LinearOp, Plain, Result, Stored};
use peft_torch::{Function, apply, with_scratch};
use tch::{Device, Kind, TchError, Tensor};

use crate::{
    config::{Eight, Scheme},
    cuda,
    eight::EightBits,
    four::FourBits,
};

/// Up to so many rows are multiplied straight from 4 bits.
const FEW: i64 = 8;

/// `y = x · decode(W)ᵀ + b`. Frozen.
#[derive(Debug)]
pub struct QuantisedLinear {
    code: Code,
    /// `[out]`
    bias: Option<Tensor>,
    /// The dtype of the model, in which the weight is shown to methods.
    kind: Kind,
    /// The dtype of products; `None`: that of the input.
    compute: Option<Kind>,
    /// A dense form of it lies `[in, out]` in a file.
    transposed: bool,
}

/// A weight in few bits.
#[derive(Debug)]
pub(crate) enum Code {
    Four(FourBits),
    Eight(EightBits),
}

impl Code {
    pub(crate) fn encode(scheme: &Scheme, weight: &Tensor) -> Result<Code> {
        Ok(match scheme {
            Scheme::Four(four) => Code::Four(FourBits::encode(four, weight)?),
            Scheme::Eight(Eight) => Code::Eight(EightBits::encode(weight)),
        })
    }

    /// What the weight was before, as far as it is known: `bitsandbytes` takes 8 bits for fp16.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Code::Four(it) => it.kind(),
            Code::Eight(_) => Kind::Half,
        }
    }

    fn scheme(&self) -> Scheme {
        match self {
            Code::Four(it) => Scheme::Four(it.scheme()),
            Code::Eight(_) => Scheme::INT8,
        }
    }

    fn shape(&self) -> (i64, i64) {
        match self {
            Code::Four(it) => it.shape(),
            Code::Eight(it) => it.shape(),
        }
    }

    fn device(&self) -> Device {
        match self {
            Code::Four(it) => it.packed.device(),
            Code::Eight(it) => it.device(),
        }
    }

    fn handle(&self) -> Code {
        match self {
            Code::Four(it) => Code::Four(it.handle()),
            Code::Eight(it) => Code::Eight(it.handle()),
        }
    }

    /// Whether the codec decodes it to this dtype; libtorch's operations do to any, anywhere.
    fn native(&self, kind: Kind) -> bool {
        self.device() == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half)
    }

    /// The weight `[out, in]`, decoded into memory of its own.
    fn dense(&self, kind: Kind) -> Tensor {
        match self {
            Code::Four(it) if self.native(kind) => {
                let (out, inp) = self.shape();
                let mut weight = Tensor::empty([out, inp], (kind, Device::Cpu));
                it.decode_into(&mut weight);
                weight
            }
            Code::Four(it) => cuda::decode(it, kind).unwrap_or_else(|| it.decode_anywhere(kind)),
            Code::Eight(it) => it.decode(kind),
        }
    }

    /// Lends the weight `[out, in]`, decoded into memory that is used again.
    fn with_dense<R>(&self, kind: Kind, body: impl FnOnce(&Tensor) -> R) -> R {
        match self {
            Code::Four(it) if self.native(kind) => {
                let (out, inp) = self.shape();
                with_scratch(kind, &[out, inp], |mut weight| {
                    it.decode_into(&mut weight);
                    body(&weight)
                })
            }
            _ => body(&self.dense(kind)),
        }
    }

    /// `x Wᵀ + b` in the dtype of x; no graph.
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let (out, inp) = self.shape();
        let rows = x.numel() as i64 / inp.max(1);
        let few = match self {
            Code::Four(it) if (1..=FEW).contains(&rows) => it.few_rows(&x.reshape([rows, inp])),
            _ => None,
        };
        match few {
            Some(y) => {
                let y = match bias {
                    Some(bias) => y + bias,
                    None => y,
                };
                let mut shape = x.size();
                shape.pop();
                shape.push(out);
                y.to_kind(x.kind()).view(shape.as_slice())
            }
            None => self.with_dense(x.kind(), |w| peft_torch::linear(x, w, bias)),
        }
    }
}

impl QuantisedLinear {
    /// Encodes a dense layer; weight: `[out, in]`.
    ///
    /// # Errors
    /// If the weight is not of fp32, bf16 or fp16.
    pub fn new(scheme: &Scheme, plain: Plain) -> Result<QuantisedLinear> {
        let kind = plain.weight.kind();
        let code = Code::encode(scheme, &plain.weight)?;
        Ok(QuantisedLinear::of(code, plain.bias, kind, None, false))
    }

    /// Lends the weight `[out, in]`, decoded into memory that the next layer uses again.
    pub fn with_weight<R>(&self, kind: Kind, body: impl FnOnce(&Tensor) -> R) -> R {
        tch::no_grad(|| self.code.with_dense(kind, body))
    }

    pub(crate) fn of(
        code: Code,
        bias: Option<Tensor>,
        kind: Kind,
        compute: Option<Kind>,
        transposed: bool,
    ) -> QuantisedLinear {
        QuantisedLinear {
            code,
            bias: bias.map(|it| it.detach()),
            kind,
            compute,
            transposed,
        }
    }
}

impl QuantisedLinear {
    /// What `product` gives in the dtype in which products are made, and its graph.
    fn tied(&self, x: &Tensor, product: impl FnOnce(Kind) -> Tensor) -> Tensor {
        let compute = self.compute.unwrap_or(x.kind());
        let [y] = apply(&[x], || {
            let back = Back {
                code: self.code.handle(),
                compute,
            };
            ([product(compute).to_kind(x.kind())], back)
        });
        y
    }

    /// Another weight and bias in the place of these.
    fn like(&self, code: Code, bias: Option<Tensor>) -> QuantisedLinear {
        QuantisedLinear::of(code, bias, self.kind, self.compute, self.transposed)
    }
}

impl LinearOp for QuantisedLinear {
    fn forward(&self, x: &Tensor) -> Tensor {
        self.tied(x, |compute| {
            let bias = self.bias.as_ref().map(|it| it.to_kind(compute));
            self.code.product(&x.to_kind(compute), bias.as_ref())
        })
    }

    fn unread(&self, x: &Tensor) -> Tensor {
        self.tied(x, |_| peft_torch::unread(x, self.shape().0))
    }

    fn weight(&self) -> Tensor {
        tch::no_grad(|| self.code.dense(self.kind))
    }

    fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    fn shape(&self) -> (i64, i64) {
        self.code.shape()
    }

    fn device(&self) -> Device {
        self.code.device()
    }

    fn transposed(&self) -> bool {
        self.transposed
    }

    fn stored(&self) -> Option<Stored> {
        let tensors = match &self.code {
            Code::Four(it) => it.tensors(),
            Code::Eight(it) => it.tensors(),
        };
        let config = self.code.scheme().config();
        Some(Stored { tensors, config })
    }

    fn encode(&self, plain: Plain) -> Result<Box<dyn LinearOp>> {
        let code = Code::encode(&self.code.scheme(), &plain.weight)?;
        Ok(Box::new(self.like(code, plain.bias)))
    }

    fn with_bias(&self, bias: Option<Tensor>) -> Result<Box<dyn LinearOp>> {
        Ok(Box::new(self.like(self.code.handle(), bias)))
    }
}

/// `dx = dy · decode(W)`. It has the codes and nothing of the forward pass.
struct Back {
    code: Code,
    compute: Kind,
}

impl Function for Back {
    fn backward(
        &self,
        grads: &[Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>, TchError> {
        let dx = grads[0].as_ref().map(|g| {
            let g2 = g.to_kind(self.compute);
            let dx = self
                .code
                .with_dense(self.compute, |w| peft_torch::linear(&g2, &w.tr(), None));
            dx.to_kind(g.kind())
        });
        Ok(vec![dx])
    }
}
