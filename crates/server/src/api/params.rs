//! Fields that chat and completion requests share.

use serde::Deserialize;
use serde_json::Value;
use tegula_engine::SamplerOptions;
use tegula_grammar::Grammar;

use crate::error::ApiError;

/// One or a list of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub fn into_vec(self) -> Vec<T> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// The fields; what clients leave out or set to null is `None`, what we don't know is ignored.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Fields {
    pub n: Option<u32>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub max_tokens: Option<i64>,
    pub max_completion_tokens: Option<i64>,
    /// llama.cpp's.
    pub n_predict: Option<i64>,
    pub stop: Option<OneOrMany<String>>,
    pub seed: Option<i64>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub logit_bias: Option<Value>,
    pub response_format: Option<Value>,
    // Those below are llama.cpp's and ours.
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub typical_p: Option<f32>,
    pub repeat_penalty: Option<f32>,
    pub repeat_last_n: Option<i64>,
    pub ignore_eos: Option<bool>,
    pub cache_prompt: Option<bool>,
    pub grammar: Option<String>,
    pub regex: Option<String>,
    pub json_schema: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StreamOptions {
    pub include_usage: Option<bool>,
}

/// Choices per request at most.
const MAX_N: u32 = 16;
/// Stop strings per request at most, and how long they may be together.
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 1 << 14;
const MAX_BIASES: usize = 4096;
/// How many of the likeliest tokens may be reported.
pub(crate) const MAX_TOP: u32 = 20;

/// What the server takes where a request says nothing.
#[derive(Clone, Debug)]
pub struct Defaults {
    pub sampler: SamplerOptions,
    /// Tokens of an answer at most.
    pub limit: Option<usize>,
}

/// A number within bounds.
fn within(param: &str, value: f32, min: f32, max: f32) -> Result<f32, ApiError> {
    match (min..=max).contains(&value) {
        true => Ok(value),
        false => {
            let message = format!("{param}: {value} is not within {min} and {max}");
            Err(ApiError::field(param, message))
        }
    }
}

