//! Decoders against round trips, mutations, truncations and the fuzz corpus.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod bodies;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use wire::{
    CapacityWord, HostId, Incarnation, LaunchId, Seq,
    datagram::Datagram,
    feed,
    heartbeat::{self, Directive, Heartbeat},
    launch::{LaunchHead, LaunchRequest, Limits, Network},
    limits::DATAGRAM_BYTES_MAX,
    map::{self, Head, HostAddr, MapVersion, Page, PageRef},
    report::FailureReport,
    seal::{FleetKey, KeyEpoch, Role, SenderKey},
};

const HOST: HostId = HostId(0x1234_5678_9abc_def0);

fn key(role: Role, id: u64) -> SenderKey {
    FleetKey { epoch: KeyEpoch(3), secret: [9; 32] }.sender(role, id)
}

prop_compose! {
    fn any_heartbeat()(
        incarnation: u64, seq: u64, ip: [u8; 16], port in 1u16.., free: [u16; 4], total: [u16; 4],
        running: u32, interval_ms in 100u32..=120_000, flags: u16,
    ) -> Heartbeat {
        Heartbeat {
            incarnation: Incarnation(incarnation), seq: Seq(seq), ip, port, free, total, running,
            interval_ms, flags,
        }
    }
}

fn sealed(heartbeat: &Heartbeat) -> Vec<u8> {
    let mut out = [0; DATAGRAM_BYTES_MAX];
    let len = heartbeat.seal(HOST, KeyEpoch(3), &key(Role::Host, HOST.0), &mut out);
    out[..len].to_vec()
}

fn any_addr() -> impl Strategy<Value = HostAddr> {
    let ip = prop_oneof![
        any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
        any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).to_canonical()),
    ];
    (ip, prop_oneof![Just(7_000u16), 1u16..]).prop_map(|(ip, port)| HostAddr { ip, port })
}

