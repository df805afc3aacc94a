//! `cargo run -p peft-gguf --example import -- FILE.gguf FOLDER [f32|f16|bf16]`

use peft_gguf::{Dtype, import};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, out, rest @ ..] = args.as_slice() else {
        return Err("usage: import FILE.gguf FOLDER [f32|f16|bf16]".into());
    };
    let dtype = match rest.first().map_or("f32", String::as_str) {
        "f32" => Dtype::F32,
        "f16" => Dtype::F16,
        "bf16" => Dtype::BF16,
        other => return Err(format!("unknown dtype `{other}`, expected f32, f16 or bf16").into()),
    };
    let start = std::time::Instant::now();
    let imported = import(Path::new(file), Path::new(out), dtype, &mut |_, _, _| {})?;
    println!("{imported:#?}\nin {:.2?}", start.elapsed());
    Ok(())
}
