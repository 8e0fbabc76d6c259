//! Tokenizers, built from the vocabulary inside a GGUF file.
//!
//! Two kinds are known: byte-level BPE (`tokenizer.ggml.model` = `gpt2`), whose words are cut
//! by the pre-tokenizer that `tokenizer.ggml.pre` names, and SentencePiece-style merging by
//! score (`llama`). Token ids are those of llama.cpp and, where the two agree, of the
//! tokenizers that the models were trained with.
//!
//! Encoding costs O(n log n) in the length of the text, whatever the text. A vocabulary that
//! makes no sense is an error when the tokenizer is built; nothing after that can fail.
//!
//! Absent on purpose: WordPiece, Unigram (T5), RWKV and the byte-fallback BPE of Gemma 4;
//! and the "clean-up" of spaces before punctuation when decoding, which loses text.

mod bpe;
mod decode;
mod fuzz;
mod pretokenize;
mod spm;
mod unicode;
mod vocab;

use std::borrow::Cow;
use std::sync::Arc;

use aho_corasick::{AhoCorasick, AhoCorasickKind, Input, MatchKind};

use crate::Gguf;
use crate::metadata::{Array, Metadata};
pub use bpe::byte_char;
pub use decode::Decoder;
#[doc(hidden)]
pub use fuzz::fuzz_tokenizer;
use pretokenize::PreTokenizer;
pub use vocab::{SpecialIds, TokenKind, VocabKind, VocabSpec};
use vocab::{Vocab, shorten};

/// Why a vocabulary can't be used. Messages are lower-case fragments.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // The messages say what the fields are.
pub enum TokenizerError {
    #[error("tokenizer model {0} is not supported (supported: gpt2, llama)")]
    UnknownModel(String),
    #[error("the vocabulary has no tokens")]
    NoTokens,
    #[error("the vocabulary has {0} tokens, more than ids can number")]
    TooManyTokens(usize),
    #[error("{key} is missing, which a {model} tokenizer needs")]
    MissingArray {
        key: &'static str,
        model: &'static str,
    },
    #[error("{key} has {len} elements for {tokens} tokens")]
    ArrayTooShort {
        key: &'static str,
        len: usize,
        tokens: usize,
    },
    #[error("token {id} has type {number}, which is none of 0 to 6")]
    TokenType { id: u32, number: i32 },
    #[error("token {id} has the same text as token {first}: {text}")]
    DuplicateToken { id: u32, first: u32, text: String },
    #[error("special token {id} is {len} bytes long; at most {max} are supported")]
    LongSpecial { id: u32, len: usize, max: usize },
    #[error("the score of token {id} is not a number")]
    Score { id: u32 },
    #[error("merge {rank}: {what}")]
    Merge { rank: usize, what: String },
    #[error("special tokens can't be searched for: {0}")]
    SpecialTokens(String),
}

/// What [`Tokenizer::encode`] does besides encoding the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add the beginning- and end-of-sequence tokens that the model wants.
    pub add_special: bool,
    /// Find control tokens, such as `<|im_start|>`, in the text. When off they are text like
    /// any other, which is what untrusted input needs. User-defined tokens are found always.
    pub parse_special: bool,
}

impl Default for EncodeOptions {
    /// Both on, as for a prompt written by the user.
    fn default() -> Self {
        EncodeOptions {
            add_special: true,
            parse_special: true,
        }
    }
}

/// Turns text into token ids and back. Cloning is cheap; all methods may be called from any
/// number of threads at once.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    vocab: Vocab,
    model: Model,
    /// Finds user-defined tokens.
    user_defined: Matcher,
    /// Finds user-defined, control and unknown tokens.
    special: Matcher,
    add_bos: bool,
    add_eos: bool,
    add_sep: bool,
    add_space_prefix: bool,
    warnings: Vec<String>,
}

enum Model {
    Bpe(bpe::Bpe),
    Spm(spm::Spm),
}

