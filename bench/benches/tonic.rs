//! The same bytes through the same topology on tonic (gRPC over HTTP/2 and TLS), beside bare quinn and beside Volley.
//!
//! Client, relay and echoes have a thread each. `cargo bench -p bench --bench tonic -- --volley target/release/volley
//! --in-flight 1024 --hosts 100` alternates with real launches: each round runs that program's `bench launch` with as many
//! hosts and as much in flight, which makes a fleet without boxes for it. Without `--volley` the front door's program beside
//! this one is taken if it is there. `--placer ADDR --identity DIR` measures a running fleet instead. Without `--bench` (as
//! a test) it makes one short round.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use bench::{
    launch::{self, Carrier, Load, Options, Shape},
    rounds::alternate,
};
use bytes::{Buf as _, BufMut as _, Bytes};
use tonic::{
    Request, Response, Status,
    client::Grpc as Client,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{BoxFuture, Service, http},
    server::{Grpc as Server, NamedService, UnaryService},
    transport::{
        Certificate, Channel, ClientTlsConfig, Endpoint, Identity, ServerTlsConfig,
        server::TcpIncoming,
    },
};
use wire::{Code, Fault};
use wire_net::tls::{FleetAuthority, Peer};

const PATH: &str = "/volley.Launch/Launch";

/// Messages are bytes as they are: what is compared is the way, not the encoding.
#[derive(Clone, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let len = bytes.remaining();
        Ok(Some(bytes.copy_to_bytes(len)))
    }
}

/// Answers at once, or passes on to the echoes behind in turn.
#[derive(Clone)]
struct Echo {
    reply: Bytes,
    behind: Arc<[Channel]>,
    turn: Arc<AtomicUsize>,
}

impl UnaryService<Bytes> for Echo {
    type Response = Bytes;
    type Future = BoxFuture<Response<Bytes>, Status>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let echo = self.clone();
        Box::pin(async move {
            let at = echo.turn.fetch_add(1, Ordering::Relaxed);
            match echo.behind.get(at % echo.behind.len().max(1)) {
                Some(channel) => {
                    trip(channel.clone(), request.into_inner()).await.map(Response::new)
                }
                None => Ok(Response::new(echo.reply)),
            }
        })
    }
}

impl Service<http::Request<tonic::body::Body>> for Echo {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let echo = self.clone();
        Box::pin(async move { Ok(Server::new(Raw).unary(echo, request).await) })
    }
}

impl NamedService for Echo {
    const NAME: &'static str = "volley.Launch";
}

async fn trip(channel: Channel, request: Bytes) -> Result<Bytes, Status> {
    let mut client = Client::new(channel);
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = http::uri::PathAndQuery::from_static(PATH);
    client.unary(Request::new(request), path, Raw).await.map(Response::into_inner)
}

fn internal(error: impl std::fmt::Display) -> Fault {
    Fault::new(Code::Internal, error.to_string())
}

/// Certificates of both ends, as PEM.
#[derive(Clone)]
struct Pem {
    cert: String,
    key: String,
    ca: String,
}

impl Pem {
    fn issue(authority: &FleetAuthority, peer: &Peer) -> Result<Self, Fault> {
        let dir = tempfile::tempdir().map_err(internal)?;
        authority.issue(peer)?.save(dir.path())?;
        let read = |name| std::fs::read_to_string(dir.path().join(name)).map_err(internal);
        Ok(Self { cert: read("cert.pem")?, key: read("key.pem")?, ca: read("ca.pem")? })
    }

    async fn dial(&self, to: SocketAddr) -> Result<Channel, Fault> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.ca))
            .identity(Identity::from_pem(&self.cert, &self.key))
            .domain_name("role-placer.volley");
        let endpoint = Endpoint::from_shared(format!("https://{to}"))
            .and_then(|endpoint| endpoint.tcp_nodelay(true).tls_config(tls))
            .map_err(internal)?;
        endpoint.connect().await.map_err(internal)
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Fault> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(internal)
}

/// An echo, or a relay to one, on a thread of its own until `stop`.
fn serve(
    pem: Pem,
    shape: Shape,
    behind: Option<SocketAddr>,
    stop: Arc<AtomicBool>,
) -> Result<SocketAddr, Fault> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || -> Result<(), Fault> {
        runtime()?.block_on(async move {
            let mut channels = Vec::new();
            if let Some(behind) = behind {
                for _ in 0..shape.hosts {
                    channels.push(pem.dial(behind).await?);
                }
            }
            let echo = Echo {
                reply: vec![0; shape.reply].into(),
                behind: channels.into(),
                turn: Arc::default(),
            };
            let tls = ServerTlsConfig::new()
                .identity(Identity::from_pem(&pem.cert, &pem.key))
                .client_ca_root(Certificate::from_pem(&pem.ca));
            let incoming = TcpIncoming::bind((Ipv4Addr::LOCALHOST, 0).into()).map_err(internal)?;
            let incoming = incoming.with_nodelay(Some(true));
            let _ = tell.send(incoming.local_addr().map_err(internal)?);
            let until = async {
                while !stop.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            let server = tonic::transport::Server::builder()
                .tls_config(tls)
                .map_err(internal)?
                .add_service(echo)
                .serve_with_incoming(incoming);
            tokio::select! {
                served = server => served.map_err(internal),
                () = until => Ok(()),
            }
        })
    });
    told.recv().map_err(|_| internal("a tonic server did not start"))
}

