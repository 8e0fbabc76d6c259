//! The vocabulary: tokens, their kinds, and which of them are special.

use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use super::TokenizerError;

/// What a GGUF file says of its tokenizer, as plain data.
///
/// [`Tokenizer::from_metadata`](super::Tokenizer::from_metadata) fills one from the keys
/// `tokenizer.ggml.*`; `None` is a key that the file doesn't have.
#[derive(Clone, Debug, Default)]
pub struct VocabSpec<'a> {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece-style).
    pub model: String,
    /// `tokenizer.ggml.pre`: how byte-level BPE cuts text into words.
    pub pre: Option<String>,
    /// `general.name`: decides the stripping of white space round special tokens for Phi-3.
    pub model_name: Option<String>,
    /// `tokenizer.ggml.tokens`: the text of each token.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: [`TokenKind`] by its number.
    pub token_types: Option<Vec<i32>>,
    /// `tokenizer.ggml.scores`: merge priorities of a SentencePiece-style vocabulary.
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.merges`: pairs of tokens separated by a space, best first.
    pub merges: Option<Cow<'a, [String]>>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_sep_token`.
    pub add_sep: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// Ids of special tokens.
    pub special: SpecialIds,
}

/// Ids of special tokens as a file states them.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // Each is `tokenizer.ggml.<name>_token_id`.
pub struct SpecialIds {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub eom: Option<u32>,
    pub unknown: Option<u32>,
    pub separator: Option<u32>,
    pub padding: Option<u32>,
    pub fim_pad: Option<u32>,
    pub fim_rep: Option<u32>,
    pub fim_sep: Option<u32>,
}

/// What a token is, `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Text, found by the merges.
    Normal = 1,
    /// Stands for what can't be expressed.
    Unknown = 2,
    /// Steers the model; found in text only when special tokens are parsed, and not shown.
    Control = 3,
    /// Text that is always found whole.
    UserDefined = 4,
    /// A place in the vocabulary that nothing uses.
    Unused = 5,
    /// One byte, written `<0xHH>`.
    Byte = 6,
}

impl TokenKind {
    fn from_number(number: i32) -> Option<TokenKind> {
        Some(match number {
            1 => TokenKind::Normal,
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            // 0 is "undefined", which llama.cpp shows and matches like an unused token.
            0 | 5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => return None,
        })
    }
}

/// Which way text becomes tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VocabKind {
    /// `gpt2`: byte-level byte-pair encoding.
    Bpe,
    /// `llama`: SentencePiece-style merging by score.
    Spm,
}

/// Special tokens longer than this are refused: they are looked for in every text.
const MAX_SPECIAL_BYTES: usize = 4096;

/// Texts that mark the end of a turn or a document in the models that use them.
const END_OF_GENERATION: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Those of [`END_OF_GENERATION`] that may serve as the end-of-turn token.
const END_OF_TURN: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Fill-in-the-middle tokens after which a model has nothing more to say: padding, repository
/// and file separators.
const FIM_PAD: &[&str] = &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"];
const FIM_REP: &[&str] = &[
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
];
const FIM_SEP: &[&str] = &["<|file_sep|>"];

/// Always shown, although their models mark them as control tokens.
const SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// Texts to ids: an open-addressing table over texts that live elsewhere.
///
/// The hash is keyed at random, so no vocabulary can be made whose texts all collide.
struct TextIndex {
    hasher: RandomState,
    /// An id and its text's hash, which spares looking at most texts that don't match.
    slots: Vec<(u32, u32)>,
}

const EMPTY: u32 = u32::MAX;

impl TextIndex {
    fn with_capacity(n: usize) -> TextIndex {
        TextIndex {
            hasher: RandomState::new(),
            slots: vec![(EMPTY, 0); (n * 2).next_power_of_two().max(8)],
        }
    }

    /// Where `text` is or would be, and its hash.
    fn slot(&self, text: &str, tokens: &[String]) -> (usize, u32) {
        let mask = self.slots.len() - 1;
        let hash = self.hasher.hash_one(text);
        let tag = (hash >> 32) as u32;
        let mut at = hash as usize & mask;
        loop {
            match self.slots[at] {
                (EMPTY, _) => return (at, tag),
                (id, found) if found == tag && tokens[id as usize] == text => return (at, tag),
                _ => at = (at + 1) & mask,
            }
        }
    }
}

/// A checked vocabulary.
pub(crate) struct Vocab {
    pub(crate) kind: VocabKind,
    tokens: Vec<String>,
    kinds: Vec<TokenKind>,
    index: TextIndex,
    pub(crate) max_token_bytes: usize,
    pub(crate) special: SpecialIds,
    /// Sorted.
    eog: Vec<u32>,
    /// Sorted ids of tokens that take the white space after them along.
    rstrip: Vec<u32>,
}