impl Fields {
    pub fn choices(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=MAX_N => Ok(n as usize),
            n => Err(ApiError::field(
                "n",
                format!("n: {n} is not within 1 and {MAX_N}"),
            )),
        }
    }

    pub fn include_usage(&self) -> bool {
        let options = self.stream_options.as_ref();
        options.and_then(|o| o.include_usage).unwrap_or(false)
    }

    /// Tokens at most; -1 asks for as many as there is room for.
    pub fn limit(&self, defaults: &Defaults) -> Result<Option<usize>, ApiError> {
        let (param, value) = match (self.max_completion_tokens, self.max_tokens) {
            (Some(n), _) => ("max_completion_tokens", Some(n)),
            (None, Some(n)) => ("max_tokens", Some(n)),
            (None, None) => ("n_predict", self.n_predict),
        };
        match value {
            None | Some(-1) => Ok(defaults.limit),
            Some(n) => match usize::try_from(n) {
                Ok(n @ 1..) => Ok(Some(defaults.limit.map_or(n, |limit| limit.min(n)))),
                _ => Err(ApiError::field(
                    param,
                    format!("{param}: {n} is not positive"),
                )),
            },
        }
    }

    pub fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = self.stop.clone().map_or_else(Vec::new, OneOrMany::into_vec);
        let bytes: usize = stops.iter().map(String::len).sum();
        if stops.len() > MAX_STOPS || bytes > MAX_STOP_BYTES {
            let message = format!(
                "stop: at most {MAX_STOPS} texts of {MAX_STOP_BYTES} bytes together are allowed"
            );
            return Err(ApiError::field("stop", message));
        }
        Ok(stops)
    }

    /// The sampler's options for each of `n` choices: they differ in their seeds.
    pub fn samplers(
        &self,
        defaults: &Defaults,
        vocab: usize,
        n: usize,
    ) -> Result<Vec<SamplerOptions>, ApiError> {
        let d = &defaults.sampler;
        let or = |param, value: Option<f32>, min, max, default| match value {
            Some(value) => within(param, value, min, max),
            None => Ok(default),
        };
        let repeat_penalty = or(
            "repeat_penalty",
            self.repeat_penalty,
            1e-3,
            1e3,
            d.repeat_penalty,
        )?;
        let seed = match self.seed {
            None | Some(-1) => random_seed(),
            Some(seed) => seed as u64,
        };
        let options = SamplerOptions {
            temperature: or("temperature", self.temperature, 0.0, 100.0, d.temperature)?,
            top_p: or("top_p", self.top_p, 0.0, 1.0, d.top_p)?,
            min_p: or("min_p", self.min_p, 0.0, 1.0, d.min_p)?,
            typical: or("typical_p", self.typical_p, 0.0, 1.0, d.typical)?,
            presence_penalty: or(
                "presence_penalty",
                self.presence_penalty,
                -100.0,
                100.0,
                d.presence_penalty,
            )?,
            frequency_penalty: or(
                "frequency_penalty",
                self.frequency_penalty,
                -100.0,
                100.0,
                d.frequency_penalty,
            )?,
            repeat_penalty,
            // 0 and below: all.
            top_k: self
                .top_k
                .map_or(d.top_k, |k| usize::try_from(k).unwrap_or(0)),
            penalty_last_n: self.repeat_last_n.map_or(d.penalty_last_n, |n| {
                usize::try_from(n).unwrap_or(usize::MAX)
            }),
            logit_bias: self.biases(vocab)?,
            ..d.clone()
        };
        let seeds = (0..n as u64).map(|i| seed.wrapping_add(i));
        Ok(seeds
            .map(|seed| SamplerOptions {
                seed,
                ..options.clone()
            })
            .collect())
    }

    /// OpenAI's map of ids to biases, or llama.cpp's list of pairs.
    fn biases(&self, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
        let wrong =
            |message: String| ApiError::field("logit_bias", format!("logit_bias: {message}"));
        let entry = |id: Option<u32>, bias: &Value| {
            let id = id
                .filter(|&id| (id as usize) < vocab)
                .ok_or_else(|| wrong(format!("expected ids of tokens, which are below {vocab}")))?;
            match bias {
                Value::Bool(false) => Ok((id, f32::NEG_INFINITY)),
                Value::Number(bias) => Ok((id, bias.as_f64().unwrap_or(0.0) as f32)),
                _ => Err(wrong("expected numbers as biases".to_owned())),
            }
        };
        let biases: Vec<_> = match &self.logit_bias {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(id, bias)| entry(id.parse().ok(), bias))
                .collect::<Result<_, _>>()?,
            Some(Value::Array(list)) => list
                .iter()
                .map(|pair| entry(pair[0].as_u64().and_then(|id| id.try_into().ok()), &pair[1]))
                .collect::<Result<_, _>>()?,
            Some(_) => return Err(wrong("expected an object".to_owned())),
        };
        match biases.len() > MAX_BIASES {
            false => Ok(biases),
            true => Err(wrong(format!("at most {MAX_BIASES} are allowed"))),
        }
    }

    /// What the answer has to be, by any of the fields that say so.
    pub fn format(&self) -> Result<Option<Grammar>, ApiError> {
        let mut all = Vec::new();
        all.extend(response_format(self.response_format.as_ref())?);
        let schema = self.json_schema.clone().filter(|schema| !schema.is_null());
        all.extend(schema.map(Grammar::JsonSchema));
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        all.extend(given(&self.regex).map(Grammar::Regex));
        all.extend(given(&self.grammar).map(Grammar::Grammar));
        match all.len() {
            0 | 1 => Ok(all.pop()),
            _ => Err(ApiError::field(
                "response_format",
                "only one of response_format, json_schema, regex and grammar can be given",
            )),
        }
    }
}

fn response_format(format: Option<&Value>) -> Result<Option<Grammar>, ApiError> {
    let Some(format) = format.filter(|f| !f.is_null()) else {
        return Ok(None);
    };
    let schema = |schema: &Value| Grammar::JsonSchema(schema.clone());
    match format["type"].as_str() {
        Some("text") => Ok(None),
        // llama.cpp takes a schema here.
        Some("json_object") => Ok(Some(match &format["schema"] {
            Value::Null => Grammar::JsonObject,
            given => schema(given),
        })),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            Value::Null => Err(ApiError::field(
                "response_format",
                "response_format: json_schema.schema is missing",
            )),
            given => Ok(Some(schema(given))),
        },
        _ => Err(ApiError::field(
            "response_format",
            "response_format.type: expected text, json_object or json_schema",
        )),
    }
}

