//! FAULTS M3 and M5 on a real S3 server: lost replies, refusals and stalls on the way to it, and a publisher that is
//! stopped in the middle of a publication. One lineage, no version twice.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod fleet;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use fleet::{
    Fleet,
    engines::s3::S3,
    http::{self, Fate},
    process::Aggregator,
    published, until,
};
use wire::map::{Head, MapVersion};

/// Heads that landed, in their order, with the publication that each says it follows.
type Landed = Arc<Mutex<Vec<(MapVersion, MapVersion)>>>;

fn note(landed: &Landed) -> impl Fn(&http::Request, u16) + Send + Sync + 'static {
    let landed = Arc::clone(landed);
    move |request, status| {
        if request.puts_head() && status == 200 {
            let head = Head::from_bytes(&request.body).unwrap();
            landed.lock().unwrap().push((head.version, head.previous));
        }
    }
}

/// Each head follows the one before.
fn assert_one_lineage(landed: &Landed) {
    let landed = landed.lock().unwrap();
    for pair in landed.windows(2) {
        assert_eq!(pair[1].1, pair[0].0, "a head follows another: {landed:?}");
        assert!(pair[1].0 > pair[0].0);
    }
    println!("{} heads, one lineage, the last {:?}", landed.len(), landed.last().unwrap().0);
}

/// M5: "reply lost after a PUT, 409, 503, 30 s stall: own nonce found, no duplicate version".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accidents_on_the_way_to_the_store_make_no_version_twice() {
    let s3 = match S3::start() {
        Ok(s3) => s3,
        Err(why) => return println!("skipped: {why}"),
    };
    // The whole stall of FAULTS, or enough of it to be longer than a try.
    let stall = std::env::var("VOLLEY_STALL_S").ok().and_then(|text| text.parse().ok());
    let stall = Duration::from_secs(stall.unwrap_or(3));
    let next = Arc::new(Mutex::new(Vec::<Fate>::new()));
    let (fates, landed) = (Arc::clone(&next), Landed::default());
    let way = http::way_to(
        &s3.endpoint,
        move |request| {
            let mut fates = fates.lock().unwrap();
            if request.puts_head() { fates.pop().unwrap_or(Fate::Pass) } else { Fate::Pass }
        },
        note(&landed),
    );
    let fleet = Fleet { objects_url: s3.url_through(&way), ..Fleet::new() };
    let running = fleet.start(|_| {}).await;
    let mut senders = fleet.senders(300, &[running.udp]);
    senders.beat_all(100_000).unwrap();
    until("the map has all", async || {
        published(&fleet.objects()).await.filter(|(head, _)| head.count == 300)
    })
    .await;
    for (at, (what, fates)) in [
        ("the reply is lost", vec![Fate::LoseReply]),
        ("409", vec![Fate::Answer(409)]),
        (
            "503, and again",
            vec![Fate::Answer(503), Fate::Answer(503), Fate::Answer(503), Fate::Answer(503)],
        ),
        ("a stall", vec![Fate::Stall(stall)]),
        ("a stall, then the reply is lost", vec![Fate::LoseReply, Fate::Stall(stall)]),
    ]
    .into_iter()
    .enumerate()
    {
        let began = Instant::now();
        next.lock().unwrap().extend(fates);
        senders.hosts[at].beat.ip[15] ^= 0x80;
        let (host, addr) = (senders.hosts[at].host, senders.hosts[at].beat.addr());
        senders.beat(at..at + 1, 1_000).unwrap();
        until(what, async || {
            let (head, hosts) = published(&fleet.objects()).await?;
            assert_eq!(head.count, 300);
            hosts.contains(&(host, addr)).then_some(())
        })
        .await;
        until("all accidents happened", async || next.lock().unwrap().is_empty().then_some(()))
            .await;
        println!("{what}: published {:.1} s later", began.elapsed().as_secs_f64());
    }
    running.stop().await;
    assert_one_lineage(&landed);
}

/// M3: "two publishers, one stopped 60 s in mid-publish and woken: one lineage; the zombie is fenced". It is stopped until the
/// other has published, which takes the lease's ten seconds; `VOLLEY_ZOMBIE_S` makes it longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_that_slept_in_the_middle_is_fenced() {
    let (node, s3) = match (fleet::engines::cassandra::Cassandra::start().await, S3::start()) {
        (Ok(node), Ok(s3)) => (node, s3),
        (Err(why), _) | (_, Err(why)) => return println!("skipped: {why}"),
    };
    let landed = Landed::default();
    let (hold, held) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
    let (seize, keep) = (Arc::clone(&hold), Arc::clone(&held));
    let way = http::way_to(
        &s3.endpoint,
        move |request| {
            if request.puts_head() && seize.swap(false, Ordering::SeqCst) {
                let (release, until) = mpsc::channel();
                *keep.lock().unwrap() = Some(release);
                return Fate::Hold(until);
            }
            Fate::Pass
        },
        note(&landed),
    );
    let other_way = http::way_to(&s3.endpoint, |_| Fate::Pass, note(&landed));
    let fleet =
        Fleet { store: node.url.clone(), objects_url: s3.url_through(&way), ..Fleet::new() };
    let zombie = Aggregator::start(&fleet, 1, &fleet.objects_url);
    let mut senders = fleet.senders(500, &[zombie.udp]);
    senders.beat_all(100_000).unwrap();
    until("the first publishes all", async || {
        published(&fleet.objects()).await.filter(|(head, _)| head.count == 500)
    })
    .await;
    let heir = Aggregator::start(&fleet, 2, &s3.url_through(&other_way));
    // One more publication begins, and stops half way: its pages are there, its head is under way.
    hold.store(true, Ordering::SeqCst);
    senders.hosts[0].beat.ip[15] ^= 0x80;
    senders.beat(0..1, 1_000).unwrap();
    until("its head is under way", async || held.lock().unwrap().is_some().then_some(())).await;
    zombie.signal("STOP");
    let slept = Instant::now();
    senders.retarget(heir.udp);
    let epoch = |landed: &Landed| landed.lock().unwrap().last().map(|(version, _)| version.epoch);
    until("the other publishes", async || {
        senders.beat_all(100_000).unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        (epoch(&landed) == Some(2)).then_some(())
    })
    .await;
    let wanted = std::env::var("VOLLEY_ZOMBIE_S").ok().and_then(|text| text.parse().ok());
    let wanted = Duration::from_secs(wanted.unwrap_or(0));
    while slept.elapsed() < wanted {
        senders.beat_all(100_000).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // What it had sent arrives now, and it wakes.
    drop(held.lock().unwrap().take());
    zombie.signal("CONT");
    println!("it slept {:.1} s in the middle of a publication", slept.elapsed().as_secs_f64());
    until("it knows that it lost", async || {
        zombie.figure("volley_heartbeatd_map{what=\"puts_lost\"}").filter(|lost| *lost > 0)
    })
    .await;
    senders.hosts[1].beat.ip[15] ^= 0x80;
    let (host, addr) = (senders.hosts[1].host, senders.hosts[1].beat.addr());
    until("the other goes on", async || {
        senders.beat_all(100_000).unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (head, hosts) = published(&fleet.objects()).await?;
        assert_eq!(head.count, 500);
        hosts.contains(&(host, addr)).then_some(())
    })
    .await;
    assert_eq!(zombie.figure("volley_heartbeatd_map{what=\"leads\"}"), Some(0));
    assert_one_lineage(&landed);
}
