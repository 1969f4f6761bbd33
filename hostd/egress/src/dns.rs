//! Names: reading what a box asks, asking for it, and answering with no more than addresses.
//!
//! The box's answer is written anew and holds addresses of the name that was asked for, nothing of the upstream's
//! message: no other record, name or byte passes from one side to the other. Left out: IPv6 addresses (answered as
//! absent), DNS over TCP (answers to boxes fit a datagram), caching (a box's C library does it, or its tenant pays).

use std::net::Ipv4Addr;

use simple_dns::{
    CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE,
    rdata::{A, OPT, RData},
};

use crate::limits::{ADDRESSES_MAX, ANSWER_BYTES_MAX, TTL_S_MAX};

/// What a box asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    id: u16,
    /// Lower case, no final dot.
    pub(crate) name: String,
    /// As it was written: answers repeat it letter by letter.
    written: String,
    qtype: QTYPE,
    /// Whether it asks for IPv4 addresses.
    pub(crate) addresses: bool,
}

/// Reads a question. `None`: not one that is answered at all.
pub(crate) fn read(payload: &[u8]) -> Option<Asked> {
    let packet = Packet::parse(payload).ok()?;
    if packet.has_flags(PacketFlag::RESPONSE) || packet.questions.len() != 1 {
        return None;
    }
    let question = packet.questions.first()?;
    let written = text_of(&question.qname)?;
    let name = written.to_ascii_lowercase();
    let internet = matches!(question.qclass, QCLASS::CLASS(CLASS::IN) | QCLASS::ANY);
    let addresses = internet && question.qtype == QTYPE::TYPE(TYPE::A);
    Some(Asked { id: packet.id(), name, written, qtype: question.qtype, addresses })
}

/// A name as text, if its labels are such that the text says them again.
fn text_of(name: &Name<'_>) -> Option<String> {
    let text: Vec<&str> =
        name.as_bytes().map(|label| std::str::from_utf8(label).ok()).collect::<Option<_>>()?;
    let plain = |label: &&str| {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        !label.is_empty() && label.bytes().all(good)
    };
    (!text.is_empty() && text.iter().all(plain)).then(|| text.join("."))
}

/// Writes an answer: these addresses, or why there are none.
pub(crate) fn answer(asked: &Asked, found: &[(Ipv4Addr, u32)], rcode: RCODE) -> Option<Vec<u8>> {
    let mut packet = Packet::new_reply(asked.id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED | PacketFlag::RECURSION_AVAILABLE);
    *packet.rcode_mut() = rcode;
    let name = Name::new(&asked.written).ok()?;
    packet.questions.push(Question::new(name.clone(), asked.qtype, CLASS::IN.into(), false));
    for (ip, ttl_s) in found.iter().take(ADDRESSES_MAX) {
        let data = RData::A(A { address: ip.to_bits() });
        packet.answers.push(ResourceRecord::new(name.clone(), CLASS::IN, *ttl_s, data));
    }
    packet.build_bytes_vec_compressed().ok()
}

/// Writes the question that is asked upstream.
pub(crate) fn question(id: u16, name: &str) -> Option<Vec<u8>> {
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let qtype = QTYPE::TYPE(TYPE::A);
    packet.questions.push(Question::new(Name::new(name).ok()?, qtype, CLASS::IN.into(), false));
    let udp_packet_size = u16::try_from(ANSWER_BYTES_MAX).unwrap_or(512);
    *packet.opt_mut() = Some(OPT { opt_codes: Vec::new(), udp_packet_size, version: 0 });
    packet.build_bytes_vec().ok()
}

/// What upstream said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Addresses and their bounded TTLs in seconds.
    pub(crate) addresses: Vec<(Ipv4Addr, u32)>,
    /// How it went.
    pub(crate) rcode: RCODE,
}

