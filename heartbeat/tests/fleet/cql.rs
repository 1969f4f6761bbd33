//! A way to Cassandra on which requests can meet with an accident: errors of the protocol (version 4) in place of answers.
//!
//! Frames pass unchanged, one by one; a test decides over those that execute something prepared, by its text. What it
//! injects is what a real node sends: the driver cannot tell.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

const ERROR: u8 = 0x00;
const RESULT: u8 = 0x08;
const PREPARE: u8 = 0x09;
const EXECUTE: u8 = 0x0a;
const BATCH: u8 = 0x0d;
const HEADER: usize = 9;

/// What becomes of an execution.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Pass,
    /// "The coordinator is overloaded": nothing was done.
    Overloaded,
    /// "I do not know this statement": nothing was done.
    Unprepared,
    /// It is done, and answered by a write timeout of a lightweight transaction.
    CasTimeout,
}

/// Decides by the statement's text and by whether it comes in a batch.
type Decide = dyn Fn(&str, bool) -> Fate + Send + Sync;

#[derive(Default)]
struct Known {
    /// Text of what is being prepared, by stream.
    preparing: HashMap<i16, String>,
    /// Streams whose answer is replaced.
    replaced: HashMap<i16, Vec<u8>>,
}

/// Starts the way; returns where. It lives as long as the test program.
pub(crate) fn way_to(
    node: SocketAddr,
    decide: impl Fn(&str, bool) -> Fate + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let decide: Arc<Decide> = Arc::new(decide);
    // Ids follow from the text, so that one connection may execute what another has prepared.
    let prepared = Arc::<Mutex<HashMap<Vec<u8>, String>>>::default();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect(node) else { continue };
            let (decide, all) = (Arc::clone(&decide), Arc::clone(&prepared));
            let known = Arc::<Mutex<Known>>::default();
            let (back, forth) = (Arc::clone(&known), known);
            let (from, to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            let shared = Arc::new(Mutex::new(to));
            let (answers, learn) = (Arc::clone(&shared), Arc::clone(&all));
            std::thread::spawn(move || answer(from, &answers, &back, &learn));
            std::thread::spawn(move || ask(client, server, &shared, &forth, &all, &*decide));
        }
    });
    addr
}

fn read_frame(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut frame = vec![0; HEADER];
    from.read_exact(&mut frame).ok()?;
    let len = u32::from_be_bytes(frame[5..9].try_into().unwrap());
    frame.resize(HEADER + usize::try_from(len).unwrap(), 0);
    from.read_exact(&mut frame[HEADER..]).ok()?;
    Some(frame)
}

fn stream_of(frame: &[u8]) -> i16 {
    i16::from_be_bytes([frame[2], frame[3]])
}

fn short_bytes(bytes: &[u8]) -> Vec<u8> {
    let len = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    bytes[2..2 + len].to_vec()
}

fn ask(
    mut client: TcpStream,
    mut server: TcpStream,
    answers: &Mutex<TcpStream>,
    known: &Mutex<Known>,
    all: &Mutex<HashMap<Vec<u8>, String>>,
    decide: &Decide,
) -> Option<()> {
    loop {
        let Some(frame) = read_frame(&mut client) else {
            let _ = server.shutdown(std::net::Shutdown::Both);
            return None;
        };
        let (stream, body) = (stream_of(&frame), &frame[HEADER..]);
        let id = match frame[4] {
            PREPARE => {
                let text = String::from_utf8_lossy(&body[4..]).into_owned();
                known.lock().unwrap().preparing.insert(stream, text);
                None
            }
            EXECUTE => Some(short_bytes(body)),
            // Type, count, and the first statement's kind.
            BATCH => Some(short_bytes(&body[4..])),
            _ => None,
        };
        let text = id.as_ref().and_then(|id| all.lock().unwrap().get(id).cloned());
        let fate = text.map_or(Fate::Pass, |text| decide(&text, frame[4] == BATCH));
        match fate {
            Fate::Pass => {}
            Fate::CasTimeout => {
                let mut rest = 0x0008u16.to_be_bytes().to_vec(); // Serial.
                rest.extend_from_slice(&0i32.to_be_bytes());
                rest.extend_from_slice(&1i32.to_be_bytes());
                rest.extend_from_slice(&[0, 3]);
                rest.extend_from_slice(b"CAS");
                let error = error(stream, 0x1100, "injected: CAS write timeout", &rest);
                known.lock().unwrap().replaced.insert(stream, error);
            }
            Fate::Overloaded => {
                let error = error(stream, 0x1001, "injected: overloaded", &[]);
                answers.lock().unwrap().write_all(&error).ok()?;
                continue;
            }
            Fate::Unprepared => {
                let id = id.unwrap();
                let mut rest = u16::try_from(id.len()).unwrap().to_be_bytes().to_vec();
                rest.extend_from_slice(&id);
                let error = error(stream, 0x2500, "injected: unprepared", &rest);
                answers.lock().unwrap().write_all(&error).ok()?;
                continue;
            }
        }
        server.write_all(&frame).ok()?;
    }
}

fn answer(
    mut server: TcpStream,
    answers: &Mutex<TcpStream>,
    known: &Mutex<Known>,
    all: &Mutex<HashMap<Vec<u8>, String>>,
) -> Option<()> {
    loop {
        let Some(mut frame) = read_frame(&mut server) else {
            let _ = answers.lock().unwrap().shutdown(std::net::Shutdown::Both);
            return None;
        };
        let stream = stream_of(&frame);
        {
            let mut known = known.lock().unwrap();
            if let Some(text) = known.preparing.remove(&stream)
                && frame[4] == RESULT
                && frame[HEADER..HEADER + 4] == 4i32.to_be_bytes()
            {
                all.lock().unwrap().insert(short_bytes(&frame[HEADER + 4..]), text);
            }
            if let Some(error) = known.replaced.remove(&stream) {
                frame = error;
            }
        }
        answers.lock().unwrap().write_all(&frame).ok()?;
    }
}

fn error(stream: i16, code: i32, message: &str, rest: &[u8]) -> Vec<u8> {
    let mut body = code.to_be_bytes().to_vec();
    body.extend_from_slice(&u16::try_from(message.len()).unwrap().to_be_bytes());
    body.extend_from_slice(message.as_bytes());
    body.extend_from_slice(rest);
    let mut frame = vec![0x84, 0];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.push(ERROR);
    frame.extend_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(&body);
    frame
}
