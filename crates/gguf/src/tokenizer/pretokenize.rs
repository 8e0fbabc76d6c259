//! Pre-tokenizers: how text is cut into words before byte-level BPE merges within each word.
//!
//! A pre-tokenizer is a list of [`Rule`]s. Each rule goes over every piece that the rules
//! before it have left, finds matches from left to right, and makes each match and each gap
//! between matches a piece of its own. Rules see nothing outside their piece. This is how the
//! Hugging Face `Split(Isolated)` sequences work that the models were trained with.
//!
//! The rules are published as regular expressions; here they are hand-written scanners that
//! look at each character a bounded number of times, so that no text makes them slow.
//! The tests hold them against the expressions themselves.

use std::ops::Range;

use super::unicode::Class;

/// How `tokenizer.ggml.pre` splits words, and what else the name implies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PreTokenizer {
    pub(crate) rules: &'static [Rule],
    /// A word that is itself a token is taken whole, whatever the merges say.
    pub(crate) ignore_merges: bool,
    /// Whether a beginning-of-sequence token is added when the file doesn't say.
    pub(crate) add_bos: bool,
}

/// A set of characters.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Set {
    /// Members of any of the classes.
    Classes(Class),
    /// Members of any of the classes, or of the string.
    ClassesAnd(Class, &'static str),
    /// Code points in the inclusive ranges, sorted.
    Ranges(&'static [(char, char)]),
}

impl Set {
    fn has(&self, c: char) -> bool {
        match self {
            Set::Classes(classes) => Class::of(c).is(*classes),
            Set::ClassesAnd(classes, more) => Class::of(c).is(*classes) || more.contains(c),
            Set::Ranges(ranges) => {
                let at = ranges.partition_point(|&(_, last)| last < c);
                ranges.get(at).is_some_and(|&(first, _)| first <= c)
            }
        }
    }
}

/// One step of a pre-tokenizer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rule {
    /// `set{1,max}`.
    Run { set: Set, max: usize },
    /// `\s?set+`.
    SpaceAndRun(Set),
    /// `\s+$`.
    TrailingSpace,
    /// `[0-9][0-9][0-9]`.
    ThreeDigits,
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
    Gpt2,
    /// The GPT-4 expression and its variations.
    Words(Words),
    /// `[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
    DeepSeekV3,
}

/// The variations of the GPT-4 expression:
/// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    pub(crate) contractions: Contractions,
    pub(crate) letters: Letters,
    /// How many digits make a word at most.
    pub(crate) digits: usize,
    /// Characters that a run of punctuation takes along at its end, besides `\r` and `\n`.
    pub(crate) tail: Tail,
}

/// Where `'s`, `'re` and so on (of either case) are matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contractions {
    /// As words of their own.
    Words,
    /// As the end of the word before.
    Suffix,
    /// Nowhere.
    None,
}

/// What makes the letters of one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Letters {
    /// `\p{L}+`.
    Plain,
    /// `[\p{L}\p{M}]+`; punctuation then excludes `\p{M}`.
    WithMarks,
    /// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+` or else
    /// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*`.
    ByCase,
}

/// The end of `[^\s\p{L}\p{N}]+…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// `[\r\n]*`.
    Newlines,
    /// `[\r\n/]*`.
    NewlinesAndSlashes,
}

const fn run(classes: Class) -> Rule {
    Rule::Run {
        set: Set::Classes(classes),
        max: usize::MAX,
    }
}

const fn each(classes: Class) -> Rule {
    Rule::Run {
        set: Set::Classes(classes),
        max: 1,
    }
}

const fn words(letters: Letters, digits: usize) -> Rule {
    Rule::Words(Words {
        contractions: Contractions::Words,
        letters,
        digits,
        tail: Tail::Newlines,
    })
}

/// `[一-龥ࠀ-一가-퟿]`.
const CJK: &[(char, char)] = &[('\u{0800}', '\u{9FA5}'), ('\u{AC00}', '\u{D7FF}')];

/// `[一-龥぀-ゟ゠-ヿ]`.
const CJK_KANA: &[(char, char)] = &[('\u{3040}', '\u{30FF}'), ('\u{4E00}', '\u{9FA5}')];

