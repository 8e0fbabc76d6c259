//! Accepting connections, and the end of the server.

use super::{App, routes, stall::Stalling};
use anyhow::Context as _;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use rustix::{net::sockopt, process};
use std::{io, net::SocketAddr, sync::Arc, task::Poll, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
    sync::{Notify, Semaphore},
    task::JoinHandle,
    time::{sleep, timeout},
};

/// Threads that serve connections: they only pass bytes on.
const THREADS: usize = 2;
/// Files that the process needs besides connections.
const OTHER_FILES: u64 = 64;
/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 64 << 10;
/// How long what was sent may go without an answer from the other end's system.
const UNACKNOWLEDGED: Duration = Duration::from_secs(60);

/// A server that accepts connections.
pub struct Server {
    runtime: Runtime,
    app: Arc<App>,
    address: SocketAddr,
    /// Told when no more connections are to be accepted.
    closing: Arc<Notify>,
    accepting: JoinHandle<GracefulShutdown>,
}

/// Starts to accept connections.
pub fn start(listener: std::net::TcpListener, app: Arc<App>) -> anyhow::Result<Server> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("http")
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let address = listener.local_addr().context("cannot tell the address")?;
    listener
        .set_nonblocking(true)
        .context("cannot set up the listener")?;
    let closing = Arc::new(Notify::new());
    let connections = app.limits.connections.min(raise_file_limit());
    let accepting = {
        let _inside = runtime.enter();
        let listener = TcpListener::from_std(listener).context("cannot set up the listener")?;
        let (app, closing) = (Arc::clone(&app), Arc::clone(&closing));
        runtime.spawn(accept(listener, app, closing, connections))
    };
    Ok(Server {
        runtime,
        app,
        address,
        closing,
        accepting,
    })
}

/// Raises the limit of open files as far as the system lets it, and returns how many
/// connections that leaves room for.
fn raise_file_limit() -> usize {
    let mut limit = process::getrlimit(process::Resource::Nofile);
    let wanted = process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if process::setrlimit(process::Resource::Nofile, wanted).is_ok() {
        limit.current = limit.maximum;
    }
    match limit.current {
        None => usize::MAX,
        Some(n) => n.saturating_sub(OTHER_FILES).max(1) as usize,
    }
}

async fn accept(
    listener: TcpListener,
    app: Arc<App>,
    closing: Arc<Notify>,
    connections: usize,
) -> GracefulShutdown {
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS)));
    let router = routes::router(Arc::clone(&app));
    loop {
        // The listener's own queue holds who comes when there are too many.
        let next = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let closed = closing.notified();
        let (permit, accepted) = match either(next, closed).await {
            Some(next) => next,
            None => return graceful,
        };
        let Ok((stream, _)) = accepted else {
            // Out of files or memory, or a connection that is gone already.
            sleep(Duration::from_millis(20)).await;
            continue;
        };
        // Without these everything works, only less well.
        let _ = stream.set_nodelay(true);
        let _ = sockopt::set_tcp_user_timeout(&stream, UNACKNOWLEDGED.as_millis() as u32);
        let connection = serve(stream, router.clone(), &app);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // How a connection ends is the client's business.
            let _ = connection.await;
            drop(permit);
        });
    }
}

type Connection = http1::Connection<TokioIo<Stalling>, TowerToHyperService<Router>>;

fn serve(stream: TcpStream, router: Router, app: &App) -> Connection {
    let stream = Stalling::new(stream, app.limits.body_time);
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.limits.header_time)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
}

/// The first future's result; `None` if the second is done before.
async fn either<T>(first: impl Future<Output = T>, second: impl Future<Output = ()>) -> Option<T> {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    std::future::poll_fn(|cx| {
        if second.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        first.as_mut().poll(cx).map(Some)
    })
    .await
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until a signal says to end, and then ends what is under way.
    pub fn run(self) -> anyhow::Result<()> {
        let Server {
            runtime,
            app,
            closing,
            accepting,
            ..
        } = self;
        runtime.block_on(async {
            let failed = until_signal(&app).await?;
            closing.notify_one();
            let graceful = accepting.await.context("accepting connections failed")?;
            if failed {
                anyhow::bail!("the inference thread has ended by itself");
            }
            say!("ending: no new requests; a second signal ends at once");
            if let Ok(ready) = app.ready() {
                ready.scheduler.drain();
            }
            let drained = timeout(app.limits.drain, graceful.shutdown()).await.is_ok();
            if let Ok(ready) = app.ready() {
                ready.scheduler.stop();
            }
            if !drained {
                say!("some requests did not end in time");
                // Their clients are told before their connections go.
                sleep(Duration::from_millis(200)).await;
            }
            Ok(())
        })?;
        runtime.shutdown_timeout(Duration::from_secs(1));
        Ok(())
    }
}

/// Waits for SIGINT or SIGTERM; true if the inference thread ended before. From then on the
/// next signal ends the process.
async fn until_signal(app: &App) -> io::Result<bool> {
    let mut signals = Signals {
        interrupt: signal(SignalKind::interrupt())?,
        terminate: signal(SignalKind::terminate())?,
    };
    let ended = async {
        loop {
            sleep(Duration::from_millis(500)).await;
            if app.ready().is_ok_and(|ready| ready.scheduler.has_ended()) {
                return;
            }
        }
    };
    let failed = either(signals.next(), ended).await.is_none();
    tokio::spawn(async move {
        let second = signals.next().await;
        // 128 and the signal's number, as shells do.
        std::process::exit(128 + second.as_raw_value());
    });
    Ok(failed)
}

/// What asks the server to end.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    async fn next(&mut self) -> SignalKind {
        std::future::poll_fn(|cx| {
            if self.interrupt.poll_recv(cx).is_ready() {
                return Poll::Ready(SignalKind::interrupt());
            }
            let terminate = self.terminate.poll_recv(cx);
            terminate.map(|_| SignalKind::terminate())
        })
        .await
    }
}
