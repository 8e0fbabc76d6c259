//! What may be generated: a set of tokens per step, decided by someone outside the engine.

/// A set of token ids, one bit each, 32 to a word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSet(Vec<u32>);

impl TokenSet {
    /// The set whose member `id` is bit `id % 32` of word `id / 32`.
    pub fn from_words(words: Vec<u32>) -> TokenSet {
        TokenSet(words)
    }

    /// Whether `id` is a member; ids behind the last word are not.
    pub fn contains(&self, id: u32) -> bool {
        self.0
            .get(id as usize / 32)
            .is_some_and(|word| word >> (id % 32) & 1 != 0)
    }

    /// The members that `other` has too.
    pub fn and(&self, other: &TokenSet) -> TokenSet {
        TokenSet(self.0.iter().zip(&other.0).map(|(a, b)| a & b).collect())
    }

    /// Members.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// True without members.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }
}

impl FromIterator<u32> for TokenSet {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> TokenSet {
        let mut words = Vec::new();
        for id in ids {
            let at = id as usize / 32;
            if words.len() <= at {
                words.resize(at + 1, 0);
            }
            words[at] |= 1 << (id % 32);
        }
        TokenSet(words)
    }
}

/// Why a constraint can't go on: a lower-case fragment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintError(pub String);

/// Follows one generation and says which tokens may come next.
pub trait Constraint: Send {
    /// The tokens that may come next. An end-of-generation token is among them where the
    /// text may end; nothing else is, where it must.
    ///
    /// # Errors
    /// When working it out would cost more than the constraint allows itself.
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError>;

    /// Of the allowed tokens those that lead to an end soonest, as far as the constraint can
    /// tell: all of them, where it can't.
    ///
    /// # Errors
    /// As [`Constraint::allowed`].
    fn closing(&mut self) -> Result<TokenSet, ConstraintError> {
        self.allowed()
    }

    /// The tokens that may come where `left` more may be generated at most and `done` have
    /// been: those that lead to an end, once only a quarter of the whole is left. An answer
    /// that is cut off is of no use to those who constrain it.
    ///
    /// # Errors
    /// As [`Constraint::allowed`].
    fn allowed_with(&mut self, left: usize, done: usize) -> Result<TokenSet, ConstraintError> {
        match left <= (left.saturating_add(done) / 4).max(16) {
            false => self.allowed(),
            true => self.closing(),
        }
    }

    /// Goes on behind `id`, which was allowed.
    ///
    /// # Errors
    /// When it was not, or as [`Constraint::allowed`].
    fn accept(&mut self, id: u32) -> Result<(), ConstraintError>;

    /// Whether nothing more may come.
    fn is_complete(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_hold_what_was_put_in() {
        let set: TokenSet = [0, 31, 32, 100].into_iter().collect();
        assert!([0, 31, 32, 100].iter().all(|&id| set.contains(id)));
        assert!(
            [1, 30, 33, 99, 128, u32::MAX]
                .iter()
                .all(|&id| !set.contains(id))
        );
        assert_eq!((set.len(), set.is_empty()), (4, false));
        assert!(TokenSet::default().is_empty());
        let other = [31, 33].into_iter().collect();
        assert!(set.and(&other).contains(31));
        assert_eq!(set.and(&other).len(), 1);
    }
}
