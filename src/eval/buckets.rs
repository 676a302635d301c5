//! The groups of users that figures are reported for: all of them, and each third by history.
//!
//! In: the bucket of a user, as in the tables. Out: the groups that it belongs to.

/// A group of users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slice {
    /// Every user.
    All,
    /// The third with the fewest interactions.
    Tail,
    /// The third between.
    Torso,
    /// The third with the most interactions.
    Head,
}

impl Slice {
    /// In the order of the tables.
    pub const EACH: [Slice; 4] = [Slice::All, Slice::Tail, Slice::Torso, Slice::Head];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Slice::All => "all",
            Slice::Tail => "tail",
            Slice::Torso => "torso",
            Slice::Head => "head",
        }
    }

    /// Whether a user of this bucket belongs to it; one whose bucket is not known is in `All` alone.
    pub fn has(self, bucket: Option<&str>) -> bool {
        self == Slice::All || bucket == Some(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_in_all_and_in_its_third() {
        let of = |bucket| Slice::EACH.map(|s| s.has(bucket));
        assert_eq!(of(Some("torso")), [true, false, true, false]);
        assert_eq!(of(None), [true, false, false, false]);
        assert_eq!(of(Some("all")), [true, false, false, false]);
    }
}
