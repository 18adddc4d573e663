//! Format of times: RFC 3339 in UTC with exactly six fractional digits, so that text order is time
//! order.

use serde::Serializer;
use time::{OffsetDateTime, UtcOffset};

pub fn format(at: OffsetDateTime) -> String {
    let at = at.to_offset(UtcOffset::UTC);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.microsecond()
    )
}

/// For `#[serde(serialize_with = "...")]`.
pub fn serialize<S: Serializer>(at: &OffsetDateTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(*at))
}

/// Like [`serialize`], for an optional time.
pub fn serialize_option<S: Serializer>(
    at: &Option<OffsetDateTime>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => serializer.serialize_some(&format(*at)),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use time::format_description::well_known::Rfc3339;

    use super::*;

    #[test]
    fn a_time_has_six_fractional_digits_and_is_in_utc() {
        for (from, to) in [
            ("2026-11-21T10:00:00Z", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21T10:00:00.25Z", "2026-11-21T10:00:00.250000Z"),
            (
                "2026-11-21T01:00:00.1234567+03:00",
                "2026-11-20T22:00:00.123456Z",
            ),
        ] {
            let at = OffsetDateTime::parse(from, &Rfc3339).unwrap();
            assert_eq!(format(at), to);
            assert!(OffsetDateTime::parse(to, &Rfc3339).is_ok());
        }
    }
}
