//! Where tensors live. The only file with `cfg(feature)` for back ends.
//!
//! In: `device = "auto" | "cpu" | "cuda"` of the pipeline file. Out: a [`Device`] and the
//! reason why it was chosen. Code that is generic over the back end implements [`OnBackend`];
//! [`Device::run`] calls it with the back end's type:
//!
//! ```ignore
//! struct Norm(Vec<f32>);
//! impl OnBackend for Norm {
//!     type Output = f32;
//!     fn on<B: ModelBackend>(self, device: &B::Device) -> f32 {
//!         Tensor::<B, 1>::from_floats(self.0.as_slice(), device).powi_scalar(2).sum().into_scalar().elem()
//!     }
//! }
//! let norm = DeviceChoice::Auto.open()?.device.run(Norm(vec![3.0, 4.0]));
//! ```

#[cfg(feature = "gpu")]
mod gpu;
#[cfg(feature = "gpu")]
mod gpu_kernel;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::recommenders::ops::FusedBackend;
use crate::recommenders::optim::AdamBackend;
use crate::recommenders::sparse::SparseBackend;

/// `device = "auto" | "cpu" | "cuda"` of the pipeline file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    /// CUDA where this build and the machine have it, else the CPU; said aloud.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA, or an error.
    Cuda,
}

/// What every back end of the house can do: all of Burn's operations and our own.
///
/// A new operation of ours becomes one more supertrait here.
pub trait ModelBackend: SparseBackend + AdamBackend + FusedBackend {}
impl<B: SparseBackend + AdamBackend + FusedBackend> ModelBackend for B {}

/// Work that runs on whichever back end was chosen.
pub trait OnBackend {
    /// What it gives back (no tensors: their type would depend on the back end).
    type Output;
    /// Does the work with tensors on `device`. For gradients use `burn::backend::Autodiff<B>`.
    fn on<B: ModelBackend>(self, device: &B::Device) -> Self::Output;
}

/// A device that is there.
#[derive(Clone, Debug)]
pub enum Device {
    /// Burn's Flex back end on this machine's cores (Rayon's global pool).
    Cpu,
    /// Burn's CUDA back end.
    #[cfg(feature = "cuda")]
    Cuda(burn::backend::cuda::CudaDevice),
}

/// A device with the reason for it.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The device.
    pub device: Device,
    /// One line for the log: what was chosen and why.
    pub why: String,
}

impl Device {
    /// Runs `work` on this device's back end.
    pub fn run<W: OnBackend>(&self, work: W) -> W::Output {
        match self {
            Device::Cpu => work.on::<burn::backend::Flex>(&Default::default()),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => work.on::<burn::backend::Cuda>(device),
        }
    }

    /// `cpu` or `cuda`.
    pub fn name(&self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => "cuda",
        }
    }
}

impl DeviceChoice {
    /// Opens the device. `auto` never fails: it takes the CPU where CUDA is not to be had and says why.
    ///
    /// # Errors
    /// `cuda` in a build without the feature (exit 78), or on a machine whose driver, GPU or
    /// run-time compiler is missing (exit 75).
    pub fn open(self) -> Result<Opened> {
        let cpu = |why: &str| {
            keep_freed_memory();
            Opened { device: Device::Cpu, why: format!("device: cpu ({why})") }
        };
        match self {
            DeviceChoice::Cpu => Ok(cpu("as asked")),
            DeviceChoice::Auto => match open_cuda() {
                Ok(device) => Ok(Opened { device, why: "device: cuda (found by `auto`)".to_owned() }),
                Err(e) => Ok(cpu(&format!("`auto`; {}", e.message))),
            },
            DeviceChoice::Cuda => {
                open_cuda().map(|device| Opened { device, why: "device: cuda (as asked)".to_owned() })
            }
        }
    }
}

/// Lets glibc keep what tensors free, for the next tensors.
///
/// Burn allocates a buffer for each result. By default glibc gives such blocks back to the kernel
/// at once and asks for zeroed pages again, which costs as much time as the arithmetic on
/// them (measured on LightGCN: half of an epoch). This setting holds for the whole process; what a process
/// needs at its peak does not change.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        // SAFETY: `mallopt` changes tuning parameters of the allocator and may be called at any time.
        ONCE.call_once(|| unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20); // the greatest value that glibc takes
            libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
        });
    }
}