proptest! {
    #[test]
    fn a_heartbeat_comes_back_as_it_was_sealed(said in any_heartbeat()) {
        let bytes = sealed(&said);
        let datagram = Datagram::parse(&bytes).unwrap();
        prop_assert_eq!(datagram.sender.key_epoch, KeyEpoch(3));
        let verified = datagram.verify(&key(Role::Host, HOST.0)).unwrap();
        prop_assert_eq!(heartbeat::open(&verified), Ok((HOST, said)));
        prop_assert!(Directive::open(&verified).is_err(), "a kind is never taken for another");
    }

    // PROTOCOL 1.2, 2.1: one changed bit anywhere, and nothing is accepted.
    #[test]
    fn a_changed_heartbeat_is_not_accepted(said in any_heartbeat(), at: prop::sample::Index, bit in 0u8..8) {
        let mut bytes = sealed(&said);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(datagram) = Datagram::parse(&bytes) {
            let alleged = key(datagram.sender.role, datagram.sender.id);
            prop_assert!(datagram.verify(&alleged).is_none() || datagram.sender.key_epoch != KeyEpoch(3));
        }
    }

    // PROTOCOL 1.3
    #[test]
    fn a_cut_heartbeat_is_not_accepted(said in any_heartbeat(), len: prop::sample::Index) {
        let bytes = sealed(&said);
        let cut = &bytes[..len.index(bytes.len())];
        let accepted = Datagram::parse(cut).is_ok_and(|d| d.verify(&key(Role::Host, HOST.0)).is_some());
        prop_assert!(!accepted);
    }

    #[test]
    fn a_feed_comes_back_as_it_was_sealed(
        entries in prop::collection::vec((any::<u64>(), any::<u64>()), 0..=feed::ENTRIES_MAX),
    ) {
        let entries: Vec<_> = entries.iter().map(|&(id, word)| (HostId(id), CapacityWord(word))).collect();
        let key = key(Role::Placer, 4);
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let len = feed::seal(7, 8, &entries, (4, KeyEpoch(3), &key), &mut out);
        let verified = Datagram::parse(&out[..len]).unwrap().verify(&key).unwrap();
        let feed = feed::Feed::open(&verified).unwrap();
        prop_assert_eq!((feed.aggregator, feed.seq), (7, 8));
        prop_assert_eq!(feed.entries().collect::<Vec<_>>(), entries);
    }

    #[test]
    fn reports_and_directives_come_back(word: u64, failures: u32, code: u16, deadline: u64, wrapped: [u8; 32]) {
        let report = FailureReport {
            host: HOST, seq: 1, about: FailureReport::HEALTH, word: CapacityWord(word), failures, code,
        };
        let placer = key(Role::Placer, 4);
        let mut out = [0; DATAGRAM_BYTES_MAX];
        let len = report.seal(4, KeyEpoch(3), &placer, &mut out);
        let verified = Datagram::parse(&out[..len]).unwrap().verify(&placer).unwrap();
        prop_assert_eq!(FailureReport::open(&verified), Ok((4, report)));

        let directive = Directive {
            drain: Directive::DRAIN, drain_deadline_ms: deadline, key_epoch: 4, wrapped_key: wrapped,
            ..Directive::answering(Incarnation(1), Seq(2))
        };
        let host = key(Role::Host, HOST.0);
        let len = directive.seal(HOST, KeyEpoch(3), &host, &mut out);
        let verified = Datagram::parse(&out[..len]).unwrap().verify(&host).unwrap();
        prop_assert_eq!(Directive::open(&verified), Ok((HOST, directive)));
    }

    #[test]
    fn a_page_comes_back_and_any_flipped_bit_spoils_it(
        hosts in prop::collection::btree_map(any::<u64>(), any_addr(), 0..60),
        at: prop::sample::Index, bit in 0u8..8,
    ) {
        let hosts: Vec<_> = hosts.into_iter().map(|(id, addr)| (HostId(id), addr)).collect();
        let mut bytes = Page::encode(&hosts);
        let named = page_ref(&bytes, hosts.len());
        let page = Page::parse(&bytes, &named).unwrap();
        prop_assert_eq!(page.hosts().collect::<Vec<_>>(), hosts);
        prop_assert!(Page::parse(&bytes[..bytes.len() - 1], &named).is_err());
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(Page::parse(&bytes, &named).is_err());
    }

    #[test]
    fn a_head_comes_back_and_any_flipped_bit_spoils_it(
        epoch: u64, version: u64, nonce: [u8; 16], cuts in prop::collection::btree_set(1u64.., 0..20),
        at: prop::sample::Index, bit in 0u8..8,
    ) {
        let head = head(MapVersion { epoch, version }, nonce, cuts.into_iter().collect());
        let mut bytes = head.to_bytes();
        prop_assert_eq!(Head::from_bytes(&bytes), Ok(head));
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(Head::from_bytes(&bytes).is_err());
    }

    #[test]
    fn a_launch_comes_back(
        id: [u8; 16], command in prop::collection::vec("[^\0]{0,20}", 0..5), tty: bool, hard_ms: u64,
    ) {
        let request = launch(id, command, tty, hard_ms);
        let mut payload = LaunchHead::new(5).bytes().to_vec();
        payload.extend(request.to_bytes());
        let (head, bytes) = LaunchHead::split(&payload).unwrap();
        prop_assert_eq!(head.budget_ms, 5);
        prop_assert_eq!(LaunchRequest::access(bytes).unwrap().tenant.as_str(), "acme");
        prop_assert_eq!(LaunchRequest::from_bytes(bytes), Ok(request));
    }

    #[test]
    fn no_bytes_upset_a_decoder(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        for (_, body) in bodies::ALL {
            body(&bytes);
        }
    }

    #[test]
    fn no_mutation_of_a_launch_upsets_its_decoder(id: [u8; 16], at: prop::sample::Index, byte: u8) {
        let mut bytes = LaunchHead::new(5).bytes().to_vec();
        bytes.extend(launch(id, vec!["sh".into(), "-c".into()], true, 1).to_bytes());
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bodies::stream(&bytes);
        bodies::stream(&bytes[4..]);
    }
}

fn page_ref(bytes: &[u8], count: usize) -> PageRef {
    PageRef {
        first: 0,
        last: u64::MAX,
        count: count.try_into().unwrap(),
        bytes: bytes.len().try_into().unwrap(),
        digest: *blake3::hash(bytes).as_bytes(),
    }
}

fn head(version: MapVersion, nonce: [u8; 16], cuts: Vec<u64>) -> Head {
    let firsts: Vec<u64> = std::iter::once(0).chain(cuts).collect();
    let pages = firsts.iter().enumerate().map(|(at, &first)| PageRef {
        first,
        last: firsts.get(at + 1).map_or(u64::MAX, |next| next - 1),
        count: 2,
        bytes: 40,
        digest: [at.try_into().unwrap(); 32],
    });
    Head {
        format: map::FORMAT,
        version,
        previous: MapVersion::default(),
        nonce,
        created_ms: 1,
        count: 2 * firsts.len() as u64,
        pages: pages.collect(),
    }
}

