//! Every pre-tokenizer against the regular expressions that define it, run by `fancy-regex`
//! as a sequence of isolating splits.

use fancy_regex::Regex;

use super::*;

const GPT2_RE: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3_RE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_RE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35_RE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3_RE: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const DEEPSEEK_LLM_LETTERS_RE: &str = "\\s?[A-Za-z\u{00B5}\u{00C0}-\u{00D6}\u{00D8}-\u{00F6}\u{00F8}-\u{01BA}\u{01BC}-\u{01BF}\u{01C4}-\u{0293}\u{0295}-\u{02AF}\u{0370}-\u{0373}\u{0376}\u{0377}\u{037B}-\u{037D}\u{037F}\u{0386}\u{0388}-\u{038A}\u{038C}\u{038E}-\u{03A1}\u{03A3}-\u{03F5}\u{03F7}-\u{0481}\u{048A}-\u{052F}\u{0531}-\u{0556}\u{10A0}-\u{10C5}\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}]+";
const TEKKEN_RE: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O_RE: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One name of each family, and its expressions in order.
const FAMILIES: &[(&str, &[&str])] = &[
    ("llama-bpe", &[LLAMA3_RE]),
    ("qwen2", &[QWEN2_RE]),
    ("qwen35", &[QWEN35_RE]),
    ("gpt-2", &[GPT2_RE]),
    ("starcoder", &[r"\p{N}", GPT2_RE]),
    (
        "deepseek-coder",
        &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+",
            r"\p{N}",
        ],
    ),
    (
        "deepseek-llm",
        &[
            r"[\r\n]",
            DEEPSEEK_LLM_LETTERS_RE,
            "\\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+",
            r"\s+$",
            "[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+",
            r"\p{N}+",
        ],
    ),
    (
        "deepseek-v3",
        &[
            r"\p{N}{1,3}",
            "[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+",
            DEEPSEEK_V3_RE,
        ],
    ),
    (
        "falcon",
        &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2_RE, "[0-9][0-9][0-9]"],
    ),
    ("tekken", &[TEKKEN_RE]),
    ("gpt-4o", &[GPT_4O_RE]),
    (
        "default",
        &[
            r"[\p{P}\$\+<=>\^~\|]+",
            GPT2_RE,
            r"\p{N}+",
            "[0-9][0-9][0-9]",
        ],
    ),
];

fn split_by(expressions: &[Regex], text: &str) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    if !text.is_empty() {
        pieces.push(0..text.len());
    }
    for re in expressions {
        let mut finer = Vec::new();
        for piece in pieces {
            let mut gap = piece.start;
            for found in re.find_iter(&text[piece.clone()]) {
                let found = found.expect("match");
                let (start, end) = (piece.start + found.start(), piece.start + found.end());
                if gap < start {
                    finer.push(gap..start);
                }
                finer.push(start..end);
                gap = end;
            }
            if gap < piece.end {
                finer.push(gap..piece.end);
            }
        }
        pieces = finer;
    }
    pieces
}

