//! Launches a sandbox, shows what it wrote, and says how it ended.
//!
//! ```sh
//! cargo run -p volley-client --example launch -- 127.0.0.1:7420 IDENTITY_DIR TENANT IMAGE sh -c 'id; exit 7'
//! ```
//! Exits as the sandbox's program did.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use volley_client::{Client, ConnectOptions, Event, LaunchSpec};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
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

    let spec = LaunchSpec::new(image).command(args).lifetime(Duration::from_secs(60));
    let sandbox = client.launch(spec).await?;
    eprintln!("{}", sandbox.id());

    let mut main = sandbox.attach(0).await?;
    let mut code = 1;
    while let Some(event) = main.next().await? {
        match event {
            Event::Stdout(bytes) => io::stdout().write_all(&bytes)?,
            Event::Stderr(bytes) => io::stderr().write_all(&bytes)?,
            Event::Lost(bytes) => eprintln!("({bytes} bytes of output were dropped)"),
            Event::Exit(exit) => code = exit.code,
        }
    }
    client.close().await;
    Ok(ExitCode::from(u8::try_from(code)?))
}
