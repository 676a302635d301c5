//! Runs `src/device/gpu_kernel.rs` through cubecl's wgpu runtime and compares it with the CPU's product.
//!
//! Out: a line per matrix with the largest difference, relative to the largest number, and the time of a product.
#![allow(dead_code)]

use std::time::Instant;

use cubecl::Runtime;
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};
use gpu_kernel::GpuCsr;
use recommenders::sparse::{Csr, kernel::csr_matmul};

/// What the included files ask of the project's errors.
mod error {
    #[derive(Debug)]
    pub struct Error(pub String);

    impl Error {
        pub fn internal(told: String) -> Self {
            Error(told)
        }
    }

    pub type Result<T> = std::result::Result<T, Error>;
}

#[path = "../../../src/recommenders"]
mod recommenders {
    pub mod sparse {
        pub mod csr;
        pub mod kernel;

        pub use csr::Csr;
    }
}

#[path = "../../../src/device/gpu_kernel.rs"]
mod gpu_kernel;

/// Entries per row, columns, width of the dense matrix.
fn cases() -> Vec<(Vec<usize>, usize, usize)> {
    vec![
        // Rows around the length of a piece, one far longer, empty ones.
        (vec![3, 0, 255, 256, 257, 70_000, 1, 0], 70_000, 5),
        // The graph of MovieLens 100K, about.
        ((0..2625).map(|n| (n * 37) % 180).collect(), 2625, 64),
        (vec![0, 0], 3, 4),
        (vec![1, 2, 3], 3, 1),
    ]
}

fn main() {
    let client = WgpuRuntime::client(&WgpuDevice::default());
    println!("runtime {}", WgpuRuntime::name(&client));
    let mut worst = 0f64;
    for (lengths, columns, dim) in cases() {
        let row = |(row, &n): (usize, &usize)| {
            (0..n)
                .map(|k| (row as u32, ((k * 7 + row) % columns) as u32, ((k + row) as f32 * 0.37).sin()))
                .collect::<Vec<_>>()
        };
        let entries: Vec<(u32, u32, f32)> = lengths.iter().enumerate().flat_map(row).collect();
        let csr = Csr::from_entries(lengths.len(), columns, &entries).expect("the indices are inside");
        let dense: Vec<f32> = (0..columns * dim).map(|n| (n as f32 * 0.11).sin()).collect();
        let mut want = vec![0f32; csr.rows() * dim];
        csr_matmul(&csr, &dense, dim, &mut want);

        let on_gpu = GpuCsr::new(&csr, &client);
        let product = || {
            let dense = client.create_from_slice(bytemuck::cast_slice(&dense));
            let start = Instant::now();
            let bytes = client.read_one_unchecked(on_gpu.product(&client, dense, dim));
            (bytemuck::pod_collect_to_vec::<u8, f32>(&bytes), start.elapsed())
        };
        let (got, _) = product();
        let (again, time) = product();
        assert_eq!(got.len(), want.len());
        assert!(got.iter().zip(&again).all(|(a, b)| a.to_bits() == b.to_bits()), "the same product has other bits");
        let largest = want.iter().fold(1f32, |m, x| m.max(x.abs()));
        let difference = got.iter().zip(&want).map(|(a, b)| f64::from((a - b).abs() / largest)).fold(0.0, f64::max);
        worst = worst.max(difference);
        println!(
            "{} rows, {} entries, width {dim}: largest difference {difference:.1e}, {:.1} ms",
            csr.rows(),
            csr.nonzeros(),
            time.as_secs_f64() * 1e3
        );
    }
    assert!(worst < 1e-5, "the kernel is off by {worst}");
    println!("the kernel agrees with the CPU's product");
}
