//! References between sources and stages -> a graph in the order to run.
//!
//! In: checked stages. Out: [`StageNode`]s in topological order (stable: the file's order
//! where the graph leaves a choice). Mistakes: a reference to nothing, an output that a stage
//! does not have, a table where an artifact is wanted (and the other way round), cycles, two
//! stages that publish the same table, and values that a stage kind refuses.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use serde_json::Value;

use super::artifact_source::FILES;
use super::diagnostics::{Diagnostic, list, suggest};
use super::document::{Item, Origin};
use super::spec::stage_seed;
use super::validate::{CheckedSource, CheckedStage};
use crate::error::Error;
use crate::stages::{InputSlot, OutputSlot, ResolveContext, Stage, StageKind, What};

/// The output of a source that a bare reference means.
pub const ROWS: &str = "rows";
/// The output of a source with the rows that were set aside.
pub const BAD_ROWS: &str = "bad_rows";

/// What an input comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    /// The source of that name.
    Source(String),
    /// The stage of that name.
    Stage(String),
}

impl Node {
    /// The name of the source or stage.
    pub fn name(&self) -> &str {
        match self {
            Node::Source(name) | Node::Stage(name) => name,
        }
    }
}

/// An input of a stage, with where it comes from.
#[derive(Clone, Debug)]
pub struct ResolvedInput {
    /// As the stage asked for it.
    pub slot: InputSlot,
    /// The source or stage.
    pub from: Node,
    /// Its output: of a source [`ROWS`] or [`BAD_ROWS`], of a stage one of its outputs.
    pub output: String,
}

/// A stage, ready to run.
pub struct StageNode {
    /// Its name in the file.
    pub name: String,
    /// Its kind.
    pub kind: &'static StageKind,
    /// Seed of its random choices, in 0..2^63.
    pub seed: u64,
    /// The stage with its config.
    pub stage: Box<dyn Stage>,
    /// Its inputs, in the order in which the stage names them.
    pub inputs: Vec<ResolvedInput>,
    /// Its outputs; the first one is the default of a reference.
    pub outputs: Vec<OutputSlot>,
    /// Where its header stands in the file.
    pub span: Origin,
}

/// The slot of an LLM that another stage made; no stage kind has a slot of that name.
const MODEL_SLOT: &str = "language model";

impl StageNode {
    /// Whether an input is an LLM that the stage names among its models.
    pub fn is_model(&self, input: &ResolvedInput) -> bool {
        input.slot.slot == MODEL_SLOT && self.stage.models().contains(&input.slot.reference)
    }

    /// The models that are not made by another stage: entries of the catalogue and paths.
    pub fn outside_models(&self) -> Vec<String> {
        let made = |name: &String| self.inputs.iter().any(|i| self.is_model(i) && i.slot.reference == *name);
        self.stage.models().into_iter().filter(|name| !made(name)).collect()
    }
}

/// A stage whose values were accepted, before its references are followed.
struct Resolved {
    node: StageNode,
    item: Item,
}

/// Builds the graph. The result is whole only where no mistake was added to `out`.
pub fn build(
    stages: Vec<CheckedStage>,
    sources: &[CheckedSource],
    context: &ResolveContext<'_>,
    seed: u64,
    text: &str,
    out: &mut Vec<Diagnostic>,
) -> Vec<StageNode> {
    let stage_names: Vec<String> = stages.iter().map(|s| s.name.clone()).collect();
    let mut resolved = Vec::new();
    for stage in stages {
        resolved.extend(resolve(stage, context, seed, text, out));
    }
    duplicate_tables(&resolved, out);
    let names = Names {
        sources: sources.iter().map(|s| s.name.as_str()).collect(),
        artifacts: sources.iter().filter(|s| s.is_artifact()).map(|s| s.name.as_str()).collect(),
        stages: stage_names.iter().map(String::as_str).collect(),
        outputs: resolved.iter().map(|r| (r.node.name.clone(), r.node.outputs.clone())).collect(),
    };
    for stage in &mut resolved {
        let mut inputs = Vec::new();
        for slot in stage.node.stage.inputs() {
            match names.find(&stage.node.name, &slot, &stage.item, text) {
                Ok(Some((from, output))) => inputs.push(ResolvedInput { slot, from, output }),
                Ok(None) => {}
                Err(mistake) => out.push(mistake),
            }
        }
        // An LLM that another stage tuned is named as any other one, and read as an artifact.
        for model in stage.node.stage.models().into_iter().filter(|m| names.is_output(m)) {
            let slot = InputSlot::artifact(MODEL_SLOT, &model);
            match names.find(&stage.node.name, &slot, &stage.item, text) {
                Ok(Some((from, output))) => inputs.push(ResolvedInput { slot, from, output }),
                Ok(None) => {}
                Err(mistake) => out.push(mistake),
            }
        }
        stage.node.inputs = inputs;
    }
    order(resolved, text, out)
}