/// xorshift, so that every run has the same texts.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Characters on both sides of every boundary that an expression draws.
const TRICKY: &[&str] = &[
    "'",
    "'s",
    "'T",
    "'Re",
    "'vE",
    "'ll",
    "'LL",
    "'m",
    "'d",
    "'\u{17F}",
    "’s",
    "''",
    "a",
    "Z",
    "ab",
    "THE",
    "x1",
    "é",
    "e\u{301}",
    "\u{301}",
    "\u{903}",
    "\u{489}",
    "ß",
    "ſ",
    "İ",
    "ǅ",
    "ʰ",
    "ª",
    "Ωmega",
    "ﬁ",
    "Б",
    "ж",
    "Ꭰ",
    "ꭰ",
    "א",
    "ش",
    "अ",
    "नमस्ते",
    "ក្ម",
    "ไทย",
    "一",
    "龥",
    "龦",
    "\u{3400}",
    "あ",
    "ア",
    "ー",
    "ｱ",
    "가",
    "힣",
    "\u{D7FF}",
    "ㄱ",
    "𐐀",
    "𝔸",
    "𞤀",
    "0",
    "12",
    "345",
    "6789",
    "٣",
    "½",
    "²",
    "Ⅷ",
    "〇",
    "𝟘",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    " \n",
    "\n ",
    "\u{a0}",
    "\u{85}",
    "\u{2028}",
    "\u{3000}",
    "\u{1680}",
    "\u{b}",
    "\u{c}",
    "\u{1c}",
    "\0",
    "\u{7f}",
    "\u{200b}",
    "\u{200d}",
    "\u{feff}",
    "\u{ad}",
    "\u{e000}",
    "\u{10ffff}",
    "\u{378}",
    "!",
    ".",
    "...",
    "/",
    "//",
    "-",
    "_",
    "$",
    "+",
    "<",
    "=>",
    "^",
    "`",
    "~",
    "|",
    "€",
    "°",
    "！",
    "：",
    "～",
    "‘",
    "‟",
    "。",
    "、",
    "…",
    "¿",
    "🦀",
    "👩‍👩‍👧",
    "🏳️",
    "(",
    "]",
    "{",
    "\\",
    "\"",
    "#",
    "@",
];

#[test]
fn splits_equal_those_of_the_regular_expressions() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut texts = vec![String::new()];
    for a in TRICKY {
        texts.push((*a).to_owned());
        for b in TRICKY {
            texts.push(format!("{a}{b}"));
        }
    }
    for _ in 0..3000 {
        let len = 2 + random.below(24);
        texts.push(
            (0..len)
                .map(|_| TRICKY[random.below(TRICKY.len())])
                .collect(),
        );
    }
    for _ in 0..2000 {
        let len = 1 + random.below(12);
        let any = |random: &mut Random| loop {
            let limit = if random.below(3) == 0 {
                0x11_0000
            } else {
                0x3100
            };
            if let Some(c) = char::from_u32(random.below(limit) as u32) {
                return c;
            }
        };
        texts.push((0..len).map(|_| any(&mut random)).collect());
    }
    // Code points that only one of the two Unicode versions knows say nothing about the rules.
    let newer = |c: char| {
        use unicode_general_category::{GeneralCategory, get_general_category};
        get_general_category(c) == GeneralCategory::Unassigned && c != '\u{378}'
    };
    texts.retain(|text| !text.chars().any(newer));
    assert!(texts.len() > 10_000, "{}", texts.len());

    for (name, expressions) in FAMILIES {
        let ours = PreTokenizer::by_name(name).expect("a known name");
        let expressions: Vec<Regex> = expressions
            .iter()
            .map(|e| Regex::new(e).expect("expression"))
            .collect();
        for text in &texts {
            let words = |ranges: Vec<Range<usize>>| -> Vec<&str> {
                ranges.into_iter().map(|r| &text[r]).collect()
            };
            assert_eq!(
                words(ours.split(text)),
                words(split_by(&expressions, text)),
                "{name} on {text:?}"
            );
        }
    }
}

#[test]
fn every_name_is_listed_once() {
    let mut names: Vec<_> = PreTokenizer::names().collect();
    assert!(names.len() > 40);
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all);
    assert!(
        names
            .iter()
            .all(|name| PreTokenizer::by_name(name).is_some())
    );
    assert!(PreTokenizer::by_name("").is_none());
}

/// Long runs of one kind, each followed by what makes a backtracking matcher start over.
#[test]
fn no_text_is_slow() {
    let units = [
        "a", "A", "ー", " ", "\n ", "\t", "1", ".", "'", "一", "\u{301}", "\u{200b}", "aA", " a",
    ];
    for name in PreTokenizer::names() {
        let pre = PreTokenizer::by_name(name).expect("a known name");
        for unit in units {
            for end in ["", "x", " ", "\n"] {
                let text = unit.repeat(20_000) + end;
                let start = std::time::Instant::now();
                let pieces = pre.split(&text);
                assert_eq!(pieces.last().map(|p| p.end), Some(text.len()));
                assert!(
                    start.elapsed().as_secs() < 2,
                    "{name} on {unit:?} and {end:?}"
                );
            }
        }
    }
}
