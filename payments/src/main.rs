//! The payments service: `payments --help`.

use payments::{App, Config};
use service_kit::shutdown::Failure;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let config: Config = service_kit::healthcheck::parse_or_check().await;
    service_kit::telemetry::init(config.log_format, &config.log_filter)?;
    let shutdown = service_kit::shutdown::on_signal()?;
    // A spawned task runs on the worker threads, which also poll the sockets. `main` runs on its
    // own thread, and a worker thread would have to wake it for each socket event.
    Ok(tokio::spawn(App::build(config).await?.run(shutdown)).await??)
}
