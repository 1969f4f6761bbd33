//! One body a decoder: what must hold for any bytes whatever.
//!
//! Property tests (`tests/decoders.rs`), the corpus test and the fuzz targets (`fuzz/`) all run these. Left out: whether
//! a decoder accepts what it should, which the round trips in `decoders.rs` assert.

use wire::{
    datagram::{Datagram, Kind, Verified},
    feed, frame, heartbeat,
    launch::{LaunchHead, LaunchRequest},
    map,
    report::FailureReport,
    seal::{FleetKey, KeyEpoch, Role},
};

/// A decoder's body.
pub(crate) type Body = fn(&[u8]);

/// Every decoder by the name of its fuzz target.
pub(crate) const ALL: &[(&str, Body)] =
    &[("datagram", datagram), ("records", records), ("map", map), ("stream", stream)];

/// Nothing unsealed is ever accepted; parsing never panics.
pub(crate) fn datagram(bytes: &[u8]) {
    let key = FleetKey { epoch: KeyEpoch(1), secret: [9; 32] }.sender(Role::Host, 1);
    if let Ok(datagram) = Datagram::parse(bytes) {
        assert!(datagram.verify(&key).is_none(), "bytes that were never sealed were accepted");
    }
}

/// Records behind a tag: the worst that the holder of a stolen key can send.
pub(crate) fn records(bytes: &[u8]) {
    let (&first, body) = match bytes.split_first() {
        Some(split) => split,
        None => return,
    };
    let (kind, role) = match first % 5 {
        0 => (Kind::Heartbeat, Role::Host),
        1 => (Kind::Directive, Role::Host),
        2 => (Kind::FailureReport, Role::Placer),
        3 => (Kind::Subscribe, Role::Placer),
        _ => (Kind::Feed, Role::Placer),
    };
    let sender = wire::datagram::Sender { role, id: 1, key_epoch: KeyEpoch(1) };
    let verified = Verified { kind, sender, body };
    if let Ok((_, heartbeat)) = heartbeat::open(&verified) {
        assert_ne!(heartbeat.port, 0);
        let _ = (heartbeat.word(), heartbeat.addr());
    }
    let _ = heartbeat::Directive::open(&verified);
    let _ = FailureReport::open(&verified);
    let _ = feed::Subscribe::open(&verified);
    if let Ok(feed) = feed::Feed::open(&verified) {
        assert!(feed.entries().len() <= feed::ENTRIES_MAX.max(body.len()));
    }
}

/// A head, or a page under a reference that the attacker chose to match.
pub(crate) fn map(bytes: &[u8]) {
    if let Ok(head) = map::Head::from_bytes(bytes) {
        assert_eq!(head.pages.iter().map(|page| u64::from(page.count)).sum::<u64>(), head.count);
    }
    let Ok(len) = u32::try_from(bytes.len()) else { return };
    let count = bytes.get(8..12).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let digest = *blake3::hash(bytes).as_bytes();
    let named = map::PageRef { first: 0, last: u64::MAX, count, bytes: len, digest };
    if let Ok(page) = map::Page::parse(bytes, &named) {
        let hosts: Vec<_> = page.hosts().collect();
        assert!(hosts.is_sorted_by(|a, b| a.0 < b.0), "rows ascend");
        assert_eq!(hosts.len(), count as usize);
    }
}

/// The first frame of a stream and what may be in it.
pub(crate) fn stream(bytes: &[u8]) {
    if let Some(head) = bytes.first_chunk()
        && let Ok(header) = frame::Header::parse(head)
    {
        assert_eq!(header.bytes(), *head, "a header that parses is the one that would be written");
    }
    if let Ok((_, request)) = LaunchHead::split(bytes) {
        let _ = LaunchRequest::access(request);
        if let Ok(request) = LaunchRequest::from_bytes(request) {
            assert!(request.check().is_ok());
        }
    }
    let _ = wire::call::Call::from_bytes(bytes);
    let _ = wire::call::Answer::from_bytes(bytes);
    let _ = wire::codec::read::<wire::launch::LaunchReply>(bytes, wire::limits::FRAME_BYTES_MAX);
}