/// Round trips a second through a relay.
fn tonic_relay(shape: Shape) -> Result<f64, Fault> {
    let authority = FleetAuthority::unsaved()?;
    let stop = Arc::new(AtomicBool::new(false));
    let server = Pem::issue(&authority, &Peer::Placer(1))?;
    let echo = serve(server.clone(), shape, None, Arc::clone(&stop))?;
    let relay = serve(server, shape, Some(echo), Arc::clone(&stop))?;
    let client = Pem::issue(&authority, &Peer::Client { tenant: "bench".into() })?;
    let offered = thread::spawn(move || runtime()?.block_on(offer(client, relay, shape)));
    let rate = offered.join().map_err(|_| internal("the client panicked"))?;
    stop.store(true, Ordering::Relaxed);
    rate
}

async fn offer(pem: Pem, to: SocketAddr, shape: Shape) -> Result<f64, Fault> {
    let mut channels = Vec::new();
    for _ in 0..shape.connections {
        channels.push(pem.dial(to).await?);
    }
    let done = Arc::new(AtomicU64::new(0));
    let request = Bytes::from(vec![0; shape.request]);
    for at in 0..shape.in_flight {
        let (channel, done) = (channels[at % channels.len()].clone(), Arc::clone(&done));
        let request = request.clone();
        tokio::spawn(async move {
            while trip(channel.clone(), request.clone()).await.is_ok() {
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (before, from) = (done.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(shape.time).await;
    let count = done.load(Ordering::Relaxed) - before;
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok(count as f64 / from.elapsed().as_secs_f64())
}

struct Args(Vec<String>);

impl Args {
    fn text(&self, name: &str) -> Option<&str> {
        let at = self.0.iter().position(|arg| arg == name)?;
        self.0.get(at + 1).map(String::as_str)
    }

    fn count(&self, name: &str, default: usize) -> Result<usize, Fault> {
        let Some(text) = self.text(name) else { return Ok(default) };
        text.parse().map_err(|_| Fault::new(Code::Config, format!("{name} {text} is no count")))
    }
}

/// The front door's program: the one that was named, or the one that was built beside this.
fn front_door(args: &Args) -> Option<PathBuf> {
    if let Some(path) = args.text("--volley") {
        return Some(PathBuf::from(path));
    }
    let beside = std::env::current_exe().ok()?.parent()?.parent()?.join("volley");
    beside.is_file().then_some(beside)
}

/// Launches a second on a fleet that is made for this round.
fn made_fleet(volley: &Path, shape: Shape) -> Result<f64, Fault> {
    let time = format!("{}ms", shape.time.as_millis());
    let output = Command::new(volley)
        .args(["bench", "launch", "-o", "json", "--ceiling", "0s", "--warm-up", "500ms"])
        .args(["--duration", &time])
        .args(["--hosts", &shape.hosts.to_string()])
        .args(["--in-flight", &shape.in_flight.to_string()])
        .args(["--connections", &shape.connections.to_string()])
        .output()
        .map_err(internal)?;
    if !output.status.success() {
        return Err(internal(String::from_utf8_lossy(&output.stderr)));
    }
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(internal)?;
    report["launches_per_second"].as_f64().ok_or_else(|| internal("a report without its figure"))
}

fn launches(args: &Args, shape: Shape) -> Result<Option<Options>, Fault> {
    let (Some(placer), Some(identity)) = (args.text("--placer"), args.text("--identity")) else {
        return Ok(None);
    };
    let placer = placer.parse().map_err(|_| Fault::new(Code::Config, "--placer is no address"))?;
    Ok(Some(Options {
        placers: vec![placer],
        identity: PathBuf::from(identity),
        image: args.text("--image").unwrap_or("shell").to_owned(),
        load: Load::Closed { in_flight: shape.in_flight },
        connections: shape.connections,
        duration: shape.time,
        warm_up: Duration::from_millis(500),
        ceiling: Duration::ZERO,
        progress: false,
        ..Options::default()
    }))
}

fn run(args: &Args) -> Result<(), Fault> {
    wire_net::tls::install_provider();
    let real = args.0.iter().any(|arg| arg == "--bench");
    let shape = Shape {
        request: args.count("--request", 220)?,
        reply: args.count("--reply", 112)?,
        connections: args.count("--connections", 4)?,
        in_flight: args.count("--in-flight", if real { 1_024 } else { 32 })?,
        hosts: args.count("--hosts", if real { 100 } else { 3 })?,
        time: Duration::from_millis(if real { 2_000 } else { 100 }),
        carrier: Carrier::Lane,
    };
    let rounds = if real { 5 } else { 1 };
    let launches = launches(args, shape)?;
    let made = front_door(args).filter(|_| real && launches.is_none());
    let [volley, tonic, lanes, streams] = alternate::<Fault, 4>(
        rounds,
        [
            &mut || match (&launches, &made) {
                (Some(options), _) => Ok(launch::run(options)?.launches_per_second),
                (None, Some(volley)) => made_fleet(volley, shape),
                (None, None) => Ok(f64::NAN),
            },
            &mut || tonic_relay(shape),
            &mut || launch::bare(shape, true),
            &mut || launch::bare(Shape { carrier: Carrier::Stream, ..shape }, true),
        ],
    )?;
    println!("{shape:?}; a second, client, relay and echoes on a thread each");
    if launches.is_some() || made.is_some() {
        println!("  volley, real launches  {volley:.0}");
    }
    println!("  tonic relay            {tonic:.0}");
    println!("  bare quinn, a lane     {lanes:.0}; {:.1} times tonic", lanes.median / tonic.median);
    println!(
        "  bare quinn, a stream   {streams:.0}; {:.1} times tonic",
        streams.median / tonic.median
    );
    if launches.is_some() || made.is_some() {
        println!("  volley is {:.1} times tonic", volley.median / tonic.median);
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args(std::env::args().skip(1).collect())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("error: {fault}");
            ExitCode::FAILURE
        }
    }
}
