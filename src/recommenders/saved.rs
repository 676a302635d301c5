//! A fitted model as files in standard formats, and back.
//!
//! In: a [`TrainedModel`]. Out: `model.json` (which backbone, its hyper-parameters, sizes, what it was
//! fitted on) and `model.safetensors` (the backbone's tensors and the ids). Tensors: those of
//! [`Scorer::tensors`], f32, and for users and items each either `user_ids` (I64 `[users]`) or, for string
//! ids, `user_ids` (U8, the ids' UTF-8 one after another) with `user_ids.offsets` (I64 `[users + 1]`).
//! Index `n` of a table belongs to id `n`; ids are sorted and distinct.
//!
//! A rating model ([`TrainedRater`]) has a third file: `fields.json`, its [`FieldSet`](crate::interactions::fields).
//!
//! A file that is cut short, damaged or of another kind is refused with exit 65; lengths are
//! checked before anything is allocated (by the safetensors reader, against the file's size).

use std::collections::BTreeMap;

use bytes::Bytes;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};

use super::Scorer;
use super::rating::Predictor;
use super::registry::{self, Backbone};
use crate::error::{Error, Result};
use crate::interactions::IdMap;
use crate::interactions::fields::FieldSet;
use crate::tables::IdColumn;

/// The weights and ids.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// What the weights are.
pub const CARD_FILE: &str = "model.json";
/// The fields of a rating model.
pub const FIELDS_FILE: &str = "fields.json";
/// `format` of `model.json`.
const FORMAT: &str = "tailfuse-recommender";
/// `version` of `model.json` that this code writes and reads.
const VERSION: u32 = 1;

/// A named f32 tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Its name in the safetensors file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Product of `shape` values.
    pub values: Vec<f32>,
}

impl NamedTensor {
    /// From its parts.
    ///
    /// # Panics
    /// When the number of values is not the product of the shape (our bug).
    pub fn new(name: &str, shape: Vec<usize>, values: Vec<f32>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "tensor `{name}` does not have its shape");
        NamedTensor { name: name.to_owned(), shape, values }
    }
}

/// The tensors of a saved model by name.
pub struct Tensors(BTreeMap<String, NamedTensor>);

impl Tensors {
    /// From tensors with distinct names.
    pub fn new(tensors: Vec<NamedTensor>) -> Self {
        Tensors(tensors.into_iter().map(|t| (t.name.clone(), t)).collect())
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The values of the tensor of that name and shape.
    ///
    /// # Errors
    /// There is none, or it has another shape (exit 65).
    pub fn shaped(&self, name: &str, shape: &[usize]) -> Result<&[f32]> {
        let tensor = self.get(name)?;
        match tensor.shape == shape {
            true => Ok(&tensor.values),
            false => Err(damaged(
                WEIGHTS_FILE,
                format!("its tensor `{name}` has shape {:?}, {shape:?} is wanted", tensor.shape),
            )),
        }
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// There is none (exit 65).
    pub fn get(&self, name: &str) -> Result<&NamedTensor> {
        self.0.get(name).ok_or_else(|| damaged(WEIGHTS_FILE, format!("it has no tensor `{name}`")))
    }
}

/// `model.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Always `tailfuse-recommender`.
    pub format: String,
    /// Version of this format.
    pub version: u32,
    /// Name of the backbone in the registry.
    pub model: String,
    /// Its hyper-parameters in full.
    pub hyper: serde_json::Value,
    /// Number of users.
    pub users: usize,
    /// Number of items.
    pub items: usize,
    /// `train`: the weights have not seen the validation items. `train+valid`: they were fitted again on both.
    pub weights_fit_on: String,
    /// The epoch that was the best on validation; the weights have seen so many epochs.
    pub best_epoch: usize,
    /// Seed of the fit.
    pub seed: u64,
    /// sha256 (hex) of what the weights were fitted on, as dense indices.
    #[serde(default)]
    pub data_sha256: String,
    /// Figures of the fit: `valid_ndcg_10`, or `valid_rmse` of a rating model, of the best epoch.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// What stands between the values of a rating model's multi-valued columns of strings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub separator: Option<String>,
}

/// A fitted model with the ids that its indices stand for.
pub struct TrainedModel {
    /// What it is.
    pub card: ModelCard,
    /// User ids by index.
    pub users: IdMap,
    /// Item ids by index.
    pub items: IdMap,
    /// The model.
    pub scorer: Box<dyn Scorer>,
}

impl ModelCard {
    /// A card for weights that were fitted on train.
    pub fn new(model: &str, hyper: serde_json::Value, users: usize, items: usize) -> Self {
        ModelCard {
            format: FORMAT.to_owned(),
            version: VERSION,
            model: model.to_owned(),
            hyper,
            users,
            items,
            weights_fit_on: "train".to_owned(),
            best_epoch: 0,
            seed: 0,
            data_sha256: String::new(),
            metrics: BTreeMap::new(),
            separator: None,
        }
    }
}

/// A fitted rating model with the ids that its indices stand for.
pub struct TrainedRater {
    /// What it is.
    pub card: ModelCard,
    /// User ids by index.
    pub users: IdMap,
    /// Item ids by index.
    pub items: IdMap,
    /// The model, with its fields.
    pub predictor: Box<dyn Predictor>,
}

impl TrainedModel {
    /// The model as named files; the same model gives the same bytes.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn to_files(&self) -> Result<BTreeMap<String, Bytes>> {
        write_model(&self.card, self.scorer.tensors(), &self.users, &self.items)
    }

