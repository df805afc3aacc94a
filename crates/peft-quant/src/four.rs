//! A weight in 4 bits.

use half::{bf16, f16};
use peft_codec::{
    Activations, Compat, Map, NESTED_BLOCK, Nested, NestedState, Scales, State, View,
    quantise_piece,
};
use peft_core::{Error, Result};
use peft_torch::{
    for_each_chunk,
    memory::{with_slice, with_slice_mut},
};
use tch::{Device, Kind, Tensor};

use crate::{config::Four, cuda};

/// Numbers that one thread decodes or encodes at a time: whole blocks of any size.
const PIECE: usize = 1 << 16;

/// Weights of more bytes are decoded past the caches of the cores: nothing of their beginning would be left there when they are
/// multiplied, and a line that is only written need not be read first. On an Intel with 2 MiB a core a weight of 32 MiB takes 0.7
/// of the time so, one of 86 MiB 0.5; products of 512 tokens take 0.9 of it from 8 MiB on and no less below.
const PAST: usize = 4 << 20;

/// A weight `[out, in]` in 4 bits, and what is needed to read it.
#[derive(Debug)]
pub(crate) struct FourBits {
    /// Two codes a byte; the type and shape in which the file has them.
    pub(crate) packed: Tensor,
    pub(crate) scales: Kept,
    pub(crate) state: State,
    compat: Compat,
}

/// The scales of the blocks.
#[derive(Debug)]
pub(crate) enum Kept {
    /// `[blocks]` in fp32.
    Plain(Tensor),
    /// In 8 bits; the mean is in the state.
    Nested {
        /// `[blocks]`
        codes: Tensor,
        /// `[blocks / 256]` in fp32.
        absmax: Tensor,
        /// `[256]` in fp32.
        map: Tensor,
    },
}

impl FourBits {
    /// Encodes a weight `[out, in]`.
    pub(crate) fn encode(scheme: &Four, weight: &Tensor) -> Result<FourBits> {
        let device = weight.device();
        let flat = weight.detach().to_device(Device::Cpu).contiguous();
        let (bytes, absmax) = match flat.kind() {
            Kind::BFloat16 => with_slice(&flat, |x: &[bf16]| encode(scheme, x))?,
            Kind::Half => with_slice(&flat, |x: &[f16]| encode(scheme, x))?,
            Kind::Float => with_slice(&flat, |x: &[f32]| encode(scheme, x))?,
            other => {
                return Err(Error::Torch(tch::TchError::Kind(format!(
                    "a weight of type {other:?} cannot be quantised"
                ))));
            }
        }?;
        let vector = |x: &[f32]| Tensor::from_slice(x).to_device(device);
        let (scales, nested) = match scheme.double_quant {
            false => (Kept::Plain(absmax.to_device(device)), None),
            true => {
                // libtorch's mean, as Python takes it, in whatever order it adds.
                let offset = absmax.mean(Kind::Float).double_value(&[]) as f32;
                let nested = with_slice(&absmax, |absmax: &[f32]| {
                    Nested::around(absmax, offset, scheme.compat)
                })?;
                let kept = Kept::Nested {
                    codes: Tensor::from_slice(&nested.codes).to_device(device),
                    absmax: vector(&nested.absmax),
                    map: vector(nested.map.values()),
                };
                let state = NestedState {
                    blocksize: NESTED_BLOCK,
                    dtype: "float32".into(),
                    offset: nested.offset,
                };
                (kept, Some(state))
            }
        };
        Ok(FourBits {
            packed: bytes.to_device(device).view([-1, 1]),
            scales,
            state: State {
                quant_type: scheme.kind,
                blocksize: scheme.block,
                dtype: name(flat.kind()).into(),
                shape: weight.size().iter().map(|&d| d as usize).collect(),
                nested,
            },
            compat: scheme.compat,
        })
    }

