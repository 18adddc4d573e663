//! The points service: `points --help`.

use clap::Parser as _;
use service_kit::shutdown::Failure;
use service_kit::telemetry::LogFormat;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    service_kit::telemetry::init(LogFormat::Text, "info")?;
    let shutdown = service_kit::shutdown::on_signal()?;
    let config = points::Config::parse();
    Ok(points::run(&config, shutdown).await?)
}
