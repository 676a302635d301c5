//! One train interaction -> one instruction of a task.
//!
//! In: [`World`], a task, a user and a place in the user's train history. Out: [`Example`]. Every random choice is a function
//! of the seed, the task, the user's id and the place, so that neither other users nor the number of threads matter.

use std::collections::HashSet;

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

use super::InstructConfig;
use super::world::World;
use crate::error::{Error, Result};
use crate::interactions::{Histories, user_rng};
use crate::llm::Message;
use crate::prompts::{
    CandidateStyle, Fields, InstructionFields, InstructionTask, InstructionTemplates, Line, Templates, fit, label,
    rating_text,
};

/// Counts the tokens of a conversation with its answer.
pub(super) type Count<'a> = dyn Fn(&[Message]) -> Result<usize> + Sync + 'a;

/// A train interaction: user and place in the history.
pub(super) type Draw = (u32, u32);

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Example {
    pub(super) user: u32,
    pub(super) prompt: String,
    pub(super) response: String,
    pub(super) augmented: bool,
    pub(super) tokens: usize,
    /// Titles of the histories that were left out for the budget.
    pub(super) trimmed: usize,
    /// Of task, prompt and response.
    pub(super) digest: [u8; 32],
}

/// What came of a draw.
pub(super) enum Made {
    Example(Example),
    /// No title, no earlier item, or nothing unseen.
    Nothing,
    /// The budget is too small for it.
    TooLong,
}

/// Makes examples.
pub(super) struct Maker<'a> {
    pub(super) config: &'a InstructConfig,
    pub(super) world: &'a World,
    pub(super) seed: u64,
    budget: usize,
    templates: (Templates, InstructionTemplates),
    ranking_system: String,
    system: String,
    count: &'a Count<'a>,
}

/// Parts of an instruction before it is text.
struct Parts<'a> {
    history: Vec<Line<'a>>,
    similar: Vec<Line<'a>>,
    candidates: Vec<&'a str>,
    prediction: Vec<String>,
    field: &'a str,
    response: String,
}

impl<'a> Maker<'a> {
    pub(super) fn new(
        config: &'a InstructConfig,
        world: &'a World,
        templates: (Templates, InstructionTemplates),
        (seed, budget): (u64, usize),
        count: &'a Count<'a>,
    ) -> Result<Self> {
        let ranking_system = templates.0.system(&config.noun, config.candidate_style)?;
        let system = templates.1.system(&config.noun)?;
        Ok(Maker { config, world, seed, budget, templates, ranking_system, system, count })
    }

    /// The system message of a task.
    pub(super) fn system(&self, task: InstructionTask) -> &str {
        if task == InstructionTask::Ranking { &self.ranking_system } else { &self.system }
    }