/// `[!-/:-~！-／：-～‘-‟　-。]`.
const DEEPSEEK_PUNCTUATION: &[(char, char)] = &[
    ('!', '/'),
    (':', '~'),
    ('\u{2018}', '\u{201F}'),
    ('\u{3000}', '\u{3002}'),
    ('\u{FF01}', '\u{FF0F}'),
    ('\u{FF1A}', '\u{FF5E}'),
];

/// The cased letters that DeepSeek LLM's expression lists one by one.
const DEEPSEEK_LETTERS: &[(char, char)] = &[
    ('A', 'Z'),
    ('a', 'z'),
    ('\u{00B5}', '\u{00B5}'),
    ('\u{00C0}', '\u{00D6}'),
    ('\u{00D8}', '\u{00F6}'),
    ('\u{00F8}', '\u{01BA}'),
    ('\u{01BC}', '\u{01BF}'),
    ('\u{01C4}', '\u{0293}'),
    ('\u{0295}', '\u{02AF}'),
    ('\u{0370}', '\u{0373}'),
    ('\u{0376}', '\u{0377}'),
    ('\u{037B}', '\u{037D}'),
    ('\u{037F}', '\u{037F}'),
    ('\u{0386}', '\u{0386}'),
    ('\u{0388}', '\u{038A}'),
    ('\u{038C}', '\u{038C}'),
    ('\u{038E}', '\u{03A1}'),
    ('\u{03A3}', '\u{03F5}'),
    ('\u{03F7}', '\u{0481}'),
    ('\u{048A}', '\u{052F}'),
    ('\u{0531}', '\u{0556}'),
    ('\u{10A0}', '\u{10C5}'),
    ('\u{13A0}', '\u{13F5}'),
    ('\u{13F8}', '\u{13FD}'),
    ('\u{1C90}', '\u{1CBA}'),
    ('\u{1CBD}', '\u{1CBF}'),
    ('\u{1D00}', '\u{1D2B}'),
    ('\u{1D6B}', '\u{1D77}'),
    ('\u{1D79}', '\u{1D9A}'),
    ('\u{1E00}', '\u{1F15}'),
    ('\u{1F18}', '\u{1F1D}'),
    ('\u{1F20}', '\u{1F45}'),
    ('\u{1F48}', '\u{1F4D}'),
    ('\u{1F50}', '\u{1F57}'),
    ('\u{1F59}', '\u{1F59}'),
    ('\u{1F5B}', '\u{1F5B}'),
    ('\u{1F5D}', '\u{1F5D}'),
    ('\u{1F5F}', '\u{1F7D}'),
    ('\u{1F80}', '\u{1FB4}'),
    ('\u{1FB6}', '\u{1FBC}'),
    ('\u{1FBE}', '\u{1FBE}'),
    ('\u{1FC2}', '\u{1FC4}'),
    ('\u{1FC6}', '\u{1FCC}'),
    ('\u{1FD0}', '\u{1FD3}'),
    ('\u{1FD6}', '\u{1FDB}'),
    ('\u{1FE0}', '\u{1FEC}'),
    ('\u{1FF2}', '\u{1FF4}'),
    ('\u{1FF6}', '\u{1FFC}'),
    ('\u{2102}', '\u{2102}'),
    ('\u{2107}', '\u{2107}'),
    ('\u{210A}', '\u{2113}'),
    ('\u{2115}', '\u{2115}'),
    ('\u{2119}', '\u{211D}'),
    ('\u{2124}', '\u{2124}'),
    ('\u{2126}', '\u{2126}'),
    ('\u{2128}', '\u{2128}'),
    ('\u{212A}', '\u{212D}'),
    ('\u{212F}', '\u{2134}'),
    ('\u{2139}', '\u{2139}'),
    ('\u{213C}', '\u{213F}'),
    ('\u{2145}', '\u{2149}'),
    ('\u{214E}', '\u{214E}'),
    ('\u{2183}', '\u{2184}'),
    ('\u{2C00}', '\u{2C7B}'),
    ('\u{2C7E}', '\u{2CE4}'),
    ('\u{2CEB}', '\u{2CEE}'),
    ('\u{2CF2}', '\u{2CF3}'),
    ('\u{A640}', '\u{A66D}'),
    ('\u{A680}', '\u{A69B}'),
    ('\u{A722}', '\u{A76F}'),
    ('\u{A771}', '\u{A787}'),
    ('\u{A78B}', '\u{A78E}'),
    ('\u{AB70}', '\u{ABBF}'),
    ('\u{FB00}', '\u{FB06}'),
    ('\u{FB13}', '\u{FB17}'),
    ('\u{FF21}', '\u{FF3A}'),
    ('\u{FF41}', '\u{FF5A}'),
    ('\u{10400}', '\u{1044F}'),
    ('\u{104B0}', '\u{104D3}'),
    ('\u{104D8}', '\u{104FB}'),
    ('\u{10C80}', '\u{10CB2}'),
    ('\u{10CC0}', '\u{10CF2}'),
    ('\u{118A0}', '\u{118DF}'),
    ('\u{1E900}', '\u{1E943}'),
];

