//! Works in one sandbox: writes a file, runs a program over it with input, lists, and cleans up.
//!
//! ```sh
//! cargo run -p volley-client --example exec -- 127.0.0.1:7420 IDENTITY_DIR TENANT IMAGE
//! ```
//! The image needs a shell, `sleep`, `cat` and `wc`.

use std::{env, time::Duration};

use futures::StreamExt;
use volley_client::{Client, ConnectOptions, Event, ExecSpec, LaunchSpec};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = env::args().skip(1);
    let mut next = |what: &str| args.next().ok_or_else(|| format!("{what} is missing"));
    let options = ConnectOptions {
        placers: vec![next("the placer's address")?.parse()?],
        identity: next("the identity's directory")?.into(),
        tenant: Some(next("the tenant")?),
        ..ConnectOptions::default()
    };
    let image = next("the image")?;
    let client = Client::connect(options).await?;
    let spec = LaunchSpec::new(image)
        .command(["sleep", "60"])
        .label("example", "exec")
        .lifetime(Duration::from_secs(60));
    let sandbox = client.launch(spec).await?;

    sandbox.write_file("/tmp/greeting", 0o644, b"hello, sandbox\n").await?;
    let output = sandbox.exec(["cat", "/tmp/greeting"]).await?.output().await?;
    print!("{}", String::from_utf8_lossy(&output.stdout));

    // Input and output at once: one task a side.
    let counter = sandbox.exec(ExecSpec::new(["wc", "-c"]).stdin(true)).await?;
    let (mut stdin, events) = counter.split();
    let feed = async {
        for _ in 0..3 {
            stdin.write_all(b"0123456789").await?;
        }
        stdin.close().await
    };
    let show = events.for_each(|event| async move {
        if let Ok(Event::Stdout(bytes)) = event {
            print!("bytes counted: {}", String::from_utf8_lossy(&bytes));
        }
    });
    let (fed, ()) = tokio::join!(feed, show);
    fed?;

    for record in client.list(&[("example".into(), "exec".into())], false).await? {
        println!("{} {}", record.sandbox, record.image);
    }
    sandbox.kill().await?;
    let exit = sandbox.wait().await?;
    println!("ended: {:?}", exit.why);
    client.close().await;
    Ok(())
}
