//! The routes.

use super::{
    App, Ready,
    access::{Origin, is_preflight},
    body::{self, Stream},
    page,
};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Instant};
use tegula_server::{ApiError, Prepared, Service, metrics, scheduler::Refused};

/// An error on its way to the client.
struct Failed(ApiError);

impl From<ApiError> for Failed {
    fn from(error: ApiError) -> Failed {
        Failed(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Failed(error) = self;
        let status = StatusCode::from_u16(error.status);
        let mut response = json_body(&error.body());
        *response.status_mut() = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        if let Some(seconds) = error.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if error.status == 401 {
            let how = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, how);
        }
        // The rest of such a body is not worth reading.
        if matches!(error.status, 408 | 413) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

type Result<T = Response, E = Failed> = std::result::Result<T, E>;

fn json_body(value: &Value) -> Response {
    json_text(value.to_string())
}

fn json_text(text: String) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// All routes, behind what every request has to pass.
pub fn router(app: Arc<App>) -> Router {
    let known = |routes: MethodRouter<Arc<App>>| {
        routes.fallback(|| async {
            Failed(ApiError::new(
                405,
                "method_not_allowed",
                "this route has other methods",
            ))
        })
    };
    Router::new()
        .route("/", known(get(page::html)))
        .route("/page.js", known(get(page::script)))
        .route("/page.css", known(get(page::style)))
        .route("/health", known(get(health)))
        .route("/v1/health", known(get(health)))
        .route("/v1/models", known(get(models)))
        .route("/v1/models/{*id}", known(get(model)))
        .route("/v1/chat/completions", known(post(chat)))
        .route("/v1/completions", known(post(completion)))
        .route("/v1/embeddings", known(post(embedding)))
        .route("/tokenize", known(post(tokenize)))
        .route("/detokenize", known(post(detokenize)))
        .route("/props", known(get(props)))
        .route("/slots", known(get(slots)))
        .route("/metrics", known(get(metrics)))
        .route("/explain", known(get(explain)))
        .route("/lora-adapters", known(get(lora_adapters)))
        .fallback(|| async {
            Failed(ApiError::new(
                404,
                "unknown_route",
                "there is no such route",
            ))
        })
        .layer(middleware::from_fn_with_state(Arc::clone(&app), pass))
        .with_state(app)
}

/// Who asks: the number of the key, 0 where none is asked for.
#[derive(Clone, Copy)]
struct Owner(u32);

/// Routes that need no key: the page, which is the same for everybody, and the health.
const PUBLIC: [&str; 5] = ["/", "/page.js", "/page.css", "/health", "/v1/health"];

/// What every request has to pass: its origin must be allowed, and it must bear a key.
async fn pass(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let response = match enter(&app, &method, &path, &mut request) {
        Err(error) => Failed(error).into_response(),
        Ok(Entry::Preflight(origin)) => preflight(origin),
        Ok(Entry::Request(Origin::Own)) => next.run(request).await,
        Ok(Entry::Request(Origin::Allowed(origin))) => {
            let mut response = next.run(request).await;
            allow(response.headers_mut(), origin);
            response
        }
    };
    if app.verbose {
        let ms = start.elapsed().as_millis();
        say!("{method} {path} {} {ms} ms", response.status().as_u16());
    }
    response
}

enum Entry {
    Preflight(HeaderValue),
    Request(Origin),
}

fn enter(
    app: &App,
    method: &Method,
    path: &str,
    request: &mut Request,
) -> std::result::Result<Entry, ApiError> {
    let origin = app.access.origin(request.headers())?;
    if let Origin::Allowed(origin) = &origin
        && is_preflight(method, request.headers())
    {
        return Ok(Entry::Preflight(origin.clone()));
    }
    if !PUBLIC.contains(&path) {
        let key = app.access.key(request.headers())?;
        request.extensions_mut().insert(Owner(key));
    }
    Ok(Entry::Request(origin))
}

fn allow(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::VARY, HeaderValue::from_static("Origin"));
}

fn preflight(origin: HeaderValue) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    allow(headers, origin);
    for (name, value) in [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST"),
        (
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            "authorization, content-type, x-api-key",
        ),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

async fn health(State(app): State<Arc<App>>) -> Result {
    let ready = app.ready()?;
    match ready.scheduler.has_ended() {
        false => Ok(json_body(&json!({"status": "ok"}))),
        true => Err(ApiError::from(Refused::ShuttingDown).into()),
    }
}

async fn models(State(app): State<Arc<App>>) -> Result {
    Ok(json_body(&app.ready()?.service.models()))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result {
    let service = &app.ready()?.service;
    match id == service.options().name {
        true => Ok(json_body(&service.model())),
        false => {
            Err(ApiError::new(404, "model_not_found", format!("no model is called {id:?}")).into())
        }
    }
}

async fn props(State(app): State<Arc<App>>) -> Result {
    let ready = app.ready()?;
    Ok(json_body(&ready.service.props(ready.slots)))
}

async fn slots(State(app): State<Arc<App>>) -> Result {
    let ready = app.ready()?;
    Ok(json_body(&ready.service.slots(&ready.scheduler.snapshot())))
}

async fn explain(State(app): State<Arc<App>>) -> Result {
    Ok(json_text(app.ready()?.explain.clone()))
}

async fn lora_adapters(State(app): State<Arc<App>>) -> Result {
    Ok(json_text(app.ready()?.lora.clone()))
}

async fn metrics(State(app): State<Arc<App>>) -> Result {
    let text = metrics::render(&app.ready()?.scheduler.snapshot());
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// Reads the body and lets the service understand it, on a thread where that may take time.
async fn understand<T: Send + 'static>(
    app: &Arc<App>,
    request: Body,
    how: fn(&Service, &[u8]) -> std::result::Result<T, ApiError>,
) -> std::result::Result<T, ApiError> {
    app.ready()?;
    let bytes: Bytes = body::read(request, &app.limits).await?;
    let permit = app.parsers.acquire().await;
    let task = {
        let app = Arc::clone(app);
        tokio::task::spawn_blocking(move || how(&app.ready()?.service, &bytes))
    };
    let result = task.await;
    drop(permit);
    result.unwrap_or_else(|_| {
        let message = "understanding the request failed; please report it";
        Err(ApiError::new(500, "internal_error", message))
    })
}

async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result {
    let value = understand(&app, request.into_body(), Service::tokenize).await?;
    Ok(json_body(&value))
}

async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Result {
    let value = understand(&app, request.into_body(), Service::detokenize).await?;
    Ok(json_body(&value))
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result {
    answer(&app, request, Service::chat).await
}

async fn completion(State(app): State<Arc<App>>, request: Request) -> Result {
    answer(&app, request, Service::completion).await
}

async fn embedding(State(app): State<Arc<App>>, request: Request) -> Result {
    answer(&app, request, Service::embedding).await
}

/// Runs a request and answers it. Where the client goes away, this future or the stream is
/// dropped, with it the events' receiver, and the scheduler sees that nobody listens.
async fn answer(
    app: &Arc<App>,
    request: Request,
    how: fn(&Service, &[u8]) -> std::result::Result<Prepared, ApiError>,
) -> Result {
    let owner = request
        .extensions()
        .get()
        .map_or(0, |owner: &Owner| owner.0);
    let Prepared {
        drafts,
        stream,
        mut answer,
    } = understand(app, request.into_body(), how).await?;
    let Ready {
        service, scheduler, ..
    } = app.ready()?;
    let mut events = {
        let (sink, events) = body::channel();
        service.submit(scheduler, owner, drafts, sink)?;
        events
    };
    if stream {
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream"),
            (header::CACHE_CONTROL, "no-cache"),
        ];
        let body = Body::new(Stream::new(events, answer));
        return Ok((headers, body).into_response());
    }
    while !answer.is_done() {
        let (task, event) = events.recv().await.ok_or_else(body::lost)?;
        answer.event(task, event)?;
    }
    Ok(json_body(&answer.body()))
}