    /// Makes the example of one draw. `scores` are the recommender's, by its item index.
    pub(super) fn make(&self, task: InstructionTask, draw: Draw, scores: Option<&[f32]>) -> Result<Made> {
        let (user, at) = (draw.0, draw.1 as usize);
        let id = self.world.users.ids().get(user as usize);
        let rng = &mut user_rng(self.seed, task.name(), &id, u64::from(draw.1));
        let augment = matches!(task, InstructionTask::Ranking | InstructionTask::Rating)
            && rng.random_bool(self.config.augmented_share);
        let scores = scores.filter(|_| augment);
        let Some(mut parts) = self.parts(task, user, at, scores, rng) else { return Ok(Made::Nothing) };
        if augment {
            parts.similar = self.similar(task, user);
        } else {
            parts.prediction.clear();
        }
        let augmented = !parts.similar.is_empty() || !parts.prediction.is_empty();
        let render = |h: usize, s: usize| self.render(task, &parts, h, s);
        let count = |prompt: &str| {
            (self.count)(&[
                Message::new("system", self.system(task)),
                Message::new("user", prompt),
                Message::new("assistant", parts.response.as_str()),
            ])
        };
        let Ok(fitted) = fit(parts.history.len(), parts.similar.len(), self.budget, &render, &count)? else {
            return Ok(Made::TooLong);
        };
        if fitted.history == 0 {
            // Without a history it would teach popularity only.
            return Ok(Made::TooLong);
        }
        let mut hash = Sha256::new();
        for text in [task.name(), &fitted.text, &parts.response] {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
        Ok(Made::Example(Example {
            user,
            trimmed: parts.history.len() - fitted.history + parts.similar.len() - fitted.similar,
            prompt: fitted.text,
            tokens: fitted.tokens,
            augmented,
            digest: hash.finalize().into(),
            response: parts.response,
        }))
    }

    fn parts(
        &self,
        task: InstructionTask,
        user: u32,
        at: usize,
        scores: Option<&[f32]>,
        rng: &mut ChaCha8Rng,
    ) -> Option<Parts<'a>> {
        let world = self.world;
        let train = world.train.of(user as usize);
        let target = train[at];
        let title = world.title(target)?;
        if train[..at].contains(&target) {
            return None;
        }
        let mut parts = Parts {
            history: Vec::new(),
            similar: Vec::new(),
            candidates: vec![title],
            prediction: Vec::new(),
            field: "",
            response: String::new(),
        };
        if task == InstructionTask::SideInfo {
            let (field, values) = world.side.choose(rng)?;
            parts.field = field;
            parts.response = values[target as usize].clone()?;
            parts.history = self.lines(&train[..at], |place| values[train[place] as usize].clone());
        } else if task == InstructionTask::Rating {
            parts.response = rating_text(world.rating(user, at));
            parts.history = self.lines(&train[..at], |place| Some(rating_text(world.rating(user, place))));
            parts.prediction.extend(world.prediction(user, target).map(rating_text));
        } else {
            parts.history = self.lines(&train[..at], |_| Some(String::new()));
            let n = match task {
                InstructionTask::Pairwise => 2,
                InstructionTask::List => self.config.list_items,
                _ => self.config.candidates,
            };
            let items = self.candidates(user, target, n, rng)?;
            let titles: Vec<&str> = items.iter().filter_map(|&item| world.title(item)).collect();
            parts.response = title.to_owned();
            if task == InstructionTask::Ranking {
                self.rank(&mut parts, &items, target, scores);
            }
            parts.candidates = titles;
        }
        (!parts.history.is_empty()).then_some(parts)
    }

    /// Answer and prediction of a ranking.
    fn rank(&self, parts: &mut Parts<'a>, items: &[u32], target: u32, scores: Option<&[f32]>) {
        let world = self.world;
        let mut order: Vec<u32> = items.to_vec();
        match (scores, &world.recommender) {
            (Some(scores), Some(recommender)) => {
                // What the recommender does not know comes last.
                let of = |item: u32| recommender.items[item as usize].map_or(f32::NEG_INFINITY, |i| scores[i as usize]);
                order.sort_by(|&a, &b| of(b).total_cmp(&of(a)).then(a.cmp(&b)));
                let best = order.iter().take(self.config.prediction_items);
                parts.prediction = best.filter_map(|&item| world.title(item)).map(str::to_owned).collect();
            }
            _ => order.sort_by_key(|&item| (std::cmp::Reverse(world.popularity[item as usize]), item)),
        }
        parts.response = match self.config.candidate_style {
            CandidateStyle::Letters => {
                let place = items.iter().position(|&item| item == target).and_then(label);
                place.map(String::from).unwrap_or_default()
            }
            CandidateStyle::Titles => {
                let rest = order.into_iter().filter(|&item| item != target);
                let titles: Vec<&str> = std::iter::once(target).chain(rest).filter_map(|i| world.title(i)).collect();
                titles.join("\n")
            }
        };
    }

    /// The target and items that are unseen in train, `n` in all, with distinct titles, shuffled. `None` where fewer than
    /// two can be had.
    fn candidates(&self, user: u32, target: u32, n: usize, rng: &mut ChaCha8Rng) -> Option<Vec<u32>> {
        let world = self.world;
        let mut items = vec![target];
        let mut taken: HashSet<&str> = HashSet::from([world.title(target)?]);
        // Another item of a title that the user has chosen is no wrong answer.
        taken.extend(world.train.of(user as usize).iter().filter_map(|&item| world.title(item)));
        for _ in 0..n * 8 {
            if items.len() == n {
                break;
            }
            let item = world.unseen.sample(user as usize, rng)?;
            if let Some(title) = world.title(item)
                && taken.insert(title)
            {
                items.push(item);
            }
        }
        items.shuffle(rng);
        (items.len() >= 2).then_some(items)
    }

