//! Examples of all tasks -> the tables.
//!
//! In: a [`Maker`]. Out: `instructions` without repeats, at most `per_task` of each task, tasks mixed; `counts`.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Int32Array, Int64Array, StringArray};
use arrow::datatypes::DataType;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::examples::{Draw, Example, Made, Maker};
use crate::error::Result;
use crate::interactions::user_rng;
use crate::prompts::InstructionTask;
use crate::stages::context::{Cancel, Observer, StageResult};
use crate::tables::schemas::{INSTRUCTION_COUNTS, INSTRUCTIONS};

/// Draws between two looks at the stop request and the progress.
const BLOCK: usize = 512;

/// What was left out, and why.
#[derive(Default)]
struct Tally {
    duplicates: usize,
    nothing: usize,
    too_long: usize,
}

/// Makes the mixture.
pub(super) fn mix(maker: &Maker<'_>, observer: &dyn Observer, cancel: &Cancel) -> Result<StageResult> {
    let tasks = maker.config.tasks();
    observer.begin("instructions", (tasks.len() * maker.config.per_task) as u64);
    let mut tally = Tally::default();
    let mut rows: Vec<(InstructionTask, Example)> = Vec::new();
    for task in tasks {
        let made = task_examples(maker, task, &mut tally, &|n| {
            observer.advance(n as u64);
            cancel.check()
        })?;
        rows.extend(made.into_iter().map(|example| (task, example)));
    }
    rows.shuffle(&mut stream(maker.seed, InstructionTask::ALL.len() as u64));
    let n_users = maker.world.users.len();
    let held_out: Vec<bool> = (0..n_users).map(|user| is_held_out(maker, user)).collect();
    let train = &maker.world.train;
    let too_few = (0..n_users).filter(|&u| train.of(u).len() < maker.config.min_interactions).count();
    let sum = |f: &dyn Fn(&Example) -> usize| rows.iter().map(|(_, e)| f(e)).sum::<usize>();
    Ok(StageResult::default()
        .with_table("instructions", instructions(maker, &rows, &held_out)?)
        .with_table("counts", counts(&rows, &held_out)?)
        .with_counter("users", n_users)
        .with_counter("users_too_few", too_few)
        .with_counter("users_held_out", held_out.iter().filter(|h| **h).count())
        .with_counter("instructions", rows.len())
        .with_counter("augmented", sum(&|e| usize::from(e.augmented)))
        .with_counter("duplicates_dropped", tally.duplicates)
        .with_counter("no_example", tally.nothing)
        .with_counter("too_long", tally.too_long)
        .with_counter("trimmed", sum(&|e| usize::from(e.trimmed > 0)))
        .with_counter("tokens", sum(&|e| e.tokens))
        .with_counter("tokens_max", rows.iter().map(|(_, e)| e.tokens).max().unwrap_or(0)))
}

/// A generator of the seed and a number.
fn stream(seed: u64, number: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(number);
    rng
}

/// A function of seed and id alone.
fn is_held_out(maker: &Maker<'_>, user: usize) -> bool {
    let id = maker.world.users.ids().get(user);
    user_rng(maker.seed, "held-out instructions", &id, 0).random_bool(maker.config.held_out_share)
}

