//! A name server for tests: answers over UDP on loopback with records that change, or not at all.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

const HEADER_BYTES: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_SRV: u16 = 33;
const CLASS_IN: u16 = 1;
const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;
/// Looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// What a name server does with questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// Answers from its records; a name without any does not exist.
    Answers,
    /// Says that no name exists.
    NoSuchName,
    /// Says that it failed.
    Fails,
    /// Says nothing.
    Silent,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// An address.
    A(Ipv4Addr),
    /// A host and a port.
    Srv(String, u16),
}

/// A name server on a loopback port of its own, until it is dropped.
#[derive(Debug)]
pub struct NameServer {
    address: SocketAddr,
    zone: Arc<Zone>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Zone {
    records: Mutex<HashMap<String, Vec<Record>>>,
    mood: Mutex<Mood>,
    asked: AtomicUsize,
    end: AtomicBool,
}

impl NameServer {
    /// Starts it, without records.
    pub fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("loopback");
        socket.set_read_timeout(Some(LOOK)).expect("a socket takes timeouts");
        let address = socket.local_addr().expect("a bound socket");
        let zone = Arc::new(Zone {
            records: Mutex::default(),
            mood: Mutex::new(Mood::Answers),
            asked: AtomicUsize::new(0),
            end: AtomicBool::new(false),
        });
        let served = Arc::clone(&zone);
        let thread = thread::spawn(move || serve(&socket, &served));
        Self {
            address,
            zone,
            thread: Some(thread),
        }
    }

    /// Where it is asked.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Puts these records in place of those of `name`, which goes without its final dot.
    pub fn set(&self, name: &str, records: &[Record]) {
        let mut zone = self.zone.records.lock().unwrap_or_else(PoisonError::into_inner);
        zone.insert(name.to_ascii_lowercase(), records.to_vec());
    }

    /// Does so with questions from now on.
    pub fn be(&self, mood: Mood) {
        *self.zone.mood.lock().unwrap_or_else(PoisonError::into_inner) = mood;
    }

    /// Questions so far, unanswered ones included.
    pub fn asked(&self) -> usize {
        self.zone.asked.load(SeqCst)
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.zone.end.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(socket: &UdpSocket, zone: &Zone) {
    let mut buffer = [0; 1500];
    while !zone.end.load(SeqCst) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else {
            continue; // nothing was asked for a while
        };
        zone.asked.fetch_add(1, SeqCst);
        if let Some(answer) = zone.answer(&buffer[..length]) {
            let _ = socket.send_to(&answer, from);
        }
    }
}

impl Zone {
    fn answer(&self, question: &[u8]) -> Option<Vec<u8>> {
        let (name, end) = read_name(question)?;
        let kind = u16::from_be_bytes([*question.get(end)?, *question.get(end + 1)?]);
        let asked = question.get(HEADER_BYTES..end + 4)?;
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let known = records.get(&name).map_or(&[][..], Vec::as_slice);
        let (code, records) = match *self.mood.lock().unwrap_or_else(PoisonError::into_inner) {
            Mood::Silent => return None,
            Mood::Fails => (SERVER_FAILURE, &[][..]),
            Mood::NoSuchName => (NO_SUCH_NAME, &[][..]),
            Mood::Answers if known.is_empty() => (NO_SUCH_NAME, known),
            Mood::Answers => (NO_ERROR, known),
        };
        let data: Vec<(u16, Vec<u8>)> = records.iter().map(data).filter(|(of, _)| *of == kind).collect();
        let mut answer = question[..2].to_vec();
        answer.extend([0x84, code]); // an authoritative answer
        for count in [1, data.len() as u16, 0, 0] {
            answer.extend(count.to_be_bytes());
        }
        answer.extend(asked);
        for (kind, data) in data {
            answer.extend([0xc0, HEADER_BYTES as u8]); // the name that was asked for
            answer.extend(kind.to_be_bytes());
            answer.extend(CLASS_IN.to_be_bytes());
            answer.extend(0u32.to_be_bytes()); // not to be kept
            answer.extend((data.len() as u16).to_be_bytes());
            answer.extend(data);
        }
        Some(answer)
    }
}

/// The name that is asked for, in lower case, and where its kind stands.
fn read_name(question: &[u8]) -> Option<(String, usize)> {
    let (mut labels, mut at) = (Vec::new(), HEADER_BYTES);
    loop {
        let length = usize::from(*question.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join(".").to_ascii_lowercase(), at));
        }
        labels.push(std::str::from_utf8(question.get(at..at + length)?).ok()?);
        at += length;
    }
}

fn data(record: &Record) -> (u16, Vec<u8>) {
    match record {
        Record::A(address) => (TYPE_A, address.octets().to_vec()),
        Record::Srv(host, port) => {
            let mut data = vec![0, 0, 0, 0]; // priority and weight
            data.extend(port.to_be_bytes());
            for label in host.split('.') {
                data.push(label.len() as u8);
                data.extend(label.as_bytes());
            }
            data.push(0);
            (TYPE_SRV, data)
        }
    }
}
