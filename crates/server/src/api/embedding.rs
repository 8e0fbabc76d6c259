//! Answers of `/v1/embeddings`.

use serde_json::{Value, json};

use crate::scheduler::Event;

/// The answer to a request for embeddings.
pub struct EmbeddingAnswer {
    pub(crate) model: String,
    pub(crate) vectors: Vec<Option<Vec<f32>>>,
    /// Tokens of all texts.
    pub(crate) tokens: usize,
    /// Little-endian floats in base64 rather than numbers.
    pub(crate) base64: bool,
}

impl EmbeddingAnswer {
    pub(crate) fn event(&mut self, task: usize, event: Event) {
        if let Event::Embedding(vector) = event {
            self.vectors[task] = Some(vector);
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.vectors.iter().all(Option::is_some)
    }

    pub(crate) fn body(self) -> Value {
        let vectors = self.vectors.into_iter().flatten().enumerate();
        let data: Vec<Value> = vectors
            .map(|(i, vector)| {
                let embedding = match self.base64 {
                    true => {
                        let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                        base64(&bytes).into()
                    }
                    false => Value::from(vector),
                };
                json!({"object": "embedding", "index": i, "embedding": embedding})
            })
            .collect();
        json!({
            "object": "list",
            "data": data,
            "model": self.model,
            "usage": {"prompt_tokens": self.tokens, "total_tokens": self.tokens},
        })
    }
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            out.push(match i <= chunk.len() {
                true => char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]),
                false => '=',
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_is_the_standards() {
        // The examples of RFC 4648, section 10.
        for (from, to) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("fooba", "Zm9vYmE="),
        ] {
            assert_eq!(super::base64(from.as_bytes()), to);
        }
    }
}
