//! What `payments` says.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Amount, Event, OrderId, PAYMENTS_STREAM, UserId};

/// How the payment of an order ended. Decided once, for ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PaymentSettled {
    /// The order.
    pub order_id: OrderId,
    /// Who was asked to pay.
    pub user_id: UserId,
    /// How much.
    pub amount: Amount,
    /// Whether the money was debited.
    #[serde(flatten)]
    pub outcome: PaymentOutcome,
}

/// Whether the money was debited; on the wire `outcome` and `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum PaymentOutcome {
    /// Debited, once.
    Paid,
    /// Not debited, and never will be.
    Declined {
        /// Why.
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
    /// As it is written on the wire and in databases.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InsufficientFunds => "insufficient_funds",
            Self::NoAccount => "no_account",
        }
    }

    /// Reads what [`as_str`](Self::as_str) wrote.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::InsufficientFunds, Self::NoAccount]
            .into_iter()
            .find(|reason| reason.as_str() == text)
    }
}

impl PaymentOutcome {
    /// The word on the wire and in databases.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Paid => "paid",
            Self::Declined { .. } => "declined",
        }
    }

    /// Why it was declined, if it was.
    pub fn reason(self) -> Option<DeclineReason> {
        match self {
            Self::Paid => None,
            Self::Declined { reason } => Some(reason),
        }
    }

    /// Reads the pair of columns that a database holds.
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