fn launch(id: [u8; 16], command: Vec<String>, tty: bool, hard_ms: u64) -> LaunchRequest {
    LaunchRequest {
        launch_id: LaunchId(id),
        tenant: "acme".into(),
        image: "shell".into(),
        shape: 1,
        command,
        env: vec![("PATH".into(), "/bin".into())],
        cwd: String::new(),
        user: String::new(),
        tty,
        stdin: false,
        limits: Limits { hard_ms, ..Limits::default() },
        network: Network::None,
        publish: vec![],
        labels: vec![],
    }
}

// PROTOCOL 5.5
#[test]
fn a_head_with_a_gap_or_a_wrong_count_is_refused() {
    let good = head(MapVersion { epoch: 1, version: 1 }, [0; 16], vec![100, 200]);
    let mut gap = good.clone();
    gap.pages[1].first = 101;
    let mut short = good.clone();
    short.pages[2].last = u64::MAX - 1;
    let mut miscounted = good.clone();
    miscounted.count += 1;
    let mut newer = good.clone();
    newer.format += 1;
    for bad in [gap, short, miscounted, newer] {
        assert!(Head::from_bytes(&bad.to_bytes()).is_err());
    }
    assert!(Head::from_bytes(&good.to_bytes()).is_ok());
}

// NUMBERS: a host costs 12 bytes where all are IPv4 on one port.
#[test]
fn an_ipv4_host_on_the_common_port_costs_twelve_bytes() {
    let addr = |last| HostAddr { ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), port: 7_000 };
    let one = Page::encode(&[(HostId(1), addr(1))]).len();
    let two = Page::encode(&[(HostId(1), addr(1)), (HostId(2), addr(2))]).len();
    assert_eq!(two - one, 12);
}

#[test]
fn a_launch_that_breaks_a_rule_is_refused_by_name() {
    let good = launch([1; 16], vec!["sh".into()], false, 0);
    assert_eq!(good.check(), Ok(()));
    let spoiled: [fn(&mut LaunchRequest); 6] = [
        |r| r.shape = 4,
        |r| r.image.clear(),
        |r| r.tenant = "t".repeat(129),
        |r| r.command = vec!["a\0b".into()],
        |r| r.env = vec![("A=B".into(), String::new())],
        |r| r.command = vec![String::new(); 1_025],
    ];
    for spoil in spoiled {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert_eq!(bad.check().unwrap_err().code, wire::Code::BadRequest);
        assert!(LaunchRequest::from_bytes(&bad.to_bytes()).is_err());
    }
}

#[test]
fn the_fuzz_corpus_upsets_no_decoder() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut ran = 0;
    for (name, body) in bodies::ALL {
        for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
            body(&std::fs::read(entry.unwrap().path()).unwrap());
            ran += 1;
        }
    }
    assert!(ran >= bodies::ALL.len(), "each fuzz target has a corpus");
}

/// Writes seeds for the fuzzer when asked to: `VOLLEY_WRITE_CORPUS=1 cargo test -p wire corpus_seeds`.
#[test]
fn corpus_seeds_are_what_the_encoders_write() {
    let heartbeat = Heartbeat {
        incarnation: Incarnation(1),
        seq: Seq(2),
        ip: Heartbeat::ip_bytes(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        port: 7_000,
        free: [1, 2, 3, 4],
        total: [4; 4],
        running: 1,
        interval_ms: 15_000,
        flags: 0,
    };
    let bytes = sealed(&heartbeat);
    let mut forged = bytes.clone();
    *forged.last_mut().unwrap() ^= 1;
    let record = [&[0], &bytes[20..bytes.len() - 16]].concat();
    let addr = HostAddr { ip: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 7_000 };
    let head = head(MapVersion { epoch: 1, version: 2 }, [3; 16], vec![100]).to_bytes();
    let mut frame = LaunchHead::new(5).bytes().to_vec();
    frame.extend(launch([1; 16], vec!["sh".into()], true, 9).to_bytes());
    let seeds: [(&str, &str, Vec<u8>); 5] = [
        ("datagram", "forged-heartbeat", forged),
        ("records", "heartbeat", record),
        ("map", "page", Page::encode(&[(HostId(1), addr)])),
        ("map", "head", head),
        ("stream", "launch", frame),
    ];
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (target, name, seed) in seeds {
        let path = corpus.join(target).join(name);
        if std::env::var_os("VOLLEY_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &seed).unwrap();
        }
        assert_eq!(std::fs::read(&path).unwrap(), seed, "{target}/{name} is out of date");
    }
}