    /// The latest titled places of a history that have a value.
    fn lines(&self, history: &[u32], value: impl Fn(usize) -> Option<String>) -> Vec<Line<'a>> {
        let places = history.iter().enumerate().rev();
        let lines =
            places.filter_map(|(place, &item)| Some(Line { title: self.world.title(item)?, value: value(place)? }));
        let mut lines: Vec<Line<'a>> = lines.take(self.config.history_items).collect();
        lines.reverse();
        lines
    }

    /// The similar user's latest titles, with ratings where the task is rating.
    fn similar(&self, task: InstructionTask, user: u32) -> Vec<Line<'a>> {
        let Some(neighbour) = self.world.neighbour(user) else { return Vec::new() };
        let value = |place: usize| match task {
            InstructionTask::Rating => Some(rating_text(self.world.rating(neighbour, place))),
            _ => Some(String::new()),
        };
        let lines = self.lines(self.world.train.of(neighbour as usize), value);
        lines[lines.len().saturating_sub(self.config.similar_items)..].to_vec()
    }

    /// The user message with the latest `h` of the history and `s` of the similar user's.
    fn render(&self, task: InstructionTask, parts: &Parts<'a>, h: usize, s: usize) -> Result<String> {
        let history = &parts.history[parts.history.len() - h..];
        let similar = &parts.similar[parts.similar.len() - s..];
        if task == InstructionTask::Ranking {
            let titles = |lines: &[Line<'a>]| lines.iter().map(|l| l.title).collect::<Vec<&str>>();
            let prediction: Vec<&str> = parts.prediction.iter().map(String::as_str).collect();
            return self.templates.0.user(&Fields {
                noun: &self.config.noun,
                style: self.config.candidate_style,
                history: &titles(history),
                candidates: &parts.candidates,
                similar: &titles(similar),
                prediction: &prediction,
            });
        }
        self.templates.1.user(
            task,
            &InstructionFields {
                noun: &self.config.noun,
                history,
                candidates: &parts.candidates,
                similar,
                prediction: &parts.prediction,
                field: parts.field,
                range: (&self.world.range.0, &self.world.range.1),
            },
        )
    }

    /// The recommender's scores of all its items, given what came before each draw; `None` where it does not know the user.
    pub(super) fn scores(&self, draws: &[Draw]) -> Result<Vec<Option<Vec<f32>>>> {
        let mut out = vec![None; draws.len()];
        let Some(recommender) = &self.world.recommender else { return Ok(out) };
        let scorer = recommender.model.scorer.as_ref();
        // A user has one history per call, so a user who was drawn twice takes two calls.
        let mut waves: Vec<Vec<(u32, usize)>> = Vec::new();
        let mut calls = std::collections::HashMap::<u32, usize>::new();
        for (n, draw) in draws.iter().enumerate() {
            if let Some(user) = recommender.users[draw.0 as usize] {
                let call = calls.entry(user).or_default();
                if waves.len() == *call {
                    waves.push(Vec::new());
                }
                waves[*call].push((user, n));
                *call += 1;
            }
        }
        for wave in waves {
            let mut pairs = Vec::new();
            for &(user, n) in &wave {
                let before = &self.world.train.of(draws[n].0 as usize)[..draws[n].1 as usize];
                pairs.extend(before.iter().filter_map(|&item| Some((user, recommender.items[item as usize]?))));
            }
            let known = Histories::from_pairs(scorer.n_users(), &pairs);
            let users: Vec<u32> = wave.iter().map(|w| w.0).collect();
            let mut scores = vec![0f32; users.len() * scorer.n_items()];
            scorer.score(&users, &known, &mut scores);
            if scores.iter().any(|s| s.is_nan()) {
                return Err(Error::data("input `recommender`: a score is not a number").with_help("train it again"));
            }
            for ((_, n), row) in wave.iter().zip(scores.chunks_exact(scorer.n_items().max(1))) {
                out[*n] = Some(row.to_vec());
            }
        }
        Ok(out)
    }
}
