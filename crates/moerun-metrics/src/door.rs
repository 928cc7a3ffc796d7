//! The door: `GET /metrics` over HTTP/1.1, on a thread of its own.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::RwLock;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    net::TcpStream,
    sync::{Semaphore, oneshot},
    time::{sleep, timeout},
};

use crate::{Figures, page::Source, process::ThisProcess};

/// Where the figures are.
const PATH: &str = "/metrics";
/// What they are.
const TEXT: HeaderValue = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
/// Readers at a time; one more waits.
const MAX_CONNECTIONS: usize = 16;
/// How long a reader may take to ask.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may last; readers come back.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest head of a request.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// When the system has no more descriptors, how long to wait for one to become free.
const PAUSE_WHEN_FULL: Duration = Duration::from_millis(100);

/// A door for Prometheus, as long as it lives. It has a thread and a runtime of its own, so that it answers however busy the
/// rest of the process is. It asks nobody who they are, and says nothing but figures and the names of workers.
#[derive(Debug)]
pub struct MetricsDoor {
    address: SocketAddr,
    registry: Arc<RwLock<Registry>>,
    /// Dropping it ends the thread.
    _end: oneshot::Sender<Infallible>,
}

impl MetricsDoor {
    /// Opens the door on `host:port`, where port 0 takes a free one. `role` is `gateway` or `worker`.
    pub fn open(address: &str, role: &'static str, version: &'static str) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Source(ThisProcess { role, version })));
        let registry = Arc::new(RwLock::new(registry));
        let (end, ended) = oneshot::channel();
        let read = Arc::clone(&registry);
        thread::Builder::new()
            .name("moerun-metrics".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = serve(listener, read) => {}
                        _ = ended => {}
                    }
                });
            })?;
        Ok(Self {
            address,
            registry,
            _end: end,
        })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Shows these figures too.
    pub fn show(&self, figures: impl Figures) {
        self.registry.write().register_collector(Box::new(Source(figures)));
    }
}

async fn serve(listener: TcpListener, registry: Arc<RwLock<Registry>>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!("the metrics door does not open: {error}"),
    };
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return; // never closed
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let answering = answer_all(stream, Arc::clone(&registry));
                // Ends by itself in bounded time, or with the runtime.
                tokio::spawn(async move {
                    let _ = timeout(CONNECTION_TIMEOUT, answering).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::debug!("metrics: {error}");
                sleep(PAUSE_WHEN_FULL).await;
            }
        }
    }
}

async fn answer_all(stream: TcpStream, registry: Arc<RwLock<Registry>>) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), &registry);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!("metrics: {error}");
    }
}

fn answer(method: &Method, path: &str, registry: &RwLock<Registry>) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    if path != PATH {
        return plain(StatusCode::NOT_FOUND, "wanted /metrics\n");
    }
    if method != Method::GET {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "wanted GET\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    let mut text = String::new();
    match encode(&mut text, &registry.read()) {
        Ok(()) => {
            let mut response = Response::new(Full::from(text));
            response.headers_mut().insert(CONTENT_TYPE, TEXT);
            response
        }
        Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the figures could not be written\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fmt,
        io::{Read, Write},
    };

    use super::*;
    use crate::{Kind, Page};

    #[derive(Debug)]
    struct Sample;

    impl Figures for Sample {
        fn write(&self, page: &mut Page<'_>) -> fmt::Result {
            page.figure(Kind::Counter, "calls", "Calls", 3.0)?;
            let labels = |worker: &'static str| [("worker", worker)];
            page.family(
                Kind::Gauge,
                "worker_up",
                "Whether it is there",
                [(labels("a:1"), 1.0), (labels("b\"\n"), 0.0)],
            )?;
            let buckets = vec![(0.1, 2), (f64::INFINITY, 1)];
            page.histograms("wait_seconds", "How long", [(labels("a:1"), 5.5, buckets)])
        }
    }

    fn ask(door: &MetricsDoor, request: &str) -> String {
        let mut stream = std::net::TcpStream::connect(door.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn figures_are_read_over_plain_http_and_nothing_else_is() {
        let door = MetricsDoor::open("127.0.0.1:0", "worker", "1.2.3").unwrap();
        door.show(Sample);
        let get = |path: &str| {
            ask(
                &door,
                &format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"),
            )
        };
        let page = get("/metrics");
        for line in [
            "HTTP/1.1 200 OK",
            "# TYPE moerun_calls counter",
            "moerun_calls_total 3.0",
            "moerun_worker_up{worker=\"a:1\"} 1.0",
            "moerun_worker_up{worker=\"b\\\"\\n\"} 0.0",
            "moerun_wait_seconds_bucket{le=\"0.1\",worker=\"a:1\"} 2",
            "moerun_wait_seconds_bucket{le=\"+Inf\",worker=\"a:1\"} 3",
            "moerun_wait_seconds_count{worker=\"a:1\"} 3",
            "moerun_build{role=\"worker\",version=\"1.2.3\"} 1.0",
            "# EOF",
        ] {
            assert!(page.lines().any(|it| it.trim_end() == line), "{line}: {page}");
        }
        assert!(get("/").starts_with("HTTP/1.1 404"));
        let posted = ask(&door, "POST /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert!(
            posted.starts_with("HTTP/1.1 405") && posted.contains("allow: GET"),
            "{posted}"
        );
        assert!(ask(&door, "nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
    }

    #[test]
    fn the_door_closes_with_its_owner() {
        let door = MetricsDoor::open("127.0.0.1:0", "worker", "1.2.3").unwrap();
        let address = door.address();
        drop(door);
        let until = std::time::Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(address).is_ok() {
            assert!(std::time::Instant::now() < until, "it is still open");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