    /// Reads what a file has below `at`; `get` gives a tensor by its name below the layer.
    pub(crate) fn read(
        at: &str,
        kind: &str,
        shape: &[i64],
        compat: Compat,
        get: &mut dyn FnMut(&str) -> Result<Tensor>,
    ) -> Result<FourBits> {
        let fault = |key: &str, reason: String| Error::Config {
            peft_type: "quantization".into(),
            reason: format!("`{at}.{key}`: {reason}"),
        };
        let key = format!("weight.quant_state.bitsandbytes__{kind}");
        let text = get(&key)?;
        let bytes = with_slice(&text, <[u8]>::to_vec).map_err(|e| fault(&key, e.to_string()))?;
        let state = State::parse(&bytes).map_err(|e| fault(&key, e.to_string()))?;
        if state.quant_type.name() != kind {
            let reason = format!("the name says {kind} and the state {}", state.quant_type);
            return Err(fault(&key, reason));
        }
        if state
            .shape
            .iter()
            .map(|&d| d as i64)
            .ne(shape.iter().copied())
        {
            return Err(Error::Shape {
                key: format!("{at}.weight"),
                expected: shape.to_owned(),
                got: state.shape.iter().map(|&d| d as i64).collect(),
            });
        }
        let n: usize = state.shape.iter().product();
        let (blocks, len) = (state.blocksize.count(n), n.div_ceil(2));
        let packed = get("weight")?;
        let got = packed.numel() * packed.kind().elt_size_in_bytes();
        if got != len {
            let reason = format!("{got} bytes of codes, expected {len} for {n} numbers");
            return Err(fault("weight", reason));
        }
        let mut vector = |name: &str, len: usize| {
            let it = get(name)?;
            if it.numel() != len {
                let reason = format!("{} numbers, expected {len}", it.numel());
                return Err(fault(name, reason));
            }
            if !it.is_floating_point() {
                return Err(fault(
                    name,
                    format!("of type {:?}, expected float", it.kind()),
                ));
            }
            Ok(it.to_kind(Kind::Float).contiguous().view([-1]))
        };
        let table = vector("weight.quant_map", 16)?;
        let own = Tensor::from_slice(state.quant_type.table()).to_device(table.device());
        // A model that was cast has its table rounded; the codes still mean what they meant.
        let far = (&table - &own).abs() - own.abs() * (1.0 / 128.0);
        let far = far.max().double_value(&[]);
        if far.is_nan() || far > 1e-6 {
            let reason = format!("not the table of {kind}");
            return Err(fault("weight.quant_map", reason));
        }
        let scales = match &state.nested {
            None => Kept::Plain(vector("weight.absmax", blocks)?),
            Some(_) => {
                let absmax = vector("weight.nested_absmax", blocks.div_ceil(NESTED_BLOCK))?;
                let map = vector("weight.nested_quant_map", 256)?;
                with_slice(&map, |it: &[f32]| Map::of(it).map(drop))?
                    .map_err(|e| fault("weight.nested_quant_map", e.to_string()))?;
                let codes = get("weight.absmax")?;
                if codes.kind() != Kind::Uint8 || codes.numel() != blocks {
                    let reason = format!(
                        "{} numbers of type {:?}, expected {blocks} bytes",
                        codes.numel(),
                        codes.kind()
                    );
                    return Err(fault("weight.absmax", reason));
                }
                Kept::Nested {
                    codes: codes.contiguous().view([-1]),
                    absmax,
                    map,
                }
            }
        };
        Ok(FourBits {
            packed: packed.contiguous(),
            scales,
            state,
            compat,
        })
    }

