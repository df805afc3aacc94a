//! Compiles the C++ shim against the libtorch that `LIBTORCH` names.

use std::{env, path::Path};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=cpp");
    let libtorch = env::var("LIBTORCH").unwrap_or_default();
    let include = Path::new(&libtorch).join("include");
    assert!(
        include.join("ATen/ATen.h").exists(),
        "no libtorch headers at `{}`; run `cargo xtask setup` first",
        include.display()
    );

    let linux = env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .opt_level(3)
        // libtorch's headers make 50 MB of it, which every program and every test would carry.
        .debug(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"));
    if linux {
        // at::parallel_for is a header that opens an OpenMP region.
        build.flag("-fopenmp");
    }
    build
        .clone()
        .file("cpp/autograd.cpp")
        .file("cpp/ops.cpp")
        .compile("peft_torch_shim");
    build
        .file("cpp/kernels.cpp")
        .file("cpp/thin.cpp")
        // A note on how vectors are passed between functions; here they are all inlined.
        .flag_if_supported("-Wno-psabi")
        // Sums may be reordered (so that they become vectors); NaN and infinity keep their meaning.
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .flag("-fno-signed-zeros")
        .flag("-fassociative-math")
        .flag_if_supported("-mprefer-vector-width=512")
        .compile("peft_torch_kernels");

    println!("cargo:rustc-link-search=native={libtorch}/lib");
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    if linux {
        println!("cargo:rustc-link-lib=gomp");
    }
}
