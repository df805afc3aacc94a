//! The state of libtorch's random generators.
//!
//! Dropout masks and initial values come from here, so a run that is to
//! continue to the same bits saves this beside its weights.

use crate::ffi;
use tch::{Device, TchError, Tensor};

/// The state of the default generator of `device`, as opaque bytes (`uint8`, one dimension).
pub fn state(device: Device) -> Result<Tensor, TchError> {
    ffi::rng_get(index(device)?)
}

/// Puts a state back that [`state`] has given. A state of another kind of device is an error.
pub fn set_state(device: Device, state: &Tensor) -> Result<(), TchError> {
    ffi::rng_set(index(device)?, &state.to_device(Device::Cpu))
}

/// Runs `body` with the generators seeded, and leaves them as they were: for numbers that a seed alone decides.
pub fn with_seed<T>(seed: i64, body: impl FnOnce() -> T) -> Result<T, TchError> {
    let cards = match tch::Cuda::is_available() {
        true => tch::Cuda::device_count().max(0) as usize,
        false => 0,
    };
    // libtorch seeds those of the graphics cards along.
    let before = snapshot((0..cards).map(Device::Cuda))?;
    tch::manual_seed(seed);
    let result = body();
    restore(&before)?;
    Ok(result)
}

/// The states of the generators of the processor and of `devices`, each once.
pub(crate) fn snapshot(
    devices: impl IntoIterator<Item = Device>,
) -> Result<Vec<(Device, Tensor)>, TchError> {
    let mut all = vec![Device::Cpu];
    for device in devices {
        if !all.contains(&device) {
            all.push(device);
        }
    }
    let one = |device| Ok((device, state(device)?));
    all.into_iter().map(one).collect()
}

/// Puts back what [`snapshot`] has given.
pub(crate) fn restore(states: &[(Device, Tensor)]) -> Result<(), TchError> {
    let mut states = states.iter();
    states.try_for_each(|(device, state)| set_state(*device, state))
}

fn index(device: Device) -> Result<i32, TchError> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(i) => Ok(i as i32),
        other => Err(TchError::Torch(format!("no random state for {other:?}"))),
    }
}
