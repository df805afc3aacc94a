//! GGUF files: metadata, dequantisation, tokenizer and Hugging Face folder
