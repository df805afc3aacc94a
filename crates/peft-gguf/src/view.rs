//! A GGUF file with the names, shapes and values of `model.safetensors`.

use crate::arch::{Layout, Mapped, Plan, plan};
use crate::error::{Error, Result, nearest};
use crate::file::Gguf;
use indexmap::IndexMap;
use serde_json::Value;

/// The same file seen as a Hugging Face checkpoint.
///
/// Building one checks everything that can be checked without reading weights: each tensor that the
/// architecture needs is there in the right shape, and no other. Values are read, decoded and put
/// back into Hugging Face's order when they are asked for.
#[derive(Debug)]
pub struct HfView {
    gguf: Gguf,
    config: Value,
    generation: Value,
    tensors: IndexMap<String, Mapped>,
}

impl HfView {
    /// Understands `gguf`, or says what about it cannot be.
    pub fn new(gguf: Gguf) -> Result<HfView> {
        let Plan {
            config,
            generation,
            tensors,
        } = plan(&gguf)?;
        let tensors = tensors.into_iter().map(|t| (t.hf.clone(), t)).collect();
        Ok(HfView {
            gguf,
            config,
            generation,
            tensors,
        })
    }

    /// The file beneath.
    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// What `config.json` says, without the dtype, which is the reader's choice.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// What `generation_config.json` says.
    pub fn generation_config(&self) -> Value {
        self.generation.clone()
    }

    /// The names of all tensors, in the order of the model.
    pub fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// The values of a tensor, row-major.
    pub fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        let mapped = self.mapped(name)?;
        let info = self.gguf.tensor(&mapped.gguf)?;
        match mapped.layout {
            Layout::Same => self.gguf.dequantise(&mapped.gguf),
            _ => {
                let mut out = self.gguf.room(info)?;
                self.tensor_into(name, &mut out)?;
                Ok(out)
            }
        }
    }

    /// As [`HfView::tensor`], into `out`, which must have exactly as many values.
    pub fn tensor_into(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let mapped = self.mapped(name)?;
        let info = self.gguf.tensor(&mapped.gguf)?;
        if mapped.layout == Layout::Same {
            return self.gguf.dequantise_into(info, out);
        }
        if out.len() != info.values() {
            let problem = format!("has {} values, the buffer {}", info.values(), out.len());
            return Err(Error::tensor(self.gguf.path(), name, problem));
        }
        let stored = self.gguf.dequantise(&mapped.gguf)?;
        match mapped.layout {
            Layout::Rotary { heads } => separate(&stored, out, mapped.shape[0], heads),
            _ => transpose(&stored, out, mapped.shape[0]),
        }
        Ok(())
    }

    fn mapped(&self, name: &str) -> Result<&Mapped> {
        self.tensors.get(name).ok_or_else(|| {
            let near = nearest(name, self.tensors.keys().map(String::as_str));
            Error::tensor(self.gguf.path(), name, format!("is missing{near}"))
        })
    }
}

/// Undoes the interleaving of rotary rows: row `2i + p` of each head -> row `p · d/2 + i`.
///
/// stored: [rows, columns] -> out: [rows, columns]; a bias has one column.
fn separate(stored: &[f32], out: &mut [f32], rows: usize, heads: usize) {
    let (columns, half) = (stored.len() / rows, rows / heads / 2);
    for (row, out) in out.chunks_mut(columns).enumerate() {
        let (head, p, i) = (row / (2 * half), row / half % 2, row % half);
        let from = head * 2 * half + 2 * i + p;
        out.copy_from_slice(&stored[from * columns..][..columns]);
    }
}

/// stored: [out, in] -> out: [in, out], in squares that stay in the cache.
fn transpose(stored: &[f32], out: &mut [f32], rows: usize) {
    const SIDE: usize = 32;
    let columns = stored.len() / rows;
    for top in (0..rows).step_by(SIDE) {
        for left in (0..columns).step_by(SIDE) {
            for row in top..rows.min(top + SIDE) {
                for column in left..columns.min(left + SIDE) {
                    out[row * columns + column] = stored[column * rows + row];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotary_rows_are_separated_head_by_head() {
        // two heads of four values, two columns; rows numbered
        let stored: Vec<f32> = (0..8).flat_map(|r| [r as f32, r as f32 + 0.5]).collect();
        let mut out = vec![0.0; 16];
        separate(&stored, &mut out, 8, 2);
        let rows: Vec<f32> = out.chunks(2).map(|row| row[0]).collect();
        assert_eq!(rows, [0., 2., 1., 3., 4., 6., 5., 7.]);
    }

    #[test]
    fn transposition_of_an_odd_shape() {
        let (rows, columns) = (37, 70);
        let stored: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect(); // [70, 37]
        let mut out = vec![0.0; stored.len()];
        transpose(&stored, &mut out, rows);
        for r in 0..rows {
            for c in 0..columns {
                assert_eq!(out[r * columns + c], (c * rows + r) as f32);
            }
        }
    }
}