    /// What a file holds of it.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        let mut all = vec![("weight", self.packed.shallow_clone())];
        match &self.scales {
            Kept::Plain(absmax) => all.push(("weight.absmax", absmax.shallow_clone())),
            Kept::Nested { codes, absmax, map } => all.extend([
                ("weight.absmax", codes.shallow_clone()),
                ("weight.nested_absmax", absmax.shallow_clone()),
                ("weight.nested_quant_map", map.shallow_clone()),
            ]),
        }
        let table = Tensor::from_slice(self.state.quant_type.table());
        all.push(("weight.quant_map", table));
        let name = match self.state.quant_type {
            peft_codec::Type::Nf4 => "weight.quant_state.bitsandbytes__nf4",
            peft_codec::Type::Fp4 => "weight.quant_state.bitsandbytes__fp4",
        };
        all.push((name, Tensor::from_slice(self.state.text().as_bytes())));
        all
    }

    /// How another weight is encoded like this one.
    pub(crate) fn scheme(&self) -> Four {
        Four {
            kind: self.state.quant_type,
            block: self.state.blocksize,
            double_quant: self.state.nested.is_some(),
            compat: self.compat,
        }
    }

    /// A second handle.
    pub(crate) fn handle(&self) -> FourBits {
        FourBits {
            packed: self.packed.shallow_clone(),
            scales: match &self.scales {
                Kept::Plain(absmax) => Kept::Plain(absmax.shallow_clone()),
                Kept::Nested { codes, absmax, map } => Kept::Nested {
                    codes: codes.shallow_clone(),
                    absmax: absmax.shallow_clone(),
                    map: map.shallow_clone(),
                },
            },
            state: self.state.clone(),
            compat: self.compat,
        }
    }

    /// What the weight was before.
    pub(crate) fn kind(&self) -> Kind {
        match self.state.dtype.as_str() {
            "bfloat16" => Kind::BFloat16,
            "float16" => Kind::Half,
            _ => Kind::Float,
        }
    }

    /// `(out, in)`
    pub(crate) fn shape(&self) -> (i64, i64) {
        (self.state.shape[0] as i64, self.state.shape[1] as i64)
    }

    /// Decodes into a contiguous `[out, in]` tensor in main memory.
    pub(crate) fn decode_into(&self, out: &mut Tensor) {
        let done = match out.kind() {
            Kind::BFloat16 => with_slice_mut(out, |it: &mut [bf16]| self.pieces(it)),
            Kind::Half => with_slice_mut(out, |it: &mut [f16]| self.pieces(it)),
            _ => with_slice_mut(out, |it: &mut [f32]| self.pieces(it)),
        };
        done.expect("a plain array of floating-point numbers");
    }

    fn pieces<T: peft_codec::Element>(&self, out: &mut [T]) {
        self.view(|view| {
            let past = size_of_val(out) > PAST;
            for_each_chunk(out, PIECE, |i, chunk| {
                let decoded = match past {
                    true => view.decode_past(i * PIECE, chunk),
                    false => view.decode(i * PIECE, chunk),
                };
                decoded.expect("a piece of it");
            });
        });
    }

    /// Decodes with libtorch's operations, wherever the codes lie and to whatever dtype.
    pub(crate) fn decode_anywhere(&self, kind: Kind) -> Tensor {
        let device = self.packed.device();
        let float = |it: &[f32]| Tensor::from_slice(it).to_device(device);
        let table = float(self.state.quant_type.table());
        let bytes = self.bytes().to_kind(Kind::Int64);
        let [high, low] = [
            bytes.bitwise_right_shift_tensor_scalar(4),
            bytes.bitwise_and(15),
        ];
        let codes = Tensor::stack(&[high, low], 1).view([-1]); // [2 ⌈n / 2⌉]
        let n: i64 = self.state.shape.iter().product::<usize>() as i64;
        let values = table.index_select(0, &codes.narrow(0, 0, n));
        let absmax = match &self.scales {
            Kept::Plain(absmax) => absmax.shallow_clone(),
            Kept::Nested { codes, absmax, map } => {
                let map = map.index_select(0, &codes.to_kind(Kind::Int64));
                let offset = self.state.nested.as_ref().map_or(0.0, |it| it.offset);
                map * spread(absmax, NESTED_BLOCK, codes.numel() as i64) + f64::from(offset)
            }
        };
        let scaled = values * spread(&absmax, self.state.blocksize.size(), n);
        let (out, inp) = self.shape();
        scaled.to_kind(kind).view([out, inp])
    }

    /// `x Wᵀ` straight from the codes, for few rows; x: `[m, in]` -> `[m, out]`, on a processor in fp32. `None` where nothing
    /// multiplies numbers of this type so.
    pub(crate) fn few_rows(&self, x: &Tensor) -> Option<Tensor> {
        if x.device() != Device::Cpu {
            return cuda::few_rows(self, x);
        }
        let x = x.contiguous();
        let (out, inp) = self.shape();
        let (m, out, inp) = (x.size()[0] as usize, out as usize, inp as usize);
        let arranged = match x.kind() {
            Kind::BFloat16 => with_slice(&x, |it: &[bf16]| Activations::new(it, m, inp)),
            Kind::Float => with_slice(&x, |it: &[f32]| Activations::new(it, m, inp)),
            _ => return None,
        };
        let arranged = arranged.expect("a matrix of bf16 or fp32");
        // Chunks of rows of the weight, each with all rows of x.
        let rows = 64;
        let mut parts = vec![0f32; out * m];
        self.view(|view| {
            for_each_chunk(&mut parts, rows * m, |i, part| {
                let begin = i * rows;
                let range = begin..(begin + rows).min(out);
                view.multiply(&arranged, range, part).expect("rows of it");
            });
        });
        if m == 1 {
            return Some(Tensor::from_slice(&parts).view([1, -1]));
        }
        let mut y = vec![0f32; out * m];
        for (i, part) in parts.chunks(rows * m).enumerate() {
            let width = part.len() / m;
            for (r, row) in part.chunks(width).enumerate() {
                let at = r * out + i * rows;
                y[at..at + width].copy_from_slice(row);
            }
        }
        Some(Tensor::from_slice(&y).view([m as i64, out as i64]))
    }

    /// The codes as bytes, whatever type they are kept in.
    pub(crate) fn bytes(&self) -> Tensor {
        match self.packed.kind() {
            Kind::Uint8 => self.packed.view([-1]),
            _ => self.packed.view([-1]).view_dtype(Kind::Uint8),
        }
    }

    fn view<R>(&self, body: impl FnOnce(View<'_>) -> R) -> R {
        let State {
            quant_type,
            blocksize,
            shape,
            nested,
            ..
        } = &self.state;
        let n = shape.iter().product();
        let view = |bytes: &[u8], scales: Scales<'_>| {
            body(View::new(bytes, scales, quant_type.table(), *blocksize, n).expect("checked"))
        };
        let result = with_slice(&self.bytes(), |bytes: &[u8]| match &self.scales {
            Kept::Plain(absmax) => {
                with_slice(absmax, |absmax: &[f32]| view(bytes, Scales::Plain(absmax)))
            }
            Kept::Nested { codes, absmax, map } => with_slice(codes, |codes: &[u8]| {
                with_slice(absmax, |absmax: &[f32]| {
                    with_slice(map, |map: &[f32]| {
                        let offset = nested.as_ref().map_or(0.0, |it| it.offset);
                        let map = map.try_into().expect("256 numbers");
                        view(
                            bytes,
                            Scales::Nested {
                                codes,
                                absmax,
                                map,
                                offset,
                            },
                        )
                    })
                })
                .and_then(|it| it)
            })
            .and_then(|it| it),
        });
        result.and_then(|it| it).expect("types were checked")
    }
}