/// Finds the leftmost special tokens, the longest of those that start at the same place.
struct Matcher {
    /// `None` when there is nothing to find.
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Matcher {
    fn new(vocab: &Vocab, wanted: impl Fn(TokenKind) -> bool) -> Result<Matcher, TokenizerError> {
        let ids: Vec<u32> = vocab
            .special_tokens()
            .filter(|&id| vocab.kind_of(id).is_some_and(&wanted))
            .collect();
        if ids.is_empty() {
            return Ok(Matcher {
                automaton: None,
                ids,
            });
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            // A full automaton could take 1 KiB per byte of the tokens' texts.
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .build(ids.iter().map(|&id| vocab.text(id).unwrap_or_default()))
            .map_err(|e| TokenizerError::SpecialTokens(e.to_string()))?;
        Ok(Matcher {
            automaton: Some(automaton),
            ids,
        })
    }

    /// The first special token of `text` at or after byte `from`: its range and id.
    fn find(&self, text: &str, from: usize) -> Option<(std::ops::Range<usize>, u32)> {
        let found = self
            .automaton
            .as_ref()?
            .find(Input::new(text).range(from..))?;
        Some((found.range(), self.ids[found.pattern().as_usize()]))
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("kind", &self.kind())
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// The tokenizer of a model file or a vocabulary-only file.
    ///
    /// # Errors
    /// Missing or mistyped keys, and everything that [`Tokenizer::new`] refuses.
    pub fn from_gguf(gguf: &Gguf) -> crate::Result<Tokenizer> {
        Self::from_metadata(gguf.metadata())
    }

    /// The same from metadata alone.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`].
    pub fn from_metadata(md: &Metadata) -> crate::Result<Tokenizer> {
        const P: &str = "tokenizer.ggml.";
        let text = |key: &str| md.str(&format!("{P}{key}"));
        let flag = |key: &str| md.bool(&format!("{P}{key}"));
        // A negative number is how some writers say that there is no such token.
        let id = |key: &str| -> crate::Result<Option<u32>> {
            let key = format!("{P}{key}_token_id");
            match md.get(&key).and_then(|v| v.as_int()) {
                Some(id) if id < 0 => Ok(None),
                _ => md.u32(&key),
            }
        };
        let strings = |key: &str| md.strings(&format!("{P}{key}"));
        let first_of = |a: crate::Result<Option<u32>>, b| Ok::<_, crate::Error>(a?.or(b));

        let model = md.require_str("tokenizer.ggml.model")?.to_owned();
        if vocab_kind(&model).is_none() {
            return Err(md_error(md, TokenizerError::UnknownModel(shorten(&model))));
        }
        let scores_key = format!("{P}scores");
        let scores = match md.array(&scores_key)? {
            // Some converters wrote whole numbers.
            Some(Array::I32(v)) => Some(v.iter().map(|&s| s as f32).collect()),
            _ => md.f32s(&scores_key)?.map(<[f32]>::to_vec),
        };
        let spec = VocabSpec {
            model,
            pre: text("pre")?.map(str::to_owned),
            model_name: md.str("general.name")?.map(str::to_owned),
            tokens: md.require_strings("tokenizer.ggml.tokens")?.to_vec(),
            token_types: md.i32s(&format!("{P}token_type"))?,
            scores,
            merges: strings("merges")?.map(Cow::Borrowed),
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            add_sep: flag("add_sep_token")?,
            add_space_prefix: flag("add_space_prefix")?,
            special: SpecialIds {
                bos: id("bos")?,
                eos: id("eos")?,
                eot: id("eot")?,
                eom: id("eom")?,
                unknown: id("unknown")?,
                // The format's own spelling, and the one that some files have.
                separator: first_of(id("seperator"), id("separator")?)?,
                padding: id("padding")?,
                fim_pad: id("fim_pad")?,
                fim_rep: id("fim_rep")?,
                fim_sep: id("fim_sep")?,
            },
        };
        Self::new(spec).map_err(|e| md_error(md, e))
    }

    /// The tokenizer of a vocabulary.
    ///
    /// # Errors
    /// An unknown model, missing arrays or arrays shorter than the vocabulary, token types out
    /// of range, two tokens of the same text, scores that aren't numbers, merges of what isn't
    /// a token.
    pub fn new(mut spec: VocabSpec<'_>) -> Result<Tokenizer, TokenizerError> {
        let kind = vocab_kind(&spec.model)
            .ok_or_else(|| TokenizerError::UnknownModel(shorten(&spec.model)))?;
        let mut warnings = Vec::new();
        let vocab = Vocab::new(&mut spec, kind, &mut warnings)?;
        let (model, default_bos) = match kind {
            VocabKind::Bpe => {
                let pre = pre_tokenizer(spec.pre.as_deref(), &mut warnings);
                let merges = spec.merges.as_deref().ok_or(TokenizerError::MissingArray {
                    key: "tokenizer.ggml.merges",
                    model: "gpt2",
                })?;
                let bpe = bpe::Bpe::new(&vocab, pre, merges, &mut warnings)?;
                (Model::Bpe(bpe), pre.add_bos)
            }
            VocabKind::Spm => {
                let scores = spec.scores.as_deref().ok_or(TokenizerError::MissingArray {
                    key: "tokenizer.ggml.scores",
                    model: "llama",
                })?;
                (
                    Model::Spm(spm::Spm::new(&vocab, scores, &mut warnings)?),
                    true,
                )
            }
        };
        let mut enabled = |stated: Option<bool>, default, name: &str, id: Option<u32>| {
            let wanted = stated.unwrap_or(default);
            if wanted && id.is_none() {
                warnings.push(format!(
                    "the model wants a {name} token added but has none: none is added"
                ));
            }
            wanted && id.is_some()
        };
        let add_bos = enabled(spec.add_bos, default_bos, "bos", vocab.special.bos);
        let add_eos = enabled(spec.add_eos, false, "eos", vocab.special.eos);
        let add_sep = enabled(spec.add_sep, false, "sep", vocab.special.separator);
        Ok(Tokenizer(Arc::new(Inner {
            user_defined: Matcher::new(&vocab, |kind| kind == TokenKind::UserDefined)?,
            special: Matcher::new(&vocab, |_| true)?,
            add_bos,
            add_eos,
            add_sep,
            add_space_prefix: spec.add_space_prefix.unwrap_or(kind == VocabKind::Spm),
            vocab,
            model,
            warnings,
        })))
    }

    /// The tokens of `text`.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
        let inner = &*self.0;
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        if options.add_special && inner.add_bos {
            out.extend(inner.vocab.special.bos);
        }
        let matcher = if options.parse_special {
            &inner.special
        } else {
            &inner.user_defined
        };
        let mut encoder = Encoder {
            inner,
            scratch: bpe::Scratch::default(),
            after_special: true,
        };
        let mut at = 0;
        while let Some((found, id)) = matcher.find(text, at) {
            encoder.text(&text[at..found.start], &mut out);
            out.push(id);
            encoder.after_special = true;
            at = found.end;
            if inner.vocab.strips_right(id) {
                at = text.len() - text[at..].trim_start_matches(is_c_space).len();
            }
        }
        encoder.text(&text[at..], &mut out);
        if options.add_special && inner.add_eos {
            out.extend(inner.vocab.special.eos);
        }
        out
    }

    /// The tokens of a prompt that a chat template has rendered: control tokens are parsed,
    /// and the beginning-of-sequence token that the model wants is there exactly once, whether
    /// or not the template wrote it.
    pub fn encode_chat(&self, rendered: &str) -> Vec<u32> {
        let mut ids = self.encode(
            rendered,
            EncodeOptions {
                add_special: false,
                parse_special: true,
            },
        );
        if let Some(bos) = self
            .bos()
            .filter(|&bos| self.add_bos() && ids.first() != Some(&bos))
        {
            ids.insert(0, bos);
        }
        ids
    }

    /// The text of `ids` as a whole: control tokens are left out, bytes that aren't UTF-8
    /// become U+FFFD, and the space that a SentencePiece-style encoder puts before the first
    /// word is taken away.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut decoder = Decoder::at_start(self);
        let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
        text.push_str(&decoder.flush());
        text
    }

    /// The bytes that the token stands for, the text of control tokens included; empty for
    /// unused tokens and ids outside the vocabulary.
    pub fn piece(&self, id: u32) -> Vec<u8> {
        decode::piece(&self.0.vocab, id)
    }

    /// The text of the token as the vocabulary has it, with its own way of writing bytes and
    /// spaces.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.0.vocab.text(id)
    }

