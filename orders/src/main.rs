//! The orders service: `orders --help`.

use orders::{App, Config};
use service_kit::shutdown::Failure;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let config: Config = service_kit::healthcheck::parse_or_check().await;
    service_kit::telemetry::init(config.log_format, &config.log_filter)?;
    let shutdown = service_kit::shutdown::on_signal()?;
    // A task of its own runs on the threads that hear from the sockets; this function would be woken by them each time.
    Ok(tokio::spawn(App::build(config).await?.run(shutdown)).await??)
}