/// At most `per_task` distinct examples of one task, in the order of the draws.
fn task_examples(
    maker: &Maker<'_>,
    task: InstructionTask,
    tally: &mut Tally,
    progress: &dyn Fn(usize) -> Result<()>,
) -> Result<Vec<Example>> {
    let train = &maker.world.train;
    let enough = |user: &usize| train.of(*user).len() >= maker.config.min_interactions;
    // The first interaction has nothing before it.
    let mut draws: Vec<Draw> = (0..train.n_users())
        .filter(enough)
        .flat_map(|user| (1..train.of(user).len()).map(move |at| (user as u32, at as u32)))
        .collect();
    draws.shuffle(&mut stream(maker.seed, task as u64));
    let mut taken = HashSet::new();
    let mut examples: Vec<Example> = Vec::new();
    let mut rest = draws.as_slice();
    while examples.len() < maker.config.per_task && !rest.is_empty() {
        let before = examples.len();
        // Never more than are still wanted: the text of a draw that is not needed is work for nothing.
        let (block, later) = rest.split_at((maker.config.per_task - before).min(BLOCK).min(rest.len()));
        rest = later;
        let scores = match task {
            InstructionTask::Ranking => maker.scores(block)?,
            _ => vec![None; block.len()],
        };
        // Collected before looking at errors, so that the first draw's is reported on any number of threads.
        let made: Vec<Result<Made>> =
            block.par_iter().zip(&scores).map(|(&draw, s)| maker.make(task, draw, s.as_deref())).collect();
        for made in made {
            match made? {
                Made::Nothing => tally.nothing += 1,
                Made::TooLong => tally.too_long += 1,
                Made::Example(example) if taken.insert(example.digest) => examples.push(example),
                Made::Example(_) => tally.duplicates += 1,
            }
        }
        progress(examples.len() - before)?;
    }
    Ok(examples)
}

fn split_name(held_out: bool) -> &'static str {
    if held_out { "held-out" } else { "train" }
}

fn instructions(
    maker: &Maker<'_>,
    rows: &[(InstructionTask, Example)],
    held_out: &[bool],
) -> Result<crate::tables::Table> {
    let text = |f: &dyn Fn(&(InstructionTask, Example)) -> String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(f)))
    };
    let users = maker.world.users.ids().take(rows.iter().map(|(_, e)| e.user as usize));
    INSTRUCTIONS.table(
        &users.data_type(),
        // There is no item column.
        &DataType::Utf8,
        vec![
            text(&|(task, _)| task.name().to_owned()),
            users.to_array(),
            text(&|(task, _)| maker.system(*task).to_owned()),
            text(&|(_, e)| e.prompt.clone()),
            text(&|(_, e)| e.response.clone()),
            text(&|(_, e)| split_name(held_out[e.user as usize]).to_owned()),
            Arc::new(BooleanArray::from_iter(rows.iter().map(|(_, e)| Some(e.augmented)))),
            Arc::new(Int32Array::from_iter_values(rows.iter().map(|(_, e)| e.tokens as i32))),
        ],
    )
}

fn counts(rows: &[(InstructionTask, Example)], held_out: &[bool]) -> Result<crate::tables::Table> {
    #[derive(Default)]
    struct Group {
        instructions: i64,
        users: HashSet<u32>,
        tokens: i64,
        longest: i32,
    }
    let mut groups = BTreeMap::<(&str, bool, &str), Group>::new();
    for (task, e) in rows {
        let group = groups.entry((task.name(), e.augmented, split_name(held_out[e.user as usize]))).or_default();
        group.instructions += 1;
        group.users.insert(e.user);
        group.tokens += e.tokens as i64;
        group.longest = group.longest.max(e.tokens as i32);
    }
    INSTRUCTION_COUNTS.table(
        &DataType::Utf8,
        &DataType::Utf8,
        vec![
            Arc::new(StringArray::from_iter_values(groups.keys().map(|k| k.0))),
            Arc::new(BooleanArray::from_iter(groups.keys().map(|k| Some(k.1)))),
            Arc::new(StringArray::from_iter_values(groups.keys().map(|k| k.2))),
            Arc::new(Int64Array::from_iter_values(groups.values().map(|g| g.instructions))),
            Arc::new(Int64Array::from_iter_values(groups.values().map(|g| g.users.len() as i64))),
            Arc::new(Int64Array::from_iter_values(groups.values().map(|g| g.tokens))),
            Arc::new(Int32Array::from_iter_values(groups.values().map(|g| g.longest))),
        ],
    )
}
