//! Training on a GPU against training on the CPU. Needs a build with `--features cuda` and an NVIDIA GPU; elsewhere the
//! comparison is skipped aloud and only the CPU's half runs.

use serde_json::json;
use tailfuse::device::{Device, DeviceChoice};
use tailfuse::interactions::Histories;
use tailfuse::recommenders::{FitContext, Interactions, Unwatched, registry};

const USERS: usize = 60;
const ITEMS: usize = 90;

/// Histories of 3 to 22 items with a taste: users prefer items of their own third.
fn histories() -> Histories {
    let pairs = (0..USERS).flat_map(|user| {
        (0..3 + user * 7 % 20).map(move |n| {
            let item = if n % 4 == 3 { (user * 31 + n * 17) % ITEMS } else { (user * 13 + n * 5) % 30 + user % 3 * 30 };
            (user as u32, item as u32)
        })
    });
    Histories::from_pairs(USERS, &pairs.collect::<Vec<(u32, u32)>>())
}

/// Losses of ten epochs of one step each.
fn losses(backbone: &str, hyper: &serde_json::Value, device: &Device) -> Vec<f64> {
    let train = histories();
    let data = Interactions { n_users: USERS, n_items: ITEMS, train: &train, valid: &[] };
    let recommender = registry::find(backbone).unwrap().recommender(hyper).unwrap();
    let ctx = FitContext { seed: 7, device, watch: &Unwatched, checkpoints: None, warm: None };
    let fit = recommender.fit(&data, &ctx).unwrap_or_else(|e| panic!("{backbone}: {}", e.message));
    fit.epochs.iter().map(|epoch| epoch.loss).collect()
}

#[test]
fn losses_of_ten_steps_on_a_gpu_equal_those_on_the_cpu() {
    let gpu = match DeviceChoice::Cuda.open() {
        Ok(opened) => Some(opened.device),
        Err(why) => {
            eprintln!("skipped: training on a GPU is not compared with the CPU: {}", why.message);
            None
        }
    };
    // More than there is to learn from, so an epoch is a step.
    let step = json!({ "epochs": 10, "batch_size": 65536, "learning_rate": 0.01 });
    for backbone in ["mf", "lightgcn", "mixgcf", "sgl", "sasrec", "bert4rec", "cl4srec"] {
        let cpu = losses(backbone, &step, &Device::Cpu);
        assert_eq!(cpu.len(), 10, "{backbone}");
        assert!(cpu.iter().all(|loss| loss.is_finite()) && cpu[9] < cpu[0], "{backbone}: {cpu:?}");
        let Some(gpu) = &gpu else { continue };
        for (n, (got, want)) in losses(backbone, &step, gpu).iter().zip(&cpu).enumerate() {
            let step = n + 1;
            assert!((got / want - 1.0).abs() < 1e-3, "{backbone}, step {step}: {got} on the GPU, {want} on the CPU");
        }
    }
}