const GPT2: &[Rule] = &[Rule::Gpt2];
const DIGITS_GPT2: &[Rule] = &[each(Class::NUMBER), Rule::Gpt2];
const LLAMA3: &[Rule] = &[words(Letters::Plain, 3)];
const QWEN2: &[Rule] = &[words(Letters::Plain, 1)];
const QWEN35: &[Rule] = &[words(Letters::WithMarks, 1)];
const DEEPSEEK_CODER: &[Rule] = &[
    each(Class::NEWLINE),
    Rule::SpaceAndRun(Set::Classes(Class::LETTER)),
    Rule::SpaceAndRun(Set::Classes(Class::PUNCTUATION)),
    Rule::Run {
        set: Set::Ranges(CJK),
        max: usize::MAX,
    },
    each(Class::NUMBER),
];
const DEEPSEEK_LLM: &[Rule] = &[
    each(Class::NEWLINE),
    Rule::SpaceAndRun(Set::Ranges(DEEPSEEK_LETTERS)),
    Rule::SpaceAndRun(Set::Ranges(DEEPSEEK_PUNCTUATION)),
    Rule::TrailingSpace,
    Rule::Run {
        set: Set::Ranges(CJK),
        max: usize::MAX,
    },
    run(Class::NUMBER),
];
const DEEPSEEK_V3: &[Rule] = &[
    Rule::Run {
        set: Set::Classes(Class::NUMBER),
        max: 3,
    },
    Rule::Run {
        set: Set::Ranges(CJK_KANA),
        max: usize::MAX,
    },
    Rule::DeepSeekV3,
];
const FALCON: &[Rule] = &[
    Rule::Run {
        set: Set::ClassesAnd(Class::PUNCTUATION, "$+<=>^~|`"),
        max: usize::MAX,
    },
    Rule::Gpt2,
    Rule::ThreeDigits,
];
const DEFAULT_RULES: &[Rule] = &[
    Rule::Run {
        set: Set::ClassesAnd(Class::PUNCTUATION, "$+<=>^~|"),
        max: usize::MAX,
    },
    Rule::Gpt2,
    run(Class::NUMBER),
    Rule::ThreeDigits,
];
const TEKKEN: &[Rule] = &[Rule::Words(Words {
    contractions: Contractions::None,
    letters: Letters::ByCase,
    digits: 1,
    tail: Tail::NewlinesAndSlashes,
})];
const GPT_4O: &[Rule] = &[Rule::Words(Words {
    contractions: Contractions::Suffix,
    letters: Letters::ByCase,
    digits: 3,
    tail: Tail::NewlinesAndSlashes,
})];

