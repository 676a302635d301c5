//! Where tensors live. The only file with `cfg(feature)` for back ends.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
