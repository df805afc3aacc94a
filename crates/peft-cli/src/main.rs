//! The program `peft`.
fn main() {}