/// One number for each of `n`, from one for each block.
fn spread(scales: &Tensor, block: usize, n: i64) -> Tensor {
    let all = scales.unsqueeze(1).expand([-1, block as i64], false);
    all.reshape([-1]).narrow(0, 0, n)
}

/// The codes, two a byte, and the scales. Encodes on libtorch's threads, which would else keep the cores busy waiting while others
/// work.
fn encode<T: peft_codec::Element>(scheme: &Four, values: &[T]) -> Result<(Tensor, Tensor)> {
    let Four {
        kind,
        block,
        compat,
        ..
    } = *scheme;
    let empty = |n: usize, kind| Tensor::empty([n as i64], (kind, Device::Cpu));
    let mut bytes = empty(values.len().div_ceil(2), Kind::Uint8);
    let mut absmax = empty(block.count(values.len()), Kind::Float);
    with_slice_mut(&mut bytes, |bytes: &mut [u8]| {
        with_slice_mut(&mut absmax, |absmax: &mut [f32]| {
            let pieces = values.chunks(PIECE).zip(bytes.chunks_mut(PIECE / 2));
            let pieces = pieces.zip(absmax.chunks_mut(PIECE / block.size()));
            for_each_chunk(&mut pieces.collect::<Vec<_>>(), 1, |_, pieces| {
                for ((values, bytes), absmax) in pieces {
                    quantise_piece(values, kind, block, compat, bytes, absmax)
                        .expect("room for a piece");
                }
            });
        })
    })??;
    Ok((bytes, absmax))
}

/// As `bitsandbytes` writes a type.
fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}
