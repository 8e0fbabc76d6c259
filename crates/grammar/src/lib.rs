//! Constrained output: a JSON schema, a regular expression or a grammar decides, token by
//! token, what a model may write.
//!
//! The parsing is `llguidance`'s. This crate gives it our vocabulary, reads GBNF, and keeps
//! strangers' grammars within bounds: of their text, of the memory and work of compiling them,
//! and of the work per token.
#![forbid(unsafe_code)]

mod gbnf;
mod tokens;

use std::sync::{Arc, OnceLock};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
};
use serde_json::{Map, Value, json};
use tegula_engine::{Constraint, ConstraintError, TokenSet};
use tegula_gguf::Tokenizer;
use toktrie::{InferenceCapabilities, TokEnv};

/// The longest grammar, schema or expression, in bytes.
pub const MAX_BYTES: usize = 1 << 18;
/// The most objects, arrays and other values that a schema may consist of.
const MAX_SCHEMA_NODES: usize = 20_000;

/// Between the parts of a JSON text: nothing, a space, or a line break with some indentation.
/// Without a bound a small model may well go on with white space for ever.
const JSON_SPACE: &str = r" |\n[ ]{0,16}";

/// Why there is no constraint. Messages are lower-case fragments.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// The vocabulary can't serve.
    #[error("output can't be constrained with this vocabulary: {0}")]
    Vocabulary(String),
    /// Too long, or of too many parts.
    #[error("the {what} is too large: {size} {unit}, and at most {max} are allowed")]
    TooLarge {
        what: &'static str,
        size: usize,
        unit: &'static str,
        max: usize,
    },
    /// Wrong, unsupported, or too expensive to compile.
    #[error("the {what} can't be used: {why}")]
    Invalid { what: &'static str, why: String },
}

/// What the output has to be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON value that this schema describes.
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// A text that this expression matches as a whole, in the syntax of the crate `regex`.
    Regex(String),
    /// A grammar in Lark's syntax with llguidance's extensions, or in GBNF, which is told by
    /// its `::=`.
    Grammar(String),
}

impl Grammar {
    fn name(&self) -> &'static str {
        match self {
            Grammar::JsonSchema(_) | Grammar::JsonObject => "JSON schema",
            Grammar::Regex(_) => "regular expression",
            Grammar::Grammar(_) => "grammar",
        }
    }

    /// The grammar in Lark's syntax, starting at `start`.
    fn lark(&self) -> Result<String, GrammarError> {
        let invalid = |why: String| GrammarError::Invalid {
            what: self.name(),
            why,
        };
        let check = |size| match size > MAX_BYTES {
            false => Ok(()),
            true => Err(GrammarError::TooLarge {
                what: self.name(),
                size,
                unit: "bytes",
                max: MAX_BYTES,
            }),
        };
        match self {
            Grammar::JsonObject => Ok(format!("start: {}", json_rule(&json!({"type": "object"}))?)),
            Grammar::JsonSchema(schema) => Ok(format!("start: {}", json_rule(schema)?)),
            Grammar::Regex(expression) => {
                check(expression.len())?;
                Ok(format!("start: {}", regex_rule(expression)))
            }
            Grammar::Grammar(text) => {
                check(text.len())?;
                match gbnf::is_gbnf(text) {
                    true => gbnf::to_lark(text).map_err(|e| invalid(e.to_string())),
                    false => Ok(text.clone()),
                }
            }
        }
    }
}

/// A schema as an expression within a Lark grammar.
///
/// # Errors
/// A schema that is too large.
pub fn json_rule(schema: &Value) -> Result<String, GrammarError> {
    let nodes = nodes(schema);
    if nodes > MAX_SCHEMA_NODES {
        return Err(GrammarError::TooLarge {
            what: "JSON schema",
            size: nodes,
            unit: "values",
            max: MAX_SCHEMA_NODES,
        });
    }
    let mut schema = match schema {
        Value::Object(schema) => schema.clone(),
        // `true` allows everything; whatever else isn't a schema is refused when compiled.
        Value::Bool(true) => Map::new(),
        other => {
            return Err(GrammarError::Invalid {
                what: "JSON schema",
                why: format!("expected an object, found {}", kind(other)),
            });
        }
    };
    let options = schema.entry("x-guidance").or_insert_with(|| json!({}));
    if let Value::Object(options) = options {
        // Of several alternatives exactly one must hold; that any holds is what can be kept.
        options.entry("coerce_one_of").or_insert(true.into());
        options
            .entry("whitespace_pattern")
            .or_insert(JSON_SPACE.into());
    }
    let text = Value::Object(schema).to_string();
    match text.len() > MAX_BYTES {
        false => Ok(format!("%json {text}")),
        true => Err(GrammarError::TooLarge {
            what: "JSON schema",
            size: text.len(),
            unit: "bytes",
            max: MAX_BYTES,
        }),
    }
}

/// A regular expression as a terminal of a Lark grammar.
pub fn regex_rule(expression: &str) -> String {
    format!("/{}/", llguidance::regex_to_lark(expression, ""))
}

