//! Money: integers of minor units (cents, kopeks), never floats.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Most that an account may hold, in minor units: below 2^53, so that it is exact in JavaScript too.
pub const BALANCE_MAX: i64 = 9_000_000_000_000_000;

/// What one order costs or one deposit adds, in minor units: 1 to [`Amount::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("minimum" = 1, "maximum" = Amount::MAX)))]
pub struct Amount(i64);

/// The number is no amount.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be an integer from 1 to {}, in minor units", Amount::MAX)]
pub struct InvalidAmount;

impl Amount {
    /// Largest amount.
    pub const MAX: i64 = 1_000_000_000_000;

    /// Checks and wraps `minor_units`.
    pub fn new(minor_units: i64) -> Result<Self, InvalidAmount> {
        if (1..=Self::MAX).contains(&minor_units) {
            Ok(Self(minor_units))
        } else {
            Err(InvalidAmount)
        }
    }

    /// The number of minor units.
    pub fn minor_units(self) -> i64 {
        self.0
    }
}

impl TryFrom<i64> for Amount {
    type Error = InvalidAmount;

    fn try_from(minor_units: i64) -> Result<Self, Self::Error> {
        Self::new(minor_units)
    }
}

impl From<Amount> for i64 {
    fn from(amount: Amount) -> Self {
        amount.0
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_is_positive_and_bounded() {
        assert_eq!(Amount::new(1).unwrap().minor_units(), 1);
        assert_eq!(Amount::new(Amount::MAX).unwrap().minor_units(), Amount::MAX);
        for bad in [0, -1, i64::MIN, Amount::MAX + 1, i64::MAX] {
            assert_eq!(Amount::new(bad), Err(InvalidAmount), "{bad}");
        }
    }

    #[test]
    fn only_a_json_integer_is_an_amount() {
        assert!(serde_json::from_str::<Amount>("100").is_ok());
        for bad in [
            "1.5",
            "1e3",
            "100.0",
            "\"1\"",
            "0",
            "-5",
            "null",
            "1000000000001",
            "99999999999999999999",
        ] {
            assert!(serde_json::from_str::<Amount>(bad).is_err(), "{bad}");
        }
    }
}
