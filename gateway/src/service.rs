//! The services behind the gateway.

use service_kit::Problem;
use service_kit::problem::Code;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    Orders,
    Payments,
}

impl Service {
    pub(crate) fn unavailable(self) -> Problem {
        Problem::new(Code::ServiceUnavailable).because(match self {
            Self::Orders => "Orders Service temporarily unavailable.",
            Self::Payments => "Payments Service temporarily unavailable.",
        })
    }
}
