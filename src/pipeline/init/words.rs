//! What the names of columns say: `userId`, `movie_id`, `ts`.
//!
//! In: a column's name as it stands in the file. Out: how likely it means one of our columns, in 0..=1, and the noun of
//! the items for the prompts.

/// Names of people who do things.
const USERS: &[&str] = &[
    "user",
    "uid",
    "customer",
    "cust",
    "client",
    "member",
    "visitor",
    "account",
    "reader",
    "viewer",
    "listener",
    "player",
    "buyer",
    "reviewer",
    "subscriber",
    "profile",
    "person",
    "household",
    "session",
];

/// Names of things that things are done to, with the plural for the prompts.
const ITEMS: &[(&str, &str)] = &[
    ("item", "items"),
    ("movie", "movies"),
    ("film", "films"),
    ("product", "products"),
    ("sku", "products"),
    ("asin", "products"),
    ("book", "books"),
    ("isbn", "books"),
    ("track", "songs"),
    ("song", "songs"),
    ("artist", "artists"),
    ("article", "articles"),
    ("news", "articles"),
    ("video", "videos"),
    ("show", "shows"),
    ("game", "games"),
    ("anime", "anime"),
    ("recipe", "recipes"),
    ("course", "courses"),
    ("app", "apps"),
    ("job", "jobs"),
    ("listing", "listings"),
    ("offer", "offers"),
    ("business", "businesses"),
    ("restaurant", "restaurants"),
    ("hotel", "hotels"),
    ("content", "items"),
    ("iid", "items"),
    ("pid", "products"),
    ("mid", "items"),
];

const TIMES: &[&str] =
    &["timestamp", "ts", "time", "datetime", "date", "unixtime", "created", "occurred", "at", "when"];
const RATINGS: &[&str] = &["rating", "stars", "star", "score", "rate", "grade", "overall", "preference"];
const TITLES: &[&str] = &["title", "name", "headline", "label", "caption"];
/// What may stand beside such a word without changing its meaning.
const FILLERS: &[&str] = &["id", "key", "no", "nr", "number", "code", "hash", "event", "unix", "utc"];

/// `userId`, `USER-ID` and `user_id` -> `["user", "id"]`.
fn tokens(name: &str) -> Vec<String> {
    let mut tokens = vec![String::new()];
    let mut before_is_lower = false;
    for c in name.chars() {
        let starts = c.is_uppercase() && before_is_lower;
        if (!c.is_alphanumeric() || starts) && tokens.last().is_some_and(|t| !t.is_empty()) {
            tokens.push(String::new());
        }
        if c.is_alphanumeric()
            && let Some(last) = tokens.last_mut()
        {
            last.extend(c.to_lowercase());
        }
        before_is_lower = c.is_lowercase() || c.is_ascii_digit();
    }
    tokens.retain(|t| !t.is_empty());
    // `userid`, `itemid`: one word that ends in `id`.
    if let [one] = tokens.as_slice()
        && let Some(head) = one.strip_suffix("id")
        && head.len() >= 3
    {
        return vec![head.to_owned(), "id".to_owned()];
    }
    tokens
}

/// 1 where the name is one of the words alone or beside fillers, 0.6 where it is among others, else 0. Plurals count.
fn likeness<'a>(name: &str, words: impl Iterator<Item = &'a str> + Clone) -> f64 {
    let tokens = tokens(name);
    let is = |t: &str| words.clone().any(|w| w == t || t.strip_suffix('s') == Some(w));
    match (tokens.iter().any(|t| is(t)), tokens.iter().all(|t| is(t) || FILLERS.contains(&t.as_str()))) {
        (true, true) => 1.0,
        (true, false) => 0.6,
        _ => 0.0,
    }
}

/// How much a name looks like the user's.
pub fn user(name: &str) -> f64 {
    likeness(name, USERS.iter().copied())
}

/// How much a name looks like the item's.
pub fn item(name: &str) -> f64 {
    likeness(name, ITEMS.iter().map(|(w, _)| *w))
}

/// How much a name looks like a time's.
pub fn time(name: &str) -> f64 {
    likeness(name, TIMES.iter().copied())
}

/// How much a name looks like a rating's.
pub fn rating(name: &str) -> f64 {
    likeness(name, RATINGS.iter().copied())
}

/// How much a name looks like a title's; earlier words of the list are the better ones.
pub fn title(name: &str) -> f64 {
    let tokens = tokens(name);
    let place = TITLES.iter().position(|w| tokens.iter().any(|t| t == w));
    place.map_or(0.0, |p| 1.0 - p as f64 * 0.1 - if tokens.len() > 1 { 0.05 } else { 0.0 })
}

/// Whether a name is no more than `id`, which in an item table is the item's.
pub fn is_plain_id(name: &str) -> bool {
    matches!(tokens(name).as_slice(), [one] if one == "id" || one == "key")
}

/// What the items are called in prompts, by the names of columns and files: `movies`, or `items`.
pub fn noun<'a>(names: impl IntoIterator<Item = &'a str>) -> &'static str {
    let found = names.into_iter().flat_map(tokens).find_map(|t| {
        ITEMS.iter().find(|(w, plural)| (*w == t || *plural == t) && *plural != "items").map(|(_, plural)| *plural)
    });
    found.unwrap_or("items")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_many_styles_are_understood() {
        for name in ["user_id", "userId", "UserID", "uid", "CUSTOMER-KEY", "customer_no", "userid", "users"] {
            assert_eq!(user(name), 1.0, "{name}: {:?}", tokens(name));
        }
        for name in ["movie", "itemId", "asin", "article_id", "product code", "ISBN"] {
            assert_eq!(item(name), 1.0, "{name}: {:?}", tokens(name));
        }
        assert_eq!(time("event_ts"), 1.0);
        assert_eq!(time("created_at"), 1.0);
        assert_eq!(rating("stars"), 1.0);
        assert!(title("title") > title("name") && title("name") > title("publisher_name"));
        assert_eq!(user("country"), 0.0);
        assert!(user("user_country") < 1.0);
        assert_eq!(noun(["movie_id"]), "movies");
        assert_eq!(noun(["data/books.csv", "id"]), "books");
        assert_eq!(noun(["x"]), "items");
    }
}