/// Every name of `tokenizer.ggml.pre` that is known, by the rules it stands for.
const NAMES: &[(&[&str], PreTokenizer)] = &[
    (&["default"], DEFAULT),
    (
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        PreTokenizer {
            rules: LLAMA3,
            ignore_merges: true,
            add_bos: true,
        },
    ),
    (&["dbrx", "smaug-bpe", "chatglm-bpe"], plain(LLAMA3)),
    (
        &["glm4", "glm5"],
        PreTokenizer {
            rules: LLAMA3,
            ignore_merges: true,
            add_bos: false,
        },
    ),
    (
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "megrez",
            "grok-2",
        ],
        plain(QWEN2),
    ),
    (&["qwen35"], plain(QWEN35)),
    (
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        plain(GPT2),
    ),
    (
        &[
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        plain(DIGITS_GPT2),
    ),
    (&["deepseek-llm"], plain(DEEPSEEK_LLM)),
    (&["deepseek-coder"], plain(DEEPSEEK_CODER)),
    (
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        plain(DEEPSEEK_V3),
    ),
    (&["falcon"], plain(FALCON)),
    (
        &["tekken"],
        PreTokenizer {
            rules: TEKKEN,
            ignore_merges: true,
            add_bos: true,
        },
    ),
    (
        &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"],
        plain(GPT_4O),
    ),
];

/// For files that name no pre-tokenizer, or one that isn't known.
pub(crate) const DEFAULT: PreTokenizer = plain(DEFAULT_RULES);

const fn plain(rules: &'static [Rule]) -> PreTokenizer {
    PreTokenizer {
        rules,
        ignore_merges: false,
        add_bos: false,
    }
}

impl PreTokenizer {
    /// The pre-tokenizer that `tokenizer.ggml.pre` names.
    pub(crate) fn by_name(name: &str) -> Option<PreTokenizer> {
        NAMES
            .iter()
            .find(|(names, _)| names.contains(&name))
            .map(|(_, found)| *found)
    }

    /// All known names.
    pub(crate) fn names() -> impl Iterator<Item = &'static str> {
        NAMES.iter().flat_map(|(names, _)| names.iter().copied())
    }

    /// Byte ranges of the words of `text`, which cover it without gaps.
    pub(crate) fn split(&self, text: &str) -> Vec<Range<usize>> {
        let mut pieces = Vec::new();
        if !text.is_empty() {
            pieces.push(0..text.len());
        }
        for rule in self.rules {
            let mut finer = Vec::with_capacity(pieces.len());
            for piece in pieces {
                rule.split(text, piece, &mut finer);
            }
            pieces = finer;
        }
        pieces
    }
}

impl Rule {
    fn split(&self, text: &str, piece: Range<usize>, out: &mut Vec<Range<usize>>) {
        let scan = Scan {
            text: &text[piece.clone()],
        };
        let mut gap = 0;
        let mut at = 0;
        while let Some(c) = scan.char(at) {
            match self.match_at(scan, at) {
                Some(end) => {
                    if gap < at {
                        out.push(piece.start + gap..piece.start + at);
                    }
                    out.push(piece.start + at..piece.start + end);
                    gap = end;
                    at = end;
                }
                // A run of white space that isn't at the end can't be so from a later start
                // either: skipping it whole keeps the scan linear.
                None if matches!(self, Rule::TrailingSpace) && c.is_whitespace() => {
                    at = scan.run(at, |c| c.is_whitespace());
                }
                None => at += c.len_utf8(),
            }
        }
        if gap < at {
            out.push(piece.start + gap..piece.start + at);
        }
    }

    /// Where the match that starts at `at` ends, which is always past `at`.
    fn match_at(&self, scan: Scan, at: usize) -> Option<usize> {
        match self {
            Rule::Run { set, max } => past(at, scan.run_up_to(at, *max, |c| set.has(c))),
            Rule::SpaceAndRun(set) => {
                // With the optional space taken or, failing that, without it.
                let first = scan.char(at)?;
                if first.is_whitespace() {
                    let from = at + first.len_utf8();
                    if let Some(end) = past(from, scan.run(from, |c| set.has(c))) {
                        return Some(end);
                    }
                }
                past(at, scan.run(at, |c| set.has(c)))
            }
            Rule::TrailingSpace => {
                let end = scan.run(at, |c| c.is_whitespace());
                (at < end && end == scan.text.len()).then_some(end)
            }
            Rule::ThreeDigits => {
                let digits = scan.text.as_bytes().get(at..at + 3)?;
                digits.iter().all(u8::is_ascii_digit).then_some(at + 3)
            }
            Rule::Gpt2 => scan.gpt2(at),
            Rule::Words(words) => scan.words(at, words),
            Rule::DeepSeekV3 => scan.deepseek_v3(at),
        }
    }
}

