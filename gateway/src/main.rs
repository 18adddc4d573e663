//! The gateway: `gateway --help`.

use gateway::{App, Config};
use service_kit::shutdown::Failure;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let config: Config = service_kit::healthcheck::parse_or_check().await;
    service_kit::telemetry::init(config.log_format, &config.log_filter)?;
    let shutdown = service_kit::shutdown::on_signal()?;
    // Spawned, so that it runs on a worker thread. `main` runs on another thread, which the workers
    // would have to wake for each event.
    Ok(tokio::spawn(App::build(config).await?.run(shutdown)).await??)
}
