//! A way to an S3 server on which requests can meet with an accident.
//!
//! Each request is taken whole and its fate decided by the test: passed on, answered with an error, stalled, passed on with
//! its reply lost, or held until the test lets it go. Bytes pass unchanged, since requests are signed.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, mpsc},
    time::Duration,
};

/// A request as far as a test looks at it.
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// Whether it writes the map's head.
    pub(crate) fn puts_head(&self) -> bool {
        self.method == "PUT" && self.path.split('?').next().unwrap().ends_with("map/head")
    }
}

/// What becomes of a request.
pub(crate) enum Fate {
    Pass,
    /// Not passed on; answered with this status.
    Answer(u16),
    /// Passed on and done; nobody hears of it.
    LoseReply,
    /// Not passed on; the connection is closed after this time.
    Stall(Duration),
    /// Passed on when the sender is dropped.
    Hold(mpsc::Receiver<()>),
}

type Decide = dyn Fn(&Request) -> Fate + Send + Sync;
/// Told of each request that was passed on, with the status of its reply.
type Passed = dyn Fn(&Request, u16) + Send + Sync;

/// Starts the way; returns its endpoint. It lives as long as the test program.
pub(crate) fn way_to(
    endpoint: &str,
    decide: impl Fn(&Request) -> Fate + Send + Sync + 'static,
    passed: impl Fn(&Request, u16) + Send + Sync + 'static,
) -> String {
    let server: SocketAddr = endpoint.strip_prefix("http://").unwrap().parse().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let (decide, passed): (Arc<Decide>, Arc<Passed>) = (Arc::new(decide), Arc::new(passed));
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let (decide, passed) = (Arc::clone(&decide), Arc::clone(&passed));
            // Either end may go at any time; the other sees a closed connection.
            std::thread::spawn(move || serve(client, server, &*decide, &*passed));
        }
    });
    format!("http://{addr}")
}

fn serve(
    mut client: TcpStream,
    server: SocketAddr,
    decide: &Decide,
    passed: &Passed,
) -> Option<()> {
    loop {
        let (head, request) = read_request(&mut client)?;
        match decide(&request) {
            Fate::Pass => {}
            Fate::Hold(until) => drop(until.recv()),
            Fate::Answer(status) => {
                let answer = format!("HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n");
                client.write_all(answer.as_bytes()).ok()?;
                continue;
            }
            Fate::Stall(time) => {
                std::thread::sleep(time);
                return None;
            }
            Fate::LoseReply => {
                let reply = ask(server, &head, &request.body)?;
                passed(&request, status(&reply));
                return None;
            }
        }
        let reply = ask(server, &head, &request.body)?;
        passed(&request, status(&reply));
        client.write_all(&reply).ok()?;
        // The reply says `Connection: close`.
        return None;
    }
}

fn status(reply: &[u8]) -> u16 {
    let line = String::from_utf8_lossy(reply.get(..16).unwrap_or_default()).into_owned();
    line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_default()
}

fn read_request(client: &mut TcpStream) -> Option<(Vec<u8>, Request)> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let text = String::from_utf8(head.clone()).ok()?;
    let mut words = text.split_ascii_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let mut body = vec![0; length.unwrap_or(0)];
    client.read_exact(&mut body).ok()?;
    Some((head, Request { method, path, body }))
}

/// Sends it to the server, on a connection of its own, and reads to the end.
fn ask(server: SocketAddr, head: &[u8], body: &[u8]) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect(server).ok()?;
    stream.write_all(&head[..head.len() - 2]).ok()?;
    stream.write_all(b"Connection: close\r\n\r\n").ok()?;
    stream.write_all(body).ok()?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).ok()?;
    Some(reply)
}
