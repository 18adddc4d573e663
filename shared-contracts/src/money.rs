//! Money: integers of minor units (cents, kopeks), never floats.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Maximum balance of an account in minor units: below 2^53, so that JavaScript represents it
/// exactly.
pub const BALANCE_MAX: i64 = 9_000_000_000_000_000;

/// Amount of an order or deposit in minor units: 1 to [`Amount::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("minimum" = 1, "maximum" = Amount::MAX)))]
pub struct Amount(i64);

/// The number is not a valid amount.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be an integer from 1 to {}, in minor units", Amount::MAX)]
pub struct InvalidAmount;

impl Amount {
    pub const MAX: i64 = 1_000_000_000_000;

    /// Fails if `minor_units` is not from 1 to [`Amount::MAX`].
    pub fn new(minor_units: i64) -> Result<Self, InvalidAmount> {
        if (1..=Self::MAX).contains(&minor_units) {
            Ok(Self(minor_units))
        } else {
            Err(InvalidAmount)
        }
    }

    pub fn minor_units(self) -> i64 {
        self.0
    }
}

/// Written by hand so that every error states the rule: the derived one says "expected i64" for a
/// string.
impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AmountVisitor;

        impl Visitor<'_> for AmountVisitor {
            type Value = Amount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an integer from 1 to {}, in minor units", Amount::MAX)
            }

            fn visit_i64<E: Error>(self, minor_units: i64) -> Result<Amount, E> {
                Amount::new(minor_units).map_err(E::custom)
            }

            fn visit_u64<E: Error>(self, minor_units: u64) -> Result<Amount, E> {
                self.visit_i64(i64::try_from(minor_units).unwrap_or(i64::MAX))
            }
        }

        deserializer.deserialize_i64(AmountVisitor)
    }
}

#[cfg(feature = "openapi")]
impl utoipa::PartialSchema for Amount {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::Type::Integer)
            .format(Some(utoipa::openapi::SchemaFormat::KnownFormat(
                utoipa::openapi::KnownFormat::Int64,
            )))
            .minimum(Some(1))
            .maximum(Some(Self::MAX))
            .into()
    }
}

#[cfg(feature = "openapi")]
impl utoipa::ToSchema for Amount {}

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
