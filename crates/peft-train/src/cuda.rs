//! The step of AdamW with 8-bit states on a GPU: every tensor of one dtype in one launch.

use std::{collections::HashMap, sync::Mutex, sync::PoisonError};

use peft_codec::{AdamW8, Map};
use peft_cuda::{
    Number, Result, Stream,
    adamw::{self, Betas, Rate},
};
use tch::{Device, Kind, Tensor};

use crate::{eight_bits::Stepped, ffi::memory};

/// Steps tensors of one dtype that are on one GPU.
pub(crate) fn step(adam: AdamW8, all: &mut [&mut &mut Stepped<'_>]) -> Result<()> {
    let Some(first) = all.first() else {
        return Ok(());
    };
    let device = first.0.device();
    let Device::Cuda(ordinal) = device else {
        return Ok(());
    };
    let number = match first.0.kind() {
        Kind::BFloat16 => Number::Bf16,
        _ => Number::F32,
    };
    let betas = Betas(adam.beta1, adam.beta2);
    let rates: Vec<Rate> = all
        .iter_mut()
        .map(|it| {
            let [lr, eps, decay] = [adam.lr, adam.eps, adam.weight_decay].map(f64::from);
            Rate::of(it.2.count() as u32, lr, eps, decay, betas)
        })
        .collect();
    // The kernel wants numbers without gaps; a gradient may be a view.
    let grads: Vec<Tensor> = all
        .iter()
        .map(|it| it.1.to_kind(it.0.kind()).contiguous())
        .collect();
    let params: Vec<Tensor> = all.iter().map(|it| it.0.detach()).collect();
    let tensors: Vec<_> = (0..all.len())
        .map(|i| {
            let moments = &*all[i].2;
            adamw::Tensor {
                parameter: memory(&params[i]),
                gradient: memory(&grads[i]),
                first: memory(&moments.state1),
                second: memory(&moments.state2),
                first_absmax: memory(&moments.absmax1),
                second_absmax: memory(&moments.absmax2),
                len: params[i].numel(),
                rate: rates[i],
            }
        })
        .collect();
    let [signed, unsigned] = maps(ordinal);
    let room = Tensor::empty(
        [(tensors.len() * adamw::ROOM) as i64],
        (Kind::Uint8, device),
    );
    adamw::step(
        &tensors,
        number,
        betas,
        (memory(&signed), memory(&unsigned)),
        memory(&room),
        &Stream::current(ordinal as i32)?,
    )
}

/// The values that codes mean, brought to each GPU once.
fn maps(ordinal: usize) -> [Tensor; 2] {
    static KEPT: Mutex<Option<HashMap<usize, [Tensor; 2]>>> = Mutex::new(None);
    let here = |it: &Map| Tensor::from_slice(it.values()).to_device(Device::Cuda(ordinal));
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let all = kept.get_or_insert_default().entry(ordinal);
    let of = all.or_insert_with(|| [Map::signed(), Map::unsigned()].map(here));
    of.each_ref().map(Tensor::shallow_clone)
}
