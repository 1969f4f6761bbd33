//! Launches at a steady rate, whatever else happens, counted by what went on meanwhile.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use volley_client::{Client, ConnectOptions, LaunchSpec};

use crate::house::House;

/// Launches a second.
const RATE: u32 = 100;

/// Launches of a time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Phase {
    pub(crate) name: &'static str,
    pub(crate) launched: u64,
    pub(crate) started: u64,
    pub(crate) slowest_ms: u128,
    pub(crate) failures: Vec<String>,
}

#[derive(Default)]
struct Counted {
    now: Phase,
    done: Vec<Phase>,
}

pub(crate) struct Load {
    counted: Arc<Mutex<Counted>>,
    stop: CancellationToken,
    running: std::thread::JoinHandle<()>,
}

impl Load {
    /// Connects, waits for a first launch that starts, and goes on launching. On a thread of its own: what the test does
    /// besides must not count as slow launches.
    pub(crate) fn start(house: &House) -> Self {
        let options = ConnectOptions {
            placers: vec![house.placer],
            identity: house.tenant(),
            budget: Duration::from_secs(5),
            ..ConnectOptions::default()
        };
        let counted = Arc::<Mutex<Counted>>::default();
        let stop = CancellationToken::new();
        let (count, stopped) = (Arc::clone(&counted), stop.clone());
        let (ready, started) = mpsc::channel();
        let running = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let client = connect(options).await;
                ready.send(()).unwrap();
                launch_all(client, count, stopped).await;
            });
        });
        started.recv().unwrap();
        Self { counted, stop, running }
    }

    /// What was launched since the last call was launched while this was so.
    pub(crate) fn phase(&self, name: &'static str) {
        println!("{name}");
        let mut counted = self.counted.lock().unwrap();
        let phase = std::mem::take(&mut counted.now);
        counted.done.push(Phase { name, ..phase });
    }

    pub(crate) fn stop(self) -> Vec<Phase> {
        self.stop.cancel();
        self.phase("the end");
        let Self { counted, running, .. } = self;
        running.join().unwrap();
        let mut phases = counted.lock().unwrap().done.clone();
        phases.retain(|phase| phase.launched > 0);
        phases
    }
}

async fn connect(options: ConnectOptions) -> Client {
    let client = Client::connect(options).await.unwrap();
    let began = Instant::now();
    while let Err(error) = client.launch(LaunchSpec::new("none").command(["true"])).await {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing starts: {error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("  a first launch has started: {:.1} s", began.elapsed().as_secs_f64());
    client
}

async fn launch_all(client: Client, counted: Arc<Mutex<Counted>>, stop: CancellationToken) {
    let tasks = TaskTracker::new();
    let mut tick = tokio::time::interval(Duration::from_secs(1) / RATE);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = tick.tick() => {}
        }
        let (client, counted) = (client.clone(), Arc::clone(&counted));
        tasks.spawn(async move {
            let began = Instant::now();
            let launched = client.launch(LaunchSpec::new("none").command(["true"])).await;
            let mut counted = counted.lock().unwrap();
            let now = &mut counted.now;
            now.launched += 1;
            now.slowest_ms = now.slowest_ms.max(began.elapsed().as_millis());
            match launched {
                Ok(_) => now.started += 1,
                Err(error) if now.failures.len() < 5 => now.failures.push(error.to_string()),
                Err(_) => {}
            }
        });
    }
    tasks.close();
    tasks.wait().await;
    client.close().await;
}
