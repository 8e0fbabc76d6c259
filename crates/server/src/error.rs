//! Errors as OpenAI's clients expect them: a status code and
//! `{"error": {"message", "type", "param", "code"}}`.

use serde_json::{Value, json};
use tegula_gguf::TemplateError;
use tegula_grammar::GrammarError;

use crate::scheduler::{Failure, Refused};

/// What a client is told instead of an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP's status code.
    pub status: u16,
    /// The kind, in OpenAI's words: `invalid_request_error`, `rate_limit_error`, ….
    pub kind: &'static str,
    /// What exactly, for programs.
    pub code: &'static str,
    pub message: String,
    /// The field that is to blame.
    pub param: Option<String>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

impl ApiError {
    /// An error of the given status and code.
    pub fn new(status: u16, code: &'static str, message: impl Into<String>) -> ApiError {
        let kind = match status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            408 | 504 => "timeout_error",
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            503 => "overloaded_error",
            _ => "server_error",
        };
        ApiError {
            status,
            kind,
            code,
            message: message.into(),
            param: None,
            retry_after: None,
        }
    }

    /// A field whose value can't be.
    pub fn field(param: &str, message: impl Into<String>) -> ApiError {
        ApiError::new(400, "invalid_value", message).with_param(param)
    }

    /// A field that asks for what there is not.
    pub fn unsupported(param: &str, message: impl Into<String>) -> ApiError {
        ApiError::new(400, "unsupported_value", message).with_param(param)
    }

    /// The same with the field that is to blame.
    pub fn with_param(mut self, param: &str) -> ApiError {
        self.param = Some(param.to_owned());
        self
    }

    /// The same with when to try again.
    pub fn with_retry_after(mut self, seconds: u64) -> ApiError {
        self.retry_after = Some(seconds);
        self
    }

    /// The response's body.
    pub fn body(&self) -> Value {
        json!({
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        })
    }
}

impl From<GrammarError> for ApiError {
    fn from(error: GrammarError) -> ApiError {
        ApiError::new(400, "invalid_grammar", error.to_string())
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> ApiError {
        // Whatever a template stumbles over, it does for these messages.
        ApiError::new(400, "template_error", error.to_string()).with_param("messages")
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> ApiError {
        let message = refused.to_string();
        match refused {
            Refused::Full { retry_after_s, .. } => {
                ApiError::new(429, "queue_full", message).with_retry_after(retry_after_s)
            }
            Refused::ShuttingDown => {
                ApiError::new(503, "shutting_down", message).with_retry_after(5)
            }
            Refused::Dead => ApiError::new(500, "internal_error", message),
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> ApiError {
        let message = failure.to_string();
        match failure {
            Failure::Deadline => ApiError::new(504, "deadline_exceeded", message),
            Failure::Shutdown => ApiError::new(503, "shutting_down", message).with_retry_after(5),
            Failure::Constraint(_) => ApiError::new(400, "invalid_grammar", message),
            Failure::Engine(_) => ApiError::new(500, "internal_error", message),
        }
    }
}