impl Vocab {
    /// Takes the tokens out of `spec` and checks everything but merges and scores.
    pub(crate) fn new(
        spec: &mut VocabSpec<'_>,
        kind: VocabKind,
        warnings: &mut Vec<String>,
    ) -> Result<Vocab, TokenizerError> {
        let mut tokens = std::mem::take(&mut spec.tokens);
        let n = tokens.len();
        if n == 0 {
            return Err(TokenizerError::NoTokens);
        }
        if n >= i32::MAX as usize {
            return Err(TokenizerError::TooManyTokens(n));
        }
        let mut kinds = vec![TokenKind::Normal; n];
        if let Some(types) = &spec.token_types {
            if types.len() < n {
                return Err(TokenizerError::ArrayTooShort {
                    key: "tokenizer.ggml.token_type",
                    len: types.len(),
                    tokens: n,
                });
            }
            for (id, (kind, &number)) in kinds.iter_mut().zip(types).enumerate() {
                *kind = TokenKind::from_number(number).ok_or(TokenizerError::TokenType {
                    id: id as u32,
                    number,
                })?;
            }
        }

        let mut index = TextIndex::with_capacity(n);
        let mut max_token_bytes = 0;
        for id in 0..n {
            if tokens[id].is_empty() {
                tokens[id] = format!("[EMPTY_{id}]");
            }
            max_token_bytes = max_token_bytes.max(tokens[id].len());
            let (slot, tag) = index.slot(&tokens[id], &tokens);
            if index.slots[slot].0 == EMPTY {
                index.slots[slot] = (id as u32, tag);
            } else if tokens[id].contains('\u{FFFD}') {
                // Texts that aren't UTF-8 may have become equal when the file was read.
                warnings.push(format!(
                    "token {id} isn't UTF-8 and can't be told from another"
                ));
            } else {
                return Err(TokenizerError::DuplicateToken {
                    id: id as u32,
                    first: index.slots[slot].0,
                    text: shorten(&tokens[id]),
                });
            }
        }

        let mut vocab = Vocab {
            kind,
            tokens,
            kinds,
            index,
            max_token_bytes,
            special: SpecialIds::default(),
            eog: Vec::new(),
            rstrip: Vec::new(),
        };
        vocab.special = vocab.check_special(&spec.special, warnings);
        vocab.find_end_of_generation(warnings);
        vocab.find_rstrip(spec);
        for id in vocab.special_tokens() {
            let len = vocab.text(id).map_or(0, str::len);
            if len > MAX_SPECIAL_BYTES {
                return Err(TokenizerError::LongSpecial {
                    id,
                    len,
                    max: MAX_SPECIAL_BYTES,
                });
            }
        }
        Ok(vocab)
    }

    /// Ids outside the vocabulary are dropped, with a warning.
    fn check_special(&self, stated: &SpecialIds, warnings: &mut Vec<String>) -> SpecialIds {
        let mut check = |name: &str, id: Option<u32>, default: Option<u32>| {
            let in_range = |id: &u32| (*id as usize) < self.len();
            if let Some(id) = id
                && !in_range(&id)
            {
                warnings.push(format!(
                    "tokenizer.ggml.{name}_token_id is {id}, outside the vocabulary of {} tokens: ignored",
                    self.len()
                ));
                return default.filter(in_range);
            }
            id.or(default.filter(in_range))
        };
        // SentencePiece's own numbers hold where a file doesn't say; byte-level BPE has none.
        let default = |id| (self.kind == VocabKind::Spm).then_some(id);
        SpecialIds {
            bos: check("bos", stated.bos, default(1)),
            eos: check("eos", stated.eos, default(2)),
            eot: check("eot", stated.eot, None),
            eom: check("eom", stated.eom, None),
            unknown: check("unknown", stated.unknown, default(0)),
            separator: check("seperator", stated.separator, None),
            padding: check("padding", stated.padding, None),
            fim_pad: check("fim_pad", stated.fim_pad, None),
            fim_rep: check("fim_rep", stated.fim_rep, None),
            fim_sep: check("fim_sep", stated.fim_sep, None),
        }
    }

