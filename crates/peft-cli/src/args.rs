//! Flags that several commands share.

use std::path::Path;

use anyhow::{Result, bail};
use clap::ValueEnum;
use peft::torch::{cuda, memory};
use tch::{Device, Kind};

use crate::error::usage;

/// What holds for the whole program.
#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// Colours: where the output is a terminal, always, or never
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = "Program"
    )]
    color: Color,
    /// Processor threads [default: one per core]
    #[arg(long, global = true, value_name = "N", help_heading = "Program", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

impl Global {
    /// Prepares the terminal and libtorch.
    pub(crate) fn apply(&self) {
        match self.color {
            Color::Auto => {}
            Color::Always | Color::Never => {
                let on = self.color == Color::Always;
                console::set_colors_enabled(on);
                console::set_colors_enabled_stderr(on);
            }
        }
        memory::keep_freed_blocks();
        if let Some(threads) = self.threads {
            tch::set_num_threads(i32::from(threads));
            // Refused only where the pool runs already, and nothing has started it yet.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
            let _ = pool.build_global();
        }
    }
}

/// Where and in which number format a model computes.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Computing")]
pub(crate) struct Compute {
    /// cpu, cuda, cuda:N, or auto: a GPU where there is one
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    device: DeviceChoice,
    /// Number format of the model: auto is bf16 where the hardware multiplies it, else fp32
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: DtypeChoice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda(usize),
}

fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceChoice::Auto),
        None if text == "cpu" => Ok(DeviceChoice::Cpu),
        None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
        Some(("cuda", index)) => {
            let index = index.parse().ok().filter(|&it: &usize| it < 1024);
            index
                .map(DeviceChoice::Cuda)
                .ok_or_else(|| "the part behind `cuda:` is no device number".to_owned())
        }
        _ => Err("known are `auto`, `cpu`, `cuda` and `cuda:N`".to_owned()),
    }
}

/// A number format to compute or save in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeChoice {
    Auto,
    #[value(alias = "float32", alias = "f32")]
    Fp32,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "float16", alias = "f16")]
    Fp16,
}

impl DtypeChoice {
    /// The format, unless it is left open.
    pub(crate) fn kind(self) -> Option<Kind> {
        match self {
            DtypeChoice::Auto => None,
            DtypeChoice::Fp32 => Some(Kind::Float),
            DtypeChoice::Bf16 => Some(Kind::BFloat16),
            DtypeChoice::Fp16 => Some(Kind::Half),
        }
    }
}

/// Where to compute, in which format, and why that one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placement {
    /// The device.
    pub(crate) device: Device,
    /// The number format.
    pub(crate) kind: Kind,
    /// Why this format, in words.
    pub(crate) why: &'static str,
}

impl Compute {
    /// Decides; an error where a device is asked for and not there.
    pub(crate) fn place(&self) -> Result<Placement> {
        let device = self.device()?;
        let (kind, why) = match self.dtype.kind() {
            Some(kind) => (kind, "as asked for"),
            None if device != Device::Cpu => (Kind::BFloat16, "a GPU multiplies bf16 fastest"),
            None if multiplies_bf16() => (Kind::BFloat16, "this processor multiplies bf16"),
            None => (Kind::Float, "this processor has no bf16 arithmetic"),
        };
        Ok(Placement { device, kind, why })
    }

    /// The same, with fp32 where no format is asked for.
    pub(crate) fn place_exact(&self) -> Result<Placement> {
        let kind = self.dtype.kind().unwrap_or(Kind::Float);
        let device = self.device()?;
        Ok(Placement {
            device,
            kind,
            why: "exact",
        })
    }

    fn device(&self) -> Result<Device> {
        match self.device {
            DeviceChoice::Cpu => Ok(Device::Cpu),
            DeviceChoice::Auto => Ok(match cuda::load() {
                Ok(()) => Device::Cuda(0),
                Err(_) => Device::Cpu,
            }),
            DeviceChoice::Cuda(index) => {
                cuda::load()?;
                let count = tch::Cuda::device_count();
                if index as i64 >= count {
                    return Err(usage(format!(
                        "no device `cuda:{index}`: there are {count}, counted from 0"
                    )));
                }
                Ok(Device::Cuda(index))
            }
        }
    }
}

/// Whether bf16 products are computed by the processor itself, and not by way of fp32.
fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("bf16");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// `bf16` and so on.
pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Float => "fp32",
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        Kind::Double => "fp64",
        _ => "integers",
    }
}

/// Refuses a folder to write into that holds something.
pub(crate) fn fresh_folder(dir: &Path) -> Result<()> {
    if dir.read_dir().is_ok_and(|mut it| it.next().is_some()) || dir.is_file() {
        bail!(
            "{}: exists and is not empty; choose another folder",
            dir.display()
        );
    }
    // What is written takes the folder's place when it is whole.
    if dir.is_symlink() {
        bail!("{}: is a link; name the folder itself", dir.display());
    }
    if is_mounted(dir) {
        bail!(
            "{}: something is mounted there, so that no folder can take its place; name one inside",
            dir.display()
        );
    }
    Ok(())
}

/// Whether a folder lies on another file system than the one that holds it.
#[cfg(unix)]
fn is_mounted(dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| std::fs::metadata(path).map(|it| it.dev()).ok();
    device(dir).is_some_and(|own| device(&dir.join("..")) != Some(own))
}

/// Where systems do not say, nothing is.
#[cfg(not(unix))]
fn is_mounted(_: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_folder_to_write_is_empty_and_no_link() {
        let held = tempfile::tempdir().unwrap();
        let (empty, link, full) = (
            held.path().join("empty"),
            held.path().join("link"),
            held.path(),
        );
        std::fs::create_dir(&empty).unwrap();
        std::os::unix::fs::symlink(&empty, &link).unwrap();
        assert!(fresh_folder(&empty).is_ok() && fresh_folder(&full.join("new")).is_ok());
        for (dir, why) in [
            (full, "not empty"),
            (&link, "is a link"),
            (Path::new("/proc/self"), ""),
        ] {
            let error = fresh_folder(dir).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn devices_are_parsed_or_refused() {
        assert_eq!(parse_device("cuda:3"), Ok(DeviceChoice::Cuda(3)));
        assert_eq!(parse_device("cuda"), Ok(DeviceChoice::Cuda(0)));
        for bad in [
            "cuda:",
            "cuda:-1",
            "gpu",
            "cpu:0",
            "cuda:99999999999999999999",
            "",
        ] {
            assert!(parse_device(bad).is_err(), "{bad}");
        }
    }
}
