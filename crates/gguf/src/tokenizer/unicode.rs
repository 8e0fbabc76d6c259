//! Character classes as the pre-tokenizers' regular expressions name them.
//!
//! `\p{L}`, `\p{N}` and the others are Unicode general categories; `\s` is the property
//! `White_Space`. ASCII is answered from a table, the rest by `unicode-general-category`.

use unicode_general_category::{GeneralCategory, get_general_category};

/// A set of character classes, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class(u16);

impl Class {
    /// Uppercase and titlecase letters: `Lu`, `Lt`.
    pub(crate) const UPPER: Class = Class(1 << 0);
    /// Lowercase letters: `Ll`.
    pub(crate) const LOWER: Class = Class(1 << 1);
    /// Letters without case: `Lm`, `Lo`.
    pub(crate) const CASELESS: Class = Class(1 << 2);
    /// `\p{N}`.
    pub(crate) const NUMBER: Class = Class(1 << 3);
    /// `\p{P}`.
    pub(crate) const PUNCTUATION: Class = Class(1 << 4);
    /// `\p{S}`.
    pub(crate) const SYMBOL: Class = Class(1 << 5);
    /// `\p{M}`.
    pub(crate) const MARK: Class = Class(1 << 6);
    /// `\s`.
    pub(crate) const SPACE: Class = Class(1 << 7);
    /// `\r` and `\n`.
    pub(crate) const NEWLINE: Class = Class(1 << 8);
    /// `\p{L}`.
    pub(crate) const LETTER: Class = Class(Self::UPPER.0 | Self::LOWER.0 | Self::CASELESS.0);

    /// Both sets together.
    pub(crate) const fn or(self, other: Class) -> Class {
        Class(self.0 | other.0)
    }

    /// Whether the sets have a class in common.
    pub(crate) const fn is(self, other: Class) -> bool {
        self.0 & other.0 != 0
    }

    /// The classes of `c`; empty for control, format, unassigned and private-use characters.
    pub(crate) fn of(c: char) -> Class {
        match ASCII.get(c as usize) {
            Some(class) => *class,
            None => Self::of_any(c),
        }
    }

    fn of_any(c: char) -> Class {
        use GeneralCategory as G;
        let category = match get_general_category(c) {
            G::UppercaseLetter | G::TitlecaseLetter => Self::UPPER,
            G::LowercaseLetter => Self::LOWER,
            G::ModifierLetter | G::OtherLetter => Self::CASELESS,
            G::DecimalNumber | G::LetterNumber | G::OtherNumber => Self::NUMBER,
            G::ConnectorPunctuation
            | G::DashPunctuation
            | G::OpenPunctuation
            | G::ClosePunctuation
            | G::InitialPunctuation
            | G::FinalPunctuation
            | G::OtherPunctuation => Self::PUNCTUATION,
            G::MathSymbol | G::CurrencySymbol | G::ModifierSymbol | G::OtherSymbol => Self::SYMBOL,
            G::NonspacingMark | G::SpacingMark | G::EnclosingMark => Self::MARK,
            _ => Class(0),
        };
        if c.is_whitespace() {
            category.or(Self::SPACE)
        } else {
            category
        }
    }
}

static ASCII: [Class; 128] = ascii_table();

const fn ascii_table() -> [Class; 128] {
    let mut table = [Class(0); 128];
    let mut i = 0;
    while i < 128 {
        table[i] = match i as u8 {
            b'A'..=b'Z' => Class::UPPER,
            b'a'..=b'z' => Class::LOWER,
            b'0'..=b'9' => Class::NUMBER,
            b'\r' | b'\n' => Class::SPACE.or(Class::NEWLINE),
            b'\t' | 0x0b | 0x0c | b' ' => Class::SPACE,
            b'$' | b'+' | b'<' | b'=' | b'>' | b'^' | b'`' | b'|' | b'~' => Class::SYMBOL,
            b'!'..=b'/' | b':'..=b'@' | b'['..=b'`' | b'{'..=b'~' => Class::PUNCTUATION,
            _ => Class(0),
        };
        i += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascii_table_agrees_with_the_general_categories() {
        for c in (0u8..128).map(char::from) {
            let newline = if matches!(c, '\r' | '\n') {
                Class::NEWLINE
            } else {
                Class(0)
            };
            assert_eq!(Class::of(c), Class::of_any(c).or(newline), "{c:?}");
        }
    }

    /// `regex-syntax` generates its tables from the Unicode database on its own; code points
    /// that one Unicode version assigns and the other doesn't are the only ones that may differ.
    #[test]
    fn classes_agree_with_regex_syntax_for_every_code_point() {
        let sets = [
            (r"\p{Lu}|\p{Lt}", Class::UPPER),
            (r"\p{Ll}", Class::LOWER),
            (r"\p{Lm}|\p{Lo}", Class::CASELESS),
            (r"\p{N}", Class::NUMBER),
            (r"\p{P}", Class::PUNCTUATION),
            (r"\p{S}", Class::SYMBOL),
            (r"\p{M}", Class::MARK),
            (r"\s", Class::SPACE),
            (r"[\r\n]", Class::NEWLINE),
        ];
        let assigned = regex::Regex::new(r"^\P{Cn}$").expect("pattern");
        for (pattern, class) in sets {
            let re = regex::Regex::new(&format!("^(?:{pattern})$")).expect("pattern");
            let mut buffer = [0u8; 4];
            for c in '\0'..=char::MAX {
                let text: &str = c.encode_utf8(&mut buffer);
                if Class::of(c).is(class) != re.is_match(text) {
                    let ours = get_general_category(c) != GeneralCategory::Unassigned;
                    assert!(
                        ours != assigned.is_match(text),
                        "{pattern} and U+{:04X} ({:?})",
                        c as u32,
                        get_general_category(c)
                    );
                }
            }
        }
    }
}
