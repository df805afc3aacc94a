//! A weight in 8 bits, with a scale for each row: `W ≈ codes · scale / 127`.

use peft_core::{Error, Result};
use tch::{Kind, Tensor};

/// A weight `[out, in]` in 8 bits.
#[derive(Debug)]
pub(crate) struct EightBits {
    /// `[out, in]`, int8.
    codes: Tensor,
    /// The largest magnitude of each row, `[out]` in fp32.
    scb: Tensor,
}

impl EightBits {
    /// Encodes a weight `[out, in]`: `round(W · (127 / max |row|))`, ties to even; `bitsandbytes` takes W in fp16.
    pub(crate) fn encode(weight: &Tensor) -> EightBits {
        let wide = weight.detach().to_kind(Kind::Half).to_kind(Kind::Float);
        let scb = wide.abs().amax([1i64].as_slice(), false);
        let codes = (wide * (scb.reciprocal() * 127.0).unsqueeze(1)).round();
        // A row of zeros has no scale, and its codes are zero.
        let codes = codes.nan_to_num(0.0, 0.0, 0.0).to_kind(Kind::Int8);
        EightBits { codes, scb }
    }

    /// Reads what a file has below `at`; `get` gives a tensor by its name below the layer.
    pub(crate) fn read(
        at: &str,
        shape: &[i64],
        get: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<EightBits> {
        let (codes, scb) = (get("weight")?, get("SCB")?);
        let format = get("weight_format")?;
        let fault = |key: &str, reason: String| Error::Config {
            peft_type: "quantization".into(),
            reason: format!("`{at}.{key}`: {reason}"),
        };
        if codes.kind() != Kind::Int8 {
            let reason = format!("of type {:?}, expected int8", codes.kind());
            return Err(fault("weight", reason));
        }
        for (name, tensor, expected) in [("weight", &codes, shape), ("SCB", &scb, &shape[..1])] {
            if tensor.size() != expected {
                return Err(Error::Shape {
                    key: format!("{at}.{name}"),
                    expected: expected.to_owned(),
                    got: tensor.size(),
                });
            }
        }
        if format.numel() != 1 || i64::try_from(format.sum(Kind::Int64))? != 0 {
            return Err(fault("weight_format", "expected 0, row by row".into()));
        }
        Ok(EightBits {
            codes: codes.contiguous(),
            scb: scb.to_kind(Kind::Float),
        })
    }

    /// What a file holds of it.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            ("weight", self.codes.shallow_clone()),
            ("SCB", self.scb.shallow_clone()),
            ("weight_format", Tensor::from(0i64).to_kind(Kind::Uint8)),
        ]
    }

    /// A second handle.
    pub(crate) fn handle(&self) -> EightBits {
        EightBits {
            codes: self.codes.shallow_clone(),
            scb: self.scb.shallow_clone(),
        }
    }

    /// `(out, in)`
    pub(crate) fn shape(&self) -> (i64, i64) {
        let size = self.codes.size();
        (size[0], size[1])
    }

    pub(crate) fn device(&self) -> tch::Device {
        self.codes.device()
    }

    /// Decodes.
    pub(crate) fn decode(&self, kind: Kind) -> Tensor {
        // In the order of the forward pass of `bitsandbytes` where it trains.
        let scale = self.scb.unsqueeze(1) * (1.0 / 127.0);
        (self.codes.to_kind(Kind::Float) * scale).to_kind(kind)
    }
}
