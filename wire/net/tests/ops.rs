//! The operators' port: metrics as they are counted, readiness as the role says it, a busy port by name.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::{net::SocketAddr, sync::Arc};

use prometheus_client::{metrics::counter::Counter, registry::Registry};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;
use wire::Code;
use wire_net::ops::{self, Ready};

async fn get(addr: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_role_tells_its_counts_and_whether_it_is_ready() {
    let mut registry = Registry::default();
    let beats = Counter::<u64>::default();
    registry.register("beats", "Heartbeats", beats.clone());
    let listener = ops::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (ready, stop) = (Ready::default(), CancellationToken::new());
    let serving = ops::serve_on(listener, Arc::new(registry), ready.clone(), stop.clone());
    let serving = tokio::spawn(serving);

    assert!(get(addr, "/livez").await.starts_with("HTTP/1.0 200"));
    assert!(get(addr, "/readyz").await.starts_with("HTTP/1.0 503"));
    ready.set(true);
    assert!(get(addr, "/readyz").await.starts_with("HTTP/1.0 200"));
    beats.inc_by(3);
    let metrics = get(addr, "/metrics").await;
    assert!(metrics.contains("beats_total 3") && metrics.contains("openmetrics-text"), "{metrics}");
    assert!(get(addr, "/").await.starts_with("HTTP/1.0 404"));

    let busy = ops::bind(addr).await.unwrap_err();
    assert_eq!(busy.code, Code::Busy);
    stop.cancel();
    serving.await.unwrap().unwrap();
}
