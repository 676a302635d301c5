//! What a prompt shows where a pipeline does not say: the same for asking (`prompt`, `prompt_ratings`) and for tuning
//! (`instruct`), so that the LLM is tuned on what it will be asked.

/// Titles of the user's history at most, the latest ones.
pub fn history_items() -> usize {
    30
}

/// Titles of the similar user's history at most, the latest ones.
pub fn similar_items() -> usize {
    10
}

/// Titles of the recommender's prediction, its best ones.
pub fn prediction_items() -> usize {
    5
}

/// What the items are, in the plural.
pub fn noun() -> String {
    "items".to_owned()
}

/// Characters of a title at most; longer ones are cut.
pub fn max_title_chars() -> usize {
    120
}