/// A text as a terminal of a Lark grammar.
pub fn literal_rule(text: &str) -> String {
    // Lark's strings are JSON's.
    Value::from(text).to_string()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(a) => a.iter().map(nodes).sum::<usize>(),
        Value::Object(o) => o.values().map(nodes).sum(),
        _ => 0,
    }
}

/// What ends a part of a JSON text, the one that is to be preferred first: a string ends
/// before a brace in it is taken for anything, an object before it gets another member, and
/// the fraction of a time before it gets another digit.
const JSON_CLOSERS: [&str; 5] = ["\"", "}", "]", ",", "Z"];

/// Compiles grammars for one vocabulary. Building it takes a while for large vocabularies, so
/// that happens at the first use.
pub struct Compiler {
    tokenizer: Tokenizer,
    factory: OnceLock<Result<Arc<ParserFactory>, GrammarError>>,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Compiler({:?})", self.tokenizer)
    }
}

impl Compiler {
    /// A compiler for the tokenizer's vocabulary.
    pub fn new(tokenizer: &Tokenizer) -> Compiler {
        Compiler {
            tokenizer: tokenizer.clone(),
            factory: OnceLock::new(),
        }
    }

    /// The constraint that keeps an answer to the grammar.
    ///
    /// # Errors
    /// A grammar that is wrong, uses what isn't supported, or is too large; a vocabulary
    /// without an end-of-generation token.
    pub fn compile(&self, grammar: &Grammar) -> Result<Guide, GrammarError> {
        let mut guide = self.compile_lark(grammar.name(), grammar.lark()?)?;
        if matches!(grammar, Grammar::Regex(_) | Grammar::Grammar(_)) {
            guide.closers.truncate(1);
        }
        Ok(guide)
    }

    /// The same for a grammar in Lark's syntax that describes JSON with something around it;
    /// `what` is what messages call it.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn compile_lark(&self, what: &'static str, lark: String) -> Result<Guide, GrammarError> {
        let factory = self.factory.get_or_init(|| {
            let env = tokens::environment(&self.tokenizer)?;
            factory(&env).map(Arc::new)
        });
        let factory = factory.as_ref().map_err(Clone::clone)?;
        let parser = factory.create_parser(TopLevelGrammar::from_lark(lark));
        let mut matcher = Matcher::new(parser);
        let invalid = |why: String| GrammarError::Invalid {
            what,
            why: first_line(&why),
        };
        if let Some(why) = matcher.get_error() {
            return Err(invalid(why));
        }
        // Whether there is a way to begin shows only now.
        let first = matcher.compute_mask_or_eos();
        let first = first.map_err(|e| invalid(e.to_string()))?;
        if first.is_zero() {
            return Err(invalid("nothing satisfies it".to_owned()));
        }
        let eog = self.tokenizer.eog().iter().copied().collect();
        let ids = JSON_CLOSERS
            .iter()
            .filter_map(|c| self.tokenizer.token_id(c));
        let closers = std::iter::once(eog).chain(ids.map(|id| [id].into_iter().collect()));
        Ok(Guide {
            matcher,
            closers: closers.collect(),
        })
    }
}

fn factory(env: &TokEnv) -> Result<ParserFactory, GrammarError> {
    let slices = llguidance::earley::SlicedBiasComputer::json_slices();
    let mut factory = ParserFactory::new(env, InferenceCapabilities::default(), &slices)
        .map_err(|e| GrammarError::Vocabulary(first_line(&e.to_string())))?;
    factory.quiet();
    // A lexer state takes up to two kilobytes: some tens of megabytes for the worst grammar.
    *factory.limits_mut() = ParserLimits {
        max_items_in_row: 2_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    };
    Ok(factory)
}

/// Messages for users end where backtraces and dumps begin.
fn first_line(message: &str) -> String {
    let message = message.trim();
    let line = message.lines().next().unwrap_or_default();
    match line.char_indices().nth(300) {
        None => line.to_owned(),
        Some((at, _)) => format!("{}…", &line[..at]),
    }
}

/// A grammar on its way through one answer.
pub struct Guide {
    matcher: Matcher,
    /// Sets of tokens that lead to an end, the quickest first.
    closers: Vec<TokenSet>,
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Guide({:?})", self.matcher.stop_reason())
    }
}

impl Clone for Guide {
    /// A guide of its own at the same place, which shares no locks with this one.
    fn clone(&self) -> Guide {
        Guide {
            matcher: self.matcher.deep_clone(),
            closers: self.closers.clone(),
        }
    }
}

impl Constraint for Guide {
    fn allowed(&mut self) -> Result<TokenSet, ConstraintError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(failed)?;
        Ok(TokenSet::from_words(mask.as_slice().to_vec()))
    }

    fn closing(&mut self) -> Result<TokenSet, ConstraintError> {
        let allowed = self.allowed()?;
        let closers = self.closers.iter().map(|set| allowed.and(set));
        let first = closers.into_iter().find(|set| !set.is_empty());
        Ok(first.unwrap_or(allowed))
    }

    fn accept(&mut self, id: u32) -> Result<(), ConstraintError> {
        self.matcher.consume_token(id).map_err(failed)
    }

    fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

fn failed(error: impl std::fmt::Display) -> ConstraintError {
    ConstraintError(first_line(&error.to_string()))
}
