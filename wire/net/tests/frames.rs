//! Frames out of chunks: however a stream is cut, the same frames come out, and no bytes make the reader panic or
//! hold more than it was sent.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use wire::{
    codec::Malformed,
    frame::{HEADER_BYTES, Header, Kind},
    limits::FRAME_BYTES_MAX,
};
use wire_net::stream::{Chunks, StreamLost, expect_frame, read_frame};

/// A stream that gives what it has in the pieces in which it got it.
struct Cut(VecDeque<Bytes>);

impl Cut {
    fn new(mut bytes: &[u8], cuts: &[usize]) -> Self {
        let mut chunks = VecDeque::new();
        for cut in cuts.iter().cycle() {
            if bytes.is_empty() {
                break;
            }
            let (chunk, rest) = bytes.split_at((*cut).clamp(1, bytes.len()));
            chunks.push_back(Bytes::copy_from_slice(chunk));
            bytes = rest;
        }
        Self(chunks)
    }
}

impl Chunks for Cut {
    async fn chunk(&mut self, bytes_max: usize) -> Result<Option<Bytes>, StreamLost> {
        let Some(first) = self.0.front_mut() else { return Ok(None) };
        let chunk = first.split_to(bytes_max.min(first.len()));
        if first.is_empty() {
            self.0.pop_front();
        }
        Ok(Some(chunk))
    }
}

fn kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![Kind::Launch, Kind::Call, Kind::Stdout, Kind::Data, Kind::End])
}

fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Header { kind, len: payload.len() }.bytes().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

fn read_all(mut stream: Cut) -> (Vec<(Kind, Bytes)>, Option<StreamLost>) {
    let (mut frames, mut scratch) = (Vec::new(), BytesMut::new());
    futures::executor::block_on(async {
        loop {
            match read_frame(&mut stream, &mut scratch).await {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => return (frames, None),
                Err(lost) => return (frames, Some(lost)),
            }
        }
    })
}

proptest! {
    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
        frames in prop::collection::vec((kind(), prop::collection::vec(any::<u8>(), 0..600)), 0..8),
        cuts in prop::collection::vec(1usize..700, 1..6),
    ) {
        let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| frame(*kind, payload)).collect();
        let (got, lost) = read_all(Cut::new(&bytes, &cuts));
        prop_assert!(lost.is_none());
        let want: Vec<_> = frames.into_iter().map(|(kind, payload)| (kind, payload.into())).collect();
        prop_assert_eq!(got, want);
    }

    #[test]
    fn a_stream_that_ends_within_a_frame_is_lost_and_gives_the_frames_before(
        payload in prop::collection::vec(any::<u8>(), 1..300),
        keep in any::<prop::sample::Index>(),
        cuts in prop::collection::vec(1usize..50, 1..6),
    ) {
        let whole = frame(Kind::Data, &payload);
        let mut bytes = whole.clone();
        bytes.extend_from_slice(&whole[..1 + keep.index(whole.len() - 1)]);
        let (got, lost) = read_all(Cut::new(&bytes, &cuts));
        prop_assert_eq!(got.len(), 1);
        prop_assert!(matches!(lost, Some(StreamLost::Truncated)));
    }

    #[test]
    fn any_bytes_end_in_frames_or_in_a_reason(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        cuts in prop::collection::vec(1usize..50, 1..6),
    ) {
        let (got, _) = read_all(Cut::new(&bytes, &cuts));
        let read: usize = got.iter().map(|(_, payload)| HEADER_BYTES + payload.len()).sum();
        prop_assert!(read <= bytes.len());
    }
}

#[test]
fn a_length_above_the_limit_and_another_kind_are_refused() {
    let mut header = Header { kind: Kind::Data, len: FRAME_BYTES_MAX }.bytes();
    header[7] = 1;
    let (_, lost) = read_all(Cut::new(&header, &[8]));
    assert!(matches!(lost, Some(StreamLost::Malformed(Malformed::Length))));

    let mut stream = Cut::new(&frame(Kind::End, &[]), &[3]);
    let got = futures::executor::block_on(expect_frame(&mut stream, Kind::Answer));
    assert!(matches!(got, Err(StreamLost::Unexpected(Kind::End))));
}

#[test]
fn a_largest_frame_passes() {
    let payload = vec![5; FRAME_BYTES_MAX];
    let (got, lost) = read_all(Cut::new(&frame(Kind::Data, &payload), &[1_200]));
    assert!(lost.is_none());
    assert_eq!(got, [(Kind::Data, payload.into())]);
}