    /// Files seldom list everything that ends a generation; the known texts fill the gaps.
    fn find_end_of_generation(&mut self, warnings: &mut Vec<String>) {
        let by_text = |texts: &[&str]| texts.iter().find_map(|t| self.id(t));
        let found = |stated: Option<u32>, texts| match stated {
            Some(id) => (Some(id), None),
            None => (by_text(texts), by_text(texts)),
        };
        let (eot, eot_found) = found(self.special.eot, END_OF_TURN);
        let (eom, eom_found) = found(self.special.eom, &["<|eom_id|>"]);
        let (fim_pad, pad_found) = found(self.special.fim_pad, FIM_PAD);
        let (fim_rep, rep_found) = found(self.special.fim_rep, FIM_REP);
        let (fim_sep, sep_found) = found(self.special.fim_sep, FIM_SEP);
        let texts: Vec<u32> = END_OF_GENERATION
            .iter()
            .filter_map(|t| self.id(t))
            .collect();
        self.special = SpecialIds {
            eot,
            eom,
            fim_pad,
            fim_rep,
            fim_sep,
            ..self.special
        };
        let by_found = [eot_found, eom_found, pad_found, rep_found, sep_found];
        for id in texts.iter().copied().chain(by_found.into_iter().flatten()) {
            let kind = &mut self.kinds[id as usize];
            if !matches!(kind, TokenKind::Control | TokenKind::Unknown) {
                warnings.push(format!(
                    "token {id} ({}) ends a generation but isn't marked as a control token: taken as one",
                    shorten(&self.tokens[id as usize])
                ));
                *kind = TokenKind::Control;
            }
        }
        self.eog = texts;
        let stated = [self.special.eos, eot, eom, fim_pad, fim_rep, fim_sep];
        self.eog.extend(stated.into_iter().flatten());

        // In harmony-style formats `<|end|>` closes one message of several, and Gemma 4 and
        // PLaMo have an ordinary `</s>`.
        let has = |text: &str| self.id(text).is_some();
        let channels = has("<|end|>")
            && ((has("<|return|>") && (has("<|call|>") || has("<|calls|>")))
                || (has("<|flush|>") && (has("<|call|>") || has("<|calls|>"))));
        let plain_s = has("<|tool_response>") || has("<|plamo:eos|>");
        for (when, text, kind) in [
            (channels, "<|end|>", TokenKind::UserDefined),
            (plain_s, "</s>", TokenKind::Normal),
        ] {
            if let Some(id) = self.id(text).filter(|_| when) {
                self.eog.retain(|&e| e != id);
                self.kinds[id as usize] = kind;
            }
        }
        for id in SHOWN.iter().filter_map(|t| self.id(t)).collect::<Vec<_>>() {
            self.kinds[id as usize] = TokenKind::UserDefined;
        }
        self.eog.sort_unstable();
        self.eog.dedup();
    }

    /// The format doesn't carry this attribute; llama.cpp knows it for Phi-3 by the name.
    fn find_rstrip(&mut self, spec: &VocabSpec<'_>) {
        let name = spec
            .model_name
            .as_deref()
            .unwrap_or_default()
            .to_lowercase();
        if name.contains("phi-3") || name.contains("phi3") {
            let not = ["<unk>", "<s>", "<|endoftext|>"].map(|t| self.id(t));
            self.rstrip = self.special_tokens().chain(self.id("</s>")).collect();
            self.rstrip.retain(|&id| !not.contains(&Some(id)));
            self.rstrip.sort_unstable();
            self.rstrip.dedup();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(crate) fn text(&self, id: u32) -> Option<&str> {
        self.tokens.get(id as usize).map(String::as_str)
    }

    pub(crate) fn kind_of(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    /// The token with exactly this text.
    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        if text.len() > self.max_token_bytes {
            return None;
        }
        let (slot, _) = self.index.slot(text, &self.tokens);
        let (id, _) = self.index.slots[slot];
        (id != EMPTY).then_some(id)
    }

    pub(crate) fn is_eog(&self, id: u32) -> bool {
        self.eog.binary_search(&id).is_ok()
    }

    pub(crate) fn eog(&self) -> &[u32] {
        &self.eog
    }

    pub(crate) fn strips_right(&self, id: u32) -> bool {
        self.rstrip.binary_search(&id).is_ok()
    }

    /// Tokens that are looked for in text before anything else.
    pub(crate) fn special_tokens(&self) -> impl Iterator<Item = u32> {
        self.kinds.iter().enumerate().filter_map(|(id, kind)| {
            matches!(
                kind,
                TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown
            )
            .then_some(id as u32)
        })
    }
}

/// `text` for a message: quoted, and cut if it is long.
pub(crate) fn shorten(text: &str) -> String {
    const MAX: usize = 40;
    if text.chars().count() <= MAX {
        format!("{text:?}")
    } else {
        format!("{:?}…", text.chars().take(MAX).collect::<String>())
    }
}
