//! The world outside of sandboxes: addresses on the loopback interface, servers on them, and what programs inside say.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

use crate::place::processes;

/// What every program inside knows: perl's own calls, no modules.
pub(crate) const CLIENT: &str = r#"
$| = 1; $SIG{PIPE} = 'IGNORE'; $SIG{ALRM} = sub { print "timeout\n"; exit 1 }; alarm 60;
sub at { pack('Sna4x8', 2, $_[1], pack('C4', split(/\./, $_[0]))) }
sub say { print join(' ', @_), "\n" }
sub socket_to { socket(my $s, 2, 1, 0) or return 0 + $!; connect($s, at(@_)) or return 0 + $!; $s }
sub dial { my $s = socket_to(@_); ref $s ? 'open' : $s }
sub over { my ($s, $word) = @_; syswrite($s, "$word\n") or return ''; sysread($s, my $b, 100) or return ''; chomp $b; $b }
sub talk { my ($ip, $port, $word) = @_; my $s = socket_to($ip, $port); ref $s ? over($s, $word) : $s }
sub ask { my ($ip, $port, $word) = @_; socket(my $s, 2, 2, 0); connect($s, at($ip, $port)); syswrite($s, $word);
  my $b; defined(sysread($s, $b, 100)) ? $b : 0 + $! }
sub name { my $a = gethostbyname($_[0]); defined $a ? join('.', unpack('C4', $a)) : 'none' }
sub drain { my $s = socket_to(@_); return $s unless ref $s; my ($n, $sum) = (0, 0);
  while (my $l = sysread($s, my $b, 1 << 20)) { $n += $l; $sum = ($sum + unpack('%32C*', $b)) % 4294967296 } ($n, $sum) }
sub pour { my ($ip, $port, $n) = @_; my $s = socket_to($ip, $port); return $s unless ref $s;
  my $b = join('', map { chr } 0..255) x 1024; while ($n > 0) { my $l = syswrite($s, $b, $n < length $b ? $n : length $b); return 'broken' unless $l; $n -= $l;
  $b = substr($b, $l % 256) . substr($b, 0, $l % 256) if $l % 256 } shutdown($s, 1); sysread($s, my $answer, 100); chomp $answer; $answer }
sub serve { socket(my $l, 2, 1, 0); bind($l, at('127.0.0.1', $_[0])) or die $!; listen($l, 10); alarm 0;
  while (accept(my $s, $l)) { sysread($s, my $b, 100); syswrite($s, uc $b) } }
"#;

/// Addresses of this test process: 10.Y.Z.1 and 10.Y.Z+1.1 of which the first range is open.
pub(crate) struct World {
    nets: [[u8; 3]; 2],
}

impl World {
    /// `None`, and why, where a machine cannot have one.
    pub(crate) fn new() -> Option<Self> {
        let lacks = ["/dev/net/tun"].iter().find(|path| !Path::new(path).exists());
        let runs = |program: &&str| Command::new(program).arg("-V").output().is_ok();
        let lacks = lacks.or(["ip", "perl"].iter().find(|program| !runs(program)));
        if let Some(what) = lacks {
            println!("skipped: no {what} here, which tests of networks need");
            return None;
        }
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let pid = std::process::id().to_le_bytes();
        let nth = NEXT.fetch_add(2, Ordering::Relaxed);
        // One process has seen fewer worlds than there are networks.
        let net = |n: u8| [10, 128 | (pid[0] & 0x7f), pid[1].wrapping_mul(31).wrapping_add(n)];
        let world = Self { nets: [net(nth), net(nth + 1)] };
        for index in 1..=2 {
            world.address("add", index);
        }
        Some(world)
    }

    fn address(&self, what: &str, index: usize) {
        let address = format!("{}/32", self.ip(index));
        let done = Command::new("ip").args(["address", what, &address, "dev", "lo"]).status();
        assert!(done.unwrap().success(), "ip address {what} {address}");
    }

    /// The first or the second address.
    pub(crate) fn ip(&self, index: usize) -> Ipv4Addr {
        let [a, b, c] = self.nets[index - 1];
        Ipv4Addr::new(a, b, c, 1)
    }

    /// Both of them.
    pub(crate) fn range(&self) -> String {
        format!("10.{}.0.0/16", self.nets[0][1])
    }

    pub(crate) fn free_port(&self, index: usize) -> u16 {
        TcpListener::bind((self.ip(index), 0)).unwrap().local_addr().unwrap().port()
    }

