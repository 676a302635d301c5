//! Titles as vectors: the mean of the LLM's final hidden states, made comparable.
//!
//! In: titles and an LLM. Out: [`TitleTable`], one row per item. Hidden states of an LLM have a few directions in which all
//! texts are large and alike, so that raw means are nearly parallel; here every dimension is centred and scaled over the items that
//! have a title, and the whole brought to the size of the LLM's token embeddings, which its layers are used to.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::llm::weights::{EMBEDDING, Weights};
use crate::llm::{ChatTokenizer, Llm};

/// Tokens of a title at most.
const MAX_TOKENS: usize = 64;

/// Titles per call of the LLM: so often a stop request is seen.
const TOGETHER: usize = 256;

/// One row per item.
#[derive(Clone, Debug, PartialEq)]
pub struct TitleTable {
    /// Length of a row: the LLM's hidden size.
    pub dim: usize,
    /// `[items, dim]`; 0 where `known` is not.
    pub values: Vec<f32>,
    /// `[items]`: whether the item has a title.
    pub known: Vec<bool>,
    /// Root mean square of the rows that are known.
    pub size: f32,
}

/// Gives the mean final hidden state of each text of token ids.
pub type HiddenMeans<'a> = dyn FnMut(&[Vec<u32>]) -> Result<Vec<Vec<f32>>> + 'a;

impl TitleTable {
    /// Embeds titles by an LLM; equal titles once. `progress` hears of every item that is done.
    ///
    /// # Errors
    /// What the LLM or `progress` gives.
    pub fn embed(
        llm: &Llm,
        weights: &Weights,
        titles: &[Option<String>],
        progress: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Self> {
        let size = token_size(weights)?;
        let mut means = |texts: &[Vec<u32>]| llm.hidden_means(texts, &mut |n| progress(n));
        Self::embed_by(&mut means, llm.chat(), llm.config().hidden, size, titles)
    }

    /// The same by any function.
    ///
    /// # Errors
    /// What `means` gives; a hidden state that is not finite (exit 65).
    pub fn embed_by(
        means: &mut HiddenMeans<'_>,
        chat: &ChatTokenizer,
        dim: usize,
        size: f32,
        titles: &[Option<String>],
    ) -> Result<Self> {
        // Special tokens in a title are plain text here too.
        let ids = |title: &String| {
            let mut ids = chat.encode_text(title);
            ids.truncate(MAX_TOKENS);
            ids
        };
        let mut texts: Vec<Vec<u32>> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut rows: Vec<Option<usize>> = Vec::with_capacity(titles.len());
        for title in titles {
            let row = match title {
                None => None,
                Some(title) => match places.get(title.as_str()) {
                    Some(&at) => Some(at),
                    None => {
                        let ids = ids(title);
                        (!ids.is_empty()).then(|| {
                            texts.push(ids);
                            places.insert(title, texts.len() - 1);
                            texts.len() - 1
                        })
                    }
                },
            };
            rows.push(row);
        }
        let mut vectors = Vec::with_capacity(texts.len());
        for some in texts.chunks(TOGETHER) {
            vectors.extend(means(some)?);
        }
        if let Some(at) = vectors.iter().position(|v| v.len() != dim || v.iter().any(|x| !x.is_finite())) {
            let title = rows.iter().position(|row| *row == Some(at)).and_then(|item| titles[item].as_deref());
            return Err(Error::data(format!(
                "the LLM's hidden states of the title `{}` are not {dim} finite numbers",
                title.unwrap_or_default()
            )));
        }
        let mut values = vec![0f32; titles.len() * dim];
        for (row, out) in rows.iter().zip(values.chunks_exact_mut(dim.max(1))) {
            if let Some(at) = row {
                out.copy_from_slice(&vectors[*at]);
            }
        }
        let known: Vec<bool> = rows.iter().map(Option::is_some).collect();
        Ok(Self::standardised(dim, values, known, size))
    }

    /// Centres and scales every dimension over the known rows, to a root mean square of `size`.
    pub fn standardised(dim: usize, mut values: Vec<f32>, known: Vec<bool>, size: f32) -> Self {
        let n = known.iter().filter(|k| **k).count().max(1) as f64;
        let rows = |values: &[f32], f: &mut dyn FnMut(usize, f64)| {
            for (row, _) in values.chunks_exact(dim.max(1)).zip(&known).filter(|(_, known)| **known) {
                row.iter().enumerate().for_each(|(d, &x)| f(d, f64::from(x)));
            }
        };
        let (mut mean, mut square) = (vec![0f64; dim], vec![0f64; dim]);
        rows(&values, &mut |d, x| mean[d] += x / n);
        rows(&values, &mut |d, x| square[d] += (x - mean[d]) * (x - mean[d]) / n);
        for (row, known) in values.chunks_exact_mut(dim.max(1)).zip(&known) {
            for (d, x) in row.iter_mut().enumerate() {
                // A dimension in which all titles are alike tells nothing.
                let deviation = square[d].sqrt();
                let useful = *known && deviation > 1e-6;
                *x = if useful { ((f64::from(*x) - mean[d]) / deviation * f64::from(size)) as f32 } else { 0.0 };
            }
        }
        TitleTable { dim, values, known, size }
    }
}

/// Root mean square of the LLM's token embeddings.
///
/// # Errors
/// They cannot be read (exit 65).
pub fn token_size(weights: &Weights) -> Result<f32> {
    let values = weights.values(EMBEDDING)?;
    Ok(root_mean_square(&values))
}

/// Root mean square.
pub fn root_mean_square(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (sum / values.len().max(1) as f64).sqrt() as f32
}