    /// The id of the token whose vocabulary text this is.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.0.vocab.id(text)
    }

    /// What the token is.
    pub fn token_kind(&self, id: u32) -> Option<TokenKind> {
        self.0.vocab.kind_of(id)
    }

    /// Which way text becomes tokens.
    pub fn kind(&self) -> VocabKind {
        self.0.vocab.kind
    }

    /// Number of tokens; ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab.len()
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.0.vocab.special.bos
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.0.vocab.special.eos
    }

    /// The end-of-turn token, stated by the file or known by its text.
    pub fn eot(&self) -> Option<u32> {
        self.0.vocab.special.eot
    }

    /// The token for what can't be expressed.
    pub fn unknown(&self) -> Option<u32> {
        self.0.vocab.special.unknown
    }

    /// The separator token.
    pub fn sep(&self) -> Option<u32> {
        self.0.vocab.special.separator
    }

    /// The padding token.
    pub fn pad(&self) -> Option<u32> {
        self.0.vocab.special.padding
    }

    /// Whether [`Tokenizer::encode`] with `add_special` puts [`Tokenizer::bos`] first.
    pub fn add_bos(&self) -> bool {
        self.0.add_bos
    }

    /// Whether [`Tokenizer::encode`] with `add_special` puts [`Tokenizer::eos`] last.
    pub fn add_eos(&self) -> bool {
        self.0.add_eos
    }

    /// Whether the model wants [`Tokenizer::sep`] between two texts. [`Tokenizer::encode`] has
    /// one text and never adds it.
    pub fn add_sep(&self) -> bool {
        self.0.add_sep
    }

    /// Whether generation ends when the model produces `id`.
    pub fn is_eog(&self, id: u32) -> bool {
        self.0.vocab.is_eog(id)
    }

    /// All ids that end a generation, sorted.
    pub fn eog(&self) -> &[u32] {
        self.0.vocab.eog()
    }

    /// What is doubtful about the vocabulary although it can be used: an unknown
    /// pre-tokenizer, ids out of range, tokens of unlikely type.
    pub fn warnings(&self) -> &[String] {
        &self.0.warnings
    }

    /// The names of `tokenizer.ggml.pre` that are known.
    pub fn pre_tokenizers() -> impl Iterator<Item = &'static str> {
        PreTokenizer::names()
    }
}