    fn serve(&self, index: usize, each: impl Fn(TcpStream) + Send + Clone + 'static) -> Server {
        let listener = TcpListener::bind((self.ip(index), 0)).unwrap();
        let server = Server(listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), each) = (stream, each.clone()) else { continue };
                std::thread::spawn(move || each(stream));
            }
        });
        server
    }

    /// Says again, loudly, what it hears.
    pub(crate) fn echo(&self, index: usize) -> Server {
        self.serve(index, |mut stream| {
            let mut bytes = [0; 1_024];
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                bytes[..length].make_ascii_uppercase();
                if stream.write_all(&bytes[..length]).is_err() {
                    return;
                }
            }
        })
    }

    pub(crate) fn udp_echo(&self, index: usize) -> Server {
        let socket = UdpSocket::bind((self.ip(index), 0)).unwrap();
        let server = Server(socket.local_addr().unwrap());
        std::thread::spawn(move || {
            let mut bytes = [0; 1_024];
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                bytes[..length].make_ascii_uppercase();
                let _ = socket.send_to(&bytes[..length], from);
            }
        });
        server
    }

    /// Sends so many bytes of the pattern.
    pub(crate) fn source(&self, index: usize, total: usize) -> Server {
        let pattern: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        self.serve(index, move |mut stream| {
            let mut left = total;
            while left > 0 {
                let length = left.min(pattern.len());
                if stream.write_all(&pattern[..length]).is_err() {
                    return;
                }
                left -= length;
            }
        })
    }

    /// Takes all, and then says how many bytes that were and their sum.
    pub(crate) fn sink(&self, index: usize) -> Server {
        self.serve(index, |mut stream| {
            let mut bytes = vec![0; 1 << 20];
            let (mut total, mut sum) = (0_usize, 0_u32);
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                total += length;
                let part: u64 = bytes[..length].iter().map(|byte| u64::from(*byte)).sum();
                sum = sum.wrapping_add(u32::try_from(part & 0xffff_ffff).unwrap());
            }
            let _ = stream.write_all(format!("{total} {sum}\n").as_bytes());
            let _ = stream.shutdown(Shutdown::Write);
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for index in 1..=2 {
            let address = format!("{}/32", self.ip(index));
            let _ = Command::new("ip").args(["address", "del", &address, "dev", "lo"]).status();
        }
    }
}

/// The sum of the pattern's bytes, modulo 2^32.
pub(crate) fn sum_of(total: usize) -> u32 {
    assert_eq!(total % 256, 0);
    u32::try_from((total as u64 / 256 * (255 * 128)) & 0xffff_ffff).unwrap()
}

pub(crate) struct Server(SocketAddr);

impl Server {
    pub(crate) fn address(&self) -> SocketAddr {
        self.0
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.port()
    }
}

/// What a server that answers once says to a word.
pub(crate) fn fetch(at: SocketAddr, word: &str) -> Result<String, io::ErrorKind> {
    let ask = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(word.as_bytes())?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        if said.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(said) }
    };
    // The server inside may need a moment to listen.
    let begun = Instant::now();
    loop {
        match ask() {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                ) && begun.elapsed() < Duration::from_secs(3) =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other.map_err(|error| error.kind()),
        }
    }
}

/// Egress workers of a state directory.
fn workers(state: &Path) -> Vec<i32> {
    let dir = state.join("egress").display().to_string();
    processes(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).collect();
        words.get(1) == Some(&&b"__egress"[..]) && words.get(2) == Some(&dir.as_bytes())
    })
}

pub(crate) fn kill_worker(state: &Path) {
    let found = workers(state);
    assert_eq!(found.len(), 1, "one worker: {found:?}");
    let uid = fs::read_to_string(format!("/proc/{}/status", found[0])).unwrap();
    assert!(uid.contains("\nCapEff:\t0000000000000000\n"), "it has no capability");
    let pid = rustix::process::Pid::from_raw(found[0]).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Waits until the worker holds no device of a box.
pub(crate) fn no_device_is_left(state: &Path) {
    let begun = Instant::now();
    loop {
        let devices: usize = workers(state)
            .iter()
            .map(|pid| {
                let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
                fds.filter(|fd| {
                    fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("tun"))
                })
                .count()
            })
            .sum();
        if devices == 0 {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{devices} devices left");
        std::thread::sleep(Duration::from_millis(20));
    }
}