/// Another number each time.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(0u8) >> 1
}

/// Reads a body, or says what is wrong with it and where.
pub(crate) fn parse_body(body: &[u8]) -> Result<Value, ApiError> {
    let value: Value = serde_json::from_slice(body)
        .map_err(|e| ApiError::new(400, "invalid_json", format!("the body is not JSON: {e}")))?;
    match value {
        Value::Object(_) => Ok(value),
        _ => Err(ApiError::new(
            400,
            "invalid_json",
            "the body is not a JSON object",
        )),
    }
}

/// The fields of a body, of the types that they must have.
pub(crate) fn fields<'a, T: Deserialize<'a>>(value: &'a Value) -> Result<T, ApiError> {
    T::deserialize(value).map_err(|e| ApiError::new(400, "invalid_type", e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn defaults() -> Defaults {
        Defaults {
            sampler: SamplerOptions::default(),
            limit: Some(100),
        }
    }

    fn of(value: Value) -> Fields {
        fields(&value).unwrap()
    }

    #[test]
    fn null_and_absence_mean_the_default() {
        let f = of(json!({"temperature": null, "n": null, "unknown": [1], "stop": null}));
        let samplers = f.samplers(&defaults(), 10, 2).unwrap();
        assert_eq!(
            samplers[0].temperature,
            SamplerOptions::default().temperature
        );
        assert_eq!(samplers[1].seed, samplers[0].seed + 1);
        assert_eq!(f.limit(&defaults()).unwrap(), Some(100));
        assert!(f.stops().unwrap().is_empty());
        assert_eq!(f.format().unwrap(), None);
    }

    #[test]
    fn limits_are_the_lower_of_request_and_server() {
        let limit = |v| of(v).limit(&defaults());
        assert_eq!(limit(json!({"max_tokens": 7})).unwrap(), Some(7));
        assert_eq!(
            limit(json!({"max_completion_tokens": 700, "max_tokens": 7})).unwrap(),
            Some(100)
        );
        assert_eq!(limit(json!({"max_tokens": -1})).unwrap(), Some(100));
        assert_eq!(
            limit(json!({"max_tokens": 0})).unwrap_err().param.unwrap(),
            "max_tokens"
        );
    }

    #[test]
    fn what_is_out_of_bounds_is_named() {
        for (body, param) in [
            (json!({"temperature": -1}), "temperature"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"logit_bias": {"10": 1}}), "logit_bias"),
            (json!({"logit_bias": {"a": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": "x"}}), "logit_bias"),
            (json!({"repeat_penalty": 0}), "repeat_penalty"),
        ] {
            let error = of(body).samplers(&defaults(), 10, 1).unwrap_err();
            assert_eq!((error.status, error.param.as_deref()), (400, Some(param)));
        }
        assert_eq!(of(json!({"n": 17})).choices().unwrap_err().status, 400);
        let two = json!({"regex": "a", "response_format": {"type": "json_object"}});
        assert_eq!(of(two).format().unwrap_err().status, 400);
        let many = json!({"stop": vec!["x"; 65]});
        assert_eq!(of(many).stops().unwrap_err().status, 400);
        assert_eq!(
            fields::<Fields>(&json!({"n": "x"})).unwrap_err().code,
            "invalid_type"
        );
    }

    #[test]
    fn biases_come_in_two_shapes() {
        let biases = |v| {
            of(json!({"logit_bias": v}))
                .samplers(&defaults(), 10, 1)
                .unwrap()
        };
        assert_eq!(biases(json!({"3": -100}))[0].logit_bias, [(3, -100.0)]);
        assert_eq!(
            biases(json!([[4, false]]))[0].logit_bias,
            [(4, f32::NEG_INFINITY)]
        );
    }
}