    /// The model that [`TrainedModel::to_files`] wrote.
    ///
    /// # Errors
    /// A file is missing, damaged, or fits neither the other nor this program (exit 65).
    pub fn from_files(files: &BTreeMap<String, Bytes>) -> Result<Self> {
        let Read { card, backbone, tensors, users, items } = read_model(files)?;
        let scorer = backbone.scorer(&card.hyper, &tensors).map_err(|e| e.at(WEIGHTS_FILE))?;
        check_sizes(&card, &users, &items, (scorer.n_users(), scorer.n_items()))?;
        Ok(TrainedModel { card, users, items, scorer })
    }
}

impl TrainedRater {
    /// The model as named files; the same model gives the same bytes.
    ///
    /// # Errors
    /// Only our bugs.
    pub fn to_files(&self) -> Result<BTreeMap<String, Bytes>> {
        let mut files = write_model(&self.card, self.predictor.tensors(), &self.users, &self.items)?;
        let fields = serde_json::to_vec_pretty(self.predictor.fields())
            .map_err(|e| Error::internal("the fields cannot be written as JSON").because(e))?;
        files.insert(FIELDS_FILE.to_owned(), Bytes::from(fields));
        Ok(files)
    }

    /// The model that [`TrainedRater::to_files`] wrote.
    ///
    /// # Errors
    /// A file is missing, damaged, or fits neither the others nor this program (exit 65).
    pub fn from_files(files: &BTreeMap<String, Bytes>) -> Result<Self> {
        let Read { card, backbone, tensors, users, items } = read_model(files)?;
        let fields: FieldSet = serde_json::from_slice(file(files, FIELDS_FILE)?)
            .map_err(|e| damaged(FIELDS_FILE, format!("it holds no fields: {e}")))?;
        check_sizes(&card, &users, &items, (fields.n_users, fields.n_items))?;
        let predictor = backbone.predictor(&card.hyper, &fields, &tensors).map_err(|e| e.at(WEIGHTS_FILE))?;
        Ok(TrainedRater { card, users, items, predictor })
    }
}

/// What every model's files hold.
struct Read {
    card: ModelCard,
    backbone: &'static Backbone,
    tensors: Tensors,
    users: IdMap,
    items: IdMap,
}

fn file<'a>(files: &'a BTreeMap<String, Bytes>, name: &str) -> Result<&'a Bytes> {
    files.get(name).ok_or_else(|| damaged(name, "it is missing".to_owned()))
}

/// The card of a model's files, of either task.
///
/// # Errors
/// It is missing, damaged or of another version (exit 65).
pub fn read_card(files: &BTreeMap<String, Bytes>) -> Result<ModelCard> {
    let card: ModelCard = serde_json::from_slice(file(files, CARD_FILE)?)
        .map_err(|e| damaged(CARD_FILE, format!("it is no model card: {e}")))?;
    if card.format != FORMAT || card.version != VERSION {
        let found = format!("it has format `{}`, version {}", card.format, card.version);
        return Err(damaged(CARD_FILE, format!("{found}; `{FORMAT}`, version {VERSION} is wanted")));
    }
    Ok(card)
}

