//! Events of `payments`.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Amount, Event, OrderId, PAYMENTS_STREAM, UserId};

/// The outcome of an order's payment. It is decided once and never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PaymentSettled {
    /// The order.
    pub order_id: OrderId,
    /// The customer.
    pub user_id: UserId,
    /// The price, in minor units.
    pub amount: Amount,
    /// Whether the money was debited.
    #[serde(flatten)]
    pub outcome: PaymentOutcome,
}

/// Whether the money was debited; fields `outcome` and `reason` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum PaymentOutcome {
    /// The amount was debited.
    Paid,
    /// Nothing was debited, and nothing ever will be.
    Declined {
        /// Why nothing was debited.
        reason: DeclineReason,
    },
}

/// Why an order was not paid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum DeclineReason {
    /// The balance was lower than the amount.
    InsufficientFunds,
    /// The user has no account.
    NoAccount,
}

impl DeclineReason {
    /// The value in JSON and in databases.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InsufficientFunds => "insufficient_funds",
            Self::NoAccount => "no_account",
        }
    }

    /// The inverse of [`as_str`](Self::as_str).
    pub fn parse(text: &str) -> Option<Self> {
        [Self::InsufficientFunds, Self::NoAccount]
            .into_iter()
            .find(|reason| reason.as_str() == text)
    }
}

impl PaymentOutcome {
    /// The value in JSON and in databases.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Paid => "paid",
            Self::Declined { .. } => "declined",
        }
    }

    /// The reason, if it was declined.
    pub fn reason(self) -> Option<DeclineReason> {
        match self {
            Self::Paid => None,
            Self::Declined { reason } => Some(reason),
        }
    }

    /// Parses the columns `outcome` and `reason`.
    pub fn parse(outcome: &str, reason: Option<&str>) -> Option<Self> {
        match (outcome, reason) {
            ("paid", None) => Some(Self::Paid),
            ("declined", Some(reason)) => {
                DeclineReason::parse(reason).map(|reason| Self::Declined { reason })
            }
            _ => None,
        }
    }
}

impl fmt::Display for DeclineReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Event for PaymentSettled {
    const SUBJECT: &'static str = "gozon.payments.settled";
    const STREAM: &'static str = PAYMENTS_STREAM;
    const TYPE: &'static str = "gozon.payment.settled.v1";
    const SOURCE: &'static str = "payments";

    fn key(&self) -> Uuid {
        self.order_id.as_uuid()
    }
}