/// The stage of a config; reports what its kind says against the values.
fn resolve(
    stage: CheckedStage,
    context: &ResolveContext<'_>,
    seed: u64,
    text: &str,
    out: &mut Vec<Diagnostic>,
) -> Option<Resolved> {
    let CheckedStage { name, item, config, seed: own_seed } = stage;
    let (kind, json) = config?;
    match (kind.resolve)(json, context) {
        Ok(resolved) => {
            let seed = own_seed.unwrap_or_else(|| stage_seed(seed, &name));
            let outputs = resolved.outputs();
            let span = item.origin.clone();
            let node = StageNode { name, kind, seed, stage: resolved, inputs: Vec::new(), outputs, span };
            Some(Resolved { node, item })
        }
        Err(e) => {
            out.push(refusal(&name, &item, e, text));
            None
        }
    }
}

/// A refusal of a stage kind at the key or value that it names in backticks, in the message or
/// else in the help; where there is none, at the stage's header.
fn refusal(name: &str, item: &Item, error: Error, text: &str) -> Diagnostic {
    let place_of_word = |word: &str| {
        let value = item.at(word).map(|i| &i.origin);
        let key = || item.find_key(word).map(|e| &e.key_origin);
        let text_of_value = || item.find_string(word).map(|i| &i.origin);
        value.or_else(key).or_else(text_of_value).map(|o| o.first_line(text))
    };
    let named = |text: &str| text.split('`').skip(1).step_by(2).find_map(place_of_word);
    let place = named(&error.message).or_else(|| error.help.as_deref().and_then(named));
    let place = place.unwrap_or_else(|| item.origin.clone());
    let mistake = Diagnostic::new(format!("stage `{name}`: {}", error.message), place, "");
    match error.help {
        Some(help) => mistake.with_help(help),
        None => mistake,
    }
}

/// Two `write` stages must not publish the same partition of a table: the later would undo the first.
fn duplicate_tables(stages: &[Resolved], out: &mut Vec<Diagnostic>) {
    let mut seen: Vec<(&str, Option<Value>, &Item)> = Vec::new();
    for stage in stages.iter().filter(|s| s.node.kind.name == "write") {
        let Some(item) = stage.item.get("table") else { continue };
        let Some(table) = item.as_str() else { continue };
        let partition = stage.item.get("partition").map(Item::to_json);
        match seen.iter().find(|(t, p, _)| *t == table && *p == partition) {
            None => seen.push((table, partition, item)),
            Some((_, _, first)) => out.push(
                Diagnostic::new(
                    format!("duplicate output: two stages write the table `{table}`"),
                    item.origin.clone(),
                    "written a second time",
                )
                .also(first.origin.clone(), "the first")
                .with_help("give each its own `table` or its own `partition`"),
            ),
        }
    }
}

/// What references can name.
struct Names<'a> {
    sources: Vec<&'a str>,
    /// Those of them that are artifacts.
    artifacts: Vec<&'a str>,
    /// All stages, those with mistakes too.
    stages: Vec<&'a str>,
    /// The outputs of the stages without mistakes.
    outputs: BTreeMap<String, Vec<OutputSlot>>,
}