/// `Some(end)` if anything was matched.
fn past(start: usize, end: usize) -> Option<usize> {
    (end > start).then_some(end)
}

/// One piece of text; positions are byte offsets at character boundaries.
#[derive(Clone, Copy)]
struct Scan<'a> {
    text: &'a str,
}

impl Scan<'_> {
    fn char(self, at: usize) -> Option<char> {
        self.text.get(at..)?.chars().next()
    }

    fn class(self, at: usize) -> Option<Class> {
        self.char(at).map(Class::of)
    }

    fn run(self, at: usize, member: impl Fn(char) -> bool) -> usize {
        self.run_up_to(at, usize::MAX, member)
    }

    fn run_up_to(self, at: usize, max: usize, member: impl Fn(char) -> bool) -> usize {
        let rest = &self.text[at..];
        let end = rest.char_indices().take(max).find(|&(_, c)| !member(c));
        match end {
            Some((len, _)) => at + len,
            None => rest
                .char_indices()
                .nth(max)
                .map_or(self.text.len(), |(len, _)| at + len),
        }
    }

    fn class_run(self, at: usize, classes: Class) -> usize {
        self.run(at, |c| Class::of(c).is(classes))
    }

    /// `'s|'t|'re|'ve|'m|'ll|'d`, case-folded if `any_case`.
    ///
    /// Case folding has U+017F, the long s, stand for `s`.
    fn contraction(self, at: usize, any_case: bool) -> Option<usize> {
        let rest = self.text[at..].strip_prefix('\'')?;
        let fold = |c: char| match c {
            '\u{17F}' if any_case => 's',
            _ if any_case => c.to_ascii_lowercase(),
            _ => c,
        };
        let mut chars = rest.chars();
        let first = chars.next()?;
        let len = match fold(first) {
            's' | 't' | 'm' | 'd' => first.len_utf8(),
            'r' | 'v' if chars.next().map(fold) == Some('e') => 2,
            'l' if chars.next().map(fold) == Some('l') => 2,
            _ => return None,
        };
        Some(at + 1 + len)
    }

    /// `\s+(?!\S)|\s+`.
    fn spaces(self, at: usize) -> Option<usize> {
        let end = self.run(at, char::is_whitespace);
        if end == self.text.len() {
            return past(at, end);
        }
        let last = self.text[at..end].chars().next_back()?;
        let before_last = end - last.len_utf8();
        Some(if before_last > at { before_last } else { end })
    }

    /// `\s*[\r\n]+`: up to the last line break of the white space at `at`.
    fn line_breaks(self, at: usize) -> Option<usize> {
        let end = self.run(at, char::is_whitespace);
        let last = self.text[at..end].rfind(['\r', '\n'])?;
        Some(at + last + 1)
    }

    fn gpt2(self, at: usize) -> Option<usize> {
        if let Some(end) = self.contraction(at, false) {
            return Some(end);
        }
        let first = self.char(at)?;
        let from = if first == ' ' { at + 1 } else { at };
        if let Some(class) = self.class(from) {
            let known = Class::SPACE.or(Class::LETTER).or(Class::NUMBER);
            if class.is(Class::LETTER) {
                return Some(self.class_run(from, Class::LETTER));
            }
            if class.is(Class::NUMBER) {
                return Some(self.class_run(from, Class::NUMBER));
            }
            if !class.is(known) {
                return Some(self.run(from, |c| !Class::of(c).is(known)));
            }
        }
        self.spaces(at)
    }

    fn words(self, at: usize, rule: &Words) -> Option<usize> {
        if rule.contractions == Contractions::Words
            && let Some(end) = self.contraction(at, true)
        {
            return Some(end);
        }
        let letters = match rule.letters {
            Letters::Plain => self.letters(at, Class::LETTER),
            Letters::WithMarks => self.letters(at, Class::LETTER.or(Class::MARK)),
            Letters::ByCase => self.letters_by_case(at),
        };
        if let Some(end) = letters {
            return Some(match rule.contractions {
                Contractions::Suffix => self.contraction(end, true).unwrap_or(end),
                Contractions::Words | Contractions::None => end,
            });
        }
        let number = |c| Class::of(c).is(Class::NUMBER);
        if let Some(end) = past(at, self.run_up_to(at, rule.digits, number)) {
            return Some(end);
        }
        let mut known = Class::SPACE.or(Class::LETTER).or(Class::NUMBER);
        if rule.letters == Letters::WithMarks {
            known = known.or(Class::MARK);
        }
        let from = if self.char(at)? == ' ' { at + 1 } else { at };
        if let Some(end) = past(from, self.run(from, |c| !Class::of(c).is(known))) {
            return Some(match rule.tail {
                Tail::Newlines => self.run(end, |c| matches!(c, '\r' | '\n')),
                Tail::NewlinesAndSlashes => self.run(end, |c| matches!(c, '\r' | '\n' | '/')),
            });
        }
        self.line_breaks(at).or_else(|| self.spaces(at))
    }

    /// `[^\r\n\p{L}\p{N}]?letters+`.
    fn letters(self, at: usize, letters: Class) -> Option<usize> {
        let first = self.char(at)?;
        let class = Class::of(first);
        if class.is(letters) {
            return Some(self.class_run(at, letters));
        }
        if class.is(Class::NEWLINE.or(Class::NUMBER)) {
            return None;
        }
        let from = at + first.len_utf8();
        past(from, self.class_run(from, letters))
    }

    /// `[^\r\n\p{L}\p{N}]?` before either of the alternatives of [`Letters::ByCase`].
    fn letters_by_case(self, at: usize) -> Option<usize> {
        let first = self.char(at)?;
        let after = (!Class::of(first).is(Class::NEWLINE.or(Class::LETTER).or(Class::NUMBER)))
            .then_some(at + first.len_utf8());
        let starts = || after.into_iter().chain([at]);
        starts()
            .find_map(|from| self.lower_at_end(from))
            .or_else(|| starts().find_map(|from| self.upper_at_start(from)))
    }

    /// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+`.
    fn lower_at_end(self, at: usize) -> Option<usize> {
        let both = Class::CASELESS.or(Class::MARK);
        let upper_end = self.class_run(at, Class::UPPER.or(both));
        let end = self.class_run(upper_end, Class::LOWER.or(both));
        if end > upper_end {
            return Some(end);
        }
        // The first part gives characters back until the second can match one of them.
        let mut end = upper_end;
        for c in self.text[at..upper_end].chars().rev() {
            if Class::of(c).is(both) {
                return Some(end);
            }
            end -= c.len_utf8();
        }
        None
    }

    /// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*`.
    fn upper_at_start(self, at: usize) -> Option<usize> {
        let both = Class::CASELESS.or(Class::MARK);
        let upper_end = past(at, self.class_run(at, Class::UPPER.or(both)))?;
        Some(self.class_run(upper_end, Class::LOWER.or(both)))
    }

    fn deepseek_v3(self, at: usize) -> Option<usize> {
        let first = self.char(at)?;
        if first.is_ascii_punctuation() {
            let from = at + 1;
            if let Some(end) = past(from, self.run(from, |c| c.is_ascii_alphabetic())) {
                return Some(end);
            }
        }
        let letters = Class::LETTER.or(Class::MARK);
        let signs = Class::PUNCTUATION.or(Class::SYMBOL);
        let class = Class::of(first);
        if !class.is(Class::NEWLINE.or(Class::LETTER).or(signs)) {
            let from = at + first.len_utf8();
            if let Some(end) = past(from, self.class_run(from, letters)) {
                return Some(end);
            }
        }
        if let Some(end) = past(at, self.class_run(at, letters)) {
            return Some(end);
        }
        let from = if first == ' ' { at + 1 } else { at };
        if let Some(end) = past(from, self.class_run(from, signs)) {
            return Some(self.run(end, |c| matches!(c, '\r' | '\n')));
        }
        self.line_breaks(at).or_else(|| self.spaces(at))
    }
}

#[cfg(test)]
#[path = "pretokenize_tests.rs"]
mod tests;