#[cfg(not(feature = "cuda"))]
fn open_cuda() -> Result<Device> {
    Err(Error::spec("this build has no CUDA back end")
        .with_help("build with `--features cuda`, or set `device = \"cpu\"` (or `\"auto\"`) in the pipeline file"))
}

#[cfg(feature = "cuda")]
fn open_cuda() -> Result<Device> {
    let way_out = "install the NVIDIA driver and NVRTC (part of the CUDA toolkit), or set `device = \"cpu\"`";
    driver::gpus().map_err(|what| Error::environment(what).with_help(way_out))?;
    Ok(Device::Cuda(burn::backend::cuda::CudaDevice::new(0)))
}

/// Looks for a GPU before Burn does, which would panic where there is none.
#[cfg(all(feature = "cuda", unix))]
mod driver {
    use std::ffi::{CStr, c_int, c_uint, c_void};

    /// Names under which the run-time compiler is installed, newest first.
    const NVRTC: [&CStr; 4] = [c"libnvrtc.so", c"libnvrtc.so.13", c"libnvrtc.so.12", c"libnvrtc.so.11.2"];

    fn open(name: &CStr) -> Option<*mut c_void> {
        // SAFETY: `name` is a valid C string; loading a library runs its own initialisers only.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        (!handle.is_null()).then_some(handle)
    }

    fn symbol(library: *mut c_void, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: `library` came from `dlopen` and is never closed.
        let address = unsafe { libc::dlsym(library, name.as_ptr()) };
        (!address.is_null()).then_some(address)
    }

    /// The number of GPUs, at least 1; else one line about what is missing.
    pub fn gpus() -> Result<usize, String> {
        let library = open(c"libcuda.so.1").or_else(|| open(c"libcuda.so")).ok_or("no NVIDIA driver was found")?;
        let (Some(init), Some(count)) = (symbol(library, c"cuInit"), symbol(library, c"cuDeviceGetCount")) else {
            return Err("the NVIDIA driver library is not usable".to_owned());
        };
        let mut n: c_int = 0;
        // SAFETY: the signatures are those of the CUDA driver API, and `n` outlives the call.
        let (code, code_count) = unsafe {
            let init = std::mem::transmute::<*mut c_void, extern "C" fn(c_uint) -> c_int>(init);
            let count = std::mem::transmute::<*mut c_void, extern "C" fn(*mut c_int) -> c_int>(count);
            let code = init(0);
            (code, if code == 0 { count(&mut n) } else { code })
        };
        if code != 0 || code_count != 0 || n < 1 {
            return Err(format!("the NVIDIA driver reports no usable GPU (CUDA error {code_count}, {n} devices)"));
        }
        if !NVRTC.iter().any(|name| open(name).is_some()) {
            return Err("a GPU is there, but the CUDA run-time compiler (libnvrtc) is not".to_owned());
        }
        Ok(n as usize)
    }
}

/// Only Linux is known to work with the CUDA back end.
#[cfg(all(feature = "cuda", not(unix)))]
mod driver {
    /// Always an error here.
    pub fn gpus() -> Result<usize, String> {
        Err("the CUDA back end is supported on Linux only".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{ElementConversion, Tensor};

    struct Norm(Vec<f32>);

    impl OnBackend for Norm {
        type Output = f32;
        fn on<B: ModelBackend>(self, device: &B::Device) -> f32 {
            Tensor::<B, 1>::from_floats(self.0.as_slice(), device).powi_scalar(2).sum().sqrt().into_scalar().elem()
        }
    }

    #[test]
    fn generic_work_runs_on_the_cpu() {
        let opened = DeviceChoice::Cpu.open().unwrap();
        assert_eq!(opened.device.name(), "cpu");
        assert!((opened.device.run(Norm(vec![3.0, 4.0])) - 5.0).abs() < 1e-6);
    }

    #[test]
    fn auto_always_opens_and_says_what() {
        let opened = DeviceChoice::Auto.open().unwrap();
        assert!(opened.why.contains(opened.device.name()), "{}", opened.why);
        assert!(opened.why.contains("auto"), "{}", opened.why);
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn cuda_without_the_feature_is_a_mistake_of_the_pipeline_file() {
        let error = DeviceChoice::Cuda.open().unwrap_err();
        assert_eq!(error.fault.exit_code(), 78);
        assert!(error.help.unwrap().contains("--features cuda"));
    }
}
