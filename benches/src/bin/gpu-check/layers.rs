//! Layers and optimiser as a run uses them, on the GPU beside the processor.

use anyhow::{Result, ensure};
use peft::quant::{Block, Compat, Four, QuantisedLinear, Scheme, Type};
use peft_core::{LinearOp, Param, Plain};
use peft_train::{Optim, Optimizer, Settings};
use tch::{Device, Kind, Tensor};

use crate::Table;

const HERE: Device = Device::Cpu;

pub(crate) fn checks(device: Device, table: &mut Table) {
    for (kind, block, double_quant) in [
        (Type::Nf4, 64, true),
        (Type::Nf4, 64, false),
        (Type::Fp4, 32, true),
        (Type::Nf4, 4096, true),
    ] {
        for of in [Kind::Float, Kind::BFloat16, Kind::Half] {
            for shape in [[9, 64], [65, 33], [300, 4096]] {
                let result = Block::of(block).map_err(Into::into).and_then(|block| {
                    let compat = Compat::Cuda;
                    let four = Four {
                        kind,
                        block,
                        double_quant,
                        compat,
                    };
                    layer(device, &Scheme::Four(four), of, shape)
                });
                table.case("a layer, its product and gradient", result);
            }
        }
    }
    for (on_gpu, here) in [
        (Optim::Adamw8bit, Optim::Adamw8bit),
        (Optim::PagedAdamw8bit, Optim::Adamw8bit),
        (Optim::OffloadedAdamw8bit, Optim::Adamw8bit),
        (Optim::OffloadedAdamw32bit, Optim::AdamwTorch),
    ] {
        for of in [Kind::Float, Kind::BFloat16] {
            table.case("five steps of AdamW", steps(device, (on_gpu, here), of));
        }
    }
}

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, HERE)).to_kind(kind)
}

/// Decoded to the bit; products and gradients as near to those in fp64 as their dtype lets them be.
fn layer(device: Device, scheme: &Scheme, kind: Kind, [out, inp]: [i64; 2]) -> Result<()> {
    let weight = random(&[out, inp], kind);
    let of = |weight: Tensor| QuantisedLinear::new(scheme, Plain { weight, bias: None });
    let (here, there) = (of(weight.copy())?, of(weight.to_device(device))?);
    let dense = here.weight();
    ensure!(
        there.weight().to_device(HERE).equal(&dense),
        "[{out}, {inp}] {kind:?}: decoded otherwise"
    );
    let tolerance = match kind {
        Kind::Float => 1e-5,
        Kind::Half => 4e-3,
        _ => 3e-2,
    };
    let wide = dense.to_kind(Kind::Double);
    for rows in [1, 2, 8, 9, 40] {
        let (x, g) = (random(&[rows, inp], kind), random(&[rows, out], kind));
        let at = x.to_device(device).set_requires_grad(true);
        let y = there.forward(&at);
        (&y * g.to_device(device)).sum(Kind::Float).backward();
        let [x, g] = [x, g].map(|it| it.to_kind(Kind::Double));
        for (what, got, expected) in [
            ("product", y.detach(), x.matmul(&wide.tr())),
            ("gradient", at.grad(), g.matmul(&wide)),
        ] {
            let far = (got.to_device(HERE).to_kind(Kind::Double) - &expected)
                .abs()
                .max();
            let far = (far / expected.abs().max()).double_value(&[]);
            ensure!(
                far < tolerance,
                "[{out}, {inp}] {kind:?}, {rows} rows: {what} off by {far:e}"
            );
        }
    }
    Ok(())
}

/// The same tensors and gradients in both places, stepped alike.
fn steps(device: Device, optims: (Optim, Optim), kind: Kind) -> Result<()> {
    tch::manual_seed(2);
    let start: Vec<Tensor> = [5000, 3 * 4096, 100, 300_000]
        .map(|n| random(&[n], kind))
        .into();
    let run = |device: Device, optim: Optim| -> Result<Vec<Tensor>> {
        tch::manual_seed(3);
        let leaf = |it: &Tensor| it.to_device(device).copy().set_requires_grad(true);
        let tensors: Vec<Tensor> = start.iter().map(leaf).collect();
        let params: Vec<Param> = tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| Param {
                adapter: "default".into(),
                at: format!("layer.{i}"),
                name: "weight".into(),
                norm: false,
                tensor: tensor.shallow_clone(),
            })
            .collect();
        let settings = Settings {
            optim,
            weight_decay: 0.1,
            ..Settings::default()
        };
        let mut optimizer = Optimizer::new(&params, &settings)?;
        for _ in 0..5 {
            optimizer.zero_grad();
            for it in &tensors {
                let g = random(&it.size(), kind).to_device(device);
                (it * g).sum(Kind::Float).backward();
            }
            optimizer.step(1e-2)?;
        }
        Ok(tensors
            .iter()
            .map(|it| it.detach().to_device(HERE))
            .collect())
    };
    let (there, here) = (run(device, optims.0)?, run(HERE, optims.1)?);
    for (i, (there, here)) in there.iter().zip(&here).enumerate() {
        ensure!(
            there.equal(here),
            "{:?} {kind:?}: tensor {i} differs",
            optims.0
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_agrees_with_itself() {
        let mut table = Table::default();
        checks(HERE, &mut table);
        assert_eq!(table.failed, 0, "{:?}", table.checks);
    }
}