/// Reads an answer to [`question`]. `None`: it is none, so that a forger has to guess on.
pub(crate) fn found(id: u16, name: &str, payload: &[u8]) -> Option<Found> {
    let packet = Packet::parse(payload).ok()?;
    let asked = packet.questions.first().filter(|_| packet.questions.len() == 1)?;
    let same = text_of(&asked.qname).is_some_and(|text| text.eq_ignore_ascii_case(name));
    if packet.id() != id || !packet.has_flags(PacketFlag::RESPONSE) || !same {
        return None;
    }
    // Follows aliases from the name on: an address of anything else is not its address.
    let mut owner = name.to_ascii_lowercase();
    let mut addresses = Vec::new();
    for _ in 0..packet.answers.len() {
        let of_owner = |record: &&ResourceRecord<'_>| {
            record.class == CLASS::IN
                && text_of(&record.name).is_some_and(|text| text.eq_ignore_ascii_case(&owner))
        };
        let mut next = None;
        for record in packet.answers.iter().filter(of_owner) {
            match &record.rdata {
                RData::A(A { address }) if addresses.len() < ADDRESSES_MAX => {
                    addresses.push((Ipv4Addr::from_bits(*address), record.ttl.min(TTL_S_MAX)));
                }
                RData::CNAME(alias) => next = text_of(&alias.0),
                _ => {}
            }
        }
        match next {
            Some(alias) if addresses.is_empty() => owner = alias,
            _ => break,
        }
    }
    Some(Found { addresses, rcode: packet.rcode() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use simple_dns::rdata::CNAME;

    fn query(name: &str, qtype: TYPE) -> Vec<u8> {
        let mut packet = Packet::new_query(7);
        let name = Name::new_unchecked(name);
        packet.questions.push(Question::new(name, qtype.into(), CLASS::IN.into(), false));
        packet.build_bytes_vec().unwrap()
    }

    #[test]
    fn a_question_is_read_and_answered_with_its_own_letters() {
        let asked = read(&query("ExAmple.Org", TYPE::A)).unwrap();
        assert_eq!(asked.name, "example.org");
        assert!(asked.addresses);
        assert!(!read(&query("example.org", TYPE::AAAA)).unwrap().addresses);
        let found = [(Ipv4Addr::new(192, 0, 2, 9), 60)];
        let bytes = answer(&asked, &found, RCODE::NoError).unwrap();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(packet.id(), 7);
        assert_eq!(packet.questions[0].qname.to_string(), "ExAmple.Org");
        assert_eq!(packet.answers.len(), 1);
        let full: Vec<_> = (0..99).map(|n| (Ipv4Addr::new(192, 0, 2, n), 60)).collect();
        assert!(answer(&asked, &full, RCODE::NoError).unwrap().len() <= 512);
    }

    #[test]
    fn only_addresses_of_the_name_itself_count() {
        let record = |name: &'static str, data| {
            ResourceRecord::new(Name::new_unchecked(name), CLASS::IN, 9_999, data)
        };
        let address = |n| RData::A(A { address: n });
        let alias = |to| RData::CNAME(CNAME(Name::new_unchecked(to)));
        let mut packet = Packet::new_reply(7);
        packet.questions.push(Question::new(
            Name::new_unchecked("a.org"),
            TYPE::A.into(),
            CLASS::IN.into(),
            false,
        ));
        packet.answers = vec![
            record("evil.org", address(1)),
            record("b.org", address(2)),
            record("A.org", alias("b.org")),
        ];
        let bytes = packet.build_bytes_vec().unwrap();
        let got = found(7, "a.org", &bytes).unwrap();
        assert_eq!(got.addresses, [(Ipv4Addr::from_bits(2), TTL_S_MAX)]);
        assert_eq!(found(8, "a.org", &bytes), None, "another question's answer");
        assert_eq!(found(7, "b.org", &bytes), None);
        packet.answers = vec![record("a.org", alias("b.org")), record("b.org", alias("a.org"))];
        let bytes = packet.build_bytes_vec().unwrap();
        assert!(found(7, "a.org", &bytes).unwrap().addresses.is_empty(), "a ring of aliases ends");
    }

    proptest::proptest! {
        #[test]
        fn junk_is_no_question_and_no_answer_and_no_panic(bytes in proptest::collection::vec(0u8.., 0..600)) {
            if let Some(asked) = read(&bytes) {
                let _ = answer(&asked, &[], RCODE::Refused);
            }
            let _ = found(7, "a.org", &bytes);
        }
    }

    #[test]
    fn flipped_questions_do_no_harm() {
        let bytes = query("example.org", TYPE::A);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                if let Some(asked) = read(&flipped) {
                    let _ = answer(&asked, &[], RCODE::Refused);
                }
            }
        }
    }
}
