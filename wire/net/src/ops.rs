//! The operators' port of a role: `/metrics`, `/livez`, `/readyz`.
//!
//! Plain HTTP without authentication: bind it to a loopback or a management network. Live means that this answers;
//! ready is what the role says.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{Router, extract::State, http::StatusCode, http::header::CONTENT_TYPE, routing::get};
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use wire::Fault;

use crate::NetError;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether a role can do its work now.
#[derive(Clone, Debug, Default)]
pub struct Ready(Arc<AtomicBool>);

impl Ready {
    /// Says so. Nothing else is published by it, hence relaxed.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    /// What was said last.
    #[must_use]
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Ops {
    registry: Arc<Registry>,
    ready: Ready,
}

/// Serves until `stop`. The port is bound when the returned future is first awaited to completion of the bind; use
/// [`bind`] and [`serve_on`] to learn a port that the kernel chose.
///
/// # Errors
/// [`wire::Code::Busy`] if the port is taken; then nothing is served.
pub async fn serve(
    addr: SocketAddr,
    registry: Arc<Registry>,
    ready: Ready,
    stop: CancellationToken,
) -> Result<(), Fault> {
    serve_on(bind(addr).await?, registry, ready, stop).await
}

/// Binds the port.
///
/// # Errors
/// [`wire::Code::Busy`] if the port is taken.
pub async fn bind(addr: SocketAddr) -> Result<tokio::net::TcpListener, Fault> {
    Ok(tokio::net::TcpListener::bind(addr).await.map_err(|error| NetError::bind(addr, error))?)
}

/// Serves on a port that is bound, until `stop`.
///
/// # Errors
/// [`wire::Code::Internal`] if the listener breaks.
pub async fn serve_on(
    listener: tokio::net::TcpListener,
    registry: Arc<Registry>,
    ready: Ready,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let app = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .with_state(Ops { registry, ready });
    let served = axum::serve(listener, app).with_graceful_shutdown(stop.cancelled_owned());
    Ok(served.await.map_err(|error| NetError::Socket("the ops port", error))?)
}

async fn metrics(
    State(ops): State<Ops>,
) -> Result<([(axum::http::HeaderName, &'static str); 1], String), StatusCode> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &ops.registry)
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(([(CONTENT_TYPE, OPEN_METRICS)], text))
}

async fn readyz(State(ops): State<Ops>) -> (StatusCode, &'static str) {
    if ops.ready.get() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
    }
}
