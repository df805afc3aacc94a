//! `cargo xtask dist`: an archive that runs on a machine without Rust and without Python.
//!
//! `bin/peft` finds `lib/` beside itself (the path is linked in, `.cargo/config.toml`), so the archive can be
//! unpacked anywhere and needs no installer. What was packed is unpacked again and started with an empty
//! environment before the task calls itself done.

use crate::{files, libtorch, paths, run, ui, wheel};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Flags of `cargo xtask dist`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The profile to build with; `dev` is optimised too, and compiles nothing twice
    #[arg(long, default_value = "release")]
    profile: String,
}

/// `cargo xtask dist`.
pub(crate) fn dist(args: &Args) -> Result<()> {
    ui::step(1, 3, "Build");
    libtorch::ensure()?;
    run::run(&mut run::cargo(&[
        "build",
        "--package",
        "peft-cli",
        "--profile",
        &args.profile,
    ]))?;
    let folder = if args.profile == "dev" {
        "debug"
    } else {
        &args.profile
    };

    ui::step(2, 3, "Pack");
    let out = paths::target().join("dist");
    fs::create_dir_all(&out).context("at `target/dist`")?;
    wheel::need_space(&out, 1_800_000_000, "the archive and its check")?;
    let name = format!("peft-{}-{}", env!("CARGO_PKG_VERSION"), triple()?);
    let stage = tempfile::tempdir_in(&out)?;
    fill(&stage.path().join(&name), &paths::peft(folder))?;
    let packed = stage.path().join("packed.tar.gz");
    run::run(
        Command::new("tar")
            .arg("czf")
            .arg(&packed)
            .arg("-C")
            .arg(stage.path())
            .arg(&name),
    )?;

    ui::step(
        3,
        3,
        "Unpack it elsewhere and start it with an empty environment",
    );
    fs::remove_dir_all(stage.path().join(&name))?;
    let elsewhere = tempfile::tempdir_in(&out)?;
    run::run(
        Command::new("tar")
            .arg("xzf")
            .arg(&packed)
            .arg("-C")
            .arg(elsewhere.path()),
    )?;
    let said = check(&elsewhere.path().join(&name))?;
    ui::say(said.trim());

    let archive = out.join(format!("{name}.tar.gz"));
    fs::rename(&packed, &archive).context("at `target/dist`")?;
    let sum = format!("{}  {name}.tar.gz\n", wheel::sha256(&archive)?);
    fs::write(out.join(format!("{name}.tar.gz.sha256")), sum)?;
    let size = fs::metadata(&archive)?.len();
    println!(
        "\n{} ({})",
        ui::bold(paths::short(&archive)),
        ui::bytes(size)
    );
    Ok(())
}

/// Lays out the archive's folder.
fn fill(to: &Path, program: &Path) -> Result<()> {
    let root = paths::root();
    for folder in ["bin", "lib", "licenses"] {
        fs::create_dir_all(to.join(folder))?;
    }
    files::copy(program, &to.join("bin/peft"))?;
    // Debug lines are of no use there; where there is no `strip`, the program is only larger.
    let _ = Command::new("strip")
        .arg("--strip-debug")
        .arg(to.join("bin/peft"))
        .status();
    for library in libraries()? {
        let name = library.file_name().context("a library without a name")?;
        files::copy(&library, &to.join("lib").join(name))?;
    }
    files::copy_tree(&licences()?, &to.join("licenses"))?;
    for file in ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"] {
        files::copy(&root.join(file), &to.join(file))?;
    }
    Ok(())
}

/// The libraries that run-time linking needs: without those names that are only for the compiler's linker.
fn libraries() -> Result<Vec<PathBuf>> {
    let lib = paths::libtorch().join("lib");
    let mut found = Vec::new();
    for entry in fs::read_dir(&lib).context("at `target/libtorch/lib`")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if cfg!(target_os = "macos") || !["libtorch.so", "libgomp.so"].contains(&name.as_str()) {
            found.push(lib.join(name));
        }
    }
    Ok(found)
}

/// libtorch's licence and those of what it brings.
fn licences() -> Result<PathBuf> {
    let ours = paths::libtorch().join("licenses");
    if ours.is_dir() {
        return Ok(ours);
    }
    Err(ui::problem(
        "libtorch's licence, which must go with it, is not in target/libtorch/licenses",
        "an archive is made from the pinned wheels: deactivate the Python environment, unset LIBTORCH,\nand run `cargo xtask setup --force`",
    ))
}

/// Starts the unpacked program as on a bare machine and makes sure that it uses the libraries beside it.
fn check(unpacked: &Path) -> Result<String> {
    let program = unpacked.join("bin/peft");
    let said = run::output(
        Command::new(&program)
            .arg("--version")
            .env_clear()
            .current_dir("/"),
    )?;
    if let Ok(list) = run::output(
        Command::new("ldd")
            .arg(&program)
            .env_clear()
            .env("PATH", "/usr/bin:/bin"),
    ) {
        let here = unpacked.canonicalize()?.display().to_string();
        let torch = list.lines().find(|line| line.contains("libtorch_cpu"));
        if let Some(line) = torch
            .filter(|line| !line.contains(&here) && !line.contains(&unpacked.display().to_string()))
        {
            bail!(
                "the unpacked program takes its libtorch from elsewhere: {}",
                line.trim()
            );
        }
    }
    Ok(said)
}

/// The platform's name, as rustc gives it.
fn triple() -> Result<String> {
    let text = run::output(Command::new("rustc").arg("-vV"))?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.to_owned())
}
