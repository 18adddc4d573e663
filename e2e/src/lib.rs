//! Tests of the whole system through its front door; see `tests/it`.
