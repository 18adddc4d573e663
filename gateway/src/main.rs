//! The gateway: `gateway --help`.

use clap::Parser as _;
use gateway::{App, Config};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    service_kit::telemetry::init(config.log_format, &config.log_filter)?;
    let shutdown = service_kit::shutdown::on_signal()?;
    App::build(config).await?.run(shutdown).await
}