struct Encoder<'a> {
    inner: &'a Inner,
    scratch: bpe::Scratch,
    after_special: bool,
}

impl Encoder<'_> {
    /// Appends the tokens of a text without special tokens.
    fn text(&mut self, text: &str, out: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        match &self.inner.model {
            Model::Bpe(bpe) => bpe.encode(&self.inner.vocab, text, &mut self.scratch, out),
            Model::Spm(spm) => {
                let prefix = self.inner.add_space_prefix && self.after_special;
                let escaped: String = prefix
                    .then_some(spm::SPACE)
                    .into_iter()
                    .chain(text.chars().map(|c| if c == ' ' { spm::SPACE } else { c }))
                    .collect();
                spm.encode(&self.inner.vocab, &escaped, out);
            }
        }
        self.after_special = false;
    }
}

/// The characters that C's `isspace` knows.
fn is_c_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\x0b' | '\x0c' | '\r')
}

fn vocab_kind(model: &str) -> Option<VocabKind> {
    match model {
        "gpt2" => Some(VocabKind::Bpe),
        "llama" => Some(VocabKind::Spm),
        _ => None,
    }
}

/// An unknown name falls back to `default` with a warning: the model still works, a little
/// worse. (llama.cpp warns of a missing name and refuses an unknown one.)
fn pre_tokenizer(name: Option<&str>, warnings: &mut Vec<String>) -> PreTokenizer {
    let name = name.unwrap_or_default();
    PreTokenizer::by_name(name).unwrap_or_else(|| {
        warnings.push(if name.is_empty() {
            "tokenizer.ggml.pre is missing: words are cut by the default rules, and the model may answer worse".to_owned()
        } else {
            format!(
                "unknown pre-tokenizer {}: words are cut by the default rules, and the model may answer worse",
                shorten(name)
            )
        });
        pretokenize::DEFAULT
    })
}

fn md_error(md: &Metadata, source: TokenizerError) -> crate::Error {
    crate::Error::Tokenizer {
        file: md.origin().to_owned(),
        source,
    }
}