impl Names<'_> {
    /// Whether a model's name is that of a stage, or of one of its outputs.
    fn is_output(&self, model: &str) -> bool {
        self.stages.contains(&model.split_once('.').map_or(model, |(stage, _)| stage))
    }

    /// What `slot` refers to; `None` where that stage has mistakes of its own.
    fn find(
        &self,
        stage: &str,
        slot: &InputSlot,
        item: &Item,
        text: &str,
    ) -> Result<Option<(Node, String)>, Diagnostic> {
        let reference = slot.reference.as_str();
        let place = || place_of(slot, item).first_line(text);
        let (name, output) = match reference.split_once('.') {
            Some((name, output)) => (name, Some(output)),
            None => (reference, None),
        };
        if self.artifacts.contains(&name) {
            return match (slot.what, output.unwrap_or(FILES)) {
                (What::Artifact, FILES) => Ok(Some((Node::Source(name.to_owned()), FILES.to_owned()))),
                (What::Artifact, other) => Err(Diagnostic::new(
                    format!("source `{name}` has no output `{other}`"),
                    place(),
                    "there is no such output",
                )
                .with_suggestion(other, [FILES], "its output is")),
                (What::Table, _) => {
                    let mistake = Diagnostic::new(
                        format!(
                            "`{}` of stage `{stage}` wants a table, but the source `{name}` is an artifact",
                            slot.slot
                        ),
                        place(),
                        "an artifact",
                    );
                    Err(with_fitting(mistake, &self.all(What::Table)))
                }
            };
        }
        if self.sources.contains(&name) {
            if slot.what == What::Artifact {
                let mistake = Diagnostic::new(
                    format!("`{}` of stage `{stage}` wants an artifact, but `{name}` is a source", slot.slot),
                    place(),
                    "a table",
                );
                return Err(with_fitting(mistake, &self.all(What::Artifact)));
            }
            return match output.unwrap_or(ROWS) {
                found @ (ROWS | BAD_ROWS) => Ok(Some((Node::Source(name.to_owned()), found.to_owned()))),
                other => Err(Diagnostic::new(
                    format!("source `{name}` has no output `{other}`"),
                    place(),
                    "there is no such output",
                )
                .with_suggestion(other, [ROWS, BAD_ROWS], "its outputs are")),
            };
        }
        if !self.stages.contains(&name) {
            let known: Vec<&str> = self.sources.iter().chain(&self.stages).copied().filter(|n| *n != stage).collect();
            let mut mistake = Diagnostic::new(
                format!("`{}` of stage `{stage}` refers to `{name}`, which is neither a source nor a stage", slot.slot),
                place(),
                "there is no such name",
            );
            mistake = match (suggest(name, known.iter().copied()), output) {
                (Some(near), Some(output)) => {
                    let whole = format!("{near}.{output}");
                    mistake.with_suggestion(reference, [whole.as_str()], "the names are")
                }
                _ => mistake.with_suggestion(name, known, "the names are"),
            };
            return Err(mistake);
        }
        let Some(outputs) = self.outputs.get(name) else { return Ok(None) };
        let right = |o: &&OutputSlot| o.what == slot.what;
        let found = match output {
            None => outputs.first(),
            Some(output) => outputs.iter().find(|o| o.name == output),
        };
        let written = |o: &OutputSlot| format!("{name}.{}", o.name);
        match found {
            Some(found) if right(&found) => Ok(Some((Node::Stage(name.to_owned()), found.name.to_owned()))),
            Some(found) => {
                let mistake = Diagnostic::new(
                    format!(
                        "`{}` of stage `{stage}` wants {}, but `{}` is {}",
                        slot.slot,
                        what(slot.what),
                        written(found),
                        what(found.what)
                    ),
                    place(),
                    what(found.what),
                );
                let fitting: Vec<String> = outputs.iter().filter(right).map(written).collect();
                let fitting = if fitting.is_empty() { self.all(slot.what) } else { fitting };
                Err(with_fitting(mistake, &fitting))
            }
            None => {
                let names: Vec<&str> = outputs.iter().map(|o| o.name).collect();
                let message = match output {
                    Some(output) => format!("stage `{name}` has no output `{output}`"),
                    None => format!("stage `{name}` has no outputs to refer to"),
                };
                let mut mistake = Diagnostic::new(message, place(), "there is no such output");
                if let Some(output) = output {
                    mistake = mistake.with_suggestion(output, names.iter().copied(), "its outputs are");
                    if mistake.help.is_empty() && !names.is_empty() {
                        mistake = mistake.with_help(format!("its outputs are: {}", list(names)));
                    }
                }
                Err(mistake)
            }
        }
    }

    /// Every output of a sort, as references.
    fn all(&self, wanted: What) -> Vec<String> {
        let stages = self.outputs.iter().flat_map(|(stage, outputs)| {
            outputs.iter().filter(|o| o.what == wanted).map(move |o| format!("{stage}.{}", o.name))
        });
        let fits = |s: &&&str| self.artifacts.contains(*s) == (wanted == What::Artifact);
        let sources = self.sources.iter().filter(fits).map(|s| (*s).to_owned());
        sources.chain(stages).collect()
    }
}

fn with_fitting(mistake: Diagnostic, fitting: &[String]) -> Diagnostic {
    match fitting.is_empty() {
        true => mistake,
        false => mistake.with_help(format!("what fits: {}", list(fitting.iter().map(String::as_str)))),
    }
}

fn what(what: What) -> &'static str {
    match what {
        What::Table => "a table",
        What::Artifact => "an artifact",
    }
}

/// Where a slot's reference was typed: at the slot's own key, else wherever the stage has that
/// string, else the stage's header.
fn place_of(slot: &InputSlot, item: &Item) -> Origin {
    let typed = |i: &&Item| i.as_str() == Some(slot.reference.as_str());
    let found = item.at(&slot.slot).filter(typed).or_else(|| {
        let parent = slot.slot.split('.').next().and_then(|p| item.get(p));
        parent.and_then(|p| p.find_string(&slot.reference)).or_else(|| item.find_string(&slot.reference))
    });
    found.map_or_else(|| item.origin.clone(), |i| i.origin.clone())
}

