//! When an order was stored, by the clock of the database. Only this clock decides whether the
//! order is re-asked.

/// Does not rewrite rows: existing orders count as stored now.
pub(super) const UP: &str =
    "ALTER TABLE orders ADD COLUMN stored_at timestamptz NOT NULL DEFAULT now()";
