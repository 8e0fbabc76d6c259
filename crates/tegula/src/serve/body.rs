//! Bodies: reading requests within their limits, and streaming answers.

use super::Limits;
use axum::body::{Body, Bytes, HttpBody};
use http_body_util::BodyExt as _;
use hyper::body::Frame;
use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tegula_server::{
    Answer, ApiError,
    scheduler::{Event, Sink},
};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{Instant, Interval, interval_at, timeout},
};

/// How much of a body that is too large is read and thrown away, so that its sender gets to
/// the answer rather than a broken connection.
const LINGER_BYTES: usize = 256 << 20;
/// And for how long.
const LINGER: Duration = Duration::from_secs(10);
/// How often a stream on which nothing happens shows that it is alive.
const ALIVE: Duration = Duration::from_secs(10);

/// A request's body as a whole.
pub async fn read(body: Body, limits: &Limits) -> Result<Bytes, ApiError> {
    let late = ApiError::new(408, "body_timeout", "the body took too long to arrive");
    match timeout(limits.body_time, read_all(body, limits.body)).await {
        Ok(result) => result,
        Err(_) => Err(late),
    }
}

async fn read_all(mut body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let stated = body.size_hint().lower();
    let mut bytes = Vec::new();
    let mut too_large = stated > limit as u64;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| {
            ApiError::new(400, "broken_body", format!("the body can't be read: {e}"))
        })?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        too_large |= bytes.len() + data.len() > limit;
        if too_large {
            // A sender that goes on beyond this finds the connection closed.
            let _ = timeout(LINGER, discard(body)).await;
            let message = format!("the body is larger than {limit} bytes");
            return Err(ApiError::new(413, "body_too_large", message));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.into())
}

async fn discard(mut body: Body) {
    let mut read = 0;
    while read < LINGER_BYTES {
        match body.frame().await {
            Some(Ok(frame)) => read += frame.data_ref().map_or(0, Bytes::len),
            _ => return,
        }
    }
}

/// Events of a request's tasks, by their numbers. A task sends no more than its answer is
/// long, which bounds what waits here.
pub struct TaskSink {
    task: usize,
    to: UnboundedSender<(usize, Event)>,
}

impl Sink for TaskSink {
    fn send(&mut self, event: Event) -> bool {
        self.to.send((self.task, event)).is_ok()
    }

    fn is_open(&self) -> bool {
        !self.to.is_closed()
    }
}

/// Where a request's events arrive.
pub type Events = UnboundedReceiver<(usize, Event)>;

/// Sinks for the tasks of a request, and where they lead.
pub fn channel() -> (impl FnMut(usize) -> Box<dyn Sink>, Events) {
    let (to, events) = unbounded_channel();
    let sink = move |task| {
        Box::new(TaskSink {
            task,
            to: to.clone(),
        }) as Box<dyn Sink>
    };
    (sink, events)
}

/// The inference thread went away in the middle of an answer.
pub fn lost() -> ApiError {
    ApiError::new(500, "internal_error", "the inference thread has ended")
}

/// An answer as server-sent events.
pub struct Stream {
    events: Events,
    answer: Answer,
    alive: Interval,
    done: bool,
}

impl Stream {
    pub fn new(events: Events, answer: Answer) -> Stream {
        Stream {
            events,
            answer,
            alive: interval_at(Instant::now() + ALIVE, ALIVE),
            done: false,
        }
    }

    /// Adds what an event has to say to `out`.
    fn write(&mut self, event: Option<(usize, Event)>, out: &mut String) {
        let mut data = |value: &dyn std::fmt::Display| {
            out.push_str("data: ");
            out.push_str(&value.to_string());
            out.push_str("\n\n");
        };
        let chunks = match event {
            Some((task, event)) => self.answer.event(task, event),
            None => Err(lost()),
        };
        match chunks {
            Ok(chunks) => {
                chunks.iter().for_each(|chunk| data(chunk));
                if self.answer.is_done() {
                    data(&"[DONE]");
                    self.done = true;
                }
            }
            Err(error) => {
                data(&error.body());
                self.done = true;
            }
        }
    }
}

impl HttpBody for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let mut out = String::new();
        while !this.done {
            match this.events.poll_recv(cx) {
                Poll::Ready(event) => this.write(event, &mut out),
                Poll::Pending => break,
            }
        }
        if out.is_empty() {
            if this.done {
                return Poll::Ready(None);
            }
            ready!(this.alive.poll_tick(cx));
            out.push_str(": waiting\n\n");
        }
        this.alive.reset();
        Poll::Ready(Some(Ok(Frame::data(out.into()))))
    }
}