/// Topological order by always taking the ready stage that stands first in the file. What is
/// left over reads, directly or not, from a cycle; each cycle is reported once.
fn order(stages: Vec<Resolved>, text: &str, out: &mut Vec<Diagnostic>) -> Vec<StageNode> {
    let position: BTreeMap<&str, usize> = stages.iter().enumerate().map(|(i, s)| (s.node.name.as_str(), i)).collect();
    // Stage -> the stages that it reads from, each once, in the order of its inputs.
    let reads: Vec<Vec<usize>> = stages
        .iter()
        .map(|s| {
            let mut from = Vec::new();
            for input in &s.node.inputs {
                if let Node::Stage(name) = &input.from
                    && let Some(&i) = position.get(name.as_str())
                    && !from.contains(&i)
                {
                    from.push(i);
                }
            }
            from
        })
        .collect();
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); stages.len()];
    let mut waiting: Vec<usize> = reads.iter().map(Vec::len).collect();
    for (i, from) in reads.iter().enumerate() {
        from.iter().for_each(|&f| readers[f].push(i));
    }
    let mut done = vec![false; stages.len()];
    let mut sequence = Vec::new();
    // Indices into `stages` are already in the file's order.
    let mut ready: BinaryHeap<Reverse<usize>> = (0..stages.len()).filter(|&i| waiting[i] == 0).map(Reverse).collect();
    loop {
        while let Some(Reverse(i)) = ready.pop() {
            done[i] = true;
            sequence.push(i);
            for &reader in &readers[i] {
                waiting[reader] -= 1;
                if waiting[reader] == 0 && !done[reader] {
                    ready.push(Reverse(reader));
                }
            }
        }
        let Some(start) = done.iter().position(|d| !d) else { break };
        let cycle = find_cycle(start, &reads, &done);
        out.push(cycle_mistake(&cycle, &stages, text));
        // Take the cycle out, and go on with what only waited for it.
        for &i in &cycle {
            done[i] = true;
        }
        for &i in &cycle {
            for &reader in &readers[i] {
                waiting[reader] -= 1;
                if waiting[reader] == 0 && !done[reader] {
                    ready.push(Reverse(reader));
                }
            }
        }
    }
    let mut by_place: BTreeMap<usize, StageNode> = stages.into_iter().enumerate().map(|(i, s)| (i, s.node)).collect();
    sequence.into_iter().filter_map(|i| by_place.remove(&i)).collect()
}

/// Follows the first stage that is still waited for until one comes up again.
fn find_cycle(start: usize, reads: &[Vec<usize>], done: &[bool]) -> Vec<usize> {
    let mut path = vec![start];
    let mut place: BTreeMap<usize, usize> = BTreeMap::from([(start, 0)]);
    loop {
        let last = path[path.len() - 1];
        let Some(&next) = reads[last].iter().find(|&&i| !done[i]) else { return path };
        if let Some(&from) = place.get(&next) {
            let mut cycle = path.split_off(from);
            // Begin with the stage that stands first in the file.
            let first = (0..cycle.len()).min_by_key(|&i| cycle[i]).unwrap_or(0);
            cycle.rotate_left(first);
            return cycle;
        }
        place.insert(next, path.len());
        path.push(next);
    }
}

fn cycle_mistake(cycle: &[usize], stages: &[Resolved], text: &str) -> Diagnostic {
    let name = |i: usize| stages[i].node.name.as_str();
    let mut way: Vec<&str> = cycle.iter().map(|&i| name(i)).collect();
    way.push(name(cycle[0]));
    let mut mistake: Option<Diagnostic> = None;
    for (k, &i) in cycle.iter().enumerate() {
        let next = name(cycle[(k + 1) % cycle.len()]);
        let input = stages[i].node.inputs.iter().find(|input| input.from == Node::Stage(next.to_owned()));
        let place = input.map_or_else(|| stages[i].node.span.clone(), |input| place_of(&input.slot, &stages[i].item));
        let place = place.first_line(text);
        let label = format!("`{}` reads `{next}`", name(i));
        mistake = Some(match mistake {
            None => Diagnostic::new(format!("the stages form a cycle: {}", way.join(" -> ")), place, label),
            Some(mistake) => mistake.also(place, label),
        });
    }
    mistake
        .unwrap_or_else(|| Diagnostic::new("the stages form a cycle", Origin::File(0..0), ""))
        .with_help("each stage must read only what can be made before it; break the cycle at one of these references")
}
