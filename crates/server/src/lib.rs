//! Serving a model, without sockets: the program adds the HTTP.
//!
//! - [`service`] understands requests and knows what the server tells of itself;
//! - [`scheduler`] is the thread that runs many tasks at once;
//! - [`api`] writes answers in OpenAI's shapes from the scheduler's events;
//! - [`tools`] and [`answer`] know how models write calls and reasoning;
//! - [`metrics`] is for Prometheus.
//!
//! Nothing here reads or writes files: no request can reach them.
#![forbid(unsafe_code)]

pub mod answer;
pub mod api;
pub mod error;
#[doc(hidden)]
pub mod fuzz;
pub mod metrics;
pub mod scheduler;
pub mod service;
pub mod tools;

pub use api::{Answer, Defaults, Draft, Prepared};
pub use error::ApiError;
pub use scheduler::{Pooling, Scheduler, SchedulerOptions};
pub use service::{Service, ServiceOptions};
