//! `quant_state`: what a 4-bit tensor of a checkpoint once was, as the JSON that stands in its place in the file.
//!
//! Python writes it with `json.dumps`; a file that is read and written again must not change, so the text is made the same way,
//! to the digits of its one number.

use serde::Deserialize;

use crate::{
    error::{Error, Result},
    nested::NESTED_BLOCK,
    table::{Block, Type},
};

/// What is known of a 4-bit tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// The type of its codes.
    pub quant_type: Type,
    /// Numbers that share a scale.
    pub blocksize: Block,
    /// What it was before: `float32`, `bfloat16`, `float16`.
    pub dtype: String,
    /// Its shape, `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
    /// Of scales that are quantised, too.
    pub nested: Option<NestedState>,
}

/// What is known of quantised scales.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedState {
    /// Scales that share one.
    pub blocksize: usize,
    /// What they were before.
    pub dtype: String,
    /// Their mean.
    pub offset: f32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

const DTYPES: [&str; 3] = ["float32", "bfloat16", "float16"];

impl State {
    /// Reads the JSON.
    pub fn parse(text: &[u8]) -> Result<State> {
        let fault = |why: String| Error::State(why);
        let it: Written = serde_json::from_slice(text).map_err(|error| fault(error.to_string()))?;
        let quant_type = match it.quant_type.as_str() {
            "nf4" => Type::Nf4,
            "fp4" => Type::Fp4,
            other => {
                return Err(fault(format!(
                    "quant_type `{other}`, known are `nf4` and `fp4`"
                )));
            }
        };
        for dtype in [Some(&it.dtype), it.nested_dtype.as_ref()]
            .into_iter()
            .flatten()
        {
            if !DTYPES.contains(&dtype.as_str()) {
                return Err(fault(format!(
                    "dtype `{dtype}`, known are {}",
                    DTYPES.join(", ")
                )));
            }
        }
        let product = it.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        if product.is_none_or(|n| n > isize::MAX as usize) {
            return Err(fault(format!("shape {:?} is too large", it.shape)));
        }
        let nested = match (it.nested_blocksize, it.nested_dtype, it.nested_offset) {
            (None, None, None) => None,
            (Some(blocksize), Some(dtype), Some(offset)) => {
                if blocksize != NESTED_BLOCK {
                    return Err(fault(format!(
                        "nested_blocksize {blocksize}, expected {NESTED_BLOCK}"
                    )));
                }
                if !(offset as f32).is_finite() {
                    return Err(fault(format!("nested_offset {offset} is no number")));
                }
                Some(NestedState {
                    blocksize,
                    dtype,
                    offset: offset as f32,
                })
            }
            _ => {
                return Err(fault(
                    "of nested_blocksize, nested_dtype and nested_offset some are missing".into(),
                ));
            }
        };
        Ok(State {
            quant_type,
            blocksize: Block::of(it.blocksize)?,
            dtype: it.dtype,
            shape: it.shape,
            nested,
        })
    }

    /// The JSON as Python writes it.
    pub fn text(&self) -> String {
        let shape: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut text = format!(
            r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}]"#,
            self.quant_type,
            self.blocksize.size(),
            self.dtype,
            shape.join(", ")
        );
        if let Some(nested) = &self.nested {
            text += &format!(
                r#", "nested_blocksize": {}, "nested_dtype": "{}", "nested_offset": {}"#,
                nested.blocksize,
                nested.dtype,
                python_float(f64::from(nested.offset))
            );
        }
        text + "}"
    }
}

/// The shortest digits that give the number back, laid out as Python's `repr` does: an exponent below 10⁻⁴ and from 10¹⁶ on,
/// of at least two digits, with its sign.
///
/// Where two numbers of as few digits are equally near, Python takes that with the even last digit, as rounding to so many
/// digits does, and Rust's shortest digits may be the other.
fn python_float(value: f64) -> String {
    let shortest = format!("{value:e}");
    let rounded = format!("{value:.*e}", decimals(&shortest));
    let scientific = match rounded.parse() == Ok(value) {
        true => rounded,
        false => shortest,
    };
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        let decimals = decimals(&scientific) as i32 - exponent;
        return format!("{value:.*}", decimals.max(1) as usize);
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// How many digits there are behind the point.
fn decimals(scientific: &str) -> usize {
    let digits = scientific.split('e').next().unwrap_or_default();
    digits.split_once('.').map_or(0, |(_, behind)| behind.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str =
        r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4096, 4096]}"#;
    const NESTED: &str = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4096, 4096], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.596862554550171}"#;

    #[test]
    fn what_is_read_is_written_again() {
        for text in [PLAIN, NESTED] {
            assert_eq!(State::parse(text.as_bytes()).unwrap().text(), text);
        }
        // The order of the keys and the spaces do not matter to a reader.
        let other = PLAIN
            .replace(": ", ":")
            .replace("{\"quant_type\":\"nf4\",", "{")
            .replace('}', ",\"quant_type\":\"nf4\"}");
        assert_eq!(State::parse(other.as_bytes()).unwrap().text(), PLAIN);
    }

    #[test]
    fn numbers_look_as_in_python() {
        for (value, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (-2.5, "-2.5"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e22, "1.5e+22"),
            (1e-100, "1e-100"),
            (0.05237411, "0.05237411"),
            (67917.0 / 131072.0, "0.5181655883789062"),
            (68361.0 / 131072.0, "0.5215530395507812"),
            (-1234567.890625, "-1234567.890625"),
            (2f64.powi(-24), "5.960464477539063e-08"),
            (0.1 + 0.2, "0.30000000000000004"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }

    #[test]
    fn a_state_that_contradicts_itself_is_refused() {
        for (from, to, word) in [
            ("nf4", "nf5", "nf5"),
            ("64", "63", "63"),
            ("float32", "int8", "int8"),
            ("[4096", "[-1", "invalid"),
            ("[4096", "[18446744073709551615", "too large"),
            ("\"blocksize\": 64, ", "", "blocksize"),
            ("}", ", \"nested_offset\": 1.0}", "missing"),
            ("}", ", \"extra\": 1}", "extra"),
        ] {
            let error = State::parse(PLAIN.replacen(from, to, 1).as_bytes()).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
        let wrong = NESTED.replace("256", "128");
        assert!(State::parse(wrong.as_bytes()).is_err());
        assert!(State::parse(b"\xff").is_err());
    }
}
