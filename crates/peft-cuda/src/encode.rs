//! To 4 bits on a GPU, and the scales to 8.
//!
//! By the rules of [`peft_codec::Compat::Cuda`], to the bit: with IEEE's reciprocal, where the kernels of `bitsandbytes` approximate it.

use peft_codec::{Block, NESTED_BLOCK, Type};

use crate::{
    driver,
    error::Result,
    kernels::{Arg, Launch, Source, THREADS},
    memory::{Memory, Number},
    stream::Stream,
};

/// Quantises `len` numbers. Writes `to`: codes, two a byte, and scales, fp32, one a block.
pub fn quantise(
    values: Memory<'_>,
    number: Number,
    len: usize,
    kind: Type,
    block: Block,
    to: (Memory<'_>, Memory<'_>),
    stream: &Stream,
) -> Result<()> {
    let most = blocks_at_once(stream)?;
    match encoded(values, number, len, kind, block, to, most)? {
        Some(launch) => launch.run(stream),
        None => Ok(()),
    }
}

/// Quantises `len` scales less their mean. Writes `to`: codes, one a scale, and scales of their own, fp32, one for each
/// [`NESTED_BLOCK`] of them.
/// `map` holds the 256 values of [`peft_codec::Map::signed`] on the GPU.
pub fn nest(
    scales: Memory<'_>,
    len: usize,
    mean: f32,
    map: Memory<'_>,
    to: (Memory<'_>, Memory<'_>),
    stream: &Stream,
) -> Result<()> {
    let most = blocks_at_once(stream)?;
    match nested(scales, len, mean, map, to, most)? {
        Some(launch) => launch.run(stream),
        None => Ok(()),
    }
}

/// As many blocks as a device runs at the same time.
pub(crate) fn blocks_at_once(stream: &Stream) -> Result<u64> {
    Ok(u64::from(driver::device(stream.device())?.processors()) * 8)
}

pub(crate) fn encoded(
    values: Memory<'_>,
    number: Number,
    len: usize,
    kind: Type,
    block: Block,
    to: (Memory<'_>, Memory<'_>),
    most: u64,
) -> Result<Option<Launch>> {
    let blocks = block.count(len);
    let args = vec![
        Arg::Long(values.holds("numbers", len, number.bytes())?),
        Arg::Long(len as u64),
        Arg::Word(block.size().ilog2()),
        Arg::Long(to.0.holds("packed bytes", len.div_ceil(2), 1)?),
        Arg::Long(to.1.holds("scales", blocks, 4)?),
    ];
    if len == 0 {
        return Ok(None);
    }
    let kernel = format!("quantise_{}_{}", kind.name(), number.name());
    // Eight numbers a lane; a warp makes a block or several.
    let each = u64::from(THREADS) * 8 / block.size().min(256) as u64;
    let (source, blocks) = (Source::Quantise, blocks as u64);
    Ok(Some(Launch::of(source, kernel, blocks, each, most, args)))
}

pub(crate) fn nested(
    scales: Memory<'_>,
    len: usize,
    mean: f32,
    map: Memory<'_>,
    to: (Memory<'_>, Memory<'_>),
    most: u64,
) -> Result<Option<Launch>> {
    let blocks = len.div_ceil(NESTED_BLOCK);
    let args = vec![
        Arg::Long(scales.holds("scales", len, 4)?),
        Arg::Long(len as u64),
        Arg::Float(mean),
        Arg::Long(map.holds("values of a map", 256, 4)?),
        Arg::Long(to.0.holds("codes", len, 1)?),
        Arg::Long(to.1.holds("scales of scales", blocks, 4)?),
    ];
    if len == 0 {
        return Ok(None);
    }
    let (source, kernel) = (Source::Quantise, "nest".to_owned());
    Ok(Some(Launch::of(
        source,
        kernel,
        blocks as u64,
        1,
        most,
        args,
    )))
}
