//! The payments service: `payments --help`.

use payments::{App, Config};
use service_kit::shutdown::Failure;

fn main() -> Result<(), Failure> {
    service_kit::runtime::run(serve())
}

async fn serve() -> Result<(), Failure> {
    let config: Config = service_kit::healthcheck::parse_or_check().await;
    service_kit::telemetry::init(config.log_format, &config.log_filter)?;
    let shutdown = service_kit::shutdown::on_signal()?;
    Ok(App::build(config).await?.run(shutdown).await?)
}