fn read_model(files: &BTreeMap<String, Bytes>) -> Result<Read> {
    let card = read_card(files)?;
    let backbone = registry::find_saved(&card.model)
        .map_err(|e| damaged(CARD_FILE, format!("{}; this program may be older than the model", e.message)))?;
    let weights = SafeTensors::deserialize(file(files, WEIGHTS_FILE)?)
        .map_err(|e| damaged(WEIGHTS_FILE, format!("it is no safetensors file: {e}")))?;
    let users = read_ids(&weights, "user_ids")?;
    let items = read_ids(&weights, "item_ids")?;
    Ok(Read { card, backbone, tensors: Tensors::new(f32_tensors(&weights)), users, items })
}

/// Ids, card and weights (`rows`: users and items) must agree.
fn check_sizes(card: &ModelCard, users: &IdMap, items: &IdMap, rows: (usize, usize)) -> Result<()> {
    let sizes = [(users.len(), card.users, rows.0), (items.len(), card.items, rows.1)];
    match sizes.iter().all(|&(ids, card, rows)| ids == card && ids == rows) {
        true => Ok(()),
        false => {
            let told = format!("ids, card and weights disagree about the number of users and items: {sizes:?}");
            Err(damaged(WEIGHTS_FILE, told))
        }
    }
}

fn write_model(
    card: &ModelCard,
    tensors: Vec<NamedTensor>,
    users: &IdMap,
    items: &IdMap,
) -> Result<BTreeMap<String, Bytes>> {
    let mut raw: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for t in tensors {
        raw.push((t.name, Dtype::F32, t.shape, le_bytes(&t.values, |v| v.to_le_bytes())));
    }
    for (name, map) in [("user_ids", users), ("item_ids", items)] {
        match map.ids() {
            IdColumn::Int(ids) => {
                raw.push((name.to_owned(), Dtype::I64, vec![ids.len()], le_bytes(ids, |v| v.to_le_bytes())));
            }
            IdColumn::Str(ids) => {
                let mut offsets = vec![0i64];
                let mut text = Vec::new();
                for id in ids {
                    text.extend_from_slice(id.as_bytes());
                    offsets.push(text.len() as i64);
                }
                let places = le_bytes(&offsets, |v| v.to_le_bytes());
                raw.push((name.to_owned(), Dtype::U8, vec![text.len()], text));
                raw.push((format!("{name}.offsets"), Dtype::I64, vec![offsets.len()], places));
            }
        }
    }
    let views = raw
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    let weights = views
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|e| Error::internal("the model cannot be written as safetensors").because(e))?;
    let card = serde_json::to_vec_pretty(card)
        .map_err(|e| Error::internal("the model card cannot be written as JSON").because(e))?;
    Ok(BTreeMap::from([(CARD_FILE.to_owned(), Bytes::from(card)), (WEIGHTS_FILE.to_owned(), Bytes::from(weights))]))
}

/// f32 tensors as a safetensors file.
///
/// # Errors
/// Only our bugs.
pub fn write_f32(tensors: &[NamedTensor]) -> Result<Vec<u8>> {
    let raw: Vec<Vec<u8>> = tensors.iter().map(|t| le_bytes(&t.values, |v| v.to_le_bytes())).collect();
    let views = tensors
        .iter()
        .zip(&raw)
        .map(|(t, bytes)| Ok((&t.name, TensorView::new(Dtype::F32, t.shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    views
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|e| Error::internal("tensors cannot be written as safetensors").because(e))
}

/// The f32 tensors of a safetensors file called `name`.
///
/// # Errors
/// It is no safetensors file (exit 65).
pub fn read_f32(bytes: &[u8], name: &str) -> Result<Vec<NamedTensor>> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|e| Error::data(format!("`{name}` is no safetensors file")).because(e))?;
    Ok(f32_tensors(&file))
}

fn f32_tensors(file: &SafeTensors<'_>) -> Vec<NamedTensor> {
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        if view.dtype() == Dtype::F32 {
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            tensors.push(NamedTensor { name, shape: view.shape().to_vec(), values });
        }
    }
    tensors
}

fn le_bytes<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| bytes(v)).collect()
}

fn damaged(file: &str, what: String) -> Error {
    Error::data(format!("the model's `{file}` cannot be used: {what}"))
        .with_help("run the stage that makes it again: `tailfuse run PIPELINE --from STAGE`")
}

