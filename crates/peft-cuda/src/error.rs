//! What can be missing, and what can go wrong on the way to a kernel.

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why nothing was launched, or what became of it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The driver of a GPU is not on this machine, or lacks what is asked of it.
    #[error("no driver for CUDA: {0}")]
    NoDriver(String),
    /// The driver has no such device.
    #[error("no GPU {ordinal}: the driver finds {count}")]
    NoDevice {
        /// Which was asked for.
        ordinal: i32,
        /// How many there are.
        count: i32,
    },
    /// The driver cannot move memory away from this device while it is in use.
    #[error(
        "GPU {ordinal} has no memory that the driver moves under pressure (concurrent managed access)"
    )]
    Unmovable {
        /// Which.
        ordinal: i32,
    },
    /// The compiler is not on this machine.
    #[error(
        "no NVRTC to compile kernels with, looked at [{}]; `pip install nvidia-cuda-nvrtc` brings one, PEFT_NVRTC names its libnvrtc.so",
        .looked.join(", ")
    )]
    NoNvrtc {
        /// The files and names that were tried, with what the loader said.
        looked: Vec<String>,
    },
    /// The compiler refuses.
    #[error("{source_file} for {target}: {log}")]
    Compile {
        /// Which file of kernels.
        source_file: &'static str,
        /// For which GPUs.
        target: String,
        /// What the compiler says.
        log: String,
    },
    /// A call of the driver's failed.
    #[error("{call}: {text}")]
    Driver {
        /// Which.
        call: &'static str,
        /// What the driver says.
        text: String,
    },
    /// A kernel was refused, or one before it has failed.
    #[error("launching {kernel}: {text}")]
    Launch {
        /// Which.
        kernel: String,
        /// What the driver says.
        text: String,
    },
    /// libtorch's CUDA half, whose stream was asked for, is not loaded.
    #[error("libtorch_cuda is not loaded, or is none that has `{0}`")]
    NoTorch(&'static str),
    /// libtorch gives no stream.
    #[error("libtorch has no stream for GPU {ordinal}: {code}")]
    NoStream {
        /// The device.
        ordinal: i32,
        /// What it returned.
        code: i32,
    },
    /// Memory of another size.
    #[error("{what}: expected {expected} bytes, got {got}")]
    Bytes {
        /// What it holds.
        what: &'static str,
        /// How many there should be.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// An address that no number of the format can have.
    #[error("{what}: address {address:#x} is no multiple of {align}")]
    Address {
        /// What lies there.
        what: &'static str,
        /// Where.
        address: u64,
        /// What it should be a multiple of.
        align: u64,
    },
    /// A product that the kernels are not made for.
    #[error(
        "{rows} rows of {inp} numbers with a weight of {len}: expected 1 to 8 rows, and whole rows in the weight"
    )]
    Shape {
        /// Rows of x.
        rows: usize,
        /// Numbers of a row.
        inp: usize,
        /// Numbers of the weight.
        len: usize,
    },
}