fn read_ids(weights: &SafeTensors<'_>, name: &str) -> Result<IdMap> {
    let tensor =
        |name: &str| weights.tensor(name).map_err(|_| damaged(WEIGHTS_FILE, format!("it has no tensor `{name}`")));
    let wrong = |why: &str| damaged(WEIGHTS_FILE, format!("tensor `{name}`: {why}"));
    let i64s = |view: &TensorView<'_>| -> Vec<i64> {
        view.data()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect()
    };
    let ids = tensor(name)?;
    let column = match ids.dtype() {
        Dtype::I64 => IdColumn::Int(i64s(&ids)),
        Dtype::U8 => {
            let offsets = tensor(&format!("{name}.offsets"))?;
            if offsets.dtype() != Dtype::I64 {
                return Err(wrong("its offsets are not I64"));
            }
            let text = std::str::from_utf8(ids.data()).map_err(|_| wrong("it is not UTF-8"))?;
            let offsets = i64s(&offsets);
            let mut strings = Vec::with_capacity(offsets.len());
            for pair in offsets.windows(2) {
                let range = usize::try_from(pair[0]).ok().zip(usize::try_from(pair[1]).ok());
                let id = range.and_then(|(from, to)| text.get(from..to)).ok_or_else(|| wrong("bad offsets"))?;
                strings.push(id.to_owned());
            }
            if offsets.first() != Some(&0) || offsets.last().copied() != i64::try_from(text.len()).ok() {
                return Err(wrong("its offsets do not cover it"));
            }
            IdColumn::Str(strings)
        }
        other => return Err(wrong(&format!("it has type {other:?}; I64 or U8 is wanted"))),
    };
    let map = IdMap::new(&[&column])?;
    match *map.ids() == column {
        true => Ok(map),
        false => Err(wrong("the ids are not sorted and distinct")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::embedding_scorer::EmbeddingScorer;
    use super::*;

    fn model(users: IdColumn, items: IdColumn) -> TrainedModel {
        let (u, i) = (users.len(), items.len());
        let values = |n: usize| (0..n).map(|x| (x as f32 * 0.3).sin()).collect::<Vec<f32>>();
        let scorer = EmbeddingScorer::new(u, i, 3, values((u + i) * 3), values((u + i) * 3));
        TrainedModel {
            card: ModelCard::new("mf", serde_json::json!({"embedding_dim": 3}), u, i),
            users: IdMap::new(&[&users]).unwrap(),
            items: IdMap::new(&[&items]).unwrap(),
            scorer: Box::new(scorer),
        }
    }

    fn strings(ids: &[&str]) -> IdColumn {
        IdColumn::Str(ids.iter().map(|s| (*s).to_owned()).collect())
    }

    #[test]
    fn files_give_the_same_model_and_the_same_bytes() {
        for (users, items) in [
            (IdColumn::Int(vec![-5, 2, 900]), IdColumn::Int(vec![1, 7])),
            (strings(&["", "a", "bücher"]), strings(&["x"])),
            (strings(&["u"]), IdColumn::Int(vec![3])),
            (IdColumn::Int(vec![]), strings(&[])),
        ] {
            let saved = model(users.clone(), items.clone());
            let files = saved.to_files().unwrap();
            let loaded = TrainedModel::from_files(&files).unwrap();
            assert_eq!(loaded.card, saved.card);
            assert_eq!((loaded.users.ids(), loaded.items.ids()), (&users, &items));
            assert_eq!(loaded.scorer.tensors(), saved.scorer.tensors());
            assert_eq!(loaded.to_files().unwrap(), files);
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_refused_by_name() {
        let files = model(strings(&["a", "b"]), IdColumn::Int(vec![1])).to_files().unwrap();
        for name in [CARD_FILE, WEIGHTS_FILE] {
            for length in 0..files[name].len() {
                let mut cut = files.clone();
                cut.insert(name.to_owned(), files[name].slice(..length));
                let error = TrainedModel::from_files(&cut).err().expect("a cut file must be refused");
                assert_eq!(error.fault.exit_code(), 65);
                assert!(error.message.contains(name), "{error}");
            }
            let mut less = files.clone();
            less.remove(name);
            assert!(TrainedModel::from_files(&less).err().unwrap().message.contains(name));
        }
    }

    #[test]
    fn a_length_beyond_the_file_is_refused_before_anything_is_allocated() {
        let mut files = model(IdColumn::Int(vec![1]), IdColumn::Int(vec![1])).to_files().unwrap();
        let mut bytes = files[WEIGHTS_FILE].to_vec();
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        files.insert(WEIGHTS_FILE.to_owned(), bytes.into());
        assert_eq!(TrainedModel::from_files(&files).err().unwrap().fault.exit_code(), 65);
    }

    #[test]
    fn a_card_that_does_not_fit_the_weights_is_refused() {
        let edit = |key: &str, value: serde_json::Value| {
            let mut files = model(IdColumn::Int(vec![1, 2]), IdColumn::Int(vec![1])).to_files().unwrap();
            let mut card: serde_json::Value = serde_json::from_slice(&files[CARD_FILE]).unwrap();
            card[key] = value;
            files.insert(CARD_FILE.to_owned(), serde_json::to_vec(&card).unwrap().into());
            TrainedModel::from_files(&files).err().map(|e| (e.fault.exit_code(), e.message))
        };
        assert_eq!(edit("seed", 1.into()), None);
        assert!(edit("users", 3.into()).is_some_and(|(code, m)| code == 65 && m.contains("disagree")));
        assert!(edit("model", "nothing".into()).is_some_and(|(code, m)| code == 65 && m.contains("`nothing`")));
        assert!(edit("version", 9.into()).is_some_and(|(code, m)| code == 65 && m.contains("version 9")));
        assert!(edit("format", "x".into()).is_some_and(|(code, _)| code == 65));
    }

    #[test]
    fn ids_out_of_order_are_refused() {
        let mut files = model(IdColumn::Int(vec![1, 2]), IdColumn::Int(vec![1])).to_files().unwrap();
        let mut bytes = files[WEIGHTS_FILE].to_vec();
        let (one, two) = (1i64.to_le_bytes(), 2i64.to_le_bytes());
        let pair: Vec<u8> = one.iter().chain(&two).copied().collect();
        let at = bytes.windows(16).position(|w| w == pair.as_slice()).unwrap();
        bytes[at..at + 16].copy_from_slice(&two.iter().chain(&one).copied().collect::<Vec<u8>>());
        files.insert(WEIGHTS_FILE.to_owned(), bytes.into());
        assert!(TrainedModel::from_files(&files).err().unwrap().message.contains("sorted"));
    }

    #[test]
    fn a_rating_model_keeps_its_fields_and_is_refused_where_it_is_damaged() {
        use super::super::rating::{Ratings, golden::tiny};
        use super::super::{FitContext, Unwatched};
        let (set, entities, goods, rows, ratings) = tiny();
        let data = Ratings {
            fields: &set,
            users: &entities,
            items: &goods,
            train: &rows,
            train_ratings: &ratings,
            valid: &rows,
            valid_ratings: &ratings,
        };
        let hyper = serde_json::json!({"dnn_hidden_units": [4], "epochs": 2});
        let model = registry::find("deepfm").unwrap().rating_recommender(&hyper).unwrap();
        let device = &crate::device::Device::Cpu;
        let fit = model
            .fit(&data, &FitContext { seed: 1, device, watch: &Unwatched, checkpoints: None, warm: None })
            .unwrap();
        let saved = TrainedRater {
            card: ModelCard::new("deepfm", model.hyper(), 3, 4),
            users: IdMap::new(&[&strings(&["a", "b", "c"])]).unwrap(),
            items: IdMap::new(&[&IdColumn::Int(vec![1, 2, 3, 4])]).unwrap(),
            predictor: fit.predictor,
        };
        let files = saved.to_files().unwrap();
        let loaded = TrainedRater::from_files(&files).unwrap();
        assert_eq!(loaded.predictor.fields(), &set);
        let predict = |model: &TrainedRater| model.predictor.predict(&entities, &goods, &rows).unwrap();
        assert_eq!(predict(&loaded), predict(&saved));
        assert_eq!(loaded.to_files().unwrap(), files);
        for name in [CARD_FILE, WEIGHTS_FILE, FIELDS_FILE] {
            for length in (0..files[name].len()).step_by(7) {
                let mut cut = files.clone();
                cut.insert(name.to_owned(), files[name].slice(..length));
                let error = TrainedRater::from_files(&cut).err().expect("a cut file must be refused");
                assert_eq!(error.fault.exit_code(), 65);
                assert!(error.message.contains(name), "{error}");
            }
        }
        assert!(TrainedModel::from_files(&files).err().unwrap().message.contains("`deepfm`"));
    }
}
